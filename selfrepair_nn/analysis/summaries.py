"""What each head and each layer do on average, over all tokens and over the top share."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.blocks import Sums, Top, direct_effects, done_cases, largest, ratios, read, sites
from selfrepair_nn.components import Head, select_heads
from selfrepair_nn.errors import UsageError
from selfrepair_nn.variables import SWEEP, VARIABLES

SHARE = 0.02
MEANS = (
    "direct_effect",
    "ablated_direct_effect",
    "logit_change",
    "self_repair",
    "from_heads",
    "from_mlps",
    "from_norm",
)
REQUIRED = ("selected", "done", *MEANS, "closure")
HEADS = SWEEP[:2]
ESTIMATED = ("half_width", "prompts_used", "layer_half_width")


def done_share(ds: xr.Dataset) -> xr.DataArray:
    """The share of its prompts that each head is done with, over (layer, head); NaN where it is not selected.

    Raises:
        UsageError: `ds` is not a store of the heads recipe.
    """
    check_store(ds)
    return (ds.done & ds.selected).mean("prompt").where(ds.selected)


def only(ds: xr.Dataset, layers: Any = None, heads: Any = None) -> xr.Dataset:
    """The store as if no other heads had been run; `layers` and `heads` as in `select_heads` ("8:12", "9.6,10.*").

    Raises:
        UsageError: a specification is misspelt or leaves nothing, or `ds` is not a store of the heads recipe.
    """
    require(ds, (*REQUIRED, *HEADS))
    wanted = select_heads(layers, heads, *(ds.attrs.get(f"n_{d}s", int(ds[d].max()) + 1) for d in HEADS))
    named = [[Head(i, j) in wanted for j in ds["head"].values] for i in ds["layer"].values]
    chosen = ds.selected & xr.DataArray(named, dims=HEADS)
    if not chosen.any():
        raise UsageError(f"the store holds no head of layers {layers!r} and heads {heads!r}: name others")
    return ds.assign(selected=chosen)


def every_token(ds: xr.Dataset) -> bool:
    """Whether a store, or its summary, is of every token, and not of each head's top share alone."""
    return "kept_share" not in ds.attrs


def top_share(ds: xr.Dataset, share: float = SHARE) -> xr.DataArray:
    """Whether a token is among a head's tokens of highest direct effect over the whole run (section 2.2).

    Boolean over (layer, head, prompt, position), one byte each: for every head exactly max(1, floor(share n))
    of its n done tokens, the first in the order of the store where direct effects are equal; none if n is 0.

    Raises:
        UsageError: `share` is not in (0, 1], or `ds` is not a store of the heads recipe.
    """
    check_share(share)
    check_store(ds)
    done = done_cases(ds)
    _, top = direct_effects(ds, done, share)
    marks = np.zeros((len(done), ds.sizes["prompt"] * ds.sizes["position"]), bool)
    marks[top.case, top.token] = True
    found = xr.DataArray(marks.reshape([ds.sizes[d] for d in SWEEP]), dims=SWEEP, name="top_share")
    labels = {d: ds[d] for d in SWEEP if d in ds.coords}
    return found.assign_coords(labels).assign_attrs(long_name=f"top {percent(share)} of the head", units="1")


def by_head(ds: xr.Dataset, share: float = SHARE) -> xr.Dataset:
    """Summaries of each head over (layer, head), NaN where nothing is done; in logits unless said.

    - x and top_x, for x in MEANS: mean over all done tokens, and over the top share (Equations 1 and 2);
    - self_repair_se, top_self_repair_se: standard error of the mean, prompts taken as independent;
    - distance, top_distance: (logit_change + direct_effect) / sqrt 2, from the line y = -x of Figure 2;
    - between, top_between: whether -1 < logit_change / direct_effect < 0, Figure 2's self-repaired heads;
    - repaired, top_repaired: whether self_repair has the sign of direct_effect and exceeds the noise floor;
    - norm_share: mean over the top share of clip(from_norm / direct_effect, 0, 1), no unit (Appendix A);
    - tokens, top_tokens: how many tokens the means are over; worst_closure: the largest |closure|;
    - selected(layer, head), noise_floor(layer) (NaN where the run did not measure it): from the store; and of a
      run until an interval is narrow half_width, prompts_used(layer, head) and layer_half_width(layer).

    Of a store of the top share alone, what is over all tokens is NaN.

    A result of this function is returned as it is: what takes a store also takes its summary.
    Memory: one block of prompts, and some 60 bytes for each token of each head's top share.

    Raises:
        UsageError: `share` is not in (0, 1] or not the summary's, or `ds` is not a store of the heads recipe.
    """
    check_share(share)
    if "top_self_repair" in ds:
        return same_share(ds, share)
    check_store(ds)
    return _by_site(ds, share)


def by_case(ds: xr.Dataset, share: float = SHARE) -> xr.Dataset:
    """What `by_head` gives, over (case): where several heads are ablated at once, or layers, or MLPs.

    `case_layer` is the first layer that each ablates. Memory and errors as in `by_head`.
    """
    check_share(share)
    if "top_self_repair" in ds:
        return same_share(ds, share)
    if "case" not in ds.dims:
        raise UsageError("this store has no cases, but a grid of heads: use by_head")
    require(ds, REQUIRED)
    check_axes(ds)
    return _by_site(ds, share)


def _by_site(ds: xr.Dataset, share: float) -> xr.Dataset:
    dims = sites(ds)
    shape = [ds.sizes[d] for d in dims]
    found = {name: (dims, values.reshape(shape)) for name, values in _summed_up(ds, share).items()}
    labels = {name: ds[name].variable for name in (*dims, "case_layer") if name in ds.coords}
    heads = xr.Dataset(found, labels, ds.attrs)
    heads = heads.assign(selected=ds.selected.variable.load(), noise_floor=_noise_floor(ds))
    heads = heads.assign({name: ds[name].variable.load() for name in ESTIMATED if name in ds})
    heads = heads.assign(_derived(heads, "") | _derived(heads, "top_"))
    sizes = {"prompts": ds.sizes["prompt"], "positions": ds.sizes["position"]}
    done = float(((ds.done & ds.selected).mean("prompt").where(ds.selected)).mean())
    return _describe(heads, share).assign_attrs(share=share, done_share=done, **sizes)


def by_layer(ds: xr.Dataset, share: float = SHARE) -> xr.Dataset:
    """Means over each layer's heads of what `by_head` gives, over (layer); `ds` is a store or its summary.

    Every head with something done counts once, however many tokens it has; `heads` says how many did. The
    means of `between` and `repaired` are shares of heads. `tokens` and `top_tokens` add up, `worst_closure`
    is the largest, `under_noise` says whether |top_self_repair| is under the noise floor. Errors as by_head.
    """
    heads = by_head(ds, share)
    some = heads.tokens > 0
    count = some.sum("head")
    left_out = ("selected", "noise_floor", "self_repair_se", "top_self_repair_se", *ESTIMATED)
    values = heads.drop_vars((*left_out, "head"), errors="ignore").astype(float).where(some, 0)
    totals = values.sum("head", skipna=False)
    layers = totals / count.where(count > 0)
    layers["worst_closure"] = values.worst_closure.max("head", skipna=False).where(count > 0)
    layers["noise_floor"] = heads.noise_floor
    layers["heads"] = count.assign_attrs(units="1", long_name="number of heads")
    for name in ("tokens", "top_tokens"):
        layers[name] = totals[name].astype(int)
    for name in heads.drop_vars(left_out, errors="ignore").data_vars:
        layers[name].attrs = heads[name].attrs
    under = abs(layers.top_self_repair) < heads.noise_floor
    layers["under_noise"] = under.assign_attrs(units="1", long_name="mean self-repair under the noise floor")
    layers.attrs = dict(heads.attrs)
    return layers


def most_repaired(ds: xr.Dataset, count: int = 5, share: float = SHARE) -> xr.Dataset:
    """The heads of highest mean self-repair on their top share, as in `by_head` but over (rank), best first.

    `layer` and `head` name them. A negative `count` asks for the most broken heads, worst first.
    """
    ranked = by_head(ds, share).stack(rank=HEADS)
    ranked = ranked.isel(rank=np.flatnonzero(ranked.tokens.values))
    order = np.argsort(-np.sign(count) * ranked.top_self_repair.values, kind="stable")[: abs(count)]
    return ranked.isel(rank=order).reset_index("rank")


def _summed_up(ds: xr.Dataset, share: float) -> dict[str, np.ndarray]:
    """What `by_head` reads off the store, over (case)."""
    done, n_positions = done_cases(ds), ds.sizes["position"]
    sums, top = direct_effects(ds, done, share)
    at = top.case * done.shape[1] + top.token // n_positions
    counts, top_counts = done * n_positions, np.bincount(at, minlength=done.size).reshape(done.shape)
    found = {"tokens": counts.sum(1), "top_tokens": top_counts.sum(1)}
    chosen = top.effect
    for name in MEANS:
        if name != "direct_effect":
            sums, chosen = read(ds, name, done, top)
        top_sums = np.bincount(at, chosen, done.size).reshape(done.shape)
        for prefix, values in (("", Sums(sums, counts)), ("top_", Sums(top_sums, top_counts))):
            found[prefix + name] = values.mean
            if name == "self_repair":
                found[f"{prefix}self_repair_se"] = values.error(done)
        if name == "from_norm":
            found["norm_share"] = _norm_share(chosen, top, found["top_tokens"])
    return found | {"worst_closure": largest(ds, "closure", done)}


def _norm_share(from_norm: np.ndarray, top: Top, tokens: np.ndarray) -> np.ndarray:
    """Section 3.2 and Appendix A: clipped per token; a token of no direct effect has nothing to repair."""
    shares = ratios(from_norm, top.effect)
    with np.errstate(invalid="ignore"):
        return np.bincount(top.case, np.clip(shares, 0, 1), len(tokens)) / tokens


def _derived(heads: xr.Dataset, prefix: str) -> dict[str, xr.DataArray]:
    effect, change, repair = (heads[prefix + n] for n in ("direct_effect", "logit_change", "self_repair"))
    return {
        f"{prefix}distance": (change + effect) / np.sqrt(2),
        f"{prefix}between": (change * effect < 0) & (abs(change) < abs(effect)),
        f"{prefix}repaired": repair * np.sign(effect) > heads.noise_floor.fillna(0),
    }


def _noise_floor(ds: xr.Dataset) -> xr.Variable:
    along, known = sites(ds)[0], "noise_floor" in ds
    values = ds.noise_floor.values.astype(float) if known else np.full(ds.sizes[along], np.nan)
    return xr.Variable(along, values, VARIABLES["noise_floor"].attributes)


def _describe(heads: xr.Dataset, share: float) -> xr.Dataset:
    """The summary with units and a name on each variable."""
    known = {n: (VARIABLES[n].units, f"mean {VARIABLES[n].long_name}") for n in MEANS} | {
        "self_repair_se": ("logit", "standard error of the mean self-repair"),
        "distance": ("logit", "distance from y = -x"),
        "between": ("1", "between y = -x and the x-axis"),
        "repaired": ("1", "self-repaired"),
        "tokens": ("1", "number of tokens"),
    }
    for name, (units, text) in known.items():
        heads[name].attrs = {"units": units, "long_name": text}
        heads[f"top_{name}"].attrs = {"units": units, "long_name": f"{text}, top {percent(share)} of tokens"}
    heads["norm_share"].attrs = {"units": "1", "long_name": "share of the direct effect repaired by the norm"}
    heads["worst_closure"].attrs = {"units": "logit", "long_name": "largest |closure|"}
    return heads


def percent(share: float) -> str:
    """A share as people write it: 0.02 is "2%"."""
    return f"{100 * share:.3g}%"


def check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise UsageError(f"share {share!r} is not in (0, 1]: write 0.02 for the top 2% of tokens")


def check_store(ds: xr.Dataset) -> None:
    """Raise UsageError unless `ds` is a store of single ablated heads, without an axis of variants."""
    require(ds, (*REQUIRED, *HEADS))
    check_axes(ds)


def require(ds: xr.Dataset, names: Iterable[str]) -> None:
    """Raise UsageError unless `ds` has these variables or dimensions."""
    missing = [name for name in names if name not in ds.variables and name not in ds.dims]
    if missing:
        raise UsageError(f"this is not a store of the heads recipe: it lacks {', '.join(missing)}")


def check_axes(ds: xr.Dataset) -> None:
    """Raise UsageError if `ds` has an axis of variants."""
    if axes := ", ".join(map(str, set(ds.logit_change.dims) - {"case", *SWEEP})):
        raise UsageError(f"this store has several values of {axes}: choose one, as ds.sel({axes}=…)")


def same_share(summary: xr.Dataset, share: float) -> xr.Dataset:
    if summary.attrs["share"] != share:
        raise UsageError(f"this summary is of share {summary.attrs['share']}, not {share!r}: give the store")
    return summary
