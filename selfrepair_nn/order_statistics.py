"""How well is known what is no mean over tokens: medians, ranks, counts of signs; tokens clustered by document."""

from collections.abc import Callable

import numpy as np

from selfrepair_nn.confidence import CLUSTERS, LEVEL, Tally, student

DRAWS = 1000
"""Draws of a bootstrap."""


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], held: np.ndarray) -> float:
    """Half-width of the 95% interval of a statistic, which takes how often each cluster is drawn [draw, cluster].

    Student's, by the bootstrap over the clusters that are `held` [cluster] (Efron 1979, Bootstrap methods: another look
    at the jackknife), always by the same draws; infinite where they are fewer than CLUSTERS. For what jumps, as ranks
    and counts of signs do: there the jackknife is wrong.
    """
    count = int(held.sum())
    if count < CLUSTERS:
        return np.inf
    drawn = np.zeros((DRAWS, held.size))
    drawn[:, held] = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), DRAWS)
    error = np.std(statistic(drawn)) * np.sqrt(count / (count - 1))
    return float(student(LEVEL, count - 1) * error) if np.isfinite(error) else np.inf


def median_reach(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Half-widths of the 95% intervals of medians, of values [case, token] of clusters [token]: [case].

    From the quantile at the lower end of the interval of the share of tokens at the median or below to that at its
    upper end, the longer side; infinite where there is none. Woodruff (1952), Confidence intervals for medians and
    other position measures.
    """
    median, ordered = np.median(values, axis=1), np.sort(values, axis=1)
    below = Tally.of_prompts(values <= median[:, None], np.ones(values.shape), clusters).half_width
    known = below < 0.5
    ends = 0.5 + np.where(known, below, 0) * np.array([[-1], [1]])
    places = ends * (values.shape[1] - 1)
    rows = np.arange(len(values))
    low, high = ordered[rows, np.floor(places[0]).astype(int)], ordered[rows, np.ceil(places[1]).astype(int)]
    return np.where(known, np.maximum(median - low, high - median), np.inf)
