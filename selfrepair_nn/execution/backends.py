"""Where jobs run. Every backend takes units of work and gives each with its result: a dict of tensors."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from selfrepair_nn.execution.experiment import Experiment
from selfrepair_nn.execution.units import Unit
from selfrepair_nn.models.load import Model, load_described, structure_only
from selfrepair_nn.options import BACKENDS, one_of

Backend = Callable[[Iterable[Unit]], Iterator[tuple[Unit, dict[str, Any]]]]


def loaded(experiment: Experiment) -> Model:
    """The model of an experiment: with its weights, or only its structure where they are on a server."""
    o = experiment.options
    if o.served:
        return structure_only(experiment.description, experiment.tokenizer)
    if isinstance(o.model, Model):
        return o.model
    return load_described(experiment.description, experiment.tokenizer, o.dtype, o.device, o.check)


def backend(name: str, model: Model) -> Backend:
    """The backend of that name for a model in this process: units are run in order, each when it is asked for.

    Raises:
        UsageError: no backend of that name.
    """
    one_of("backend", name, BACKENDS)
    if name == "simulated":
        import nnsight

        nnsight.register("selfrepair_nn")
    remote = "local" if name == "simulated" else False

    def run(units: Iterable[Unit]) -> Iterator[tuple[Unit, dict[str, Any]]]:
        from selfrepair_nn.tracing.session import run_session

        for unit in units:
            yield unit, run_session(unit.job, model.nn, unit.arrays, unit.plan, unit.tick, remote)

    return run


def only(runner: Backend, unit: Unit) -> dict[str, Any]:
    """The result of a single unit."""
    ((_, found),) = runner([unit])
    return found
