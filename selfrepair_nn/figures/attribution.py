"""Attribution patching of every head beside the exact effect of its ablation, and the heads that it misses, split."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn import wording
from selfrepair_nn.analysis import HALF_WIDTH
from selfrepair_nn.errors import UsageError
from selfrepair_nn.figures import style
from selfrepair_nn.patching import false_negatives

COUNT = 10
SPLIT = {
    "own": ("its own write", "#999999"),
    "from_heads": ("other heads", style.COLOURS[0]),
    "from_mlps": ("MLPs", style.COLOURS[2]),
    "from_mixers": ("mixers", style.COLOURS[4]),
    "from_post_norms": ("norms behind attention", style.COLOURS[3]),
    "from_components": ("other components", style.COLOURS[5]),
    "from_norm": ("final norm", style.COLOURS[1]),
}
READING = (
    "Left: mean over counted tokens for each head, coloured by layer, with 95% intervals; dashed: both alike. Ringed: "
    "heads of which something is surely removed, and the attributed change is surely below {small:g} of that.",
    "Right: of these the {count} from which most is removed: what the exact change is made of, and the two totals.",
)


@style.settings()
def draw(found: xr.Dataset) -> Figure:
    """Draw what `attribution` gives. Raises UsageError if it is something else, or holds no head."""
    if "attributed_change" not in found:
        raise UsageError("this figure is of attribution patching: give what sr.attribution(store) gives")
    if not found.attributed_change.notnull().any():
        raise UsageError(f"{wording.title(found)!r} has nothing done yet: there is nothing to draw")
    figure = style.new_figure(11.5, 4.9)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_heads(figure, left, found)
    _draw_split(right, false_negatives(found).isel(rank=slice(COUNT)))
    style.heading(figure, {"": found})
    intervals = f"{style.capital(wording.intervals(found, 'attributed_change'))}."
    lines = [line.format(small=found.attrs["small"], count=COUNT) for line in READING]
    style.caption(figure, {"": found}, [intervals, *lines])
    return figure


def _draw_heads(figure: Figure, axes: Axes, found: xr.Dataset) -> None:
    exact, attributed = found.logit_change.values, found.attributed_change.values
    known = np.isfinite(exact)
    widths = (found[name + HALF_WIDTH].values[known] for name in ("logit_change", "attributed_change"))
    style.crosses(axes, exact[known], attributed[known], *widths)
    layers = np.broadcast_to(found["layer"].values[:, None], exact.shape)
    dots = axes.scatter(exact[known], attributed[known], c=layers[known], cmap=style.LAYERS, s=16, zorder=3)
    missed = found.false_negative.values
    axes.scatter(exact[missed], attributed[missed], s=60, facecolor="none", edgecolor=style.LOUD, zorder=4)
    axes.axline((0, 0), slope=1, color="black", linestyle="--", linewidth=1)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_xlabel("exact logit change, mean (logits)")
    axes.set_ylabel("attributed logit change, mean (logits)")
    ranks = f"{found.attrs['rank_correlation']:.2f}".replace("-", "\N{MINUS SIGN}")
    axes.set_title(f"{int(known.sum())} heads, rank correlation {ranks}")
    figure.colorbar(dots, ax=axes, label="layer")


def _draw_split(axes: Axes, missed: xr.Dataset) -> None:
    count = missed.sizes["rank"]
    axes.set_title(f"{count} heads that attribution misses" if count else "no head is missed")
    if not count:
        axes.set_axis_off()
        return
    places = np.arange(count)
    parts = {"own": -missed.removed.values}
    parts |= {name: missed[name].values for name in SPLIT if name in missed}
    above, below = np.zeros(count), np.zeros(count)
    for name, values in parts.items():
        label, colour = SPLIT[name]
        axes.bar(places, values, 0.6, np.where(values > 0, above, below), color=colour, alpha=0.8, label=label)
        above, below = above + np.maximum(values, 0), below + np.minimum(values, 0)
    for shift, name, look in ((-0.1, "logit_change", ("k", "o")), (0.1, "attributed_change", (style.LOUD, "D"))):
        label = "exact, in all" if name == "logit_change" else "attributed"
        width = style.bars(missed[name + HALF_WIDTH].values)
        marks = {"color": look[0], "marker": look[1], "markersize": 4, "linestyle": "none", "capsize": 2}
        axes.errorbar(places + shift, missed[name].values, width, label=label, **marks)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(places, wording.labels(missed), rotation=45, ha="right")
    axes.set_ylabel("change of the target's logit, mean (logits)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
