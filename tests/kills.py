"""A real process killed at its k-th write, by an audit hook: its store is whole as far as it goes, and resumes.

    python -m tests.kills              # five minutes of kills of every kind of run, most of a plain one
    python -m tests.kills --seconds 60

A write is whatever changes the disk at the store's path or beside it: a file opened for writing, a name given or taken
away, a directory made or removed. Of every other file that was being opened some bytes are left that mean nothing. The
suite tries some kills of each kind (`test_power_cut.py`).
"""

import os
import random
import signal
import sys
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock
from time import monotonic
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import click
from forked import fork_helpers
from standing import begin_worker
from terminal import FORKS, HANGING, OFFLINE, assert_same_numbers, ids, saved, selfrepair

import selfrepair_nn as sr

CHANGING = ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")

WORKERS_OWN = 60
"""So many writes one of two workers has at least: those of a block."""


class Kind(NamedTuple):
    """A kind of run: the recipe, options beside those that all share, the commands it takes, and who is killed."""

    recipe: str = "heads"
    options: tuple[str, ...] = ()
    parts: tuple[tuple[str, ...], ...] = ((),)
    worker: bool = False


KINDS = {
    "plain": Kind(),
    "variants": Kind("freeze", ("--heads=1.0",)),
    "shards": Kind(parts=(("--shard=1/2",), ("--shard=2/2",))),
    "top share": Kind(options=("--select=top-share", "--share=0.1", "--components=top")),
    "until an interval": Kind(options=("--until-ci=0.5", "--share=0.2")),
    "workers": Kind(parts=(("--workers=2",),)),
    "a worker": Kind(parts=(("--workers=2",),), worker=True),
}


class Campaign:
    """Kills of one kind of run, all of them in a directory of their own."""

    def __init__(self, name: str, place: Path, options: list[str]) -> None:
        self._kind, self._place = KINDS[name], place
        place.mkdir()
        self._command = ["run", self._kind.recipe, *options, *self._kind.options]
        self.whole = place / "whole.zarr"
        assert selfrepair(*self._command, "--out", self.whole).code == 0

    @cached_property
    def writes(self) -> int:
        """How many writes there are in all; of a worker it is not known beforehand."""
        if self._kind.worker:
            return WORKERS_OWN
        assert self._ends(self._place / "counted.zarr", 0) == [0] * len(self._kind.parts)
        return int(self._counted.read_text())

    def try_at(self, number: int) -> bool:
        """Whether the kill happened; AssertionError if the store is not whole then or does not resume."""
        store = self._place / f"{number}.zarr"
        codes = self._ends(store, number)
        killed = self._counted.read_text() == "killed"
        assert set(codes) <= {0, -signal.SIGKILL if killed and not self._kind.worker else 0}, codes
        if store.exists():
            assert sr.verify(store) == [], number
        for part in self._kind.parts:
            ended = selfrepair(*self._command, *part, "--out", store)
            assert ended.code == 0, ended.err
        assert_same_numbers(store, self.whole)
        assert "finished" in sr.open_store(store).attrs
        assert sr.verify(store) == []
        assert not [*store.rglob("*.partial"), *self._place.glob(".*")], "litter"
        return killed

    @property
    def _counted(self) -> Path:
        return self._place / "counted"

    def _ends(self, store: Path, number: int) -> list[int]:
        """The exit codes of the run's commands, until one was killed at the run's so-manyth write."""
        self._counted.write_text("0")
        codes = []
        for part in self._kind.parts:
            given = [*self._command, *part, "--out", str(store)]
            child = FORKS.Process(
                target=_command, args=(given, store.name, number, self._counted, self._kind.worker)
            )
            child.start()
            child.join(HANGING)
            codes.append(child.exitcode)
            if self._counted.read_text() == "killed":
                break
        return codes


def _command(arguments: list[str], store: str, number: int, counted: Path, worker: bool) -> None:
    """The command in a process of its own, which or one of whose workers is killed."""
    import torch
    from tqdm import tqdm

    from selfrepair_nn.cli import main
    from selfrepair_nn.running import workers

    os.environ |= OFFLINE
    torch.set_num_threads(1)
    fork_helpers()
    tqdm.set_lock(RLock())  # its default would be reported as leaked
    done, watched = [int(counted.read_text())], partial(_watched, store, number, counted)
    if worker:
        workers._begin = partial(_begin, watched)
    else:
        watched(done)
    sys.argv = ["selfrepair", *arguments]
    with open(os.devnull, "w") as sys.stdout, open(f"{counted}.err", "w") as sys.stderr:
        try:
            main()
        finally:
            if counted.read_text() != "killed":
                counted.write_text(str(done[0]))


def _begin(watched: partial, *given: object) -> None:
    """What a worker begins with."""
    watched([0])
    begin_worker(*given)


def _watched(store: str, number: int, counted: Path, done: list[int]) -> None:
    """From now on this process, and none forked from it, is killed at its so-manyth write; of several only one."""
    numbers, own = count(done[0] + 1), os.getpid()

    def hook(event: str, args: tuple) -> None:
        opened = event == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        if not (opened or event in CHANGING) or store not in str(args[0]) or os.getpid() != own:
            return
        done[0] = next(numbers)
        if done[0] == number and counted.read_text() != "killed":
            counted.write_text("killed")
            chance = random.Random(number)
            if opened and chance.random() < 0.5:
                Path(args[0]).write_bytes(chance.randbytes(chance.randrange(100)))
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_options(place: Path) -> list[str]:
    """What all kinds of run share: a tiny model and few prompts, two blocks of them."""
    place.mkdir(exist_ok=True)
    prompts = ids(place / "p.npy", 16, 5)
    return ["--model", str(saved(place / "m")), "--prompts", str(prompts), "--layers=1", "--batch-size=8"]


@click.command()
@click.option("--seconds", default=300, help="For how long; every kind of run has its turn.")
@click.option(
    "--kind", "names", type=click.Choice([*KINDS]), multiple=True, default=[*KINDS], help="Repeatable."
)
@click.option("--seed", default=0, help="Seed of the order in which writes are chosen.")
def main(seconds: int, names: tuple[str, ...], seed: int) -> None:
    """Kill runs, compare what resumes with undisturbed ones bit for bit, and print how many kills there were."""
    chance, end = random.Random(seed), monotonic() + seconds
    with TemporaryDirectory() as folder:
        options = run_options(Path(folder) / "shared")
        for left, name in zip(range(len(names), 0, -1), reversed(names), strict=True):
            campaign = Campaign(name, Path(folder) / name.replace(" ", "-"), options)
            order = list(range(1, 1 + campaign.writes))
            chance.shuffle(order)
            until, kills = monotonic() + (end - monotonic()) / left, 0
            for number in order:
                if monotonic() > until:
                    break
                kills += campaign.try_at(number)
            print(
                f"{name:<18} {kills} kills, of {len(order)} writes: all whole, all resumed bit for bit",
                flush=True,
            )


if __name__ == "__main__":
    from kills import main as importable

    importable()
