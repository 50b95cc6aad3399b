"""How heads answer to their own write, beside its other sign, another prompt's and a random one: slopes by layer."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HEADS, OWN, SHARE, has_nulls, reinforcement_nulls
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import depth, style

TITLES = {
    "own": "its own write",
    "reversed": "its own write, reversed",
    "partner": "its write on another prompt",
    "random": "a random direction as long",
}
READING = (
    "Slope of the change of direct effect on the direct effect, one edited position of each prompt. Bars: intervals "
    "that hold for all heads of a panel together ({confidence:.0%}).",
    "Coloured, the same heads in each panel: self-repressing (blue) and self-reinforcing (orange) by their own write. "
    "Filled: and the interval of the difference of slopes, own minus null, excludes zero for every null.",
)
NEED = Need(
    "heads that read their own write and nulls of it, as in `reinforcement_nulls`",
    lambda ds: has_nulls(ds) and {*HEADS} <= {*ds.dims},
)


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for what is added, with every head's slope; several stores have a row each.

    `datasets` is a store or a result of `reinforcement_nulls`, a sequence of them, or a mapping from title to them.
    Raises UsageError as `reinforcement_nulls` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, lambda ds, _: reinforcement_nulls(ds))
    columns = max(heads.sizes["write"] for heads in found.values())
    figure = style.new_figure(0.6 + 3 * columns, 1 + 3.4 * len(found))
    grid = figure.subplots(len(found), columns, squeeze=False, sharex="row", sharey="row")
    for row, (name, heads) in zip(grid, found.items(), strict=True):
        for axes, label in zip(row, heads["write"].values, strict=False):
            _draw_panel(axes, heads.sel(write=label))
            axes.set_title(f"{TITLES.get(str(label), label)}{_told(heads, str(label))}", fontsize=9)
        row[0].set_ylim(*depth.room(heads.slope.values, heads.high.values))
        row[0].set_ylabel("slope" if len(found) == 1 else f"{name}: slope")
    style.heading(figure, found)
    confidence = next(iter(found.values())).attrs["confidence"]
    told = style.captions(found, top=False, of="slope")
    style.caption(figure, found, [*told, *(line.format(confidence=confidence) for line in READING)])
    return figure


def _told(heads: xr.Dataset, label: str) -> str:
    """How many heads answer to their own write; of a null, of how many the slope is beyond it."""
    kind = heads.kind.values
    if label == OWN:
        return f"\n{(kind < 0).sum()} repress, {(kind > 0).sum()} reinforce"
    one = heads.sel(null=label)
    beyond = ((one.excess_high < 0) & (kind < 0)).sum() + ((one.excess_low > 0) & (kind > 0)).sum()
    return f"\nbeyond it: {int(beyond)} of these {np.count_nonzero(kind)}"


def _draw_panel(axes: Axes, one: xr.Dataset) -> None:
    places = depth.places(one)
    for value, colour in ((0, style.MUTED), (-1, style.colour(0)), (1, style.colour(1))):
        for filled in (False, True):
            chosen = (one.kind.values == value) & np.isfinite(one.slope.values)
            chosen &= (one.beyond.values != 0) == filled
            if chosen.any():
                look = {"fmt": "o", "markersize": 4, "elinewidth": 0.8, "color": colour}
                look |= {"alpha": 0.9 if value else 0.4, "markerfacecolor": colour if filled else "white"}
                reach = style.bars((one.high - one.slope).values[chosen])
                axes.errorbar(places[chosen], one.slope.values[chosen], reach, **look)
    depth.name_axis(axes, True)
