"""Whether the same neurons repair a head on other tokens and in other prompts (section 4.2.2)."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, neuron_consistency
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import panels, style, suiting

PLACES = 30
READING = (
    "For each head the {share} of tokens on which it is repaired most, and on each the ten neurons of {mlp} that",
    "repair most. Left: how often the most frequent of these neurons are among the ten. Right: how many of the ten",
    "two tokens have in common, on average; dotted: two random choices. Bars: 95% intervals.",
)


@figure(*suiting.NAMED_NEURONS, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw for each store how often neurons recur for the heads of `neuron_consistency`, and what two tokens share.

    `datasets` as for `erasure_neurons`. Raises UsageError as `neuron_consistency`, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, neuron_consistency)
    figure = style.new_figure(9.6, 1.3 + 3.8 * len(found))
    rows = figure.subplots(len(found), 2, squeeze=False)
    for (left, right), (name, heads) in zip(rows, found.items(), strict=True):
        _draw_frequencies(left, heads)
        _draw_shared(right, heads)
        left.set_title(
            "how often a neuron recurs" if len(found) == 1 else f"{name}: how often a neuron recurs"
        )
        right.set_title("what two tokens share")
    panels.explain(figure, found, READING, share, "in_tokens")
    return figure


def _draw_frequencies(axes: Axes, heads: xr.Dataset) -> None:
    for rank in range(heads.sizes["rank"]):
        head = heads.isel(rank=rank, place=slice(PLACES))
        look = {"color": style.colour(rank), "marker": style.marker(rank), "markersize": 3, "linewidth": 1.2}
        width = style.bars(head.in_tokens_half_width.values)
        axes.errorbar(
            head.place, head.in_tokens.values, width, elinewidth=0.6, label=panels.label(head), **look
        )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(style.as_percent)
    axes.set_xlabel("neurons, most frequent first")
    axes.set_ylabel("tokens")
    axes.legend()


def _draw_shared(axes: Axes, heads: xr.Dataset) -> None:
    at = np.arange(heads.sizes["rank"])
    bars = {"shared_within": ("of the same prompt", -0.2), "shared_between": ("of different prompts", 0.2)}
    for index, (name, (label, shift)) in enumerate(bars.items()):
        look = {"color": style.colour(index), "error_kw": {"elinewidth": 1, "ecolor": "#333333"}}
        axes.bar(
            at + shift,
            heads[name],
            0.38,
            yerr=style.bars(heads[name + HALF_WIDTH].values),
            label=label,
            **look,
        )
    axes.axhline(float(heads.shared_by_chance), color="black", linestyle=":", linewidth=1)
    axes.set_xticks(at, [panels.label(heads.isel(rank=rank)) for rank in at])
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("neurons in common")
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])
    axes.legend(title="two tokens", ncols=2)
