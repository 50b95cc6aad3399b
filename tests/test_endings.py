"""However a run is ended from outside, its exit code is the documented one, one thing is said, and no litter stays."""

import fcntl
import os
import select
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import psutil
import pytest
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
from test_errors import read_only
from tiers import representative

from selfrepair_nn import cli
from selfrepair_nn.errors import SelfRepairError, StoreError
from selfrepair_nn.running import holding
from selfrepair_nn.running.holding import only_writer
from selfrepair_nn.store import Store

PROMPTS, BLOCK = 16, 2


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The arguments of a run, without its --out."""
    place = tmp_path_factory.mktemp("shared")
    prompts = ids(place / "p.npy", PROMPTS)
    return ["run", "heads", "--model", saved(place / "m"), "--prompts", prompts, "--batch-size", BLOCK]


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    store = tmp_path_factory.mktemp("undisturbed") / "s.zarr"
    assert selfrepair(*command, "--out", store).code == 0
    return store


def before_block(monkeypatch, number, act):
    """Once, before a run writes that block, something is done."""
    write, left = Store.write_prompts, [number]

    def writing(self, *given):
        left[0] -= 1
        if left[0] == -1:
            act()
        write(self, *given)

    monkeypatch.setattr(Store, "write_prompts", writing)


def raising(error):
    def act(*_, **__):
        raise error

    return act


# A terminal that is closed


def test_a_hangup_ends_a_run(command, undisturbed, tmp_path):
    store = tmp_path / "s.zarr"
    child = Process(tmp_path, *command, "--out", store, blocks=BLOCKS)
    child.until(lambda: done(store) > 0)
    child.send(signal.SIGHUP)
    ended = child.wait()
    assert ended.code == 75, ended
    assert "units are kept" in ended.err
    assert "Traceback" not in ended.err
    assert resume_command(ended.err) == [*map(str, command), "--out", str(store)]
    assert selfrepair(*resume_command(ended.err)).code == 0
    assert_same_numbers(store, undisturbed)


def test_a_hangup_ends_workers(command, undisturbed, tmp_path):
    """It reaches every process of the terminal, those that workers are started by too."""
    store = tmp_path / "s.zarr"
    child = Process(tmp_path, *command, "--workers", 2, "--out", store, blocks=1)
    child.until(lambda: done(store) > 0)
    for process in [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]:
        process.send_signal(signal.SIGHUP)
    child.go_on()
    ended = child.wait()
    assert ended.code == 75, ended
    assert len(ended.err.splitlines()) == 2, ended.err
    assert selfrepair(*command, "--out", store).code == 0
    assert_same_numbers(store, undisturbed)


def test_under_nohup_a_hangup_ends_nothing(command, undisturbed, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before_block(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGHUP))
        ended = selfrepair(*command, "--out", tmp_path / "s.zarr")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ended.code == 0, ended.err
    assert_same_numbers(tmp_path / "s.zarr", undisturbed)


TERMINAL = """
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.executable, sys.argv[1:])
print("began", flush=True)
sys.stdin.read()
os.close(terminal)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_what_is_said_to_a_terminal_that_is_gone(command, undisturbed, tmp_path):
    """The line cannot be written any more: the exit code is the same."""
    store = tmp_path / "s.zarr"
    arguments = [*map(str, command), "--no-progress", "--out", str(store)]
    child = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, *STANDING, str(tmp_path / "go"), *arguments],
        env=os.environ | ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while done(store) == 0:
        assert child.poll() is None
        select.select([], [], [], 0.02)
    out, _ = child.communicate(timeout=HANGING)
    assert out.split() == ["began", "75"]
    assert selfrepair(*command, "--out", store).code == 0
    assert_same_numbers(store, undisturbed)


# Ctrl-C


INTERRUPTED = """
import signal, sys
from selfrepair_nn.__main__ import main
left = [int(sys.argv.pop(1))]
def hook(event, args):
    if event in ("import", "exec", "compile"):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGINT)
sys.addaudithook(hook)
main()
"""


@pytest.mark.parametrize("event", representative([1, 30, 200, 500, 1500, 4000, 9000], 1, 200, 1500, 4000))
def test_ctrl_c_at_any_moment_of_the_start(command, tmp_path, event):
    """At imports, and at code that is made from text, as dataclasses are: Python would then end as if killed."""
    arguments = [*map(str, command), "--out", str(tmp_path / "s.zarr")]
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(event), *arguments],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode in (75, 130), ended
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) <= 2, ended.stderr
    assert "interrupted" in ended.stderr


def test_little_is_loaded_before_an_interrupt_is_heard():
    program = "import sys; from selfrepair_nn.__main__ import main; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | ENVIRONMENT, capture_output=True, text=True
    ).stdout.split()
    assert "selfrepair_nn.__main__" in loaded
    assert not {"zipfile", "email", "importlib.metadata", "click", "numpy"} & {*loaded}


def test_ctrl_c_in_code_that_is_made_from_text(command, tmp_path):
    program = textwrap.dedent("""
        import sys
        from selfrepair_nn import cli
        cli._knock = lambda *_: exec("raise KeyboardInterrupt")
        cli.main()
    """)
    ended = subprocess.run(
        [sys.executable, "-c", program, *map(str, command)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 75, ended


def test_ctrl_c_twice(command, tmp_path, monkeypatch):
    """The second falls where the first is being told."""
    say = cli._say
    monkeypatch.setattr(cli, "_say", lambda text: (signal.raise_signal(signal.SIGINT), say(text)))
    before_block(monkeypatch, 2, raising(KeyboardInterrupt()))
    ended = selfrepair(*command, "--out", tmp_path / "s.zarr")
    assert ended.code == 75
    assert f"2 of {PROMPTS // BLOCK} units are kept" in ended.err


def telling_that_it_waits(file):
    """From now on this process says in a file that it waits for its workers."""
    shutdown = ProcessPoolExecutor.shutdown

    def told(self, **given):
        file.touch()
        shutdown(self, **given)

    ProcessPoolExecutor.shutdown = told


def test_ctrl_c_twice_gives_up_what_workers_are_at(command, undisturbed, tmp_path):
    """A block may take minutes; nobody waits for it who asks a second time."""
    store, waits = tmp_path / "s.zarr", tmp_path / "waits"
    given, prepare = [*command, "--workers", 2, "--out", store], partial(telling_that_it_waits, waits)
    child = Process(tmp_path, *given, blocks=1, prepare=prepare)
    child.until(lambda: done(store) > 0)
    workers = [p for p in psutil.Process(child.pid).children(recursive=True) if not p.children()]
    for process in workers:
        process.suspend()
    trackers = [process for process in workers if "resource_tracker" in " ".join(process.cmdline())]
    child.send(signal.SIGINT)
    child.until(waits.exists)
    with pytest.raises(AssertionError, match="nothing happened"):
        child.until(lambda: False, 0.5)
    child.send(signal.SIGINT)
    for process in trackers:
        process.resume()
    ended = child.wait()
    assert ended.code == 75, ended
    assert "Traceback" not in ended.err
    assert selfrepair(*command, "--out", store).code == 0
    assert_same_numbers(store, undisturbed)


# Litter


def beside(store):
    return sorted(p.name for p in store.parent.iterdir() if p != store and "s.zarr" in p.name)


def test_a_lock_goes_with_its_run(command, tmp_path, monkeypatch):
    store, seen = tmp_path / "s.zarr", []
    before_block(monkeypatch, 1, lambda: seen.extend(beside(store)))
    assert selfrepair(*command, "--shard", "1/2", "--out", store).code == 0
    assert seen == [".s.zarr.1-of-2.lock"], "while it runs it is there"
    assert beside(store) == []


@pytest.mark.parametrize("more", [[], ["--shard", "1/2"]], ids=["whole", "part"])
def test_what_a_kill_left_is_cleared_by_the_next_command(command, tmp_path, monkeypatch, more):
    store = tmp_path / "s.zarr"
    with monkeypatch.context() as patched:
        before_block(patched, 2, raising(KeyboardInterrupt()))
        assert selfrepair(*command, *more, "--out", store).code == 75
    (store / "logit/c/0/0.0123.partial").write_bytes(b"half")
    for name in (".s.zarr.lock", ".s.zarr.1-of-2.lock", ".s.zarr.3-of-4.lock"):
        (tmp_path / name).touch()
    assert selfrepair(*command, *more, "--out", store).code == 0
    assert beside(store) == []
    assert not [*store.rglob("*.partial")]


def test_a_part_clears_nothing_that_another_part_is_writing(command, tmp_path, monkeypatch):
    store = tmp_path / "s.zarr"
    draft, left = store / "logit/c/0/0.0123.partial", []

    def meanwhile():
        draft.write_bytes(b"half")
        monkeypatch.undo()
        assert selfrepair(*command, "--shard", "2/2", "--out", store).code == 0
        left.append(draft.exists())

    before_block(monkeypatch, 2, meanwhile)
    assert selfrepair(*command, "--shard", "1/2", "--out", store).code == 0
    assert left == [True]


def held_off(path):
    """Whether another run is refused at a path."""
    try:
        with only_writer(path, None):
            return False
    except StoreError:
        return True


def test_a_lock_is_removed_while_it_is_held(tmp_path, monkeypatch):
    """Else somebody could acquire it in between, and would hold a lock that nobody else sees."""
    path, seen, unlink = tmp_path / "s.zarr", [], os.unlink

    def removing(file):
        monkeypatch.undo()
        seen.append(held_off(path))
        unlink(file)

    monkeypatch.setattr(holding.os, "unlink", removing)
    with only_writer(path, None):
        assert held_off(path)
    assert seen == [True]
    assert [*tmp_path.iterdir()] == []


def test_a_lock_whose_file_was_just_removed_is_none(tmp_path, monkeypatch):
    """It was opened before its run ended, and locked after."""
    path, flock = tmp_path / "s.zarr", fcntl.flock

    def locking(*given):
        monkeypatch.undo()
        (tmp_path / ".s.zarr.lock").unlink()
        flock(*given)

    monkeypatch.setattr(fcntl, "flock", locking)
    with only_writer(path, (1, 1)):
        assert (tmp_path / ".s.zarr.lock").exists()
        assert held_off(path)


def test_looking_at_a_store_writes_nothing(undisturbed):
    before = files(undisturbed.parent)
    assert selfrepair("verify", undisturbed).code == 0
    assert selfrepair("info", undisturbed).code == 0
    assert files(undisturbed.parent) == before


# A start that fails


@pytest.mark.parametrize("where", ["running.run.learn", "running.filling.noise_floor", "running.run._packed"])
def test_a_start_that_fails_leaves_no_store(command, tmp_path, monkeypatch, where):
    """It would refuse the choices that mend what failed."""
    store, command = tmp_path / "s.zarr", [*command, "--layers", 1]
    with monkeypatch.context() as patched:
        patched.setattr(
            f"selfrepair_nn.{where}", raising(SelfRepairError("out of memory: choose a smaller --length"))
        )
        ended = selfrepair(*command, "--out", store)
        assert (ended.code, beside(store), store.exists()) == (1, [], False)
    assert selfrepair(*command, "--length", 5, "--out", store).code == 0


def test_what_fails_or_is_stopped_later_keeps_its_store(command, undisturbed, tmp_path, monkeypatch):
    store = tmp_path / "s.zarr"
    with monkeypatch.context() as patched:
        patched.setattr("selfrepair_nn.running.run.learn", raising(KeyboardInterrupt()))
        assert selfrepair(*command, "--out", store).code == 75
    for number, error in ((0, SelfRepairError("early")), (1, SelfRepairError("late"))):
        with monkeypatch.context() as patched:
            before_block(patched, number, raising(error))
            assert selfrepair(*command, "--out", store).code == 1
        assert done(store) == number * 15 * BLOCK
    assert selfrepair(*command, "--out", store).code == 0
    assert_same_numbers(store, undisturbed)


# Where nothing can be written


@pytest.fixture
def frozen(tmp_path):
    """frozen(store): a place that nobody can write to, with a copy of a store in it."""
    if os.geteuid():
        pytest.skip("only root may mount a file system")
    place = tmp_path / "mount"
    with read_only(place):

        def holding(store):
            subprocess.run(["mount", "-o", "remount,rw", place], check=True)
            subprocess.run(["cp", "-r", store, place / "s.zarr"], check=True)
            (place / "s.zarr/logit/c/0/0.0123.partial").write_bytes(b"half")
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
            return place / "s.zarr"

        yield holding


def test_a_finished_store_answers_where_nothing_can_be_written(command, undisturbed, frozen):
    store = frozen(undisturbed)
    ended = selfrepair(*command, "--out", store)
    assert ended.code == 0, ended.err
    assert ended.out.strip().endswith(f"store   {store}")
    assert selfrepair(*command, "--shard", "1/2", "--out", store).code == 0
    assert [selfrepair(each, store).code for each in ("verify", "info")] == [0, 0]


def test_an_unfinished_store_says_that_nothing_can_be_written(command, tmp_path, frozen, monkeypatch):
    with monkeypatch.context() as patched:
        before_block(patched, 2, raising(KeyboardInterrupt()))
        assert selfrepair(*command, "--out", tmp_path / "s.zarr").code == 75
    store = frozen(tmp_path / "s.zarr")
    ended = selfrepair(*command, "--out", store)
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (1, "", 1)
    assert "a run keeps a lock there" in ended.err
    assert [selfrepair(each, store).code for each in ("verify", "info")] == [75, 0]
