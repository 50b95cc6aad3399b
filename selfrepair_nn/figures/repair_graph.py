"""Who repairs whom: the strongest mean changes, as arrows from the ablated heads to what reacts."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path

from selfrepair_nn.analysis import SHARE, among, strongest_repairs, who_repairs
from selfrepair_nn.components import Head
from selfrepair_nn.confidence import RATE
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import style, suiting

REPAIRS, BREAKS = style.COLOURS[:2]
THIN, THICK = 0.7, 4.5  # arrows, in points
SLOT = 0.62  # inches for each label of a row
SIDE = 0.3  # half the side of a label at which arrows end, in slots
CLEAR = 0.045  # from the middle of a label to an arrow's end, in distances between the rows
READING = (
    "Top: ablated heads. Bottom: components whose direct effect changes most, MLPs in grey; below one another, the "
    "same layer. The final norm is no component.",
    "Dotted: not known to differ from zero (false discovery rate {rate:.0%} over all pairs). The largest of many are "
    "likely to have been measured too large.",
    "Arrows: the {count} largest mean changes on the head's {top}; width by the square root of size.",
)
Slots = dict[tuple[str, str], float]  # row, label -> horizontal place


@dataclass(frozen=True)
class Arrow:
    """From an ablated head to a component, with the mean change of its direct effect in logits, and how well known."""

    ablated: Head
    component: str
    layer: int
    kind: str
    repair: float
    half_width: float
    known: bool

    @property
    def colour(self) -> str:
        return REPAIRS if self.repair > 0 else BREAKS

    @property
    def ends(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Row and label of both ends."""
        return ("ablated", self.ablated.label), ("reacting", self.component)


@figure(*suiting.COMPONENTS, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for each store: blue arrows repair, orange ones break.

    `datasets` is a store or a result of `who_repairs`, a sequence of them, or a mapping from title to them.
    Raises UsageError as `who_repairs` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, who_repairs)
    arrows = {name: _arrows(strongest_repairs(pairs, share=share)) for name, pairs in found.items()}
    widest = max(len(_slots(each)) and max(_slots(each).values()) for each in arrows.values())
    figure = style.new_figure(max(9.6, SLOT * (widest + 1)), 1 + 4.2 * len(found))
    panels = figure.subplots(len(found), 1, squeeze=False).ravel()
    for axes, (name, each) in zip(panels, arrows.items(), strict=True):
        _draw_store(axes, each)
        axes.set_title("" if len(found) == 1 else name)
    style.heading(figure, found)
    count = max(len(each) for each in arrows.values())
    reading = [line.format(count=count, top=among(share, *found.values()), rate=RATE) for line in READING]
    style.caption(figure, found, [*style.captions(found), *reading])
    return figure


def _arrows(edges: xr.Dataset) -> list[Arrow]:
    """The strongest first."""
    names = ("layer", "head", "component", "component_layer", "component_kind", "repair")
    names += ("repair_half_width", "repair_known")
    rows = zip(*(edges[name].values.tolist() for name in names), strict=True)
    return [Arrow(Head(layer, head), *others) for layer, head, *others in rows]


def _slots(arrows: list[Arrow]) -> Slots:
    """Both rows in the order of the model; what is of one layer stands in the same stretch of both."""
    rows: dict = defaultdict(lambda: {"ablated": set(), "reacting": set()})
    for arrow in arrows:
        rows[arrow.ablated.layer]["ablated"].add((0, arrow.ablated.head, arrow.ablated.label))
        rows[arrow.layer]["reacting"].add((arrow.kind == "mlp", len(arrow.component), arrow.component))
    found, start = {}, 0
    for layer in sorted(rows):
        length = max(len(nodes) for nodes in rows[layer].values())
        for row, nodes in rows[layer].items():
            first = start + (length - len(nodes)) / 2
            found |= {(row, label): first + i for i, (*_, label) in enumerate(sorted(nodes))}
        start += length
    return found


def _draw_store(axes: Axes, arrows: list[Arrow]) -> None:
    slots = _slots(arrows)
    fans = _fans(arrows, slots)
    for arrow in reversed(arrows):
        start, end = ((slots[node] + fans[node, arrow], node[0]) for node in arrow.ends)
        _draw_arrow(axes, arrow, start[0], end[0], abs(arrows[0].repair))
    kinds = {arrow.component: arrow.kind for arrow in arrows}
    for (row, label), x in slots.items():
        _draw_label(axes, label, x, row, "head" if row == "ablated" else kinds[label])
    axes.set(xlim=(-0.6, max(slots.values(), default=0) + 0.6), ylim=(-0.12, 1.12))
    axes.set_axis_off()
    _explain(axes, arrows)


def _fans(arrows: list[Arrow], slots: Slots) -> dict:
    """How far from the middle of its label each arrow begins and ends: side by side, none crossing another there."""
    at: dict = defaultdict(list)
    for arrow in arrows:
        for node, other in (arrow.ends, arrow.ends[::-1]):
            at[node].append((slots[other], arrow))
    found = {}
    for node, met in at.items():
        met.sort(key=lambda pair: pair[0])
        places = np.linspace(-SIDE, SIDE, len(met) + 2)[1:-1]
        found |= {(node, arrow): place for (_, arrow), place in zip(met, places, strict=True)}
    return found


def _draw_arrow(axes: Axes, arrow: Arrow, start: float, end: float, largest: float) -> None:
    high, low = 1 - CLEAR, CLEAR
    curve = Path([(start, high), (start, 0.5), (end, 0.5), (end, low)], [Path.MOVETO, *[Path.CURVE4] * 3])
    width = THIN + (THICK - THIN) * np.sqrt(abs(arrow.repair) / largest)
    look = {"linewidth": width, "facecolor": "none", "edgecolor": arrow.colour, "alpha": 0.75, "zorder": 2}
    look["linestyle"] = "-" if arrow.known else ":"
    axes.add_patch(FancyArrowPatch(path=curve, arrowstyle="->,head_width=1.6,head_length=3", **look))


def _draw_label(axes: Axes, label: str, x: float, row: str, kind: str) -> None:
    box = {
        "boxstyle": "round,pad=0.35",
        "facecolor": "#E4E4E4" if kind == "mlp" else "white",
        "linewidth": 0.7,
    }
    height = {"ablated": 1, "reacting": 0}[row]
    axes.text(x, height, label, ha="center", va="center", fontsize=style.LABEL, bbox=box, zorder=3)


def _explain(axes: Axes, arrows: list[Arrow]) -> None:
    """What the two colours mean, and the largest change of each."""
    words, lines = [], []
    for verb, colour in (("repairs", REPAIRS), ("breaks", BREAKS)):
        changes = [arrow for arrow in arrows if arrow.colour == colour]
        if changes:
            most = max(changes, key=lambda arrow: abs(arrow.repair))
            width = f" ± {most.half_width:.1g}" if np.isfinite(most.half_width) else ""
            words.append(f"{verb}, up to {most.repair:+.2g}{width} logits".replace("-", "\N{MINUS SIGN}"))
            lines.append(Line2D([], [], color=colour, linewidth=3))
    axes.legend(lines, words, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
