"""Histograms of one quantity of single tokens under several variants, over each other."""

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from selfrepair_nn.components import Head
from selfrepair_nn.figures import style

MOST = 60  # bins
ROOM = 1.35  # above the bars, for the legend
SHOWN = (0.25, 99.75)  # percentiles of all variants together at which the axis ends


def panels(figure: Figure, found: Mapping[str, xr.Dataset]) -> list[tuple[Axes, xr.Dataset]]:
    """A titled panel for each head of each of these results of `token_variants`, with what it is to show."""
    most = max(tokens.sizes["rank"] for tokens in found.values())
    columns = min(most, 2 if len(found) == 1 else 4)
    rows = -(-most // columns) * len(found)
    style.resize(figure, 0.4 + 4.4 * columns, 1 + 2.9 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).reshape(len(found), -1)
    made = []
    for row, (name, tokens) in zip(grid, found.items(), strict=True):
        for axes, rank in zip(row, range(tokens.sizes["rank"]), strict=False):
            one = tokens.isel(rank=rank)
            head = Head(int(one["layer"]), int(one["head"])).label
            axes.set_title(head if len(found) == 1 else f"{name}, {head}")
            made.append((axes, one))
        for axes in row[tokens.sizes["rank"] :]:
            axes.remove()
    return made


def draw(axes: Axes, values: Mapping[str, np.ndarray]) -> None:
    """One histogram for each set of values under its legend, and a line at 1.

    What lies beyond the axis counts in the outermost bins.
    """
    together = np.concatenate(list(values.values()))
    low, high = np.percentile(together, SHOWN)
    bins = min(MOST, 10 + int(np.sqrt(len(together) / len(values))))
    edges = np.linspace(min(low, 1), max(high, 1 + 1e-6), bins + 1)
    for index, (label, one) in enumerate(values.items()):
        axes.hist(
            np.clip(one, edges[0], edges[-1]),
            edges,
            weights=np.full(one.size, 1 / one.size),
            histtype="stepfilled",
            linewidth=1.3,
            facecolor=to_rgba(style.colour(index), 0.18),
            edgecolor=style.colour(index),
            label=label,
        )
    axes.axvline(1, color="black", linewidth=1, linestyle=(0, (5, 3)))
    axes.yaxis.set_major_formatter(style.as_percent)
    axes.set_ylim(top=ROOM * axes.get_ylim()[1])
    axes.legend(loc="upper right", frameon=True, framealpha=0.8, edgecolor="none", facecolor="white")
