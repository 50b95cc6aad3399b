"""What a run would do and cost, before any weight is loaded or anything is written."""

import os
from typing import Any, Unpack

from selfrepair_nn.backends.ndif.limits import Limits
from selfrepair_nn.estimating.fitting import duration, fitted, jobs_of
from selfrepair_nn.estimating.pace import Pace
from selfrepair_nn.estimating.timetable import hours_of, of_server
from selfrepair_nn.estimating.workable import require_workable
from selfrepair_nn.given import Given
from selfrepair_nn.layout.experiment import Experiment, prepare
from selfrepair_nn.layout.revisions import Revisions, prepare_each
from selfrepair_nn.options import Options, require_known

LARGE = {"flops": 1e17, "units": 1000, "store_bytes": 10 * 2**30}
"""Beyond any of these a remote run is large: about ten minutes of one accelerator, a thousand jobs, 10 GiB."""


UNITS = (1, "hours"), (60, "minutes"), (3600, "seconds")

SUMMED = (
    *("units", "jobs", "passes", "tokens", "ablated_tokens", "flops", "store_bytes"),
    *("request_bytes", "result_bytes", "crossing_bytes", "total_crossing_bytes"),
)
"""What several revisions take so many times."""


def preview(
    recipe: str | os.PathLike[str] = "heads", *, calibrate: bool = False, **choices: Unpack[Given]
) -> dict[str, Any]:
    """The plan of a run: store, model, prompts, ablated, units, passes, tokens, flops and store_bytes.

    `less` says that this is the most it can be: with `select` or `until_ci` the run will find out how much it needs.

    A remote one also has

        jobs, job_units     how many, each of at most so many (prompts, cases): cut so that none comes near job_limit
        job_seconds         (least, most) of the longest; job_limit: after so many the server ends one
        hours               (least, most), the jobs one after the other, by rates that are `assumed` in words
        request_bytes, result_bytes, job_result_bytes (of the largest)
        crossing_bytes      of all processes in a sandbox; total_crossing_bytes: the same with split="total"
        tensor_parallel, kept_hours, link_hours: see backends.ndif.limits.Limits

    `calibrate` runs two small jobs where the run would, some times, and gives hours, job_seconds and jobs by what they
    took; only for that are weights loaded or anything sent.

    Takes what `run` takes and raises what it raises, and writes nothing. UsageError for a remote run that cannot work.
    """
    require_known(choices, ("recipe", "calibrate"))
    options = Options(**choices)
    every = prepare_each(recipe, options) if options.revisions else None
    experiment = fitted(every.first if every else prepare(recipe, options))
    limits = pace = None
    if calibrate:
        from selfrepair_nn.estimating.calibration import pace_of, trial

        with trial(experiment) as (runner, limits):
            pace = pace_of(experiment, runner, limits)
    return of_each(every, limits, pace) if every else preview_of(experiment, limits, pace)


def of_each(every: Revisions, limits: Limits | None = None, pace: Pace | None = None) -> dict[str, Any]:
    """The plan of a run of several revisions: what each takes, so many times."""
    one, times = preview_of(every.first, limits, pace), len(every.experiments)
    summed = {name: times * one[name] for name in SUMMED if name in one}
    if "hours" in one:
        summed["hours"] = tuple(times * hours for hours in one["hours"])
    model = f"{every.request.model} ({one['model'].rpartition(' (')[2]}"
    return one | summed | {"store": str(every.path), "model": model, "revisions": [*every.experiments]}


def preview_of(experiment: Experiment, limits: Limits | None = None, pace: Pace | None = None) -> dict[str, Any]:
    """The plan of an experiment that is prepared already; see `preview`. The pace is that of a calibration, if any."""
    experiment = fitted(experiment)
    structure, prompts = experiment.description.structure, experiment.prompts
    cost = experiment.work.cost()
    cost["flops"] += 2 * structure.d_model * structure.vocab_size * experiment.unembedded
    planned: dict[str, Any] = {}
    if experiment.options.served or pace:
        jobs = jobs_of(experiment, limits, pace)
        if experiment.options.served:
            require_workable(jobs)
            planned = of_server(jobs)
        planned |= hours_of(jobs)
    return {
        "store": str(experiment.path),
        "model": f"{experiment.description.source.name} ({structure.n_layers} layers x {structure.n_heads} heads)",
        "prompts": f"{prompts.described} from {prompts.source['name']}",
        "ablated": f"{_count(experiment)}, {experiment.ablation} ablation",
        "block": experiment.work.block,
        "less": experiment.ranked,
        **cost,
        "store_bytes": experiment.work.store_bytes(experiment.quantities, experiment.precision),
        **planned,
    }


def large(found: dict[str, Any]) -> bool:
    """Whether a plan is one that a server's owner would want to be asked about."""
    return any(found[name] > limit for name, limit in LARGE.items()) or found.get("jobs", 0) > LARGE["units"]


def _count(experiment: Experiment) -> str:
    number = len(experiment.graph.ablate)
    return f"the {experiment.graph.strongest} strongest of {number}" if experiment.undecided else str(number)


def preview_text(found: dict[str, Any]) -> str:
    """The same for a person, one line each."""
    most = "at most " if found["less"] else ""
    lines = {
        "store": found["store"],
        "model": found["model"],
        **({"revisions": ", ".join(found["revisions"])} if "revisions" in found else {}),
        "prompts": found["prompts"],
        "ablated": found["ablated"],
        "units": f"{found['units']} of {found['block']} prompts",
        "ablated passes": f"{most}{found['passes']:,}",
        "tokens": f"{found['tokens']:,} clean, {most}{found['ablated_tokens']:,} ablated",
        "arithmetic": f"{most}{found['flops'] / 1e12:,.3g} TFLOP",
        "store size": f"{_size(found['store_bytes'])} before compression",
    }
    lines |= _served_lines(found) if "request_bytes" in found else {}
    if "hours" in found:
        said = found["assumed"] or "as measured on two small jobs"
        lines["time"] = f"{most}{_range(found['hours'])}, one job after the other; {said}"
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _served_lines(found: dict[str, Any]) -> dict[str, str]:
    """What there is to say of a server."""
    prompts, cases = (_counted(*pair) for pair in zip(found["job_units"], ("prompt", "ablation"), strict=True))
    longest = tuple(s / 3600 for s in found["job_seconds"])
    small = "more" if found["job_result_bytes"] > found["inline_bytes"] else "less"
    return {
        "jobs": f"{found['jobs']:,} of at most {prompts} and {cases}",
        "a job": f"{_range(longest)}, of {duration(found['job_limit'])} that the server gives it{_too_slow(found)}",
        "requests": f"{_size(found['request_bytes'])} go to the server",
        "results": f"{_size(found['result_bytes'])} come back, before compression; of a job at most "
        f"{_size(found['job_result_bytes'])}, {small} than comes within an answer",
        "kept": f"for {_counted(found['kept_hours'], 'hour')}, where the server gives their addresses anew, else for "
        f"{_counted(found['link_hours'], 'hour')}: a run that stops must be resumed before",
        "crossings": _crossings(found),
    }


def _too_slow(found: dict[str, Any]) -> str:
    """What is to be said where a slow server would end the smallest jobs, and a fast one would not."""
    if found["job_seconds"][1] <= found["job_limit"]:
        return ""
    return ": too little where the server is slow, and smaller jobs would not help; --calibrate tells"


def _crossings(found: dict[str, Any]) -> str:
    text = f"about {_size(found['crossing_bytes'])} within the server, if it is a shared one"
    if found["tensor_parallel"] > 1:
        text += f" ({found['tensor_parallel']} processes together)"
    if "total_crossing_bytes" in found:
        text += f"; {_size(found['total_crossing_bytes'])} with --split total, which is enough for layer trends"
    return text


def _counted(count: float, what: str) -> str:
    return f"{count:,.0f} {what}{'s' * (count != 1)}"


def _range(hours: tuple[float, float]) -> str:
    """Both ends in the unit of the longer one."""
    size, unit = next((s, u) for s, u in UNITS if hours[1] * s >= 1 or u == "seconds")
    least, most = (f"{size * each:,.{0 if size * hours[1] >= 20 else 1}f}" for each in hours)
    return f"{least} to {most} {unit}"


def _size(count: float) -> str:
    unit = "MiB" if count < 2**30 else "GiB"
    return f"{count / (2**20 if unit == 'MiB' else 2**30):,.1f} {unit}"
