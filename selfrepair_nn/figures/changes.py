"""What variants change of the strongest heads' self-repair against the first variant, one by one."""

import re
from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import among, axis_of, by_variant, differences
from selfrepair_nn.components import Head
from selfrepair_nn.figures import style

COUNT = 4
MANY = 12  # labels that fit side by side


def draw(datasets: style.Datasets, share: float, ylabel: str, reading: str) -> Figure:
    """A figure with a panel for each store: for each variant but the first a mark for each of up to four heads.

    A variant that changes nothing at all of a head, since it comes before it, has no mark.
    The heads are those of largest mean direct effect; bars are 95% confidence intervals of paired differences.
    Raises UsageError as `differences` does, and if there is nothing to draw.
    """
    stores = style.named(datasets)
    found = style.summaries(stores, share, by_variant)
    figure = style.new_figure(9.6, 1 + 3.9 * len(found))
    grid = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for axes, (name, heads) in zip(grid, found.items(), strict=True):
        _draw_store(axes, heads, differences(stores[name], share))
        axes.set_ylabel(f"{ylabel}, {among(share, *found.values())} (logits)")
        axes.set_title("" if len(found) == 1 else name, loc="right")
    style.heading(figure, found)
    style.caption(figure, found, [*style.captions(found), reading])
    return figure


def _draw_store(axes: Axes, heads: xr.Dataset, changes: xr.Dataset) -> None:
    labels = [str(label).replace("_", " ") for label in changes[axis_of(changes)].values[1:]]
    for index, place in enumerate(_loudest(heads)):
        one = changes.isel(place)
        where = np.arange(len(labels)) + 0.15 * (index - (COUNT - 1) / 2)
        look = {
            "marker": style.marker(index),
            "markersize": 4,
            "color": style.colour(index),
            "linestyle": "none",
        }
        values, error = one.top_self_repair.values[1:], style.bars(one.top_self_repair_half_width.values[1:])
        values = np.where(values == 0, np.nan, values)  # what the head does not reach
        label = Head(int(one["layer"]), int(one["head"])).label
        axes.errorbar(where, values, error, elinewidth=1, label=label, **look)
    axes.axhline(0, color="black", linewidth=0.8)
    name_variants(axes, labels)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.legend(ncols=COUNT, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def name_variants(axes: Axes, labels: list[str]) -> None:
    """Labels side by side, a word a line; where they are many, upright."""
    many = len(labels) > MANY
    shown = labels if many else [re.sub(r"\.(?!\d)| ", "\n", label) for label in labels]
    axes.set_xticks(range(len(labels)), shown, rotation=90 if many else 0, fontsize=7.5)


def _loudest(heads: xr.Dataset) -> list[Mapping[str, int]]:
    """Where the heads of largest mean direct effect lie in a summary, the largest first."""
    known = (heads.tokens > 0).values
    effects = np.where(known, heads.direct_effect.values, -np.inf)
    order = np.argsort(-effects.ravel(), kind="stable")[: min(COUNT, known.sum())]
    return [{"layer": i, "head": j} for i, j in zip(*np.unravel_index(order, effects.shape), strict=True)]
