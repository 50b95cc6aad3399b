"""Previous-token and induction heads on repeated tokens: their scores, and whether they are repaired (5.3.1)."""

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HALF_WIDTH, KINDS, SHARE, by_kind, induction_by_head
from selfrepair_nn.blocks import counted_tokens
from selfrepair_nn.components import Head
from selfrepair_nn.confidence import RATE
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import beyond, labels, style, suiting
from selfrepair_nn.quantities import TOKEN

HEADS = 6
"""Heads of a kind that are shown one by one."""
ROW, SHIFT = 0.3, 0.26
LOOKS: dict[str, tuple] = dict(
    zip(KINDS, ((style.COLOURS[1], "D", 30), (style.COLOURS[0], "s", 26), ("#8A8A8A", "o", 10)), strict=True)
)
SHOWN = {
    "removed": ("direct effect removed", style.MUTED, "o"),
    "logit_change": ("logit change", style.COLOURS[3], "v"),
    "self_repair": ("self-repair: their sum", style.COLOURS[2], "D"),
}
READING = (
    "Scores: mean attention on the repeated half to the token before and to what followed the same token in the first; "
    "dotted: the least that makes a kind.",
    "Right: means over these tokens, of the {count} heads of highest score of each kind and of all heads of a kind. "
    "Bars: 95% intervals. At the edge, with their numbers: beyond the axis.",
    "Repaired: heads whose self-repair surely is repair (false discovery rate {rate:.0%}), of those with an interval.",
)

NEED = Need(
    "attention on repeated tokens, as `induction` records",
    lambda ds: suiting.grid(ds) and ("induction" in ds or ("attention" in ds and _repeated(ds))),
)


def _repeated(ds: xr.Dataset) -> bool:
    """Whether the tokens that count are repeated ones, at the distance that is looked at."""
    if "counted" not in ds or "distance" not in ds.coords:
        return False
    if ds.sizes["distance"] != 2 or int(ds.distance[0]) != 1:
        return False
    period, counted, token = int(ds.distance[1]) + 1, counted_tokens(ds), ds.token.transpose(*TOKEN).values
    repeated = np.zeros(token.shape, bool)
    repeated[:, period:] = token[:, period:] == token[:, :-period]
    return bool(repeated[counted].all())


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a row for each store: every head's two scores, and its direct effect against the logit change.

    `datasets` is a store of the induction recipe or a result of `induction_by_head`, a sequence of them, or a mapping
    from title to them. Raises UsageError as `induction_by_head` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, induction_by_head)
    rows = {name: _rows(heads, share) for name, heads in found.items()}
    heights = [max(3.4, 1.0 + ROW * len(each)) for each in rows.values()]
    figure = style.new_figure(9.6, 0.9 + sum(heights))
    style.space(figure, w_pad=0.1, h_pad=0.08)
    looks = {"squeeze": False, "gridspec_kw": {"height_ratios": heights, "width_ratios": [1, 1.35]}}
    panels = figure.subplots(len(found), 2, **looks)
    for row, (name, heads) in zip(panels, found.items(), strict=True):
        _draw_scores(row[0], heads)
        _draw_rows(row[1], rows[name])
        row[0].set_title("scores" if len(found) == 1 else name)
        row[1].set_title("repaired?", pad=20)
    style.heading(figure, found)
    reading = [line.format(rate=RATE, count=HEADS) for line in READING]
    style.caption(figure, found, [*style.captions(found, False, "self_repair"), *reading])
    style.lay_out(figure)
    for row, heads in zip(panels, found.values(), strict=True):
        _name(row[0], heads)
    return figure


def _rows(heads: xr.Dataset, share: float) -> list[tuple[str, str, Mapping]]:
    """What stands in the rows: kind, label, and means with half-widths; of a kind first its heads, then their mean."""
    kinds, found = by_kind(heads, share), []
    for kind in KINDS:
        for layer, head in _first(heads, kind):
            one = heads.isel(layer=layer, head=head)
            found.append((kind, Head(int(one["layer"]), int(one["head"])).label, one))
        if int(kinds.heads.sel(kind=kind)):
            found.append((kind, _told(kinds.sel(kind=kind)), kinds.sel(kind=kind)))
    return found


def _first(heads: xr.Dataset, kind: str) -> list[tuple[int, int]]:
    """Places of the heads of a kind, of highest score first; of those of no kind none."""
    if kind == KINDS[-1]:
        return []
    score = heads[kind.replace(" ", "_")].where((heads.kind == kind) & (heads.tokens > 0))
    order = np.argsort(-score.values, axis=None, kind="stable")[: min(HEADS, int(score.notnull().sum()))]
    return [divmod(int(at), heads.sizes["head"]) for at in order]


def _told(kind: xr.Dataset) -> str:
    count, tested = int(kind.heads), int(kind.tested)
    name = f"mean of {count}\n{kind.kind.values} {'heads' if count > 1 else 'head'}"
    return f"{name}, repaired: {round(float(kind.repaired) * tested)} of {tested}" if tested else name


def _draw_scores(axes: Axes, heads: xr.Dataset) -> None:
    known = (heads.tokens > 0).values
    x, y = (heads[name].values for name in ("previous_token", "induction"))
    widths = (heads[name + HALF_WIDTH].values[known] for name in ("previous_token", "induction"))
    style.crosses(axes, x[known], y[known], *widths)
    for kind in reversed(KINDS):
        chosen = (heads.kind == kind).values & known
        colour, marker, size = LOOKS[kind]
        look = {
            "color": colour,
            "marker": marker,
            "s": size,
            "edgecolor": "white",
            "linewidth": 0.4,
            "zorder": 3,
        }
        axes.scatter(x[chosen], y[chosen], label=f"{kind}: {chosen.sum()}", **look)
    limit = {"color": style.MUTED, "linestyle": ":", "linewidth": 1, "zorder": 1}
    axes.axhline(heads.attrs["least"], **limit)
    axes.axvline(heads.attrs["least"], **limit)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set_box_aspect(1)
    axes.set_xlabel("previous-token score")
    axes.set_ylabel("induction score")
    axes.legend(*(each[::-1] for each in axes.get_legend_handles_labels()), loc="upper right")


def _draw_rows(axes: Axes, rows: list[tuple[str, str, Mapping]]) -> None:
    every = _values(rows)
    x, y, width, full = (np.concatenate([getattr(each, n) for each in every]) for n in ("x", "y", "width", "full"))
    together = beyond.Dots(x, y, width, [], "", full, every[0].means)
    low, high = beyond.ends([together])
    for shift, (name, (label, colour, marker)), dots in zip(
        (-SHIFT, 0, SHIFT), SHOWN.items(), every, strict=True
    ):
        near = (dots.y >= low) & (dots.y <= high)
        look = {"fmt": marker, "markersize": 4, "elinewidth": 1, "color": colour, "label": label}
        look["markerfacecolor"] = "white" if name == "removed" else colour
        axes.errorbar(dots.y[near], dots.x[near] + shift, xerr=style.bars(dots.width[near]), **look)
        for i in np.flatnonzero(np.isfinite(dots.y) & ~near):
            _write_beyond(axes, dots, int(i), shift, high if dots.y[i] > high else low)
    axes.set_xlim(low, high)
    axes.axvline(0, color="black", linewidth=0.8, zorder=1.5)
    axes.set_yticks(range(len(rows)), [label for _, label, _ in rows], fontsize=style.LABEL)
    for tick, (kind, label, _) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(LOOKS[kind][0] if kind != KINDS[-1] else style.MUTED)
        tick.set_fontweight("bold" if "\n" in label else "normal")
    for i, (_, label, _) in enumerate(rows[:-1]):
        if "\n" in label:
            axes.axhline(i + 0.5, color="#C8C8C8", linewidth=0.8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("logits")
    axes.legend(
        ncols=3,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.1,
        columnspacing=1,
        handletextpad=0.2,
    )


def _values(rows: list[tuple[str, str, Mapping]]) -> list[beyond.Dots]:
    """The three means of every row."""
    none, found = np.empty(0), []
    for name, (_, colour, _) in SHOWN.items():
        means, widths = (np.array([float(one[name + end]) for *_, one in rows]) for end in ("", HALF_WIDTH))
        names = [label for _, label, _ in rows]
        place = np.arange(len(rows), dtype=float)
        found.append(
            beyond.Dots(place, means, widths, names, colour, means > 0, beyond.Values(none, none, none, []))
        )
    return found


def _write_beyond(axes: Axes, dots: beyond.Dots, i: int, shift: float, edge: float) -> None:
    """A mark at the edge of the axis, and the number."""
    up = dots.y[i] > edge
    axes.plot(
        edge,
        dots.x[i] + shift,
        ">" if up else "<",
        color=dots.colour,
        markersize=4.5,
        clip_on=False,
        zorder=4,
    )
    width = f" ± {dots.width[i]:.1g}" if np.isfinite(dots.width[i]) else ""
    told = f"{dots.y[i]:+.2g}{width}".replace("-", "\N{MINUS SIGN}")
    look = {"ha": "right" if up else "left", "va": "center", "fontsize": 6.5, "color": dots.colour}
    place = (-6 if up else 6, 0)
    axes.annotate(told, (edge, dots.x[i] + shift), place, textcoords="offset points", **look)


def _name(axes: Axes, heads: xr.Dataset) -> None:
    """Name the heads of either kind that stand in the rows."""
    chosen = [at for kind in KINDS for at in _first(heads, kind)]
    x, y, known = heads.previous_token.values, heads.induction.values, (heads.tokens > 0).values
    places = np.array([(x[at], y[at]) for at in chosen]).reshape(-1, 2)
    names = [Head(int(heads["layer"][layer]), int(heads["head"][head])).label for layer, head in chosen]
    labels.label_points(axes, places, names, np.column_stack([x[known], y[known]]))
