"""Heads that read their own write: does it make them write more of it, or less (section 5.3, Appendix E)."""

from statistics import NormalDist

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.summaries import HEADS
from selfrepair_nn.analysis.task import verdict
from selfrepair_nn.blocks import edited_cases, edited_of
from selfrepair_nn.errors import UsageError

CONFIDENCE = 0.95
NEEDED = (
    "done",
    "selected",
    "logit_change",
    "direct_effect",
    "ablated_direct_effect",
    "edited_position",
    *HEADS,
)


def reinforcement_by_head(ds: xr.Dataset, confidence: float = CONFIDENCE) -> xr.Dataset:
    """How each head's direct effect answers to its own write: one edited position for each prompt.

    - before, after: direct effect at the edited position, clean and with scale times the head's own write added to
      what its layer reads, over (layer, head, prompt) and (scale, layer, head, prompt), in logits;
    - slope: of the regression line, over prompts, of after - before on before; no unit. 0: the head does not react;
      below 0: it writes the less, the more it has written (self-repressing); above 0: the more (self-reinforcing).
      intercept: of the same line, in logits;
    - low, high: confidence interval of the slope. It allows for a spread that varies from prompt to prompt (robust
      errors, HC3), and all intervals of one scale hold together with this confidence (Bonferroni);
    - kind, over (layer, head): -1 self-repressing, 1 self-reinforcing: the interval of every scale excludes 0 on
      that side; 0 neither. tokens: how many edited positions these are over.

    A result of this function is returned as it is. Memory: 8 bytes for each prompt of each head and scale.

    Raises:
        UsageError: this is no store of reinforced heads, or `confidence` is not in (0, 1).
    """
    if "slope" in ds:
        return ds
    if not 0 < confidence < 1:
        raise UsageError(f"confidence {confidence!r} is not in (0, 1): write 0.95 for 95%")
    missing = [name for name in (*NEEDED, "scale") if name not in ds.variables]
    if missing:
        raise UsageError(f"this is not a store of reinforced heads: it lacks {', '.join(missing)}")
    done, shape = edited_cases(ds), [ds.sizes[d] for d in HEADS]
    before = np.where(done, edited_of(ds, "direct_effect"), np.nan)
    variants = [ds.isel(scale=i) for i in range(ds.sizes["scale"])]
    after = np.stack([np.where(done, edited_of(one, "ablated_direct_effect"), np.nan) for one in variants])
    lines = [_regressions(before, each - before) for each in after]
    slope, intercept, error = (np.array(values) for values in zip(*lines, strict=True))
    level = 1 - (1 - confidence) / 2 / max(1, int(done.any(1).sum()))
    reach = NormalDist().inv_cdf(level) * error
    found = {"slope": slope, "intercept": intercept, "low": slope - reach, "high": slope + reach}
    per_head = ("scale", *HEADS)
    values = {name: (per_head, each.reshape(-1, *shape)) for name, each in found.items()}
    values |= {
        "before": ((*HEADS, "prompt"), before.reshape(*shape, -1)),
        "after": ((*per_head, "prompt"), after.reshape(len(after), *shape, -1)),
        "kind": (HEADS, _kind(slope - reach, slope + reach).reshape(shape)),
        "tokens": (HEADS, done.sum(1).reshape(shape)),
        "noise_floor": ds.noise_floor.variable.load(),
    }
    labels = {d: ds[d].variable for d in ("scale", *HEADS)}
    return _describe(xr.Dataset(values, labels, ds.attrs).assign_attrs(confidence=confidence, **verdict(ds)))


def strongest_responses(ds: xr.Dataset, count: int = 5, confidence: float = CONFIDENCE) -> xr.Dataset:
    """The self-repressing heads of steepest mean slope over scales, as in `reinforcement_by_head` but over (rank).

    The steepest first. A negative `count` asks for the self-reinforcing heads. Only heads whose `kind` says so are
    listed: there may be fewer than `count`, or none. `ds` is a store or a result of `reinforcement_by_head`.
    """
    found = reinforcement_by_head(ds, confidence)
    ranked = found.stack(rank=HEADS)
    wanted = -np.sign(count)
    ranked = ranked.isel(rank=np.flatnonzero(ranked.kind.values == wanted))
    order = np.argsort(-wanted * ranked.slope.mean("scale").values, kind="stable")[: abs(count)]
    return ranked.isel(rank=order).reset_index("rank")


def _regressions(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slope, intercept and the slope's HC3 standard error of each row's y on x [case, prompt]; NaN values are skipped.

    NaN for a row of fewer than three values or of equal x.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        n = np.isfinite(x).sum(1, keepdims=True)
        mean_x, mean_y = (np.nansum(v, 1, keepdims=True) / n for v in (x, y))
        across = x - mean_x
        spread = np.nansum(across**2, 1, keepdims=True)
        slope = np.nansum(across * (y - mean_y), 1, keepdims=True) / spread
        residual = y - mean_y - slope * across
        leverage = 1 / n + across**2 / spread
        error = np.sqrt(np.nansum((across * residual / (1 - leverage)) ** 2, 1, keepdims=True)) / spread
        known = (n > 2) & (spread > 0)
    return tuple(np.where(known, v, np.nan)[:, 0] for v in (slope, mean_y - slope * mean_x, error))


def _kind(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Along scales first: 1 where every interval lies above 0, -1 where every one lies below."""
    return (low > 0).all(0).astype(int) - (high < 0).all(0).astype(int)


def _describe(found: xr.Dataset) -> xr.Dataset:
    texts = {
        "slope": ("1", "slope of the change of direct effect on the direct effect"),
        "intercept": ("logit", "intercept of the same line"),
        "low": ("1", "lower end of the slope's confidence interval"),
        "high": ("1", "upper end of the slope's confidence interval"),
        "before": ("logit", "direct effect"),
        "after": ("logit", "direct effect when reinforced"),
        "kind": ("1", "-1 self-repressing, 1 self-reinforcing, 0 neither"),
        "tokens": ("1", "number of edited positions, one for each prompt"),
    }
    for name, (units, text) in texts.items():
        found[name].attrs = {"units": units, "long_name": text}
    return found
