"""What the final norm repairs, by layer: in logits, by its parts, as a share of DE (Figures 6, 10, 11)."""

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE, among, norm_by_head
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import beyond, depth, style, suiting

MINUS = "\N{MINUS SIGN}"
PARTS = {
    "top_norm_on_existing": ("on the existing logits", {"linestyle": "-"}),
    "top_norm_on_change": ("on the change", {"linestyle": ":"}),
}
MIRROR = {"norm_mirror": ("its mirror: clipped breakage", {"linestyle": ":", "linewidth": 1.4})}
EXCESS = {"norm_excess": ("clipped, less its mirror", {"linestyle": "--", "linewidth": 1.4})}
SHUFFLED = {"norm_shuffled": ("clipped, of a shuffled target", {"linestyle": (0, (1, 1)), "marker": "x"})}
SHARES = {"norm_share": "clipped share", "norm_of_means": "share of the means"}
READING = (
    "Lines: means of each layer. Dots: attention heads (hollow where the interval of logits holds zero). Bars: 95% "
    "intervals.",
    f"The norm's repair is (S/S' {MINUS} 1) R', with R' the sum of "
    "all direct effects after the ablation and R before it:",
    f"(S/S' {MINUS} 1) R on the existing logits and (S/S' {MINUS} 1)(R' {MINUS} R) on the change.",
    "Clipped to 0 to 100% on each token, a norm that breaks as often as it repairs has a share too: the mirror is the "
    "same of the norm's breakage; the one less the other is what is repaired on balance.",
)
OF_MEANS = (
    "Share of the means: mean repair by the norm over mean direct effect, not clipped, of a layer for its heads'; "
    "left out where the direct effect may be 0: {out} of {heads} heads."
)
ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "borderaxespad": 0.1}
"""Where legends stand."""
EDGE = 0.04
"""What part of an axis is left free beyond a layer's mean."""
LARGEST = 1.25
"""Beyond it a share is shown as a number at the edge."""
NAMED = 4
"""Heads that are named in each panel."""

OF_SHUFFLED = (
    "Shuffled target: that of another position of the prompt, on the tokens where the head writes most for it; what "
    "the norm repairs of that has nothing to do with the token."
)
IN_NATS = (
    "The norm's repair of log-probability: its change, less its change with everything as ablated but the clean norm "
    "scale. Own effect: what the head's own write alone takes, the norm frozen."
)


@figure(*suiting.OF_THE_NORM, name=__name__, about=__doc__, every_token=True, nats=True)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw four panels: the norm's repair, its two parts (Appendix B), and its share of DE, clipped and of the means.

    The clipped one has its mirror beside it, the other the excess over that. Of log-probability there are two: the
    norm's repair, and its clipped share of what the head's own write alone takes.

    `datasets` is a store or a result of `norm_by_head`, a sequence of them, or a mapping from legend to them;
    several are drawn by depth in percent. Raises UsageError as `norm_by_head` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, norm_by_head)
    if style.unit_of(found) == "nats":
        return _draw_in_nats(found, share)
    figure = style.new_figure(9.6 if len(found) == 1 else 11, 7.2)
    whole, parts, clipped, balance = figure.subplots(2, 2).ravel()
    shuffled = all("norm_shuffled" in heads for heads in found.values())
    _draw_means(parts, found, share, PARTS)
    drawn = [_draw_heads(whole, found, share, "top_from_norm")]
    drawn.append(_draw_heads(clipped, found, share, "norm_share", MIRROR))
    drawn.append(_draw_heads(balance, found, share, "norm_of_means", EXCESS | (SHUFFLED if shuffled else {})))
    top = among(share, *found.values())
    titles = {
        whole: "repair by the norm",
        parts: "its two parts",
        **dict(zip((clipped, balance), SHARES.values(), strict=True)),
    }
    for axes, title in titles.items():
        axes.set_title(f"{title}, {top}", pad=18)
        depth.name_axis(axes, len(found) == 1)
        axes.set_ylabel("logits" if axes in (whole, parts) else "norm's repair / direct effect")
    told = [*READING, *_left_out(found), *([OF_SHUFFLED] if shuffled else [])]
    return _finish(figure, found, drawn, told)


def _draw_in_nats(found: Mapping[str, xr.Dataset], share: float) -> Figure:
    """The two panels that there are of log-probability."""
    figure = style.new_figure(9.6 if len(found) == 1 else 11, 4.0)
    drawn = []
    for axes, name, title, unit in zip(
        figure.subplots(1, 2),
        ("top_from_norm", "norm_share"),
        ("repair by the norm", "clipped share"),
        ("nats", "norm's repair / own effect"),
        strict=True,
    ):
        drawn.append(_draw_heads(axes, found, share, name))
        depth.name_axis(axes, len(found) == 1)
        axes.set_title(f"{title}, {among(share, *found.values())}")
        axes.set_ylabel(unit)
    return _finish(figure, found, drawn, [READING[0], IN_NATS])


def _finish(figure: Figure, found: Mapping[str, xr.Dataset], drawn: list[tuple], told: list[str]) -> Figure:
    style.heading(figure, found)
    style.legend(figure, drawn[0][0], found)
    told = [*told, *beyond.told(*(axis for *_, axis in drawn))]
    style.caption(figure, found, [*style.captions(found, of="top_from_norm"), *told])
    style.lay_out(figure)
    for axes, dots, axis in drawn:
        beyond.name(axes, dots, axis, NAMED)
    return figure


def _draw_heads(
    axes: Axes,
    found: Mapping[str, xr.Dataset],
    share: float,
    name: str,
    beside: Mapping[str, tuple] | None = None,
) -> tuple[Axes, list[beyond.Dots], beyond.Axis]:
    """Heads and means of layers, on an axis that far heads do not squash; `beside` them further means, named."""
    dots = depth.draw_heads(axes, found, name, share)
    low, high = beyond.ends(dots)
    if beside:
        _draw_means(axes, found, share, beside)
        means = [depth.means_of(heads, each, share, True) for each in beside for heads in found.values()]
        every = np.concatenate([[low, high], *(each.ends for each in means)])
        edge = EDGE * np.ptp(every)
        low, high = np.append(every[every < low] - edge, low).min(), np.append(every[every > high] + edge, high).max()
    if name in SHARES:
        low, high = max(low, -LARGEST), min(high, LARGEST)
    return axes, dots, beyond.settle(axes, dots, (low, high), name in SHARES)


def _draw_means(
    axes: Axes, found: Mapping[str, xr.Dataset], share: float, looks: Mapping[str, tuple]
) -> None:
    """Means of layers in further looks, named in a legend."""
    for index, heads in enumerate(found.values()):
        for name, (label, look) in looks.items():
            shown = label if index == 0 else None
            depth.draw_means(axes, heads, name, share, index, len(found) == 1, label=shown, **look)
    labels = [label for label, _ in looks.values()]
    axes.legend(handles=[line for line in axes.lines if line.get_label() in labels], **ABOVE)


def _left_out(found: Mapping[str, xr.Dataset]) -> list[str]:
    """What is said of the share of the means, and of how many heads it is not."""
    some = [heads.tokens > 0 for heads in found.values()]
    out = sum(
        int((each & heads.norm_of_means.isnull()).sum())
        for each, heads in zip(some, found.values(), strict=True)
    )
    return [OF_MEANS.format(out=out, heads=sum(int(each.sum()) for each in some))]
