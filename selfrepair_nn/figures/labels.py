"""Names beside what they name: none over another, over a mark or over the panel's edge, and no line across another."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from selfrepair_nn.figures import style

RINGS = (5, 9, 14, 20, 28, 38, 50)
"""How far from its mark a label may stand, in points."""
NEAR = 6
"""Points beyond which a line leads from the label to its mark."""
ASIDE = 1.5
"""Widths of a label that it may stand aside."""
GAP, CLOSE = 6, 3
"""Pixels between labels side by side, and from a line to a point that it passes."""
Segment = tuple[np.ndarray, np.ndarray]


def label_points(
    axes: Axes,
    places: np.ndarray,
    labels: Sequence[str],
    others: np.ndarray,
    colours: Sequence[str] | None = None,
    between: tuple[float, float] | None = None,
) -> None:
    """Write each label beside its place (x, y), clear of the other labels, of the points `others` and edges.

    Labels stand `between` these values of y, by default anywhere in the panel. They are set one after the other, each
    on the nearest free spot; one that finds none is left out. No line from a label to its place crosses another, or
    another's letters. The figure has been laid out before (draw_without_rendering).
    """
    room = _Room(axes, others, between)
    for place, label, colour in zip(places, labels, colours or ["black"] * len(labels), strict=True):
        width, height = room.size(label)
        at = axes.transData.transform(place)
        for offset in OFFSETS:
            pixels, near = np.array(offset) * axes.figure.dpi / 72, np.hypot(*offset) <= NEAR
            box, line = _spot(at, pixels, near, width, height)
            if room.is_free(box, line):
                room.take(_annotate(axes, label, place, offset, colour), box, line)
                break


def write_inside(axes: Axes, label: str, spots: Sequence[tuple[float, float]], others: np.ndarray) -> None:
    """Write a label on the first of the spots (x, y) that is free; conditions as in `label_points`."""
    look = {"ha": "center", "va": "center", "fontsize": 8, "style": "italic", "color": style.SHADE}
    room = _Room(axes, others)
    for spot in spots:
        written = axes.text(*spot, label, **look)
        written.set_in_layout(False)
        if room.is_free(box_of(written, room.renderer)):
            return
        written.remove()


def spread_near(
    wanted: np.ndarray, widths: np.ndarray, sizes: Sequence[float], low: float, high: float
) -> dict[int, float]:
    """Which of some labels fit side by side and near where they are wanted, and where: those of the largest sizes."""
    kept = sorted(range(len(wanted)), key=lambda i: -sizes[i])
    while kept:
        here = sorted(kept)
        places = spread(wanted[here], widths[here], low, high)
        fit = sum(widths[here] + GAP) <= high - low
        if fit and (abs(places - wanted[here]) <= ASIDE * widths[here]).all():
            return dict(zip(here, places.tolist(), strict=True))
        kept.pop()
    return {}


def spread(wanted: np.ndarray, widths: np.ndarray, low: float, high: float) -> np.ndarray:
    """Middles of labels side by side, in the order of where they are wanted, none over another, between the ends.

    Two layouts without overlap are pushed together from the left and from the right; their mean has none either.
    """
    order = np.argsort(wanted, kind="stable")
    first = _pushed(wanted[order], widths[order] + GAP, low, high)
    second = -_pushed(-wanted[order][::-1], widths[order][::-1] + GAP, -high, -low)[::-1]
    found = np.empty(len(wanted))
    found[order] = (first + second) / 2
    return found


def _pushed(wanted: np.ndarray, widths: np.ndarray, low: float, high: float) -> np.ndarray:
    """Each as near to where it is wanted as those before let it, then moved back from the other end."""
    found, end = np.empty(len(wanted)), low
    for i, (place, width) in enumerate(zip(wanted, widths, strict=True)):
        found[i] = max(place, end + width / 2)
        end = found[i] + width / 2
    end = high
    for i in reversed(range(len(wanted))):
        found[i] = min(found[i], end - widths[i] / 2)
        end = found[i] - widths[i] / 2
    return found


class _Room:
    """What a panel has already: marks, names and their lines, in pixels."""

    def __init__(self, axes: Axes, others: np.ndarray, between: tuple[float, float] | None = None) -> None:
        canvas: Any = axes.figure.canvas
        self.axes, self.renderer = axes, canvas.get_renderer()
        frame = axes.get_window_extent(self.renderer)
        if between is not None:
            (_, low), (_, high) = axes.transData.transform([(0, y) for y in between])
            frame = Bbox.from_extents(frame.x0, low, frame.x1, high)
        self.frame, self.points = frame, axes.transData.transform(others)
        self.boxes = [box_of(written, self.renderer) for written in axes.texts]
        self.lines = [line for written in axes.texts for line in leader(written, self.renderer)]
        self.margin = axes.figure.dpi / 24

    def size(self, label: str) -> tuple[float, float]:
        """Width and height of a label's letters."""
        written = self.axes.text(0, 0, label, fontsize=style.LABEL)
        box = box_of(written, self.renderer)
        written.remove()
        return box.width, box.height

    def is_free(self, box: Bbox, line: Segment | None = None) -> bool:
        """Whether letters in this box, with a line to their mark, cover nothing."""
        free = _is_free(box, self.frame, self.points, self.boxes, self.margin)
        free = free and not any(_touches(each, box) for each in self.lines)
        return free and (line is None or not _is_crossed(line, self.lines, self.boxes, self.points))

    def take(self, written: Text, box: Bbox, line: Segment | None) -> None:
        written.set_in_layout(False)
        self.boxes.append(box)
        self.lines += [] if line is None else [line]


def _offsets() -> list[tuple[float, float]]:
    """Where a label may stand, in points from its mark: rings of growing radius, right and left first."""
    turns = np.deg2rad([0, 180, 30, -30, 150, -150, 60, -60, 120, -120, 90, -90])
    return [(r * np.cos(turn), r * np.sin(turn)) for r in RINGS for turn in turns]


OFFSETS = _offsets()


def _spot(
    at: np.ndarray, offset: np.ndarray, near: bool, width: float, height: float
) -> tuple[Bbox, Segment | None]:
    """The box of a label at this offset from a mark, in pixels, and the line between them where it is far."""
    x, y = at + offset
    left = x - width * (1 - np.sign(np.round(offset[0]))) / 2
    box = Bbox.from_bounds(left, y - height / 2, width, height)
    return box, None if near else (np.clip(at, [box.x0, box.y0], [box.x1, box.y1]), at)


def _annotate(axes: Axes, label: str, place: Any, offset: tuple[float, float], colour: str) -> Text:
    align = {-1: "right", 0: "center", 1: "left"}[int(np.sign(np.round(offset[0])))]
    far = np.hypot(*offset) > NEAR
    line = (
        {"arrowstyle": "-", "color": style.MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        if far
        else None
    )
    look = {
        "ha": align,
        "va": "center",
        "fontsize": style.LABEL,
        "color": colour,
        "arrowprops": line,
        "zorder": 4,
    }
    return axes.annotate(label, place, offset, textcoords="offset points", **look)


def box_of(written: Text, renderer: RendererAgg) -> Bbox:
    """Where the letters are, without the leader line that an annotation's own extent includes."""
    written.get_window_extent(renderer)  # moves an annotation to where it will be drawn
    return Text.get_window_extent(written, renderer)


def leader(written: Text, renderer: RendererAgg) -> list[Segment]:
    """The line from a label to what it names, in pixels, if it has one."""
    if not isinstance(written, Annotation) or written.arrow_patch is None or written.axes is None:
        return []
    box = box_of(written, renderer)
    end = written.axes.transData.transform(written.xy)
    return [(np.clip(end, [box.x0, box.y0], [box.x1, box.y1]), end)]


def _is_crossed(line: Segment, lines: list[Segment], taken: list[Bbox], points: np.ndarray) -> bool:
    crossing = any(_cross(line, other) for other in lines)
    return crossing or any(_touches(line, each) for each in taken) or _passes(line, points)


def _cross(one: Segment, other: Segment) -> bool:
    return all(_side(*a, b[0]) * _side(*a, b[1]) < 0 for a, b in ((one, other), (other, one)))


def _side(start: np.ndarray, end: np.ndarray, point: np.ndarray) -> float:
    (a, b), (c, d) = end - start, point - start
    return float(a * d - b * c)


def _passes(line: Segment, points: np.ndarray) -> bool:
    """Whether a line comes close to a point other than that at its end."""
    points = points[np.hypot(*(points - line[1]).T) > 2 * CLOSE]
    along = line[0] + np.linspace(0, 1, 24)[:, None] * (line[1] - line[0])
    return bool((np.hypot(*(points[None] - along[:, None]).T) < CLOSE).any())


def _touches(line: Segment, box: Bbox) -> bool:
    along = line[0] + np.linspace(0, 1, 24)[:, None] * (line[1] - line[0])
    inside = (along > [box.x0, box.y0]) & (along < [box.x1, box.y1])
    return bool(inside.all(1).any())


def _is_free(box: Bbox, frame: Bbox, points: np.ndarray, taken: list[Bbox], margin: float) -> bool:
    grown = box.padded(margin)
    inside = (points > [grown.x0, grown.y0]) & (points < [grown.x1, grown.y1])
    within = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
    return within and not inside.all(1).any() and not any(grown.overlaps(other) for other in taken)
