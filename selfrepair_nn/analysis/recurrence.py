"""How often the same neurons come back: in how many tokens and prompts, and in how many pairs of tokens."""

import numpy as np

from selfrepair_nn.analysis.tokens import HALF_WIDTH
from selfrepair_nn.confidence import Estimate, Tally


def recurring(
    named: np.ndarray, prompt: np.ndarray, neurons: int, joined: np.ndarray
) -> dict[str, np.ndarray | float]:
    """How often neurons recur among those `named` [token, rank] (-1: none), of tokens of these prompts [token].

    `joined` names the cluster of each prompt of the store.
    """
    rising, size, cluster = named >= 0, int(joined.max()) + 1, joined[prompt]
    pairs, tokens = np.unique((prompt[:, None] * neurons + named)[rising], return_counts=True)
    in_prompts = np.bincount(pairs % neurons, minlength=neurons)
    places = (named * size + cluster[:, None])[rising]
    in_clusters = np.bincount(places, minlength=neurons * size).reshape(neurons, size)
    held = np.bincount(cluster, minlength=size)
    in_tokens = Tally(in_clusters, np.broadcast_to(held, in_clusters.shape)).share
    order = np.argsort(-in_clusters.sum(1), kind="stable")
    holding, of_prompts = np.unique(prompt, return_counts=True)
    within = np.bincount(joined[pairs // neurons], tokens * (tokens - 1) / 2, size)
    couples = np.bincount(joined[holding], of_prompts * (of_prompts - 1) / 2, size)
    found = {"entries": len(named), "neuron": order, "in_tokens": in_tokens.mean[order]}
    with np.errstate(invalid="ignore", divide="ignore"):
        found["in_prompts"] = (in_prompts / np.float64(len(holding)))[order]
    shared = {"shared_within": Tally(within[None], couples[None]).estimate}
    shared["shared_between"] = _between(in_clusters, held, within, couples)
    found |= {name: known.mean[0] for name, known in shared.items()}
    found |= {name + HALF_WIDTH: known.half_width[0] for name, known in shared.items()}
    return found | {"in_tokens" + HALF_WIDTH: in_tokens.half_width[order]}


def _between(in_clusters: np.ndarray, held: np.ndarray, within: np.ndarray, couples: np.ndarray) -> Estimate:
    """What two tokens of different prompts share, with and without each cluster: the jackknife of a mean over pairs.

    in_clusters [neuron, cluster]: tokens that name the neuron; held: tokens; within, couples: shared by the pairs of
    the same prompt, and these pairs: [cluster] each.
    """

    def shared(named: np.ndarray, tokens: np.ndarray, less: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return ((named * (named - 1) / 2).sum(0) - less) / (tokens * (tokens - 1) / 2 - pairs)

    total = in_clusters.sum(1, keepdims=True)
    mean = shared(total, held.sum(keepdims=True), within.sum(), couples.sum())
    others = shared(total - in_clusters, held.sum() - held, within.sum() - within, couples.sum() - couples)
    n = max(int((held > 0).sum()), 1)
    moved = np.where(np.isfinite(others), others - mean, np.inf) * np.sqrt((n - 1) / n)
    return Estimate(mean, moved[None], (held / max(held.sum(), 1))[None])
