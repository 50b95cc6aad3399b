"""Figures with a panel for each of a few heads."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from selfrepair_nn.analysis import among, percent
from selfrepair_nn.components import Head
from selfrepair_nn.figures import style

DIVERGING = "coolwarm_r"
SHOWN = 98  # percentile of the sizes at which colours end


def of_heads(
    found: Mapping[str, xr.Dataset], width: float, height: float
) -> tuple[Figure, list[tuple[Axes, xr.Dataset, str]]]:
    """A figure of panels of this size in inches; each with its head, of a result over (rank), and its title.

    One store has two heads in a row; several have a row each.
    """
    most, alone = max(heads.sizes["rank"] for heads in found.values()), len(found) == 1
    columns = min(most, 2) if alone else most
    rows = -(-most // columns) * len(found)
    figure = style.new_figure(0.4 + width * columns, 1.2 + height * rows)
    style.space(figure, h_pad=0.1, w_pad=0.08)
    axes = figure.subplots(rows, columns, squeeze=False).reshape(len(found), -1)
    panels = []
    for row, (name, heads) in zip(axes, found.items(), strict=True):
        for rank, panel in enumerate(row):
            if rank < heads.sizes["rank"]:
                one = heads.isel(rank=rank)
                panels.append((panel, one, label(one) if alone else f"{name}, {label(one)}"))
            else:
                panel.remove()
    return figure, panels


def label(head: xr.Dataset) -> str:
    """ "L9H6" for one head of a result over (rank)."""
    return Head(int(head["layer"]), int(head["head"])).label


def diverging(values: Iterable[np.ndarray]) -> dict[str, Any]:
    """Colours for numbers of either sign, the same for all of these arrays: blue above zero, red below."""
    sizes = np.abs(np.concatenate([np.ravel(v) for v in values]))
    sizes = sizes[np.isfinite(sizes)]
    return {"cmap": DIVERGING, "norm": CenteredNorm(0, np.percentile(sizes, SHOWN) or 1)}


def colour_bar(figure: Figure, dots: PathCollection, label: str) -> None:
    """What the colours of `diverging` mean, beside all panels."""
    looks = {"label": label, "extend": "both", "aspect": 30, "shrink": 0.6}
    figure.colorbar(dots, ax=figure.axes, **looks).outline.set_visible(False)


def explain(
    figure: Figure, found: Mapping[str, xr.Dataset], reading: Sequence[str], share: float, of: str | None
) -> None:
    """Heading and small print; in `reading`, {share} is the top share, {top} its tokens, {mlp} the recorded MLP.

    `of` is a mean whose interval the figure shows, or None.
    """
    names = dict.fromkeys(str(heads.attrs.get("recorded_mlp", "the MLP")) for heads in found.values())
    facts = {"share": percent(share), "top": among(share, *found.values()), "mlp": " or ".join(names)}
    style.heading(figure, found)
    style.caption(figure, found, [*style.captions(found, of=of), *(line.format(**facts) for line in reading)])
