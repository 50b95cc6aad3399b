"""What the final norm repairs, by layer: in logits, by its parts, as a share of DE (Figures 6, 10, 11)."""

from collections.abc import Mapping

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE, among, by_layer, every_token, norm_by_head, throughout
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import depth, style, suiting

MINUS = "\N{MINUS SIGN}"
PARTS = {
    "top_norm_on_existing": ("on the existing logits", {"linestyle": "-"}),
    "top_norm_on_change": ("on the change", {"linestyle": ":"}),
}
BESIDE = {
    "norm_mirror": ("its mirror: clipped breakage", {"linestyle": ":", "linewidth": 1.2, "marker": "None"}),
    "norm_excess": ("excess over the mirror", {"linestyle": "--", "linewidth": 1.2, "marker": "None"}),
}
SHUFFLED = {
    "norm_shuffled": ("of a shuffled target", {"linestyle": (0, (1, 1)), "linewidth": 1.6, "marker": "x"}),
}
READING = (
    "Lines: means of each layer, with their 95% intervals. Dots: attention heads (hollow where the interval of logits "
    "holds zero).",
    f"The norm's repair is (S/S' {MINUS} 1) R', with R' the sum of "
    "all direct effects after the ablation and R before it:",
    f"(S/S' {MINUS} 1) R on the existing logits and (S/S' {MINUS} 1)(R' {MINUS} R) on the change. "
    "Tokens of hardly any direct effect decide an unclipped share.",
    "Clipped to 0 to 100% on each token, a norm that breaks as often as it repairs has a share too: the mirror is the "
    "same of the norm's breakage; the excess, the one less the other, is what is repaired on balance.",
)

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
    """Draw four panels: the norm's repair, its two parts (Appendix B), its clipped and its unclipped share of DE.

    The clipped one has its mirror and the excess over that beside it. The last is of all tokens, and left out where
    only the top share is kept. Of log-probability there are two: the norm's repair, and its clipped share of what the
    head's own write alone takes.

    `datasets` is a store or a result of `norm_by_head`, a sequence of them, or a mapping from legend to them;
    several are drawn by depth in percent. Raises UsageError as `norm_by_head` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, norm_by_head)
    if style.unit_of(found) == "nats":
        return _draw_in_nats(found, share)
    alone, top = len(found) == 1, among(share, *found.values())
    figure = style.new_figure(9.6 if alone else 11, 7.2)
    whole, parts, clipped, ratio = figure.subplots(2, 2).ravel()
    depth.draw_heads(whole, found, "top_from_norm", share)
    _draw_means(parts, found, share, PARTS)
    depth.draw_heads(clipped, found, "norm_share", share)
    shuffled = all("norm_shuffled" in heads for heads in found.values())
    _draw_means(clipped, found, share, BESIDE | (SHUFFLED if shuffled else {}))
    depth.draw_heads(ratio, found, "norm_ratio", share)
    ratio.set_yscale("symlog", linthresh=1)
    clipped.set_ylim(min(0, clipped.get_ylim()[0]) if _below_zero(found, share) else 0, 1)
    for axes in (clipped, ratio):
        axes.yaxis.set_major_formatter(style.as_percent)
    titles = (f"repair by the norm, {top}", f"its two parts, {top}")
    titles += (f"clipped share, {top}", f"unclipped share, {throughout(*found.values())}")
    for axes, title in zip((whole, parts, clipped, ratio), titles, strict=True):
        axes.set_title(title)
        depth.name_axis(axes, alone)
        axes.set_ylabel("logits" if axes in (whole, parts) else "norm's repair / direct effect")
    if not all(map(every_token, found.values())):
        ratio.remove()
    style.heading(figure, found)
    style.legend(figure, whole, found)
    told = [*READING, OF_SHUFFLED] if shuffled else READING
    style.caption(figure, found, [*style.captions(found, of="top_from_norm"), *told])
    return figure


def _draw_in_nats(found: Mapping[str, xr.Dataset], share: float) -> Figure:
    """The two panels that there are of log-probability."""
    figure = style.new_figure(9.6 if len(found) == 1 else 11, 4.0)
    whole, clipped = figure.subplots(1, 2)
    for axes, name, title, unit in (
        (whole, "top_from_norm", "repair by the norm", "nats"),
        (clipped, "norm_share", "clipped share", "norm's repair / own effect"),
    ):
        depth.draw_heads(axes, found, name, share)
        depth.name_axis(axes, len(found) == 1)
        axes.set_title(f"{title}, {among(share, *found.values())}")
        axes.set_ylabel(unit)
    clipped.set_ylim(0, 1)
    clipped.yaxis.set_major_formatter(style.as_percent)
    style.heading(figure, found)
    style.legend(figure, whole, found)
    style.caption(figure, found, [*style.captions(found, of="top_from_norm"), READING[0], IN_NATS])
    return figure


def _draw_means(axes: Axes, found: Mapping[str, xr.Dataset], share: float, looks: Mapping[str, tuple]) -> None:
    for index, heads in enumerate(found.values()):
        for name, (label, look) in looks.items():
            shown = label if index == 0 else None
            depth.draw_means(axes, heads, name, share, index, len(found) == 1, label=shown, **look)
    lines = [line for line in axes.lines if line.get_label() in [label for label, _ in looks.values()]]
    axes.legend(handles=lines)


def _below_zero(found: Mapping[str, xr.Dataset], share: float) -> bool:
    """Whether the norm breaks more than it repairs in some layer."""
    return any(float(by_layer(heads, share).norm_excess.min()) < 0 for heads in found.values())
