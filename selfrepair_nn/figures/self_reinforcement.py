"""Direct effect before and after a head's own write is added to what it reads, at each scale (Figures 9, 19)."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HEADS, SHARE, reinforcement_by_head
from selfrepair_nn.components import Head
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import style, suiting

KINDS = {-1: "self-repressing", 0: "no clear response", 1: "self-reinforcing"}
READING = (
    "Dots: one edited position of each prompt. Upper row: the steepest self-repressing head; lower: self-reinforcing.",
    "Dashed: y = x, no response. Line: regression; slope of the change, with an interval that holds for all heads of "
    "the store together ({confidence:.0%}).",
)


@figure(*suiting.REINFORCED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for each scale, for the most repressed and the most reinforced head of each store.

    Where no head is self-repressing (or self-reinforcing) it is the one of lowest (highest) mean slope.

    `datasets` is a store or a result of `reinforcement_by_head`, a sequence of them, or a mapping from title to them.
    Raises UsageError as `reinforcement_by_head` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, lambda ds, _: reinforcement_by_head(ds))
    columns = max(heads.sizes["scale"] for heads in found.values())
    figure = style.new_figure(0.6 + 3.1 * columns, 0.9 + 6.4 * len(found))
    grid = figure.subplots(2 * len(found), columns, squeeze=False, sharex="row", sharey="row")
    for index, (name, heads) in enumerate(found.items()):
        for row, place in zip(grid[2 * index :], _extremes(heads), strict=False):
            _draw_row(row, heads.isel(place), "" if len(found) == 1 else f"{name}, ")
    style.heading(figure, found)
    confidence = next(iter(found.values())).attrs["confidence"]
    style.caption(
        figure,
        found,
        [*style.captions(found, top=False), *(r.format(confidence=confidence) for r in READING)],
    )
    return figure


def _extremes(heads: xr.Dataset) -> list[dict[str, int]]:
    """Where the steepest self-repressing and self-reinforcing heads lie; of all heads, where none is of the kind."""
    slopes, kind = heads.slope.mean("scale").values, heads.kind.values
    found = []
    for wanted in (-1, 1):
        among = (kind == wanted) | ~(kind == wanted).any()
        best = np.nanargmax(np.where(among, wanted * slopes, np.nan))
        found.append(dict(zip(HEADS, np.unravel_index(best, slopes.shape), strict=True)))
    return found


def _draw_row(row: np.ndarray, head: xr.Dataset, prefix: str) -> None:
    before = head.before.values
    ends = np.array([np.nanmin(before), np.nanmax(before)])
    label = Head(int(head["layer"]), int(head["head"])).label
    for i, axes in enumerate(row):
        if i >= head.sizes["scale"]:
            axes.remove()
            continue
        one = head.isel(scale=i)
        axes.plot(ends, ends, "k--", dashes=(5, 3), linewidth=1)
        axes.scatter(before, one.after.values, s=8, color=style.MUTED, alpha=0.5, linewidth=0)
        slope, intercept = float(one.slope), float(one.intercept)
        axes.plot(ends, ends + intercept + slope * ends, color=style.colour(1), linewidth=1.8)
        axes.set_title(f"{prefix}{label}, {float(one['scale']):g} × its own write")
        said = f"slope {slope:+.2f} ({float(one.low):+.2f} to {float(one.high):+.2f})"
        _write(axes, said.replace("-", "\N{MINUS SIGN}"))
        axes.set_xlabel("direct effect (logits)")
    row[0].set_ylabel(f"{label}, {KINDS[int(head.kind)]}\ndirect effect when reinforced (logits)")


def _write(axes: Axes, said: str) -> None:
    place = {"transform": axes.transAxes, "va": "top", "fontsize": 7.5}
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    axes.text(0.02, 0.98, said, bbox=box, **place)
