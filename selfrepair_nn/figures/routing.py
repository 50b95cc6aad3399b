"""Self-repair by layer with experts chosen anew and as in the clean run, and how many are chosen anew."""

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, among, by_variant, differences
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import depth, style, suiting

LABELS = {"nothing": "live routing", "routing": "clean routing"}
READING = (
    "Clean routing: every token keeps the experts of the clean run, and their weights. Left: dots are heads, lines the "
    "means of each layer. Middle: live minus clean, token by token: the self-repair by re-routing.",
    "Right: of the choices of experts that the ablation can reach, the share that goes to an expert which the token "
    "does not use in the clean run. Bars: 95% intervals.",
)

NEED = Need(
    "live and frozen routing, as in `routing`",
    lambda ds: suiting.along(ds, "frozen", *LABELS) and "rerouted" in ds,
)


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw three panels for each store: self-repair by layer, what of it is re-routing, and how much is re-routed.

    `datasets` is a store of the routing recipe, a sequence of them, or a mapping from title to them. Raises UsageError
    as `differences` does, and if there is nothing to draw.
    """
    stores = style.named(datasets)
    found = style.summaries(stores, share, by_variant)
    figure = style.new_figure(10.6, 0.9 + 3.7 * len(found))
    grid = figure.subplots(len(found), 3, squeeze=False, gridspec_kw={"width_ratios": [3, 2, 2]})
    for (layers, change, moved), (name, heads) in zip(grid, found.items(), strict=True):
        _draw_layers(layers, heads)
        layers.set_ylabel(f"self-repair, mean on {among(share, *found.values())} (logits)")
        layers.set_title("by layer" if len(found) == 1 else f"{name}: by layer")
        _draw_change(change, heads, differences(stores[name], share))
        change.set_title("by re-routing (logits)")
        _draw_moved(moved, heads)
        moved.set_title("choices re-routed")
    style.heading(figure, found)
    style.caption(figure, found, [*style.captions(found), *READING])
    return figure


def _draw_layers(axes: Axes, heads: xr.Dataset) -> None:
    for index, (label, told) in enumerate(LABELS.items()):
        one = heads.sel(frozen=label)
        each = one[f"top_self_repair{HALF_WIDTH}"]
        _draw_heads(axes, heads, one.top_self_repair, each, index, 0.16 * (index - 0.5))
        width = one[f"layer_top_self_repair{HALF_WIDTH}"]
        _draw_means(axes, heads, one.top_self_repair, width, index, 0.16 * (index - 0.5), label=told)
    depth.name_axis(axes, True)
    axes.set_xlim(heads["layer"].values.min() - 0.5, heads["layer"].values.max() + 0.5)
    axes.legend(loc="best")


def _draw_change(axes: Axes, heads: xr.Dataset, changes: xr.Dataset) -> None:
    one = changes.sel(frozen="routing")
    _draw_heads(axes, heads, -one.top_self_repair, one[f"top_self_repair{HALF_WIDTH}"], 2)
    _draw_means(axes, heads, -one.top_self_repair, one[f"layer_top_self_repair{HALF_WIDTH}"], 2)
    depth.name_axis(axes, True)


def _draw_moved(axes: Axes, heads: xr.Dataset) -> None:
    one = heads.sel(frozen="nothing")
    _draw_heads(axes, heads, one.top_rerouted, one[f"top_rerouted{HALF_WIDTH}"], 0)
    _draw_means(axes, heads, one.top_rerouted, one[f"layer_top_rerouted{HALF_WIDTH}"], 0)
    depth.name_axis(axes, True)
    axes.yaxis.set_major_formatter(FuncFormatter(style.as_percent))


def _draw_heads(
    axes: Axes, heads: xr.Dataset, values: xr.DataArray, width: xr.DataArray, index: int, shift: float = 0
) -> None:
    """A dot with its interval for each head with tokens, side by side in their layer."""
    known, layer = (heads.tokens > 0).values, heads["layer"].values[:, None]
    places = (layer + 0.2 * (depth.places(heads) - layer))[known] + shift
    bars = {"fmt": "none", "ecolor": style.colour(index), "elinewidth": 0.5, "alpha": 0.35}
    axes.errorbar(places, values.values[known], style.bars(width.values[known]), **bars)
    look = {"s": 14, "marker": style.marker(index), "alpha": 0.45, "linewidth": 0}
    axes.scatter(places, values.values[known], color=style.colour(index), **look)


def _draw_means(
    axes: Axes,
    heads: xr.Dataset,
    values: xr.DataArray,
    width: xr.DataArray,
    index: int,
    shift: float = 0,
    **look: str,
) -> None:
    """The layers' means, with their intervals."""
    mean = values.where(heads.tokens > 0).mean("head").values
    look |= {"color": style.colour(index), "marker": style.marker(index)}
    style.line(axes, heads["layer"].values + shift, mean, width.values, linewidth=2, markersize=3.5, **look)
