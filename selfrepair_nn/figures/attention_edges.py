"""Attention's own repair: what a live softmax gives back of what the edges carried that are cut."""

from collections.abc import Iterator, Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HALF_WIDTH, HEADS, SHARE, SOFTMAXES, among, edges_by_head
from selfrepair_nn.components import Head
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import style, suiting

COUNT, REACH = 8, 0.6
"""Heads that are shown one by one; and how far the interval of a share may reach to be drawn."""
SHOWN = {
    "top_carried": "carried by the edges",
    "top_redistributed": "given back by the live softmax, in the head",
    "top_logit_redistributed": "given back by it, in the logit",
    "top_self_repair": "repaired by the rest of the model, softmax frozen",
}
READING = (
    "Cut are the edges from each token {edges}. Carried: DE \N{MINUS SIGN} DE' with the softmax frozen. Given back: "
    "what is otherwise where it is live, in the head's own direct effect and in the logit.",
    "Left: heads whose edges surely carry something, and whose share is known to \N{PLUS-MINUS SIGN}{reach:.0%} "
    "({shown} of {heads}); blue: of mean attention of at least {least:g} (dashed), which attend to few tokens. "
    "Bars: 95% intervals.",
    "Right: those of them with most of it.",
)
EDGES = {"most": "to the {} most attended", "back": "to the one {} back", "keys": "to token {}"}
NEED = Need(
    "edges that are cut, the softmax frozen and live, as in `attention_edges`",
    lambda ds: "given_back" in ds or (suiting.along(ds, "softmax", *SOFTMAXES) and "edge_attention" in ds),
)


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw two panels for each store: the share given back by mean attention, and the concentrated heads one by one.

    `datasets` is a store or a result of `edges_by_head`, a sequence of them, or a mapping from title to them. Raises
    UsageError as that does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, edges_by_head)
    figure = style.new_figure(9.6, 0.9 + 4.1 * len(found))
    grid = figure.subplots(len(found), 2, squeeze=False, gridspec_kw={"width_ratios": [1, 1.15]})
    for (plane, single), (name, heads) in zip(grid, found.items(), strict=True):
        _draw_shares(plane, heads)
        _draw_heads(single, heads)
        plane.set_title(_told(heads) if len(found) == 1 else f"{name}\n{_told(heads)}", fontsize=9)
        single.set_title("heads that attend to few tokens", fontsize=9)
    models = " and ".join(dict.fromkeys(str(heads.attrs["model"]) for heads in found.values()))
    style.heading(figure, found, f"{models}, attention edges cut: means on {among(share, *found.values())}")
    style.caption(figure, found, [*style.captions(found, of="top_carried"), *_readings(found)])
    return figure


def _readings(found: Mapping[str, xr.Dataset]) -> Iterator[str]:
    """What is said of all stores once, and under its name what is said of each otherwise."""
    for lines in zip(*map(_reading, found.values()), strict=True):
        alike = len({*lines}) == 1
        yield from lines[:1] if alike else map("{}: {}".format, found, lines)


def _reading(heads: xr.Dataset) -> list[str]:
    words = str(heads.attrs["ablation"]).partition(",")[0].split("_")[2:]
    edges = EDGES[words[0]].format(" and ".join(words[1:])) if words and words[0] in EDGES else "that were named"
    told = {"edges": edges, "reach": REACH, "shown": int(_known(heads).sum()), "least": heads.attrs["least"]}
    return [line.format(heads=int((heads.tokens > 0).sum()), **told) for line in READING]


def _known(heads: xr.Dataset) -> np.ndarray:
    """Heads whose edges surely carry something, and whose share given back is known well enough: [layer, head]."""
    surely = heads.top_carried > heads[f"top_carried{HALF_WIDTH}"]
    return (surely & (heads[f"top_given_back{HALF_WIDTH}"] <= REACH)).values


def _told(heads: xr.Dataset) -> str:
    """What is given back of all that the concentrated heads' edges carry."""
    count = int(heads.concentrated.sum())
    if not count:
        return f"no head pays {heads.attrs['least']:g} along these edges"
    told = style.shown_share(heads, "concentrated_top_given_back")
    return f"{count} heads that attend to few tokens:\n{told} is given back"


def _draw_shares(axes: Axes, heads: xr.Dataset) -> None:
    known, few = _known(heads), heads.concentrated.values
    for chosen, colour in ((known & ~few, style.MUTED), (known & few, style.colour(0))):
        values, widths = (heads[f"top_given_back{each}"].values[chosen] for each in ("", HALF_WIDTH))
        look = {"fmt": "o", "markersize": 4.5, "elinewidth": 0.8, "color": colour, "alpha": 0.8}
        across = style.bars(heads[f"edge_attention{HALF_WIDTH}"].values[chosen])
        axes.errorbar(heads.edge_attention.values[chosen], values, style.bars(widths), across, **look)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(heads.attrs["least"], color="black", linewidth=0.9, dashes=(5, 3))
    axes.yaxis.set_major_formatter(style.as_percent)
    axes.set_xlim(left=0)
    axes.set_xlabel("mean attention paid along the edges")
    axes.set_ylabel("share of the carried effect that is given back")


def _draw_heads(axes: Axes, heads: xr.Dataset) -> None:
    """The concentrated heads whose edges carry most, or of all heads these where none is."""
    flat = heads.stack(site=HEADS)
    among_them = flat.concentrated.values if flat.concentrated.any() else flat.tokens.values > 0
    order = np.argsort(np.where(among_them, -flat.top_carried.values, np.inf), kind="stable")
    few = flat.isel(site=order[: min(COUNT, int(among_them.sum()))])
    for index, (name, label) in enumerate(SHOWN.items()):
        places = np.arange(few.sizes["site"]) + 0.16 * (index - (len(SHOWN) - 1) / 2)
        colour = style.MUTED if not index else style.colour(index - 1)
        look = {"fmt": style.marker(index), "markersize": 5, "elinewidth": 1, "color": colour, "label": label}
        axes.errorbar(places, few[name].values, style.bars(few[f"{name}{HALF_WIDTH}"].values), **look)
    axes.axhline(0, color="black", linewidth=0.8)
    labels = [Head(int(layer), int(head)).label for layer, head in few["site"].values]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel("logits")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.34 * (high - low))
    axes.legend(loc="upper left", fontsize=7.5)
