"""A run's blocks shared out among processes of this machine: each has its own model, all fill one store."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_all_start_methods, get_context, parent_process
from threading import Thread
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from selfrepair_nn.backends.local import backend, loaded
from selfrepair_nn.ending import SENT_TO_ALL
from selfrepair_nn.errors import Incomplete, SelfRepairError, one_line
from selfrepair_nn.layout.experiment import Experiment, prepare
from selfrepair_nn.layout.packing import fitting_threads
from selfrepair_nn.models.identity import identity
from selfrepair_nn.running.filling import Filling, Known
from selfrepair_nn.running.interruption import undisturbed
from selfrepair_nn.running.opening import as_stored, require_same_model
from selfrepair_nn.store import Store

IMPORTED = ["selfrepair_nn.running.workers", "nnsight.modeling.transformers"]
DEATHS = 3
"""How often processes may die, with nothing done in between, before that is not put down to chance."""


class Workers:
    """Computes blocks as `Filling` does, several at once. A context manager: at its end the processes do.

    A process that dies takes nothing with it but the block under way: it is done again by another.
    """

    def __init__(self, experiment: Experiment, known: Known, bar: tqdm) -> None:
        o = experiment.options
        self._bar = bar
        self._helper = _Helper()
        context, self._count = self._helper.context, o.workers
        with undisturbed():
            devices = context.Queue()  # which starts a process that keeps count of such things
        alone = replace(o, workers=1, check=False, tokens_per_pass=experiment.work.tokens_per_pass)
        threads = o.threads or fitting_threads(
            experiment.description.structure, max(1, (os.cpu_count() or 1) // o.workers)
        )
        given = (str(experiment.recipe.path), alone, experiment.path, known, threads, devices)
        self._devices = devices
        self._pool_of = lambda: ProcessPoolExecutor(o.workers, context, _begin, given)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the blocks under way: they are kept, unless an interrupt says that there is no time for it."""
        if self._pool is not None:
            try:
                self._pool.shutdown(cancel_futures=True)
            except KeyboardInterrupt:
                for process in (self._pool._processes or {}).values():
                    process.kill()
                raise
        self._helper.end()

    def __call__(self, blocks: Iterable[slice], open_: np.ndarray) -> Iterator[slice]:
        """Compute these blocks for the cases that are open, bool [case]; gives each block when it is stored.

        Raises:
            SelfRepairError: a process says why it cannot begin.
            Incomplete: they died too often without having done anything in between.
        """
        missing, deaths = {block.start: block for block in blocks}, 0
        while missing:
            before = len(missing)
            try:
                for block in self._round(list(missing.values()), open_):
                    del missing[block.start]
                    yield block
            except BrokenProcessPool:
                self._pool = None
                deaths = deaths + 1 if len(missing) == before else 0
            if deaths > DEATHS:
                raise Incomplete(
                    f"the workers died {deaths} times before they had done anything: is memory short for "
                    f"{self._count} models? choose fewer --workers"
                )

    def _round(self, blocks: list[slice], open_: np.ndarray) -> Iterator[slice]:
        if self._pool is None:
            for index in range(self._count):
                self._devices.put(index)
            self._pool = self._pool_of()
        with _clean_start():
            running: dict[Future[int], slice] = {self._pool.submit(_work, b, open_): b for b in blocks}
        for future in as_completed(running):
            self._bar.update(future.result())
            yield running[future]


class _Helper:
    """How processes are started: from a helper that has imported all, where the system can.

    Python has one such helper for all that a program starts. It passes on what it was started with, here that it hears
    no interrupt: so one that was started for the workers ends with them, and one that ran before is left as it is.
    """

    def __init__(self) -> None:
        self._server: Any = None
        if "forkserver" not in get_all_start_methods():
            self.context: Any = get_context("spawn")
            return
        from multiprocessing import forkserver

        self.context = get_context("forkserver")
        server: Any = forkserver._forkserver
        if server._forkserver_pid is None:
            self._server, self._imported = server, server._preload_modules
            self.context.set_forkserver_preload(IMPORTED)

    def end(self) -> None:
        """Once no worker is left."""
        if self._server is not None:
            self._server._stop()
            self.context.set_forkserver_preload(self._imported)


@contextmanager
def _clean_start() -> Iterator[None]:
    """Start processes that do not run the user's script again: it may lack a main guard, and do what it does twice.

    A new process is told what `__main__` is here and imports it; nothing that is sent to a worker is defined there.
    """
    script = sys.modules["__main__"]
    with undisturbed():
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script


_mine: dict[str, Any] = {}
"""What a worker has: how it fills the store, how many tokens it ablated since it was last asked; or why it cannot."""


def _begin(*given: Any) -> None:
    """Get ready in a new process. What fails is told when the first block is asked for: by then somebody listens."""
    try:
        _load(*given)
    except Exception as error:
        _mine["failure"] = one_line(error)


def _load(source: str, options: Any, path: Any, known: Known, threads: int, devices: Any) -> None:
    """Load the model in a new process; it ends when the process that started it does, whatever ends that."""
    import torch

    for number in SENT_TO_ALL:
        signal.signal(number, signal.SIG_IGN)  # the blocks under way are still finished
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    torch.set_num_threads(threads)
    device = device_of(options.device, devices.get(), torch.cuda.device_count())
    store = Store(path)
    experiment = as_stored(prepare(source, replace(options, device=device)), store)
    model = loaded(experiment)
    require_same_model(store, model, identity(model))
    _mine["tokens"] = 0
    _mine["fill"] = Filling(
        store, experiment, known, model.layout, backend(options.backend, model), _count_tokens
    )


def device_of(device: str, index: int, gpus: int) -> str:
    """Where the worker of this index computes: several GPUs are shared out among them."""
    return f"cuda:{index % gpus}" if gpus and device in ("auto", "cuda") else device


def _count_tokens(tokens: int) -> None:
    _mine["tokens"] += tokens


def _work(block: slice, open_: np.ndarray) -> int:
    """Fill one block; returns how many tokens were ablated for it."""
    if "failure" in _mine:
        raise SelfRepairError(f"a worker cannot begin: {_mine['failure']}")
    _mine["tokens"] = 0
    for _ in _mine["fill"]([block], open_):
        pass
    return _mine["tokens"]


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
