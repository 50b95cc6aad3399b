"""What deleting each layer, and swapping it with the next, does to the logit, and what the rest makes up for."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, by_case, throughout
from selfrepair_nn.case_sites import sites_of
from selfrepair_nn.components import Ablatable, Layers, Permuted
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import depth, style, suiting

KINDS = {Layers: "a layer deleted", Permuted: "two neighbours swapped"}
SIZES = {Layers: 1, Permuted: 2}
PARTS = {
    "own": "change of its own direct effect",
    "logit_change": "logit change",
    "self_repair": "self-repair",
}
READING = (
    "Means over {tokens}; a swap stands between its two layers. Self-repair: logit change less the change of the "
    "direct effect of the deleted or swapped layers themselves,",
    "so what the layers above and the final norm make of it. Bars: 95% intervals. The axis is linear to 1 logit, "
    "logarithmic beyond.",
)
TICKS = [sign * size for sign in (-1, 1) for size in (0.5, 1, 2, 5, 10, 20, 50)]

NEED = Need(
    "layers deleted and swapped, as in `layer_position`",
    lambda ds: suiting.axis(ds) is None and all(_of_kind(ds, kind).size for kind in KINDS),
)


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw a panel for deletion and one for swaps, by layer; several stores have a row each.

    `datasets` is a store of the layer_position recipe or `by_case` of it, a sequence of them, or a mapping from title
    to them. Raises UsageError as `by_case` does, and if there is nothing to draw.
    """
    found = style.summaries(datasets, share, by_case)
    figure = style.new_figure(9.6, 1 + 3.8 * len(found))
    grid = figure.subplots(len(found), 2, squeeze=False, sharey="row")
    for row, (name, cases) in zip(grid, found.items(), strict=True):
        for axes, (kind, told) in zip(row, KINDS.items(), strict=True):
            _draw_kind(axes, cases.isel(case=_of_kind(cases, kind)), 0.5 * (kind is Permuted))
            axes.set_title(told if len(found) == 1 else f"{name}: {told}")
        row[0].set_ylabel("logits")
        row[0].legend()
    reading = [line.format(tokens=throughout(*found.values())) for line in READING]
    style.heading(figure, found, f"{', '.join(found)}: layers deleted and swapped")
    style.caption(figure, found, [*style.captions(found, top=False, of="self_repair"), *reading])
    return figure


def _of_kind(cases: xr.Dataset, kind: type) -> np.ndarray:
    """Which cases delete one layer, or swap two."""
    return np.flatnonzero([len(case) == 1 and _alone(case[0], kind) for case in sites_of(cases)])


def _alone(site: Ablatable, kind: type) -> bool:
    return isinstance(site, Layers | Permuted) and isinstance(site, kind) and site.stop - site.layer == SIZES[kind]


def _draw_kind(axes: Axes, cases: xr.Dataset, shift: float) -> None:
    cases = cases.assign(own=-cases.removed, own_half_width=cases.removed_half_width)
    cases = cases.where(cases.tokens > 0)
    for index, (name, label) in enumerate(PARTS.items()):
        look = {
            "color": style.colour(index),
            "marker": style.marker(index),
            "markersize": 3.5,
            "linewidth": 1.6,
        }
        width = style.bars(cases[name + HALF_WIDTH].values)
        axes.errorbar(
            cases.case_layer.values + shift, cases[name].values, width, label=label, elinewidth=1, **look
        )
    depth.name_axis(axes, True)
    axes.set_xlim(cases.case_layer.min() - 0.5, cases.case_layer.max() + 0.5 + shift)
    low, high = axes.get_ylim()
    axes.set_yscale("symlog", linthresh=1)
    shown = [0, *(tick for tick in TICKS if low <= tick <= high)]
    axes.set_yticks(shown, [f"{tick:g}".replace("-", "\N{MINUS SIGN}") for tick in shown])
    axes.set_yticks([], minor=True)
