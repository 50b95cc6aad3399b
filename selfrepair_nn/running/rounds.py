"""Which prompts to run next, for which heads: all, or round after round until the answer is known well enough."""

from collections.abc import Iterator, Sequence
from math import ceil

import numpy as np

from selfrepair_nn.confidence import CLUSTERS, Tally, clusters_of
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.store import Store

GROWTH = 0.25
"""Every round adds this much to the prompts used so far: few looks at the data keep the intervals honest."""


def rounds(
    store: Store, experiment: Experiment, units: Sequence[slice]
) -> Iterator[tuple[list[slice], np.ndarray]]:
    """What is still to be done of these blocks of prompts: some of them, and for which cases: bool [case].

    With `until_ci`, cases whose interval is narrow enough once a round is stored are closed, and the estimates
    written. Where a round is stored already it is only looked at: what follows is the same however often a run is
    interrupted.
    """
    open_ = np.ones(len(experiment.graph.ablate), bool)
    if experiment.options.until_ci is None:
        yield _missing(store, experiment, units, open_), open_
        return
    answer = _Answer(store, experiment)
    for block in schedule(units):
        yield _missing(store, experiment, block, open_), open_
        open_ = open_ & ~answer.narrow_after(block, open_)
        if not open_.any():
            return


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
        self._clusters = clusters_of(experiment.prompts.document, np.any(experiment.counted, axis=1))
        self._tally = Tally.empty(len(self._limits), self._clusters)
        self._used = np.zeros(len(self._limits), int)

    def narrow_after(self, blocks: Sequence[slice], open_: np.ndarray) -> np.ndarray:
        """Add a round of the open cases, write what is known now, and say which cases need no more: bool [case]."""
        for block in blocks:
            effects, repair = (self._store.read(name, block) for name in ("direct_effect", "self_repair"))
            if "resample" in self._experiment.work.axes:
                repair = repair.mean(0, dtype=float)
            effects, repair = (values[self._experiment.selected] for values in (effects, repair))
            counted = self._experiment.top(effects, self._limits, block) & open_[:, None, None]
            self._tally.add(repair, counted, self._clusters[block])
        self._used[open_] = blocks[-1].stop
        return self._write()

    def _write(self) -> np.ndarray:
        experiment, tally, goal = self._experiment, self._tally, self._experiment.options.until_ci
        found = {"estimate": tally.mean, "half_width": tally.half_width, "prompts_used": self._used}
        narrow = found["half_width"] <= goal
        for name, values in found.items():
            self._store.write(name, experiment.on_grid(values))
        if experiment.grid:
            _, groups = np.unique([head.layer for head in experiment.heads], return_inverse=True)
            layer_means, widths = tally.of_groups(groups)
            self._store.write("layer_estimate", layer_means)
            self._store.write("layer_half_width", widths)
            if experiment.options.ci_of == "layers":
                narrow = (widths <= goal)[groups]
        return narrow
