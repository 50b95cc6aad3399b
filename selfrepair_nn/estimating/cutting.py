"""How what is ablated on a block of prompts is cut into jobs that fit a server and take the least time together.

Every job probes the unembedding, and the projection of each layer that it ablates in; of each of its prompts it makes
and reads a clean pass. So a job of few prompts and many cases probes anew for every few prompts, and one of many
prompts and few cases makes their clean passes anew for every few cases. Which is dearer depends on the model, the
layers and the record: jobs have as many cases as fit, on all prompts of the block or on half of them, a quarter …,
whatever takes the least time in all.
"""

from math import inf
from typing import Protocol

from selfrepair_nn.layout.units import Unit


class Measure(Protocol):
    """What knows what jobs take: estimating.fitting.Jobs."""

    def fits(self, unit: Unit) -> bool:
        """Whether a job stays clear of the time limit."""
        ...

    def seconds(self, unit: Unit) -> float:
        """What a job takes at most."""
        ...


def jobs_for(unit: Unit, by: Measure) -> list[Unit]:
    """The jobs that together give what a unit asks for, and take the least time."""
    jobs = cheapest(unit, by)[1]
    return jobs or [job for half in unit.halves() for job in jobs_for(half, by)]


def parts_of(unit: Unit, by: Measure) -> tuple[Unit, ...]:
    """Two parts of a unit that does not fit, each of about half of its `jobs_for`; none of one that is a job."""
    if by.fits(unit):
        return ()
    jobs = cheapest(unit, by)[1]
    if jobs is None:
        return unit.halves()
    return unit.cut(sum(len(job.plan["cases"]) for job in jobs[: len(jobs) // 2])) if len(jobs) > 1 else ()


def cheapest(unit: Unit, by: Measure, known: dict[int, float] | None = None) -> tuple[float, list[Unit] | None]:
    """Seconds that what a unit asks for takes, and the jobs; None for these where its prompts are halved first.

    What was cut along the cases is cut no other way, if it can be, so that jobs are those of the whole that it is of.
    `known` are the seconds for other numbers of its prompts, which are added to: blocks of one size are alike.
    """
    if by.fits(unit):
        return by.seconds(unit), [unit]
    jobs, known = _filled(unit, by), {} if known is None else known
    seconds = sum(map(by.seconds, jobs)) if jobs else inf
    if _prompts(unit) == 1 or (jobs and unit.part):
        return seconds, jobs
    halves = unit.halves()
    for half in halves:
        if _prompts(half) not in known:
            known[_prompts(half)] = cheapest(half, by, known)[0]
    halved = sum(known[_prompts(half)] for half in halves)
    return (seconds, jobs) if seconds <= halved else (halved, None)


def _filled(unit: Unit, by: Measure) -> list[Unit]:
    """Jobs on all prompts of a unit with as many of its cases as fit each; none at all where one is too much.

    With a single prompt, a job has a case whether it fits or not.
    """
    count, first, size, jobs = len(unit.plan["cases"]), 0, 1, list[Unit]()
    while first < count:
        size = _fitting(unit, by, first, size) or (_prompts(unit) == 1)
        if not size:
            return []
        jobs.append(unit.some_cases(first, first + size) if size < count else unit)
        first += size
    return jobs


def _fitting(unit: Unit, by: Measure, first: int, guess: int) -> int:
    """How many cases from the first one on fit a job with all prompts; looked for from a guess on."""
    low, high, step = 0, len(unit.plan["cases"]) - first + 1, 1
    size = min(guess, high - 1)
    while high - low > 1:
        if by.fits(unit.some_cases(first, first + size)):
            low, size = size, size + step
        else:
            high, size = size, size - step
        step *= 2
        size = size if low < size < high else (low + high) // 2
    return low


def _prompts(unit: Unit) -> int:
    return unit.prompts.stop - unit.prompts.start
