"""Whole attention layers and MLPs ablated: what they wrote, what is lost, and who makes up for the difference."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfrepair_nn.analysis import HALF_WIDTH, SHARE, hydra
from selfrepair_nn.case_sites import sites_of
from selfrepair_nn.components import Attention, Mlp
from selfrepair_nn.drawing import Need, figure
from selfrepair_nn.figures import depth, style, suiting
from selfrepair_nn.wording import each_heads

KINDS = {"attention": "attention layers ablated", "mlp": "MLPs ablated"}
EFFECTS = {"top_removed": "direct effect removed", "effect": "effect of ablation"}
PARTS = {
    "top_self_repair": "self-repair",
    "compensation_attention": "attention behind",
    "compensation_mlp": "MLPs behind",
    "top_from_post_norms": "norms behind attention",
    "top_from_norm": "final norm",
}
READING = (
    "Means over {tokens}. Above: between the lines lies self-repair: where the effect of ablation is the "
    "smaller, the rest "
    "makes up for it. Below: by whom; the parts add up to the self-repair.",
    "Bars: 95% intervals.",
)


def _whole(ds: xr.Dataset) -> bool:
    cases = sites_of(ds)
    kinds = {type(case[0]) for case in cases if len(case) == 1}
    return suiting.axis(ds) is None and "component_change" in ds and {Attention, Mlp} <= kinds


NEED = Need("attention layers and MLPs ablated whole, with every component's change, as in `hydra`", _whole)


@figure(*NEED, name=__name__, about=__doc__)
def draw(datasets: style.Datasets, *, share: float = SHARE) -> Figure:
    """Draw four panels for each store: effects, and who compensates, of attention layers and of MLPs, by layer.

    `datasets` is a store of the hydra recipe or a result of `hydra`, a sequence of them, or a mapping from title to
    them. Raises UsageError as `hydra` does.
    """
    found = style.summaries(datasets, share, hydra)
    figure = style.new_figure(9.6, 0.9 + 5.6 * len(found))
    grid = figure.subplots(2 * len(found), 2, squeeze=False, sharex="row")
    for index, (name, cases) in enumerate(found.items()):
        prefix = "" if len(found) == 1 else f"{name}: "
        for column, (kind, title) in enumerate(KINDS.items()):
            some = cases.isel(case=np.flatnonzero(cases.kind.values == kind))
            above, below = grid[2 * index, column], grid[2 * index + 1, column]
            _lines(above, some, EFFECTS, 0)
            _lines(below, some, {n: label for n, label in PARTS.items() if n in some}, len(EFFECTS))
            above.set_title(f"{prefix}{title}")
        grid[2 * index, 0].set_ylabel("logits")
        grid[2 * index + 1, 0].set_ylabel("change of direct effect (logits)")
        for row in (grid[2 * index], grid[2 * index + 1]):
            row[0].legend()
    style.heading(figure, found)
    tokens = each_heads(next(iter(found.values())), "each sublayer's")
    style.caption(figure, found, [*style.captions(found), *(line.format(tokens=tokens) for line in READING)])
    return figure


def _lines(axes: Axes, cases: xr.Dataset, names: dict[str, str], first: int) -> None:
    cases = cases.where(cases.tokens > 0)
    for index, (name, label) in enumerate(names.items(), first):
        look = {
            "color": style.colour(index),
            "marker": style.marker(index),
            "markersize": 3.5,
            "linewidth": 1.6,
        }
        style.line(
            axes,
            cases.case_layer.values,
            cases[name].values,
            cases[name + HALF_WIDTH].values,
            label=label,
            **look,
        )
    depth.name_axis(axes, True)
