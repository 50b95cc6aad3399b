"""Heads that copy what followed the last time (section 5.3.1): which they are, and whether they are repaired."""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import HEADS, of_heads, require_counted, share_of
from selfrepair_nn.analysis.summaries import by_head, summed_up
from selfrepair_nn.analysis.tokens import HALF_WIDTH, Groups, clusters
from selfrepair_nn.blocks import done_cases, sums, token_counts
from selfrepair_nn.confidence import Estimate, Tally
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public

LEAST = 0.4
KINDS = ("induction", "previous token", "other")


@public
def induction_by_head(ds: xr.Dataset, share: float | None = None, least: float = LEAST) -> xr.Dataset:
    """The summary of `by_head`, and over (layer, head):

    - induction: mean attention to the token after the same token in the first half;
    - previous_token: mean attention to the token before;
    - kind: "induction" where that score is at least `least`, else "previous token" where that one is, else "other";
    - induction_half_width, previous_token_half_width: half the widths of the scores' 95% intervals;
    - kind_x_half_width(kinds), for x as in `by_head`: of the means over the heads of each of KINDS.

    All are over the tokens that count: those whose next token can be known from the first half. A result of this
    function is returned as it is.

    Raises:
        UsageError: `ds` is not a store of the induction recipe, or of one that says which tokens count; else as
            `by_head`.
    """
    if "induction" in ds:
        return by_head(ds, share)
    ds = _of_attention(ds)
    scores = {name: _score(ds.isel(distance=i)) for name, i in (("induction", -1), ("previous_token", 0))}
    copies, previous = (known.mean >= least for known in scores.values())
    kind = np.where(copies, 0, np.where(previous, 1, 2))
    groups = Groups(("kinds",), np.where(done_cases(ds).any(1), kind, -1), len(KINDS))
    heads = summed_up(ds, share_of(ds, share), {"kind": groups})
    names = {"induction": "induction score", "previous_token": "previous-token score", "kind": "kind of head"}
    found = {"kind": np.array(KINDS, object)[kind]}
    for name, known in scores.items():
        found |= {name: known.mean, name + HALF_WIDTH: known.half_width}
        names[name + HALF_WIDTH] = f"half-width of the 95% interval of the {names[name]}"
    shape = heads.tokens.shape
    heads = heads.assign({name: (HEADS, values.reshape(shape)) for name, values in found.items()})
    for name, text in names.items():
        heads[name].attrs = {"units": "1", "long_name": text}
    return heads.assign_attrs(least=least, period=int(ds.distance[-1]) + 1)


@public
def by_kind(ds: xr.Dataset, share: float | None = None, least: float = LEAST) -> xr.Dataset:
    """Heads of each kind together, over (kind): means over heads of means over the tokens that count, in logits.

    - heads: how many; tested: how many of them have an interval; repaired: the share of these that are repaired, as
      `by_head` says it, NaN where there are none;
    - removed: the direct effect that the ablation takes away; logit_change; self_repair = logit_change + removed;
      x_half_width of these: half the width of the mean's 95% interval.

    `ds` is a store or a result of `induction_by_head`. Errors as there.
    """
    heads = induction_by_head(ds, share, least)
    rows = [(heads.tokens > 0) & (heads.kind == kind) for kind in KINDS]
    found = {}
    for name in ("removed", "logit_change", "self_repair"):
        found[name] = ("kind", [float(heads[name].where(row).mean()) for row in rows])
        found[name + HALF_WIDTH] = ("kind", heads[f"kind_{name}{HALF_WIDTH}"].values)
    tested = np.array([int((row & heads.p_value.notnull()).sum()) for row in rows])
    repaired = np.array([int((row & heads.repaired).sum()) for row in rows])
    found["repaired"] = ("kind", np.divide(repaired, tested, np.full(len(KINDS), np.nan), where=tested > 0))
    found |= {"tested": ("kind", tested), "heads": ("kind", [int(row.sum()) for row in rows])}
    return xr.Dataset(found, {"kind": list(KINDS)}, heads.attrs)


def _score(ds: xr.Dataset) -> Estimate:
    """Mean attention over the counted tokens."""
    done = done_cases(ds)
    return Tally.of_prompts(sums(ds, "attention", done), token_counts(ds, done), clusters(ds)).estimate


def _of_attention(ds: xr.Dataset) -> xr.Dataset:
    ds = of_heads(ds)
    if "attention" not in ds or ds.sizes["distance"] != 2:
        raise UsageError(
            "this store holds no attention to the last token and to the repeated one: run induction"
        )
    require_counted(ds)
    return ds
