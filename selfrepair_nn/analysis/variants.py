"""Several graphs over the same heads, side by side: any summary along their axis, and what each changes."""

from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.summaries import by_head, same_share, share_of
from selfrepair_nn.blocks import Sums, Top, direct_effects, done_cases, read, sites, token_counts
from selfrepair_nn.errors import UsageError
from selfrepair_nn.variables import TOKEN

Summary = Callable[[xr.Dataset, float], xr.Dataset]
PAIRED = ("logit_change", "self_repair", "from_heads", "from_mlps", "from_norm")

SHARED = ("selected", "noise_floor", "tokens", "direct_effect", "top", "layer", "head")
"""What does not depend on the ablation, with top_ before it or not."""


def axis_of(ds: xr.Dataset) -> str:
    """The dimension along which the variants of a store, or of a summary of one, lie.

    Raises:
        UsageError: it has none.
    """
    found = [d for d in ds.self_repair.dims if d not in (*TOKEN, *sites(ds))] if "self_repair" in ds else []
    if not found:
        raise UsageError(
            "this store holds one graph, not several variants: there is nothing to put side by side"
        )
    return str(found[0])


def by_variant(ds: xr.Dataset, share: float | None = None, summarise: Summary = by_head) -> xr.Dataset:
    """`summarise(variant, share)` of every variant along the store's axis; what all have in common is there once.

    Memory: one block of prompts of all variants, and the summaries. Errors as in `axis_of` and `summarise`.
    """
    axis, share = axis_of(ds), share_of(ds, share)
    if "position" not in ds.dims:
        return same_share(ds, share)
    each = [summarise(ds.isel({axis: i}).drop_vars(axis), share) for i in range(ds.sizes[axis])]
    shared = [name for name in each[0].data_vars if name in SHARED or name.removeprefix("top_") in SHARED]
    varied = [one.drop_vars(shared) for one in each]
    found = xr.concat(varied, ds[axis].variable.to_index_variable(), data_vars="all", coords="minimal")
    return found.assign({name: each[0][name] for name in shared}).assign_attrs(each[0].attrs)


def differences(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """What each variant changes against the first, over (axis, layer, head) or (axis, case), in logits.

    x and top_x, for x in PAIRED: mean over all counted tokens, and over each head's top share, of the variant's value
    minus the first's; x_se and top_x_se: standard errors of these means, token by token and with prompts taken as
    independent: smaller than those of two separate means. Memory: one block of prompts of all variants.

    Raises:
        UsageError: as in `axis_of`, or `share` is not in (0, 1].
    """
    share = share_of(ds, share)
    axis, dims = axis_of(ds), sites(ds)
    done = done_cases(ds)
    _, top = direct_effects(ds, done, share)
    variants = [ds.isel({axis: i}) for i in range(ds.sizes[axis])]
    first = {name: read(variants[0], name, done, top) for name in PAIRED}
    rows = [_against(one, first, done, top) for one in variants]
    shape = [len(rows), *(ds.sizes[d] for d in dims)]
    found = {name: ((axis, *dims), np.reshape([row[name] for row in rows], shape)) for name in rows[0]}
    labels = {d: ds[d].variable for d in (axis, *dims, "case_layer") if d in ds.coords}
    return _describe(xr.Dataset(found, labels, ds.attrs))


def _against(
    ds: xr.Dataset, first: Mapping[str, tuple[np.ndarray, np.ndarray]], done: np.ndarray, top: Top
) -> dict[str, np.ndarray]:
    """What one variant changes, over (case); `first` are the sums and the top tokens' values of the first."""
    counts = token_counts(ds, done)
    at = top.case * done.shape[1] + top.token // ds.sizes["position"]
    top_counts = np.bincount(at, minlength=done.size).reshape(done.shape)
    found = {}
    for name, (first_sums, first_chosen) in first.items():
        sums, chosen = read(ds, name, done, top)
        top_sums = np.bincount(at, chosen - first_chosen, done.size).reshape(done.shape)
        for prefix, values in (("", Sums(sums - first_sums, counts)), ("top_", Sums(top_sums, top_counts))):
            found[prefix + name] = values.mean
            found[f"{prefix}{name}_se"] = values.error(done)
    return found


def _describe(found: xr.Dataset) -> xr.Dataset:
    for name, values in found.data_vars.items():
        what = name.removeprefix("top_").removesuffix("_se").replace("_", " ")
        error = "standard error of the " if name.endswith("_se") else ""
        values.attrs = {
            "units": "logit",
            "long_name": f"{error}mean change of {what} against the first variant",
        }
    return found
