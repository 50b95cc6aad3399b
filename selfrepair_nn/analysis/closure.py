"""Whether the parts of the self-repair add up as well as the model's number format allows."""

import numpy as np
import xarray as xr

from selfrepair_nn.blocks import counted_tokens, done_cases, largest, sites
from selfrepair_nn.equations import CLOSURE, TOLERANCE
from selfrepair_nn.quantities import TOKEN


def closure(ds: xr.Dataset, worst: np.ndarray | None = None) -> dict[str, float]:
    """Attributes of a summary of a store: `worst_closure`, and `closure_limit`, which no sound run exceeds; in logits.

    The limit is a share of the standard deviation of the clean run's logits that count, by dtype
    (`equations.CLOSURE`). `worst` is the largest |closure| of each case where that is known already. A store without a
    closure, or with nothing done, has no such attributes.
    """
    if worst is None:
        worst = _worst(ds) if "closure" in ds else np.empty(0)
    worst = worst[~np.isnan(worst)]
    if not worst.size:
        return {}
    return {"worst_closure": float(worst.max()), "closure_limit": closure_limit(ds)}


def _worst(ds: xr.Dataset) -> np.ndarray:
    """The largest |closure| of each case, of every variant."""
    axes = [d for d in ds.closure.dims if d not in (*sites(ds), *TOKEN)]
    variants = [ds.isel({axes[0]: i}) for i in range(ds.sizes[axes[0]])] if axes else [ds]
    return np.concatenate([largest(one, "closure", done_cases(ds)) for one in variants])


def closure_limit(ds: xr.Dataset) -> float:
    """The largest |closure| that the store's dtype allows, in logits.

    Where norms come behind sublayers it has in it how exactly the model computes these, whatever is asked of it.
    """
    dtype = str(ds.attrs.get("dtype", ds.closure.dtype))
    limits = TOLERANCE if "from_post_norms" in ds else CLOSURE
    return limits.get(dtype, limits["float32"]) * _spread(ds)


def _spread(ds: xr.Dataset) -> float:
    """Standard deviation of the logits that count; 1 logit where it is not known."""
    if "logit" not in ds:
        return 1.0
    some = counted_tokens(ds)
    if "other" in ds and "target" in ds:
        some = some & (ds.other != ds.target).transpose(*TOKEN).values  # no difference that is always 0
    logits = ds.logit.transpose(*TOKEN).values[some].astype(float)
    logits = logits[np.isfinite(logits)]
    with np.errstate(over="ignore"):
        return float(logits.std()) or 1.0 if logits.size else 1.0
