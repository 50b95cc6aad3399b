"""Self-repair by layer with nothing frozen, with only the final norm live, and with everything frozen (section 3)."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, among, by_variant
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import depth, style, suiting

ROOM = 0.25  # above the dots, for the legend
READING = (
    "Left: dots are heads, lines the means of each layer with their 95% intervals; with everything frozen self-repair "
    "is zero by definition.",
    "Right: what the final norm repairs when nothing else may react, against its part in the whole (Equation 2). "
    "Dashed: y = x. Thin bars: 95% intervals.",
)

NEED = Need(
    "three degrees of freezing, as in `freeze`",
    lambda ds: suiting.along(ds, "frozen", "nothing", "all but the final norm", "everything"),
)


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw two panels for each store: self-repair by layer, and the norm alone against the norm in the whole.

    `datasets` is a store of the freeze recipe or `by_variant` of it, a sequence of them, or a mapping from title to
    them. Raises UsageError as `by_variant` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, by_variant)
    figure = style.new_figure(9.6, 0.9 + 3.9 * len(found))
    grid = figure.subplots(len(found), 2, squeeze=False, gridspec_kw={"width_ratios": [3, 2]})
    for (layers, plane), (name, heads) in zip(grid, found.items(), strict=True):
        _draw_layers(layers, heads)
        layers.set_ylabel(f"self-repair, mean on {among(share, *found.values())} (logits)")
        _draw_norm(plane, heads)
        layers.set_title("by layer" if len(found) == 1 else f"{name}: by layer")
        plane.set_title("the final norm")
    style.heading(figure, found)
    style.caption(figure, found, [*style.captions(found), *READING])
    return figure


def _draw_layers(axes: Axes, heads: xr.Dataset) -> None:
    known, layer = (heads.tokens > 0).values, heads["layer"].values
    places = layer[:, None] + 0.22 * (depth.places(heads) - layer[:, None])
    for index, label in enumerate(heads["frozen"].values):
        values = heads.top_self_repair.isel(frozen=index).where(heads.tokens > 0)
        shift, colour = 0.18 * (index - 1), style.colour(index)
        look = {"s": 14, "marker": style.marker(index), "alpha": 0.45, "linewidth": 0, "color": colour}
        width = heads[f"top_self_repair{HALF_WIDTH}"].isel(frozen=index).values[known]
        bars = {"fmt": "none", "ecolor": colour, "elinewidth": 0.5, "alpha": 0.35}
        axes.errorbar(places[known] + shift, values.values[known], style.bars(width), **bars)
        axes.scatter(places[known] + shift, values.values[known], **look)
        look = {
            "linewidth": 2,
            "marker": style.marker(index),
            "markersize": 3.5,
            "color": colour,
            "zorder": 3,
        }
        most = f" (at most {float(abs(values).max()):.0e})" if label == "everything" else ""
        width = heads[f"layer_top_self_repair{HALF_WIDTH}"].isel(frozen=index).values
        look["label"] = f"frozen: {label}{most}"
        style.line(axes, layer + shift, values.mean("head").values, width, **look)
    depth.name_axis(axes, True)
    axes.set_xlim(layer.min() - 0.5, layer.max() + 0.5)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + ROOM * (high - low))
    axes.legend(loc="upper left")


def _draw_norm(axes: Axes, heads: xr.Dataset) -> None:
    known = (heads.tokens > 0).values
    part, alone = (heads.top_from_norm.isel(frozen=i).values[known] for i in (0, 1))
    widths = (heads[f"top_from_norm{HALF_WIDTH}"].isel(frozen=i).values[known] for i in (0, 1))
    style.crosses(axes, part, alone, *widths)
    layer = np.broadcast_to(heads["layer"].values[:, None], known.shape)[known]
    dots = axes.scatter(
        part, alone, c=layer, cmap=style.LAYERS, s=26, edgecolor="white", linewidth=0.4, zorder=3
    )
    ends = [min(part.min(), alone.min(), 0), max(part.max(), alone.max(), 0)]
    axes.plot(ends, ends, "k--", dashes=(5, 3), linewidth=1.1)
    axes.set_xlabel("its part when nothing is frozen (logits)")
    axes.set_ylabel("alone (logits)")
    ticks = np.unique(layer) if np.ptp(layer) < 8 else None
    axes.figure.colorbar(dots, ax=axes, label="layer", pad=0.02, ticks=ticks).outline.set_visible(False)
