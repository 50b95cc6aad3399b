"""What every component does when each head is ablated: a map of the mean changes on the head's top tokens."""

from typing import Any, cast

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, among, who_repairs
from selfrepair_nn.confidence import RATE
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import style, suiting

READING = (
    "Rows: ablated heads, layer by layer. Columns: what changes its direct effect; blue repairs, red breaks, grey is "
    "the ablated head itself. A row adds up to the head's self-repair.",
    "Pale: pairs whose change is not known to differ from zero (false discovery rate {rate:.0%} over all pairs).",
    "Colours are by square root, so that small changes are seen; the few larger than the scale have the colour of its "
    "ends.",
)
COLOURS = colormaps["RdBu"].with_extremes(bad="#9A9A9A")
PALE = 0.25  # how much colour is left of what may be zero
HALF = 0.5  # from the middle of a cell to its edge
NORMS = {"top_from_post_norms": "post", "top_from_norm": "final"}
"""What norms do; some models have norms behind their attention too."""
SHOWN = 98  # percentile of a panel's sizes at which the colours may end
LABELS = {"head": 16, "mlp": 8}  # numbers of layers that have room on an axis


@figure(*suiting.COMPONENTS, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw for each store three panels: mean changes of the heads, of the MLPs, and of the norms.

    `datasets` is a store or a result of `who_repairs`, a sequence of them, or a mapping from title to them.
    Raises UsageError as `who_repairs` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, who_repairs)
    figure = style.new_figure(10.5, 0.9 + 5.4 * len(found))
    looks = {"squeeze": False, "sharey": "row", "gridspec_kw": {"width_ratios": [10, 4, 0.5]}}
    panels = figure.subplots(len(found), 3, **looks)
    for row, (name, pairs) in zip(panels, found.items(), strict=True):
        image = _draw_store(row, pairs)
        label = f"mean change of direct effect, {among(share, *found.values())} (logits)"
        looks = {
            "pad": 0.01,
            "aspect": 40,
            "extend": "both",
            "ticks": _ticks(cast(float, image.norm.vmax)),
            "format": _plain,
        }
        figure.colorbar(image, ax=row, label=label, **looks).outline.set_visible(False)
        row[0].set_title("heads" if len(found) == 1 else f"{name}: heads")
    style.heading(figure, found)
    style.caption(figure, found, [*style.captions(found), *(line.format(rate=RATE) for line in READING)])
    return figure


def _draw_store(panels: np.ndarray, pairs: xr.Dataset) -> AxesImage:
    layer, head = np.nonzero((pairs.tokens > 0).values)
    rows = pairs["layer"].values[layer]
    repair = np.where(pairs.own.values, np.nan, pairs.repair.values)[layer, head]
    clear = np.where(pairs.own.values | pairs.repair_known.values, 1, PALE)[layer, head]
    at, kind = pairs.component_layer.values, pairs.component_kind.values
    norms = [name for name in NORMS if name in pairs]
    norm, width = (_side_by_side(pairs, norms, end)[layer, head] for end in ("", HALF_WIDTH))
    norm_clear = np.where(abs(norm) > width, 1, PALE)
    parts = []
    for name in ("head", "mlp"):
        columns = ((kind == name) | ((kind == "mixer") & (name == "head"))) & (at >= rows.min())
        ends = _middles(at[columns], LABELS[name]), _edges(at[columns])
        parts.append((repair[:, columns], clear[:, columns], *ends))
    scale = _scale([*(values for values, *_ in parts), norm])
    names = ([], []) if len(norms) == 1 else (range(len(norms)), [NORMS[name] for name in norms])
    parts.append((norm, norm_clear, names, []))
    images = []
    for axes, (values, alpha, labels, edges) in zip(panels, parts, strict=True):
        look = {"cmap": COLOURS, "norm": scale, "aspect": "auto", "interpolation": "nearest"}
        images.append(axes.imshow(values, alpha=alpha, **look))
        axes.grid(False)
        axes.xaxis.set_ticks(*labels)
        axes.yaxis.set_ticks(*_middles(rows, LABELS["head"]))
        axes.tick_params(left=axes is panels[0])
        _mark(axes, _edges(rows), edges if values.shape[1] > len(edges) + 1 else [])
    for axes, title in zip(panels[1:], ("MLPs", "norms" if len(norms) > 1 else "norm"), strict=True):
        axes.set_title(title)
    panels[2].tick_params(axis="x", rotation=90)
    for axes in panels[:2]:
        axes.set_xlabel("layer")
    panels[0].set_ylabel("layer of the ablated head")
    return images[-1]


def _side_by_side(pairs: xr.Dataset, names: list[str], end: str) -> np.ndarray:
    """Some means, or their half-widths, side by side: [layer, head, name]."""
    return np.stack([pairs[name + end].values for name in names], -1)


def _mark(axes: Axes, rows: np.ndarray, columns: Any) -> None:
    """Thin lines between layers."""
    look = {"color": "#D0D0D0", "linewidth": 0.3}
    for edge in rows:
        axes.axhline(edge, **look)
    for edge in columns:
        axes.axvline(edge, **look)


def _edges(layers: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.diff(layers)) + HALF


def _middles(layers: np.ndarray, most: int) -> tuple[list[float], list[str]]:
    """Middle and number of each layer's cells; of some of them where there are more than `most`."""
    every = np.unique(layers)
    every = every[:: -(-len(every) // most)]
    return [float(np.flatnonzero(layers == one).mean()) for one in every], [str(one) for one in every]


def _scale(panels: list[np.ndarray]) -> FuncNorm:
    """Signed square roots, to the same length on both sides of zero."""
    sizes = [abs(values[np.isfinite(values) & (values != 0)]) for values in panels]
    most = max((float(np.percentile(each, SHOWN)) for each in sizes if each.size), default=1e-6)
    roots = (lambda v: np.sign(v) * np.sqrt(abs(v)), lambda v: np.sign(v) * v**2)
    return FuncNorm(roots, -most, most)


def _ticks(most: float) -> list[float]:
    """Round values that the square root spreads evenly."""
    rounded = [float(f"{part * most:.0e}") for part in (0.04, 0.25, 0.75)]
    return [*(-value for value in reversed(rounded)), 0, *rounded]


def _plain(value: float, _position: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")
