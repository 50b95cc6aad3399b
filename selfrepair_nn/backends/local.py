"""Where jobs run. Every backend takes units of work and gives each with its result: a dict of tensors."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from selfrepair_nn.errors import SelfRepairError
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.layout.greeting import first_unit
from selfrepair_nn.layout.packing import MOST
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.models.greeting import greeting_of
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


def backend(
    name: str,
    model: Model,
    vocabulary: np.ndarray | None = None,
    settled: Callable[[int], Any] | None = None,
) -> Backend:
    """The backend of that name for a model in this process: units are run in order, each when it is asked for.

    A GPU has the next unit to compute already when one is given. `vocabulary` are the token ids that the units will
    measure: what is probed of the weights for them is probed once. Where `settled` is given, how many tokens a pass has
    follows on a GPU from what is measured there, and it is told the number once that is known; else from the plan.

    Raises:
        UsageError: no backend of that name.
    """
    one_of("backend", name, BACKENDS)
    if name == "simulated":
        import nnsight

        nnsight.register("selfrepair_nn")
    remote = "local" if name == "simulated" else False

    return _Local(model, remote, vocabulary, settled).run


class _Local:
    """A model in this process. What does not fit its memory is done in smaller pieces, and so is what follows."""

    def __init__(
        self, model: Model, remote: Any, vocabulary: np.ndarray | None, settled: Callable[[int], Any] | None
    ) -> None:
        self._model, self._remote, self._vocabulary, self._settled = model, remote, vocabulary, settled
        self._room: Any = None
        self._known: Any = None

    def run(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, dict[str, Any]]]:
        """Each unit with its result. What a GPU computes is brought home once it has the next unit, too."""
        before: list[tuple[Unit, Coming]] = []
        for unit in units:
            failed, found = self._begun(unit)
            for earlier, coming in before:
                yield earlier, coming.home()
            if failed:
                raise failed
            before = [(unit, found)]
            if not found.under_way:
                before = []
                yield unit, found.home()
        for earlier, coming in before:
            yield earlier, coming.home()

    def _begun(self, unit: Unit) -> tuple[BaseException | None, "Coming"]:
        """What went wrong, if anything: what was computed before is kept first; and the result that is coming."""
        try:
            return None, Coming(self._result(unit))
        except BaseException as error:
            return error, Coming({})

    def _result(self, unit: Unit) -> dict[str, Any]:
        """The unit's result where it came to be: at last from the unit's halves, if memory is short.

        Raises:
            SelfRepairError: one prompt with one case does not fit.
        """
        from selfrepair_nn.tracing.session import run_here, run_session

        try:
            if self._remote:
                return run_session(unit.job, self._model.nn, unit.arrays, unit.plan, remote=self._remote)
            with self._told_what_fits(unit.plan) as plan:
                return run_here(unit.job, self._model.nn, unit.arrays, plan, unit.tick, self._weights())
        except Exception as error:
            if not out_of_memory(error):
                raise
        self._known = None
        collect_memory()
        return self._from_halves(unit)

    @contextmanager
    def _told_what_fits(self, plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The plan, with how many tokens a pass may have as earlier units showed; and what this one shows, told."""
        from selfrepair_nn.tracing.memory import Measured, Room

        asked = plan.get("tokens_per_pass")
        if asked is None:
            yield plan
            return
        if self._room is None:
            alone = len(self._model.devices) == 1 and self._model.device.startswith("cuda")
            self._room = Measured(asked, MOST["cuda"]) if alone and self._settled else Room(asked)
        known, refused = (self._room.known, self._room.measured), self._room.refused
        try:
            yield plan | {"room": self._room}
        finally:
            if self._room.refused > refused:
                tell(f"out of memory: going on with {self._room.known} tokens in a pass")
            if self._settled and (self._room.known, self._room.measured) != known:
                self._settled(self._room.known)

    def _weights(self) -> Any:
        """What earlier units found of the weights."""
        import torch

        from selfrepair_nn.tracing.probes import Weights

        if self._known is None:
            asked = self._vocabulary
            self._known = Weights(None if asked is None else torch.from_numpy(asked))
        return self._known

    def _from_halves(self, unit: Unit) -> dict[str, Any]:
        halves = unit.halves()
        if not halves:
            raise SelfRepairError(
                f"{unit.label}: out of memory with one prompt and one case: choose a smaller --length or --dtype"
            )
        tell(f"out of memory: {unit.label}, in two halves")
        return unit.join(*(Coming(self._result(half)).home() for half in halves))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory, or the machine's, is exhausted."""
    from selfrepair_nn.tracing.memory import out_of_memory

    return out_of_memory(error)


class Coming:
    """A result that GPUs may still be computing. It is brought home beside what they were given since."""

    def __init__(self, found: dict[str, Any]) -> None:
        import torch

        self._found, self._done = found, {}
        for device in {x.device for x in _on_gpus(found)}:
            self._done[device] = torch.cuda.Event()
            self._done[device].record(torch.cuda.current_stream(device))

    @property
    def under_way(self) -> bool:
        """Whether a GPU has it."""
        return bool(self._done)

    def home(self) -> dict[str, Any]:
        """The result, on the CPU: from a GPU through pinned memory, as soon as it is computed."""
        import torch

        from selfrepair_nn.tracing.readouts import to_cpu

        streams = {device: torch.cuda.Stream(device) for device in self._done}
        for device, stream in streams.items():
            stream.wait_event(self._done[device])
        found = _copied(self._found, streams)
        for stream in streams.values():
            stream.synchronize()
        return to_cpu(found)


def _on_gpus(found: Any) -> Iterator[Any]:
    """The tensors of a result that are there."""
    if isinstance(found, dict):
        for each in found.values():
            yield from _on_gpus(each)
    elif getattr(found, "is_cuda", False):
        yield found


def _copied(found: Any, streams: dict[Any, Any]) -> Any:
    """A result with copies in pinned memory, each under way on the stream of its device."""
    import torch

    if isinstance(found, dict):
        return {name: _copied(each, streams) for name, each in found.items()}
    if not getattr(found, "is_cuda", False):
        return found
    pinned = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    with torch.cuda.stream(streams[found.device]):
        return pinned.copy_(found, non_blocking=True)


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


def greeted_here(model: Model, name: str = "local") -> dict[str, Any]:
    """What a model in this process makes of known vectors, as `models.greeting` keeps and compares it."""
    return greeting_of(only(backend(name, model), first_unit(model.layout)))
