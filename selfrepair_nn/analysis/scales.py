"""What an ablation does to the length of the residual stream, and so to the final norm (section 3.2, Appendix D)."""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.noise import COUNT, token_noise
from selfrepair_nn.analysis.summaries import HEADS, among, by_head, check_store, share_of
from selfrepair_nn.analysis.variants import axis_of, by_variant
from selfrepair_nn.blocks import clean_ratios, direct_effects, done_cases, token_counts, tokens_of

RATIO = "S/S', clean to ablated scale of the final norm"
LENGTH = "length of the residual stream, ablated to clean"


def scale_by_head(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """The summary of `by_head`, and over (layer, head), x over all counted tokens and top_x over the top share:

    - scale_ratio: mean of S/S', the final norm's clean scale divided by its ablated one (Figure 4);
    - above_one: share of tokens where it exceeds 1: the norm amplifies what is left.

    Memory and errors as in `by_head`. A store of several variants: `by_variant(ds, share, scale_by_head)`.
    """
    share = share_of(ds, share)
    check_store(ds)
    done = done_cases(ds)
    _, top = direct_effects(ds, done, share)
    sums, above, chosen = clean_ratios(ds, "norm_scale", "ablated_norm_scale", done, top)
    tokens, top_tokens = token_counts(ds, done).sum(1), np.bincount(top.case, minlength=len(done))
    with np.errstate(invalid="ignore"):
        found = {
            "scale_ratio": sums.sum(1) / tokens,
            "above_one": above.sum(1) / tokens,
            "top_scale_ratio": np.bincount(top.case, chosen, len(done)) / top_tokens,
            "top_above_one": np.bincount(top.case, chosen > 1, len(done)) / top_tokens,
        }
    heads = by_head(ds, share)
    heads = heads.assign({name: (HEADS, v.reshape(heads.tokens.shape)) for name, v in found.items()})
    for name, text in {"scale_ratio": f"mean {RATIO}", "above_one": "tokens with S/S' above 1"}.items():
        heads[name].attrs = {"units": "1", "long_name": text}
        heads[f"top_{name}"].attrs = {"units": "1", "long_name": f"{text}, {among(share)}"}
    return heads


def token_variants(ds: xr.Dataset, share: float | None = None, count: int = COUNT) -> xr.Dataset:
    """What `token_noise` gives, of the same heads under every variant, along the store's axis; and on each token

    - scale_ratio: S/S', the final norm's clean scale divided by its ablated one;
    - residual_ratio: length of the residual stream, ablated divided by clean; if the store holds it.

    Both are over (axis, rank, prompt, position), NaN where not done or not counted. Memory: for each token of
    each of these heads 8 bytes, and 24 for each variant.

    Raises:
        UsageError: the store has no variants; or as `token_noise` does.
    """
    axis_of(ds)
    return by_variant(ds, share, lambda one, share: _with_ratios(one, share, count))


def _with_ratios(ds: xr.Dataset, share: float, count: int) -> xr.Dataset:
    found = token_noise(ds, share, count)
    at = [ds.indexes[d].get_indexer(found[d].values) for d in HEADS]
    cases = np.ravel_multi_index(at, [ds.sizes[d] for d in HEADS])
    dims = ("rank", "prompt", "position")
    scale = ds.norm_scale.transpose("prompt", "position").values
    ratio = scale / tokens_of(ds, "ablated_norm_scale", cases)
    found["scale_ratio"] = (dims, ratio, {"units": "1", "long_name": RATIO})
    if "residual_norm" in ds:
        length = ds.residual_norm.transpose("prompt", "position").values
        ratio = tokens_of(ds, "ablated_residual_norm", cases) / length
        found["residual_ratio"] = (dims, ratio, {"units": "1", "long_name": LENGTH})
    return found
