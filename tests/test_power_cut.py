"""What a kill or a power cut leaves is resumed to the same numbers: at any write, what is not synced torn or lost."""

import random
from functools import cache
from pathlib import Path

import pytest
from kills import Campaign, run_options
from terminal import assert_same_numbers, ids, saved
from tiers import representative
from zarr.storage import _local

import selfrepair_nn as sr
from selfrepair_nn import files as disk

RUNS = {
    "heads": {},
    "top share": {"select": "top-share", "share": 0.1, "components": "top"},
    "until an interval": {"until_ci": 0.5, "share": 0.2},
    "variants": {"recipe": "freeze", "heads": "1.0", "layers": None},
    "shards": {"shard": ("1/2", "2/2")},
}
STEPS = [
    ("heads", 1),
    ("heads", 7),
    ("top share", 5),
    ("until an interval", 7),
    ("variants", 9),
    ("shards", 7),
]
"""Of a kind of run one in so many steps is looked at: they are alike in all."""

AT_STEPS = pytest.mark.parametrize("looked", representative(STEPS, ("until an interval", 7)), ids=str)
"""That of every run of the tests writes all that there is: blocks, and small arrays between them."""


def run(out, choices):
    """A run, or one after the other all the parts that it is shared out to."""
    for part in choices.get("shard", (None,)):
        sr.run(out=out, **choices | {"shard": part})


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    directory = tmp_path_factory.mktemp("asked")
    prompts = str(ids(directory / "p.npy", 24))
    return {"model": str(saved(directory / "m")), "prompts": prompts, "layers": "1", "batch_size": 8}


class Recorder:
    """What a run asks of the disk once its store is there: bytes written, files and directories synced, names given."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.asked, self._base = root, [], None
        self._put, self._sync, self._replace, self._inside = _local._put, disk.sync_path, Path.replace, 0
        patch.setattr(_local, "_put", self._writing)
        patch.setattr(disk, "sync_path", self._syncing)
        patch.setattr(Path, "replace", lambda path, to: self._naming(path, to))

    @property
    def base(self) -> dict[str, bytes]:
        """The store as it was made."""
        return self._base

    def _note(self, what: str, path: Path, *more: object) -> None:
        if not self._inside and self.root.exists() and path.is_relative_to(self.root):
            if self._base is None:
                self._base = content(self.root)
            self.asked.append((what, str(path.relative_to(self.root)), *more))

    def _writing(self, path: Path, value: object, **options: object) -> int:
        self._note("write", path, value.to_bytes())
        self._inside += 1
        try:
            return self._put(path, value, **options)
        finally:
            self._inside -= 1

    def _syncing(self, path: Path) -> None:
        self._note("sync", path)
        self._sync(path)

    def _naming(self, path: Path, to: Path) -> Path:
        self._note(
            "name", path, str(Path(to).relative_to(self.root)) if self.root in Path(to).parents else ""
        )
        return self._replace(path, to)


@cache
def folder(name: str) -> str:
    return str(Path(name).parent)


@cache
def folders(name: str) -> tuple[str, ...]:
    """Those that a name lies in, the nearest first."""
    return tuple(map(str, Path(name).parents))


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def after_a_cut(
    recorder: Recorder, stop: int, chance: random.Random | None, lying: bool = False
) -> dict[str, bytes]:
    """The files after so many steps. A kill leaves all that was asked for.

    A power cut (`chance`) leaves what was synced, and of the rest anything: bytes torn, or zeros, or none; a name old,
    new or missing; a new directory or not. A `lying` disk syncs no chunk.
    """
    found, old = dict(recorder.base), {}
    whole, named = set(found), set(found)
    entered = {each for name in found for each in folders(name)}
    for what, name, *more in recorder.asked[:stop]:
        if what == "write":
            found[name] = more[0]
            whole.discard(name)
            named.discard(name)
        elif what == "name":
            new = more[0]
            if new in named:
                old[new] = found[new]
            found[new] = found.pop(name)
            (whole.add if name in whole else whole.discard)(new)
            named.discard(new)
        elif not lying or "json" in name or name in (".", "checksums"):
            whole |= {name} & found.keys()
            named |= {each for each in found if folder(each) == name}
            above = {inside for each in found for inside in folders(each)}
            entered |= {each for each in above if folder(each) == name}
    if chance is None:
        return found
    return _torn(found, old, whole, named, entered, chance)


def _torn(found, old, whole, named, entered, chance):
    left, gone = {}, {}
    for name, data in sorted(found.items()):
        if any(gone.setdefault(each, each not in entered and chance.random() < 0.3) for each in folders(name)):
            continue
        if name not in named and chance.random() < 0.5:
            if name in old:
                left[name] = old[name]
            continue
        if name not in whole:
            at = chance.randrange(len(data) + 1)
            data = chance.choice([b"", data[:at], data[:at] + bytes(len(data) - at), data])
        left[name] = data
    return left


def laid_out(found: dict[str, bytes], to: Path) -> Path:
    for name, data in found.items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(data)
    return to


@pytest.fixture(scope="module")
def recorded(asked, tmp_path_factory):
    """recorded(kind): a run's store and what it asked of the disk."""
    made = {}

    def ran(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp("recorded") / "s.zarr"
            with pytest.MonkeyPatch.context() as patch:
                recorder = Recorder(root, patch)
                run(root, asked | RUNS[kind])
            made[kind] = root, recorder
        return made[kind]

    return ran


def test_the_record_is_the_run(recorded):
    root, recorder = recorded("heads")
    assert after_a_cut(recorder, len(recorder.asked), None) == content(root)
    assert after_a_cut(recorder, len(recorder.asked), random.Random(0)) == content(root), (
        "all is synced at the end"
    )


@AT_STEPS
def test_killed_at_every_step_a_store_is_whole_and_resumes(recorded, asked, tmp_path, looked):
    kind, step = looked
    root, recorder = recorded(kind)
    changing = [i for i, each in enumerate(recorder.asked) if each[0] != "sync"]
    for stop in changing[::step]:
        store = laid_out(after_a_cut(recorder, stop, None), tmp_path / f"{stop}.zarr")
        assert sr.verify(store) == [], f"{stop}: {recorder.asked[stop - 1][:2]}"
    for stop in range(0, len(recorder.asked), len(recorder.asked) // 4):
        store = laid_out(after_a_cut(recorder, stop, None), tmp_path / f"again-{stop}.zarr")
        run(store, asked | RUNS[kind])
        assert_same_numbers(store, root)
        assert not [*store.rglob("*.partial")]


@AT_STEPS
def test_a_power_cut_leaves_a_store_that_is_whole_and_resumes(recorded, asked, tmp_path, looked):
    kind, step = looked
    root, recorder = recorded(kind)
    chance = random.Random(1)
    for stop in range(0, len(recorder.asked), 4 * step):
        store = laid_out(after_a_cut(recorder, stop, chance), tmp_path / f"{stop}.zarr")
        assert sr.verify(store) == [], f"{stop}: {recorder.asked[stop - 1][:2]}"
        if chance.random() < 20 * step / len(recorder.asked):
            run(store, asked | RUNS[kind])
            assert_same_numbers(store, root)


@pytest.mark.parametrize("kind", representative(RUNS, "heads"))
def test_on_a_disk_that_does_not_sync_what_is_lost_is_found_and_mended(recorded, asked, tmp_path, kind):
    """It also shows that the cuts above are cuts: here they do harm."""
    root, recorder = recorded(kind)
    chance, harmed = random.Random(2), 0
    for i in range(9):
        stop = chance.randrange(len(recorder.asked) // 4, len(recorder.asked))
        store = laid_out(after_a_cut(recorder, stop, chance, lying=True), tmp_path / f"{i}.zarr")
        harmed += bool(sr.verify(store))
        run(store, asked | RUNS[kind])
        assert_same_numbers(store, root)
        assert sr.verify(store) == []
    assert harmed > 2


# Killed for real


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """campaign(name): kills of one kind of run."""
    place = tmp_path_factory.mktemp("kills")
    options = run_options(place / "shared")
    return cache(lambda name: Campaign(name, place / name.replace(" ", "-"), options))


OFTEN = [("plain", (0.1, 0.68)), ("a worker", (0.6,))]
FURTHER = [
    ("plain", (0.55, 0.8, 0.9, 0.99)),
    ("variants", (0.6, 0.75, 0.95)),
    ("shards", (0.3, 0.7, 0.8, 0.99)),
    ("top share", (0.65, 0.85)),
    ("until an interval", (0.7, 0.97)),
    ("workers", (0.3, 0.97)),
]


@pytest.mark.parametrize("killed", representative(OFTEN + FURTHER, *OFTEN), ids=str)
def test_killed_by_the_system_at_writes_all_along_a_run(campaign, killed):
    kind, shares = killed
    kills = campaign(kind)
    for share in shares:
        assert kills.try_at(round(share * kills.writes)), share
