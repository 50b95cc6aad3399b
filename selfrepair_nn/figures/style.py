"""What figures share: names, colours, titles, legends, small print, labels. pyplot's state is never touched."""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

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

CHARACTERS = 20.5  # of small print in an inch
LINES, LINE = 4, 0.14  # small print for which there is room, and inches of a line
LAYERS = "viridis"
TITLE = 60
"""Characters that fit over a panel."""

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
    """Small print under the figure; in red, and above all else, what `warnings` says of any of the datasets."""
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
    return [basis, *map(capital, wording.selection(heads)), *wording.task(heads)]


def capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def signed(value: float) -> str:
    """A number in a cell: its sign, two decimals."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


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
    """ "62% ± 4%" of a share, without the interval where there is none, or where every token said the same."""
    width = float(one[name + HALF_WIDTH])
    told = f" ± {width:.{decimals}%}" if 0 < width < np.inf else ""
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


def label_points(axes: Axes, places: np.ndarray, labels: Sequence[str], others: np.ndarray) -> None:
    """Write each label beside its place (x, y), clear of the other labels, of the points `others` and edges.

    Labels are set one after the other, each on the nearest free spot; one that finds none is left out. The
    figure has been laid out before (draw_without_rendering).
    """
    for place, label in zip(places, labels, strict=True):
        _first_free(axes, others, (partial(_annotate, axes, label, place, offset) for offset in _offsets()))


def write_inside(axes: Axes, label: str, spots: Sequence[tuple[float, float]], others: np.ndarray) -> None:
    """Write a label on the first of the spots (x, y) that is free; conditions as in `label_points`."""
    look = {"ha": "center", "va": "center", "fontsize": 8, "style": "italic", "color": SHADE}
    _first_free(axes, others, (partial(axes.text, *spot, label, **look) for spot in spots))


def _names(given: Sequence[str | None], found: Sequence[xr.Dataset]) -> list[str]:
    """The names given; else the models if they tell the datasets apart and the rest is the same; else all."""
    models, titles = [wording.model(h) for h in found], [wording.title(h) for h in found]
    same = len({title.removeprefix(model) for title, model in zip(titles, models, strict=True)}) == 1
    told = models if same and len(set(models)) == len(models) else titles
    named = [one_line(name or default, TITLE) for name, default in zip(given, told, strict=True)]
    earlier = [named[:i].count(name) for i, name in enumerate(named)]
    return [f"{name} ({n + 1})" if n else name for name, n in zip(named, earlier, strict=True)]


def _offsets() -> list[tuple[float, float]]:
    """Where a label may stand, in points from its mark: rings of growing radius, right and left first."""
    turns = np.deg2rad([0, 180, 30, -30, 150, -150, 60, -60, 120, -120, 90, -90])
    return [(r * np.cos(turn), r * np.sin(turn)) for r in (5, 9, 14, 20, 28, 38) for turn in turns]


def _annotate(axes: Axes, label: str, place: Any, offset: tuple[float, float]) -> Text:
    sides = {-1: "right", 0: "center", 1: "left"}
    align = sides[int(np.sign(np.round(offset[0])))]
    far = np.hypot(*offset) > 6
    line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2} if far else None
    look = {"ha": align, "va": "center", "fontsize": LABEL, "arrowprops": line, "zorder": 4}
    return axes.annotate(label, place, offset, textcoords="offset points", **look)


def _first_free(axes: Axes, others: np.ndarray, attempts: Iterable[Callable[[], Text]]) -> None:
    """Keep the first text that covers nothing, of those that the attempts write."""
    canvas: Any = axes.figure.canvas
    renderer = canvas.get_renderer()
    frame, points = axes.get_window_extent(renderer), axes.transData.transform(others)
    taken = [_box(written, renderer) for written in axes.texts]
    for attempt in attempts:
        written = attempt()
        written.set_in_layout(False)
        if _is_free(_box(written, renderer), frame, points, taken, axes.figure.dpi / 24):
            return
        written.remove()


def _box(written: Text, renderer: RendererAgg) -> Bbox:
    """Where the letters are, without the leader line that an annotation's own extent includes."""
    written.get_window_extent(renderer)  # moves an annotation to where it will be drawn
    return Text.get_window_extent(written, renderer)


def _is_free(box: Bbox, frame: Bbox, points: np.ndarray, taken: list[Bbox], margin: float) -> bool:
    grown = box.padded(margin)
    inside = (points > [grown.x0, grown.y0]) & (points < [grown.x1, grown.y1])
    within = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
    return within and not inside.all(1).any() and not any(grown.overlaps(other) for other in taken)
