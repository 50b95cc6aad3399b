"""A store's per-layer means beside those that the paper's authors published."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn import text, wording
from selfrepair_nn.analysis import HALF_WIDTH, QUANTITIES, SHARE, compare_paper, references
from selfrepair_nn.figures import depth, style

PUBLISHED = {"color": "black", "linestyle": "--", "marker": "s", "markersize": 3.5, "linewidth": 1.4}
READING = (
    "Means over each layer's heads on each head's top 2% of tokens by direct effect. Published: The Pile, resample "
    "ablation, centred unembedding; without intervals."
)


@style.settings()
def draw(ds: xr.Dataset, *, reference: str | None = None) -> Figure:
    """Draw a panel for each quantity of `compare_paper`, by depth in percent where the models differ in depth.

    `ds` is a store or its summary. Errors as in `compare_paper`, and if there is nothing to draw.
    """
    [heads] = style.summaries(ds, SHARE).values()
    found = compare_paper(heads, reference)
    figure = style.new_figure(11, 5.6)
    panels = figure.subplots(2, 4).ravel()
    for axes, quantity in zip(panels, QUANTITIES, strict=True):
        _draw_quantity(axes, found, quantity)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    notes = [_outside(found)] if np.isfinite(found.self_repair_half_width).any() else []
    notes += [found.attrs["differs"]] if "differs" in found.attrs else []
    top = f"{style.capital(found.attrs['top_tokens'])}."
    style.caption(figure, {"": heads}, [*style.captions({"": heads}), READING, top, *notes])
    return figure


def _outside(found: xr.Dataset) -> str:
    """How many of the published means lie outside the store's intervals."""
    known = sum(int(np.isfinite(found[name + HALF_WIDTH]).sum()) for name in QUANTITIES)
    outside = sum(int(found[f"{name}_outside"].sum()) for name in QUANTITIES)
    return f"Published means outside the interval of the store's: {outside} of {known}."


def _draw_quantity(axes: Axes, found: xr.Dataset, quantity: str) -> None:
    name, own = found.attrs["reference"], found[quantity].sel(source="store")
    published = np.array(references()[name][quantity])
    alike = found.attrs["n_layers"] == len(published)
    layers = np.arange(len(published)) * (1 if alike else 100 / (len(published) - 1))
    axes.plot(layers, published, label=f"{name}, as published", **PUBLISHED)
    look = {"color": style.colour(0), "marker": style.marker(0), "markersize": 3.5, "linewidth": 2}
    width, look["label"] = found[quantity + HALF_WIDTH].values, wording.title(found)
    style.line(axes, depth.depth(found, alike), own.values, width, **look)
    depth.name_axis(axes, alike)
    axes.set_title(text.QUANTITY_NAMES[quantity])
    if own.attrs["units"] == "1":
        axes.yaxis.set_major_formatter(style.as_percent)
    else:
        axes.set_ylabel("logits")
