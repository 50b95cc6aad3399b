"""Self-repair and the final norm's part of it, in logits beside nats of log-probability, by layer."""

from collections.abc import Mapping, Sequence

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE, among, outcomes_by_head
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import depth, style, suiting

BOTH = ("of the logit, in logits", "of the log-probability, in nats")
PANELS = {
    "self-repair": dict(zip(("top_self_repair", "top_self_repair_logprob"), BOTH, strict=True)),
    "the final norm's part of it": dict(zip(("top_from_norm", "top_norm_logprob"), BOTH, strict=True)),
    "what the heads' own writes take": dict(zip(("top_removed", "top_removed_logprob"), BOTH, strict=True)),
    "the next-token distribution": {"top_entropy_change": "change of entropy", "top_kl": "KL(clean ‖ ablated)"},
}
WIDE, ROOM = 36, 0.09  # characters beside a panel, and how much of it a line of the legend takes
ALIKE = 2
"""Panels that have the same scale."""
READING = (
    "Lines: means of each layer, with their 95% intervals. Dots: heads; hollow where the interval holds zero.",
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
    for row, (name, heads) in zip(panels.reshape(len(found), -1), found.items(), strict=True):
        for axes, (title, shown) in zip(row, PANELS.items(), strict=True):
            _draw_panel(axes, heads, shown, share, 0 if axes is not row[-1] else len(BOTH))
            axes.set_title(title)
            axes.set_ylabel("nats" if axes is row[-1] else "logits or nats")
        if not alone:
            row[0].set_ylabel(f"{style.wrapped(name, WIDE)}\nlogits or nats")
        _one_scale(row[:ALIKE])
        for axes, shown in zip(row, PANELS.values(), strict=True):
            _write_legend(axes, len(shown))
    style.heading(figure, found, f"{style.title_of(found)}: means on {among(share, *found.values())}")
    style.caption(figure, found, [*style.captions(found, of="top_self_repair_logprob"), *READING])
    return figure


def _draw_panel(axes: Axes, heads: xr.Dataset, shown: Mapping[str, str], share: float, first: int) -> None:
    for index, (name, label) in enumerate(shown.items(), first):
        depth.draw_heads(axes, {label: heads}, name, share, first=index)
    depth.name_axis(axes, True)


def _one_scale(panels: Sequence[Axes]) -> None:
    low, high = zip(*(axes.get_ylim() for axes in panels), strict=True)
    for axes in panels:
        axes.set_ylim(min(low), max(high))


def _write_legend(axes: Axes, lines: int) -> None:
    """Above the dots."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + ROOM * lines * (high - low))
    axes.legend(loc="upper left")
