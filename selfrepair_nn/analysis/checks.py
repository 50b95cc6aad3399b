"""What a function of analysis may be given: which dataset, and which share; what a selection of it left out."""

from collections.abc import Iterable

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.partners import averaged
from selfrepair_nn.blocks import counted_share
from selfrepair_nn.choosing import tail_of
from selfrepair_nn.errors import UsageError
from selfrepair_nn.quantities import IN_NATS, OF_MODELS, QUANTITIES, SWEEP, asked_in, usual_share

MEANS = (
    "direct_effect",
    "ablated_direct_effect",
    "logit_change",
    "self_repair",
    "from_heads",
    "from_mlps",
    "from_norm",
)
"""What a store of heads, MLPs and norms has means of."""
OF_SOME = tuple(name for name, q in QUANTITIES.items() if q.when in (*OF_MODELS, "total") or name == "rerouted")
REQUIRED = ("selected", "done", *MEANS, "closure")
HEADS = SWEEP[:2]
DIMS = ("case", *SWEEP)


def meant(ds: xr.Dataset) -> tuple[str, ...]:
    """What a store has means of: MEANS, but for record "total", and what some models have beside them."""
    return tuple(name for name in (*MEANS, *OF_SOME) if name in ds)


def required(ds: xr.Dataset) -> tuple[str, ...]:
    """Variables without which a dataset is no store of ours."""
    if asked_in(ds) == "logprob":
        return ("selected", "done", "direct_effect", *IN_NATS)
    split = "from_components" not in ds
    return tuple(name for name in REQUIRED if split or QUANTITIES[name].unless != "total")


def restored(ds: xr.Dataset, average: bool = True) -> xr.Dataset:
    """A store, or a part of one, with every dimension that a selection such as ds.sel(layer=6) took, of length 1.

    What is large is left as it is, to be read block by block, and what ds.where did to flags and labels is undone.
    Where every prompt has several partners each token has its mean over them, as `partners.averaged` has it, unless
    these are not to be averaged.
    A dataset that lacks nothing, or is no store, is returned as it is.
    """
    if "done" not in ds.variables:
        return ds
    ds = averaged(ds) if average else ds
    lost = [d for d in DIMS if d in ds.coords and not ds[d].ndim]
    grid = "case" not in ds.coords
    found = {}
    for name in sorted({*map(str, ds.variables)} & {*QUANTITIES}):
        dims = QUANTITIES[name].dims_in(grid)
        if "position" not in dims or len(dims) <= 2:
            array = _with(ds.variables[name], dims, lost, QUANTITIES[name].kind == "bool")
            found |= {} if array is ds.variables[name] else {name: array}
    if not found:
        return ds
    labels = {name: found.pop(name) for name in [*found] if name in ds.coords}
    return ds.drop_vars(lost).assign_coords(labels).assign(found)


def _with(array: xr.Variable, dims: tuple[str, ...], lost: list[str], flag: bool) -> xr.Variable:
    missing = [d for d in dims if d in lost and d not in array.dims]
    beyond = [d for d in array.dims if d in DIMS and d not in dims]
    if beyond:
        array = array.max(beyond)
    if flag and array.dtype != bool:
        array = array.copy(data=array.values == True)  # noqa: E712 - NaN is no
    if not missing:
        return array
    values = array.values[(np.newaxis,) * len(missing)]
    return xr.Variable((*missing, *array.dims), values, array.attrs, array.encoding)


def of_heads(ds: xr.Dataset) -> xr.Dataset:
    """`ds` as a store of single ablated heads, `restored`. Raise UsageError if it is none, or has several variants."""
    ds = restored(ds)
    require(ds, (*required(ds), *HEADS))
    check_axes(ds)
    return ds


def of_cases(ds: xr.Dataset) -> xr.Dataset:
    """`ds` as a store of cases, `restored`. Raise UsageError if it is none, or has several variants."""
    ds = restored(ds)
    if "case" not in ds.dims:
        raise UsageError("this store has no cases, but a grid of heads: use by_head")
    require(ds, required(ds))
    check_axes(ds)
    return ds


def require(ds: xr.Dataset, names: Iterable[str]) -> None:
    """Raise UsageError unless `ds` has these variables or dimensions."""
    missing = [name for name in names if name not in ds.variables and name not in ds.dims]
    if missing:
        raise UsageError(f"this is not a store of the heads recipe: it lacks {', '.join(missing)}")


def check_axes(ds: xr.Dataset) -> None:
    """Raise UsageError if `ds` has an axis of variants."""
    if axes := ", ".join(map(str, set(ds.logit_change.dims) - {"case", *SWEEP})):
        raise UsageError(f"this store has several values of {axes}: choose one, as ds.sel({axes}=…)")


def require_counted(ds: xr.Dataset) -> None:
    """Raise UsageError unless the store of a task says which tokens are asked about."""
    if "counted" not in ds:
        raise UsageError("this store does not say which tokens count, an older version made it: run it again")


def share_of(ds: xr.Dataset, share: float | None) -> float:
    """The share that is asked for, or `usual_share` of a store or a summary. UsageError if it is not in (0, 1]."""
    if share is None:
        some = "counted" in ds and counted_share(ds) < 1
        return usual_share(not some and ds.attrs.get("counted_share", 1) == 1)
    if not 0 < share <= 1:
        raise UsageError(f"share {share!r} is not in (0, 1]: write 0.02 for the top 2% of tokens")
    return share


def require_top(ds: xr.Dataset, what: str) -> None:
    """Raise UsageError if another tail is chosen of what a store holds for each head's top share alone."""
    if (tail := tail_of(ds)) != "top":
        raise UsageError(
            f"this store holds {what} for each head's top share of tokens alone, not for the tail {tail!r}: leave the "
            "tail out here"
        )


def same_share(summary: xr.Dataset, share: float) -> xr.Dataset:
    """The summary, if it is of this share; else UsageError."""
    if summary.attrs["share"] != share:
        raise UsageError(f"this summary is of share {summary.attrs['share']}, not {share!r}: give the store")
    return summary


def percent(share: float) -> str:
    """A share as people write it: 0.02 is "2%"."""
    return f"{100 * share:.3g}%"


SHARES = {"top": "top {} of tokens", "bottom": "bottom {} of tokens", "absolute": "{} of tokens of largest |DE|"}
"""What a share of tokens is called, by its tail."""


def among(share: float, *of: xr.Dataset) -> str:
    """What a statistic of this share of datasets or summaries is over.

    Raises:
        UsageError: their shares are of different tails.
    """
    tails = {*map(tail_of, of)} or {"top"}
    if len(tails) > 1:
        raise UsageError(f"these are shares of different tails, {' and '.join(sorted(tails))}: choose the same for all")
    [tail] = tails
    if share < 1:
        return SHARES[tail].format(percent(share))
    return "tokens that count" + (", along the sign of DE" if tail == "absolute" else "")


def throughout(*summaries: xr.Dataset) -> str:
    """What their statistics without a top share are over."""
    all_count = all(heads.attrs.get("counted_share", 1) == 1 for heads in summaries)
    return "all tokens" if all_count else "tokens that count"
