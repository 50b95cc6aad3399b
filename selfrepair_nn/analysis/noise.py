"""Self-repair token by token (section 2.3): how far a head's direct effect tells what its ablation does."""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import HEADS, of_heads, share_of
from selfrepair_nn.analysis.summaries import by_head, described_widths
from selfrepair_nn.analysis.tokens import HALF_WIDTH, clusters
from selfrepair_nn.blocks import counted_tokens, direct_effects, done_cases, ratios, tokens_of
from selfrepair_nn.choosing import AGAINST
from selfrepair_nn.confidence import Tally, jackknife
from selfrepair_nn.face import public
from selfrepair_nn.quantities import QUANTITIES, asked_in, told_of
from selfrepair_nn.values import one_of

COUNT = 4
FATES = {
    "broken": "logit falls by more than the direct effect",
    "under": "repaired in part",
    "over": "repaired beyond the direct effect",
}


@public
def token_noise(
    ds: xr.Dataset, share: float | None = None, count: int = COUNT, against: str = "direct-effect"
) -> xr.Dataset:
    """Direct effect and logit change of every token of a few heads, and how they go together, over (rank).

    The heads are the `count` of largest mean direct effect in the last third of the model's layers; if no head
    there has anything done, of all layers; all heads if there are no more than `count` (choose with `only`).

    - layer, head: which head it is; direct_effect, removed, logit_change: over (rank, prompt, position), in logits or
      `in_nats`, NaN where not done or not counted; top: whether the token is in the head's top share (always by direct
      effect on the logit);
    - correlation: Pearson's, of direct effect and logit change; NaN if either never varies; correlation_half_width: of
      its 95% interval, by the jackknife over clusters of prompts, infinite where these are too few;
    - with r = logit_change / direct_effect, the share of tokens that are broken (r < -1: more is lost than the
      head wrote), under (-1 < r < 0: repaired in part, between the line y = -x and the x-axis) and over (r > 0:
      the logit moves the other way). What lies on a line exactly, or has no direct effect, is none of them.
      broken_half_width, under_half_width, over_half_width: half the widths of their 95% intervals, as in `by_head`;
    - tokens: how many tokens these are over. top_x is x over the head's top share; noise_floor: of the head's layer.

    With `against` "removed", correlation and r are of removed = direct_effect - ablated_direct_effect, what the
    ablation takes away, in the place of the direct effect.

    Memory: 24 bytes for each token of each of these heads.

    Raises:
        UsageError: `share` is not in (0, 1], `against` is neither, or `ds` is not a store of the heads recipe.
    """
    one_of("against", against, AGAINST)
    ds = of_heads(ds)
    share = share_of(ds, share)
    heads = by_head(ds, share)
    cases = strongest(heads, count)
    done = done_cases(ds)[cases, :, None] & counted_tokens(ds)
    effect, change = (tokens_of(ds, name, cases) for name in ("direct_effect", "logit_change"))
    top = _top(ds, share, cases)
    if asked_in(ds) == "logprob":  # as in `by_head`
        effect = removed = tokens_of(ds, "self_repair", cases) - change
    else:
        removed = effect - tokens_of(ds, "ablated_direct_effect", cases)
    dims = ("rank", "prompt", "position")
    axis = effect if against == "direct-effect" else removed
    named = {"direct_effect": effect, "removed": removed, "logit_change": change}
    found = {name: (dims, values) for name, values in named.items()}
    place = dict(zip(HEADS, np.unravel_index(cases, heads.tokens.shape), strict=True))
    found |= {"top": (dims, top), "noise_floor": ("rank", heads.noise_floor.values[place["layer"]])}
    found |= {d: ("rank", heads[d].values[at]) for d, at in place.items()}
    for prefix, counted in (("", done), ("top_", top)):
        rows = [_correlation(x[c], y[c]) for x, y, c in zip(axis, change, counted, strict=True)]
        widths = [_reach(x, y, c, clusters(ds)) for x, y, c in zip(axis, change, counted, strict=True)]
        found[f"{prefix}correlation{HALF_WIDTH}"] = ("rank", widths)
        found |= {f"{prefix}correlation": ("rank", rows), f"{prefix}tokens": ("rank", counted.sum((1, 2)))}
        for name, marks in _fates(axis, change).items():
            sums, counts = (marks & counted).sum(2), counted.sum(2)
            known = Tally.of_prompts(sums, counts, clusters(ds)).share
            found[prefix + name] = ("rank", known.mean)
            found[prefix + name + HALF_WIDTH] = ("rank", known.half_width)
    return _describe(xr.Dataset(found, attrs=heads.attrs | {"against": against}), heads)


def strongest(heads: xr.Dataset, count: int) -> np.ndarray:
    """The cases of the heads that `token_noise` takes, the largest mean direct effect first: [rank].

    Where the selection is split that is the mean of the half that selects.
    """
    known = (heads.tokens > 0).values
    if known.sum() > count:
        n_layers = heads.attrs.get("n_layers", int(heads["layer"].max()) + 1)
        late = known & (heads["layer"].values >= 2 * n_layers // 3)[:, None]
        known = late if late.any() else known
    means = heads.get("selecting_direct_effect", heads.direct_effect).values
    effects = np.where(known, means, -np.inf).ravel()
    return np.argsort(-effects, kind="stable")[: min(count, known.sum())]


def _top(ds: xr.Dataset, share: float, cases: np.ndarray) -> np.ndarray:
    """Which tokens are in the top share of some cases: bool [rank, prompt, position]."""
    done = done_cases(ds)
    done[np.setdiff1d(np.arange(len(done)), cases)] = False
    _, top = direct_effects(ds, done, share)
    marks = np.zeros((len(done), ds.sizes["prompt"] * ds.sizes["position"]), bool)
    marks[top.case, top.token] = True
    return marks[cases].reshape(-1, ds.sizes["prompt"], ds.sizes["position"])


def _correlation(effect: np.ndarray, change: np.ndarray) -> float:
    """Pearson's, of two vectors [token]."""
    varies = effect.size and np.ptp(effect) > 0 and np.ptp(change) > 0
    with np.errstate(over="ignore", invalid="ignore"):
        return np.corrcoef(effect, change)[0, 1] if varies else np.nan


def _reach(effect: np.ndarray, change: np.ndarray, counted: np.ndarray, clusters: np.ndarray) -> float:
    """Half the width of the correlation's interval, of [prompt, position], as if each cluster had not been there."""
    at = np.broadcast_to(clusters[:, None], counted.shape)[counted]
    x, y = (each[counted] - each[counted].mean() if counted.any() else each[counted] for each in (effect, change))
    _, place = np.unique(at, return_inverse=True)
    sums = np.array([np.bincount(place, term) for term in (np.ones(x.size), x, y, x * x, y * y, x * y)])
    n, x, y, xx, yy, xy = sums.sum(1, keepdims=True) - sums
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return float(jackknife((n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))))


def _fates(effect: np.ndarray, change: np.ndarray) -> dict[str, np.ndarray]:
    """Which tokens are broken, under- and over-repaired: bool, of the shape of both."""
    ratio = ratios(change, effect)
    return {"broken": ratio < -1, "under": (ratio > -1) & (ratio < 0), "over": ratio > 0}


def _describe(found: xr.Dataset, heads: xr.Dataset) -> xr.Dataset:
    for name in ("direct_effect", "logit_change"):
        found[name].attrs = told_of(found, name).attributes | {"units": heads[name].attrs["units"]}
    found.removed.attrs = {"units": heads.removed.attrs["units"], "long_name": "direct effect removed"}
    found.noise_floor.attrs = QUANTITIES["noise_floor"].attributes
    axis = "direct effect" if found.attrs["against"] == "direct-effect" else "what was removed"
    meanings = FATES | {"correlation": f"correlation of {axis} and logit change", "tokens": "tokens"}
    for name, text in meanings.items():
        found[name].attrs = {"units": "1", "long_name": text}
        found[f"top_{name}"].attrs = {"units": "1", "long_name": f"{text}, top share"}
    return described_widths(found).set_coords(HEADS)
