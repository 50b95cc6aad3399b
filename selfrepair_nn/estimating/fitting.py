"""Jobs that fit a server: blocks of prompts cut so that none comes near its limits, before and while they run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from selfrepair_nn.backends.ndif.limits import Limits, limits_of
from selfrepair_nn.estimating.cutting import cheapest, jobs_for, parts_of
from selfrepair_nn.estimating.pace import Cost, Costs, Pace, assumed
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.layout.sweep import Sweep, plans
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.models.model import layout_of

ROUNDING = 1e-9
"""Shares of time that are no reason for a larger block."""

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
        return Costs(self.experiment, self.limits)

    def of(self, block: slice) -> list[Unit]:
        """The jobs that ablate on this block of prompts, one or several for each variant."""
        return [job for unit in self._units(block) for job in jobs_for(unit, self)]

    @cached_property
    def blocks(self) -> list[tuple[int, list[Unit]]]:
        """The jobs of a block, and of how many blocks they are those: all are alike but the last."""
        units = self.experiment.work.units
        first, last = (units[at].stop - units[at].start for at in (0, -1))
        if first == last:
            return [(len(units), self.of(units[0]))]
        return [(len(units) - 1, self.of(units[0])), (1, self.of(units[-1]))]

    @property
    def best_block(self) -> int:
        """Prompts in a block with which all jobs together take the least time.

        What it gives fits here, and all of it comes back while the server still keeps the first of it, one job after
        the other: a block is stored when it is whole. One prompt is always a block.
        """
        work, taken = self.experiment.work, dict[int, float]()
        if self._whole(work.block):
            return work.block
        for block in _even(work.prompts, work.block):
            seconds = self._seconds_of(block)
            if block == 1 or (self._fits_here(block) and seconds <= 3600 * self.limits.kept_hours):
                whole, rest = divmod(work.prompts, block)
                taken[block] = whole * seconds + (self._seconds_of(rest) if rest else 0)
            if block in taken and self._whole(block):
                break
        least = min(taken.values()) * (1 + ROUNDING)
        return min(size for size, seconds in taken.items() if seconds <= least)

    def _whole(self, block: int) -> bool:
        """Whether so many prompts need no more than a job for each variant."""
        return self._fits_here(block) and all(map(self.fits, self._units(slice(0, block))))

    def _fits_here(self, block: int) -> bool:
        return block * self.bytes_of_prompt <= JOINED

    def fits(self, unit: Unit) -> bool:
        """Whether a job stays clear of the time limit."""
        cost = self.costs.of(unit)
        return cost is None or self.pace.fits(cost, self.limits)

    def seconds(self, unit: Unit) -> float:
        """What a job takes at most; nothing is known of one that ablates nothing."""
        cost = self.costs.of(unit)
        return 0.0 if cost is None else self.pace.slow.seconds(cost)

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

    def _seconds_of(self, prompts: int) -> float:
        return sum(cheapest(unit, self)[0] for unit in self._units(slice(0, prompts)))


class Cutting:
    """Cuts jobs before they are sent, by the pace that earlier ones were seen to have: a `Cutter` of jobs in flight."""

    def __init__(self, jobs: Jobs, notify: Callable[[str], None]) -> None:
        self.jobs, self._notify, self._told = jobs, notify, False

    def cut(self, unit: Unit) -> tuple[Unit, ...]:
        """The two parts of a job that would come near the time limit, as far as is known now; none of one that fits."""
        parts = parts_of(unit, self.jobs)
        if parts and not self._told:
            given, self._told = duration(self.jobs.limits.seconds), True
            self._notify(f"jobs are cut so that none comes near the {given} that the server gives each")
        return parts

    def took(self, unit: Unit, seconds: float) -> None:
        """Learn from a job."""
        if cost := self.jobs.costs.of(unit):
            self.jobs = replace(self.jobs, pace=self.jobs.pace.learned(cost, seconds))


def _even(prompts: int, block: int) -> Iterator[int]:
    """Prompts in a block, from so many down to one: each time in twice as many blocks, about as large."""
    count = -(-prompts // block)
    while (size := -(-prompts // count)) > 1:
        yield size
        count *= 2
    yield 1


def _layer(case: list[Any]) -> int:
    """The layer of a case's first site, as plans have it."""
    from selfrepair_nn.tracing.sites import site_of

    return min(site_of(entry).layer for entry in case)


def jobs_of(experiment: Experiment, limits: Limits | None = None, pace: Pace | None = None) -> Jobs:
    """The jobs of an experiment; the limits as chosen, and the pace as assumed, where they are not known."""
    limits = limits or limits_of(experiment.options)
    return Jobs(experiment, limits, pace or assumed(limits))


def fitted(experiment: Experiment) -> Experiment:
    """The experiment in blocks of as many prompts as make it cheapest on a server, unless their number was chosen.

    It follows from what is chosen alone, not from what a server says: the same command cuts alike each time.
    """
    o = experiment.options
    if not o.served or o.batch_size:
        return experiment
    return experiment.in_units_of(jobs_of(experiment).best_block)


def duration(seconds: float, digits: int = 0) -> str:
    """A time in words, with so many digits of a fraction."""
    count, unit = (seconds / 60, "minute") if seconds >= 120 else (seconds, "second")
    said = f"{count:,.{digits}f}"
    return f"{said} {unit}{'s' * (said != '1')}"
