"""What an ablation does to the length of the residual stream, and so to the final norm (section 3.2, Appendix D)."""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.noise import COUNT, token_noise
from selfrepair_nn.analysis.summaries import HEADS, SHARE, by_head, check_store, percent
from selfrepair_nn.analysis.variants import axis_of, by_variant
from selfrepair_nn.blocks import clean_ratios, clean_values, direct_effects, done_cases, tokens_of

RATIO = "S/S', clean to ablated scale of the final norm"
LENGTH = "length of the residual stream, ablated to clean"


def scale_by_head(ds: xr.Dataset, share: float = SHARE) -> xr.Dataset:
    """The summary of `by_head`, and over (layer, head), x over all done tokens and top_x over the top share:

    - scale_ratio: mean of S/S', the final norm's clean scale divided by its ablated one (Figure 4);
    - above_one: share of tokens where it exceeds 1: the norm amplifies what is left.

    Memory and errors as in `by_head`. A store of several variants: `by_variant(ds, share, scale_by_head)`.
    """
    check_store(ds)
    done = done_cases(ds)
    _, top = direct_effects(ds, done, share)
    sums, above, chosen = clean_ratios(ds, "norm_scale", "ablated_norm_scale", done, top)
    tokens, top_tokens = done.sum(1) * ds.sizes["position"], np.bincount(top.case, minlength=len(done))
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
        heads[f"top_{name}"].attrs = {"units": "1", "long_name": f"{text}, top {percent(share)}"}
    return heads


def token_variants(ds: xr.Dataset, share: float = SHARE, count: int = COUNT) -> xr.Dataset:
    """What `token_noise` gives, of the same heads under every variant, along the store's axis; and on each token

    - scale_ratio: S/S', the final norm's clean scale divided by its ablated one;
    - residual_ratio: length of the residual stream, ablated divided by clean; if the store holds it.

    Both are over (axis, rank, prompt, position), NaN where not done. Memory: for each token of each of these heads
    8 bytes, and 24 for each variant.

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
    done = ~np.isnan(found.direct_effect.values)

    def on_tokens(name: str) -> np.ndarray:
        return np.where(done, tokens_of(ds, name, cases), np.nan)

    scale = clean_values(ds, "norm_scale")
    found["scale_ratio"] = (dims, scale / on_tokens("ablated_norm_scale"), {"units": "1", "long_name": RATIO})
    if "residual_norm" in ds:
        length = clean_values(ds, "residual_norm")
        ratio = on_tokens("ablated_residual_norm") / length
        found["residual_ratio"] = (dims, ratio, {"units": "1", "long_name": LENGTH})
    return found
