"""Who computes which blocks of a run: all or a part of them, in this process or by workers, its own or lent ones."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import ceil
from os import getpid
from pathlib import Path
from typing import Any

import numpy as np

from selfrepair_nn.backends.local import Backend
from selfrepair_nn.errors import UsageError, one_line
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.models.model import Model, release
from selfrepair_nn.options import Options
from selfrepair_nn.progress import Bar
from selfrepair_nn.running.filling import Filling, Known
from selfrepair_nn.running.workers import Lent, Own, Workers
from selfrepair_nn.shown import tell
from selfrepair_nn.store import Store
from selfrepair_nn.values import brief

PATIENCE = 10
"""Seconds in which a scheduler must answer."""

Fill = Callable[[Iterable[slice], np.ndarray], Iterator[slice]]


@dataclass(frozen=True)
class Sharing:
    """What of a run this command does (`--shard`), and by whom: `lent` is an executor, None where there is none."""

    options: Options
    lent: Lent | None

    def blocks(self, units: Sequence[slice]) -> Sequence[slice]:
        """Those of a run's blocks that are this command's."""
        first, count = self.options.part or (1, 1)
        return units[first - 1 :: count]

    @property
    def on_one_device(self) -> int:
        """How many processes share the memory of a device, as far as that is known here."""
        import torch

        several = torch.cuda.device_count() if self.options.device in ("auto", "cuda") else 1
        return ceil(self.options.workers / max(1, several))

    @contextmanager
    def filling(
        self, store: Store, experiment: Experiment, known: Known, model: Model, runner: Backend, bar: Bar
    ) -> Iterator[Fill]:
        """What computes blocks, and gives each when it is stored. Where workers do, this process needs no model."""
        o = self.options
        pool = self.lent or (Own(o.workers) if o.workers > 1 else None)
        if pool is None:
            tick = (lambda tokens: None) if o.served else bar.update
            yield Filling(store, experiment, known, model.layout, runner, tick)
            return
        release(model)
        with Workers(store, experiment, known, pool, bar) as workers:
            yield workers


@contextmanager
def sharing(options: Options, executor: Executor | None) -> Iterator[Sharing]:
    """How a run is shared out: with a cluster that is asked for by its scheduler's address, or with an executor.

    Raises:
        UsageError: what is no executor, or one that takes no work; a scheduler that does not answer.
    """
    if executor is None and options.dask is None:
        yield Sharing(options, None)
    elif executor is not None:
        _require_one(options, executor)
        yield Sharing(options, _lent(executor))
    else:
        with _cluster(str(options.dask)) as found:
            yield Sharing(options, _lent(found))


def _require_one(options: Options, executor: object) -> None:
    if not isinstance(executor, Executor):
        more = ": its get_executor() gives one" if hasattr(executor, "get_executor") else ""
        raise UsageError(
            f"executor {brief(executor)} is no concurrent.futures.Executor{more}; give for example a "
            "ProcessPoolExecutor, or client.get_executor() of Dask"
        )
    options.require_lendable("executor")
    for name in ("dask", "workers"):
        if getattr(options, name) != getattr(type(options), name):
            raise UsageError(f"an executor has workers of its own: leave out {name}, or the executor")


def _lent(executor: Executor) -> Lent:
    """The executor, given some work: one that forks then does so before this process computes, and holds threads."""
    try:
        executor.submit(getpid)
    except Exception as error:
        raise UsageError(f"the executor takes no work ({one_line(error)}): give one that is open") from error
    return Lent(executor)


@contextmanager
def _cluster(address: str) -> Iterator[Executor]:
    if not find_spec("distributed"):
        raise UsageError("--dask needs Dask, which is not installed: pip install 'selfrepair_nn[dask]'")
    Client = import_module("distributed").Client
    file = address.endswith(".json")
    if file and not Path(address).expanduser().is_file():
        raise UsageError(
            f"dask {address!r}: there is no such file; a scheduler writes it with --scheduler-file"
        )
    where: Any = {"scheduler_file": str(Path(address).expanduser())} if file else {"address": address}
    try:
        client = Client(**where, timeout=PATIENCE, set_as_default=False)
    except Exception as error:  # of as many kinds as there are transports
        raise UsageError(
            f"dask {address!r}: no scheduler answers there ({one_line(error)}); start one with dask scheduler"
        ) from error
    with client:
        if not client.scheduler_info(n_workers=-1)["workers"]:
            tell(f"the cluster at {address} has no workers yet: this run waits for some")
        yield client.get_executor(pure=False)
