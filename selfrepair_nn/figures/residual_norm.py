"""How much longer or shorter the residual stream gets under each kind of ablation, on all tokens (Figure 16)."""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, throughout, token_variants
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import histograms, style, suiting

READING = (
    "Length of the residual stream before the final norm, ablated divided by clean. Below 1 (dashed) the ablation "
    "shortens it. What lies beyond the axis counts in its outermost bins."
)

NEED = Need(
    "the residual stream's length under several ablations, as `ablation_kinds` records",
    lambda ds: suiting.ABLATIONS.fits(ds) and ("residual_norm" in ds or "residual_ratio" in ds),
)


@figure(*NEED, name=__name__, about=__doc__, every_token=True)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for each head that `token_noise` chooses, with a histogram of all tokens for each ablation.

    `datasets` is a store, a sequence of them, or a mapping from title to them. Raises UsageError as `token_variants`
    does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, token_variants)
    figure = style.new_figure(1, 1)
    for axes, tokens in histograms.panels(figure, found):
        known = np.isfinite(tokens.direct_effect.values)
        ratios = tokens.residual_ratio.values[:, known]
        legends = [_legend(tokens.isel(ablation=i)) for i in range(tokens.sizes["ablation"])]
        histograms.draw(axes, dict(zip(legends, ratios, strict=True)))
        axes.set_xlabel("ablated / clean length")
        axes.set_ylabel(f"share of {throughout(*found.values())}")
    style.heading(figure, found)
    style.caption(figure, found, [*style.captions(found, top=False, of="shortened"), READING])
    return figure


def _legend(tokens: xr.Dataset) -> str:
    median, width = (float(tokens[f"median_residual_ratio{end}"]) for end in ("", HALF_WIDTH))
    known = f" ± {width:.4f}" if np.isfinite(width) else ""
    short = style.shown_share(tokens, "shortened")
    return f"{tokens['ablation'].values}: median {median:.4f}{known}, shorter on {short}"
