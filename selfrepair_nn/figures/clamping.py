"""All of a set of heads but one ablated: what the one that is left does."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, among, clamped
from selfrepair_nn.case_sites import sites_of
from selfrepair_nn.components import Head
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import style, suiting
from selfrepair_nn.figures.interactions import told

READING = (
    "On the {top} of the others' ablation. Left: the direct effect of the head that is left, clean and "
    "with all others of "
    "the set ablated; filled where the change is surely not 0",
    "(false discovery rate over the heads) and beyond the noise floor. Right: what ablating it costs, "
    "alone and beside the "
    "others. Bars: 95% intervals; of what is left of the head, that of the change.",
)
BAR = 0.17


def _has_rest(ds: xr.Dataset) -> bool:
    if suiting.axis(ds) is not None or "component_change" not in ds:
        return False
    cases = [{*case} for case in sites_of(ds) if all(isinstance(site, Head) for site in case)]
    single = set().union(*(case for case in cases if len(case) == 1))
    return len(single) > 1 and any(case < single and len(case) == len(single) - 1 for case in cases)


NEED = Need(
    "all heads of a set but one ablated, with every component's change, as in `interactions`", _has_rest
)


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a row for each store: direct effects of the heads that are left, and what ablating these costs.

    `datasets` is a store of the interactions recipe, a sequence of them, or a mapping from title to them. Raises
    UsageError as `clamped` does.
    """
    found = {name: clamped(ds, share) for name, ds in style.named(datasets).items()}
    rows = [ds.sizes["head"] for ds in found.values()]
    figure = style.new_figure(9.6, 1 + sum(1.2 + 0.45 * count for count in rows))
    looks = {"squeeze": False, "gridspec_kw": {"height_ratios": [3 + count for count in rows]}}
    for row, (name, ds) in zip(figure.subplots(len(found), 2, **looks), found.items(), strict=True):
        _draw_effects(row[0], ds)
        _draw_costs(row[1], ds)
        row[0].set_title("" if len(found) == 1 else name, loc="right")
    style.heading(figure, found)
    top = among(share, *found.values())
    facts = [
        f"{'' if len(found) == 1 else name + ': '}{line}" for name, ds in found.items() for line in told(ds)
    ]
    style.caption(figure, found, [*facts, *(line.format(top=top) for line in READING)])
    return figure


def _draw_effects(axes: Axes, ds: xr.Dataset) -> None:
    rows, sure = np.arange(ds.sizes["head"]), ds.responds.values
    width = style.bars(ds[f"direct_effect{HALF_WIDTH}"].values)
    look = {"fmt": "o", "color": "#8A8A8A", "elinewidth": 1, "label": "clean"}
    axes.errorbar(ds.direct_effect.values, rows - BAR, xerr=width, **look)
    after, colour = ds.direct_effect.values + ds.change.values, style.COLOURS[0]
    width = style.bars(ds[f"change{HALF_WIDTH}"].values)
    axes.errorbar(after, rows + BAR, xerr=width, fmt="none", ecolor=colour, elinewidth=1)
    for some, face in ((sure, colour), (~sure, "white")):
        axes.plot(after[some], rows[some] + BAR, "s", color=colour, markerfacecolor=face, zorder=3)
    axes.plot([], [], "s", color=colour, label="all others ablated")
    _finish(axes, ds, "direct effect of the head that is left (logits)")


def _draw_costs(axes: Axes, ds: xr.Dataset) -> None:
    rows = np.arange(ds.sizes["head"])
    looks = {
        "alone": ("ablated alone", "#8A8A8A", "o", -BAR),
        "given_rest": ("beside the others", style.COLOURS[1], "D", BAR),
    }
    for name, (label, colour, marker, shift) in looks.items():
        width = style.bars(ds[name + HALF_WIDTH].values)
        axes.errorbar(
            ds[name].values, rows + shift, xerr=width, fmt=marker, color=colour, label=label, elinewidth=1
        )
    _finish(axes, ds, "logit change by ablating it (logits)")


def _finish(axes: Axes, ds: xr.Dataset, label: str) -> None:
    axes.axvline(0, color="black", linewidth=0.8, zorder=1.5)
    axes.set_yticks(range(ds.sizes["head"]), [str(head) for head in ds["head"].values])
    axes.set_ylim(ds.sizes["head"] - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
