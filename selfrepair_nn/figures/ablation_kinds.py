"""Direct effect against logit change of the strongest late head, under each kind of ablation (the paper's Figure 5)."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE, among, token_variants
from selfrepair_nn.components import Head
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import plane, style, suiting

READING = (
    "Dots: tokens; blue: the head's {top}. Dashed: y = \N{MINUS SIGN}x, no repair if what replaces the head "
    "writes nothing to the logit.",
    "Shaded: self-repaired. Above the x-axis on the right: the logit rises although what wrote to it is gone.",
)


@figure(*suiting.ABLATIONS, name=__name__, about=__doc__, every_token=True)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for each ablation; several stores have a row each.

    `datasets` is a store, a sequence of them, or a mapping from title to them. Raises UsageError as `token_variants`
    does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, _loudest)
    columns = max(tokens.sizes["ablation"] for tokens in found.values())
    figure = style.new_figure(0.4 + 3.6 * columns, 1 + 4 * len(found))
    style.space(figure, h_pad=0.1, w_pad=0.08)
    grid = figure.subplots(len(found), columns, squeeze=False, sharex="row", sharey="row")
    for row, (name, head) in zip(grid, found.items(), strict=True):
        tokens = head.isel(rank=0)
        for index, axes in enumerate(row):
            if index < tokens.sizes["ablation"]:
                _draw_panel(axes, tokens.isel(ablation=index), tokens.logit_change.values)
            else:
                axes.remove()
        label = Head(int(tokens["layer"]), int(tokens["head"])).label
        row[0].set_ylabel(f"{label if len(found) == 1 else f'{name}, {label}'}: logit change (logits)")
    style.heading(figure, found)
    reading = [line.format(top=among(share, *found.values())) for line in READING]
    style.caption(figure, found, [*style.captions(found, of="top_over"), *reading])
    return figure


def _loudest(ds: xr.Dataset, share: float) -> xr.Dataset:
    return token_variants(ds, share, 1)


def _draw_panel(axes: Axes, tokens: xr.Dataset, every: np.ndarray) -> None:
    """One ablation's tokens, on the scale of all of them."""
    known = np.isfinite(tokens.direct_effect.values)
    x, y, top = (tokens[name].values[known] for name in ("direct_effect", "logit_change", "top"))
    plane.limits(axes, x, every[np.isfinite(every)])
    plane.wedge(axes)
    for chosen, colour, size in ((~top, style.MUTED, 3), (top, style.SHADE, 7)):
        axes.scatter(
            x[chosen], y[chosen], s=size, color=colour, alpha=0.35, linewidth=0, rasterized=True, zorder=1
        )
    axes.set_xlabel("direct effect (logits)")
    axes.set_title(str(tokens["ablation"].values), pad=18)
    said = f"logit rises on {style.shown_share(tokens, 'top_over')} of the top tokens"
    place = {"transform": axes.transAxes, "va": "bottom", "fontsize": 7.5, "color": style.MUTED}
    axes.text(0, 1.02, said, **place)
