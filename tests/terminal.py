"""The command line as its user meets it: in this process, or in another one that can be interrupted and killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic, sleep
from unittest.mock import patch

import families
import numpy as np
import torch
import xarray as xr
from forked import fork_helpers
from standing import stand
from tqdm import tqdm

import selfrepair_nn
from selfrepair_nn.cli import main
from selfrepair_nn.ending import ENDING
from selfrepair_nn.running.workers import UNTIL_ENDED

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
ENVIRONMENT = {"PYTHONPATH": str(Path(selfrepair_nn.__file__).parents[1]), "OMP_NUM_THREADS": "1"} | OFFLINE
VOCABULARY = 61
HANGING = 600
"""Seconds after which a process hangs: many times more than any here takes, on a machine that stalls."""

# Children of a server that has imported everything start at once; each is a process of its own all the same.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "nnsight.modeling.transformers",
        "selfrepair_nn.running.run",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.gpt2.modeling_gpt2",
    ]
)


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code (minus the signal that killed it), stdout and stderr."""

    code: int
    out: str
    err: str


def selfrepair(*arguments: object) -> Outcome:
    """Run the command in this process. What would print a traceback is raised."""
    out, err, code = StringIO(), StringIO(), 0
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        argv = patch.object(sys, "argv", ["selfrepair", *map(str, arguments)])
        with argv, redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as ended:
        code = ended.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return Outcome(code, out.getvalue(), err.getvalue())


class Process:
    """The command in a process of its own; what it prints goes to files in `directory`, or stderr to a `terminal`.

    `prepare` is called in it beforehand. Once it has stored so many `blocks` it stands still, until `go_on`.
    """

    def __init__(
        self,
        directory: Path,
        *arguments: object,
        terminal: Connection | None = None,
        blocks: int | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self._out, self._err, self._go = (directory / name for name in ("stdout", "stderr", "go"))
        for each in (self._out, self._go):
            each.unlink(missing_ok=True)
        standing = None if blocks is None else partial(stand, blocks, self._go)
        prepared = [each for each in (standing, prepare) if each]
        streams = (str(self._out), terminal or str(self._err))
        self._child = FORKS.Process(target=_command, args=(prepared, list(map(str, arguments)), *streams))
        UNTIL_ENDED.copy()(self._child.start)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child.is_alive()

    def go_on(self) -> None:
        self._go.touch()

    def until(self, condition, seconds: float = HANGING) -> None:
        """Wait until it has begun and `condition()` holds; AssertionError if it ends before that."""
        end = monotonic() + seconds
        while not (self._out.exists() and condition()):
            assert self.running, f"ended too early: {self._err.read_text() if self._err.exists() else ''}"
            assert monotonic() < end, "nothing happened"
            sleep(0.02)

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(self._child.pid, number)

    def wait(self, seconds: float = HANGING) -> Outcome:
        """Its outcome; AssertionError if it still runs after `seconds`."""
        self._child.join(seconds)
        if self.running:
            self._child.kill()
            raise AssertionError(f"still running after {seconds} s")
        err = self._err.read_text() if self._err.exists() else ""
        return Outcome(self._child.exitcode, self._out.read_text(), err)


def saved(directory: Path, family: str = "gpt2", *, seed: int = 0) -> Path:
    """A tiny model of a family, without a tokenizer, as a directory that `--model` takes."""
    families.build(family, seed).save_pretrained(directory)
    return directory


def ids(path: Path, prompts: int = 6, length: int = 7, seed: int = 0) -> Path:
    """Random token ids of the tiny GPT-2's vocabulary, as a file that `--prompts` takes."""
    np.save(path, np.random.default_rng(seed).integers(0, VOCABULARY, (prompts, length)))
    return path


def files(directory: Path) -> dict[str, tuple[str, int]]:
    """Every file below a directory: a hash of its bytes and the time it was written."""
    found = sorted(p for p in directory.rglob("*") if p.is_file())
    return {
        str(p.relative_to(directory)): (sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in found
    }


def done(store: Path) -> int:
    """Head x prompt pairs that a store says are done."""
    return int(xr.open_zarr(store).done.sum()) if store.exists() else 0


def assert_same_numbers(one: Path, other: Path) -> None:
    """Bit for bit the same variables and coordinates, with the same attributes of each."""
    first, second = (xr.open_zarr(path).load().drop_attrs(deep=False) for path in (one, other))
    xr.testing.assert_identical(first, second)
    for name in first.variables:
        assert first[name].dtype == second[name].dtype
        if first[name].dtype.kind == "f":
            assert first[name].values.tobytes() == second[name].values.tobytes(), name


def resume_command(err: str) -> list[str]:
    """The arguments of the command that an interrupted run printed last, as a shell reads that line."""
    printed = 'selfrepair() { printf "%s\\0" "$@"; }\n' + err.strip().splitlines()[-1]
    found = subprocess.run(["sh", "-c", printed], capture_output=True, text=True, check=True)
    return found.stdout.split("\0")[:-1]


def _command(
    prepared: list[Callable[[], object]], arguments: list[str], out: str, err: str | Connection
) -> None:
    os.environ |= OFFLINE
    torch.set_num_threads(1)
    fork_helpers()
    tqdm.set_lock(threading.RLock())  # its default would be reported as leaked wherever the process is killed
    for prepare in prepared:
        prepare()
    sys.argv = ["selfrepair", *arguments]
    os.dup2(_written(err) if isinstance(err, str) else err.fileno(), 2)
    os.dup2(_written(out), 1)
    with open(2, "w", buffering=1, closefd=False) as sys.stderr, open(1, "w", closefd=False) as sys.stdout:
        main()


def _written(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
