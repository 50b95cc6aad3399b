"""Heads ablated by another text, and by one with a token exchanged: what is removed, and what comes back."""

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from selfrepair_nn.analysis import SHARE, contrast_by_head, percent
from selfrepair_nn.components import Head
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import labels, plane, style, suiting
from selfrepair_nn.wording import intervals, reach, task

LABELS = 6
NAMES = {"resample": "another text", "counterfactual": "the edited text"}
READING = (
    "Dots: attention heads. Left: means over tokens. Dashed: y = \N{MINUS SIGN}x, all that is removed is lost; "
    "shaded: a part comes back; beyond the dashed line more is lost.",
    "Right: the share of what is removed that comes back, by least squares over tokens. Dashed: alike under both. Thin "
    "bars: 95% intervals.",
)

NEED = Need(
    "resample beside counterfactual ablation, as in `contrastive`",
    lambda ds: (
        suiting.along(ds, "ablation", "resample", "counterfactual")
        and {"counterfactual", "counted"} <= {*ds.variables}
    ),
)


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a row for each store: both ablations in the plane, and the repaired share under one against the other.

    `datasets` is a store of the contrastive recipe, a sequence of them, or a mapping from title to them. The tokens
    that count are those from a prompt's first edit on: there is no top share. Raises UsageError as `contrast_by_head`
    does.
    """
    stores = style.named(datasets)
    found = {name: contrast_by_head(ds) for name, ds in stores.items()}
    figure = style.new_figure(13.2, 1.0 + 4.2 * len(found))
    style.space(figure, w_pad=0.1)
    panels = figure.subplots(len(found), 3, squeeze=False)
    for row, (name, heads) in zip(panels, found.items(), strict=True):
        for axes, ablation in zip(row, NAMES, strict=False):
            _draw_plane(axes, heads.sel(ablation=ablation))
            axes.set_title(f"ablated by {NAMES[ablation]}")
        _draw_shares(row[2], heads)
        row[2].set_title("repaired share" if len(found) == 1 else f"repaired share, {name}")
        shown = ScalarMappable(_norm(heads), colormaps[style.LAYERS])
        bar = figure.colorbar(
            shown, ax=row, label="layer", pad=0.01, aspect=30, ticks=MaxNLocator(integer=True)
        )
        bar.outline.set_visible(False)
    style.heading(figure, {name: heads.assign_attrs(ablation="contrastive") for name, heads in found.items()})
    facts = [style.capital(f"{line}.") for heads in found.values() for line in (_facts(heads)[:-1], *task(heads))]
    style.caption(figure, found, [*facts, f"{style.capital(_known(found))}.", *READING])
    style.lay_out(figure)
    for row, heads in zip(panels, found.values(), strict=True):
        for axes, ablation in zip(row, NAMES, strict=False):
            one = heads.sel(ablation=ablation)
            _name(axes, heads, one.removed, one.logit_change, np.hypot(one.removed, one.logit_change))
    return figure


def _draw_plane(axes: Axes, heads: xr.Dataset) -> None:
    known = (heads.tokens > 0).values
    x, y = heads.removed.values[known], heads.logit_change.values[known]
    plane.limits(axes, x, y)
    plane.wedge(axes)
    widths = (heads[name].values[known] for name in ("removed_half_width", "logit_change_half_width"))
    style.crosses(axes, x, y, *widths)
    _scatter(axes, heads, x, y)
    axes.set_xlabel("direct effect removed (logits)")
    axes.set_ylabel("logit change (logits)")


def _draw_shares(axes: Axes, heads: xr.Dataset) -> None:
    known = (heads.tokens > 0).values
    x, y = (heads.repaired.sel(ablation=ablation).values[known] for ablation in NAMES)
    low, high = min(np.nanmin([x, y]), 0) - 0.05, max(np.nanmax([x, y]), 0) + 0.05
    axes.plot((low, high), (low, high), "k--", dashes=(5, 3), linewidth=1.1, zorder=2)
    for line in (axes.axhline, axes.axvline):
        line(0, color="black", linewidth=0.7, zorder=1.5)
    style.crosses(axes, x, y, *(heads.repaired_half_width.sel(ablation=each).values[known] for each in NAMES))
    _scatter(axes, heads, x, y)
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.set_box_aspect(1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(style.as_percent))
    axes.set_xlabel(f"by {NAMES['resample']}")
    axes.set_ylabel(f"by {NAMES['counterfactual']}")


def _scatter(axes: Axes, heads: xr.Dataset, x: np.ndarray, y: np.ndarray) -> None:
    layer = np.broadcast_to(heads["layer"].values[:, None], heads.tokens.shape)[(heads.tokens > 0).values]
    look = {"cmap": style.LAYERS, "norm": _norm(heads), "s": 26, "edgecolor": "white", "linewidth": 0.4}
    axes.scatter(x, y, c=layer, zorder=3, **look)


def _norm(heads: xr.Dataset) -> Normalize:
    return Normalize(0, max(heads.attrs.get("n_layers", 0) - 1, int(heads["layer"].max()), 1))


def _facts(heads: xr.Dataset) -> str:
    number, tokens = int((heads.tokens > 0).sum()), int(heads.tokens.max())
    sizes = [f"{_size(heads.sel(ablation=a))} by {name}" for a, name in NAMES.items()]
    return (
        f"{number} heads, {tokens:,} tokens each: those from a prompt's first edit on, "
        f"{percent(heads.attrs['edited_share'])} of all; {heads.attrs.get('target')} target. "
        f"Removed, root mean square over tokens, mean over heads: {' and '.join(sizes)} (logits)."
    )


def _size(one: xr.Dataset) -> str:
    width = reach(float(one.overall_size_half_width)).replace("±", " ± ")
    return f"{float(one.overall_size):.3f}{width}"


def _known(found: dict[str, xr.Dataset]) -> str:
    """What the intervals are; of several stores, said once where it is the same."""
    return "; ".join(dict.fromkeys(intervals(heads, "logit_change") for heads in found.values()))


def _name(axes: Axes, heads: xr.Dataset, x: xr.DataArray, y: xr.DataArray, size: xr.DataArray) -> None:
    """Name the heads of largest effect."""
    known = (heads.tokens > 0).values
    layer, head = np.nonzero(known)
    places = np.column_stack([x.values[known], y.values[known]])
    order = np.argsort(-size.values[known], kind="stable")[:LABELS]
    names = [Head(int(heads["layer"][layer[i]]), int(heads["head"][head[i]])).label for i in order]
    labels.label_points(axes, places[order], names, np.concatenate([places, plane.on_lines(axes)]))
