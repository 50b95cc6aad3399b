"""Axes by which the many are drawn: the few values far beyond stand at the edge, with their names and numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from selfrepair_nn.figures import labels, style

FENCE = 13
"""Median absolute deviations from the median beyond which a value is far from the others."""
GAIN = 1.5
"""How much the axis must shrink by leaving far values out, for that to be done."""
MOST = 10
"""Values that may stand at one edge."""
STRIP = 0.16
"""What part of the panel's height the strip of an edge takes."""
MARK = 0.13
"""Where in the strip, from the axis, the marks stand."""
USUAL, LONGEST = 80, 0.15
"""Percentile of the intervals' lengths for which there is room, and the most of the axis that this takes."""
TICKS, INSIDE, BETWEEN = 6, 6, 40
GAP = 6
"""Points between names side by side."""
READING = "Triangles in grey: beyond the axis; names and means of the farthest."
CUT = "An interval that reaches an end of the axis goes on beyond it."


@dataclass(frozen=True)
class Values:
    """Values with their intervals, names and places on the other axis."""

    x: np.ndarray
    y: np.ndarray
    width: np.ndarray
    names: Sequence[str]

    @property
    def ends(self) -> np.ndarray:
        """Values and the ends of their intervals."""
        reach = np.where(np.isfinite(self.width), self.width, 0)
        every = np.concatenate([self.y, self.y - reach, self.y + reach])
        return every[np.isfinite(every)]


@dataclass(frozen=True)
class Dots(Values):
    """Values in one look, and the means of groups of them; `full` says which are surely something: named first."""

    colour: str
    full: np.ndarray
    means: Values

    @property
    def every(self) -> np.ndarray:
        return np.concatenate([self.y, self.means.ends])

    @property
    def near(self) -> np.ndarray:
        """What is not far from the most of these values; all where most are the same, or there are none."""
        if not self.y.size:
            return self.every
        middle = np.median(self.y)
        reach = FENCE * np.median(abs(self.y - middle)) or np.inf
        return self.every[abs(self.every - middle) <= reach]


@dataclass(frozen=True)
class Far:
    """One value beyond an edge."""

    x: float
    y: float
    width: float
    name: str
    colour: str
    up: bool
    mean: bool

    def told(self, percent: bool) -> str:
        value, width = (
            (f"{self.y:+.0%}", f"{self.width:.0%}") if percent else (f"{self.y:+.2g}", f"{self.width:.1g}")
        )
        known = f" ± {width}" if np.isfinite(self.width) else ""
        return f"{self.name}\n{value}{known}".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Axis:
    """Between which values a panel has a scale, what lies beyond, and whether intervals of the others do (`cut`)."""

    low: float
    high: float
    far: Sequence[Far]
    cut: bool
    percent: bool


def ends(dots: Sequence[Dots]) -> tuple[float, float]:
    """The ends of the axis by which all but a few far values are drawn, zero among them; all where none is far."""
    every, near = (
        np.concatenate([[0.0], *(getattr(each, kind) for each in dots)]) for kind in ("every", "near")
    )
    items = np.concatenate([np.concatenate([each.y, each.means.y]) for each in dots])
    low, high = -_top(-items, -near), _top(items, near)
    if np.ptp(every) < GAIN * (high - low) or high == low:
        low, high = every.min(), every.max()
    size = high - low or 1e-6
    reach = np.concatenate([each.width[np.isfinite(each.width)] for each in dots])
    usual = min(float(np.percentile(reach, USUAL)), LONGEST * size) if reach.size else 0.0
    return float(low - usual * (low < 0) - 0.04 * size), float(high + usual * (high > 0) + 0.04 * size)


def _top(items: np.ndarray, near: np.ndarray) -> float:
    """The largest of what is near; of more than MOST values beyond it, the largest but MOST of all."""
    return max(near.max(), *np.sort(items[items > near.max()])[:-MOST], -np.inf)


def settle(
    axes: Axes, dots: Sequence[Dots], limits: tuple[float, float] | None = None, percent: bool = False
) -> Axis:
    """Set the vertical axis to `limits`, by default `ends`; what lies beyond stands in a strip at that edge.

    `percent`: numbers are shares.
    """
    low, high = limits or ends(dots)
    far = [one for each in dots for one in _far(each, low, high)]
    above, below = any(one.up for one in far), any(not one.up for one in far)
    strip = STRIP * (high - low) / (1 - STRIP * (above + below))
    axes.set_ylim(low - strip * below, high + strip * above)
    ticks = MaxNLocator(TICKS, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    for some, start in ((above, high), (below, low - strip)):
        if some:
            _cover(axes, start, strip)
    for one in far:
        place = high + MARK * strip if one.up else low - MARK * strip
        axes.plot(one.x, place, "^" if one.up else "v", markersize=4.5, color=one.colour, zorder=6)
    if percent:
        axes.yaxis.set_major_formatter(style.as_percent)
    return Axis(low, high, far, any(_cut(each, low, high) for each in dots), percent)


def told(*panels: Axis) -> list[str]:
    """What must be said of the strips and of intervals that are cut, where there are any."""
    strips = [READING] if any(each.far for each in panels) else []
    return strips + ([CUT] if any(each.cut for each in panels) else [])


def _far(dots: Dots, low: float, high: float) -> list[Far]:
    found = []
    for each in (dots.means, dots):
        rows = zip(each.x.tolist(), each.y.tolist(), each.width.tolist(), each.names, strict=True)
        found += [
            Far(*row, dots.colour, row[1] > high, each is dots.means)
            for row in rows
            if row[1] < low or row[1] > high
        ]
    return found


def _cut(dots: Dots, low: float, high: float) -> bool:
    """Whether an interval of what stands within ends without."""
    for each in (dots.means, dots):
        within = (each.y >= low) & (each.y <= high) & np.isfinite(each.width)
        if np.any(within & ((each.y - each.width < low) | (each.y + each.width > high))):
            return True
    return False


def _cover(axes: Axes, start: float, height: float) -> None:
    across = blended_transform_factory(axes.transAxes, axes.transData)
    look = {"facecolor": "#F1F1F1", "edgecolor": "none", "zorder": 5}
    axes.add_patch(Rectangle((0, start), 1, height, transform=across, **look))


def name(axes: Axes, dots: Sequence[Dots], axis: Axis, inside: int = INSIDE) -> None:
    """Write names and values of what stands at the edges, and names of the largest others, `full` ones first.

    The figure has been laid out before.
    """
    for up in (True, False):
        _name_edge(axes, [one for one in axis.far if one.up == up], up, axis.percent, len(dots) > 1)
    every = [(each, i) for each in dots for i in np.flatnonzero((each.y >= axis.low) & (each.y <= axis.high))]
    chosen = [pair for pair in every if pair[0].full[pair[1]]] or every
    chosen = sorted(chosen, key=lambda pair: -abs(pair[0].y[pair[1]]))[:inside]
    places = np.array([(each.x[i], each.y[i]) for each, i in chosen]).reshape(-1, 2)
    others = np.concatenate([*(np.column_stack([each.x, each.y]) for each in dots), *_lines(axes)])
    names, colours = ([getattr(each, kind) for each, _ in chosen] for kind in ("names", "colour"))
    names = [each[i] for each, (_, i) in zip(names, chosen, strict=True)]
    labels.label_points(
        axes, places, names, others, colours if len(dots) > 1 else None, (axis.low, axis.high)
    )


def _lines(axes: Axes) -> list[np.ndarray]:
    """Points along the lines that are drawn, where a label would not be read well."""
    drawn = [
        np.column_stack(line.get_data()) for line in axes.lines if line.get_transform() == axes.transData
    ]
    along = np.linspace(0, 1, BETWEEN)[:, None, None]
    return [(each[:-1] + along * np.diff(each, axis=0)).reshape(-1, 2) for each in drawn if len(each) > 1]


def _lead(axes: Axes, one: Far, text: Any, x: float, reach: float) -> None:
    """A line from a mark to its name, where that stands aside."""
    canvas: Any = axes.figure.canvas
    mark = axes.transData.transform((one.x, 0))[0]
    if abs(mark - x) <= reach:
        return
    box = text.get_window_extent(canvas.get_renderer())
    tip = STRIP * (1 - 2 * MARK)
    near = axes.transAxes.transform((0, 1 - tip if one.up else tip))[1]
    ends = axes.transData.inverted().transform([(mark, near), (x, box.y0 if one.up else box.y1)])
    axes.plot(*ends.T, color=style.MUTED, linewidth=0.5, zorder=6)


def _name_edge(axes: Axes, far: Sequence[Far], up: bool, percent: bool, coloured: bool) -> None:
    """Names side by side, in the order of their marks and not far from them; of many those of the farthest."""
    canvas: Any = axes.figure.canvas
    renderer = canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    across = blended_transform_factory(axes.transData, axes.transAxes)
    look = {"fontsize": style.LABEL - 0.5, "ha": "center", "va": "top" if up else "bottom", "zorder": 7}
    look |= {"linespacing": 1.05, "transform": across}
    texts = [axes.text(one.x, 0.988 if up else 0.012, one.told(percent), **look) for one in far]
    gap = renderer.points_to_pixels(GAP)
    widths = np.array([text.get_window_extent(renderer).width + gap for text in texts])
    wanted = np.array([axes.transData.transform((one.x, 0))[0] for one in far])
    sizes = [np.inf if one.mean else abs(one.y) for one in far]
    places = labels.spread_near(wanted, widths, sizes, frame.x0, frame.x1)
    for i, text in enumerate(texts):
        text.set_in_layout(False)
        if i not in places:
            text.remove()
            continue
        text.set_x(axes.transData.inverted().transform((places[i], 0))[0])
        text.set_color(far[i].colour if coloured else "black")
        _lead(axes, far[i], text, places[i], widths[i] / 2)
