"""Are heads redundant, additive or synergetic; who repairs whom; what one does when all the others are gone."""

from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.joint import Joint, require_joint
from selfrepair_nn.analysis.summaries import described_widths
from selfrepair_nn.analysis.tokens import HALF_WIDTH
from selfrepair_nn.components import Head
from selfrepair_nn.confidence import RATE, Estimate, Tally, q_values
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public

ADDITIVE = 0.1
"""An interaction that surely is no larger than this share of what a pair's ablation removes is none to speak of."""
RELATIONS = ("redundant", "additive", "synergetic", "unclear")


@public
def interactions(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """What ablating two heads together does beyond each alone, and who repairs whom; means in logits.

    Over (pair), on the pair's top share of tokens (by the sum of both direct effects), with x_half_width of each:

    - interaction: self_repair(both) - self_repair(first) - self_repair(second), token by token. What both write adds
      up, so that the same is left of the changes of the logit;
    - from_each_other: the part of it that each makes up for the other where it is left in place, and no longer where
      both are gone: minus the changes of the second's direct effect without the first and of the first's without the
      second; from_others = interaction - from_each_other: what all other components and the norm do beyond;
    - removed: direct effect taken by ablating both; logit_change of both together; alone: the sum of those of each;
    - p_value of an interaction of 0, q_value: controlled for the number of pairs (false discovery rate);
    - noise: the noise floor of the three runs together;
    - relation: "redundant" or "synergetic" where q_value is at most 5% and the interaction exceeds the noise: where it
      is against the sign of what is removed, both together lose more than each alone (each backs the other up), else
      less (what each does needs the other). "additive" where the whole interval of the interaction lies within a tenth
      of what is removed. Else "unclear".

    Over (ablated, responding): response, the mean change of the one's direct effect when the other is ablated, on the
    top share of the ablated, with response_half_width, response_q_value (over all pairs of heads that can respond) and
    response_known, whether that is at most 5%; NaN on the diagonal. Over (head): direct_effect, logit_change and
    self_repair of each alone on its own top share, with half-widths.

    Heads are in order of layer and head. Only prompts that are done for every case count. Clustering as in `by_head`.
    Where the heads were found on half of the prompts everything is of the other half.

    Raises:
        UsageError: `ds` has no two heads that are ablated alone and together; component changes were not stored.
    """
    joint = Joint.of(require_joint(ds, "interactions", "component_change"), share)
    heads = sorted(joint.singles)
    pairs = {pair: case for pair in combinations(heads, 2) if (case := joint.find(*pair)) is not None}
    if not pairs:
        raise UsageError("this store has no two heads that are ablated alone and together: run interactions")
    found = _of_pairs(joint, pairs) | _of_responses(joint, heads) | _of_heads(joint, heads)
    labels = {"head": heads, "ablated": heads, "responding": heads}
    coords: Any = {name: [head.label for head in each] for name, each in labels.items()}
    coords |= {
        name: ("pair", [pair[i].label for pair in pairs]) for i, name in enumerate(("first", "second"))
    }
    return _described(xr.Dataset(found, coords, joint.told()))


def _of_pairs(joint: Joint, pairs: dict[tuple[Head, Head], int]) -> dict[str, Any]:
    single, on = joint.singles, [*pairs.values()]
    parts = [[(-1, single[a]), (-1, single[b])] for a, b in pairs]
    whole = [[(1, case), *terms] for case, terms in zip(on, parts, strict=True)]
    interaction = joint.combined("self_repair", on, whole).estimate
    one, other = ([single[pair[i]] for pair in pairs] for i in (0, 1))
    first, second = (
        joint.responses(on, case, [pair[i] for pair in pairs]) for i, case in ((1, one), (0, other))
    )
    each_other = Tally(-first.sums - second.sums, first.counts).estimate
    both = [[(1, case)] for case in on]
    removed = _removed(joint, on).estimate
    singly = [[(1, case) for _, case in terms] for terms in parts]
    found = {
        "interaction": interaction,
        "from_each_other": each_other,
        "from_others": interaction.minus(each_other),
        "removed": removed,
        "logit_change": joint.combined("logit_change", on, both).estimate,
        "alone": joint.combined("logit_change", on, singly).estimate,
    }
    noise = np.array([np.sqrt(sum(joint.noise[i] ** 2 for _, i in terms)) for terms in whole])
    q = q_values(interaction.p_value)
    others = {"p_value": interaction.p_value, "q_value": q, "noise": noise}
    others["relation"] = _relation(interaction, removed.mean, q, noise)
    return columns("pair", found) | {name: ("pair", each) for name, each in others.items()}


def _removed(joint: Joint, on: list[int]) -> Tally:
    """What the cases take of their own direct effects."""
    own = [[(1, case)] for case in on]
    before, after = (joint.combined(name, on, own) for name in ("direct_effect", "ablated_direct_effect"))
    return Tally(before.sums - after.sums, before.counts)


def _relation(known: Estimate, removed: np.ndarray, q: np.ndarray, noise: np.ndarray) -> np.ndarray:
    surely = (q <= RATE) & (abs(known.mean) > noise)
    small = abs(known.mean) + known.half_width <= ADDITIVE * abs(removed)
    against = known.mean * removed < 0
    choices = [surely & against, surely & ~against, small]
    return np.select(choices, ["redundant", "synergetic", "additive"], "unclear").astype(object)


def _of_responses(joint: Joint, heads: list[Head]) -> dict[str, Any]:
    single, every = joint.singles, [(a, b) for a in heads for b in heads]
    ablated = [single[a] for a, _ in every]
    known = joint.responses(ablated, ablated, [b for _, b in every]).estimate
    own = np.array([a == b for a, b in every])
    unreached = (known.mean == 0) & (known.half_width == 0)  # what comes before the ablated head
    q = q_values(np.where(own | unreached, np.nan, known.p_value))
    found = {"response": known.mean, f"response{HALF_WIDTH}": known.half_width, "response_q_value": q}
    shaped = {name: np.where(own, np.nan, each) for name, each in found.items()} | {
        "response_known": q <= RATE
    }
    return {name: (("ablated", "responding"), each.reshape(len(heads), -1)) for name, each in shaped.items()}


def _of_heads(joint: Joint, heads: list[Head]) -> dict[str, Any]:
    on, names = [joint.singles[head] for head in heads], ("direct_effect", "logit_change", "self_repair")
    found = {name: joint.combined(name, on, [[(1, case)] for case in on]).estimate for name in names}
    return {f"head_{name}": each for name, each in columns("head", found).items()}


@public
def clamped(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """What each of a set of heads does when all the others of the set are ablated, over (head); means in logits.

    On the top share of tokens of the others' ablation (by the sum of their direct effects), with x_half_width of each:

    - direct_effect: the head's own in the clean run; change: what the others' ablation changes of it;
    - removed: direct effect that the ablation takes of the others; makes_up: change / removed, no unit, NaN where the
      interval of removed holds 0;
    - alone: the logit's change when the head alone is ablated; given_rest: when it is ablated beside the others, who
      are gone already; takes_over = alone - given_rest, token by token: above 0 where the head counts for more without
      the others. NaN where not all of them are ablated together in a run;
    - p_value of a change of 0, q_value: controlled for the number of heads; responds: whether that is at most 5% and
      the change exceeds the noise floor.

    Raises:
        UsageError: `ds` has no run that ablates all but one of the heads which it ablates alone; else as
            `interactions`.
    """
    joint = Joint.of(require_joint(ds, "interactions", "component_change"), share)
    heads = sorted(joint.singles)
    rest = {one: joint.find(*(h for h in heads if h != one)) for one in heads}
    left = {one: case for one, case in rest.items() if case is not None}
    if len(heads) < 2 or not left:
        raise UsageError("this store has no run in which all heads but one are ablated: run interactions")
    on = [*left.values()]
    single = [[(1, joint.singles[head])] for head in left]
    change = joint.responses(on, on, [*left])
    removed = _removed(joint, on)
    found = {
        "direct_effect": joint.combined("direct_effect", on, single).estimate,
        "change": change.estimate,
        "removed": removed.estimate,
        "makes_up": ratio(change, removed),
        "alone": joint.combined("logit_change", on, single).estimate,
    }
    variables = columns("head", found) | _taking_over(joint, left)
    p = change.estimate.p_value
    q = q_values(p)
    responds = (q <= RATE) & (abs(change.mean) > np.array([joint.noise[case] for case in on]))
    variables |= {"p_value": ("head", p), "q_value": ("head", q), "responds": ("head", responds)}
    return _described(xr.Dataset(variables, {"head": [head.label for head in left]}, joint.told()))


def _taking_over(joint: Joint, left: dict[Head, int]) -> dict[str, Any]:
    whole = joint.find(*joint.singles)
    names = ("given_rest", "takes_over")
    if whole is None:
        return {n + end: ("head", np.full(len(left), np.nan)) for n in names for end in ("", HALF_WIDTH)}
    given = [[(1, whole), (-1, case)] for case in left.values()]
    terms = [[(1, joint.singles[head]), (-1, whole), (1, case)] for head, case in left.items()]
    both = zip(names, (given, terms), strict=True)
    return columns("head", {n: joint.combined("logit_change", [*left.values()], t).estimate for n, t in both})


def ratio(above: Tally, below: Tally) -> Estimate:
    """The ratio of two tallies' means, its interval that of the linearised ratio; NaN where below may be 0."""
    size, width = below.mean, below.half_width
    size = np.where(abs(size) > np.where(np.isfinite(width), width, 0), size, np.nan)[:, None]
    with np.errstate(invalid="ignore"):
        share = above.mean[:, None] / size
        known = Tally((above.sums - share * below.sums) / size, above.counts).estimate
    return Estimate(share[:, 0], np.where(np.isnan(share), np.inf, known.influence), known.shares)


def columns(dim: str, found: dict[str, Estimate]) -> dict[str, Any]:
    """The means of estimates along a dimension, and their half-widths."""
    means = {name: (dim, known.mean) for name, known in found.items()}
    return means | {name + HALF_WIDTH: (dim, known.half_width) for name, known in found.items()}


NAMES = {
    "interaction": "mean interaction",
    "from_each_other": "mean interaction from each other",
    "from_others": "mean interaction from other components",
    "removed": "mean direct effect removed",
    "logit_change": "mean logit change, both ablated",
    "alone": "mean logit change, each ablated alone",
    "response": "mean change of direct effect",
    "head_direct_effect": "mean direct effect",
    "head_logit_change": "mean logit change",
    "head_self_repair": "mean self-repair",
    "direct_effect": "mean direct effect in the clean run",
    "change": "mean change of direct effect with all others ablated",
    "given_rest": "mean logit change given the others' ablation",
    "takes_over": "mean logit change alone less that given the others' ablation",
    "makes_up": "share of the removed direct effect that the head makes up for",
}


def _described(found: xr.Dataset) -> xr.Dataset:
    for name in NAMES.keys() & {*found.data_vars}:
        found[name].attrs = {"units": "1" if name == "makes_up" else "logit", "long_name": NAMES[name]}
    return described_widths(found)
