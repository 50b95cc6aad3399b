"""Whether heads answer to their own write, or to whatever is added in its place: slopes beside those of nulls."""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import HEADS
from selfrepair_nn.analysis.reinforcement import (
    CONFIDENCE,
    bonferroni,
    describe,
    kinds,
    line,
    measured,
    of_edits,
    require_confidence,
)
from selfrepair_nn.analysis.tokens import clusters
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public

OWN = "own"


@public
def reinforcement_nulls(ds: xr.Dataset, confidence: float = CONFIDENCE) -> xr.Dataset:
    """Whether heads answer to their own write, or to anything that is added in its place.

    - slope, low, high, over (write, layer, head): as in `reinforcement_by_head`, of the change after - before on the
      direct effect, where what is added is the head's own write; the same with the other sign ("reversed"); what the
      head writes at that position of another prompt ("partner"); a direction drawn at random, as long as its own write
      ("random");
    - excess, excess_low, excess_high, over (null, layer, head): the slope under the own write minus that under each
      null, of the same prompts, and its interval, which holds for all heads of a null together;
    - kind, over (layer, head): -1 self-repressing, 1 self-reinforcing, by the own write alone; beyond: the same, and
      the interval of the excess over every null excludes 0 on that side, else 0; tokens: how many edited positions.

    A head whose direct effect shrinks whatever is added, since the norms of what it reads grow, has the same slope
    under "own" and "reversed". A result of this function is returned as it is. Errors as in `reinforcement_by_head`.
    """
    if _found(ds):
        return ds
    require_confidence(confidence)
    ds = of_edits(ds, "write")
    labels = [str(label) for label in ds["write"].values]
    if OWN not in labels or len(labels) < 2:
        raise UsageError(f"this store has no null beside {OWN!r}, but {', '.join(labels)}: run reinforcement_nulls")
    done, before, after = measured(ds, "write")
    level = bonferroni(confidence, done)
    own, nulls = labels.index(OWN), [i for i, label in enumerate(labels) if label != OWN]
    slope, low, high = _slopes(ds, before, [each - before for each in after], level)
    excess, below, above = _slopes(ds, before, [after[own] - after[i] for i in nulls], level)
    kind, surely = kinds(low[own][None], high[own][None]), kinds(below, above)
    found = {name: (("write", *HEADS), values) for name, values in (("slope", slope), ("low", low), ("high", high))}
    for name, values in (("excess", excess), ("excess_low", below), ("excess_high", above)):
        found[name] = (("null", *HEADS), values)
    found |= {"kind": (HEADS, kind), "beyond": (HEADS, np.where(surely == kind, kind, 0))}
    described = describe(ds, "write", done, found, confidence)
    return described.assign_coords(null=[labels[i] for i in nulls])


def _slopes(ds: xr.Dataset, before: np.ndarray, changes: list[np.ndarray], level: float) -> tuple[np.ndarray, ...]:
    """Slopes of each change on `before`, and the ends of their intervals: [change, layer, head] each."""
    lines = [line(before, each, clusters(ds), level) for each in changes]
    shape = [len(changes), *(ds.sizes[d] for d in HEADS)]
    slope, _, reach = (np.array(values).reshape(shape) for values in zip(*lines, strict=True))
    return slope, slope - reach, slope + reach


def _found(ds: xr.Dataset) -> bool:
    """Whether this is a result of `reinforcement_nulls`."""
    return "excess" in ds and "null" in ds.excess.dims


def has_nulls(ds: xr.Dataset) -> bool:
    """Whether a store, or a result of `reinforcement_nulls`, is of heads that read their own write, and nulls of it."""
    stored = "self_repair" in ds and "write" in ds.self_repair.dims and "edited_position" in ds.coords
    return _found(ds) or (stored and OWN in ds["write"].values)
