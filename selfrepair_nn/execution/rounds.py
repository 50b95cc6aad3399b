"""Which prompts to run next, for which heads: all, or round after round until the answer is known well enough."""

from collections.abc import Iterator, Sequence
from math import ceil

import numpy as np

from selfrepair_nn.confidence import CLUSTERS, Tally, clusters_of
from selfrepair_nn.execution.experiment import Experiment
from selfrepair_nn.store import Store
from selfrepair_nn.variables import LAYER_ESTIMATE

GROWTH = 0.25
"""Every round adds this much to the prompts used so far: few looks at the data keep the intervals honest."""
USEFUL = 0.5
"""Cases of a layer go on that gain at least this much of what the best one does."""


def rounds(store: Store, experiment: Experiment) -> Iterator[tuple[list[slice], np.ndarray]]:
    """What is still to be done: blocks of prompts, and for which cases: bool [case].

    With `until_ci`, the estimates are written once a round is stored, and only cases that the answer still needs get
    another. Each takes the prompts in the same order, but may be further than others. Where a round is stored already
    it is only looked at: what follows is the same however often a run is interrupted.
    """
    units, open_ = experiment.work.units, np.ones(len(experiment.graph.ablate), bool)
    if experiment.options.part:
        first, count = experiment.options.part
        units = units[first - 1 :: count]
    if experiment.options.until_ci is None:
        yield _missing(store, experiment, units, open_), open_
        return
    answer, steps = _Answer(store, experiment), [*schedule(units)]
    taken = np.zeros(len(open_), int)
    while open_.any():
        for step in np.unique(taken[open_]):
            cases = open_ & (taken == step)
            yield _missing(store, experiment, steps[step], cases), cases
            answer.add(steps[step], cases)
        taken[open_] += 1
        open_ = answer.needs(taken < len(steps))


def schedule(units: Sequence[slice]) -> Iterator[list[slice]]:
    """The blocks of each round: first enough prompts for an interval, then each time a share more."""
    first = 0
    while first < len(units):
        used = units[first - 1].stop if first else 0
        target = max(CLUSTERS, ceil(used * (1 + GROWTH)))
        stop = next((i for i, unit in enumerate(units) if unit.stop >= target), len(units) - 1) + 1
        yield [*units[first:stop]]
        first = stop


def _missing(store: Store, experiment: Experiment, blocks: Sequence[slice], open_: np.ndarray) -> list[slice]:
    done = store.done[experiment.selected][open_]
    return [block for block in blocks if not done[:, block].all()]


class _Answer:
    """Mean self-repair of every case on its top share, as far as it is known."""

    def __init__(self, store: Store, experiment: Experiment) -> None:
        self._store, self._experiment = store, experiment
        self._limits = store.read("threshold")[experiment.selected]
        self._clusters = clusters_of(experiment.prompts.document)
        self._tally = Tally.empty(len(self._limits), self._clusters)
        self._used = np.zeros(len(self._limits), int)

    def add(self, blocks: Sequence[slice], cases: np.ndarray) -> None:
        """Take in a round of some cases, bool [case], from the store."""
        for block in blocks:
            effects, repair = (
                self._store.read(name, block)[self._experiment.selected]
                for name in ("direct_effect", "self_repair")
            )
            counted = (effects >= self._limits[:, None, None]) & cases[:, None, None]
            self._tally.add(repair, counted, self._clusters[block])
        self._used[cases] = blocks[-1].stop

    def needs(self, more: np.ndarray) -> np.ndarray:
        """Write what is known now; of the cases that have more prompts, those to go on with: bool [case]."""
        experiment, tally, options = self._experiment, self._tally, self._experiment.options
        found = {"estimate": tally.mean, "half_width": tally.half_width, "prompts_used": self._used}
        for name, values in found.items():
            self._store.write(name, experiment.on_grid(values))
        groups = None
        if experiment.grid:
            _, layers = np.unique([head.layer for head in experiment.heads], return_inverse=True)
            for name, values in zip(LAYER_ESTIMATE, tally.of_groups(layers), strict=True):
                self._store.write(name, values)
            groups = layers if options.ci_of == "layers" else None
        return still_needed(tally, self._used, more, options.until_ci, groups)


def still_needed(
    tally: Tally, used: np.ndarray, more: np.ndarray, goal: float, groups: np.ndarray | None = None
) -> np.ndarray:
    """Of the cases that have `more` prompts, those to go on with until each is known to `goal`: bool [case].

    Or each group is, of `groups` [case]: then only those cases go on that narrow their group's interval best. A prompt
    takes off the variance of a mean that variance over the number `used` so far; where this is the same for all, cases
    have prompts in proportion to their spread, as in Neyman's allocation. It is not judged from too few clusters.
    """
    if groups is None:
        return more & (tally.half_width > goal)
    wide = more & (tally.of_groups(groups)[1] > goal)[groups]
    gain = np.where(tally.clusters < CLUSTERS, np.inf, tally.half_width**2 / used)
    best = np.zeros(groups.max() + 1)
    np.maximum.at(best, groups[wide], gain[wide])
    return wide & (gain >= USEFUL * best[groups])
