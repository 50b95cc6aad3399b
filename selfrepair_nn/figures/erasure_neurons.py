"""The most repairing neuron of each token: its direct effect before and after the ablation (the paper's Figure 7)."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE, erasure_neurons
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import panels, style, suiting

BINS = 60
READING = (
    "Dots: for each head the {share} of tokens on which {mlp} repairs most; of each the one neuron that repairs most.",
    "Above: histogram of its clean direct effect. Left of the vertical line the neuron erased before the ablation:",
    "dots there, above the dashed line y = x, are anti-erasure. Colours: direct effect of the whole MLP, clean.",
    "Mirrored: where {mlp} breaks most, how often the neuron that breaks most wrote for the token before the ablation.",
    "Were neurons pushed towards zero whatever their sign, both would be alike: the excess is the one less the other.",
    "Shuffled target: the same for the target of another position of the prompt, where {mlp} raises that most.",
)


@figure(*suiting.NAMED_NEURONS, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for each head that `erasure_neurons` takes; several stores have a row each.

    `datasets` is a store that records neurons, a sequence of them, or a mapping from title to them. Raises UsageError
    as `erasure_neurons` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, erasure_neurons)
    figure, drawn = panels.of_heads(found, 4.6, 4.6)
    colours = panels.diverging(head.mlp_direct_effect.values for _, head, _ in drawn)
    dots = [_draw_head(axes, head, title, colours) for axes, head, title in drawn]
    panels.colour_bar(figure, dots[-1], "direct effect of the whole MLP (logits)")
    panels.explain(figure, found, READING, share, "anti_erasing")
    return figure


def _excess(head: xr.Dataset, name: str) -> str:
    """ "+35% ± 6%", in percent of tokens."""
    sign = "+" if float(head[name]) >= 0 else ""
    return f"{sign}{style.shown_share(head, name)}".replace("-", "\N{MINUS SIGN}")


def _draw_head(axes: Axes, head: xr.Dataset, title: str, colours: dict[str, Any]) -> PathCollection:
    entries = int(head.entries)
    names = ("neuron_direct_effect", "ablated_neuron_direct_effect", "mlp_direct_effect")
    clean, ablated, whole = (head[name].values[:entries] for name in names)
    line = {"color": "black", "linewidth": 0.7, "zorder": 1.5}
    axes.axhline(0, **line)
    axes.axvline(0, **line)
    axes.axline((0, 0), slope=1, color="black", linestyle="--", linewidth=1, zorder=1.5)
    look = {"s": 14, "edgecolor": style.MUTED, "linewidth": 0.25, "rasterized": True, "zorder": 2}
    dots = axes.scatter(clean, ablated, c=whole, **look, **colours)
    axes.set_xlabel("direct effect of the neuron, clean (logits)")
    axes.set_ylabel("after the ablation (logits)")
    above = axes.inset_axes((0, 1.02, 1, 0.16), sharex=axes)
    above.hist(clean, bins=np.linspace(*axes.get_xlim(), BINS).tolist(), color=style.SHADE, alpha=0.6)
    above.axvline(0, **line)
    above.tick_params(labelbottom=False, labelleft=False, left=False, bottom=False)
    above.grid(False)
    above.spines["left"].set_visible(False)
    said = f"anti-erasure on {style.shown_share(head, 'anti_erasing')} of {entries:,} tokens"
    if np.isfinite(float(head.mirror)):
        said += f"\nmirrored {style.shown_share(head, 'mirror')}, excess {_excess(head, 'excess')}"
    if np.isfinite(float(head.shuffled)):
        said += f"\nshuffled target {style.shown_share(head, 'shuffled')}, excess {_excess(head, 'over_shuffled')}"
    said += f"\ndirect effect of the MLP above 0 on {style.shown_share(head, 'mlp_positive')}"
    above.set_title(title, pad=max(38, 5 + 11 * len(said.splitlines())))
    place = {"transform": above.transAxes, "va": "bottom", "fontsize": 7.5, "color": style.MUTED}
    above.text(0, 1.06, said, linespacing=1.3, **place)
    return dots
