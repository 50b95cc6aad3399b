"""The units of a run: every variant of its graph on every block of prompts."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfrepair_nn.errors import SelfRepairError
from selfrepair_nn.graph import Graph
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.layout.units import Job, Unit, ablation_shapes
from selfrepair_nn.quantities import QUANTITIES


@dataclass(frozen=True)
class Sweep:
    """What all units of a run share.

    `plans` has one plan for each variant; `constants` are arrays that every job takes, `thresholds` [case] the least
    direct effects of the top share, where only that is kept, `wanted` [case, prompt] how many positions of each prompt
    are wanted, where that is not all. `tick` is called with ablated tokens as they are done.
    """

    experiment: Experiment
    plans: list[dict[str, Any]]
    constants: dict[str, Any]
    thresholds: np.ndarray | None
    wanted: np.ndarray | None = None
    tick: Callable[[int], Any] = lambda tokens: None

    def units(self, blocks: Iterable[slice]) -> list[Unit]:
        """The units of some blocks of prompts: block after block, within it variant after variant."""
        return [self._unit(block, index) for block in blocks for index in range(len(self.plans))]

    def _unit(self, block: slice, variant: int) -> Unit:
        work, plan = self.experiment.work, self.plans[variant]
        packed, tokens = self.thresholds is not None, self._tokens_of_row(block)
        return Unit(
            name=f"ablation, {work.axis} {work.labels[variant]}" if work.axis else "ablation",
            job=_job_of(plan),
            prompts=block,
            plan=plan,
            inputs=lambda prompts: self.experiment.arrays(prompts, work.graphs[variant]) | self.constants,
            shapes=ablation_shapes(plan, work.sizes, packed),
            thresholds=self.thresholds,
            counted=None if not packed or self.experiment.counted.all() else self.experiment.counted,
            wanted=self.wanted,
            tick=lambda rows: self.tick(round(rows * tokens)),
        )

    def _tokens_of_row(self, block: slice) -> float:
        """How many tokens of a prompt a case is ablated on, in the mean over the rows of a block."""
        if self.wanted is None:
            return self.experiment.prompts.length
        wanted = self.wanted[:, block]
        return float(wanted.sum() / np.count_nonzero(wanted))

    def by_block(
        self, results: Iterator[tuple[Unit, dict[str, Any]]]
    ) -> Iterator[tuple[slice, list[dict[str, Any]]]]:
        """The results of all variants on a block, in the plans' order, as soon as the last of them is there.

        Raises:
            SelfRepairError: a result is not what it must be, or a number in it is not finite.
        """
        gathered: dict[int, dict[int, dict[str, Any]]] = {}
        for unit, found in results:
            if flaw := unit.flaw(found):
                raise SelfRepairError(f"{unit.label}: {flaw}: try --dtype float32, or look at those prompts")
            here = gathered.setdefault(unit.prompts.start, {})
            here[id(unit.plan)] = found
            if len(here) == len(self.plans):
                yield unit.prompts, [here[id(plan)] for plan in self.plans]
                del gathered[unit.prompts.start]


def plans(experiment: Experiment, layout: dict[str, Any]) -> list[dict[str, Any]]:
    """The plan of each variant, for a model of this layout."""
    return [_plan(experiment, graph, layout) for graph in experiment.work.graphs]


def _plan(experiment: Experiment, graph: Graph, layout: dict[str, Any]) -> dict[str, Any]:
    """A variant's plan; where each prompt has several partners, with what varies between them."""
    work = experiment.work
    plan: dict[str, Any] = graph.plan(layout) | {"tokens_per_pass": work.tokens_per_pass}
    if (runs := work.runs(graph)) == 1:
        return plan
    return plan | {"resamples": runs, "varied": [name for name in plan["gives"] if QUANTITIES[name].ablated]}


def _job_of(plan: dict[str, Any]) -> Job:
    """What is run of a plan. With it goes its code, so that only what has several partners takes theirs along."""
    if "resamples" in plan:
        from selfrepair_nn.tracing.resamples import resamples_job

        return resamples_job
    from selfrepair_nn.tracing.jobs import ablation_job

    return ablation_job
