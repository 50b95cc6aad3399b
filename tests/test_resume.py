"""A run that was stopped, in whatever way, goes on where it stopped and ends with the numbers of one that was not."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from time import monotonic, sleep

import numpy as np
import pytest
import xarray as xr
from made import CLEAN, SWEPT
from standing import BLOCKS, STANDING
from terminal import (
    ENVIRONMENT,
    HANGING,
    Process,
    assert_same_numbers,
    done,
    files,
    ids,
    resume_command,
    saved,
    selfrepair,
)

import selfrepair_nn as sr
from selfrepair_nn.errors import Incomplete, StoreError
from selfrepair_nn.quantities import COORDINATES, QUANTITIES
from selfrepair_nn.store import Store

PROMPTS, HEADS, BATCH = 24, 15, 3
PAIRS = PROMPTS * HEADS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return ids(tmp_path_factory.mktemp("prompts") / "p.npy", PROMPTS)


@pytest.fixture(scope="module")
def command(model, prompts):
    """The arguments of the run that is interrupted in these tests, without its --out."""
    return ["run", "heads", "--model", model, "--prompts", prompts, "--batch-size", BATCH]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, command):
    """The store of the run that nobody interrupted, and how long that took."""
    directory = tmp_path_factory.mktemp("undisturbed")
    child = Process(directory, *command, "--out", directory / "s.zarr")
    child.until(lambda: True)
    started = monotonic()
    ended = child.wait()
    assert ended.code == 0, ended.err
    assert done(directory / "s.zarr") == PAIRS
    return directory / "s.zarr", monotonic() - started


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, prompts):
    """The store of a small finished run and the choices that made it; nobody may change it."""
    store = tmp_path_factory.mktemp("finished") / "s.zarr"
    choices = {"model": str(model), "prompts": str(prompts), "layers": "1", "batch_size": 6}
    sr.run(out=store, **choices)
    return store, choices


# Stopped


def test_killed_again_and_again(tmp_path, command, undisturbed):
    """At moments drawn from the whole length of a run: creation, model check, any unit, the end."""
    store, (whole, duration), moments = tmp_path / "s.zarr", undisturbed, random.Random(3)
    kept = [0]
    for share in (0.3, 0.8, 0.9, 0.9):
        child = Process(tmp_path, *command, "--out", store)
        child.until(lambda: True)
        sleep(moments.uniform(0, share * duration))
        child.send(signal.SIGKILL)
        assert child.wait().code in (-signal.SIGKILL, 0)
        kept.append(done(store))
        if store.exists():
            xr.open_zarr(store).load()
    assert kept == sorted(kept), "what was done stays done"
    ended = Process(tmp_path, *command, "--out", store).wait()
    assert ended.code == 0, ended.err
    assert done(store) == PAIRS
    assert_same_numbers(store, whole)


def test_killed_and_interrupted_in_the_shell(tmp_path, command, undisturbed):
    """Kill -9 in the middle of its work; then the real command in a Python of its own, and Ctrl-C."""
    store = tmp_path / "s.zarr"
    killed = Process(tmp_path, *command, "--out", store, blocks=BLOCKS)
    killed.until(lambda: done(store) > 0)
    killed.send(signal.SIGKILL)
    assert killed.wait().code == -signal.SIGKILL
    kept = done(store)
    arguments = [*STANDING, str(tmp_path / "stands"), *map(str, command), "--out", str(store)]
    child = subprocess.Popen(arguments, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and done(store) <= kept:
        sleep(0.02)
    child.send_signal(signal.SIGINT)
    err = child.communicate(timeout=HANGING)[1]
    assert child.returncode == 75, err
    assert 0 < kept < done(store) < PAIRS
    ended = Process(tmp_path, *resume_command(err)).wait()
    assert ended.code == 0, ended.err
    assert_same_numbers(store, undisturbed[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path, command, undisturbed, number):
    """Exit code 75, what is kept, and a command that finishes the run when it is copied as it is."""
    store = tmp_path / "it's a store.zarr"
    child = Process(tmp_path, *command, "--out", store, blocks=BLOCKS)
    child.until(lambda: done(store) > 0)
    child.send(number)
    ended = child.wait()
    units = done(store) // HEADS // BATCH
    assert ended.code == 75, ended
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert 0 < units < PROMPTS // BATCH
    assert f"{units} of {PROMPTS // BATCH} units are kept" in ended.err
    assert resume_command(ended.err) == [*map(str, command), "--out", str(store)]
    before = finished_chunks(store, units)
    ended = Process(tmp_path, *resume_command(ended.err)).wait()
    assert ended.code == 0, ended.err
    assert finished_chunks(store, units) == before, "what is done is not done again"
    assert_same_numbers(store, undisturbed[0])


def finished_chunks(store, units):
    """The files of the first units: their hashes and times."""
    found = {tuple(name.split("/")): what for name, what in files(store).items() if "/c/" in name}
    by_prompt = {n for n, v in QUANTITIES.items() if "prompt" in v.dims} - {*COORDINATES, "done"}
    where = {name: 2 + QUANTITIES[name].dims.index("prompt") for name in by_prompt}
    kept = {p: what for p, what in found.items() if p[0] in by_prompt and int(p[where[p[0]]]) < units}
    assert len(kept) == units * len(CLEAN + SWEPT)
    return kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_where_python_drops_exceptions(tmp_path, command, monkeypatch, number):
    """A signal may arrive inside a finaliser or a weak reference's callback, where what is raised is swallowed."""

    class Finalised:
        def __del__(self):
            signal.raise_signal(number)

    write, store = Store.write_prompts, tmp_path / "s.zarr"

    def writing(self, block, *arguments):
        write(self, block, *arguments)
        if block.start == 2 * BATCH:
            Finalised()

    monkeypatch.setattr(Store, "write_prompts", writing)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    ended = selfrepair(*command, "--out", store)
    assert ended.code == 75
    assert done(store) < PAIRS


@pytest.mark.parametrize(
    "stage",
    ["running.run.prepare", "store.Store.create", "running.run.loaded", "running.filling.noise_floor"],
)
def test_interrupted_before_the_first_unit(tmp_path, command, monkeypatch, stage):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"selfrepair_nn.{stage}", interrupted)
    ended = selfrepair(*command, "--out", tmp_path / "s.zarr")
    assert ended.code == 75
    assert "Traceback" not in ended.err
    assert resume_command(ended.err) == [*map(str, command), "--out", str(tmp_path / "s.zarr")]
    assert done(tmp_path / "s.zarr") == 0


def stop_at(monkeypatch, start, error, marked=False):
    """Let a run fail when the unit that starts at prompt `start` is to be written, or when it is `marked`."""
    write = Store.write_prompts

    def stopping(self, block, *arguments):
        if marked or block.start != start:
            write(self, block, *arguments)
        if block.start == start:
            raise error

    monkeypatch.setattr(Store, "write_prompts", stopping)


@pytest.mark.parametrize("marked", [False, True])
def test_an_exception_in_the_middle(tmp_path, finished, monkeypatch, marked):
    """Just before or just after a unit is marked: the next call goes on from there."""
    whole, choices = finished
    stop_at(monkeypatch, 6, RuntimeError("out of memory"), marked)
    with pytest.raises(RuntimeError, match="out of memory"):
        sr.run(out=tmp_path / "s.zarr", **choices)
    monkeypatch.undo()
    assert done(tmp_path / "s.zarr") == (12 if marked else 6) * 5
    sr.run(out=tmp_path / "s.zarr", **choices)
    assert_same_numbers(tmp_path / "s.zarr", whole)


@pytest.mark.parametrize("choice", [{"ablation": "mean"}, {"components": "top", "share": 0.1}])
def test_what_is_known_of_the_whole_run_only_is_the_same_after_a_stop(
    tmp_path, finished, monkeypatch, choice
):
    """Mean activations and the top share are computed anew by the run that resumes."""
    choices = finished[1] | choice
    sr.run(out=tmp_path / "whole.zarr", **choices)
    stop_at(monkeypatch, 12, KeyboardInterrupt)
    with pytest.raises(Incomplete, match="2 of 4 units"):
        sr.run(out=tmp_path / "s.zarr", **choices)
    monkeypatch.undo()
    sr.run(out=tmp_path / "s.zarr", **choices)
    assert_same_numbers(tmp_path / "s.zarr", tmp_path / "whole.zarr")


def test_another_batch_size_keeps_the_chunks_and_the_numbers(tmp_path, finished, monkeypatch):
    whole, choices = finished
    stop_at(monkeypatch, 12, KeyboardInterrupt)
    with pytest.raises(Incomplete, match="2 of 4 units"):
        sr.run(out=tmp_path / "s.zarr", **choices)
    monkeypatch.undo()
    sr.run(out=tmp_path / "s.zarr", **choices | {"batch_size": 7})
    assert Store(tmp_path / "s.zarr").prompts_per_chunk == 6
    assert_same_numbers(tmp_path / "s.zarr", whole)


def test_a_draft_of_a_killed_creation_is_swept_away(tmp_path, command, monkeypatch):
    """What a kill in the middle of a creation leaves is hidden; the next run, which holds the lock, clears it."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("selfrepair_nn.store._consolidate", killed)
        patched.setattr("shutil.rmtree", lambda *_, **__: None)
        assert selfrepair(*command, "--out", tmp_path / "s.zarr").code == 75
    assert [p for p in tmp_path.iterdir() if p.is_dir()], "this test made no draft"
    assert selfrepair(*command, "--layers", 2, "--out", tmp_path / "s.zarr").code == 0
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["s.zarr"]


# Finished


def test_a_finished_run_computes_nothing_and_looks_whose_numbers_it_holds(tmp_path, prompts, monkeypatch):
    model = saved(tmp_path / "m")
    command = ["run", "heads", "--model", model, "--prompts", prompts, "--out", tmp_path / "s.zarr"]
    first = selfrepair(*command)
    assert first.code == 0, first.err
    before = files(tmp_path / "s.zarr")
    monkeypatch.setattr("selfrepair_nn.tracing.session.run_session", None)
    second = selfrepair(*command)
    assert (second.code, second.out, second.err) == (0, first.out, first.err)
    saved(model, seed=1)
    third = selfrepair(*command)
    assert (third.code, third.out) == (1, "")
    assert "another model" in third.err
    assert files(tmp_path / "s.zarr") == before


# Another run's


@pytest.fixture(scope="module")
def other_prompts(tmp_path_factory):
    return str(ids(tmp_path_factory.mktemp("prompts") / "q.npy", PROMPTS, seed=1))


@pytest.fixture(scope="module")
def chosen_partners(tmp_path_factory):
    np.save(tmp_path_factory.mktemp("partners") / "r.npy", np.roll(np.arange(PROMPTS), 3))
    return str(next(tmp_path_factory.getbasetemp().glob("partners*/r.npy")))


@pytest.mark.parametrize(
    "change",
    [
        {"ablation": "identity"},
        {"target": "raw"},
        {"value_bias": "head"},
        {"freeze": "downstream"},
        {"layers": "0:2"},
        {"heads": "1.1"},
        {"prompts": "other_prompts"},
        {"length": 6},
        {"partners": "chosen_partners"},
        {"seed": 1},
        {"dtype": "float64"},
        {"components": "all"},
    ],
    ids=lambda value: next(iter(value)),
)
def test_other_choices_on_a_store_are_refused_by_name(request, finished, change):
    """Exactly what was chosen otherwise is named."""
    store, choices = finished
    before = files(store)
    made = ("other_prompts", "chosen_partners")
    change = {k: request.getfixturevalue(v) if v in made else v for k, v in change.items()}
    with pytest.raises(StoreError, match="choose another --out") as caught:
        sr.run(**choices | change, out=store)
    message = str(caught.value)
    chosen = json.loads(xr.open_zarr(store).attrs["options"])
    assert {name for name in chosen if re.search(rf"[(;] ?{name} .* there", message)} == set(change)
    assert str(store) in message
    assert len(message) < 400 + len(str(store))
    assert files(store) == before


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 3}, {"tokens_per_pass": 50}, {"check": False}, {"tokens": PROMPTS * 7}, {"backend": "simulated"}],
)
def test_what_decides_no_number_is_free_to_change(finished, change):
    store, choices = finished
    before = files(store)
    assert sr.run(**choices | change, out=store).done.all()
    assert files(store) == before


def test_other_weights_under_the_same_name_are_refused(tmp_path, prompts, monkeypatch):
    model = saved(tmp_path / "m")
    command = ["run", "heads", "--model", model, "--prompts", prompts, "--out", tmp_path / "s.zarr"]
    stop_at(monkeypatch, 0, KeyboardInterrupt, marked=True)
    assert selfrepair(*command, "--batch-size", 5).code == 75
    monkeypatch.undo()
    before = files(tmp_path / "s.zarr")
    saved(model, seed=1)
    ended = selfrepair(*command)
    assert ended.code == 1
    assert "another model" in ended.err
    assert "weights: " in ended.err
    assert "--out" in ended.err
    assert files(tmp_path / "s.zarr") == before
    saved(model)
    assert selfrepair(*command).code == 0


def test_an_edited_recipe_is_another_run(tmp_path, model, prompts):
    """What a recipe of one's own ablates, replaces and freezes is a setting like any other."""
    recipe = tmp_path / "mine.py"
    text = (
        '"""Mine."""\nimport selfrepair_nn as sr\n\n\ndef graph(structure, options):\n'
        '    return sr.Graph(ablate=sr.sweep((sr.Head(1, 2),)), replacement="zero")\n'
    )
    recipe.write_text(text)
    choices = dict(model=str(model), prompts=str(prompts), ablation="zero", out=tmp_path / "s.zarr")
    sr.run(str(recipe), **choices)
    before = files(tmp_path / "s.zarr")
    recipe.write_text(text.replace('"zero"', '"identity"'))
    with pytest.raises(StoreError, match="holds another run"):
        sr.run(str(recipe), **choices)
    assert files(tmp_path / "s.zarr") == before


# At the same time


def test_two_at_once(tmp_path, command, undisturbed):
    """The second is refused in one line and at once; the first never notices."""
    store = tmp_path / "s.zarr"
    first = Process(tmp_path, *command, "--out", store, blocks=BLOCKS)
    first.until(lambda: done(store) > 0)
    second = selfrepair(*command, "--out", store)
    assert first.running
    assert second.code == 1
    assert "another run is writing" in second.err
    assert str(store) in second.err
    assert len(second.err.splitlines()) == 1
    shown = selfrepair("info", store)
    assert shown.code == 0, "a store that is being written can be looked at"
    first.go_on()
    ended = first.wait()
    assert ended.code == 0, ended.err
    assert_same_numbers(store, undisturbed[0])
