"""Previous-token and induction heads on repeated tokens: their scores, and whether they are repaired (5.3.1)."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn import wording
from selfrepair_nn.analysis import HALF_WIDTH, KINDS, SHARE, by_kind, induction_by_head
from selfrepair_nn.blocks import counted_tokens
from selfrepair_nn.components import Head
from selfrepair_nn.confidence import RATE
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import plane, style, suiting
from selfrepair_nn.quantities import TOKEN

LABELS = 6
LOOKS = dict(
    zip(KINDS, ((style.COLOURS[1], "D", 34), (style.COLOURS[0], "s", 30), ("#8A8A8A", "o", 12)), strict=True)
)
READING = (
    "Scores: mean attention on the repeated half to the token before and to what followed the same token in the first.",
    "Right: means over these tokens. Dashed: y = \N{MINUS SIGN}x, no repair; shaded: self-repaired "
    "on average, as these means were measured. Thin bars: 95% intervals.",
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
    figure = style.new_figure(9.6, 1.1 + 3.7 * len(found))
    style.space(figure, w_pad=0.12, h_pad=0.08)
    panels = figure.subplots(len(found), 2, squeeze=False)
    for row, (name, heads) in zip(panels, found.items(), strict=True):
        _draw_scores(row[0], heads)
        _draw_plane(row[1], heads, share)
        row[0].set_title("scores" if len(found) == 1 else name)
        row[1].set_title("repaired?")
    style.heading(figure, found)
    reading = [line.format(rate=RATE) for line in READING]
    style.caption(figure, found, [*style.captions(found, False, "self_repair"), *reading])
    style.lay_out(figure)
    for row, heads in zip(panels, found.values(), strict=True):
        _name(row[0], heads, heads.previous_token, heads.induction)
        _name(row[1], heads, heads.direct_effect, heads.logit_change)
    return figure


def _draw_scores(axes: Axes, heads: xr.Dataset) -> None:
    _scatter(axes, heads, ("previous_token", "induction"))
    limit = {"color": style.MUTED, "linestyle": ":", "linewidth": 1, "zorder": 1}
    axes.axhline(heads.attrs["least"], **limit)
    axes.axvline(heads.attrs["least"], **limit)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set_box_aspect(1)
    axes.set_xlabel("previous-token score")
    axes.set_ylabel("induction score")


def _draw_plane(axes: Axes, heads: xr.Dataset, share: float) -> None:
    known = (heads.tokens > 0).values
    plane.limits(axes, heads.direct_effect.values[known], heads.logit_change.values[known])
    plane.wedge(axes)
    kinds = by_kind(heads, share)
    legends = {kind: _legend(kinds.sel(kind=kind)) for kind in KINDS}
    _scatter(axes, heads, ("direct_effect", "logit_change"), legends)
    axes.set_xlabel("direct effect (logits)")
    axes.set_ylabel("logit change when ablated (logits)")
    shown = axes.get_legend_handles_labels()
    axes.legend(
        *(each[::-1] for each in shown),
        loc="upper left",
        bbox_to_anchor=(1.02, 1),
        borderaxespad=0,
        labelspacing=1,
        title="heads",
    )


def _legend(kind: xr.Dataset) -> str:
    name, count = str(kind.kind.values), int(kind.heads)
    if not count:
        return f"{name}: none"
    shown = {"removed": "removed", "logit_change": "logit change", "self_repair": "self-repair"}
    lines = [f"{name}: {count}"]
    for variable, what in shown.items():
        value, width = float(kind[variable]), float(kind[variable + HALF_WIDTH])
        lines.append(f"{what} {wording.number(value)} {wording.reach(width)}")
    tested = int(kind.tested)
    few = f"too few {kind.attrs['clustered_by']}s for an interval"
    lines.append(f"repaired: {round(float(kind.repaired) * tested)} of {tested}" if tested else few)
    return "\n".join(line.replace(" -", " \N{MINUS SIGN}") for line in lines)


def _scatter(axes: Axes, heads: xr.Dataset, names: tuple[str, str], legends: dict | None = None) -> None:
    x, y = (heads[name] for name in names)
    known = (heads.tokens > 0).values
    widths = (heads[name + HALF_WIDTH].values[known] for name in names)
    style.crosses(axes, x.values[known], y.values[known], *widths)
    for kind in reversed(KINDS):
        chosen = ((heads.kind == kind) & (heads.tokens > 0)).values
        colour, marker, size = LOOKS[kind]
        look = {
            "color": colour,
            "marker": marker,
            "s": size,
            "edgecolor": "white",
            "linewidth": 0.4,
            "zorder": 3,
        }
        axes.scatter(x.values[chosen], y.values[chosen], label=(legends or {}).get(kind, kind), **look)


def _name(axes: Axes, heads: xr.Dataset, x: xr.DataArray, y: xr.DataArray) -> None:
    """Name the heads of either kind that lie farthest out."""
    known = (heads.tokens > 0).values
    layer, head = np.nonzero(known)
    places = np.column_stack([x.values[known], y.values[known]])
    kinds = heads.kind.values[known]
    far = [i for i in np.argsort(-np.hypot(*places.T), kind="stable") if kinds[i] != KINDS[-1]][:LABELS]
    labels = [Head(int(heads["layer"][layer[i]]), int(heads["head"][head[i]])).label for i in far]
    style.label_points(axes, places[far], labels, np.concatenate([places, plane.on_lines(axes)]))
