"""How the whole MLP's change spreads over its neurons, most repairing first (the paper's Figures 12 to 15)."""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE, neuron_changes
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import panels, style, suiting

READING = (
    "All neurons of {mlp}, in order of the mean change of their direct effect on the head's {top}:",
    "before the dotted line they repair on average, behind it they break. Height: absolute changes up to there; grey: "
    "95% intervals, of that in this order of neurons, and of where the line stands.",
    "Colours: the neuron's median clean direct effect on these tokens, pale where it may be 0; red neurons erase.",
)
PALE = 0.25


@figure(*suiting.NEURONS, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for each head that `neuron_changes` takes; several stores have a row each.

    `datasets` as for `erasure_neurons`. Raises UsageError as `neuron_changes` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, neuron_changes)
    figure, drawn = panels.of_heads(found, 4.6, 3.5)
    colours = panels.diverging(head.median_direct_effect.values for _, head, _ in drawn)
    dots = []
    for axes, head, title in drawn:
        last = np.argsort(abs(head.median_direct_effect.values), kind="stable")
        seen = head.isel(place=last)
        look = {"s": 13, "linewidth": 0, "rasterized": True, "zorder": 2, "alpha": _clear(seen)}
        look |= {"c": seen.median_direct_effect} | colours
        dots.append(axes.scatter(seen.place, seen.cumulative_size, **look))
        value, width = head.cumulative_size.values, style.bars(head.cumulative_size_half_width.values)
        band = {"color": style.MUTED, "alpha": 0.3, "linewidth": 0, "zorder": 1.5}
        axes.fill_between(head.place.values, value - width, value + width, **band)
        border, reach = float(head.rising) + 0.5, float(style.bars(head.rising_half_width.values))
        axes.axvline(border, color=style.MUTED, linestyle=":", linewidth=1)
        axes.axvspan(border - reach, border + reach, **band | {"zorder": 0.5})
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(style.as_percent)
        axes.set_title(title)
        axes.set_xlabel("neurons, most repairing first")
        axes.set_ylabel("cumulative absolute change")
    panels.colour_bar(figure, dots[-1], "median direct effect of the neuron (logits)")
    panels.explain(figure, found, READING, share, "cumulative_size")
    return figure


def _clear(head: xr.Dataset) -> np.ndarray:
    """How opaque neurons are: pale where the median may be 0, if that is known of any."""
    width = head.median_direct_effect_half_width.values
    sure = abs(head.median_direct_effect.values) > width
    return np.where(sure | ~np.isfinite(width).any(), 1, PALE)
