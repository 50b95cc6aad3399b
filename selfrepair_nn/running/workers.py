"""A run's blocks shared out among workers: each has its own model, all fill one store."""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from multiprocessing import get_all_start_methods, get_context, parent_process
from threading import Thread
from types import ModuleType
from typing import Any

import numpy as np
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from selfrepair_nn.ending import SENT_TO_ALL
from selfrepair_nn.errors import Incomplete, SelfRepairError, one_line
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.layout.packing import fitting_threads
from selfrepair_nn.progress import Bar
from selfrepair_nn.recipe import recipe_paths
from selfrepair_nn.running.filling import Known
from selfrepair_nn.running.interruption import undisturbed
from selfrepair_nn.running.worker import Order, Outcome, Setup, fill
from selfrepair_nn.store import Store

IMPORTED = ["selfrepair_nn.running.worker", "nnsight.modeling.transformers"]
DEATHS = 3
"""How often workers may die, with nothing done in between, before that is not put down to chance."""
UNDER_WAY = 2**30
"""Bytes of setups that may be on their way to workers at a time."""
UNTIL_ENDED = Retrying(
    retry=retry_if_exception_type(ConnectionRefusedError),
    wait=wait_fixed(0.2),
    stop=stop_after_delay(20),
    reraise=True,
)
"""Python's helper that starts processes takes no calls while it ends, which takes seconds on a busy machine; after that
Python starts another."""


class Workers:
    """Computes blocks as `Filling` does, several at once. A context manager: at its end nothing is under way.

    A worker that dies takes nothing with it but the block under way: it is done again by another.
    """

    def __init__(
        self, store: Store, experiment: Experiment, known: Known, pool: "Own | Lent", bar: Bar
    ) -> None:
        self._experiment, self._known, self._pool, self._bar = experiment, known, pool, bar
        self._setup = _setup(store, experiment, known, pool).packed()
        self._running: dict[Future[Outcome], slice] = {}
        self._lost: Exception | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the blocks under way: they are kept, unless an interrupt says that there is no time for it."""
        self._pool.close([future for future in self._running if not future.cancel()])

    def __call__(self, blocks: Iterable[slice], open_: np.ndarray) -> Iterator[slice]:
        """Compute these blocks for the cases that are open, bool [case]; gives each block when it is stored.

        Raises:
            SelfRepairError: a worker says why it cannot begin.
            Incomplete: they died too often without having done anything in between, or there are none any more.
        """
        asked = self._known.asked(self._experiment, open_)
        missing, deaths = {block.start: block for block in blocks}, 0
        while missing:
            before = len(missing)
            for block in self._round(list(missing.values()), open_, asked):
                del missing[block.start]
                yield block
            if missing:
                deaths = deaths + 1 if len(missing) == before else 0
                if deaths > DEATHS:
                    raise Incomplete(
                        f"the workers died {deaths} times before they had done anything: {self._why()}"
                    )
                self._pool.renew(self._lost)

    def _why(self) -> str:
        return self._pool.remedy if self._lost is None else f"{self._pool.remedy} ({one_line(self._lost)})"

    def _round(self, blocks: list[slice], open_: np.ndarray, asked: np.ndarray | None) -> Iterator[slice]:
        """Blocks as they are done; those whose workers were lost are left out."""
        orders = iter([Order(b, open_, None if asked is None else asked[:, b]) for b in blocks])
        room = max(1, UNDER_WAY // len(self._setup))
        while True:
            try:
                for order in islice(orders, room - len(self._running)):
                    self._running[self._pool.submit(fill, self._setup, order)] = order.block
            except Exception as error:
                self._lost, orders = error, iter(())
            if not self._running:
                return
            for future in wait(self._running, return_when=FIRST_COMPLETED).done:
                block = self._running.pop(future)
                if (outcome := self._outcome(future)) is not None:
                    self._bar.update(outcome.tokens)
                    yield block

    def _outcome(self, future: "Future[Outcome]") -> Outcome | None:
        """What a worker says; None where it is lost. Raises what it says it cannot do."""
        try:
            outcome = future.result()
        except ImportError as error:
            raise SelfRepairError(
                f"a worker cannot begin: {one_line(error)}: install selfrepair_nn where the workers are"
            ) from error
        except Exception as error:
            self._lost = error
            return None
        if outcome.refused:
            raise outcome.refused
        if outcome.unforeseen:
            raise RuntimeError(f"in a worker:\n{outcome.unforeseen}")
        return outcome


def _setup(store: Store, experiment: Experiment, known: Known, pool: "Own | Lent") -> Setup:
    path, o = experiment.recipe.path, experiment.options
    name = next((name for name, each in recipe_paths().items() if each == path), str(path))
    alone = replace(
        o, workers=1, dask=None, shard=None, check=False, tokens_per_pass=experiment.work.tokens_per_pass
    )
    threads = o.threads or pool.threads(experiment)
    return Setup(
        name, alone, experiment.path.absolute(), store.attributes.get("id"), known.everywhere, threads
    )


class Lent:
    """An executor that a caller gave. It stays the caller's: it is neither shut down nor replaced."""

    remedy = "is memory short for their models?"

    def __init__(self, executor: Executor) -> None:
        self.submit: Callable[..., Future[Any]] = executor.submit

    def threads(self, experiment: Experiment) -> None:
        """As many as the executor's workers have anyway."""

    def renew(self, lost: Exception | None) -> None:
        """Raise Incomplete where no worker will take the place of those that were lost."""
        if isinstance(lost, BrokenExecutor):
            raise Incomplete(f"the executor lost a worker and takes no more work ({one_line(lost)})")

    def close(self, running: list[Future[Outcome]]) -> None:
        """Wait for the blocks under way."""
        wait(running)


class Own:
    """So many processes of this machine, for this run alone."""

    def __init__(self, count: int) -> None:
        self.remedy = f"is memory short for {count} models? choose fewer --workers"
        self._count, self._helper = count, _Helper()
        self._pool: ProcessPoolExecutor | None = None

    def threads(self, experiment: Experiment) -> int:
        """Those that pay, of each one's share of the cores."""
        share = max(1, (os.cpu_count() or 1) // self._count)
        return fitting_threads(experiment.description.structure, share)

    def submit(self, function: Callable[..., Any], *given: Any) -> "Future[Any]":
        with _clean_start():
            return UNTIL_ENDED.copy()(self._submit, function, *given)

    def _submit(self, function: Callable[..., Any], *given: Any) -> "Future[Any]":
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self._count, self._helper.context, _begin)
        try:
            return self._pool.submit(function, *given)
        except ConnectionRefusedError:  # not all of its processes could be started: it is no good
            self._kill()
            self._pool = None
            raise

    def renew(self, _: Exception | None) -> None:
        """Let others begin in the place of those that died."""
        self._pool = None

    def close(self, _: list[Future[Outcome]]) -> None:
        """Wait for the blocks under way; a second interrupt gives them up."""
        if self._pool is not None:
            try:
                self._pool.shutdown(cancel_futures=True)
            except KeyboardInterrupt:
                self._kill()
                raise
        self._helper.end()

    def _kill(self) -> None:
        for process in ((self._pool and self._pool._processes) or {}).values():
            process.kill()


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


def _begin() -> None:
    """In a new process: it finishes its block where a terminal ends all, and ends when the run does."""
    for number in SENT_TO_ALL:
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
