"""A long campaign on loopback: jobs by the hundred, faults of every kind on both sides, drawn from a seed.

`python -m tests.soak 2000` prints the counts of one. The client is killed where it writes its ledger, and the same run
goes on; the servers break in every way that `fake_ndif` knows. What is stored must be what an undisturbed run stores.
"""

import gc
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

import fake_ndif
import psutil
import torch
from fake_ndif import FakeNdif
from fake_service import Killed
from terminal import assert_same_numbers, ids, saved

import selfrepair_nn as sr
from selfrepair_nn.backends.ndif import connection, hosts, in_flight
from selfrepair_nn.backends.ndif.ledger import FAILED, RECORD, TAKEN, Ledger, ledger_path, lines
from selfrepair_nn.errors import Incomplete
from selfrepair_nn.models.load import load
from selfrepair_nn.store import Store

HOSTS, KILLS, SHARE = 2, 4, 0.08
FAULTS = {
    "ping": ("502", "page", "reset", "gzip"),
    "status": ("503", "page", "reset", "cut", "null"),
    "env": ("504", "page", "cut", "429"),
    "request": ("503", "lost", "502", "page", "fails", "login", "429", "null"),
    "response": ("page", "504", "reset", "cut", "none", "login", "307", "null", "429", "gzip"),
    "result": ("page", "307", "expired", "short", "cut", "reset", "429", "gzip", "another"),
}
HASTE = {(connection, "BACKOFF"): lambda state: 0.01, (in_flight, "pause_before"): lambda attempt: 0.01}
HASTE |= {(in_flight, "UNKNOWN_SECONDS"): 0.3, (in_flight, "LONGEST_PAUSE"): 0.03, (hosts, "SOON"): 0.01}


@dataclass
class Counts:
    """What happened."""

    units: int
    sent: int = 0
    kills: int = 0
    starts: int = 0
    faults: Counter = field(default_factory=Counter)
    failed: Counter = field(default_factory=Counter)
    written: Counter = field(default_factory=Counter)
    bytes_of_job: float = 0.0
    held: list[dict[str, int]] = field(default_factory=list)
    seconds: float = 0.0


class _Dice:
    """Faults of the servers and moments at which the client is killed; memory, whenever a job is taken."""

    def __init__(self, seed: int, units: int, counts: Counts) -> None:
        self.rng, self.lock, self.counts = random.Random(seed), threading.Lock(), counts
        self.kills = sorted(self.rng.sample(range(20, 3 * units), KILLS))
        self.lines, self.looks, self.taken = 0, [units // 3, units - 2], 0

    def fault(self, what: str, job: str) -> str | None:
        with self.lock:
            if self.rng.random() >= SHARE:
                return None
            found = self.rng.choice(FAULTS[what])
            self.counts.faults[f"{what} {found}"] += 1
            return found

    def write(self, write, ledger, event, part, **facts) -> None:
        """A line of the ledger; the client may die before it or after it."""
        self.lines += 1
        self.taken += event == TAKEN and part.startswith("ablation")  # also what is taken as the client dies
        dies = bool(self.kills) and self.lines >= self.kills[0]
        if dies:
            self.kills.pop(0)
            self.counts.kills += 1
        if dies and self.rng.random() < 0.5:
            raise Killed
        write(ledger, event, part, **facts)
        if dies:
            raise Killed
        if event == TAKEN and self.looks and self.taken >= self.looks[0]:
            self.looks.pop(0)
            self.counts.held.append(_held())


def _held() -> dict[str, int]:
    """What this process holds, the servers' part included: objects, tensors, bytes."""
    re.purge()  # the server compiles a pattern for the boundary of each request
    gc.collect()
    every = gc.get_objects()
    tensors = sum(issubclass(type(each), torch.Tensor) for each in every)
    return {"objects": len(every), "tensors": tensors, "bytes": psutil.Process().memory_info().rss}


def soak(folder: Path, units: int, seed: int = 0) -> Counts:
    """A campaign of so many jobs. AssertionError if the store is not that of an undisturbed run."""
    source, counts = saved(folder / "m"), Counts(units)
    choices = {"model": str(source), "prompts": str(ids(folder / "p.npy", units, 5)), "layers": 1, "heads": "1.0"}
    choices |= {"split": "total", "batch_size": 1, "progress": False}
    sr.run(out=folder / "undisturbed.zarr", **choices)
    dice, began = _Dice(seed, units, counts), time.monotonic()
    write, store_block = Ledger.write, Store.write_prompts
    with ExitStack() as stack:
        for (module, name), value in HASTE.items():
            stack.enter_context(patch.object(module, name, value))
        stack.enter_context(patch.object(fake_ndif.ServedModel, "pack", fake_ndif.named))
        servers = [stack.enter_context(FakeNdif(load(str(source)), dice.fault)) for _ in range(HOSTS)]
        stack.enter_context(patch.object(Ledger, "write", lambda *a, **k: dice.write(write, *a, **k)))

        def stored(store, block, values, done=None):
            store_block(store, block, values, done)
            counts.written[block.start] += 1

        stack.enter_context(patch.object(Store, "write_prompts", stored))
        choices |= {"host": [each.url for each in servers], "in_flight": 3, "patience": 60}
        _until_done(counts, folder / "s.zarr", choices)
        counts.sent = sum(len(each.sent()) for each in servers)
    counts.seconds = time.monotonic() - began
    _look_at_ledger(counts, ledger_path(folder / "s.zarr"))
    assert_same_numbers(folder / "s.zarr", folder / "undisturbed.zarr")
    return counts


def _until_done(counts: Counts, store: Path, choices: dict) -> None:
    """The same run again and again, as after a kill."""
    while True:
        counts.starts += 1
        try:
            sr.run(out=store, **choices)
            return
        except (Killed, Incomplete):
            assert counts.starts < 10 * KILLS
            fake_ndif.UNITS.clear()  # what a killed client had packed and not sent
        except sr.SelfRepairError:  # at the very beginning somebody may not answer
            assert counts.starts < 10 * KILLS


def _look_at_ledger(counts: Counts, path: Path) -> None:
    counts.bytes_of_job = path.stat().st_size / counts.units
    for each in lines(path):
        if each["event"] == RECORD:
            counts.failed.update(each["record"]["failures"])
        elif each["event"] == FAILED:
            counts.failed[each["kind"]] += 1


if __name__ == "__main__":
    with TemporaryDirectory() as place:
        found = soak(Path(place), int(sys.argv[1]) if len(sys.argv) > 1 else 300, *map(int, sys.argv[2:]))
    written = Counter(found.written.values())
    print(json.dumps({**vars(found), "written": written}, indent=1))
