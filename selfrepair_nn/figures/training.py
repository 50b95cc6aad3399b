"""Self-repair along training, revision by revision: what ablations remove, what makes up for it, in how many heads."""

import re

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, among, by_case, by_head, by_variant
from selfrepair_nn.confidence import RATE
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import style, suiting

AXIS = "revision"
LINES = {
    "top_removed": "removed",
    "top_self_repair": "self-repair",
    "top_from_norm": "of it the norm",
    "top_from_mlps": "MLPs",
    "top_from_heads": "heads",
    "top_from_components": "other components",
}
READING = (
    "Left: means over heads, with their 95% intervals: what the ablation removes of the direct effect, and what makes "
    "up for it. Each revision is a model of its own: its top tokens are its own, and so is its noise floor.",
    "Right: heads that are repaired, or broken, at a false discovery rate of {rate:.0%} within each revision, of those "
    "that have an interval. These are counts of verdicts, which have none.",
)
NEED = Need(
    "several revisions of a model (--revisions)", lambda ds: suiting.axis(ds) == AXIS and AXIS in ds.coords
)


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw two panels for each store of revisions, along the training step where their names tell it.

    `datasets` is such a store, a sequence of them, or a mapping from title to them. Raises UsageError as `by_variant`
    does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, _summary)
    figure = style.new_figure(10, 0.9 + 3.7 * len(found))
    looks = {"squeeze": False, "gridspec_kw": {"width_ratios": [3, 2]}}
    for row, (name, heads) in zip(figure.subplots(len(found), 2, **looks), found.items(), strict=True):
        at, numbered = steps(heads)
        _draw_means(row[0], heads, at)
        _draw_counts(row[1], heads, at)
        row[0].set_ylabel(f"mean on {among(share, *found.values())} (logits)")
        row[1].set_ylabel("cases" if "case" in heads.dims else "heads")
        for axes in row:
            _name_axis(axes, heads, at, numbered)
        row[0].set_title("" if len(found) == 1 else style.wrapped(name))
    style.heading(figure, found)
    style.caption(figure, found, [*style.captions(found), *(line.format(rate=RATE) for line in READING)])
    return figure


def _summary(ds: xr.Dataset, share: float) -> xr.Dataset:
    return by_variant(ds, share, by_case if "case" in ds.dims else by_head)


def steps(heads: xr.Dataset) -> tuple[np.ndarray, bool]:
    """Where each revision stands: at its training step if every name ends in one, and they rise; else in order."""
    ends = [re.search(r"(\d+)$", str(label)) for label in heads[AXIS].values]
    numbers = np.array([int(end[1]) if end else -1 for end in ends], float)
    numbered = bool((numbers >= 0).all() and (np.diff(numbers) > 0).all() and numbers.size > 1)
    return (numbers, True) if numbered else (np.arange(len(ends), dtype=float), False)


def _sites(heads: xr.Dataset) -> tuple[str, ...]:
    return ("case",) if "case" in heads.dims else ("layer", "head")


def _draw_means(axes: Axes, heads: xr.Dataset, at: np.ndarray) -> None:
    for index, (name, label) in enumerate((n, label) for n, label in LINES.items() if n in heads):
        mean = heads[name].where(heads.tokens > 0).mean(_sites(heads)).values
        colour = style.MUTED if name == "top_removed" else style.colour(index - 1)
        look = {"color": colour, "marker": style.marker(index), "markersize": 4}
        style.line(axes, at, mean, heads[f"overall_{name}{HALF_WIDTH}"].values, label=label, **look)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(loc="upper left", ncols=2)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.28 * (high - low))


def _draw_counts(axes: Axes, heads: xr.Dataset, at: np.ndarray) -> None:
    tested = heads.top_p_value.notnull().sum(_sites(heads)).values
    axes.plot(at, tested, color=style.MUTED, linestyle=":", label="with an interval")
    for index, name in enumerate(("repaired", "broken")):
        counts = heads[f"top_{name}"].sum(_sites(heads)).values
        axes.plot(at, counts, color=style.colour(index), marker=style.marker(index), markersize=4, label=name)
    axes.set_ylim(0, max(1, tested.max()) * 1.3)
    axes.legend(loc="upper left", ncols=2)


def _name_axis(axes: Axes, heads: xr.Dataset, at: np.ndarray, numbered: bool) -> None:
    axes.set_xlabel("training step" if numbered else "revision")
    if not numbered:
        axes.set_xticks(at, [str(label) for label in heads[AXIS].values], rotation=30, ha="right")
        return
    if at[-1] > 20 * max(at[1] - at[0], 1):
        axes.set_xscale("symlog", linthresh=max(at[1], 1), linscale=0.4)
        axes.set_xlim(at[0] - max(at[1], 1) / 4, at[-1] * 1.25)
    axes.set_xticks(at, [f"{step:.0f}" for step in at], fontsize=8)
    axes.minorticks_off()
