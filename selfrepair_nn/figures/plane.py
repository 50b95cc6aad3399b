"""The plane of direct effect, or what was removed of it, and logit change: on y = -x nothing is made up for."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from selfrepair_nn import wording
from selfrepair_nn.choosing import against_of
from selfrepair_nn.figures import style

NAMES = {"removed": "direct effect removed", "direct-effect": "direct effect"}
VARIABLES = {"removed": "removed", "direct-effect": "direct_effect"}
"""What is on the horizontal axis, by what the logit's change is set against."""
EQUAL = 3  # the most that one axis may be longer than the other for both to have the same scale


IN_NATS = (
    "Dashed: y = \N{MINUS SIGN}x, no repair. Own effect: what the head's own write alone takes from the "
    "log-probability, the norm frozen."
)
"""What the dashed line is, of log-probability."""


def named(heads: xr.Dataset) -> str:
    """What is on the horizontal axis."""
    return wording.effect(heads) if wording.unit(heads) == "nats" else NAMES[against_of(heads)]


def limits(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Room for all points and the origin; both axes to one scale where their lengths allow it."""
    middles, halves = zip(*(_extent(values) for values in (x, y)), strict=True)
    if max(halves) <= EQUAL * min(halves):
        halves = [max(halves)] * 2
    for middle, half, set_limits in zip(middles, halves, (axes.set_xlim, axes.set_ylim), strict=True):
        set_limits(middle - half, middle + half)
    axes.set_box_aspect(1)
    axes.locator_params(nbins=6)


def _extent(values: np.ndarray) -> tuple[float, float]:
    low, high = min(np.nanmin(values), 0), max(np.nanmax(values), 0)
    return (low + high) / 2, 0.6 * (high - low) or 1e-3


def wedge(axes: Axes) -> None:
    """The line y = -x, the axes, and between them the region where the rest of the model makes up for it."""
    low, high = axes.get_xlim()
    ends, line = np.array([low, 0, high]), {"color": "black", "linewidth": 0.7, "zorder": 1.5}
    shade = {"color": style.SHADE, "alpha": 0.1, "linewidth": 0, "zorder": 0.5}
    limits = axes.get_ylim()
    axes.fill_between(ends, -ends, **shade)
    axes.plot(ends, -ends, "k--", dashes=(5, 3), linewidth=1.1, zorder=2)
    axes.axhline(0, **line)
    axes.axvline(0, **line)
    axes.set(xlim=(low, high), ylim=limits)


def on_lines(axes: Axes) -> np.ndarray:
    """Points along y = -x and along the axes, where a label would not be read well."""
    x, y = np.linspace(*axes.get_xlim(), 300), np.linspace(*axes.get_ylim(), 300)
    return np.concatenate([np.column_stack(line) for line in ((x, -x), (x, 0 * x), (0 * y, y))])
