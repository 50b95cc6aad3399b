"""How long a server takes for a job: what the job costs, and the rates at which servers work, assumed or measured."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from selfrepair_nn.backends.ndif.limits import Limits
from selfrepair_nn.estimating.traffic import crossing, depth
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.layout.units import Unit

SAFETY = 2
"""No job is sent that is expected to take more than one in so many parts of the time that a server gives it."""

SPREAD = 1.5
"""What is measured on small jobs is told from so many times less to so many times more: others use servers too."""

JOB_SECONDS = 0.7, 5.0
"""What a job takes beside its work: in a sandbox that runs already, or that must start (ndif.services.ray.sandbox)."""

FLOPS = 5e13, 3e14
"""Operations a second of one accelerator in bfloat16, on passes from small to full: assumed, not measured."""

CROSSED = 5e7, 2.5e8
"""Bytes a second into and out of a sandbox: what processors of a test server were seen to do, slow and fast."""


KEPT = 1000
"""Plans whose cost is kept at a time: where cuts are looked for, many are tried."""


@dataclass(frozen=True)
class Cost:
    """What a job takes: floating-point operations, and bytes that cross into its sandbox and out, of all processes.

    `once` are those bytes that cross however small the job is cut: of the maps that one case needs.
    """

    flops: float
    crossing: float
    once: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Seconds for a job, for an operation, and for a byte that crosses."""

    job: float
    flop: float
    byte: float

    def seconds(self, cost: Cost) -> float:
        return self.job + self.work(cost)

    def work(self, cost: Cost) -> float:
        """Without what every job takes."""
        return cost.flops * self.flop + cost.crossing * self.byte

    def times(self, factor: float) -> "Rates":
        """The same, so many times slower at its work."""
        return replace(self, flop=factor * self.flop, byte=factor * self.byte)


@dataclass(frozen=True)
class Pace:
    """What a server can be expected to do: between `fast` and `slow`. `measured` says whether that was tried there."""

    fast: Rates
    slow: Rates
    measured: bool = False

    def seconds(self, cost: Cost) -> tuple[float, float]:
        """The least and the most that a job is expected to take."""
        return self.fast.seconds(cost), self.slow.seconds(cost)

    def fits(self, cost: Cost, limits: Limits) -> bool:
        """Whether a job stays clear of the time limit, even if slow; also if smaller ones would stay no clearer of it.

        What any such job takes is left out of what is halved: of the time that remains it may take half.
        """
        for rates in (self.slow, self.fast):
            once = rates.job + cost.once * rates.byte
            if once < limits.seconds:
                return rates.seconds(cost) <= once + (limits.seconds - once) / SAFETY
        return True

    def learned(self, cost: Cost, seconds: float) -> "Pace":
        """The pace once a job was seen to take so long: that of the slowest job seen, whatever was assumed before.

        Jobs that are over before their work shows are no measure of it.
        """
        work = self.slow.work(cost)
        if work < self.slow.job:
            return self
        factor = seconds / work
        return replace(self, slow=self.slow.times(max(1.0, factor) if self.measured else factor), measured=True)


def assumed(limits: Limits) -> Pace:
    """The pace of a server of which nothing is known but its limits.

    Where it may be that jobs run beside the weights, the fast end has nothing that crosses.
    """
    fast = Rates(JOB_SECONDS[0], 1 / (FLOPS[1] * limits.degree), 1 / CROSSED[1] if limits.sandboxed else 0)
    return Pace(fast, Rates(JOB_SECONDS[1], 1 / FLOPS[0], 0 if limits.sandboxed is False else 1 / CROSSED[0]))


def measured(assumption: Pace, jobs: list[tuple[Cost, float]]) -> Pace:
    """The pace that follows from jobs that were run: (cost, seconds) of small ones first, then of larger ones.

    What one takes more than the other is work, in the proportion of arithmetic and crossings that was assumed; the rest
    is what every job takes.
    """
    small, large = jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]
    ends = [
        _through(assumption.slow, each(small, key=_seconds), each(large, key=_seconds)) for each in (min, max)
    ]
    fast, slow = min(ends, key=_flop), max(ends, key=_flop)
    job = min(e.job for e in ends) / SPREAD, max(e.job for e in ends) * SPREAD
    return Pace(replace(fast.times(1 / SPREAD), job=job[0]), replace(slow.times(SPREAD), job=job[1]), True)


def _through(rates: Rates, small: tuple[Cost, float], large: tuple[Cost, float]) -> Rates:
    """Rates in the proportion of these at which both jobs take what they took."""
    more = rates.work(large[0]) - rates.work(small[0])
    factor = max(0.0, large[1] - small[1]) / more if more > 0 else 0.0
    return replace(rates.times(factor), job=max(0.0, small[1] - factor * rates.work(small[0])))


def _seconds(job: tuple[Cost, float]) -> float:
    return job[1]


def _flop(rates: Rates) -> float:
    return rates.flop


class Costs:
    """What the units of an experiment cost on a server with these limits: its processes, and bytes of a number."""

    def __init__(self, experiment: Experiment, limits: Limits) -> None:
        self._experiment, self._itemsize = experiment, limits.degree * limits.itemsize
        self._known: dict[int, _OfPlan] = {}

    def of(self, unit: Unit) -> Cost | None:
        """The cost of a job; None of one that ablates nothing, which costs little."""
        if not _ablates(unit):
            return None
        work, plan = self._experiment.work, self._of_plan(unit.plan)
        structure, cases, runs = work.structure, len(unit.plan["cases"]), unit.plan.get("resamples", 1)
        tokens, wanted = (unit.prompts.stop - unit.prompts.start) * work.length, _wanted(unit, work.length)
        unembedded = self._experiment.unembedded * cases * runs * tokens / max(1, work.case_tokens)
        size = structure.d_model + structure.vocab_size
        passes = 2 + runs * wanted * plan.depth / structure.n_layers
        flops = structure.layer_parameters * tokens * passes + structure.d_model * structure.vocab_size * unembedded
        crossed = plan.once + wanted * plan.of_token * tokens + size * unembedded
        return Cost(2 * flops, self._itemsize * crossed, self._itemsize * plan.least)

    def _of_plan(self, plan: dict[str, Any]) -> "_OfPlan":
        if len(self._known) > KEPT:
            self._known.clear()
        if id(plan) not in self._known:
            least = crossing(plan | {"cases": plan["cases"][-1:]}, 1)[0]
            self._known[id(plan)] = _OfPlan(plan, depth(plan), *crossing(plan, plan.get("resamples", 1)), least)
        return self._known[id(plan)]


@dataclass(frozen=True)
class _OfPlan:
    """Of a plan, which is kept so that its id stays its own: layers that all its cases go through, and what crosses.

    `least` is what crosses once where there is only one case.
    """

    plan: dict[str, Any]
    depth: int
    once: int
    of_token: int
    least: int


def _ablates(unit: Unit) -> bool:
    from selfrepair_nn.tracing.jobs import ablation_job
    from selfrepair_nn.tracing.resamples import resamples_job

    return unit.job in (ablation_job, resamples_job)


def _wanted(unit: Unit, length: int) -> float:
    """The part of the unit's ablated tokens that is wanted."""
    if unit.wanted is None:
        return 1.0
    here = unit.wanted[:, unit.prompts]
    return float(np.sum(here)) / (here.size * length)
