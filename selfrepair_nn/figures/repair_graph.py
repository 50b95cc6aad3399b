"""Who repairs whom: heads of the largest net self-repair, and the changes, with their intervals, that make it up."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, among, who_repairs
from selfrepair_nn.analysis.repairers import all_sure, changes_of, clear_heads
from selfrepair_nn.components import Head
from selfrepair_nn.confidence import RATE
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import style, suiting
from selfrepair_nn.wording import counted

REPAIRS, BREAKS = style.COLOURS[:2]
HEADS = 10
THIN, THICK = 0.7, 4.5  # arrows, in points
SLOT = 0.74  # inches for each label of a row
SIDE = 0.36  # half the side of a label at which arrows end, in slots
ABOVE, BELOW = 0.11, 0.055  # from the middle of a label to an arrow's end, in distances between the rows
READING = (
    "Top: the {heads} of largest self-repair{surely}, with that net number, in the order of layers. Middle: what "
    "changes its direct effect when they are ablated, in the same order (MLPs and norms grey), and the changes, each "
    "under its arrow: means on the head's {top}.",
    "Arrows: the {count} largest of their changes{known}; width by the square root of size. Bars: 95% intervals.",
)
SURELY = " that is surely not 0"
KNOWN = " that are known to differ from zero (false discovery rate {rate:.0%} over all pairs; norms: the interval)"
UNSURE = "No change is known to differ from zero: the largest are shown, dotted."
CANCELLED = "Left out, as their changes cancel: {heads}."
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


@dataclass(frozen=True)
class Graph:
    """A store's arrows, the strongest first; the heads' net self-repair in words; and heads whose changes cancel.

    `sure`: whether each head's net self-repair surely is not 0.
    """

    arrows: list[Arrow]
    sure: bool
    net: dict[str, str]
    cancelled: list[str]
    slots: Slots


@figure(*suiting.COMPONENTS, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw two panels for each store: arrows, blue where they repair, orange where they break, and their sizes.

    `datasets` is a store or a result of `who_repairs`, a sequence of them, or a mapping from title to them.
    Raises UsageError as `who_repairs` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, who_repairs)
    graphs = {name: _graph(pairs) for name, pairs in found.items()}
    widest = max(max(graph.slots.values(), default=0) for graph in graphs.values())
    figure = style.new_figure(max(7.2, 1 + SLOT * (widest + 1)), 1 + 4.4 * len(found))
    looks = {"squeeze": False, "gridspec_kw": {"height_ratios": [2.4, 1.3] * len(found)}}
    panels = figure.subplots(2 * len(found), 1, **looks).reshape(-1, 2)
    for (upper, lower), (name, graph) in zip(panels, graphs.items(), strict=True):
        fans = _fans(graph)
        _draw_arrows(upper, graph, fans)
        _draw_sizes(lower, graph, fans)
        upper.set_title("" if len(found) == 1 else name)
    style.heading(figure, found)
    style.caption(figure, found, [*style.captions(found), *_reading(graphs, among(share, *found.values()))])
    return figure


def _graph(pairs: xr.Dataset) -> Graph:
    chosen, cancelled = clear_heads(pairs, HEADS)
    edges = changes_of(pairs, chosen)
    names = (
        "layer",
        "head",
        "component",
        "component_layer",
        "component_kind",
        "repair",
        "half_width",
        "repair_known",
    )
    rows = zip(*(edges[name].values.tolist() for name in names), strict=True) if edges else []
    arrows = [Arrow(Head(layer, head), *others) for layer, head, *others in rows]
    shown = {arrow.ablated.label for arrow in arrows}
    digits = style.decimals(np.array([pairs.top_self_repair.values[at] for at in chosen]))
    net = {label: told for at in chosen for label, told in [_net(pairs, *at, digits)] if label in shown}
    return Graph(arrows, all_sure(pairs, chosen), net, [_net(pairs, *at)[0] for at in cancelled[:3]], _slots(arrows))


def _net(pairs: xr.Dataset, layer: int, head: int, decimals: int = style.DECIMALS) -> tuple[str, str]:
    """A head's label, and its self-repair in words."""
    one = pairs.isel(layer=layer, head=head)
    value, width = (float(one[f"top_self_repair{end}"]) for end in ("", HALF_WIDTH))
    known = f"\n± {width:.1g}" if np.isfinite(width) else ""
    return Head(int(one["layer"]), int(one["head"])).label, f"{style.signed(value, decimals)}{known}"


def _reading(graphs: dict[str, Graph], top: str) -> list[str]:
    count = max(len(graph.arrows) for graph in graphs.values())
    heads = max(len(graph.net) for graph in graphs.values())
    some = any(arrow.known for graph in graphs.values() for arrow in graph.arrows)
    sure = {"surely": SURELY if all(graph.sure for graph in graphs.values()) else ""}
    sure |= {"known": KNOWN.format(rate=RATE) if some else ""}
    told = [line.format(count=count, heads=counted(heads, "head"), top=top, **sure) for line in READING] + (
        [] if some else [UNSURE]
    )
    cancelled = [label for graph in graphs.values() for label in graph.cancelled]
    return told + ([CANCELLED.format(heads=", ".join(cancelled))] if cancelled else [])


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


def _fans(graph: Graph) -> dict:
    """Where each arrow begins and ends: side by side in the stretch of its label, none crossing another there."""
    at: dict = defaultdict(list)
    for arrow in graph.arrows:
        for node, other in (arrow.ends, arrow.ends[::-1]):
            at[node].append((graph.slots[other], arrow))
    found = {}
    for node, met in at.items():
        met.sort(key=lambda pair: pair[0])
        places = graph.slots[node] + np.linspace(-SIDE, SIDE, len(met) + 2)[1:-1]
        found |= {(node, arrow): place for (_, arrow), place in zip(met, places, strict=True)}
    return found


def _draw_arrows(axes: Axes, graph: Graph, fans: dict) -> None:
    for arrow in reversed(graph.arrows):
        start, end = (fans[node, arrow] for node in arrow.ends)
        _draw_arrow(axes, arrow, start, end, abs(graph.arrows[0].repair))
    kinds = {arrow.component: arrow.kind for arrow in graph.arrows}
    for (row, label), x in graph.slots.items():
        told = f"{label}\n{graph.net[label]}" if row == "ablated" else style.wrapped(label, 12)
        _draw_label(axes, told, x, row, "head" if row == "ablated" else kinds[label])
    axes.set(xlim=(-0.6, max(graph.slots.values(), default=0) + 0.6), ylim=(-0.1, 1.12))
    axes.set_axis_off()


def _draw_arrow(axes: Axes, arrow: Arrow, start: float, end: float, largest: float) -> None:
    high, low = 1 - ABOVE, BELOW
    curve = Path([(start, high), (start, 0.5), (end, 0.5), (end, low)], [Path.MOVETO, *[Path.CURVE4] * 3])
    width = THIN + (THICK - THIN) * np.sqrt(abs(arrow.repair) / largest)
    look = {"linewidth": width, "facecolor": "none", "edgecolor": arrow.colour, "alpha": 0.75, "zorder": 2}
    look["linestyle"] = "-" if arrow.known else ":"
    axes.add_patch(FancyArrowPatch(path=curve, arrowstyle="->,head_width=1.6,head_length=3", **look))


def _draw_label(axes: Axes, label: str, x: float, row: str, kind: str) -> None:
    box = {
        "boxstyle": "round,pad=0.3",
        "facecolor": "#E4E4E4" if kind in ("mlp", "norm") else "white",
        "linewidth": 0.7,
    }
    height = {"ablated": 1, "reacting": 0}[row]
    look = {"ha": "center", "va": "center", "fontsize": style.LABEL, "linespacing": 1.1}
    axes.text(x, height, label, bbox=box, zorder=3, **look)


def _draw_sizes(axes: Axes, graph: Graph, fans: dict) -> None:
    """Each change with its interval, under its arrow's end."""
    for colour, label in ((REPAIRS, "repairs"), (BREAKS, "breaks")):
        some = [arrow for arrow in graph.arrows if arrow.colour == colour]
        if some:
            x = [fans[arrow.ends[1], arrow] for arrow in some]
            width = style.bars(np.array([arrow.half_width for arrow in some]))
            look = {"fmt": "o", "markersize": 3.5, "elinewidth": 1, "capsize": 1.5, "color": colour}
            axes.errorbar(x, [arrow.repair for arrow in some], width, **look)
            axes.add_line(Line2D([], [], color=colour, linewidth=3, label=label))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(-0.6, max(graph.slots.values(), default=0) + 0.6)
    axes.set_xticks([])
    axes.set_xlabel("what changes, in the order of layers")
    axes.set_ylabel("change of direct\neffect (logits)")
    if graph.arrows:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
