"""What a figure is drawn on and how it looks: our settings, what of the caller's is kept, size, small print, files."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from selfrepair_nn.errors import UsageError
from selfrepair_nn.paths import local
from selfrepair_nn.values import brief, one_of, several

FORMATS = ("png", "svg", "pdf")
LARGEST = 100
"""Inches that a figure may have."""
SCREEN = 96
"""Points of a notebook's page in an inch of a figure."""
NARROWER = 0.85

SETTINGS = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "selfrepair_nn",
}
KEPT = (
    "font.",
    "axes.",
    "grid.",
    "xtick.",
    "ytick.",
    "legend.",
    "text.color",
    "figure.facecolor",
    "savefig.",
    "pdf.",
)
"""Settings of the caller's that a figure keeps, where they differ from matplotlib's own: fonts, sizes and colours."""
OURS = {
    "svg.hashsalt",
    "text.parse_math",
    "axes.prop_cycle",
    "savefig.directory",
    "savefig.bbox",
    "axes.titlelocation",
}
"""Those that stay ours: what others wrote is no formula, files are always the same, layouts have room for titles."""


@dataclass(frozen=True)
class Look:
    """How the figures that are drawn next look: size in inches, small print or none, the panel of another's figure."""

    size: tuple[float, float] | None = None
    caption: bool = True
    within: Axes | None = None


_USUAL = Look()
_LOOK: ContextVar[Look] = ContextVar("look", default=_USUAL)


@contextmanager
def looking(size: Any = None, caption: bool = True, axes: Any = None) -> Iterator[None]:
    """Within, figures look so.

    Raises:
        UsageError: a size that is not two numbers of inches, or axes that are not matplotlib's.
    """
    if axes is not None and not isinstance(axes, Axes):
        raise UsageError(f"axes must be matplotlib axes, such as those of plt.subplots(), not {brief(axes)}")
    before = _LOOK.set(Look(_inches(size), caption, axes))
    try:
        yield
    finally:
        _LOOK.reset(before)


def _inches(size: Any) -> tuple[float, float] | None:
    if size is None:
        return None
    try:
        width, height = map(float, size.lower().split("x") if isinstance(size, str) else size)
    except (TypeError, ValueError):
        width = height = 0.0
    if not (0 < width <= LARGEST and 0 < height <= LARGEST):
        raise UsageError(
            f"size {brief(size)}: give width and height in inches, such as (6.4, 4.2) or 6.4x4.2"
        )
    return width, height


def formats_of(given: Any) -> tuple[str, ...]:
    """The endings of the files to write. UsageError unless each is one."""
    listed = (given,) if isinstance(given, str) else tuple(several(given) or ())
    for each in listed:
        one_of("format", each, FORMATS)
    return listed


@contextmanager
def settings(**changes: str) -> Iterator[None]:
    """Our settings, with the caller's fonts, sizes and colours; all of the caller's are back afterwards."""
    usual: Any = matplotlib.rcParamsDefault
    mine: Any = matplotlib.rcParams
    names = (name for name in mine if name.startswith(KEPT) and name not in OURS)  # not "backend": that loads pyplot
    kept = {name: mine[name] for name in names if mine[name] != usual[name]}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        look: Any = SETTINGS | kept | changes
        matplotlib.rcParams.update(look)
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, with a canvas of its own; or the place in another's that was given."""
    look = _LOOK.get()
    if look.within is not None:
        return cast(Figure, _part(look.within))
    figure = Figure(figsize=look.size or (width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _part(axes: Axes) -> SubFigure:
    """A part of the figure that axes are in, in their place; they themselves are no longer seen."""
    root, place = axes.get_figure(), axes.get_subplotspec()
    if root is None or place is None:
        raise UsageError(
            "axes must stand in a figure's grid, such as those of plt.subplots(layout='constrained')"
        )
    if not isinstance(cast(Figure, root).get_layout_engine(), ConstrainedLayoutEngine):
        cast(Figure, root).set_layout_engine("constrained")
    axes.set_axis_off()
    if not hasattr(root.canvas, "get_renderer"):
        FigureCanvasAgg(cast(Figure, root))  # labels are set where they cover nothing, which asks how large they are
    return cast(Figure, root).add_subfigure(place)


def resize(figure: Figure, width: float, height: float) -> None:
    """Another size, in inches, unless that was chosen or the figure is a part of another."""
    if _LOOK.get().size is None and isinstance(figure, Figure):
        figure.set_size_inches(width, height)


def heighten(figure: Figure, inches: float) -> None:
    """The same, so much higher."""
    if isinstance(figure, Figure):
        resize(figure, figure.get_figwidth(), figure.get_figheight() + inches)


def width_of(figure: Figure) -> float:
    """In inches; a part of another figure is laid out later, and becomes narrower by its neighbours' labels."""
    return figure.bbox.width / figure.dpi * (1 if isinstance(figure, Figure) else NARROWER)


def lay_out(figure: Figure) -> None:
    """Find the places of everything, as drawing does, so that labels can be set clear of it."""
    root: Any = figure if isinstance(figure, Figure) else figure.get_figure(root=True)
    with _room():
        root.draw_without_rendering()


@contextmanager
def _room() -> Iterator[None]:
    """Within, a figure is laid out. UsageError where the size that was chosen has no room for its panels."""
    size = _LOOK.get().size
    with warnings.catch_warnings():
        if size is not None:
            warnings.filterwarnings("error", message="constrained_layout not applied", category=UserWarning)
        try:
            yield
        except UserWarning as told:
            asked = "x".join(f"{inches:g}" for inches in size or ())
            raise UsageError(f"size {asked} inches has no room for this figure's panels: give a larger one") from told


def captioned() -> bool:
    """Whether figures have small print."""
    return _LOOK.get().caption


def space(figure: Figure, w_pad: float | None = None, h_pad: float | None = None) -> None:
    """Room around the panels: w_pad and h_pad, in inches."""
    if isinstance(figure, Figure):
        engine = cast(ConstrainedLayoutEngine, figure.get_layout_engine())
        engine.set(w_pad=w_pad, h_pad=h_pad)


def save(
    figure: Figure, directory: str | Path, name: str, formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Write the figure as PNG (200 dpi), SVG (text as text) or PDF, always the same bytes; returns the paths."""
    directory = local(directory, "directory")
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.{ending}" for ending in formats]
    with settings(), _room():
        for path in paths:
            _WRITERS[path.suffix](figure, path)
    return paths


def _png(figure: Figure, path: Path | BytesIO) -> None:
    figure.savefig(path, format="png", dpi=200, metadata={"Software": None})


def _svg(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def _pdf(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"CreationDate": None, "Creator": None, "Producer": None})


_WRITERS: dict[str, Callable[[Figure, Path], None]] = {".png": _png, ".svg": _svg, ".pdf": _pdf}


def on_screen(figure: Figure) -> tuple[bytes, int]:
    """The figure as PNG, and how wide a notebook shows it. A kernel draws none before pyplot is set up in it."""
    buffer = BytesIO()
    with settings(), _room():
        _png(figure, buffer)
    return buffer.getvalue(), round(figure.get_figwidth() * SCREEN)


def outlined_svg(figure: Figure) -> bytes:
    """The figure as SVG with letters as outlines, for a page whose reader may lack the font."""
    buffer = BytesIO()
    with settings(**{"svg.fonttype": "path"}), _room():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
