"""How every head's direct effect answers to its own write, by layer and scale (section 5.3)."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE, reinforcement_by_head, strongest_responses
from selfrepair_nn.components import Head
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import depth, labels, style, suiting

NAMED = 3
READING = (
    "Slope of the change of direct effect on the direct effect, one edited position of each prompt. Bars: "
    "intervals that hold for all heads of a panel together ({confidence:.0%}).",
    "Hardly anything is known where a bar leaves the panel. Filled: self-repressing (below zero) and self-reinforcing "
    "(above zero) heads: their intervals exclude zero at every scale.",
)


@figure(*suiting.REINFORCED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for each scale with every head's slope; several stores have a row each.

    `datasets` is a store or a result of `reinforcement_by_head`, a sequence of them, or a mapping from title to them.
    Raises UsageError as `reinforcement_by_head` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, lambda ds, _: reinforcement_by_head(ds))
    columns = max(heads.sizes["scale"] for heads in found.values())
    figure = style.new_figure(0.6 + 3.4 * columns, 1 + 3.6 * len(found))
    grid = figure.subplots(len(found), columns, squeeze=False, sharex="row", sharey="row")
    for row, (name, heads) in zip(grid, found.items(), strict=True):
        for i, axes in enumerate(row):
            if i >= heads.sizes["scale"]:
                axes.remove()
                continue
            one = heads.isel(scale=i)
            _draw_panel(axes, one)
            axes.set_title(f"{float(one['scale']):g} × its own write")
        row[0].set_ylim(*depth.room(heads.slope.values, heads.high.values))
        row[0].set_ylabel("slope" if len(found) == 1 else f"{name}: slope")
        style.lay_out(figure)
        _name_heads(row[heads.sizes["scale"] - 1], heads)
    style.heading(figure, found)
    confidence = next(iter(found.values())).attrs["confidence"]
    style.caption(
        figure,
        found,
        [*style.captions(found, top=False), *(r.format(confidence=confidence) for r in READING)],
    )
    return figure


def _draw_panel(axes: Axes, heads: xr.Dataset) -> None:
    places, kind = depth.places(heads), heads.kind.values
    for value, colour in ((-1, style.colour(0)), (0, style.MUTED), (1, style.colour(1))):
        chosen = (kind == value) & np.isfinite(heads.slope.values)
        slope, reach = heads.slope.values[chosen], style.bars((heads.high - heads.slope).values[chosen])
        look = {
            "fmt": "o",
            "markersize": 4,
            "elinewidth": 0.8,
            "color": colour,
            "alpha": 0.9 if value else 0.5,
        }
        axes.errorbar(places[chosen], slope, reach, markerfacecolor=colour if value else "white", **look)
    depth.name_axis(axes, True)


def _name_heads(axes: Axes, heads: xr.Dataset) -> None:
    """The labels of the heads that respond most, in the panel of the largest scale."""
    last, places = heads.isel(scale=-1), depth.places(heads)
    every = _bars(places, last)
    for count in (NAMED, -NAMED):
        best = strongest_responses(heads, count)
        names = [
            Head(int(i), int(j)).label for i, j in zip(best["layer"].values, best["head"].values, strict=True)
        ]
        at = [heads.indexes[d].get_indexer(best[d].values) for d in ("layer", "head")]
        points = np.column_stack([places[tuple(at)], last.slope.values[tuple(at)]])
        labels.label_points(axes, points, names, every)


def _bars(places: np.ndarray, heads: xr.Dataset) -> np.ndarray:
    """Points (x, y) along every head's interval, so close that no label fits between two of them."""
    reach, slope = np.nan_to_num(style.bars((heads.high - heads.slope).values)), heads.slope.values
    along = np.linspace((slope - reach).ravel(), (slope + reach).ravel(), 200)
    points = np.column_stack([np.tile(places.ravel(), len(along)), along.ravel()])
    return points[np.isfinite(points).all(1)]
