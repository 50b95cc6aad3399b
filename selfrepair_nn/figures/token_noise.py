"""Direct effect against logit change on single tokens, for the strongest late heads (the paper's Figure 3)."""

from collections.abc import Iterable

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from selfrepair_nn import wording
from selfrepair_nn.analysis import HALF_WIDTH, SHARE, among, token_noise
from selfrepair_nn.choosing import against_of, tail_of
from selfrepair_nn.components import Head
from selfrepair_nn.drawing import figure
from selfrepair_nn.figures import plane, style, suiting

CELLS = 80
WIDE, LINE = 68, 10  # characters over a panel, and points of a line of them
MANY, PIXELS = 50_000, 700  # tokens of a panel that are all drawn, and pixels of its sides
READING = (
    "Dots: tokens; the brighter, the denser they lie. {marked}: the head's {top}. "
    "Dashed: y = \N{MINUS SIGN}x, no repair.",
    "Under: repaired in part, between the dashed line and the x-axis. Over: beyond the x-axis. "
    "Broken: beyond the dashed line, more is lost than {what}.",
)
MARKED = {"removed": "Ringed", "direct-effect": "Beyond the dotted line"}
WHAT = {"removed": "was removed", "direct-effect": "the head wrote"}
IN_NATS = "Own effect: what the head's own write alone takes, the norm frozen. Top: by direct effect on the logit."
RINGS = {"marker": "o", "markersize": 3, "markerfacecolor": "none", "markeredgewidth": 0.35, "linestyle": "none"}
RINGS |= {"color": style.COLOURS[1], "alpha": 0.8, "rasterized": True, "zorder": 1.2}


@figure(*suiting.ON_EVERY_TOKEN, name=__name__, about=__doc__, every_token=True, nats=True)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for each head that `token_noise` chooses; several stores have a row each.

    The axis is what the ablation removed, or the direct effect, as `plot` was asked; the direct effect where nothing
    takes the head's place.

    `datasets` is a store, a sequence of them, or a mapping from title to them. Raises UsageError as `token_noise`
    does, and if there is nothing to draw.
    """
    found = style.summaries(
        datasets, share, lambda ds, share: token_noise(ds, share, against=against_of(ds))
    )
    most, alone = max(tokens.sizes["rank"] for tokens in found.values()), len(found) == 1
    columns = min(most, 2 if alone else 4)
    rows = -(-most // columns) * len(found)
    figure = style.new_figure(0.4 + 4.4 * columns, 1.2 + 4.3 * rows)
    style.space(figure, h_pad=0.12)
    panels = figure.subplots(rows, columns, squeeze=False).reshape(len(found), -1)
    for row, (name, tokens) in zip(panels, found.items(), strict=True):
        for rank, axes in enumerate(row):
            if rank < tokens.sizes["rank"]:
                _draw_head(axes, tokens.isel(rank=rank), share, "" if alone else f"{name}, ")
            else:
                axes.remove()
    style.heading(figure, found)
    kinds = dict.fromkeys(tokens.attrs["against"] for tokens in found.values())
    facts = {"marked": " or ".join(MARKED[kind] for kind in kinds), "what": " or ".join(WHAT[kind] for kind in kinds)}
    reading = [line.format(top=among(share, *found.values()), **facts) for line in READING]
    reading += [IN_NATS] if style.unit_of(found) == "nats" else []
    if any(tokens.direct_effect[0].size > MANY for tokens in found.values() if tokens.sizes["rank"]):
        reading.append("Of tokens that lie on one spot, one is drawn.")
    style.caption(figure, found, [*style.captions(found, of="under"), *reading])
    return figure


def _draw_head(axes: Axes, tokens: xr.Dataset, share: float, prefix: str) -> None:
    known, against = ~np.isnan(tokens.direct_effect.values), tokens.attrs["against"]
    x, y, top = (tokens[n].values[known] for n in (plane.VARIABLES[against], "logit_change", "top"))
    plane.limits(axes, x, y)
    plane.wedge(axes)
    if against == "removed":
        axes.plot(x[top], y[top], **RINGS)
    elif wording.unit(tokens) == "logits":
        for end in _ends(x[top], tail_of(tokens)):
            axes.axvline(end, color=style.MUTED, linestyle=":", linewidth=1, zorder=2)
    density = _density(axes, x, y)
    order = np.argsort(density, kind="stable")
    order = order[_seen(axes, x[order], y[order])]
    look = {"cmap": style.LAYERS, "norm": LogNorm(1, max(density.max(), 2)), "s": 5, "linewidth": 0}
    axes.scatter(x[order], y[order], c=density[order], rasterized=True, zorder=1, **look)
    unit = wording.unit(tokens)
    axes.set_xlabel(f"{plane.named(tokens)} ({unit})")
    axes.set_ylabel(f"{wording.change(tokens)} when ablated ({unit})")
    said = [_said(tokens, "", f"all {int(tokens.tokens):,} tokens")]
    said.append(_said(tokens, "top_", among(share, tokens).removesuffix(" of tokens")))
    said = [part for line in said for part in _fitting(line)]
    label = Head(int(tokens["layer"]), int(tokens["head"])).label
    axes.set_title(prefix + label, pad=27 + LINE * (len(said) - 2))
    place = {"transform": axes.transAxes, "va": "bottom", "fontsize": 7.5, "color": style.MUTED}
    axes.text(0, 1.02, "\n".join(said), linespacing=1.3, **place)


def _ends(effects: np.ndarray, tail: str) -> list[float]:
    """Where the share of tokens begins, of the direct effects in it."""
    ends = {"top": effects, "bottom": -effects, "absolute": abs(effects)}[tail].min()
    return {"top": [ends], "bottom": [-ends], "absolute": [-ends, ends]}[tail]


def _seen(axes: Axes, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which tokens are drawn, in order: all, or where they are very many the last on each spot of a pixel's size."""
    if x.size <= MANY:
        return np.arange(x.size)
    spots = [np.floor(PIXELS * (v - low) / (high - low)) for v, (low, high) in _limits(axes, x, y)]
    _, last = np.unique((spots[0] * PIXELS + spots[1])[::-1], return_index=True)
    return np.sort(x.size - 1 - last)


def _limits(axes: Axes, x: np.ndarray, y: np.ndarray) -> Iterable[tuple[np.ndarray, tuple[float, float]]]:
    return zip((x, y), (axes.get_xlim(), axes.get_ylim()), strict=True)


def _density(axes: Axes, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How many tokens share each token's cell of the panel."""
    edges = [np.linspace(*limits, CELLS + 1) for limits in (axes.get_xlim(), axes.get_ylim())]
    counts, *_ = np.histogram2d(x, y, edges)
    cells = (np.digitize(v, e[1:-1]) for v, e in zip((x, y), edges, strict=True))
    return counts[tuple(cells)]


def _fitting(line: str) -> list[str]:
    """A line over a panel, or two where it is too long."""
    return line.replace("; ", ";\n", 1).split("\n") if len(line) > WIDE else [line]


def _said(tokens: xr.Dataset, prefix: str, which: str) -> str:
    value, width = (float(tokens[f"{prefix}correlation{end}"]) for end in ("", HALF_WIDTH))
    known = f"{value:.2f}" if np.isfinite(value) else "undefined"
    correlation = (known + (f" ± {width:.2f}" if np.isfinite(width) else "")).replace("-", "\N{MINUS SIGN}")
    fates = ", ".join(
        f"{name} {style.shown_share(tokens, prefix + name)}" for name in ("broken", "under", "over")
    )
    return f"{which}: correlation {correlation}; {fates}"
