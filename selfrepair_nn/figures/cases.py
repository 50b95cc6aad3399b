"""What each case of a store removes, what the logit loses, and what is made up for, whatever its cases are."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, among, by_case
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import style, suiting

MOST = 40
READING = (
    "Self-repair: logit change less the change of the direct effect of what is ablated itself. "
    "Bars: 95% intervals.",
)
PARTS = {
    "own": "change of its own direct effect",
    "top_logit_change": "logit change",
    "top_self_repair": "self-repair",
}

NEED = Need(
    "cases: sites that are ablated together", lambda ds: "case" in ds.dims and suiting.axis(ds) is None
)


@figure(*NEED, name=__name__, about=__doc__, overview=True)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for each store with a row for each case; of more than forty, those of largest self-repair.

    `datasets` is a store of cases or `by_case` of it, a sequence of them, or a mapping from title to them. Raises
    UsageError as `by_case` does, and if there is nothing to draw.
    """
    found = {name: _largest(cases) for name, cases in style.summaries(datasets, share, by_case).items()}
    rows = [cases.sizes["case"] for cases in found.values()]
    figure = style.new_figure(8.6, 1 + sum(0.9 + 0.28 * count for count in rows))
    looks = {"squeeze": False, "gridspec_kw": {"height_ratios": [3 + count for count in rows]}}
    for axes, (name, cases) in zip(figure.subplots(len(found), 1, **looks)[:, 0], found.items(), strict=True):
        _draw_store(axes, cases)
        axes.set_xlabel(f"mean on {among(share, *found.values())} (logits)")
        axes.set_title("" if len(found) == 1 else name, loc="right")
    style.heading(figure, found)
    style.caption(figure, found, [*style.captions(found), *READING])
    return figure


def _largest(cases: xr.Dataset) -> xr.Dataset:
    """The cases of which something is done: in the order of the store, where they are many those of largest repair."""
    done = np.flatnonzero(cases.tokens.values)
    order = done[np.argsort(-abs(cases.top_self_repair.values[done]), kind="stable")]
    return cases.isel(case=np.sort(order[:MOST]))


def _draw_store(axes: Axes, cases: xr.Dataset) -> None:
    cases = cases.assign(own=-cases.top_removed, own_half_width=cases.top_removed_half_width)
    rows = np.arange(cases.sizes["case"])
    for index, (name, label) in enumerate(PARTS.items()):
        width = style.bars(cases[name + HALF_WIDTH].values)
        look = {
            "marker": style.marker(index),
            "markersize": 4.5,
            "color": style.colour(index),
            "linestyle": "none",
        }
        axes.errorbar(cases[name].values, rows, xerr=width, label=label, elinewidth=1, **look)
    axes.axvline(0, color="black", linewidth=0.8, zorder=1.5)
    axes.set_yticks(rows, [str(label) for label in cases["case"].values])
    axes.set_ylim(rows.size - 0.4, -0.6)
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
