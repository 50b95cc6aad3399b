"""What a token's self-repair varies with: the document, the token itself, or the partner that replaces it, by layer."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, among, by_layer, throughout, variance_components
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import depth, style, suiting

PARTS = {"partner": "the partner", "token": "the token", "document": "the document"}
COLOURS = {"partner": style.COLOURS[1], "token": style.COLOURS[5], "document": "#BBBBBB"}
READING = (
    "Bars: shares of the variance of a token's self-repair, means over the heads of a layer. With one partner of each "
    "prompt the partner's share of the scatter is chance. Dots: that share of single heads. Lines: 95% intervals, of "
    "the partner's share and, above, of what is not the token's or the partner's."
)

NEED = Need(
    "several partners of each prompt (--resamples)",
    lambda ds: suiting.grid(ds) and ("partners_averaged" in ds.attrs or "resample" in ds.self_repair.dims),
)


@figure(*NEED, name=__name__, about=__doc__, nats=True)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a row for each store: shares of variance by layer, on all tokens and on each head's top share.

    `datasets` is a store, a sequence of them, or a mapping from title to them. Raises UsageError as
    `variance_components` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, variance_components)
    figure = style.new_figure(9.6, 1.2 + 3.1 * len(found))
    rows = figure.subplots(len(found), 2, squeeze=False, sharey=True)
    for row, (name, heads) in zip(rows, found.items(), strict=True):
        for axes, prefix, over in zip(row, ("", "top_"), (throughout(heads), among(share, heads)), strict=True):
            _draw_shares(axes, heads, prefix)
            axes.set_title(over if len(found) == 1 else f"{name}: {over}")
            axes.set_xlabel("layer")
        row[0].set_ylabel("share of the variance\nof a token's self-repair")
    handles, labels = rows[0, 0].get_legend_handles_labels()
    kinds = {str(heads.attrs["clustered_by"]) for heads in found.values()}
    labels = [label.replace("document", " or ".join(sorted(kinds))) for label in labels]
    figure.legend(handles, labels, loc="outside right upper")
    style.heading(figure, found)
    style.caption(figure, found, [*style.captions(found, of="top_partner_share"), READING])
    return figure


def _draw_shares(axes: Axes, heads: xr.Dataset, prefix: str) -> None:
    layers = by_layer(heads, heads.attrs["share"])
    places, bottom = layers["layer"].values, np.zeros(layers.sizes["layer"])
    for part, label in PARTS.items():
        values = np.nan_to_num(layers[f"{prefix}{part}_share"].values)
        look: dict[str, Any] = {"color": COLOURS[part], "width": 0.8, "label": label, "alpha": 0.75}
        axes.bar(places, values, bottom=bottom, **look)
        bottom += values
    name = f"{prefix}partner_share"
    width = style.bars(layers[name + HALF_WIDTH].values)
    axes.errorbar(places, layers[name].values, width, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    upper = layers[f"{prefix}partner_share"].values + layers[f"{prefix}token_share"].values
    width = style.bars(layers[f"{prefix}document_share{HALF_WIDTH}"].values)
    axes.errorbar(places, upper, width, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    some = (heads.tokens > 0).values
    x = depth.places(heads)[some]
    width = style.bars(heads[name + HALF_WIDTH].transpose(*heads.tokens.dims).values[some])
    axes.errorbar(x, heads[name].values[some], width, fmt="none", ecolor="black", elinewidth=0.4, alpha=0.5)
    axes.scatter(x, heads[name].values[some], s=9, facecolor="white", edgecolor="black", linewidth=0.6, zorder=3)
    axes.set_ylim(0, 1)
    axes.set_xticks(places)
    axes.yaxis.set_major_formatter(FuncFormatter(style.as_percent))
