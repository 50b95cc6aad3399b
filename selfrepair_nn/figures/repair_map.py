"""What is made up for by what: the heads that are surely repaired or broken, alike ones together, and what reacts."""

from typing import Any, cast

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from scipy.cluster.hierarchy import dendrogram, linkage

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, among, who_repairs
from selfrepair_nn.analysis.repairers import all_sure, clear_heads
from selfrepair_nn.components import Head
from selfrepair_nn.confidence import RATE
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import style, suiting
from selfrepair_nn.figures.repair_graph import SURELY
from selfrepair_nn.wording import counted

ROWS, COLUMNS = 20, 20
READING = (
    "Rows: of {done} the {rows} of largest self-repair{surely}, alike ones together (average "
    "linkage). Left: the {columns} that change most, in order of layers; blue repairs, red breaks: means "
    "on the head's {top}.",
    "Pale: not known to differ from zero (false discovery rate {rate:.0%} over all pairs; right, 95% intervals, "
    "behind ±). Grey: the ablated head itself. Right: all later heads, MLPs, norms, which add up to the self-repair.",
    "Colours are by square root; what is larger than the scale has the colour of its end. Every pair of all heads: "
    "selfrepair view.",
)
COLOURS = colormaps["RdBu"].with_extremes(bad="#9A9A9A")
PALE, DARK = (
    0.25,
    0.36,
)  # how much colour is left of what may be zero; what part of the scale needs white letters
TOTALS = {
    "top_from_heads": "heads",
    "top_from_mlps": "MLPs",
    "top_from_mixers": "mixers",
    "top_from_post_norms": "norms behind\nattention",
    "top_from_norm": "final norm",
    "top_self_repair": "all:\nself-repair",
}
KINDS = ("head", "mixer", "mlp")
SHOWN = 96  # percentile of the sizes at which the colours may end
CELL, TOTAL, ROW, TREE, DIGITS = 0.25, 0.78, 0.235, 0.5, 0.1  # inches
LETTERS = 9
"""Of a store's name in an inch over the components."""
FEWEST = 8
"""Columns for which there is room, and twice the rows, however few there are."""


@figure(*suiting.COMPONENTS, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw for each store a tree of its rows, mean changes of the components that change most, and of all by kind.

    `datasets` is a store or a result of `who_repairs`, a sequence of them, or a mapping from title to them.
    Raises UsageError as `who_repairs` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, who_repairs)
    parts = {name: _Part(pairs) for name, pairs in found.items()}
    columns, totals = (max(getattr(part, n).shape[1] for part in parts.values()) for n in ("values", "sums"))
    heights = [1.1 + ROW * max(len(part.names), FEWEST // 2) for part in parts.values()]
    digits = max(style.decimals(part.sums) for part in parts.values()) - style.DECIMALS
    widths = [TREE, CELL * max(columns, FEWEST), (TOTAL + DIGITS * digits) * totals]
    figure = style.new_figure(1.6 + sum(widths), 0.8 + sum(heights))
    looks = {"squeeze": False, "gridspec_kw": {"width_ratios": widths, "height_ratios": heights}}
    for row, (name, part) in zip(figure.subplots(len(found), 3, **looks), parts.items(), strict=True):
        image = _draw_store(row, part)
        bar = {"pad": 0.01, "aspect": 40, "extend": "both", "ticks": _ticks(cast(float, image.norm.vmax))}
        figure.colorbar(image, ax=row, label="logits", format=_plain, **bar).outline.set_visible(False)
        above = "" if len(found) == 1 else f"{style.wrapped(name, int(LETTERS * widths[1]))}\n"
        row[1].set_title(f"{above}single components")
        row[2].set_title("all of a kind")
    style.heading(figure, found)
    most = max(parts.values(), key=lambda part: len(part.names))
    facts = {
        "surely": SURELY if all(part.sure for part in parts.values()) else "",
        "done": counted(most.done, "head"),
        "rows": len(most.names),
        "columns": counted(columns, "component"),
        "top": among(share, *found.values()),
    }
    reading = [line.format(rate=RATE, **facts) for line in READING]
    style.caption(figure, found, [*style.captions(found), *reading])
    return figure


class _Part:
    """What is shown of one store: rows in the order of the tree, columns in that of the model."""

    def __init__(self, pairs: xr.Dataset) -> None:
        heads, _ = clear_heads(pairs, ROWS)
        self.sure = all_sure(pairs, heads)
        layer, head = np.array(heads, int).reshape(-1, 2).T
        values = np.where(pairs.own.values, np.nan, pairs.repair.values)[layer, head]
        columns = _columns(pairs, values, pairs.repair_known.values[layer, head])
        totals = [name for name in TOTALS if name in pairs]
        self.tree = _tree(values[:, columns])
        order = self.tree["leaves"] if self.tree else list(range(len(heads)))
        self.done = int((pairs.tokens > 0).sum())
        self.values = values[:, columns][order]
        self.known = (pairs.own | pairs.repair_known).values[layer, head][:, columns][order]
        self.sums, self.widths = (
            np.stack([pairs[n + end].values[layer, head] for n in totals], -1)[order]
            for end in ("", HALF_WIDTH)
        )
        self.names = [Head(int(pairs["layer"][layer[i]]), int(pairs["head"][head[i]])).label for i in order]
        self.columns = pairs.component.values[columns].tolist()
        self.kinds = pairs.component_kind.values[columns]
        self.totals = [TOTALS[name] for name in totals]


def _columns(pairs: xr.Dataset, values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Places of the components that change most, of what is known where anything is: heads first, then MLPs."""
    sizes = np.nan_to_num(abs(np.where(known if known.any() else True, values, 0))).max(0, initial=0)
    chosen = np.argsort(-sizes, kind="stable")[: min(COLUMNS, int((sizes > 0).sum()))]
    kind = np.array(
        [KINDS.index(str(each)) if str(each) in KINDS else -1 for each in pairs.component_kind.values]
    )
    return np.array(sorted(chosen, key=lambda i: (kind[i], int(pairs.component_layer[i]), i)), int)


def _tree(values: np.ndarray) -> dict[str, Any] | None:
    """Rows that change the same things together, by the square roots that the colours show."""
    if len(values) < 3 or not values.size:
        return None
    shown = np.sign(values) * np.sqrt(abs(values))
    joined = linkage(np.nan_to_num(shown), "average", optimal_ordering=True)
    return dendrogram(joined, no_plot=True)


def _draw_store(panels: np.ndarray, part: _Part) -> AxesImage:
    norm = _scale([part.values, part.sums])
    _draw_tree(panels[0], part)
    image = _draw_map(panels[1], part.values, part.known, norm)
    panels[1].set_xticks(range(len(part.columns)), part.columns, rotation=90, fontsize=7.5)
    panels[1].set_yticks(range(len(part.names)), part.names, fontsize=7.5)
    for edge in np.flatnonzero(part.kinds[1:] != part.kinds[:-1]) + 0.5:
        panels[1].axvline(edge, color="white", linewidth=3)
    sure = abs(part.sums) > part.widths
    _draw_map(panels[2], part.sums, sure, norm)
    panels[2].set_xticks(range(len(part.totals)), part.totals, fontsize=7.5)
    panels[2].set_yticks([])
    panels[2].axvline(len(part.totals) - 1.5, color="white", linewidth=3)
    decimals = style.decimals(part.sums)
    for at in np.ndindex(part.sums.shape):
        value, width = float(part.sums[at]), float(part.widths[at])
        known = f" ± {width:.{decimals}f}" if np.isfinite(width) else ""
        told = style.signed(value, decimals) + known if value or width else "0"
        dark = sure[at] and abs(norm(value) - 0.5) > DARK
        look = {"ha": "center", "va": "center", "fontsize": 6.5, "color": "white" if dark else "black"}
        panels[2].text(at[1], at[0], told, **look)
    return image


def _draw_map(axes: Axes, values: np.ndarray, clear: np.ndarray, norm: FuncNorm) -> AxesImage:
    look = {"cmap": COLOURS, "norm": norm, "aspect": "auto", "interpolation": "nearest"}
    shown = values if values.size else np.zeros((len(values), 1))
    image = axes.imshow(shown, alpha=np.where(clear, 1, PALE) if values.size else 0.0, **look)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _draw_tree(axes: Axes, part: _Part) -> None:
    axes.set_axis_off()
    if part.tree is None:
        return
    for across, along in zip(part.tree["dcoord"], part.tree["icoord"], strict=True):
        axes.plot(-np.array(across), (np.array(along) - 5) / 10, color=style.MUTED, linewidth=0.8)
    axes.set_ylim(len(part.names) - 0.5, -0.5)
    axes.margins(x=0)


def _scale(panels: list[np.ndarray]) -> FuncNorm:
    """Signed square roots, to the same length on both sides of zero."""
    sizes = np.concatenate([abs(values[np.isfinite(values) & (values != 0)]) for values in panels])
    most = float(np.percentile(sizes, SHOWN)) if sizes.size else 1e-6
    roots = (lambda v: np.sign(v) * np.sqrt(abs(v)), lambda v: np.sign(v) * v**2)
    return FuncNorm(roots, -most, most)


def _ticks(most: float) -> list[float]:
    """Round values that the square root spreads evenly."""
    rounded = [float(f"{part * most:.0e}") for part in (0.04, 0.25, 0.75)]
    return [*(-value for value in reversed(rounded)), 0, *rounded]


def _plain(value: float, _position: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")
