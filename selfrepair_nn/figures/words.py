"""What heads promote and demote most often, in words, and how often that stands in the context, against a null."""

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, among, frequent_words, words_in_context
from selfrepair_nn.components import Head
from selfrepair_nn.confidence import RATE
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import style, suiting
from selfrepair_nn.shown import line

COUNT, PLACES = 16, 3
"""Heads, and words of each."""
LONGEST = 9
"""Characters of a word."""
ROW = 0.29
COLOURS = {"promoted": ("Blues", style.COLOURS[0]), "demoted": ("Oranges", style.COLOURS[1])}
TITLES = {
    "promoted": "most often promoted",
    "demoted": "most often demoted",
    "context": "first word was read before:\nexcess over the null",
    "repair": "demoted, read before:\nchange of its logit",
}
READING = (
    "Rows: the {count} heads that write most of the target. Cells: a token, and on how many of the head's tokens it is "
    "among the {kept} that its write raises, or lowers, most; ␣ is a space, ⟨9⟩ a token that is no text alone.",
    "Third panel: share of tokens whose first word was read before, less the share of other documents' contexts of the "
    "same length that hold it. Filled: known to differ from zero (false discovery rate {rate:.0%} over all heads).",
    "Fourth: when the head is ablated, what its own write gives back, and what the whole model does: the difference is "
    "self-repair of that token's logit.",
)
NEED = Need("words (--words)", lambda ds: suiting.grid(ds) and ("promoted" in ds or "word_share" in ds))


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw for each store four panels that share their rows, heads: words, words, context, and repair of demoted words.

    `datasets` is a store, a sequence of them, or a mapping from title to them. Raises UsageError as `words_in_context`
    does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, _summary)
    chosen = {name: _loudest(heads) for name, heads in found.items()}
    heights = [1.6 + ROW * len(rows) for rows in chosen.values()]
    figure = style.new_figure(12.5, 0.9 + sum(heights))
    looks = {"squeeze": False, "gridspec_kw": {"width_ratios": [4, 4, 2.5, 2.5], "height_ratios": heights}}
    panels = figure.subplots(len(found), 4, **looks)
    for row, (name, heads) in zip(panels, found.items(), strict=True):
        rows = [heads.isel(layer=layer, head=head) for layer, head in chosen[name]]
        for axes, end in zip(row, COLOURS, strict=False):
            _draw_words(axes, [each.sel(end=end) for each in rows], COLOURS[end][0])
        _draw_context(row[2], rows)
        _draw_repair(row[3], [each.sel(end="demoted") for each in rows])
        for axes, told in zip(row, TITLES.values(), strict=True):
            axes.set_title(told, fontsize=9.5)
            axes.set_ylim(len(rows) - 0.5, -0.5)
        labels = [Head(int(each["layer"]), int(each["head"])).label for each in rows]
        row[0].set_yticks(range(len(rows)), labels)
        for axes in row[1:]:
            axes.set_yticks(range(len(rows)), [])
        row[0].set_ylabel("head" if len(found) == 1 else style.wrapped(name, 30))
    style.heading(figure, found, f"{style.title_of(found)}: words of {among(share, *found.values())}")
    kept = max(heads.attrs["words"] for heads in found.values())
    told = [each.format(count=COUNT, kept=kept, rate=RATE) for each in READING]
    style.caption(figure, found, [*style.captions(found), *told])
    return figure


def _summary(ds: xr.Dataset, share: float) -> xr.Dataset:
    found = words_in_context(ds, share).assign(frequent_words(ds, PLACES, share))
    return found.assign_attrs(words=ds.sizes["word"])


def _loudest(heads: xr.Dataset) -> list[tuple[int, int]]:
    """The heads of largest mean direct effect, in the order of the model."""
    effect = np.where(heads.tokens.values > 0, heads.top_direct_effect.values, -np.inf)
    order = np.argsort(-effect.ravel(), kind="stable")[: min(COUNT, np.isfinite(effect).sum())]
    return [divmod(int(each), effect.shape[1]) for each in sorted(order)]


def _draw_words(axes: Axes, rows: list[xr.Dataset], colours: str) -> None:
    shares = np.array([each.word_share.values for each in rows])
    axes.imshow(shares, cmap=colormaps[colours], vmin=0, vmax=1.3, aspect="auto")
    axes.grid(False)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    for at, each in enumerate(rows):
        names = ("word", "word_text", "word_share", f"word_share{HALF_WIDTH}")
        for place, (token, text, share, width) in enumerate(zip(*(each[name].values for name in names), strict=True)):
            if np.isfinite(share):
                known = f" ± {100 * width:.0f}" if np.isfinite(width) else ""
                said = f"{shown(int(token), str(text))}  {100 * share:.0f}{known}%"
                axes.text(place, at, said, ha="center", va="center", fontsize=7.5)


def shown(token: int, text: str) -> str:
    """A token as a cell shows it: spaces visible, control characters told, cut short; by its id where it is no text."""
    if not text.strip("\ufffd"):
        return f"⟨{token}⟩"
    told = line(text.replace("\n", "↵").replace("\t", "→")).replace(" ", "␣")
    return told if len(told) <= LONGEST else f"{told[: LONGEST - 1]}…"


def _draw_context(axes: Axes, rows: list[xr.Dataset]) -> None:
    for shift, (end, (_, colour)) in zip((-0.15, 0.15), COLOURS.items(), strict=True):
        for at, each in enumerate(each.sel(end=end) for each in rows):
            width = style.bars(each[f"in_context_excess{HALF_WIDTH}"].values[None])
            fill = colour if bool(each.excess_known) else "white"
            look = {"marker": "o", "markersize": 4, "color": colour, "markerfacecolor": fill, "elinewidth": 1}
            label = end if at == 0 else None
            axes.errorbar(each.in_context_excess.values[None], [at + shift], xerr=width, label=label, **look)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.xaxis.set_major_formatter(style.as_percent)
    axes.set_xlabel("share of tokens")
    _write_legend(axes)


def _draw_repair(axes: Axes, rows: list[xr.Dataset]) -> None:
    drawn = {
        "own write": ("word_removed", -1, style.MUTED, -0.15),
        "whole model": ("word_logit_change", 1, style.COLOURS[1], 0.15),
    }
    for label, (name, sign, colour, shift) in drawn.items():
        values = np.array([sign * float(each[name]) for each in rows])
        width = style.bars(np.array([float(each[name + HALF_WIDTH]) for each in rows]))
        where = np.arange(len(rows)) + shift
        look = {"marker": "s", "markersize": 3.5, "color": colour, "linestyle": "none", "elinewidth": 1}
        axes.errorbar(values, where, xerr=width, label=label, **look)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("logits, less their mean")
    _write_legend(axes)


def _write_legend(axes: Axes) -> None:
    """Below the axis, whatever its height."""
    look = {"borderaxespad": 4.2, "columnspacing": 0.8, "handletextpad": 0.1}
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0), ncols=2, **look)
