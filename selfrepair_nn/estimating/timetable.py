"""What the jobs of a run take together: hours, bytes each way, what crosses into a sandbox."""

from typing import Any

import numpy as np

from selfrepair_nn.estimating.fitting import Jobs
from selfrepair_nn.estimating.pace import CROSSED, FLOPS
from selfrepair_nn.estimating.traffic import at_the_end_alone, request_bytes, result_bytes


def hours_of(jobs: Jobs) -> dict[str, Any]:
    """How long jobs take, one after the other: hours, job_seconds of the longest, and what that is based on."""
    found, longest = np.zeros(2), np.zeros(2)
    for count, units in jobs.blocks:
        seconds = np.array([jobs.pace.seconds(jobs.cost(unit)) for unit in units])
        found, longest = found + count * seconds.sum(0), np.maximum(longest, seconds.max(0))
    return {
        "hours": tuple((found / 3600).tolist()),
        "job_seconds": tuple(longest.tolist()),
        "assumed": None if jobs.pace.measured else assumption(jobs),
    }


def assumption(jobs: Jobs) -> str:
    """The rates that stand behind an estimate, in words."""
    byte = jobs.pace.slow.byte
    ends = ((FLOPS, 1e12), (CROSSED, 1e6))
    flops, crossed = (f"{rates[0] / size:,.0f} to {rates[1] / size:,.0f}" for rates, size in ends)
    beside = f" and {crossed} MB/s into a sandbox" if byte else ""
    return f"assumed {flops} TFLOP/s of an accelerator{beside}: --calibrate measures"


def of_server(jobs: Jobs) -> dict[str, Any]:
    """What goes to a server, comes back and crosses there, and its limits."""
    limits, experiment = jobs.limits, jobs.experiment
    every = [(count, unit) for count, units in jobs.blocks for unit in units]
    number = sum(count for count, _ in every)
    results = [(count, result_bytes(unit, experiment.precision)) for count, unit in every]
    return {
        "jobs": number,
        "job_units": (
            max(unit.prompts.stop - unit.prompts.start for _, unit in every),
            max(len(unit.plan["cases"]) for _, unit in every),
        ),
        "job_limit": limits.seconds,
        "request_bytes": number * request_bytes(experiment),
        "result_bytes": sum(count * size for count, size in results),
        "job_result_bytes": max(size for _, size in results),
        "crossing_bytes": round(sum(count * jobs.cost(unit).crossing for count, unit in every)),
        **at_the_end_alone(experiment, limits),
        "tensor_parallel": limits.degree,
        "kept_hours": limits.kept_hours,
        "link_hours": limits.link_hours,
        "inline_bytes": limits.inline_bytes,
    }
