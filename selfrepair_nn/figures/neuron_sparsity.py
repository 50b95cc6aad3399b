"""How often the Nth most repairing neuron alone repairs a part of the head's direct effect (the paper's Figure 8)."""

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE, neuron_sparsity, percent
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import panels, style, suiting

READING = (
    "On each of a head's {top}, the neurons of {mlp} are ordered by their change of direct effect.",
    "Lines: on how many of these tokens the neuron at a place alone repairs so much of the head's direct effect; "
    "shaded: 95% intervals.",
    "The places are those of each token: not always of the same neuron. Hollow, where known: the first neuron's share "
    "for the target of another position (shuffled), on the tokens where the head writes most for that.",
)


@figure(*suiting.NEURONS, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for each head that `neuron_sparsity` takes; several stores have a row each.

    `datasets` as for `erasure_neurons`. Raises UsageError as `neuron_sparsity` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, neuron_sparsity)
    figure, drawn = panels.of_heads(found, 4.6, 3.3)
    for axes, head, title in drawn:
        parts = head.part.values
        colours = colormaps[style.LAYERS](
            [index / max(1, len(parts) - 1) * 0.85 for index in range(len(parts))]
        )
        widths = style.bars(head.repairs_half_width.values)
        for part, colour, values, width in zip(parts, colours, head.repairs.values, widths, strict=True):
            look = {
                "color": colour,
                "linewidth": 1.6,
                "label": f"{percent(part)} or more",
            }
            axes.plot(head.place, values, **look)
            axes.fill_between(
                head.place, values - width, values + width, color=colour, alpha=0.2, linewidth=0
            )
        if head.first_shuffled.notnull().all():
            look = {"marker": "D", "s": 24, "facecolor": "none", "edgecolor": colours, "zorder": 3}
            axes.scatter(np.ones(len(parts)), head.first_shuffled.values, **look)
            width = style.bars(head.first_shuffled_half_width.values)
            bars = {"fmt": "none", "ecolor": colours, "elinewidth": 1}
            axes.errorbar(np.ones(len(parts)), head.first_shuffled.values, width, **bars)
        axes.set_ylim(-0.02, 1.02)
        axes.set_title(title)
        axes.yaxis.set_major_formatter(style.as_percent)
        axes.set_xlabel("place of the neuron, most repairing first")
        axes.set_ylabel("tokens")
    drawn[0][0].legend(title="of the direct effect")
    panels.explain(figure, found, READING, share, "repairs")
    return figure
