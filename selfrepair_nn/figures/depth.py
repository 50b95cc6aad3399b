"""What figures against depth share: a dot for each head, a line through the means of each layer."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from selfrepair_nn.analysis import HALF_WIDTH, by_layer
from selfrepair_nn.figures import style

SHOWN = 80  # percentile of the bars' lengths for which there is room
VISIBLE = 0.004  # the least part of an axis that the eye sees as a band


def draw_heads(
    axes: Axes, found: Mapping[str, xr.Dataset], name: str, share: float, first: int = 0, **line: Any
) -> None:
    """Variable `name` of each summary: heads as dots, hollow where it may be 0; the layers' means as a line.

    One summary is drawn by layer index, several by depth in percent of their models' layers. `first` is the first
    one's index among the colours.
    """
    for index, (legend, heads) in enumerate(found.items(), first):
        colour, marker = style.colour(index), style.marker(index)
        places = np.broadcast_to(depth(heads, len(found) == 1)[:, None], heads.tokens.shape)
        known, quiet = (heads.tokens > 0).values, _quiet(heads, name)
        for chosen, face in ((known & ~quiet, colour), (known & quiet, "none")):
            if chosen.any():
                look = {"s": 16, "marker": marker, "alpha": 0.45, "linewidth": 0.8}
                values = heads[name].values[chosen]
                axes.scatter(places[chosen], values, facecolor=face, edgecolor=colour, **look)
        draw_means(axes, heads, name, share, index, len(found) == 1, label=legend, **line)


def draw_means(
    axes: Axes, heads: xr.Dataset, name: str, share: float, index: int, alone: bool, **line: Any
) -> None:
    """Means over the heads of each layer with their intervals, in the colour of the summary with this index."""
    look = {"linewidth": 2, "marker": style.marker(index), "markersize": 3.5, "zorder": 3}
    look |= {"color": style.colour(index)} | line
    layers = by_layer(heads, share)
    style.line(axes, depth(heads, alone), layers[name].values, layers[name + HALF_WIDTH].values, **look)


def draw_noise(axes: Axes, found: Mapping[str, xr.Dataset]) -> None:
    """For a single summary a band around zero, where it is thick enough to be seen."""
    if len(found) > 1:
        return
    [heads] = found.values()
    floor, (low, high) = heads.noise_floor.fillna(0).values, axes.get_ylim()
    if floor.max() > VISIBLE * (high - low):
        look = {"color": "#999999", "alpha": 0.35, "linewidth": 0, "zorder": 0.5}
        axes.fill_between(depth(heads, True), -floor, floor, **look)


def told(reading: str, found: Mapping[str, xr.Dataset], name: str, **words: str) -> str:
    """`reading`, with how well a head's mean is known at {typical}, and other words at their names."""
    known = style.typical(found, name)
    return reading.format(typical=f" ({known})" if known else "", **words)


def name_axis(axes: Axes, alone: bool) -> None:
    """What the horizontal axis shows, and zero as a line."""
    axes.axhline(0, color="black", linewidth=0.8, zorder=1.5)
    axes.margins(x=0.03)
    axes.set_xlabel("layer" if alone else "depth (% of layers)")
    if alone:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def depth(heads: xr.Dataset, alone: bool) -> np.ndarray:
    """Where each layer stands on the horizontal axis: its index, or percent of the way to the model's last."""
    layer = heads["layer"].values.astype(float)
    if alone:
        return layer
    deepest = max(heads.attrs.get("n_layers", layer.max() + 1) - 1, layer.max(), 1)
    return 100 * layer / deepest


def places(heads: xr.Dataset) -> np.ndarray:
    """Where each head stands on the horizontal axis: its layer, the heads of a layer side by side."""
    count = heads.sizes["head"]
    return heads["layer"].values[:, None] + 0.7 * ((np.arange(count) + 0.5) / count - 0.5)


def room(slope: np.ndarray, high: np.ndarray) -> tuple[float, float]:
    """Ends of an axis with room for every slope and most bars; hardly anything is known where a bar leaves it."""
    reach, known = style.bars(high - slope), slope[np.isfinite(slope)]
    reach = reach[np.isfinite(reach)]
    usual = float(np.percentile(reach, SHOWN)) if reach.size else 0.0
    low, top = float(known.min(initial=0)) - usual, float(known.max(initial=0)) + usual
    edge = 0.05 * (top - low or 1)
    return low - edge, top + edge


def _quiet(heads: xr.Dataset, name: str) -> np.ndarray:
    """Where a mean in logits or nats may be 0: its interval holds 0, or it lies under the noise floor."""
    values = heads[name]
    near = abs(values) <= np.fmax(heads[name + HALF_WIDTH], heads.noise_floor.fillna(0))
    return near.transpose(*values.dims).values & (values.attrs.get("units") in ("logit", "nat"))
