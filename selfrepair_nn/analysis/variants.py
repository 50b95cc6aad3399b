"""Several graphs over the same heads, side by side: any summary along their axis, and what each changes."""

from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import HEADS, restored, same_share, share_of
from selfrepair_nn.analysis.partners import AXIS, several
from selfrepair_nn.analysis.remembering import once
from selfrepair_nn.analysis.summaries import by_head, described_widths
from selfrepair_nn.analysis.tokens import HALF_WIDTH, Columns, Tokens
from selfrepair_nn.blocks import read, sites
from selfrepair_nn.equations import PARTS
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public
from selfrepair_nn.quantities import TOKEN

Summary = Callable[[xr.Dataset, float], xr.Dataset]
PAIRED = ("logit_change", "self_repair", *PARTS, "from_norm")

SHARED = ("selected", "noise_floor", "tokens", "direct_effect", "top", "layer", "head")
"""What does not depend on the ablation, with top_ before it or not; half-widths of these do not either."""


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


@public
def by_variant(ds: xr.Dataset, share: float | None = None, summarise: Summary = by_head) -> xr.Dataset:
    """`summarise(variant, share)` of every variant along the store's axis; what all have in common is there once.

    The false discovery rate is that of each variant by itself; worst_closure (attribute) is the largest of all.
    Where partners are all that varies, along `resample`, each of them is a variant; beside other variants they are
    averaged, as everywhere.
    Memory: one block of prompts of all variants, and the summaries. Errors as in `axis_of` and `summarise`.
    """
    ds = restored(ds, average=not _of_partners_alone(ds))
    axis, share = axis_of(ds), share_of(ds, share)
    if "position" not in ds.dims:
        return same_share(ds, share)
    return once((axis, share, summarise), ds, lambda: _by_variant(ds, axis, share, summarise))


def _of_partners_alone(ds: xr.Dataset) -> bool:
    return several(ds) and {*ds.self_repair.dims} <= {AXIS, *TOKEN, *sites(ds), *HEADS}


def _by_variant(ds: xr.Dataset, axis: str, share: float, summarise: Summary) -> xr.Dataset:
    each = [summarise(ds.isel({axis: i}).drop_vars(axis), share) for i in range(ds.sizes[axis])]
    same = axis not in ds.direct_effect.dims  # else each is another model, of which nothing is the others'
    shared = [name for name in each[0].data_vars if same and _is_shared(str(name))]
    varied = [one.drop_vars(shared) for one in each]
    found = xr.concat(varied, ds[axis].variable.to_index_variable(), data_vars="all", coords="minimal")
    worst = [one.attrs["worst_closure"] for one in each if "worst_closure" in one.attrs]
    known = each[0].attrs | ({"worst_closure": max(worst)} if worst else {})
    known |= {"done_share": float(np.mean([one.attrs["done_share"] for one in each]))} if "done_share" in known else {}
    return found.assign({name: each[0][name] for name in shared}).assign_attrs(known)


def _is_shared(name: str) -> bool:
    own = name.removesuffix(HALF_WIDTH)
    for group in ("layer_", "overall_") if own != name else ():
        own = own.removeprefix(group)
    return name in SHARED or own.removeprefix("top_") in SHARED


@public
def differences(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """What each variant changes against the first, over (axis, layer, head) or (axis, case), in logits.

    x and top_x, for x in PAIRED as far as the store has it: mean over all counted tokens, and over each head's top
    share, of the variant's value minus the first's; x_se and top_x_se: standard errors of these means, token by token:
    smaller than those of two separate means; x_half_width: half the width of the 95% interval, and of the means over
    heads, as in `by_head`.
    Memory: one block of prompts of all variants.

    Raises:
        UsageError: as in `axis_of`, or `share` is not in (0, 1].
    """
    ds = restored(ds)
    share = share_of(ds, share)
    axis = axis_of(ds)
    if axis in ds.direct_effect.dims:
        raise UsageError(f"each {axis} is another model, with top tokens of its own: compare summaries, by_variant")
    tokens, _ = Tokens.of(ds, share)
    variants = [ds.isel({axis: i}) for i in range(ds.sizes[axis])]
    first = {name: read(variants[0], name, tokens.done, tokens.top) for name in PAIRED if name in ds}
    rows = [_against(one, first, tokens) for one in variants]
    found = {
        name: ((axis, *dims), np.stack([row[name][1] for row in rows])) for name, (dims, _) in rows[0].items()
    }
    labels = {d: ds[d].variable for d in (axis, *sites(ds), "case_sites", "case_layer") if d in ds.coords}
    return _describe(xr.Dataset(found, labels, ds.attrs))


def _against(ds: xr.Dataset, first: Mapping[str, tuple[np.ndarray, np.ndarray]], tokens: Tokens) -> Columns:
    """What one variant changes; `first` are the sums and the top tokens' values of the first."""
    found: Columns = {}
    for name, (first_sums, first_chosen) in first.items():
        sums, chosen = read(ds, name, tokens.done, tokens.top)
        for each, tally in tokens.both(name, sums - first_sums, chosen - first_chosen).items():
            known = tally.estimate
            found |= tokens.columns(each, known)
            found[f"{each}_se"] = (tokens.dims, known.error.reshape(tokens.shape))
    return found


def _describe(found: xr.Dataset) -> xr.Dataset:
    for name in [n for n in found.data_vars if not str(n).endswith(HALF_WIDTH)]:
        what = str(name).removeprefix("top_").removesuffix("_se").replace("_", " ")
        error = "standard error of the " if str(name).endswith("_se") else ""
        text = f"{error}mean change of {what} against the first variant"
        found[name].attrs = {"units": "logit", "long_name": text}
    return described_widths(found)
