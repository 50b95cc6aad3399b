"""Each head's mean self-repair on its top tokens, by layer, with the layers' means (the paper's Figure 1)."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selfrepair_nn.analysis import SHARE, by_layer, percent
from selfrepair_nn.figures import style

VISIBLE = 0.004  # the least part of an axis that the eye sees as a band
READING = "Dots: attention heads (hollow: under the noise floor, the grey band). Lines: means of each layer."


@style.settings()
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw one store by layer index, or several by depth in percent; hollow dots lie under the noise floor.

    `datasets` is a store or a summary of `by_head`, a sequence of them, or a mapping from legend to them.
    Raises UsageError as `by_head` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share)
    alone = len(found) == 1
    figure = style.new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    axes.axhline(0, color="black", linewidth=0.8, zorder=1.5)
    for index, (name, heads) in enumerate(found.items()):
        _draw_model(axes, name, heads, share, index, alone)
    axes.set_title(style.title_of(found))
    axes.margins(x=0.03)
    axes.set_ylabel(f"self-repair, mean on top {percent(share)} of tokens (logits)")
    axes.set_xlabel("layer" if alone else "depth (% of layers)")
    if alone:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _noise_band(axes, *found.values())
    else:
        figure.legend(loc="outside right upper")
    style.caption(figure, [*style.captions(found), READING])
    return figure


def _draw_model(axes: Axes, name: str, heads: xr.Dataset, share: float, index: int, alone: bool) -> None:
    colour = style.COLOURS[index % len(style.COLOURS)]
    marker = style.MARKERS[index % len(style.MARKERS)]
    layers = by_layer(heads, share)
    depth = _depth(heads, alone)
    places = np.broadcast_to(depth[:, None], heads.tokens.shape)
    known = (heads.tokens > 0).values
    quiet = _quiet(heads)
    for chosen, face in ((known & ~quiet, colour), (quiet, "none")):
        if chosen.any():
            look = {"s": 16, "marker": marker, "alpha": 0.45, "linewidth": 0.8}
            repair = heads.top_self_repair.values[chosen]
            axes.scatter(places[chosen], repair, facecolor=face, edgecolor=colour, **look)
    look = {"linewidth": 2, "marker": marker, "markersize": 3.5, "zorder": 3}
    axes.plot(depth, layers.top_self_repair, color=colour, label=name, **look)


def _quiet(heads: xr.Dataset) -> np.ndarray:
    return (abs(heads.top_self_repair) < heads.noise_floor).values


def _noise_band(axes: Axes, heads: xr.Dataset) -> None:
    """A band around zero, where it is thick enough to be seen."""
    floor, (low, high) = heads.noise_floor.fillna(0).values, axes.get_ylim()
    if floor.max() > VISIBLE * (high - low):
        look = {"color": "#999999", "alpha": 0.35, "linewidth": 0, "zorder": 0.5}
        axes.fill_between(_depth(heads, True), -floor, floor, **look)


def _depth(heads: xr.Dataset, alone: bool) -> np.ndarray:
    layer = heads["layer"].values.astype(float)
    if alone:
        return layer
    deepest = max(heads.attrs.get("n_layers", layer.max() + 1) - 1, layer.max(), 1)
    return 100 * layer / deepest
