"""What a worker does, whoever started it: it loads the model itself, once, and fills the blocks that it is sent.

Workers are processes, on this machine or another, or threads of one: these take turns.
"""

import os
import pickle
import threading
import traceback
import zlib
from contextlib import chdir, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from platform import node
from typing import Any
from uuid import uuid4

import numpy as np

from selfrepair_nn.backends.local import backend, collect_memory, loaded
from selfrepair_nn.errors import SelfRepairError, StoreError, one_line
from selfrepair_nn.layout.experiment import prepare
from selfrepair_nn.layout.packing import computing_with
from selfrepair_nn.models.identity import identity
from selfrepair_nn.options import Options
from selfrepair_nn.progress import without_bars
from selfrepair_nn.provenance import versions
from selfrepair_nn.running.devices import let_go, own_device
from selfrepair_nn.running.filling import Filling, Known
from selfrepair_nn.running.opening import as_stored, require_same_model
from selfrepair_nn.store import Store

IDLE = 300.0
"""Seconds without a block after which the model is let go: a cluster outlives its runs."""


def _version() -> str:
    return versions()["selfrepair_nn"]


@dataclass(frozen=True)
class Setup:
    """What a worker must know of a run, as plain data.

    `id` is the store's, `folder` where the run was started: what it was given may be relative to that. What is wanted
    of each prompt comes with each block, and is not in `known`.
    """

    recipe: str
    options: Options
    path: Path
    id: Any
    known: Known
    threads: int | None
    folder: str = field(default_factory=os.getcwd)
    host: str = field(default_factory=node)
    version: str = field(default_factory=_version)

    def packed(self) -> bytes:
        """As small as it gets: it goes along with every block, for nobody knows which worker will take that."""
        return zlib.compress(pickle.dumps(self), 1)


@dataclass(frozen=True)
class Order:
    """A block to fill: for which cases, bool [case], and, where not all is wanted, how many positions of each prompt.

    `asked` is [case, prompt of the block]. No two orders are alike: an engine that keeps results computes each anew.
    """

    block: slice
    open_: np.ndarray
    asked: np.ndarray | None
    number: str = field(default_factory=lambda: uuid4().hex)


@dataclass(frozen=True)
class Outcome:
    """How many tokens were ablated for a block; or why there is none, in words or as a traceback.

    So what a worker raises is never taken for what its engine does: that it died, say.
    """

    tokens: int = 0
    refused: SelfRepairError | None = None
    unforeseen: str = ""


_turn = threading.Lock()
_mine: dict[str, Any] = {}
"""What this process has: the setup it was begun with, as it came, and the worker made of it."""


def fill(setup: bytes, order: Order) -> Outcome:
    """Fill one block. What it takes is loaded first, if that is not here yet."""
    with _turn:
        try:
            return Outcome(_worker(setup)(order))
        except SelfRepairError as error:
            return Outcome(refused=error)
        except Exception:
            return Outcome(unforeseen=traceback.format_exc())
        finally:
            _rest()


def _worker(setup: bytes) -> "_Worker":
    if _mine.get("setup") != setup:
        _let_go()
        _mine.update(worker=_begun(pickle.loads(zlib.decompress(setup))), setup=setup)
    return _mine["worker"]


def _begun(setup: Setup) -> "_Worker":
    try:
        with without_bars():
            return _Worker(setup)
    except Exception as error:
        where = "" if node() == setup.host else f" (on {node()})"
        raise SelfRepairError(f"a worker cannot begin: {one_line(error)}{where}") from error


class _Worker:
    """Fills blocks of one run."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._tokens = setup, 0
        with computing_with(setup.threads), _as_in(setup.folder):
            store = _store(setup)
            options = replace(setup.options, device=own_device(setup.options.device))
            experiment = as_stored(prepare(setup.recipe, options), store)
            model = loaded(experiment)
            require_same_model(store, model, identity(model))
            self._prompts = experiment.prompts.n
            runner = backend(options.backend, model, experiment.vocabulary)
            self._filling = Filling(store, experiment, setup.known, model.layout, runner, self._count)

    def __call__(self, order: Order) -> int:
        """Fill a block; returns how many tokens were ablated for it."""
        self._tokens, asked = 0, None
        if order.asked is not None:
            asked = np.zeros((len(order.asked), self._prompts), order.asked.dtype)
            asked[:, order.block] = order.asked
        with computing_with(self._setup.threads):
            for _ in self._filling.fill([order.block], order.open_, asked):
                pass
        return self._tokens

    def _count(self, tokens: int) -> None:
        self._tokens += tokens


def _store(setup: Setup) -> Store:
    """The run's store, where it is seen from here."""
    if setup.version != _version():
        raise SelfRepairError(
            f"it has selfrepair_nn {_version()}, and the run {setup.version}: install the same where the workers are"
        )
    if not setup.path.exists() or (store := Store(setup.path)).attributes.get("id") != setup.id:
        raise StoreError(
            f"{str(setup.path)!r} is not the run's store there: workers write it themselves, so give an --out on a "
            "disk that all of them share"
        )
    return store


def _as_in(folder: str) -> Any:
    """Within, relative paths are those of the run, if there is such a directory here."""
    return chdir(folder) if os.path.isdir(folder) else nullcontext()


def _rest() -> None:
    """Let the model go once nobody has sent a block for a while."""
    if timer := _mine.pop("timer", None):
        timer.cancel()
    timer = _mine["timer"] = threading.Timer(IDLE, _forget)
    timer.daemon = True
    timer.start()


def _forget() -> None:
    with _turn:
        if _mine.get("timer") is threading.current_thread():
            _let_go()


def _let_go() -> None:
    """Of the model, and of the GPU that it is on."""
    _mine.clear()
    let_go()
    collect_memory()
