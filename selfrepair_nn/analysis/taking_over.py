"""Who takes over when a set of heads is gone: each further head's effect given the set, beside its effect alone."""

from typing import Any

import numpy as np
import xarray as xr
from scipy.stats import rankdata

from selfrepair_nn.analysis.interactions import columns
from selfrepair_nn.analysis.joint import Joint, require_joint
from selfrepair_nn.analysis.summaries import described_widths
from selfrepair_nn.case_sites import Case
from selfrepair_nn.components import Head, select_heads
from selfrepair_nn.confidence import RATE, Tally, jackknife, q_values
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public
from selfrepair_nn.quantities import asked_in
from selfrepair_nn.values import brief

KNOWN_BACKUPS = {"gpt2": ((9, 0), (9, 7), (10, 1), (10, 2), (10, 6), (10, 10), (11, 2), (11, 9))}
"""(layer, head) of the backup name movers of a model, by its name: Wang et al. (2022), Interpretability in the wild,
Figure 2 and section 3.3, found there on the task of `ioi_prompts` for the name movers 9.9, 10.0 and 9.6."""


@public
def conditional_effects(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """What ablating each further head does when a set of heads is ablated already, over (head); means in logits.

    All are on the same tokens: the top share of the set (by the sum of its direct effects), or where the prompts say
    which tokens count these. With x_half_width of each:

    - alone: the logit's change when the head alone is ablated; conditional: when it is ablated beside the set, less
      what the set's own ablation does;
    - takes_over = alone - conditional, token by token: above 0 where the head counts for more once the set is gone;
    - direct_effect: the head's own in the clean run;
    - p_value of takes_over = 0, q_value: controlled for the number of heads (false discovery rate);
    - backup: whether q_value is at most 5%, takes_over is above 0 and exceeds the noise floor of the three runs, and
      the whole interval of conditional lies below 0: without the set the logit needs the head.

    No head is selected by what it was found to do, so that q_value holds for all of them. The set is, unless it was
    named: where it was found on half of the prompts, everything is of the other half.

    Coordinates: head ("L9H6"), layer, number (of the head in its layer). Attributes: set, its heads; set_logit_change.

    Raises:
        UsageError: `ds` has no set of heads that is ablated alone and with each further head, and these alone.
    """
    joint = Joint.of(require_joint(ds, "backups"), share)
    of_set, heads = _the_set(joint)
    cases = {h: (joint.singles[h], joint.find(*joint.cases[of_set], h)) for h in heads}
    on, single = [of_set] * len(heads), [[(1, alone)] for alone, _ in cases.values()]
    given = [[(1, both), (-1, of_set)] for _, both in cases.values()]
    excess = joint.combined("logit_change", on, _excess(of_set, cases)).estimate
    found = {
        "alone": joint.combined("logit_change", on, single).estimate,
        "conditional": joint.combined("logit_change", on, given).estimate,
        "takes_over": excess,
        "direct_effect": joint.combined("direct_effect", on, single).estimate,
    }
    noise = np.array([np.sqrt(sum(joint.noise[i] ** 2 for i in (of_set, *each))) for each in cases.values()])
    needed, q = found["conditional"], q_values(excess.p_value)
    surely = (q <= RATE) & (excess.mean > noise) & (needed.mean + needed.half_width < 0)
    variables = columns("head", found) | {"p_value": ("head", excess.p_value), "q_value": ("head", q)}
    variables |= {"backup": ("head", surely), "noise": ("head", noise)}
    coords: Any = {"head": [h.label for h in heads]}
    coords |= {"layer": ("head", [h.layer for h in heads]), "number": ("head", [h.head for h in heads])}
    whole = joint.combined("logit_change", [of_set], [[(1, of_set)]])
    told = {
        "set": "+".join(head.label for head in joint.cases[of_set]),
        "set_logit_change": float(whole.mean[0]),
    }
    told |= {"set_logit_change_half_width": float(whole.half_width[0])}
    return _described(xr.Dataset(variables, coords, joint.told() | told))


@public
def backup_roc(ds: xr.Dataset, known: Any = None, share: float | None = None) -> xr.Dataset:
    """How well `takes_over` tells known backups from all other heads, over (threshold).

    - false_positive_rate, true_positive_rate: shares of the other and of the known heads at or above each threshold
      (takes_over, in logits, descending; the first is infinite).

    Attributes: auc, the area under that curve: how often a known backup takes over more than another head, ties as a
    half (Mann and Whitney); auc_half_width: of its 95% interval, by the jackknife over clusters of prompts, infinite
    where these are too few; it does not tell what other heads would have given; known, others: how many heads; source.

    Args:
        known: the backups, as "9.0,9.7", [(9, 0)] or [sr.Head(9, 0)]; by default those of Wang et al. (2022) where
            `ds` is of gpt2.

    Raises:
        UsageError: no backups of this model are known, or none (or all) of them is among the heads; else as
            `conditional_effects`.
    """
    joint = Joint.of(require_joint(ds, "backups"), share)
    of_set, heads = _the_set(joint)
    named, source = _known(ds, known)
    positive = np.array([head in named for head in heads])
    if positive.all() or not positive.any():
        raise UsageError(
            f"{int(positive.sum())} of these {len(heads)} heads are known backups: a curve needs some of both kinds"
        )
    cases = {h: (joint.singles[h], joint.find(*joint.cases[of_set], h)) for h in heads}
    tally = joint.combined("logit_change", [of_set] * len(heads), _excess(of_set, cases))
    scores = tally.mean
    steps = np.unique(scores)[::-1]
    reached = scores >= np.concatenate([[np.inf], steps])[:, None]
    found: Any = {"false_positive_rate": ("threshold", reached[:, ~positive].mean(1))}
    found["true_positive_rate"] = ("threshold", reached[:, positive].mean(1))
    told = {"auc": area(scores, positive), "auc_half_width": _reach(tally, positive), "source": source}
    told |= {"known": int(positive.sum()), "others": int((~positive).sum())}
    return xr.Dataset(found, {"threshold": [np.inf, *steps]}, joint.told() | told)


def area(scores: np.ndarray, positive: np.ndarray) -> float:
    """The area under the ROC curve: the Mann-Whitney statistic of the positive scores as a share of all pairs."""
    n = int(positive.sum())
    above = rankdata(scores)[positive].sum() - n * (n + 1) / 2
    return float(above / (n * (len(scores) - n)))


def _reach(tally: Tally, positive: np.ndarray) -> float:
    """Half the width of the area's interval, by the jackknife: as if each cluster of prompts had not been there."""
    held = np.flatnonzero(tally.counts.any(0))
    sums, counts = (each.sum(1, keepdims=True) - each[:, held] for each in (tally.sums, tally.counts))
    with np.errstate(invalid="ignore"):  # one cluster left out may be the only one
        return float(jackknife(np.array([area(each, positive) for each in (sums / counts).T])))


def _excess(of_set: int, cases: dict[Head, tuple[int, Any]]) -> list[list[tuple[int, int]]]:
    """The terms of takes_over: alone, less both, and the set."""
    return [[(1, alone), (-1, both), (1, of_set)] for alone, both in cases.values()]


def _the_set(joint: Joint) -> tuple[int, list[Head]]:
    """The case of the set, and the heads that are ablated alone and beside it, in order of layer and head."""
    shared = the_set(joint.cases)
    of_set = joint.find(*shared) if shared else None
    heads = sorted(h for h in {*joint.singles} - shared if joint.find(*shared, h) is not None)
    if of_set is None or not heads:
        raise UsageError("this store has no set of heads that is ablated alone and beside further ones: run backups")
    return of_set, heads


def the_set(cases: list[Case]) -> set:
    """What all runs that ablate several sites have in common."""
    several = [{*case} for case in cases if len(case) > 1]
    return set.intersection(*several) if several else set()


def _known(ds: xr.Dataset, known: Any) -> tuple[set[Head], str]:
    if known is not None:
        size = {d: int(ds.attrs.get(f"n_{d}s", 10**6)) for d in ("layer", "head")}
        return {*select_heads(None, known, size["layer"], size["head"])}, "given"
    model = str(ds.attrs.get("model", "")).replace("\\", "/").rpartition("/")[2]
    if model not in KNOWN_BACKUPS:
        raise UsageError(
            f"no backups of {brief(model)} are known here, those of {', '.join(KNOWN_BACKUPS)} are: give known=…, such "
            'as "9.0,9.7"'
        )
    return {Head(*place) for place in KNOWN_BACKUPS[model]}, "Wang et al. (2022)"


NAMES = {
    "alone": "mean logit change, ablated alone",
    "conditional": "mean logit change, ablated beside the set, less that of the set",
    "takes_over": "mean logit change alone less that beside the set",
    "direct_effect": "mean direct effect in the clean run",
    "noise": "noise floor of the three runs",
}


def _described(found: xr.Dataset) -> xr.Dataset:
    for name, told in NAMES.items():
        nats = asked_in(found) == "logprob" and name != "direct_effect"
        told = told.replace("logit", "log-probability") if nats else told
        found[name].attrs = {"units": "nat" if nats else "logit", "long_name": told}
    return described_widths(found)
