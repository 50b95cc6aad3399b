"""One path, two runs: a store that goes, or becomes another one, under a run stops it, and nothing is mixed."""

import shutil
from itertools import count

import pytest
from damaged import copied, emptied
from standing import BLOCKS
from terminal import Process, assert_same_numbers, done, ids, saved, selfrepair

import selfrepair_nn as sr
from selfrepair_nn import store as store_room
from selfrepair_nn.errors import Incomplete, StoreError
from selfrepair_nn.files import Files
from selfrepair_nn.store import Store

PROMPTS, BLOCK, PER_BLOCK = 24, 4, 4 * 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(saved(tmp_path_factory.mktemp("model") / "m"))


@pytest.fixture(scope="module")
def asked(model, tmp_path_factory):
    """asked(seed): the choices of a run on prompts of its own."""
    directory = tmp_path_factory.mktemp("prompts")

    def choices(seed=0):
        prompts = str(ids(directory / f"{seed}.npy", PROMPTS, seed=seed))
        return {"model": model, "prompts": prompts, "layers": "1", "batch_size": BLOCK}

    return choices


@pytest.fixture(scope="module")
def undisturbed(asked, tmp_path_factory):
    """undisturbed(seed): the store of a run that nobody disturbed; nobody may change it."""
    made = {}

    def ran(seed=0):
        if seed not in made:
            made[seed] = tmp_path_factory.mktemp("undisturbed") / "s.zarr"
            sr.run(out=made[seed], **asked(seed))
        return made[seed]

    return ran


@pytest.fixture
def before_block(monkeypatch):
    """before_block(number, act): once, before a run writes that block, something is done."""

    def plan(number, act):
        write, left = Store.write_prompts, [number]

        def writing(self, *arguments):
            left[0] -= 1
            if left[0] == -1:
                act()
            write(self, *arguments)

        monkeypatch.setattr(Store, "write_prompts", writing)

    return plan


def test_a_store_knows_itself(undisturbed):
    one, other = (sr.open_store(undisturbed(seed)).attrs["id"] for seed in (0, 1))
    assert one != other
    assert len(one) == 32


def test_a_removed_store_stops_its_run_and_leaves_nothing(asked, before_block, tmp_path, undisturbed):
    path = tmp_path / "s.zarr"
    before_block(2, lambda: shutil.rmtree(path))
    with pytest.raises(
        StoreError, match=r"s\.zarr' was removed, moved or damaged .* nothing more is written"
    ) as caught:
        sr.run(out=path, **asked())
    assert "\n" not in str(caught.value)
    assert not path.exists()
    sr.run(out=path, **asked(1))
    assert_same_numbers(path, undisturbed(1))


@pytest.mark.parametrize("leave", ["zarr.json is last", "all at once"])
def test_a_store_that_is_removed_in_the_middle_of_a_write_leaves_nothing(asked, tmp_path, monkeypatch, leave):
    """`rm -r` and the run work on the same directory: what the run still wrote does not stay behind."""
    path, put, left = tmp_path / "s.zarr", Files.put, [9]

    def putting(self, files):
        left[0] -= bool(path.exists())
        if left[0] == 0:
            shutil.rmtree(path) if leave == "all at once" else (path / "zarr.json").unlink()
        put(self, files)
        if left[0] == 0 and leave != "all at once":
            for each in [*path.iterdir()]:
                if each.name != "self_repair":
                    shutil.rmtree(each)

    monkeypatch.setattr(Files, "put", putting)
    with pytest.raises(StoreError, match="was removed, moved or damaged"):
        sr.run(out=path, **asked())
    monkeypatch.undo()
    shutil.rmtree(path, ignore_errors=leave == "all at once")
    assert not path.exists()
    sr.run(out=path, **asked())


def test_a_store_that_is_gone_is_gone_however_late_that_is_seen(tmp_path, undisturbed, monkeypatch):
    """As where the machine stalls: what was still written would stay behind, and block the path."""
    path, put = copied(undisturbed(), tmp_path / "s.zarr"), Files.put
    store = Store(path)

    def too_late(self, files):
        shutil.rmtree(path)
        path.mkdir()
        put(self, files)

    monkeypatch.setattr(Files, "put", too_late)
    monkeypatch.setattr(store_room, "monotonic", count(step=1000).__next__)
    with pytest.raises(StoreError, match="was removed, moved or damaged"):
        store.write("noise_floor", None)
    assert not path.exists()


def test_a_removed_store_does_not_come_back_even_for_a_moment(tmp_path):
    """Another run may look at the path just then: it would find neither nothing nor a store."""
    for key in ("zarr.json", "logit/c/0/0"):
        with pytest.raises(FileNotFoundError):
            Files(tmp_path / "runs" / "s.zarr").put({key: b"1"})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), emptied], ids=["lost", "empty"])
def test_a_run_never_takes_back_what_is_only_damaged(
    asked, before_block, tmp_path, undisturbed, monkeypatch, harm
):
    """The store's own file alone was harmed: what was computed stays, and the same command goes on."""
    monkeypatch.setattr(store_room, "REMOVAL", 0.1)
    path = tmp_path / "s.zarr"
    before_block(3, lambda: harm(path / "zarr.json"))
    with pytest.raises(StoreError, match="was removed, moved or damaged"):
        sr.run(out=path, **asked())
    assert [str(each) for each in sr.verify(path)] == ["zarr.json is missing or cut"]
    assert len([*path.glob("self_repair/c/0/0/*/0")]) == 3
    sr.run(out=path, **asked())
    assert_same_numbers(path, undisturbed())


def test_a_moved_store_stops_its_run_and_resumes_where_it_is(asked, before_block, tmp_path, undisturbed):
    path, moved = tmp_path / "s.zarr", tmp_path / "elsewhere" / "t.zarr"
    moved.parent.mkdir()
    before_block(3, lambda: path.rename(moved))
    with pytest.raises(StoreError, match="was removed, moved or damaged"):
        sr.run(out=path, **asked())
    assert not path.exists()
    assert done(moved) == 3 * PER_BLOCK
    sr.run(out=moved, **asked())
    assert_same_numbers(moved, undisturbed())


@pytest.mark.parametrize("kind", [{}, {"select": "top-share"}, {"until_ci": 0.5}], ids=str)
@pytest.mark.parametrize("block", [0, 2])
def test_a_store_that_was_replaced_is_not_written(asked, before_block, tmp_path, undisturbed, kind, block):
    path = tmp_path / "s.zarr"

    def replace():
        shutil.rmtree(path)
        copied(undisturbed(1), path)

    before_block(block, replace)
    with pytest.raises(StoreError, match=r"was replaced by another store .* Choose another --out"):
        sr.run(out=path, **asked() | kind)
    assert sr.verify(path) == []
    assert_same_numbers(path, undisturbed(1))


def test_the_same_run_begun_anew_is_another_store(asked, before_block, tmp_path, undisturbed):
    """Same settings, same numbers: but two runs would write it."""
    path = tmp_path / "s.zarr"

    def replace():
        shutil.rmtree(path)
        copied(undisturbed(), path)

    before_block(2, replace)
    with pytest.raises(StoreError, match="was replaced"):
        sr.run(out=path, **asked())


def test_a_chunk_and_its_notes_of_another_store_are_told(undisturbed, tmp_path):
    """What a run that was too late may still have written: a block with the checksums that belong to it."""
    store = copied(undisturbed(), tmp_path / "s.zarr")
    for name in ("self_repair/c/0/0/1/0", "checksums/1.json"):
        shutil.copy(undisturbed(1) / name, store / name)
    assert {each.block for each in sr.verify(store)} == {1}


def test_a_lock_that_is_removed_stops_the_run(asked, before_block, tmp_path, undisturbed):
    path = tmp_path / "s.zarr"
    before_block(2, lambda: (tmp_path / ".s.zarr.lock").unlink())
    with pytest.raises(StoreError, match=r"lock' was removed while this run was writing .* resumes this one"):
        sr.run(out=path, **asked())
    assert done(path) == 3 * PER_BLOCK
    sr.run(out=path, **asked())
    assert_same_numbers(path, undisturbed())


def test_a_part_whose_lock_is_removed_stops(asked, before_block, tmp_path):
    path = tmp_path / "s.zarr"
    before_block(1, lambda: (tmp_path / ".s.zarr.1-of-2.lock").unlink())
    with pytest.raises(StoreError, match=r"1-of-2\.lock' was removed"):
        sr.run(out=path, shard="1/2", **asked())


def test_locks_and_drafts_that_a_kill_left_block_nothing(asked, tmp_path, undisturbed):
    path = tmp_path / "s.zarr"
    for name in (".s.zarr.lock", ".s.zarr.1-of-4.lock"):
        (tmp_path / name).touch()
    (tmp_path / ".s.zarr.0123abcd" / "token").mkdir(parents=True)
    sr.run(out=path, **asked())
    assert_same_numbers(path, undisturbed())
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["s.zarr"]


def test_half_written_files_of_a_kill_are_cleared(asked, before_block, tmp_path):
    path = tmp_path / "s.zarr"

    def stop():
        raise KeyboardInterrupt

    before_block(2, stop)
    with pytest.raises(Incomplete):
        sr.run(out=path, **asked())
    litter = path / "logit/c/0/0.0123.partial"
    litter.write_bytes(b"half")
    sr.run(out=path, **asked())
    assert not litter.exists()


def test_two_runs_one_after_the_other_in_a_directory_that_was_deleted(asked, tmp_path, undisturbed, model):
    """In processes of their own: the directory goes, with store and lock, and another run begins meanwhile."""
    runs = tmp_path / "runs"
    runs.mkdir()
    shared = [
        "run",
        "heads",
        "--model",
        model,
        "--layers",
        1,
        "--batch-size",
        BLOCK,
        "--out",
        runs / "s.zarr",
    ]
    (tmp_path / "a").mkdir()
    first = Process(tmp_path / "a", *shared, "--prompts", asked()["prompts"], blocks=BLOCKS)
    first.until(lambda: done(runs / "s.zarr") > 0)
    shutil.rmtree(runs, ignore_errors=True)
    shutil.rmtree(runs, ignore_errors=True)
    first.go_on()
    second = selfrepair(*shared, "--prompts", asked(1)["prompts"])
    ended = first.wait()
    assert ended.code == 1
    assert len(ended.err.strip().splitlines()) == 1
    assert "was removed, moved or damaged" in ended.err or "was replaced" in ended.err
    assert second.code == 0, second.err
    assert_same_numbers(runs / "s.zarr", undisturbed(1))
    assert sr.verify(runs / "s.zarr") == []


def test_workers_stop_with_the_store(model, asked, tmp_path):
    path = tmp_path / "s.zarr"
    (tmp_path / "a").mkdir()
    named = [f"--{name.replace('_', '-')}={value}" for name, value in asked().items()]
    child = Process(tmp_path / "a", "run", "heads", *named, "--workers", 2, "--out", path, blocks=1)
    child.until(lambda: done(path) > 0)
    moved = path.rename(tmp_path / "t.zarr")
    child.go_on()
    ended = child.wait()
    assert ended.code == 1, ended.err
    assert "was removed, moved or damaged" in ended.err
    assert not path.exists()
    assert sr.verify(moved) == []
