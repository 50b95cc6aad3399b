"""Self-repair of the strongest heads under each variant of a store, whatever its variants are."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import (
    HALF_WIDTH,
    SHARE,
    among,
    axis_of,
    by_case,
    by_head,
    by_variant,
    has_nulls,
    reinforced,
)
from selfrepair_nn.components import Head
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import changes, style, suiting

COUNT = 4
READING = ("Marks: the {count} of largest mean direct effect. Grey: the mean over all. Bars: 95% intervals.",)

NEED = Need(
    "several variants, side by side",
    lambda ds: suiting.axis(ds) is not None and not reinforced(ds) and not has_nulls(ds),
)


@figure(*NEED, name=__name__, about=__doc__, overview=True)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for each store: mean self-repair on the top share, variant by variant, of up to four heads or cases.

    `datasets` is a store of variants, a sequence of them, or a mapping from title to them. Raises UsageError as
    `by_variant` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, _summary)
    figure = style.new_figure(8.6, 1 + 3.9 * len(found))
    for axes, (name, sites) in zip(_panels(figure, len(found)), found.items(), strict=True):
        _draw_store(axes, sites)
        axes.set_ylabel(f"self-repair, mean on {among(share, *found.values())} (logits)")
        axes.set_title("" if len(found) == 1 else name, loc="right")
    style.heading(figure, found)
    style.caption(figure, found, [*style.captions(found), *(line.format(count=COUNT) for line in READING)])
    return figure


def _panels(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(count, 1, squeeze=False)[:, 0])


def _summary(ds: xr.Dataset, share: float) -> xr.Dataset:
    return by_variant(ds, share, by_case if "case" in ds.dims else by_head)


def _draw_store(axes: Axes, sites: xr.Dataset) -> None:
    axis = axis_of(sites)
    labels = [str(label).replace("_", " ") for label in sites[axis].values]
    dims = ("case",) if "case" in sites.dims else ("layer", "head")
    mean = sites.top_self_repair.where(sites.tokens > 0).mean(dims).values
    width = sites[f"overall_top_self_repair{HALF_WIDTH}"].values
    style.line(axes, np.arange(len(labels)), mean, width, color=style.MUTED, linewidth=1, marker=".", label="mean")
    flat = sites.stack(site=dims)
    each = flat.direct_effect.where(flat.tokens > 0)  # of revisions in the mean over them
    effects = each.mean([d for d in each.dims if d != "site"]).fillna(-np.inf).values
    for index, at in enumerate(np.argsort(-effects, kind="stable")[: min(COUNT, np.isfinite(effects).sum())]):
        one = flat.isel(site=at)
        where = np.arange(len(labels)) + 0.12 * (index - (COUNT - 1) / 2)
        look = {
            "marker": style.marker(index),
            "markersize": 4,
            "color": style.colour(index),
            "linestyle": "none",
        }
        values, error = one.top_self_repair.values, style.bars(one[f"top_self_repair{HALF_WIDTH}"].values)
        axes.errorbar(where, values, error, elinewidth=1, label=_name(one), **look)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel(str(axis))
    changes.name_variants(axes, labels)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.legend(ncols=COUNT + 1, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def _name(one: xr.Dataset) -> str:
    return (
        str(one["case"].values) if "case" in one.coords else Head(int(one["layer"]), int(one["head"])).label
    )
