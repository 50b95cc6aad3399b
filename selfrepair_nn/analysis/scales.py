"""What an ablation does to the length of the residual stream, and so to the final norm (section 3.2, Appendix D)."""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import HEADS, among, of_heads, restored, share_of
from selfrepair_nn.analysis.noise import COUNT, token_noise
from selfrepair_nn.analysis.summaries import by_head, described_widths
from selfrepair_nn.analysis.tokens import HALF_WIDTH, Tokens, clusters
from selfrepair_nn.analysis.variants import axis_of, by_variant
from selfrepair_nn.blocks import clean_ratios, clean_values, tokens_of
from selfrepair_nn.confidence import Tally
from selfrepair_nn.face import public
from selfrepair_nn.order_statistics import median_reach

RATIO = "S/S', clean to ablated scale of the final norm"
LENGTH = "length of the residual stream, ablated to clean"
MEDIAN = "median_residual_ratio"


@public
def scale_by_head(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """The summary of `by_head`, and over (layer, head), x over all counted tokens and top_x over the top share:

    - scale_ratio: mean of S/S', the final norm's clean scale divided by its ablated one (Figure 4);
    - above_one: share of tokens where it exceeds 1: the norm amplifies what is left;
    - x_half_width of both, and of the means over heads, as in `by_head`.

    Memory and errors as in `by_head`. A store of several variants: `by_variant(ds, share, scale_by_head)`.
    """
    ds = of_heads(ds)
    share = share_of(ds, share)
    tokens, _ = Tokens.of(ds, share)
    sums, above, chosen = clean_ratios(ds, "norm_scale", "ablated_norm_scale", tokens.done, tokens.top)
    heads = by_head(ds, share)
    for name, tally in tokens.both("scale_ratio", sums, chosen).items():
        heads = heads.assign(tokens.columns(name, tally.estimate))
    for name, tally in tokens.both("above_one", above, chosen > 1).items():
        heads = heads.assign(tokens.columns(name, tally.share))
    for name, text in {"scale_ratio": f"mean {RATIO}", "above_one": "tokens with S/S' above 1"}.items():
        heads[name].attrs = {"units": "1", "long_name": text}
        heads[f"top_{name}"].attrs = {"units": "1", "long_name": f"{text}, {among(share, ds)}"}
    return described_widths(heads)


@public
def token_variants(ds: xr.Dataset, share: float | None = None, count: int = COUNT) -> xr.Dataset:
    """What `token_noise` gives, of the same heads under every variant, along the store's axis; and on each token

    - scale_ratio: S/S', the final norm's clean scale divided by its ablated one; over (axis, rank) top_above_one, the
      share of the head's top tokens on which it exceeds 1, and top_above_one_half_width, as in `by_head`;
    - residual_ratio: length of the residual stream, ablated divided by clean; if the store holds it. Over (axis, rank)
      shortened, the share of tokens on which it is below 1, and median_residual_ratio; with x_half_width of both.

    Both are over (axis, rank, prompt, position), NaN where not done or not counted. Memory: for each token of
    each of these heads 8 bytes, and 24 for each variant.

    Raises:
        UsageError: the store has no variants; or as `token_noise` does.
    """
    ds = restored(ds)
    axis_of(ds)
    return by_variant(ds, share, lambda one, share: _with_ratios(one, share, count))


def _with_ratios(ds: xr.Dataset, share: float, count: int) -> xr.Dataset:
    ds = of_heads(ds)
    found = token_noise(ds, share, count)
    at = [ds.indexes[d].get_indexer(found[d].values) for d in HEADS]
    cases = np.ravel_multi_index(at, [ds.sizes[d] for d in HEADS])
    dims = ("rank", "prompt", "position")
    scale = clean_values(ds, "norm_scale")
    ratio = scale / tokens_of(ds, "ablated_norm_scale", cases)
    found["scale_ratio"] = (dims, ratio, {"units": "1", "long_name": RATIO})
    above, top = (found.scale_ratio.values > 1) & found.top.values, found.top.values
    known = Tally.of_prompts(above.sum(2), top.sum(2), clusters(ds)).share
    told = {"units": "1", "long_name": "top tokens with S/S' above 1"}
    found["top_above_one"] = ("rank", known.mean, told)
    found["top_above_one" + HALF_WIDTH] = ("rank", known.half_width)
    if "residual_norm" in ds:
        length = clean_values(ds, "residual_norm")
        ratio = tokens_of(ds, "ablated_residual_norm", cases) / length
        found["residual_ratio"] = (dims, ratio, {"units": "1", "long_name": LENGTH})
        known = Tally.of_prompts((ratio < 1).sum(2), np.isfinite(ratio).sum(2), clusters(ds)).share
        told = {"units": "1", "long_name": "tokens on which the residual stream is shortened"}
        found["shortened"] = ("rank", known.mean, told)
        found["shortened" + HALF_WIDTH] = ("rank", known.half_width)
        medians = np.array([_median(each, clusters(ds)) for each in ratio]).reshape(-1, 2)
        found[MEDIAN] = ("rank", medians[:, 0], {"units": "1", "long_name": f"median {LENGTH}"})
        found[MEDIAN + HALF_WIDTH] = ("rank", medians[:, 1])
    return described_widths(found)


def _median(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Of values [prompt, position], NaN where they do not count, and half its interval; `clusters` [prompt]."""
    known = np.isfinite(values)
    if not known.any():
        return np.nan, np.inf
    at = np.broadcast_to(clusters[:, None], values.shape)[known]
    return float(np.median(values[known])), float(median_reach(values[None, known], at)[0])
