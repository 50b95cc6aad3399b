"""Blocks of layers side by side and in other orders: how much of what they do is kept."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn import wording
from selfrepair_nn.analysis import HALF_WIDTH, SHARE, composition, throughout
from selfrepair_nn.case_sites import sites_of
from selfrepair_nn.components import Layers, Parallel
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import depth, style, suiting

PANELS = {
    "logit_kept": ("share of the block's effect on the logit that is kept", 1.0),
    "stream_distance": ("distance of the stream, in lengths of what the block writes", 0.0),
}
READING = (
    "Left: 1 less the ratio of the logit's mean change to that of the block deleted: 1 all is kept, 0 as "
    "if it were gone; "
    "left out where what deleting it changes may be 0.",
    "Right: how far the stream behind the block lies from the clean one: 1 as far as deleted. Means over {tokens}. "
    "Bars: 95% intervals. A point stands at the block's first layer.",
)


def _blocks(ds: xr.Dataset) -> bool:
    sites = [case[0] for case in sites_of(ds) if len(case) == 1]
    deleted = {(site.layer, site.stop) for site in sites if isinstance(site, Layers)}
    side = {(site.layer, site.stop) for site in sites if isinstance(site, Parallel)}
    return suiting.axis(ds) is None and "stream_distance" in ds and bool(deleted & side)


NEED = Need(
    "blocks of layers deleted and side by side, and the stream's distance, as in `layer_order`", _blocks
)


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw two panels for each store, by the block's first layer; the share of tokens does not matter.

    `datasets` is a store of the layer_order recipe, a sequence of them, or a mapping from title to them. Raises
    UsageError as `composition` does.
    """
    found = {name: composition(ds) for name, ds in style.named(datasets).items()}
    figure = style.new_figure(9.6, 1 + 3.8 * len(found))
    for row, (name, cases) in zip(figure.subplots(len(found), 2, squeeze=False), found.items(), strict=True):
        for axes, (what, (label, same)) in zip(row, PANELS.items(), strict=True):
            _draw(axes, cases, what, same)
            axes.set_ylabel("\n".join(label.split(" that ") if what == "logit_kept" else label.split(", ")))
        row[0].set_title("" if len(found) == 1 else name)
        row[0].legend(loc="lower right")
    style.heading(figure, found, f"{', '.join(found)}: blocks of layers side by side and in other orders")
    facts = [
        f"{'' if len(found) == 1 else name + ': '}{line}" for name, ds in found.items() for line in _told(ds)
    ]
    style.caption(
        figure, found, [*facts, *(line.format(tokens=throughout(*found.values())) for line in READING)]
    )
    return figure


def _draw(axes: Axes, cases: xr.Dataset, what: str, same: float) -> None:
    reordered = cases.composed.values == "reordered"
    backwards = np.array([_is_backwards(str(label)) for label in cases["case"].values])
    groups = {
        "other orders": reordered & ~backwards,
        "reversed": reordered & backwards,
        "side by side": ~reordered,
    }
    for index, (label, some) in enumerate(groups.items()):
        x, y, width = (each.values[some] for each in (cases["layer"], cases[what], cases[what + HALF_WIDTH]))
        look = {
            "color": style.colour((2, 1, 0)[index]),
            "marker": style.marker(index),
            "markersize": 4,
            "label": label,
        }
        if label == "other orders":
            axes.errorbar(x, y, style.bars(width), linestyle="none", elinewidth=0.7, alpha=0.6, **look)
        else:
            style.line(axes, x, y, width, linewidth=1.6, **look)
    axes.axhline(same, color=style.MUTED, linewidth=0.8, linestyle=":")
    axes.axhline(1 - same, color=style.MUTED, linewidth=0.8, linestyle=":")
    depth.name_axis(axes, True)


def _is_backwards(label: str) -> bool:
    order = [int(each) for each in label.split(" ")[-1].split(",")] if label.startswith("order") else []
    return order == sorted(order, reverse=True) if order else label.startswith("swap")


def _told(cases: xr.Dataset) -> list[str]:
    names = {"additive": "side by side", "reordered": "in another order"}
    parts = []
    for kind, told in names.items():
        one = cases.sel(kind=kind)
        if np.isfinite(one.all_stream_distance):
            kept = style.shown_share(one, "all_logit_kept")
            parts.append(f"{told} blocks keep {kept} of their effect on the logit")
    how = style.capital(wording.intervals(cases, "stream_distance"))
    return [f"{cases.attrs['prompts']} prompts. All together, {', and '.join(parts)}.", f"{how}."]
