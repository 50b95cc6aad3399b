"""Heads that read their own write: does it make them write more of it, or less (section 5.3, Appendix E)."""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import HEADS, restored
from selfrepair_nn.analysis.closure import closure
from selfrepair_nn.analysis.task import verdict
from selfrepair_nn.analysis.tokens import clustering, clusters
from selfrepair_nn.blocks import edited_cases, edited_of
from selfrepair_nn.confidence import CLUSTERS, Tally, student
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public

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


@public
def reinforcement_by_head(ds: xr.Dataset, confidence: float = CONFIDENCE) -> xr.Dataset:
    """How each head's direct effect answers to its own write: one edited position for each prompt.

    - before, after: direct effect at the edited position, clean and with scale times the head's own write added to
      what its layer reads, over (layer, head, prompt) and (scale, layer, head, prompt), in logits;
    - slope: of the regression line, over prompts, of after - before on before; no unit. 0: the head does not react;
      below 0: it writes the less, the more it has written (self-repressing); above 0: the more (self-reinforcing).
      intercept: of the same line, in logits;
    - low, high: confidence interval of the slope, by the jackknife over the clusters of `by_head`: it allows for a
      spread that varies from prompt to prompt. All intervals of one scale hold together with this confidence
      (Bonferroni). Without end where fewer than 20 clusters are done;
    - kind, over (layer, head): -1 self-repressing, 1 self-reinforcing: the interval of every scale excludes 0 on
      that side; 0 neither. tokens: how many edited positions these are over.

    A result of this function is returned as it is. Memory: 8 bytes for each prompt of each head and scale.

    Raises:
        UsageError: this is no store of reinforced heads, or `confidence` is not in (0, 1).
    """
    if _found(ds):
        return ds
    require_confidence(confidence)
    ds = of_edits(ds, "scale")
    done, before, after = measured(ds, "scale")
    level = bonferroni(confidence, done)
    lines = [line(before, each - before, clusters(ds), level) for each in after]
    slope, intercept, reach = (np.array(values) for values in zip(*lines, strict=True))
    shape = [ds.sizes[d] for d in HEADS]
    found = {"slope": slope, "intercept": intercept, "low": slope - reach, "high": slope + reach}
    per_head = ("scale", *HEADS)
    values = {name: (per_head, each.reshape(-1, *shape)) for name, each in found.items()}
    values |= {
        "before": ((*HEADS, "prompt"), before.reshape(*shape, -1)),
        "after": ((*per_head, "prompt"), after.reshape(len(after), *shape, -1)),
        "kind": (HEADS, kinds(slope - reach, slope + reach).reshape(shape)),
    }
    return describe(ds, "scale", done, values, confidence)


def require_confidence(confidence: float) -> None:
    """Raise UsageError unless it is in (0, 1)."""
    if not 0 < confidence < 1:
        raise UsageError(f"confidence {confidence!r} is not in (0, 1): write 0.95 for 95%")


def of_edits(ds: xr.Dataset, axis: str) -> xr.Dataset:
    """A store of reinforced heads along this axis, `restored`."""
    ds = restored(ds)
    missing = [name for name in (*NEEDED, axis) if name not in ds.variables]
    if missing:
        raise UsageError(f"this is not a store of reinforced heads: it lacks {', '.join(missing)}")
    return ds


def measured(ds: xr.Dataset, axis: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is done [case, prompt], and direct effects there before [case, prompt] and after [variant, case, prompt]."""
    done = edited_cases(ds)
    before = np.where(done, edited_of(ds, "direct_effect"), np.nan)
    variants = [ds.isel({axis: i}) for i in range(ds.sizes[axis])]
    after = [np.where(done, edited_of(one, "ablated_direct_effect"), np.nan) for one in variants]
    return done, before, np.stack(after)


def bonferroni(confidence: float, done: np.ndarray) -> float:
    """The level of one head's interval, so that all heads' hold together."""
    return 1 - (1 - confidence) / max(1, int(done.any(1).sum()))


def _found(ds: xr.Dataset) -> bool:
    """Whether this is a result of `reinforcement_by_head`."""
    return "slope" in ds and "scale" in ds.slope.dims


def reinforced(ds: xr.Dataset) -> bool:
    """Whether a store, or a result of `reinforcement_by_head`, is of heads that read their own write at some scales.

    Of other stores of reinforced heads, with an axis of another name or none, means tell what there is.
    """
    needed = {"scale", *HEADS}
    scaled = "self_repair" in ds and needed <= {*ds.self_repair.dims} and ds["scale"].dtype.kind in "fi"
    return _found(ds) or (scaled and "edited_position" in ds.coords)


@public
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


def line(
    x: np.ndarray, y: np.ndarray, cluster: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slope, intercept and the half-width of the slope's interval, of each row's y on x [case, prompt].

    By the jackknife, the regression without each cluster [prompt] in turn, and Student's quantile: a few prompts of
    large x often decide the slope, and then there are few degrees of freedom. NaN values are skipped; NaN for a row of
    fewer than three or of equal x.
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(known, x, 0), np.where(known, y, 0)
    sums = np.stack([Tally.of_prompts(v, known, cluster).sums for v in (known, x, y, x * x, x * y)])
    total = sums.sum(-1, keepdims=True)
    slope, others = _slope(total)[:, 0], _slope(total - sums)
    held = (sums[0] > 0).sum(1)
    moved = np.where(sums[0] > 0, others - slope[:, None], 0)
    error = np.sqrt((1 - 1 / np.maximum(held, 1)) * (moved**2).sum(1))
    freedom = np.clip(_alike(sums), 2, np.maximum(held - 1, 2)) - 1
    reach = error * student(level, freedom)
    reach = np.where((held >= CLUSTERS) & np.isfinite(reach), reach, np.inf)
    with np.errstate(invalid="ignore"):
        intercept = (total[2] - slope[:, None] * total[1])[:, 0] / total[0, :, 0]
    few = (total[0, :, 0] <= 2) | np.isnan(slope)
    slope, intercept, reach = (np.where(few, np.nan, v) for v in (slope, intercept, reach))
    return slope, intercept, reach


def _alike(sums: np.ndarray) -> np.ndarray:
    """How many clusters would say as much of the slope if they were alike: [case]."""
    n, x, _, xx, _ = sums
    mean = x.sum(-1, keepdims=True) / np.maximum(n.sum(-1, keepdims=True), 1)
    spread = xx - 2 * mean * x + n * mean**2
    return spread.sum(-1) ** 2 / np.maximum((spread**2).sum(-1), np.finfo(float).tiny)


def _slope(sums: np.ndarray) -> np.ndarray:
    """The slope from the number of points and the sums of x, y, x^2 and x y: [5, …] to […]; NaN of equal x."""
    n, x, y, xx, xy = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = xx - x * x / n
        return np.where(spread > 1e-12 * xx, (xy - x * y / n) / spread, np.nan)


def kinds(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Along scales first: 1 where every interval lies above 0, -1 where every one lies below."""
    return (low > 0).all(0).astype(int) - (high < 0).all(0).astype(int)


def describe(ds: xr.Dataset, axis: str, done: np.ndarray, values: dict, confidence: float) -> xr.Dataset:
    """The summary of a store along an axis, with what every one has."""
    values = values | {
        "tokens": (HEADS, done.sum(1).reshape([ds.sizes[d] for d in HEADS])),
        "noise_floor": ds.noise_floor.variable.load(),
    }
    told = clustering(ds) | closure(ds) | verdict(ds) | {"confidence": confidence}
    found = xr.Dataset(values, {d: ds[d].variable for d in (axis, *HEADS)}, ds.attrs | told)
    for name, (units, text) in TEXTS.items():
        if name in found:
            found[name].attrs = {"units": units, "long_name": text}
    return found


TEXTS = {
    "slope": ("1", "slope of the change of direct effect on the direct effect"),
    "intercept": ("logit", "intercept of the same line"),
    "low": ("1", "lower end of the slope's confidence interval"),
    "high": ("1", "upper end of the slope's confidence interval"),
    "excess": ("1", "slope under the head's own write minus that under the null"),
    "excess_low": ("1", "lower end of the excess's confidence interval"),
    "excess_high": ("1", "upper end of the excess's confidence interval"),
    "before": ("logit", "direct effect"),
    "after": ("logit", "direct effect when reinforced"),
    "kind": ("1", "-1 self-repressing, 1 self-reinforcing, 0 neither"),
    "beyond": ("1", "the same, beyond every null"),
    "tokens": ("1", "number of edited positions, one for each prompt"),
}
