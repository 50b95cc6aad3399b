"""Mistakes made from the options' own table, and from the public functions' own signatures: each ends in one line.

    python -m tests.fuzz                        # all of them, some minutes
    python -m tests.fuzz --sample 100 --seed 3  # some; the suite tries a sample each time

Every option is given every value here that it cannot take, and some that it can, on the command line and in Python;
so is every argument of every other command and of every public function and class. What is right is a result, or an
error of the package's own: never a traceback, never "unexpected", never more than a line.
"""

import inspect
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import click
import numpy as np
import xarray as xr
from terminal import ids, saved, selfrepair

import selfrepair_nn as sr
from selfrepair_nn.cli import cli
from selfrepair_nn.errors import SelfRepairError
from selfrepair_nn.options import Options

WORDS = (
    "", " ", "-1", "0", "1", "2", "1.5", "nan", "inf", "-inf", "1e999", "9" * 5000, "0x10", "1_000", "\u0663", "1:2:3",
    "5:1", "0,,1", "L1H1", "1.1", "1.*", "*", "x=1", "count=2", "scales={[]:1}", "count=" + "9" * 5000, "=", "a=b=c",
    "None", "True", "[]", "{}", "true", "no", "../x", "/", ".", "~no-such-user/x.zarr", "s3://bucket/x.zarr",
    "http://a..b", "http://[::1", "http://127.0.0.1:99999", "file:///etc/passwd", "a\nb", "\x1b[31mred",
    "\u202egnp.exe", "\ud800", "a" * 5000, "meta", "mps", "cuda:99", "cpu:5", "xla", "float63", "1/0", "3/2", "8/",
    "tiny-neo", "who/knows", "no.npy", "no.json",
)  # fmt: skip


OBJECTS: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: True, lambda: 0, lambda: -1, lambda: 1.5, lambda: float("nan"), lambda: float("inf"),
    lambda: 10**5000, lambda: 1j, lambda: "", lambda: "x", lambda: "9" * 5000, lambda: b"x", lambda: [],
    lambda: [1, "a"], lambda: ["a", "b"], lambda: [[1], [2, 3]], lambda: [None], lambda: (), lambda: (1, 2, 3),
    lambda: {}, lambda: {"a": 1}, lambda: {1: 2}, lambda: set(), lambda: {5}, lambda: range(3), lambda: slice(None),
    lambda: iter([1]), object, lambda: int, lambda: (lambda: 1), lambda: np.array([1.5]), lambda: np.array([]),
    lambda: np.array("x"), lambda: np.int64(3), lambda: np.float64("nan"), lambda: np.zeros((2, 2, 2)),
    lambda: Path("nowhere"), lambda: sr.Head(0, 0),
)  # fmt: skip

PLANNED = ("host", "remote", "workers", "dask", "threads", "in_flight", "patience", "tensor_parallel", "job_seconds")
"""Options that are not run with: they would ask a server, or start hundreds of processes."""


class Case(NamedTuple):
    """One mistake: what to call it, and what to do; `try_it` returns a complaint, or None."""

    name: str
    try_it: Callable[[], str | None]


class Place:
    """A tiny model, prompts, a store and a dataset to make mistakes with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work" / "here"
        self.work.mkdir(parents=True)
        self.model, self.prompts = saved(folder / "m"), ids(folder / "p.npy")
        self.store = folder / "s.zarr"
        sr.run(model=self.model, prompts=self.prompts, out=self.store, layers=1, progress=False)
        self.dataset = sr.simulate_heads(2, 2, 4, 3)


def commands(place: Place) -> Iterator[Case]:
    """Every option of `run` with every word, and every argument and option of the other commands."""
    common = ["--model", place.model, "--prompts", place.prompts]
    for option in fields(Options):
        flag = "--" + option.name.replace("_", "-")
        for word in (*_safe(option.name), *(option.metadata["choices"] or ())):
            command = "plan" if option.name in PLANNED else "run"
            place_of = [] if option.name == "out" else ["--out", place.folder / "out"]
            given = [flag] if isinstance(option.default, bool) else [f"{flag}={word}"]
            yield _typed([command, "heads", *common, *place_of, *given])
            if isinstance(option.default, bool):
                break
    for word in WORDS:
        yield _typed(["plan", word, *common])
    for name, command in cli.commands.items():
        if name not in ("run", "plan", "doctor", "recipes"):
            yield from _of_command(name, command, place)


def _safe(name: str) -> tuple[str, ...]:
    """The words for an option: nothing is ever written outside the folder."""
    return tuple(word for word in WORDS if name != "out" or word != "/")


def _of_command(name: str, command: click.Command, place: Place) -> Iterator[Case]:
    given = [place.model if name == "check" else place.store]
    writes = name != "audit" and any(p.name == "out" for p in command.params)  # a store is audited as it is
    out = ["--out", place.folder / "drawn"] if writes else []
    for word in WORDS:
        yield _typed([name, *out, "--", word])
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.is_flag:
            for word in _safe(parameter.name):
                where = out if parameter.name != "out" else []
                yield _typed([name, *given, *where, f"{parameter.opts[0]}={word}"])


def _typed(arguments: list[Any]) -> Case:
    def try_it() -> str | None:
        ended = selfrepair(*arguments)
        lines = ended.err.strip().split("\n")
        if ended.code not in (0, 1, 2, 75) or "unexpected" in ended.err or "Traceback" in ended.err:
            return f"exit {ended.code}: {ended.err[-300:]}"
        if ended.code and (len(lines) > 4 or max(map(len, lines)) > 1500):
            return f"{len(lines)} lines, of {max(map(len, lines))} letters: {ended.err[:200]}"
        if not all(c.isprintable() or c == "\n" for c in ended.err + ended.out):
            return f"what is not printable is printed: {ended.err[:200]!r}"
        return None

    return Case(" ".join(str(a)[:60] for a in arguments), try_it)


def calls(place: Place) -> Iterator[Case]:
    """Every option of `run` as every object, and every argument of every public function and class."""
    for option in fields(Options):
        for make in OBJECTS:
            yield _called("preview", sr.preview, (), lambda n=option.name, m=make: {
                "model": place.model, "prompts": place.prompts, n: m()})  # fmt: skip
    for name in sr.__all__:
        public = getattr(sr, name)
        if isinstance(public, type) and issubclass(public, Exception):
            continue
        usual, first = _usual(name, public, place), (place.dataset,) if name == "audit" else ()
        for odd in usual:
            for make in OBJECTS:
                yield _called(name, public, first, lambda u=usual, o=odd, m=make: u | {o: m()})
        yield _called(name, public, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14), dict)
        yield _called(name, public, (), lambda: {"nonsense": 1})


def _usual(name: str, public: Any, place: Place) -> dict[str, Any]:
    """Something plausible for each argument: what is odd is then odd alone."""
    if name in ("run", "preview", "Options"):
        return {"recipe": "heads"} if name != "Options" else {}
    if name == "audit":  # of a store: nothing is run
        return {"small": 0.1, "share": 0.02, "layers": None, "heads": None, "tokens": None}
    found = {}
    for each in inspect.signature(public).parameters.values():
        if each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL):
            continue
        known = {"ds": place.dataset, "datasets": place.dataset, "directory": place.folder / "drawn"}
        known |= {"path": place.folder / "page.html", "ablate": ((sr.Head(0, 0),),), "before": "mlp"}
        default = {"int": 1, "str": "x", "float": 1.0}.get(getattr(each.annotation, "__name__", ""))
        empty = each.default is inspect.Parameter.empty
        found[each.name] = known.get(each.name, default if empty else each.default)
    return found


def _called(
    name: str, public: Callable, args: tuple[Any, ...], keywords: Callable[[], dict[str, Any]]
) -> Case:
    def try_it() -> str | None:
        try:
            public(*args, **keywords())
        except SelfRepairError as error:
            text = str(error)
            return f"a message of {len(text)} letters, {text[:200]}" if len(text) > 1500 else None
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
        return None

    shown = ", ".join(f"{k}={_shown(v)}" for k, v in keywords().items()) or str(args)
    return Case(f"sr.{name}({shown})", try_it)


def _shown(value: Any) -> str:
    if isinstance(value, xr.Dataset):
        return "a dataset"  # a page, which takes long to write
    try:
        return repr(value)[:40].partition("\n")[0]
    except ValueError:  # a number of too many digits
        return f"a {type(value).__name__}"


def offline() -> None:
    """No name that is made up is looked for on the hub."""
    import datasets.config
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def chosen(place: Place, sample: int | None, seed: int) -> list[Case]:
    """All cases, or so many of them, drawn from a seed."""
    every = [*commands(place), *calls(place)]
    return every if sample is None else random.Random(seed).sample(every, min(sample, len(every)))


def complaints(cases: list[Case]) -> Iterator[str]:
    """What went wrong, case by case."""
    for case in cases:
        if (complaint := case.try_it()) is not None:
            yield f"{case.name}\n    {complaint}"


@click.command()
@click.option("--sample", type=int, default=None, help="Try so many; default: all.")
@click.option("--seed", default=0, help="Seed of the sample.")
def main(sample: int | None, seed: int) -> None:
    """Make mistakes and print those that do not end in one line. Exit code 1 if there are any."""
    warnings.simplefilter("ignore")
    offline()
    with TemporaryDirectory() as folder:
        place = Place(Path(folder))
        os.chdir(place.work)
        cases = chosen(place, sample, seed)
        wrong = 0
        for each in complaints(cases):
            wrong += 1
            print(each.encode("utf-8", "backslashreplace").decode(), flush=True)
    print(f"{len(cases)} mistakes, {wrong} of them not told in one line")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
