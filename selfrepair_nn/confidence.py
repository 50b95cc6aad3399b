"""How well a mean over tokens is known: confidence intervals of ratios, tokens clustered by document."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95
CLUSTERS = 20
"""Fewer independent documents than this say too little of how much they differ."""


def clusters_of(document: np.ndarray) -> np.ndarray:
    """Index of the cluster of each prompt: its document, or itself where there are too few documents: [prompt]."""
    _, index = np.unique(document, return_inverse=True)
    return index if index.max() + 1 >= CLUSTERS else np.arange(len(document))


@dataclass(frozen=True)
class Tally:
    """Sums of a quantity over the top tokens, and numbers of these tokens, by case and cluster: [case, cluster] each.

    A mean over tokens is a ratio of two sums over independent clusters; its error is that of the linearised ratio,
    with Student's quantile for the clusters that hold any token.
    """

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def empty(cls, cases: int, clusters: np.ndarray) -> "Tally":
        shape = (cases, int(clusters.max()) + 1)
        return cls(np.zeros(shape), np.zeros(shape))

    def add(self, values: np.ndarray, counted: np.ndarray, clusters: np.ndarray) -> None:
        """Add values [case, prompt, position] where `counted`; `clusters` names each prompt's cluster."""
        np.add.at(self.sums, (slice(None), clusters), np.where(counted, values, 0).sum(-1, dtype=float))
        np.add.at(self.counts, (slice(None), clusters), counted.sum(-1))

    @property
    def mean(self) -> np.ndarray:
        """Mean over tokens: [case], NaN where there are none."""
        with np.errstate(invalid="ignore"):
            return self.sums.sum(1) / self.counts.sum(1)

    @property
    def half_width(self) -> np.ndarray:
        """Half-width of the mean's interval: [case], infinite where fewer than CLUSTERS clusters hold a token."""
        return _half_width(self._influence, self.counts > 0)

    def of_groups(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means of the cases' means within each group (`groups` [case] from 0), and their half-widths: [group] each.

        Cases of a group share clusters, and so their errors: what counts is the sum of their influences.
        """
        sizes = np.bincount(groups)
        means, influence = np.zeros(len(sizes)), np.zeros((len(sizes), self.counts.shape[1]))
        used = np.zeros(influence.shape, bool)
        np.add.at(means, groups, self.mean)
        np.add.at(influence, groups, self._influence)
        np.logical_or.at(used, groups, self.counts > 0)
        return means / sizes, _half_width(influence / sizes[:, None], used)

    @property
    def _influence(self) -> np.ndarray:
        """What each cluster adds to the error of the mean: [case, cluster]; infinite where one cluster says it all."""
        n = (self.counts > 0).sum(1, keepdims=True)
        total = self.counts.sum(1, keepdims=True)
        residual = self.sums - self.counts * np.nan_to_num(self.mean)[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(n > 1, residual / total * np.sqrt(n / (n - 1)), np.inf)


def _half_width(influence: np.ndarray, used: np.ndarray) -> np.ndarray:
    n = used.sum(1)
    spread = np.sqrt((influence**2).sum(1))
    return np.where(n >= CLUSTERS, spread * student.ppf((1 + LEVEL) / 2, np.maximum(n, 2) - 1), np.inf)
