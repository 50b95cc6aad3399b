"""Where jobs run. Every backend takes units of work and gives each with its result: a dict of tensors."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from selfrepair_nn.errors import SelfRepairError
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.models.load import load_described, structure_only
from selfrepair_nn.models.model import Model
from selfrepair_nn.options import BACKENDS
from selfrepair_nn.shown import tell
from selfrepair_nn.values import one_of

Backend = Callable[[Iterable[Unit]], Iterator[tuple[Unit, dict[str, Any]]]]


def loaded(experiment: Experiment) -> Model:
    """The model of an experiment, not yet proven; only its structure where the weights are on a server."""
    o = experiment.options
    if o.served:
        return structure_only(experiment.description, experiment.tokenizer)
    if isinstance(o.model, Model):
        return o.model
    return load_described(experiment.description, experiment.tokenizer, o.dtype, o.device, check=False)


def backend(name: str, model: Model, vocabulary: np.ndarray | None = None) -> Backend:
    """The backend of that name for a model in this process: units are run in order, each when it is asked for.

    `vocabulary` are the token ids that the units will measure: what is probed of the weights for them is probed once.

    Raises:
        UsageError: no backend of that name.
    """
    one_of("backend", name, BACKENDS)
    if name == "simulated":
        import nnsight

        nnsight.register("selfrepair_nn")
    remote = "local" if name == "simulated" else False

    return _Local(model, remote, vocabulary).run


class _Local:
    """A model in this process. What does not fit its memory is done in smaller pieces, and so is what follows."""

    def __init__(self, model: Model, remote: Any, vocabulary: np.ndarray | None) -> None:
        self._model, self._remote, self._vocabulary = model, remote, vocabulary
        self._tokens: int | None = None
        self._known: Any = None

    def run(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, dict[str, Any]]]:
        for unit in units:
            yield unit, self._result(unit)

    def _result(self, unit: Unit) -> dict[str, Any]:
        """The unit's result: in passes of fewer tokens if memory is short, at last from the unit's halves.

        Raises:
            SelfRepairError: one prompt with one case does not fit.
        """
        from selfrepair_nn.tracing.session import run_session

        while True:
            plan = self._smaller(unit.plan)
            try:
                known = None if self._remote else self._weights()
                return run_session(unit.job, self._model.nn, unit.arrays, plan, unit.tick, self._remote, known)
            except Exception as error:
                if not out_of_memory(error):
                    raise
            self._known = known = None
            collect_memory()
            length = unit.arrays["tokens"].shape[1]
            if plan.get("tokens_per_pass", 0) <= length:
                return self._from_halves(unit)
            self._tokens = max(length, plan["tokens_per_pass"] // 2)
            tell(f"out of memory: going on with {self._tokens} tokens in a pass")

    def _weights(self) -> Any:
        """What earlier units found of the weights."""
        import torch

        from selfrepair_nn.tracing.probes import Weights

        if self._known is None:
            asked = self._vocabulary
            self._known = Weights(None if asked is None else torch.from_numpy(asked))
        return self._known

    def _smaller(self, plan: dict[str, Any]) -> dict[str, Any]:
        known = self._tokens is not None and "tokens_per_pass" in plan
        return plan | {"tokens_per_pass": self._tokens} if known else plan

    def _from_halves(self, unit: Unit) -> dict[str, Any]:
        halves = unit.halves()
        if not halves:
            raise SelfRepairError(
                f"{unit.label}: out of memory with one prompt and one case: choose a smaller --length or --dtype"
            )
        tell(f"out of memory: {unit.label}, in two halves")
        return unit.join(*(self._result(half) for half in halves))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory, or the machine's, is exhausted."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextmanager
def with_enough_memory(doing: str) -> Iterator[None]:
    """Within, memory that is short is told in one line: SelfRepairError, where nothing smaller could be done."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise SelfRepairError(
            f"out of memory {doing}: choose another --device, a smaller --dtype or a smaller model"
        ) from error


def collect_memory() -> None:
    """Give back what nothing refers to any more, a GPU's too."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def only(runner: Backend, unit: Unit) -> dict[str, Any]:
    """The result of a single unit."""
    ((_, found),) = runner([unit])
    return found
