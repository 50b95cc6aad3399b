"""Self-repair and the final norm's part of it, in logits beside nats of log-probability, by layer."""

from collections.abc import Mapping

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE, among, outcomes_by_head
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import beyond, depth, style, suiting

BOTH = ("of the logit, in logits", "of the log-probability, in nats")
PANELS = {
    "self-repair": dict(zip(("top_self_repair", "top_self_repair_logprob"), BOTH, strict=True)),
    "the final norm's part of it": dict(zip(("top_from_norm", "top_norm_logprob"), BOTH, strict=True)),
    "what the heads' own writes take": dict(zip(("top_removed", "top_removed_logprob"), BOTH, strict=True)),
    "the next-token distribution": {
        "top_entropy_change": "change of entropy",
        "top_kl": "KL(clean ‖ ablated)",
    },
}
WIDE, NAMED = 36, 3  # characters beside a panel; heads that are named in it
ALIKE = 2
"""Panels that have the same scale."""
READING = (
    "Lines: means of each layer. Dots: heads; hollow where the interval holds zero. Bars: 95% intervals.",
    "Self-repair of the log-probability: its change, less its change where only the head's own write changed, the norm "
    "frozen. The norm's part: its change, less its change with everything as ablated, but the clean norm scale.",
    "The norm multiplies all logits by one number, as a temperature does: with the target's its rivals' rise too.",
)


@figure(*suiting.OUTCOMES, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw four panels for each store, means on the top share; several stores have a row each.

    Self-repair, the norm's part, and what the heads' own writes take with the norm frozen, in logits and in nats; and
    what becomes of the next-token distribution. `datasets` is a store or a result of `outcomes_by_head`, a sequence of
    them, or a mapping from title to them. Raises UsageError as that does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, outcomes_by_head)
    alone = len(found) == 1
    figure = style.new_figure(9.6, 7.2) if alone else style.new_figure(15, 0.9 + 3.4 * len(found))
    panels = figure.subplots(2, 2) if alone else figure.subplots(len(found), len(PANELS))
    drawn: dict[Axes, list[beyond.Dots]] = {}
    settled: dict[Axes, beyond.Axis] = {}
    for row, (name, heads) in zip(panels.reshape(len(found), -1), found.items(), strict=True):
        for axes, (title, shown) in zip(row, PANELS.items(), strict=True):
            drawn[axes] = _draw_panel(axes, heads, shown, share, 0 if axes is not row[-1] else len(BOTH))
            axes.set_title(title, pad=18 if alone else 31)
            axes.set_ylabel("nats" if axes is row[-1] else "logits or nats")
        if not alone:
            row[0].set_ylabel(f"{style.wrapped(name, WIDE)}\nlogits or nats")
        limits = {axes: beyond.ends(drawn[axes]) for axes in row}
        low, high = zip(*(limits[axes] for axes in row[:ALIKE]), strict=True)
        limits |= {axes: (min(low), max(high)) for axes in row[:ALIKE]}
        for axes in row:
            settled[axes] = beyond.settle(axes, drawn[axes], limits[axes])
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=2 if alone else 1, borderaxespad=0.1, labelspacing=0.2
            )
    told = [*READING, *beyond.told(*settled.values())]
    style.heading(figure, found, f"{style.title_of(found)}: means on {among(share, *found.values())}")
    style.caption(figure, found, [*style.captions(found, of="top_self_repair_logprob"), *told])
    style.lay_out(figure)
    for axes, axis in settled.items():
        beyond.name(axes, drawn[axes], axis, NAMED)
    return figure


def _draw_panel(
    axes: Axes, heads: xr.Dataset, shown: Mapping[str, str], share: float, first: int
) -> list[beyond.Dots]:
    found = []
    for index, (name, label) in enumerate(shown.items(), first):
        found += depth.draw_heads(axes, {label: heads}, name, share, first=index)
    depth.name_axis(axes, True)
    return found
