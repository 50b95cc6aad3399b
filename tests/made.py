"""Stores of the heads recipe from numbers written by hand, and names of what every store of it holds."""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis import MEANS
from selfrepair_nn.quantities import QUANTITIES, recorded

SWEEP = ("layer", "head", "prompt", "position")
PARTS = ("norm_on_existing", "norm_on_change")
CLEAN = tuple(q.name for q in recorded(("always",), "clean") if q.dims == SWEEP[2:])
SWEPT = tuple(name for name, q in QUANTITIES.items() if q.dims == SWEEP and q.when == "always")
COMPONENT = tuple(q.name for q in recorded(("components",)))


def hand_made(effects, **others) -> xr.Dataset:
    """A store of one head from lists [prompt][position]; what is not given is 0."""
    effects = np.array(effects, dtype=float)[None, None]
    values = {name: np.zeros_like(effects) for name in (*MEANS, *PARTS, "closure")} | {
        "direct_effect": effects
    }
    values |= {name: np.array(value, dtype=float)[None, None] for name, value in others.items()}
    done = np.ones(effects.shape[:3], bool)
    return xr.Dataset(
        {name: (SWEEP, value) for name, value in values.items()}
        | {"done": (SWEEP[:3], done), "selected": (SWEEP[:2], done.all(2)), "noise_floor": ("layer", [0.01])}
    )
