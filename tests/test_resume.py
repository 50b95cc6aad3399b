"""A run that was stopped, in whatever way, goes on where it stopped and ends with the numbers of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
from time import monotonic, sleep

import numpy as np
import pytest
import xarray as xr
from terminal import (
    ENVIRONMENT,
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
from selfrepair_nn.execution import run as run_room
from selfrepair_nn.store import Store

PROMPTS, HEADS, BATCH = 24, 15, 2
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
    started = monotonic()
    ended = Process(directory, *command, "--out", directory / "s.zarr").wait()
    assert ended.code == 0, ended.err
    assert done(directory / "s.zarr") == PAIRS
    return directory / "s.zarr", monotonic() - started


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, prompts):
    """The store of a small finished run and the choices that made it; nobody may change it."""
    store = tmp_path_factory.mktemp("finished") / "s.zarr"
    choices = {"model": str(model), "prompts": str(prompts), "layers": "1", "batch_size": 12}
    sr.run(out=store, **choices)
    return store, choices


# Stopped


def test_killed_again_and_again(tmp_path, command, undisturbed):
    """At moments drawn from the whole length of a run: creation, model check, any unit, the end."""
    store, (whole, duration), moments = tmp_path / "s.zarr", undisturbed, random.Random(0)
    kept = [0]
    for _ in range(7):
        child = Process(tmp_path, *command, "--out", store)
        child.until(lambda: True)
        sleep(moments.uniform(0, duration))
        child.send(signal.SIGKILL) if child.running else None
        assert child.wait().code in (-signal.SIGKILL, 0)
        kept.append(done(store))
        if store.exists():
            xr.open_zarr(store).load()
    assert kept == sorted(kept), "what was done stays done"
    assert any(0 < k < PAIRS for k in kept), "no kill fell into the work: draw other moments"
    ended = Process(tmp_path, *command, "--out", store).wait()
    assert ended.code == 0, ended.err
    assert done(store) == PAIRS
    assert_same_numbers(store, whole)


def test_killed_in_the_shell_and_run_again(tmp_path, command, undisturbed):
    """The same with the real command in a process of its own, killed in the middle of its work."""
    store = tmp_path / "s.zarr"
    arguments = [sys.executable, "-m", "selfrepair_nn", *map(str, command), "--out", str(store)]
    child = subprocess.Popen(arguments, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE)
    try:
        while child.poll() is None and not 0 < done(store) < PAIRS:
            sleep(0.01)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert 0 < done(store) < PAIRS
    ended = Process(tmp_path, *command, "--out", store).wait()
    assert ended.code == 0, ended.err
    assert_same_numbers(store, undisturbed[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path, command, undisturbed, number):
    """Exit code 75, what is kept, and a command that finishes the run when it is copied as it is."""
    store = tmp_path / "a store.zarr"  # a path that a shell would take for two
    child = Process(tmp_path, *command, "--out", store)
    child.until(lambda: done(store) > 0)
    child.send(number)
    ended = child.wait(20)
    kept = done(store)
    assert ended.code == 75, ended
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert 0 < kept < PAIRS
    assert f"{kept // HEADS // BATCH} of {PROMPTS // BATCH} units are kept" in ended.err
    assert resume_command(ended) == [*map(str, command), "--out", str(store)]
    before = files(store)
    ended = Process(tmp_path, *resume_command(ended)).wait()
    assert ended.code == 0, ended.err
    kept_files = {n for n in before if "/c/" in n and not n.startswith(("done", "noise_floor"))}
    assert {n: files(store)[n] for n in kept_files} == {n: before[n] for n in kept_files}, "done work is not redone"
    assert_same_numbers(store, undisturbed[0])


def test_interrupted_in_the_shell(tmp_path, command, undisturbed):
    """Ctrl-C on the real command, then exactly the line that it printed, given to a shell."""
    store, shims = tmp_path / "a store.zarr", tmp_path / "bin"
    shims.mkdir()
    (shims / "selfrepair").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m selfrepair_nn "$@"\n')
    (shims / "selfrepair").chmod(0o755)
    environment = os.environ | ENVIRONMENT | {"PATH": f"{shims}{os.pathsep}{os.environ['PATH']}"}
    child = subprocess.Popen(
        ["selfrepair", *map(str, command), "--out", str(store)],
        env=environment,
        executable=shims / "selfrepair",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while child.poll() is None and not done(store):
        sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (75, ""), err
    assert 0 < done(store) < PAIRS
    again = subprocess.run(
        ["sh", "-c", err.splitlines()[-1]], env=environment, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert_same_numbers(store, undisturbed[0])


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


@pytest.mark.parametrize("stage", ["noise_floor", "_loaded", "backend"])
def test_interrupted_before_the_first_unit(tmp_path, command, monkeypatch, stage):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_room, stage, interrupted)
    ended = selfrepair(*command, "--out", tmp_path / "s.zarr")
    assert ended.code == 75
    assert resume_command(ended) == [*map(str, command), "--out", str(tmp_path / "s.zarr")]
    assert done(tmp_path / "s.zarr") == 0


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError("gone"), MemoryError()])
@pytest.mark.parametrize("marked", [False, True])
def test_an_exception_in_the_middle(tmp_path, model, prompts, monkeypatch, error, marked):
    """Raised just before or just after a unit is marked: the next call goes on from there."""
    choices = dict(model=str(model), prompts=str(prompts), batch_size=6, layers="2")
    whole = sr.run(out=tmp_path / "whole.zarr", **choices)
    write, left = Store.write_prompts, [2]

    def failing(self, *arguments):
        left[0] -= 1
        if marked or left[0]:
            write(self, *arguments)
        if not left[0]:
            raise error

    monkeypatch.setattr(Store, "write_prompts", failing)
    with pytest.raises(type(error)):
        sr.run(out=tmp_path / "s.zarr", **choices)
    monkeypatch.undo()
    assert done(tmp_path / "s.zarr") == (2 if marked else 1) * 6 * 5
    sr.run(out=tmp_path / "s.zarr", **choices)
    assert_same_numbers(tmp_path / "s.zarr", whole.encoding["source"])


@pytest.mark.parametrize("choice", [{"ablation": "mean"}, {"components": "top", "share": 0.1}])
def test_what_is_known_of_the_whole_run_only_is_the_same_after_a_stop(tmp_path, model, prompts, monkeypatch, choice):
    """Mean activations and the top share are computed anew by the run that resumes."""
    choices = dict(model=str(model), prompts=str(prompts), batch_size=6, layers="2") | choice
    sr.run(out=tmp_path / "whole.zarr", **choices)
    write = Store.write_prompts

    def stopping(self, block, *arguments):
        if block.start == 12:
            raise KeyboardInterrupt
        write(self, block, *arguments)

    monkeypatch.setattr(Store, "write_prompts", stopping)
    with pytest.raises(Incomplete, match="2 of 4 units"):
        sr.run(out=tmp_path / "s.zarr", **choices)
    monkeypatch.undo()
    sr.run(out=tmp_path / "s.zarr", **choices)
    assert_same_numbers(tmp_path / "s.zarr", tmp_path / "whole.zarr")


def test_another_batch_size_keeps_the_chunks_and_the_numbers(tmp_path, model, prompts, monkeypatch):
    choices = dict(model=str(model), prompts=str(prompts), layers="2", out=tmp_path / "s.zarr")
    whole = sr.run(**choices | {"out": tmp_path / "whole.zarr", "batch_size": 5})
    write = Store.write_prompts

    def stopping(self, block, *arguments):
        if block.start == 10:
            raise KeyboardInterrupt
        write(self, block, *arguments)

    monkeypatch.setattr(Store, "write_prompts", stopping)
    with pytest.raises(Incomplete, match="2 of 5 units"):
        sr.run(**choices, batch_size=5)
    monkeypatch.undo()
    sr.run(**choices, batch_size=7)
    assert Store(tmp_path / "s.zarr").prompts_per_chunk == 5
    assert_same_numbers(tmp_path / "s.zarr", whole.encoding["source"])


def test_what_a_killed_creation_left_is_swept_away(tmp_path, command, monkeypatch):
    """A kill in the middle of a creation leaves a hidden draft; the run that holds the lock clears it."""
    rename, drafts = os.rename, []

    def killed(*_):
        drafts.extend(p for p in tmp_path.iterdir() if p.is_dir())
        raise KeyboardInterrupt

    import selfrepair_nn.store as store_room

    with monkeypatch.context() as patched:
        patched.setattr(store_room, "_consolidate", killed)
        patched.setattr(store_room.shutil, "rmtree", lambda *_, **__: None)
        assert selfrepair(*command, "--out", tmp_path / "s.zarr").code == 75
    assert rename is os.rename
    assert [d for d in drafts if d.exists()], "the test left no draft"
    assert selfrepair(*command, "--layers", 2, "--out", tmp_path / "s.zarr").code == 0
    assert not [d for d in drafts if d.exists()]


# Finished


def test_a_finished_run_returns_at_once_and_needs_no_weights(tmp_path, prompts, monkeypatch):
    model = saved(tmp_path / "m")
    command = ["run", "heads", "--model", model, "--prompts", prompts, "--out", tmp_path / "s.zarr"]
    first = selfrepair(*command)
    assert first.code == 0, first.err
    before = files(tmp_path / "s.zarr")
    (model / "model.safetensors").unlink()
    monkeypatch.setattr(run_room, "load", lambda *_, **__: pytest.fail("loads weights"))
    second = selfrepair(*command)
    assert (second.code, second.out, second.err) == (0, first.out, first.err)
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
    ("named", "change"),
    [
        ({"ablation"}, {"ablation": "identity"}),
        ({"target"}, {"target": "raw"}),
        ({"value_bias"}, {"value_bias": "head"}),
        ({"freeze"}, {"freeze": "downstream"}),
        ({"heads"}, {"layers": "0:2"}),
        ({"heads"}, {"heads": "1.1"}),
        ({"prompts"}, {"prompts": "other_prompts"}),
        ({"prompts"}, {"length": 6}),
        ({"partners"}, {"partners": "chosen_partners"}),
        ({"partners"}, {"seed": 1}),
        ({"dtype"}, {"dtype": "float64"}),
        ({"components"}, {"components": "all"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_on_a_store_are_refused_by_name(request, finished, named, change):
    """Exactly what differs is named; identity and mean need no partners, so that there the partners differ too."""
    store, choices = finished
    before = files(store)
    change = {k: request.getfixturevalue(v) if v in ("other_prompts", "chosen_partners") else v for k, v in change.items()}
    with pytest.raises(StoreError, match="choose another --out") as caught:
        sr.run(**choices | change, out=store)
    message = str(caught.value)
    stored = json.loads(xr.open_zarr(store).attrs["settings"])
    differing = {name for name in stored if f"{name} is " in message}
    assert differing == named | ({"partners"} if "ablation" in change else set())
    assert str(store) in message
    assert len(message) < 400 + len(str(store))
    assert files(store) == before


@pytest.mark.parametrize(
    "change", [{"batch_size": 3}, {"rows": 50}, {"check": False}, {"tokens": PROMPTS * 7}, {"backend": "simulated"}]
)
def test_what_decides_no_number_is_free_to_change(finished, change):
    store, choices = finished
    before = files(store)
    assert sr.run(**choices | change, out=store).done.all()
    assert files(store) == before


def test_other_weights_under_the_same_name_are_refused(tmp_path, prompts, monkeypatch):
    model = saved(tmp_path / "m")
    command = ["run", "heads", "--model", model, "--prompts", prompts, "--out", tmp_path / "s.zarr"]
    write = Store.write_prompts

    def stopping(self, *arguments):
        write(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_prompts", stopping)
        assert selfrepair(*command, "--batch-size", 5).code == 75
    before = files(tmp_path / "s.zarr")
    saved(model, seed=1)
    ended = selfrepair(*command)
    assert ended.code == 1
    assert "other weights" in ended.err
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
    first = Process(tmp_path, *command, "--out", store)
    first.until(lambda: done(store) > 0)
    second = selfrepair(*command, "--out", store)
    assert first.running
    assert second.code == 1
    assert "another run is writing" in second.err
    assert str(store) in second.err
    assert len(second.err.splitlines()) == 1
    shown = selfrepair("info", store)
    assert shown.code == 0, "a store that is being written can be looked at"
    ended = first.wait()
    assert ended.code == 0, ended.err
    assert_same_numbers(store, undisturbed[0])
