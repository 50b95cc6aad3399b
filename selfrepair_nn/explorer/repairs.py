"""Which components make up for an ablation: on average, and on each token that is shown, the largest of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn import blocks
from selfrepair_nn.analysis import who_repairs
from selfrepair_nn.analysis.repairers import ablated_itself, repairs_of_cases
from selfrepair_nn.choosing import ranked_by, tail_of
from selfrepair_nn.errors import UsageError
from selfrepair_nn.explorer.packing import levels, packed, plain, rounded, significant, step_for
from selfrepair_nn.shown import line

SHOWN = 10
"""Components of a head, and of a token."""
TOKENS = 1_500_000
"""Numbers of components of single tokens."""


def repairs(
    variants: Sequence[xr.Dataset], summaries: Sequence[xr.Dataset], top: blocks.Top
) -> dict[str, Any] | None:
    """What each component does, of each variant; None where no component's change is stored."""
    first = variants[0]
    if "component_change" not in first:
        return None
    share, count = summaries[0].attrs["share"], TOKENS // (len(variants) * 2 * SHOWN)
    chosen = shared_out(top, count, tail_of(first))
    return {
        "labels": [line(c) for c in first.component.values],
        "layers": first.component_layer.values.tolist(),
        "heads": first.component_head.values.tolist(),
        "means": [_means(ds, share) for ds in variants],
        "tokens": [_tokens(ds, chosen) for ds in variants],
    }


def _means(ds: xr.Dataset, share: float) -> list | None:
    """Of each head or case the components of largest mean change: index, mean, half-width, whether surely not 0."""
    try:
        pairs = (repairs_of_cases if "case" in ds.dims else who_repairs)(ds, share)
    except UsageError:  # of a smaller share than is looked at
        return None
    n = ds.sizes["component"]
    repair, reach = (pairs[name].values.reshape(-1, n) for name in ("repair", "repair_half_width"))
    known, own = (pairs[name].values.reshape(-1, n) for name in ("repair_known", "own"))
    found = []
    for mean, width, sure, itself in zip(repair, reach, known, own, strict=True):
        at = np.flatnonzero(~itself & np.isfinite(mean) & (mean != 0))
        at = at[np.argsort(-np.abs(mean[at]), kind="stable")]
        most, rest = at[:SHOWN], at[SHOWN:]
        rows = zip(
            most.tolist(), significant(mean[most]), significant(width[most]), sure[most].tolist(), strict=True
        )
        found.append(
            {"rows": [*map(list, rows)], "others": int(rest.size), "rest": float(f"{mean[rest].sum():.4g}")}
        )
    return found


def _tokens(ds: xr.Dataset, top: blocks.Top) -> dict[str, Any]:
    """Of each token the components of largest change, by case: tokens, indices, changes, and the sum of the others."""
    parts = [*blocks.stored_rows(ds.component_change, top)]
    entry = np.concatenate([np.empty(0, int), *(entries for entries, _ in parts)])
    change = np.concatenate([np.empty((0, ds.sizes["component"])), *(values for _, values in parts)])
    case, token = top.case[entry], top.token[entry]
    change = np.where(ablated_itself(ds)[case], 0, change)
    most = np.argsort(-np.abs(change), axis=1, kind="stable")[:, :SHOWN]
    largest = np.take_along_axis(change, most, 1)
    rest = change.sum(1) - largest.sum(1)
    step = step_for(np.concatenate([largest.ravel(), rest]), levels(largest.size))
    by_case = []
    for at in (np.flatnonzero(case == c) for c in range(len(blocks.done_cases(ds)))):
        at = at[np.argsort(token[at])]
        gaps = np.diff(token[at], prepend=0).astype(np.uint32)
        numbers = rounded(largest[at], step), rounded(rest[at], step)
        by_case.append(
            [at.size, packed(plain(gaps), plain(most[at].astype(np.uint16)), *map(plain, numbers))]
        )
    return {"step": step, "shown": most.shape[1], "cases": by_case}


def shared_out(top: blocks.Top, count: int, tail: str) -> blocks.Top:
    """At most `count` of the entries, as many of each case: the first at the tail."""
    cases = max(1, np.unique(top.case).size)
    order = np.lexsort((-ranked_by(top.effect, tail), top.case))
    rank = np.arange(order.size) - np.searchsorted(top.case[order], top.case[order])
    return top.of(np.sort(order[rank < max(1, count // cases)]))
