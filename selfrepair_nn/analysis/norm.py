"""What the final norm repairs: how much, as a share of the direct effect, and by which part (section 3)."""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import among, of_heads, share_of
from selfrepair_nn.analysis.selecting import every_token
from selfrepair_nn.analysis.summaries import by_head, described_widths
from selfrepair_nn.analysis.tokens import HALF_WIDTH, Tokens, entry_tally
from selfrepair_nn.blocks import Top, direct_effects, ratio_sums, ratios, read
from selfrepair_nn.choosing import tail_of
from selfrepair_nn.confidence import Estimate
from selfrepair_nn.face import public
from selfrepair_nn.quantities import QUANTITIES, asked_in

PARTS = ("norm_on_existing", "norm_on_change")
SHUFFLED = "shuffled_from_norm"
OF_MEANS = "norm_of_means"
SHUFFLED_SHARES = {
    "norm_shuffled": "repaired by the norm, shuffled target",
    "norm_over_shuffled": "repaired by the norm, less that of a shuffled target",
}


@public
def norm_by_head(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """The summary of `by_head`, and over (layer, head), x over all counted tokens and top_x over the top share:

    - norm_on_existing, norm_on_change: means of the two parts of from_norm, in logits (Appendix B);
    - norm_ratio: mean of from_norm / direct_effect as it is, not clipped, no unit (Figure 10; 0 for a token of no
      direct effect). A few tokens of hardly any direct effect decide it: the clipped one is `norm_share`;
    - norm_of_means: mean of from_norm / mean of direct_effect, both over the top share, no unit: unclipped too, but no
      single token decides it. NaN where the interval of the direct effect holds 0; layer_norm_of_means(layer): the same
      of the means over a layer's heads;
    - of a store that holds a shuffled target, that of another position (`Graph(also="shuffled_target")`):
      shuffled_from_norm, the mean of what the norm does to that, in logits; norm_shuffled, norm_share for it, over each
      head's top share by the direct effect on it, so that a head writes as much for it; norm_over_shuffled: norm_share
      minus that (NaN where the top share alone is kept): what is left is the norm's for the target;
    - x_half_width of each, and of the means over heads, as in `by_head`.

    A result of this function is returned as it is, and of log-probability (`in_nats`) the summary of `by_head`. Memory
    and errors as in `by_head`.
    """
    if "norm_ratio" in ds or asked_in(ds) == "logprob":
        return by_head(ds, share)
    ds = of_heads(ds)
    share = share_of(ds, share)
    found = by_head(ds, share).assign(dict(_read_off(ds, share)))
    names = {n: f"mean {QUANTITIES[n].long_name}" for n in (*PARTS, SHUFFLED) if n in found}
    names |= {"norm_ratio": "final norm / direct effect"}
    told = f"share of the direct effect repaired by the norm, ratio of means, {among(share, found)}"
    for name in (OF_MEANS, f"layer_{OF_MEANS}"):
        found[name].attrs = {"units": "1", "long_name": told}
    for name, text in SHUFFLED_SHARES.items():
        if name in found:
            found[name].attrs = {"units": "1", "long_name": f"share of the direct effect {text}"}
    for name, text in names.items():
        units = QUANTITIES[name].units if name in QUANTITIES else "1"
        found[name].attrs = {"units": units, "long_name": text}
        found[f"top_{name}"].attrs = {"units": units, "long_name": f"{text}, {among(share, found)}"}
    return described_widths(found)


def _shuffled(ds: xr.Dataset, share: float, tokens: Tokens) -> Iterator[tuple[str, tuple]]:
    """The clipped share of a shuffled target, where the head writes most for that, and what is left beyond it."""
    found = {name: np.full(tokens.done.shape[0], np.nan) for name in SHUFFLED_SHARES}
    if not every_token(ds):
        for name, values in found.items():
            yield name, (tokens.dims, values.reshape(tokens.shape))
            yield name + HALF_WIDTH, (tokens.dims, values.reshape(tokens.shape))
        return
    _, top = direct_effects(ds, tokens.done, share, "shuffled_direct_effect", tail_of(ds))
    known = _clipped(ds, tokens, top, SHUFFLED)
    yield from tokens.columns("norm_shuffled", known).items()
    yield from tokens.columns("norm_over_shuffled", _clipped(ds, tokens, tokens.top, "from_norm").minus(known)).items()


def _clipped(ds: xr.Dataset, tokens: Tokens, top: Top, name: str) -> Estimate:
    """Mean of a change by the norm as a share of the direct effect that ranks these tokens, clipped to 0 to 1."""
    _, chosen = read(ds, name, tokens.done, top)
    share = np.clip(ratios(chosen, top.effect * top.sign), 0, 1)
    at = top.case * tokens.done.shape[1] + top.token // ds.sizes["position"]
    return entry_tally(at, share, tokens.done.shape, tokens.clusters).estimate


def _of_means(tokens: Tokens, repaired: Estimate) -> Iterator[tuple[str, tuple]]:
    """A ratio of two means, of each head and of each layer's heads; NaN where the direct effect may be 0."""
    effect, group = tokens.top_tally(tokens.top.effect * tokens.top.sign).estimate, tokens.groups["layer"]
    pairs = [(OF_MEANS, tokens.dims, repaired, effect)]
    of_layers = (each.of_groups(group.index, group.count) for each in (repaired, effect))
    for name, dims, above, below in [*pairs, (f"layer_{OF_MEANS}", group.dims, *of_layers)]:
        shape = tokens.shape[: len(dims)]
        surely = abs(below.mean) > np.where(below.known, below.half_width, 0)
        known = above.over(below)
        yield name, (dims, np.where(surely, known.mean, np.nan).reshape(shape))
        yield name + HALF_WIDTH, (dims, np.where(surely, known.half_width, np.nan).reshape(shape))


def _read_off(ds: xr.Dataset, share: float) -> Iterator[tuple[str, tuple]]:
    tokens, _ = Tokens.of(ds, share)
    if SHUFFLED in ds:
        yield from _shuffled(ds, share, tokens)
    for name in (*PARTS, *((SHUFFLED,) if SHUFFLED in ds else ()), "from_norm"):
        sums, chosen = read(ds, name, tokens.done, tokens.top)
        if name == "from_norm":
            yield from _of_means(tokens, tokens.top_tally(chosen).estimate)
            name, sums = "norm_ratio", ratio_sums(ds, "from_norm", "direct_effect", tokens.done)
            chosen = ratios(chosen, tokens.top.effect * tokens.top.sign)
        for each, tally in tokens.both(name, sums, chosen).items():
            yield from tokens.columns(each, tally.estimate).items()
