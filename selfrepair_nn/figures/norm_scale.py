"""The final norm's scale under each kind of ablation, on the strongest heads' top tokens (Figures 4, 17, 18)."""

import xarray as xr
from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE, among, token_variants
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import histograms, style, suiting

READING = (
    "S/S': the final norm's scale in the clean run divided by that in the ablated run. Above 1 (dashed) the norm "
    "amplifies what is left. What lies beyond the axis counts in its outermost bins."
)


@figure(*suiting.ABLATIONS, name=__name__, about=__doc__, every_token=True)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for each head that `token_noise` chooses, with a histogram of its top share for each ablation.

    `datasets` is a store, a sequence of them, or a mapping from title to them. Raises UsageError as `token_variants`
    does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, token_variants)
    figure = style.new_figure(1, 1)
    for axes, tokens in histograms.panels(figure, found):
        top = tokens.scale_ratio.values[:, tokens.top.values]
        legends = [_legend(tokens.isel(ablation=i)) for i in range(tokens.sizes["ablation"])]
        histograms.draw(axes, dict(zip(legends, top, strict=True)))
        axes.set_xlabel("S/S'")
        axes.set_ylabel(f"share of the {among(share, *found.values())}")
    style.heading(figure, found)
    style.caption(figure, found, [*style.captions(found, of="top_above_one"), READING])
    return figure


def _legend(tokens: xr.Dataset) -> str:
    return f"{tokens['ablation'].values}: {style.shown_share(tokens, 'top_above_one', 1)} above 1"
