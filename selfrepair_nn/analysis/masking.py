"""Whether what a head's ablation shows is masked by self-repair, and how surely that can be told."""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import among, of_heads, share_of
from selfrepair_nn.analysis.summaries import by_head
from selfrepair_nn.analysis.tokens import Tokens
from selfrepair_nn.blocks import read
from selfrepair_nn.confidence import RATE, Tally, q_values
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public
from selfrepair_nn.quantities import asked_in
from selfrepair_nn.values import number

SMALL = 0.1
"""Self-repair that surely is less than this part of what was removed masks nothing."""
MASKED, PLAIN, AMPLIFIED, UNKNOWN = "masked", "not masked", "amplified", "cannot be told"


@public
def masking(ds: xr.Dataset, share: float | None = None, *, small: float = SMALL) -> xr.Dataset:
    """The summary of `by_head`, and over (layer, head) whether the logit's change hides what the ablation took.

    Of means over each head's top share of tokens, with removed = direct_effect - ablated_direct_effect:

    - verdict: "masked" where self_repair surely has the sign of removed, so that the logit loses less than was taken;
      "amplified" where it surely has the other sign; "not masked" where it surely lies within `small` times removed,
      of either sign, whether it is known to differ from 0 or not; else "cannot be told";
    - masking_q_value: of self_repair or removed being 0 (the larger of the two p-values, an intersection-union test),
      controlled for the number of heads (false discovery rate); at most 5% for "masked" and "amplified", whose
      self_repair also exceeds the noise floor;
    - small_q_value: of |self_repair| not being below `small` times removed (two one-sided tests: Schuirmann 1987, A
      comparison of the two one-sided tests procedure and the power approach), controlled alike; at most 5% for "not
      masked".

    Nothing is told where there is no interval, and of no head where the parts miss the whole by more than rounding can
    (worst_closure above closure_limit). Memory as in `by_head`.

    Raises:
        UsageError: `small` is not between 0 and 1, `ds` is in nats, or as in by_head.
    """
    if not 0 < number("small", small) < 1:
        raise UsageError(f"small {small!r} is a part of what was removed: give a number between 0 and 1")
    if asked_in(ds) == "logprob":
        raise UsageError("masking is told of logits: give the store as it is, not in nats")
    ds, share = of_heads(ds), share_of(ds, share)
    heads = by_head(ds, share)
    differs, within = (q_values(p) for p in _p_values(ds, share, small))
    found = {"masking_q_value": differs, "small_q_value": within}
    known = {name: (heads.tokens.dims, q.reshape(heads.tokens.shape)) for name, q in found.items()}
    heads = heads.assign(known).assign_attrs(small=small)
    heads["verdict"] = heads.tokens.dims, _verdicts(heads)
    for name, text in {"masking_q_value": "masked or amplified", "small_q_value": "not masked"}.items():
        told = f"false discovery rate of {text}, {among(share, heads)}"
        heads[name].attrs = {"units": "1", "long_name": told}
    heads["verdict"].attrs = {"units": "1", "long_name": f"whether self-repair masks it, {among(share, heads)}"}
    return heads


def _p_values(ds: xr.Dataset, share: float, small: float) -> tuple[np.ndarray, np.ndarray]:
    """Of nothing being repaired or removed, and of the self-repair not being small: [head] each."""
    tokens, _ = Tokens.of(ds, share)
    names = ("direct_effect", "ablated_direct_effect", "self_repair")
    before, after, repair = (tokens.top_tally(read(ds, name, tokens.done, tokens.top)[1]) for name in names)
    removed = Tally(before.sums - after.sums, before.counts)
    differs = np.maximum(repair.estimate.p_value, removed.estimate.p_value)
    room = small * np.sign(removed.mean)[:, None] * removed.sums
    below, above = (_above(Tally(room + side * repair.sums, repair.counts)) for side in (-1, 1))
    return differs, np.maximum(below, above)


def _above(tally: Tally) -> np.ndarray:
    """The p-value of a mean that is not above 0: of either side's test, which is the stricter."""
    p = tally.estimate.p_value
    return np.where(np.isnan(p) | (tally.mean > 0), p, 1.0)


def _verdicts(heads: xr.Dataset) -> np.ndarray:
    """[layer, head]"""
    repair, removed = heads.top_self_repair, heads.top_removed
    sound = heads.attrs.get("worst_closure", 0) <= heads.attrs.get("closure_limit", np.inf)
    surely = sound & (heads.masking_q_value <= RATE) & (abs(repair) > heads.noise_floor.fillna(0))
    found = np.full(heads.tokens.shape, UNKNOWN, object)
    for told, where in {
        MASKED: surely & (repair * removed > 0),
        AMPLIFIED: surely & (repair * removed < 0),
        PLAIN: sound & (heads.small_q_value <= RATE),
    }.items():
        found[where.transpose(*heads.tokens.dims).values] = told
    return found
