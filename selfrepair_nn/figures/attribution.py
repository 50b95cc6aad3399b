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
    "own": ("its own write", "#999999", "s"),
    "from_heads": ("other heads", style.COLOURS[0], "o"),
    "from_mlps": ("MLPs", style.COLOURS[2], "^"),
    "from_mixers": ("mixers", style.COLOURS[4], "v"),
    "from_post_norms": ("norms behind attention", style.COLOURS[3], "P"),
    "from_components": ("other components", style.COLOURS[5], "X"),
    "from_norm": ("final norm", style.COLOURS[1], "d"),
}
TOTALS = {"logit_change": ("exact, in all", "black", "o"), "attributed_change": ("attributed", style.LOUD, "D")}
ROOM = 0.8
"""What part of a head's row its marks take."""
READING = (
    "Left: mean over counted tokens for each head, coloured by layer, with 95% intervals; dashed: both alike. Ringed: "
    "heads of which something is surely removed, and the attributed change is surely below {small:g} of that.",
    "Right: of these the {count} from which most is removed: what the exact change is made of, and the two totals. "
    "Bars: 95% intervals.",
)


@style.settings()
def draw(found: xr.Dataset) -> Figure:
    """Draw what `attribution` gives. Raises UsageError if it is something else, or holds no head."""
    if "attributed_change" not in found:
        raise UsageError("this figure is of attribution patching: give what sr.attribution(store) gives")
    if not found.attributed_change.notnull().any():
        raise UsageError(f"{wording.title(found)!r} has nothing done yet: there is nothing to draw")
    missed = false_negatives(found).isel(rank=slice(COUNT))
    figure = style.new_figure(11.5, max(4.9, 1.4 + 0.55 * missed.sizes["rank"]))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_heads(figure, left, found)
    _draw_split(right, missed)
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
    ranks, width = (found.attrs[f"rank_correlation{end}"] for end in ("", HALF_WIDTH))
    told = f"{ranks:.2f}".replace("-", "\N{MINUS SIGN}") + (f" ± {width:.2f}" if np.isfinite(width) else "")
    axes.set_title(f"{int(known.sum())} heads, rank correlation {told}")
    figure.colorbar(dots, ax=axes, label="layer")


def _draw_split(axes: Axes, missed: xr.Dataset) -> None:
    count = missed.sizes["rank"]
    axes.set_title(f"{count} heads that attribution misses" if count else "no head is missed")
    if not count:
        axes.set_axis_off()
        return
    missed = missed.assign(own=-missed.removed, own_half_width=missed.removed_half_width)
    shown = {name: look for name, look in (SPLIT | TOTALS).items() if name in missed}
    for index, (name, (label, colour, marker)) in enumerate(shown.items()):
        places = np.arange(count) + ROOM * ((index + 0.5) / len(shown) - 0.5)
        look = {"fmt": marker, "color": colour, "markersize": 3.5, "elinewidth": 1, "label": label}
        axes.errorbar(missed[name].values, places, xerr=style.bars(missed[name + HALF_WIDTH].values), **look)
    axes.axvline(0, color="black", linewidth=0.8)
    for edge in np.arange(count - 1) + 0.5:
        axes.axhline(edge, color="#D8D8D8", linewidth=0.6)
    axes.set_yticks(range(count), wording.labels(missed))
    axes.set_ylim(count - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("change of the target's logit, mean (logits)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
