"""What figures against depth share: a dot for each head, a line through the means of each layer."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from selfrepair_nn.analysis import HALF_WIDTH, by_layer
from selfrepair_nn.components import Head
from selfrepair_nn.figures import beyond, style

SHOWN = 80  # percentile of the bars' lengths for which there is room
DOT, MANY = 14, 300  # the area of a head's dot, in square points, and heads from which on it is half of it
VISIBLE = 0.004  # the least part of an axis that the eye sees as a band


def draw_heads(
    axes: Axes, found: Mapping[str, xr.Dataset], name: str, share: float, first: int = 0, **line: Any
) -> list[beyond.Dots]:
    """Variable `name` of each summary: heads as dots with their intervals, hollow where it may be 0, side by side in
    their layer; the layers' means as a line. Gives the dots, from which `beyond` makes the vertical axis.

    One summary is drawn by layer index, several by depth in percent of their models' layers. `first` is the first
    one's index among the colours.
    """
    alone, found_dots = len(found) == 1, []
    for index, (legend, heads) in enumerate(found.items(), first):
        dots = _dots(heads, name, share, alone, style.colour(index))
        bars = {"linestyle": "none", "elinewidth": 0.6, "alpha": 0.4, "zorder": 1.8}
        axes.errorbar(dots.x, dots.y, style.bars(dots.width), ecolor=dots.colour, **bars)
        for chosen, face in ((dots.full, dots.colour), (~dots.full, "none")):
            if chosen.any():
                look = {
                    "s": DOT if dots.y.size < MANY else DOT / 2,
                    "marker": style.marker(index),
                    "alpha": 0.55,
                    "linewidth": 0.8,
                }
                axes.scatter(dots.x[chosen], dots.y[chosen], facecolor=face, edgecolor=dots.colour, **look)
        _draw_line(axes, dots.means, index, label=legend, **line)
        found_dots.append(dots)
    return found_dots


def _dots(heads: xr.Dataset, name: str, share: float, alone: bool, colour: str) -> beyond.Dots:
    """Of a summary's heads with something done, and whose value is known."""
    values = heads[name].values
    known = (heads.tokens > 0).values & np.isfinite(values)
    step = 1 if alone else depth(heads, False)[1] - depth(heads, False)[0] if heads.sizes["layer"] > 1 else 1
    across = depth(heads, alone)[:, None] + step * (places(heads) - heads["layer"].values[:, None])
    layer, head = np.nonzero(known)
    rows = zip(heads["layer"].values[layer].tolist(), heads["head"].values[head].tolist(), strict=True)
    return beyond.Dots(
        across[known],
        values[known],
        heads[name + HALF_WIDTH].transpose(*heads[name].dims).values[known],
        [Head(*each).label for each in rows],
        colour,
        ~_quiet(heads, name)[known],
        means_of(heads, name, share, alone),
    )


def draw_means(
    axes: Axes, heads: xr.Dataset, name: str, share: float, index: int, alone: bool, **line: Any
) -> None:
    """Means over the heads of each layer with their intervals, in the colour of the summary with this index."""
    _draw_line(axes, means_of(heads, name, share, alone), index, **line)


def _draw_line(axes: Axes, means: beyond.Values, index: int, **line: Any) -> None:
    look = {"linewidth": 2, "marker": style.marker(index), "markersize": 3.5, "zorder": 3}
    look |= {"color": style.colour(index)} | line
    style.line(axes, means.x, means.y, means.width, **look)


def means_of(heads: xr.Dataset, name: str, share: float, alone: bool) -> beyond.Values:
    """The means over the heads of each layer."""
    layers = by_layer(heads, share)
    names = [f"layer {layer}" for layer in heads["layer"].values]
    return beyond.Values(depth(heads, alone), layers[name].values, layers[name + HALF_WIDTH].values, names)


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
