"""How well a mean over tokens is known: intervals and p-values of ratios, tokens clustered by document."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit
from scipy.stats import false_discovery_control

LEVEL = 0.95
RATE = 0.05
"""Accepted rate of false discoveries among many heads."""

CLUSTERS = 20
"""Fewer independent documents than this say too little of how much they differ."""


def clusters_of(document: np.ndarray, asked: np.ndarray | None = None) -> np.ndarray:
    """Index of the cluster of each prompt: its document, or itself where there are too few documents: [prompt].

    `asked` [prompt] says which prompts have a token that counts, by default all: the documents of no other matter.
    """
    _, index = np.unique(document, return_inverse=True)
    some = index if asked is None else index[asked]
    return index if np.unique(some).size >= CLUSTERS else np.arange(len(document))


def q_values(p: np.ndarray) -> np.ndarray:
    """The false discovery rate at which each would be called a discovery, of p-values of any shape; NaN stays NaN.

    Benjamini and Hochberg (1995), over all that are not NaN.
    """
    found, known = np.full(np.shape(p), np.nan), np.isfinite(p)
    if known.any():
        found[known] = false_discovery_control(p[known])
    return found


def student(level: float, freedom: Any) -> Any:
    """Standard errors from a mean to either end of its interval of this level, by Student's t: as `freedom` has it."""
    return stdtrit(freedom, (1 + level) / 2)


def jackknife(without: np.ndarray) -> np.ndarray:
    """Half-width of the 95% interval of a statistic, from what it is without each cluster [..., cluster]: [...].

    Student's, by the jackknife over clusters; infinite where they are fewer than CLUSTERS.
    """
    count = without.shape[-1]
    if count < CLUSTERS:
        return np.full(without.shape[:-1], np.inf)
    error = np.sqrt((count - 1) * np.var(without, axis=-1))
    return student(LEVEL, count - 1) * error


@dataclass(frozen=True)
class Estimate:
    """Means, and how well they are known: of cases, or of groups of cases, both called case here.

    mean [case]; influence [case, cluster]: how far leaving a cluster out moves the mean, infinite where one cluster
    says it all; shares [case, cluster]: of the case's tokens.
    """

    mean: np.ndarray
    influence: np.ndarray
    shares: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Whether enough clusters hold a token for an interval: bool [case]."""
        return ((self.shares > 0).sum(1) >= CLUSTERS) & np.isfinite(self.influence).all(1)

    @property
    def error(self) -> np.ndarray:
        """Standard error of the mean, by the jackknife over clusters: [case], NaN below two clusters."""
        finite = np.isfinite(self.influence).all(1)
        return np.where(finite, self._spread[0], np.nan)

    @property
    def half_width(self) -> np.ndarray:
        """Half-width of the 95% interval, as `reach` has it: [case]."""
        return self.reach(LEVEL)

    def reach(self, level: float) -> np.ndarray:
        """Half-width of the mean's interval: [case], infinite where fewer than CLUSTERS clusters hold a token.

        Student's quantile t of standard errors, and what skewness g (of the mean) adds: g (1 + 2 t^2) / 6 of them.
        Johnson (1978), Modified t tests and confidence intervals for asymmetrical populations. That is one side of
        the interval, the other is as much shorter; a half-width is one number, so it is the longer one on both.
        """
        error, skewness, freedom = self._spread
        quantile = student(level, freedom)
        with np.errstate(invalid="ignore"):
            width = error * (quantile + skewness * (1 + 2 * quantile**2) / 6)
        return np.where(self.known, width, np.inf)

    @property
    def p_value(self) -> np.ndarray:
        """Two-sided, of a mean that is 0: [case], below 1 - LEVEL just where the interval excludes 0.

        NaN where there is no interval.
        """
        error, skewness, freedom = self._spread
        nowhere = np.where(self.mean == 0, 0.0, np.inf)
        away = np.divide(abs(self.mean), error, out=nowhere, where=error > 0)
        over = np.maximum(away - skewness / 6, 0)  # the quantile t that half_width turns into `away`
        with np.errstate(invalid="ignore"):
            quantile = np.where(np.isinf(over), over, 2 * over / (1 + np.sqrt(1 + 4 / 3 * skewness * over)))
        return np.where(self.known, 2 * stdtr(freedom, -quantile), np.nan)

    def of_groups(self, groups: np.ndarray, count: int | None = None) -> "Estimate":
        """Means of the cases' means within each of `count` groups; `groups` [case] from 0, -1 for none.

        Cases of a group share clusters, and so their errors: what counts is the sum of their influences.
        """
        inside = groups >= 0
        sizes = np.bincount(groups[inside], minlength=count or 0)
        of_cases = self.mean, self.influence, self.shares
        return Estimate(*(_mean_of(values[inside], groups[inside], sizes) for values in of_cases))

    def minus(self, other: "Estimate") -> "Estimate":
        """The differences of these means and another's, whose errors go together where they share clusters."""
        both = (self.known & other.known)[:, None]
        with np.errstate(invalid="ignore"):
            moved = self.influence - other.influence
        shares = np.where(both, (self.shares + other.shares) / 2, 0)
        return Estimate(self.mean - other.mean, moved, shares)

    def over(self, other: "Estimate") -> "Estimate":
        """The ratios of these means and another's, linearised; no interval where the other's is 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self.mean / other.mean
            moved = (self.influence - ratio[:, None] * other.influence) / other.mean[:, None]
        both = (self.known & other.known & np.isfinite(ratio))[:, None]
        return Estimate(ratio, moved, np.where(both, (self.shares + other.shares) / 2, 0))

    @cached_property
    def _spread(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Standard error, skewness and degrees of freedom of the mean: [case] each.

        As many clusters as would say as much if they held equally many tokens decide the degrees of freedom.
        """
        moved = np.where(np.isfinite(self.influence).all(1, keepdims=True), self.influence, 0)
        with np.errstate(over="ignore", invalid="ignore"):  # of numbers whose squares are beyond any nothing is known
            variance, third = (moved**2).sum(1), np.abs((moved**3).sum(1))
            skewness = np.divide(third, variance**1.5, out=np.zeros_like(variance), where=variance > 0)
        total = (self.shares**2).sum(1)
        alike = np.divide(1, total, out=np.zeros_like(total), where=total > 0)
        return np.sqrt(variance), skewness, np.maximum(alike, 2) - 1


class Share(Estimate):
    """Means of marks that are 0 or 1, so that one which never varies is not known for sure."""

    def reach(self, level: float) -> np.ndarray:
        """As of any mean; where all tokens say the same, as far as Clopper and Pearson's, of its clusters as trials."""
        alike = (self.mean == 0) | (self.mean == 1)
        trials = np.maximum((self.shares > 0).sum(1), 1)
        never = 1 - ((1 - level) / 2) ** (1 / trials)
        return np.where(alike & self.known, never, super().reach(level))


@dataclass(frozen=True)
class Tally:
    """Sums of a quantity over tokens, and numbers of these tokens, by case and cluster: [case, cluster] each.

    A mean over tokens is a ratio of two sums over independent clusters; its error is that of the linearised ratio,
    by the jackknife.
    """

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def empty(cls, cases: int, clusters: np.ndarray) -> "Tally":
        shape = (cases, int(clusters.max()) + 1)
        return cls(np.zeros(shape), np.zeros(shape))

    @classmethod
    def of_prompts(cls, sums: np.ndarray, counts: np.ndarray, clusters: np.ndarray) -> "Tally":
        """From sums and counts [case, prompt]; `clusters` names each prompt's cluster, and none is empty."""
        order = np.argsort(clusters, kind="stable")
        starts = np.flatnonzero(np.diff(clusters[order], prepend=-1))
        return cls(*(np.add.reduceat(each[:, order], starts, axis=1, dtype=float) for each in (sums, counts)))

    def add(self, values: np.ndarray, counted: np.ndarray, clusters: np.ndarray) -> None:
        """Add values [case, prompt, position] where `counted`; `clusters` names each prompt's cluster."""
        at: Any = (slice(None), clusters)
        np.add.at(self.sums, at, np.where(counted, values, 0).sum(-1, dtype=float))
        np.add.at(self.counts, at, counted.sum(-1))

    @property
    def mean(self) -> np.ndarray:
        """Mean over tokens: [case], NaN where there are none."""
        with np.errstate(invalid="ignore"):
            return self.sums.sum(1) / self.counts.sum(1)

    @property
    def half_width(self) -> np.ndarray:
        """Half-width of the mean's interval: [case], as in `Estimate`."""
        return self.estimate.half_width

    def of_groups(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means of the cases' means within each group (`groups` [case] from 0), and their half-widths: [group] each."""
        found = self.estimate.of_groups(groups)
        return found.mean, found.half_width

    @property
    def share(self) -> "Share":
        """The same of marks that are 0 or 1: how often they are 1."""
        known = self.estimate
        return Share(known.mean, known.influence, known.shares)

    @property
    def estimate(self) -> Estimate:
        """The means and how well they are known."""
        n = (self.counts > 0).sum(1, keepdims=True)
        total, mean = self.counts.sum(1, keepdims=True), self.mean
        residual = self.sums - self.counts * np.nan_to_num(mean)[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            moved = residual / (total - self.counts) * np.sqrt((n - 1) / n)
            shares = self.counts / np.maximum(total, np.finfo(float).tiny)
        return Estimate(mean, np.where(n > 1, moved, np.inf), shares)


def _mean_of(values: np.ndarray, groups: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Mean of the cases in each group: [case, …] to [group, …], NaN where there are none."""
    found = np.zeros((len(sizes), *values.shape[1:]))
    with np.errstate(invalid="ignore"):  # influences of both signs may be infinite
        np.add.at(found, groups, values)
        return (found.T / sizes).T
