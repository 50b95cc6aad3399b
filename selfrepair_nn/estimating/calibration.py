"""How long a run will take, from a few small jobs where it would run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from selfrepair_nn.backends.local import Backend, backend, loaded, only
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.layout.sweep import Sweep, plans
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.models.model import layout_of

CASES = 8
"""Ablated in the largest of the jobs."""


def hours(experiment: Experiment, runner: Backend) -> float:
    """The estimated duration of a whole run, its jobs one after the other.

    A job takes a fixed time, and a time for each layer that each ablated prompt goes through. Both come from two jobs
    on the first block of prompts, with one case and with a few; a first one, which has much to load, is not counted.
    """
    unit = _first(experiment)
    step = -(-len(unit.plan["cases"]) // CASES)
    few, one = _with(unit, slice(None, None, step)), _with(unit, slice(0, 1))
    only(runner, one)
    short, long = _seconds(runner, one), _seconds(runner, few)
    more = _layers(few) - _layers(one)
    rate = max(0.0, long - short) / more if more else 0.0
    fixed = max(0.0, short - rate * _layers(one))
    jobs, variants = len(experiment.work.units), len(experiment.work.graphs)
    share = experiment.prompts.n / (unit.prompts.stop - unit.prompts.start)
    return variants * (jobs * fixed + share * rate * _layers(unit)) / 3600


@contextmanager
def trial(experiment: Experiment) -> Iterator[Backend]:
    """The backend that a run would have, without a store."""
    model = loaded(experiment)
    if not experiment.options.served:
        yield backend(experiment.options.backend, model)
        return
    from selfrepair_nn.backends.ndif.ledger import Ledger
    from selfrepair_nn.backends.ndif.served import connected

    with TemporaryDirectory() as folder:
        yield connected(experiment.options, model, Ledger(Path(folder) / "jobs.jsonl", "trial"))[0]


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
    name = f"calibration with {len(cases)} cases, {time.time():.3f}"
    return replace(unit, name=name, plan=unit.plan | {"cases": cases}, thresholds=limits)


def _layers(unit: Unit) -> int:
    """Layers that the unit's ablated cases go through, summed."""
    return sum(unit.plan["model"]["n_layers"] - min(site[1] for site in case) for case in unit.plan["cases"])


def _seconds(runner: Backend, unit: Unit) -> float:
    began = time.perf_counter()
    only(runner, unit)
    return time.perf_counter() - began
