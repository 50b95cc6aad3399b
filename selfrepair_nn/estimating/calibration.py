"""How long a run will take, from a few small jobs where it would run."""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from selfrepair_nn.backends.local import Backend, backend, loaded, only
from selfrepair_nn.backends.ndif.limits import Limits
from selfrepair_nn.estimating.pace import Costs, Pace, assumed, measured
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.layout.sweep import Sweep, plans
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.models.model import layout_of

CASES = 8
"""Ablated in the largest of the jobs."""

NONE = Limits(seconds=inf, sandboxed=False)
"""What limits jobs in this process."""


def pace_of(experiment: Experiment, runner: Backend, limits: Limits) -> Pace:
    """The pace at which a backend works: from two jobs on the first block of prompts, with one case and with a few.

    Each is run twice. A first one, which has much to load, is not counted.
    """
    unit, costs = _first(experiment), Costs(experiment, limits)
    step = -(-len(unit.plan["cases"]) // CASES)
    few, one = slice(None, None, step), slice(0, 1)
    _seconds(runner, _with(unit, one))
    jobs = []
    for chosen in (one, one, few, few):
        each = _with(unit, chosen)
        cost = costs.of(each)
        assert cost is not None
        jobs.append((cost, _seconds(runner, each)))
    return measured(assumed(limits), jobs)


@contextmanager
def trial(experiment: Experiment) -> Iterator[tuple[Backend, Limits]]:
    """The backend that a run would have, without a store, and its limits."""
    model = loaded(experiment)
    if not experiment.options.served:
        yield backend(experiment.options.backend, model), NONE
        return
    from selfrepair_nn.backends.ndif.ledger import Ledger
    from selfrepair_nn.backends.ndif.served import connected, limits_there

    with TemporaryDirectory() as folder:
        jobs, facts = connected(experiment.options, model, Ledger(Path(folder) / "jobs.jsonl", "trial"))
        yield jobs, limits_there(jobs, experiment.options, facts["dtype"])


def _first(experiment: Experiment) -> Unit:
    """The first unit, with stand-ins for what would have to be found out before it."""
    limits = np.full(len(experiment.graph.ablate), np.inf) if experiment.shared else None
    found = zip(
        experiment.work.graphs, plans(experiment, layout_of(experiment.description.structure)), strict=True
    )
    same = [
        plan | ({"replacement": {"kind": "identity"}} if graph.replaced_by.reads_means else {})
        for graph, plan in found
    ]
    return Sweep(experiment, same, {}, limits).units(experiment.work.units[:1])[0]


def _with(unit: Unit, chosen: slice) -> Unit:
    """The unit with some of its cases only."""
    cases = unit.plan["cases"][chosen]
    limits = None if unit.thresholds is None else unit.thresholds[chosen]
    name = f"calibration with {len(cases)} cases, {uuid.uuid4().hex[:8]}"
    return replace(unit, name=name, plan=unit.plan | {"cases": cases}, thresholds=limits)


def _seconds(runner: Backend, unit: Unit) -> float:
    began = time.perf_counter()
    only(runner, unit)
    return time.perf_counter() - began
