"""Each head's mean direct effect against the change of the logit when it is ablated (paper's Figure 2)."""

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selfrepair_nn import wording
from selfrepair_nn.analysis import HALF_WIDTH, SHARE, among, every_token, throughout
from selfrepair_nn.choosing import against_of
from selfrepair_nn.components import Head
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import labels, plane, style, suiting

LABELS, WIDE = 8, 42  # heads that are named, and characters over a panel
READING = {
    "removed": "Dashed: y = \N{MINUS SIGN}x, no repair: the logit loses what the ablation takes of the head's direct "
    "effect. √2 times the distance from it is self-repair.",
    "direct-effect": "Dashed: y = \N{MINUS SIGN}x, no repair if what replaces the head writes nothing to the logit.",
}
SHADED = (
    "Shaded, between it and the x-axis: self-repaired on average, as these means were measured. Thin bars: 95% "
    "intervals of both means."
)


@figure(*suiting.HEADS_ALONE, name=__name__, about=__doc__, of_summary=True, nats=True)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for each store, means over all tokens; heads in the wedge are self-repaired (section 2.2).

    The axis is what the ablation removed, or the direct effect, as `plot` was asked; the direct effect where nothing
    takes the head's place.

    `datasets` is a store or a summary of `by_head`, a sequence of them, or a mapping from title to them.
    Raises UsageError as `by_head` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share)
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    figure = style.new_figure(0.9 + 4.7 * columns, 0.7 + 4.1 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(found) :]:
        axes.remove()
    for axes, (name, heads) in zip(panels, found.items(), strict=False):
        _draw_panel(axes, heads)
        axes.set_title(style.wrapped(wording.title(heads), WIDE) if len(found) == 1 else name)
        _colour_bar(figure, axes, heads)
    top = not all(map(every_token, found.values()))
    told = style.captions(found, top, of="top_logit_change" if top else "logit_change")
    if style.unit_of(found) == "nats":
        reading = [plane.IN_NATS]
    else:
        reading = dict.fromkeys(READING[against_of(heads)] for heads in found.values())
    style.caption(figure, found, [*told, *reading, SHADED])
    style.lay_out(figure)
    for axes, heads in zip(panels, found.values(), strict=False):
        _write_names(axes, heads)
    return figure


def _draw_panel(axes: Axes, heads: xr.Dataset) -> None:
    x, y, layer, _ = _points(heads)
    plane.limits(axes, x, y)
    plane.wedge(axes)
    style.crosses(axes, x, y, *_widths(heads))
    colours = {"c": layer, "cmap": style.LAYERS, "norm": _norm(heads)}
    axes.scatter(x, y, **colours, s=26, edgecolor="white", linewidth=0.4, zorder=3)
    tokens = throughout(heads) if every_token(heads) else among(heads.attrs["share"], heads)
    unit = wording.unit(heads)
    gap = " " if unit == "logits" else "\n"
    axes.set_xlabel(f"{plane.named(heads)},{gap}mean over {tokens} ({unit})")
    axes.set_ylabel(f"{wording.change(heads)} when ablated,\nmean over {tokens} ({unit})")


def _points(heads: xr.Dataset) -> tuple[np.ndarray, ...]:
    """What is on both axes, layer and head of every head with something done."""
    known, kind = (heads.tokens > 0).values, "" if every_token(heads) else "top_"
    layer, head = np.meshgrid(heads["layer"].values, heads["head"].values, indexing="ij")
    x, y = (heads[f"{kind}{name}"].values[known] for name in _axes(heads))
    return x, y, layer[known], head[known]


def _widths(heads: xr.Dataset) -> list[np.ndarray]:
    """Half-widths of both means of every head with something done."""
    known, kind = (heads.tokens > 0).values, "" if every_token(heads) else "top_"
    return [heads[f"{kind}{name}{HALF_WIDTH}"].values[known] for name in _axes(heads)]


def _axes(heads: xr.Dataset) -> tuple[str, str]:
    """The means on both axes."""
    return plane.VARIABLES[against_of(heads)], "logit_change"


def _norm(heads: xr.Dataset) -> Normalize:
    last = max(heads.attrs.get("n_layers", 0) - 1, int(heads["layer"].max()), 1)
    return Normalize(0, last)


def _colour_bar(figure: Figure, axes: Axes, heads: xr.Dataset) -> None:
    shown = ScalarMappable(_norm(heads), colormaps[style.LAYERS])
    bar = figure.colorbar(shown, ax=axes, label="layer", pad=0.02, aspect=30, ticks=MaxNLocator(integer=True))
    bar.outline.set_visible(False)


def _write_names(axes: Axes, heads: xr.Dataset) -> None:
    """Name the wedge, the heads farthest from the origin and those farthest from y = -x."""
    x, y, layer, head = _points(heads)
    by_size, by_distance = np.argsort(-np.hypot(x, y)), np.argsort(-abs(x + y))
    order = list(dict.fromkeys(np.ravel([by_size, by_distance], order="F").tolist()))[:LABELS]
    names = [Head(int(layer[i]), int(head[i])).label for i in order]
    places = np.column_stack([x, y])
    others = np.concatenate([places, plane.on_lines(axes)])
    labels.write_inside(axes, "self-repaired", _in_wedge(axes), others)
    labels.label_points(axes, places[order], names, others)


def _in_wedge(axes: Axes) -> list[tuple[float, float]]:
    """Spots between y = -x and the x-axis, the widest part first."""
    ends = [end for end in reversed(axes.get_xlim()) if end]
    across = [end * far for end in ends for far in (0.8, 0.65, 0.5)]
    return [(x, -x * down) for x in across for down in (0.3, 0.5, 0.15)]
