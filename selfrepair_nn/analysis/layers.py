"""What the heads of each layer do on average, and which heads do most."""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import HEADS
from selfrepair_nn.analysis.summaries import ESTIMATED, by_head
from selfrepair_nn.analysis.tokens import HALF_WIDTH
from selfrepair_nn.choosing import tail_of
from selfrepair_nn.face import public

OF_SELF_REPAIR = ("self_repair_se", "p_value", "q_value", "repaired", "broken")
"""What is said of a head's mean self-repair besides its interval, with top_ before it or not."""


@public
def by_layer(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """Means over each layer's heads of what `by_head` gives, over (layer); `ds` is a store or its summary.

    Every head with something done counts once, however many tokens it has; `heads` says how many did. x_half_width is
    half the width of the mean's 95% interval. `repaired`, `broken` are shares of the heads that have an interval, which
    `tested` counts, and so with top_; norm_of_means of `norm_by_head` is the ratio of two means over all of them;
    `between` is a share of `heads`. `tokens` and `top_tokens` add up, `worst_closure` is the largest, `under_noise`
    says whether |top_self_repair| is under the noise floor. Errors as by_head.
    """
    heads = by_head(ds, share)
    some = heads.tokens > 0
    count = some.sum("head")
    values = heads[_averaged(heads)].drop_vars("head", errors="ignore").astype(float).where(some, 0)
    totals = values.sum("head", skipna=False)
    layers = totals / count.where(count > 0)
    for name in layers.data_vars:
        layers[name].attrs = heads[name].attrs
    layers["worst_closure"] = values.worst_closure.max("head", skipna=False).where(count > 0)
    layers["noise_floor"] = heads.noise_floor
    layers["heads"] = count.assign_attrs(units="1", long_name="number of heads")
    for name in ("tokens", "top_tokens"):
        layers[name] = totals[name].astype(int).assign_attrs(heads[name].attrs)
    layers = layers.assign(_shares(heads, "") | _shares(heads, "top_"))
    widths = {n: heads[f"layer_{n}"] for n in (f"{n}{HALF_WIDTH}" for n in totals) if f"layer_{n}" in heads}
    own = {n: heads[f"layer_{n}"] for n in totals if f"layer_{n}" in heads}
    under = abs(layers.top_self_repair) < heads.noise_floor
    layers["under_noise"] = under.assign_attrs(units="1", long_name="mean self-repair under the noise floor")
    layers.attrs = dict(heads.attrs)
    return layers.assign(widths | own)


def _averaged(heads: xr.Dataset) -> list[str]:
    """The variables of which a layer's mean is taken."""
    left_out = {"selected", *ESTIMATED, *OF_SELF_REPAIR}
    return [
        str(name)
        for name in heads.data_vars
        if {*HEADS} <= {*heads.variables[name].dims}
        and heads.variables[name].dtype.kind in "fib"
        and str(name).removeprefix("top_") not in left_out
        and not str(name).endswith(HALF_WIDTH)
    ]


def _shares(heads: xr.Dataset, prefix: str) -> dict[str, xr.DataArray]:
    tested = heads[f"{prefix}p_value"].notnull().sum("head")
    found = {f"{prefix}tested": tested.assign_attrs(units="1", long_name="heads with an interval")}
    for name in (f"{prefix}repaired", f"{prefix}broken"):
        found[name] = (heads[name].sum("head") / tested.where(tested > 0)).assign_attrs(heads[name].attrs)
    return found


@public
def most_repaired(ds: xr.Dataset, count: int = 5, share: float | None = None) -> xr.Dataset:
    """The heads of highest mean self-repair on their top share, as in `by_head` but over (rank), best first.

    On a bottom share, of tokens that the head writes against, that is the lowest mean.

    `layer` and `head` name them. A negative `count` asks for the most broken heads, worst first. They are ranked by
    what was measured: the first of many are likely to have been measured too high, which no interval of theirs says.
    Where the selection is split (`choose_tokens`) they are ranked by the half that selects, and so are not.
    """
    ranked = by_head(ds, share).stack(rank=HEADS)
    ranked = ranked.isel(rank=np.flatnonzero(ranked.tokens.values))
    by = ranked.get("selecting_top_self_repair", ranked.top_self_repair)
    best = np.sign(count) * (-1 if tail_of(ranked) == "bottom" else 1)
    order = np.argsort(-best * by.values, kind="stable")[: abs(count)]
    return ranked.isel(rank=order).reset_index("rank")
