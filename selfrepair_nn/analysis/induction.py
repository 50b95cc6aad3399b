"""Heads that copy what followed the last time (section 5.3.1): which they are, and whether they are repaired."""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.summaries import HEADS, by_head, check_store, require_counted, share_of
from selfrepair_nn.blocks import Sums, done_cases, sums, token_counts
from selfrepair_nn.errors import UsageError

LEAST = 0.4
KINDS = ("induction", "previous token", "other")


def induction_by_head(ds: xr.Dataset, share: float | None = None, least: float = LEAST) -> xr.Dataset:
    """The summary of `by_head`, and over (layer, head):

    - induction: mean attention to the token after the same token in the first half;
    - previous_token: mean attention to the token before;
    - kind: "induction" where that score is at least `least`, else "previous token" where that one is, else "other".

    All are over the tokens that count: those whose next token can be known from the first half. A result of this
    function is returned as it is.

    Raises:
        UsageError: `ds` is not a store of the induction recipe, or of one that says which tokens count; else as
            `by_head`.
    """
    share = share_of(ds, share)
    if "induction" in ds:
        return by_head(ds, share)
    _check_attention(ds)
    heads = by_head(ds, share)
    found = {name: _score(ds.isel(distance=i)) for name, i in (("induction", -1), ("previous_token", 0))}
    kind = np.where(found["induction"] >= least, KINDS[0], KINDS[2])
    kind = np.where((kind == KINDS[2]) & (found["previous_token"] >= least), KINDS[1], kind)
    found["kind"] = kind.astype(object)
    heads = heads.assign({name: (HEADS, values) for name, values in found.items()})
    names = {"induction": "induction score", "previous_token": "previous-token score", "kind": "kind of head"}
    for name, text in names.items():
        heads[name].attrs = {"units": "1", "long_name": text}
    return heads.assign_attrs(least=least, period=int(ds.distance[-1]) + 1)


def by_kind(ds: xr.Dataset, share: float | None = None, least: float = LEAST) -> xr.Dataset:
    """Heads of each kind together, over (kind): means over heads of means over the tokens that count, in logits.

    - heads: how many; repaired: the share of them whose self-repair has the sign of the direct effect and exceeds the
      noise floor;
    - removed: the direct effect that the ablation takes away; logit_change; self_repair = logit_change + removed.

    `ds` is a store or a result of `induction_by_head`. Errors as there.
    """
    heads = induction_by_head(ds, share, least)
    removed = heads.direct_effect - heads.ablated_direct_effect
    of_heads = {"removed": removed, "logit_change": heads.logit_change, "self_repair": heads.self_repair}
    of_heads["repaired"] = heads.repaired.astype(float)
    known = heads.tokens > 0
    rows = [known & (heads.kind == kind) for kind in KINDS]
    found = {
        name: ("kind", [float(values.where(row).mean()) for row in rows]) for name, values in of_heads.items()
    }
    found["heads"] = ("kind", [int(row.sum()) for row in rows])
    return xr.Dataset(found, {"kind": list(KINDS)}, heads.attrs)


def _score(ds: xr.Dataset) -> np.ndarray:
    """Mean attention over the counted tokens, over (layer, head)."""
    done = done_cases(ds)
    mean = Sums(sums(ds, "attention", done), token_counts(ds, done)).mean
    return mean.reshape([ds.sizes[d] for d in HEADS])


def _check_attention(ds: xr.Dataset) -> None:
    check_store(ds)
    if "attention" not in ds or ds.sizes["distance"] != 2:
        raise UsageError(
            "this store holds no attention to the last token and to the repeated one: run induction"
        )
    require_counted(ds)
