"""What figures share: names, colours, titles, legends, small print. pyplot's state is never touched."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from selfrepair_nn import wording
from selfrepair_nn.analysis import HALF_WIDTH, by_head, restored
from selfrepair_nn.analysis.checks import share_of as usual_share_of
from selfrepair_nn.errors import UsageError
from selfrepair_nn.figures.look import (
    captioned,
    heighten,
    lay_out,
    looking,
    new_figure,
    outlined_svg,
    resize,
    save,
    settings,
    space,
    width_of,
)
from selfrepair_nn.shown import line as one_line
from selfrepair_nn.wording import intervals, reach, warnings

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = "osD^vPX"
MUTED, SHADE, LOUD, LABEL = "#555555", "#0072B2", "#C00000", 7.5
__all__ = ["lay_out", "looking", "new_figure", "outlined_svg", "resize", "save", "settings", "space"]

CHARACTERS = 19.8  # of small print in an inch
LINES, LINE = 4, 0.14  # small print for which there is room, and inches of a line
LAYERS, DECIMALS = "viridis", 2
TITLE = 60
"""Characters that fit over a panel."""
BETWEEN, LAST = 0.15, 0.6
"""Inches of a panel that its title leaves free before the next one, and at the edge, as it begins further in."""

Datasets = xr.Dataset | Sequence[xr.Dataset] | Mapping[str, xr.Dataset]
Summary = Callable[[xr.Dataset, float], xr.Dataset]


def named(datasets: Datasets) -> dict[str, xr.Dataset]:
    """Every dataset under the name it has in the legend: its key, or its model.

    Raises:
        UsageError: no dataset.
    """
    if isinstance(datasets, xr.Dataset):
        datasets = [datasets]
    names = list(datasets) if isinstance(datasets, Mapping) else [None] * len(datasets)
    stores = [restored(ds) for ds in (datasets.values() if isinstance(datasets, Mapping) else datasets)]
    if not stores:
        raise UsageError("no dataset was given: a figure draws one store, or several")
    stores = [wording.legible(ds) for ds in stores]
    return dict(zip(_names(names, stores), stores, strict=True))


def share_of(datasets: Datasets, share: float | None) -> float:
    """The share that is given, or the one that is usual for all of the datasets.

    Raises:
        UsageError: none is given, and of some datasets every token counts, of others not; or it is not in (0, 1].
    """
    usual = {usual_share_of(ds, share) for ds in named(datasets).values()}
    if len(usual) > 1:
        raise UsageError(
            "every token counts in some of these stores and not in others: give the share to show"
        )
    return usual.pop()


def summaries(datasets: Datasets, share: float, by: Summary = by_head) -> dict[str, xr.Dataset]:
    """The by-head summary of every dataset, as `by` makes it, under its name in the legend.

    Raises:
        UsageError: no dataset, or one with nothing done.
    """
    found = {name: by(ds, share) for name, ds in named(datasets).items()}
    for heads in found.values():
        if not (heads.tokens > 0).any():
            raise UsageError(f"{wording.title(heads)!r} has nothing done yet: there is nothing to draw")
    return found


def unit_of(found: Mapping[str, xr.Dataset]) -> str:
    """What an axis of all of them is in: of one figure's datasets all are asked in the same."""
    return wording.unit(next(iter(found.values())))


def colour(index: int) -> str:
    """The colour of the dataset with this index."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """The marker of the dataset with this index."""
    return MARKERS[index % len(MARKERS)]


def as_percent(value: float, _position: float) -> str:
    """A tick's label where an axis shows shares."""
    return f"{100 * value:,.10g}%".replace("-", "\N{MINUS SIGN}")


def heading(figure: Figure, found: Mapping[str, xr.Dataset], told: str | None = None) -> None:
    """`told`, by default `title_of`, above a figure of several panels."""
    figure.suptitle(told or title_of(found), x=0.01, ha="left", fontsize=11.5, fontweight="bold")


def caption(figure: Figure, found: Mapping[str, xr.Dataset], lines: Sequence[str]) -> None:
    """Small print under the figure; in red, and above all else, what `warnings` says of any of the datasets.

    Titles that are too long for their panels go on further lines: what is over them stands by now.
    """
    fit_titles(figure)
    loud = [
        f"{name}: {told}" if len(found) > 1 else told for name, h in found.items() for told in warnings(h)
    ]
    wide = max(int(CHARACTERS * width_of(figure)), 20)
    told = [*loud, *(lines if captioned() else ())]
    shown = [part for line in told for part in textwrap.wrap(line, wide)]
    if len(shown) > LINES:
        heighten(figure, LINE * (len(shown) - LINES))
    look = {"fontsize": 7, "color": LOUD if loud else MUTED, "linespacing": 1.4}
    if shown:
        figure.supxlabel("\n".join(shown), x=0.01, ha="left", **look)


def fit_titles(figure: Figure) -> None:
    """Titles of panels on as many lines as keep them from the next panel, and from the figure's edge."""
    for axes in figure.axes:
        for text in axes.get_children():
            if isinstance(text, Text) and text.get_text() and text.get_text() == axes.get_title("left"):
                text.set_text(_fitted(text, _room(figure, axes)))


def _room(figure: Figure, axes: Axes) -> float:
    """For the title of a panel, in inches; without bounds where the panel is part of another."""
    place = axes.get_subplotspec()
    if place is None:
        return np.inf
    grid, columns = place.get_gridspec(), place.colspan
    ratios = np.array(grid.get_width_ratios(), float)
    edge = LAST if columns.stop == grid.ncols else BETWEEN
    return width_of(figure) * ratios[columns.start : columns.stop].sum() / ratios.sum() - edge


def _fitted(text: Text, room: float) -> str:
    longest = text.get_window_extent().width / text.figure.dpi
    if longest <= room:
        return text.get_text()
    lines = text.get_text().split("\n")
    fits = max(int(max(map(len, lines)) * room / longest), 8)
    return "\n".join(part for line in lines for part in textwrap.wrap(line, fits))


def captions(
    found: Mapping[str, xr.Dataset], top: bool = True, of: str | None = "top_self_repair"
) -> list[str]:
    """What the numbers are over, one line per dataset, whether the model does its task, and what the intervals are.

    `top`: whether the figure shows top shares; `of`: a mean that it shows, None where it shows no interval.
    """
    facts = [
        (name, f"{fact}.")
        for name, heads in found.items()
        for fact in _facts(heads, top)
    ]
    known = {} if of is None else {name: f"{capital(intervals(heads, of))}." for name, heads in found.items()}
    if len(found) == 1:
        return [*(fact for _, fact in facts), *known.values()]
    lines = [f"{name}: {fact}" for name, fact in facts]
    alike = len({*known.values()}) == 1
    return lines + ([*known.values()][:1] if alike else [f"{name}: {told}" for name, told in known.items()])


def _facts(heads: xr.Dataset, top: bool) -> list[str]:
    basis = f"{wording.basis(heads, top)}; {wording.noise(heads)}"
    return [basis, *map(capital, [*wording.selection(heads), *wording.task(heads)])]


def capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def decimals(values: np.ndarray) -> int:
    """How many tell the largest of these numbers by two digits: at least DECIMALS, and not more than two further."""
    most = float(np.nanmax(abs(values), initial=0))
    return int(np.clip(1 - np.floor(np.log10(most)), DECIMALS, DECIMALS + 2)) if 0 < most < np.inf else DECIMALS


def signed(value: float, decimals: int = DECIMALS) -> str:
    """A number in a cell, with its sign."""
    return f"{value:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def bars(half_width: np.ndarray) -> np.ndarray:
    """Lengths of error bars: half-widths, and none where there is no interval."""
    return np.where(np.isfinite(half_width), half_width, np.nan)


def typical(found: Mapping[str, xr.Dataset], name: str) -> str:
    """The median half-width of the heads' intervals of a mean, in words; nothing where no head has one."""
    widths = [bars(heads[name + HALF_WIDTH].values).ravel() for heads in found.values()]
    widths = np.concatenate(widths)
    return f"typically {reach(np.nanmedian(widths))}" if np.isfinite(widths).any() else ""


def line(axes: Axes, x: np.ndarray, y: np.ndarray, half_width: np.ndarray, **look: Any) -> None:
    """A line through means, with their intervals where there are any."""
    axes.plot(x, y, **look)
    if np.isfinite(half_width).any():
        marks = {"elinewidth": 1, "capsize": 2, "ecolor": look["color"], "zorder": look.get("zorder", 3)}
        axes.errorbar(x, y, bars(half_width), fmt="none", **marks)


def shown_share(one: xr.Dataset, name: str, decimals: int = 0) -> str:
    """ "62% ± 4%" of a share, without the interval where there is none."""
    width = float(one[name + HALF_WIDTH])
    told = f" ± {width:.{decimals}%}" if np.isfinite(width) else ""
    return f"{float(one[name]):.{decimals}%}{told}"


def crosses(axes: Axes, x: np.ndarray, y: np.ndarray, x_width: np.ndarray, y_width: np.ndarray) -> None:
    """Thin bars in both directions behind dots: the intervals of both means."""
    look = {"linestyle": "none", "ecolor": MUTED, "elinewidth": 0.5, "alpha": 0.45, "zorder": 2.5}
    axes.errorbar(x, y, bars(y_width), bars(x_width), **look)


def title_of(found: Mapping[str, xr.Dataset]) -> str:
    """Model and ablation of one dataset; what several have in common."""
    if len(found) == 1:
        return wording.title(*found.values())
    models, ablations = ({str(heads.attrs.get(a)) for heads in found.values()} for a in ("model", "ablation"))
    parts = [models.pop() if len(models) == 1 else f"{len(models)} models"]
    return ", ".join(parts + [f"{a} ablation" for a in ablations if len(ablations) == 1])


def wrapped(title: str, width: int = TITLE) -> str:
    """A title over one panel, on as many lines as it needs."""
    return "\n".join(textwrap.wrap(title, width))


def legend(figure: Figure, axes: Axes, found: Mapping[str, xr.Dataset]) -> None:
    """Which dataset has which colour, beside the figure, if there are several; `axes` shows them all."""
    if len(found) > 1:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, [wrapped(each, TITLE // 2) for each in labels], loc="outside right upper")


def _names(given: Sequence[str | None], found: Sequence[xr.Dataset]) -> list[str]:
    """The names given; else the models if they tell the datasets apart and the rest is the same; else all."""
    models, titles = [wording.model(h) for h in found], [wording.title(h) for h in found]
    same = len({title.removeprefix(model) for title, model in zip(titles, models, strict=True)}) == 1
    told = models if same and len(set(models)) == len(models) else titles
    named = [one_line(name or default, TITLE) for name, default in zip(given, told, strict=True)]
    earlier = [named[:i].count(name) for i, name in enumerate(named)]
    return [f"{name} ({n + 1})" if n else name for name, n in zip(named, earlier, strict=True)]
