"""Jobs that fit a server: blocks of prompts cut so that none comes near its limits, before and while they run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from selfrepair_nn.backends.ndif.limits import Limits, limits_of
from selfrepair_nn.estimating.pace import Cost, Costs, Pace, assumed
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.layout.sweep import Sweep, plans
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.models.model import layout_of

JOINED = 2**30
"""Bytes of a block's results, beyond which it is cut further: they are put together in this machine's memory."""


@dataclass(frozen=True)
class Jobs:
    """The jobs of an experiment on a server: what each costs, and whether it fits."""

    experiment: Experiment
    limits: Limits
    pace: Pace

    @cached_property
    def costs(self) -> Costs:
        return Costs(self.experiment, self.limits.degree)

    def of(self, block: slice) -> list[Unit]:
        """The jobs that ablate on this block of prompts, one or several for each variant."""
        return [piece for unit in self._units(block) for piece in self._pieces(unit)]

    def whole(self, block: slice) -> bool:
        """Whether the block needs no more than a job for each variant, and its results fit here."""
        size = (block.stop - block.start) * self.bytes_of_prompt
        return size <= JOINED and all(self.fits(unit) for unit in self._units(block))

    def fits(self, unit: Unit) -> bool:
        """Whether a job stays clear of the time limit."""
        cost = self.costs.of(unit)
        return cost is None or self.pace.fits(cost, self.limits)

    @property
    def bytes_of_prompt(self) -> int:
        """What comes back of one prompt, before compression."""
        return self.experiment.bytes_of_token * self.experiment.work.length

    @property
    def smallest(self) -> Unit:
        """The costliest of the smallest jobs: one prompt, and the case that goes through most layers."""
        units = [self._lowest(unit) for unit in self._units(slice(0, 1))]
        return max(units, key=lambda unit: self.pace.seconds(self.cost(unit)))

    def cost(self, unit: Unit) -> Cost:
        """What a job that ablates costs."""
        found = self.costs.of(unit)
        assert found is not None
        return found

    def _lowest(self, unit: Unit) -> Unit:
        singles = {}
        for index, case in enumerate(unit.plan["cases"]):
            singles.setdefault(_layer(case), index)
        first = singles[min(singles)]
        return replace(unit, plan=unit.plan | {"cases": unit.plan["cases"][first : first + 1]})

    def _units(self, block: slice) -> list[Unit]:
        return Sweep(self.experiment, self._plans, {}, None).units([block])

    @cached_property
    def _plans(self) -> list[dict[str, Any]]:
        return plans(self.experiment, layout_of(self.experiment.work.structure))

    def _pieces(self, unit: Unit) -> Iterator[Unit]:
        halves = () if self.fits(unit) else unit.halves()
        if not halves:
            yield unit
        for half in halves:
            yield from self._pieces(half)


class Cutting:
    """Cuts jobs before they are sent, by the pace that earlier ones were seen to have: a `Cutter` of jobs in flight."""

    def __init__(self, jobs: Jobs, notify: Callable[[str], None]) -> None:
        self.jobs, self._notify, self._told = jobs, notify, False

    def fits(self, unit: Unit) -> bool:
        """Whether a job stays clear of the time limit, as far as is known now."""
        fits = self.jobs.fits(unit)
        if not fits and not self._told and unit.halves():
            given, self._told = duration(self.jobs.limits.seconds), True
            self._notify(f"jobs are cut so that none comes near the {given} that the server gives each")
        return fits

    def took(self, unit: Unit, seconds: float) -> None:
        """Learn from a job."""
        if cost := self.jobs.costs.of(unit):
            self.jobs = replace(self.jobs, pace=self.jobs.pace.learned(cost, seconds))


def _layer(case: list[Any]) -> int:
    """The layer of a case's first site, as plans have it."""
    from selfrepair_nn.tracing.sites import site_of

    return min(site_of(entry).layer for entry in case)


def jobs_of(experiment: Experiment, limits: Limits | None = None, pace: Pace | None = None) -> Jobs:
    """The jobs of an experiment; the limits as chosen, and the pace as assumed, where they are not known."""
    limits = limits or limits_of(experiment.options)
    return Jobs(experiment, limits, pace or assumed(limits))


def fitted(experiment: Experiment) -> Experiment:
    """The experiment in blocks of as many prompts as a job can be given, unless their number was chosen.

    It follows from what is chosen alone, not from what a server says: the same command cuts alike each time.
    """
    o, work = experiment.options, experiment.work
    if not o.served or o.batch_size:
        return experiment
    jobs, block = jobs_of(experiment), work.block
    while block > 1 and not jobs.whole(slice(0, block)):
        block = -(-block // 2)
    return experiment.in_units_of(block)


def duration(seconds: float) -> str:
    """A time in words."""
    return f"{seconds / 60:,.0f} minutes" if seconds >= 120 else f"{seconds:,.0f} seconds"
