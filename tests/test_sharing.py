"""One run in several processes, in several jobs of a cluster, in less memory: the same numbers."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from itertools import chain
from multiprocessing import forkserver
from pathlib import Path

import families
import numpy as np
import psutil
import pytest
import torch
import xarray as xr
from filelock import FileLock
from standing import BLOCKS
from terminal import ENVIRONMENT, HANGING, Process, assert_same_numbers, done, ids, saved, selfrepair
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.backends.local import out_of_memory
from selfrepair_nn.errors import Incomplete, SelfRepairError, StoreError, UsageError
from selfrepair_nn.layout import packing
from selfrepair_nn.models.architectures import Structure
from selfrepair_nn.models.load import wrap
from selfrepair_nn.store import Store

PROMPTS, BATCH = 24, 2


@pytest.fixture(scope="module", autouse=True)
def helper():
    """Python's helper, which starts processes, runs all along: each run with workers would have one of its own."""
    forkserver.ensure_running()


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, prompts = saved(folder / "m"), ids(folder / "p.npy", PROMPTS)
    return {"model": str(model), "prompts": str(prompts), "batch_size": BATCH, "tokens_per_pass": 64, "progress": False}


@pytest.fixture(scope="module")
def alone(choices, tmp_path_factory):
    """The store of one process."""
    path = tmp_path_factory.mktemp("alone") / "s.zarr"
    sr.run(out=path, **choices)
    return path


def arguments(choices, out, *more):
    named = [[f"--{n.replace('_', '-')}", v] for n, v in choices.items() if n != "progress"]
    return ["run", "heads", *chain(*named), "--out", out, *more]


# ---------------------------------------------------------------- workers


def test_workers_give_the_numbers_of_one_process(choices, alone, tmp_path):
    sr.run(out=tmp_path / "s.zarr", workers=2, **choices)
    assert_same_numbers(tmp_path / "s.zarr", alone)
    assert "finished" in sr.open_store(tmp_path / "s.zarr").attrs


UNTIL_KNOWN, MEAN = {"until_ci": 0.5, "share": 0.2}, {"ablation": "mean", "components": "top"}


@pytest.mark.parametrize("more", representative([UNTIL_KNOWN, MEAN], UNTIL_KNOWN), ids=str)
def test_workers_with_other_choices(choices, tmp_path, more):
    sr.run(out=tmp_path / "one.zarr", **choices | more)
    sr.run(out=tmp_path / "two.zarr", workers=2, **choices | more)
    assert_same_numbers(tmp_path / "two.zarr", tmp_path / "one.zarr")


def test_a_run_of_one_process_goes_on_with_two(choices, alone, tmp_path, monkeypatch):
    path, write, left = tmp_path / "s.zarr", sr.store.Store.write_prompts, iter(range(5))

    def interrupted(*given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(*given)

    with monkeypatch.context() as patched:
        patched.setattr(sr.store.Store, "write_prompts", interrupted)
        with pytest.raises(sr.errors.Incomplete):
            sr.run(out=path, **choices)
    sr.run(out=path, workers=2, **choices)
    assert_same_numbers(path, alone)


def workers_of(pid):
    """The processes that fill a run's store: it has them started by one that has imported all."""
    try:
        children = psutil.Process(pid).children()
        servers = [child for child in children if "forkserver" in " ".join(child.cmdline())]
        return [worker for server in servers for worker in server.children()]
    except psutil.NoSuchProcess:  # one that ended while it was looked at
        return []


def test_a_worker_that_is_killed_loses_nothing(choices, alone, tmp_path):
    store = tmp_path / "s.zarr"
    child = Process(tmp_path, *arguments(choices, store, "--workers", 2), blocks=BLOCKS)
    child.until(lambda: done(store) > 0)
    workers_of(child.pid)[0].kill()
    child.go_on()
    ended = child.wait()
    assert ended.code == 0, ended.err
    assert_same_numbers(store, alone)


def test_workers_end_with_the_run_whatever_ends_that(choices, alone, tmp_path):
    store = tmp_path / "s.zarr"
    child = Process(tmp_path, *arguments(choices, store, "--workers", 2), blocks=BLOCKS)
    child.until(lambda: done(store) > 0)
    workers = workers_of(child.pid)
    assert len(workers) == 2
    psutil.Process(child.pid).kill()
    gone, alive = psutil.wait_procs(workers, timeout=HANGING)
    assert (len(gone), alive) == (2, [])
    assert selfrepair(*arguments(choices, store)).code == 0
    assert_same_numbers(store, alone)


def test_an_interrupted_run_keeps_the_blocks_under_way(choices, alone, tmp_path):
    store = tmp_path / "s.zarr"
    child = Process(tmp_path, *arguments(choices, store, "--workers", 2), blocks=BLOCKS)
    child.until(lambda: done(store) > 0)
    psutil.Process(child.pid).terminate()
    child.go_on()
    ended = child.wait()
    assert ended.code in (0, 75), ended.err
    assert "Traceback" not in ended.err
    assert selfrepair(*arguments(choices, store)).code == 0
    assert_same_numbers(store, alone)


def test_workers_that_cannot_even_begin(choices, tmp_path, monkeypatch):
    monkeypatch.setattr("selfrepair_nn.running.workers._begin", os.abort)
    with pytest.raises(Incomplete, match=r"died 4 times before they had done anything: .* choose fewer"):
        sr.run(out=tmp_path / "s.zarr", workers=2, **choices)


def test_a_helper_that_is_just_ending_is_waited_for(choices, alone, tmp_path, monkeypatch):
    """Python starts another as soon as it is gone."""
    connect, refused = forkserver.connect_to_new_process, iter(range(3))

    def ending(fds):
        if next(refused, None) is not None:
            raise ConnectionRefusedError(111, "Connection refused")
        return connect(fds)

    monkeypatch.setattr(forkserver, "connect_to_new_process", ending)
    sr.run(out=tmp_path / "s.zarr", workers=2, **choices)
    assert next(refused, None) is None
    assert_same_numbers(tmp_path / "s.zarr", alone)


def test_workers_killed_before_the_first_block(choices, alone, tmp_path):
    """As the system does where memory is short for a moment: others begin in their place."""
    store = tmp_path / "s.zarr"
    child = Process(tmp_path, *arguments(choices, store, "--workers", 2), blocks=0)
    child.until(lambda: len(workers_of(child.pid)) == 2)
    for worker in workers_of(child.pid):
        worker.kill()
    assert done(store) == 0
    child.go_on()
    ended = child.wait()
    assert ended.code == 0, ended.err
    assert_same_numbers(store, alone)


def test_ctrl_c_while_workers_start(choices, alone, tmp_path):
    """It reaches every process that was started from the terminal; one of them says one thing."""
    store = tmp_path / "s.zarr"
    child = Process(tmp_path, *arguments(choices, store, "--workers", 2), blocks=0)
    child.until(lambda: workers_of(child.pid))
    for process in [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]:
        process.send_signal(signal.SIGINT)
    child.go_on()
    ended = child.wait()
    assert ended.code in (0, 75), ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) <= 2, ended.err
    assert selfrepair(*arguments(choices, store)).code == 0
    assert_same_numbers(store, alone)


def test_why_workers_cannot_begin(choices, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "selfrepair_nn.running.workers.fitting_threads", lambda *given: "no number of threads"
    )
    with pytest.raises(
        SelfRepairError, match=r"a worker cannot begin: RuntimeError: .*expects an int"
    ) as caught:
        sr.run(out=tmp_path / "s.zarr", workers=2, **choices)
    assert "memory" not in str(caught.value)


SCRIPT = r"""
import sys
from pathlib import Path

with open("began", "a") as file:
    file.write("once\n")
import selfrepair_nn as sr

choices = dict(model="tiny-neox", layers="7", heads="7.*", tokens=256, length=32, progress=False)
ds = sr.run("heads", workers=2, out="s.zarr", **choices)
print(float(ds.done.mean()), __name__, __file__ if "__file__" in globals() else None)
"""


@pytest.mark.parametrize("how", representative(["script", "module", "standard input"], "script"))
def test_a_script_without_a_main_guard_runs_once(tmp_path, how):
    """Workers used to run it again; one that deletes the results of the run before would have lost this run's."""
    (tmp_path / "script.py").write_text(SCRIPT)
    given = {"script": ["script.py"], "module": ["-m", "script"], "standard input": ["-"]}[how]
    ended = subprocess.run(
        [sys.executable, *given],
        cwd=tmp_path,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        input=SCRIPT,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[:2] == ["1.0", "__main__"]
    assert (tmp_path / "began").read_text() == "once\n"
    assert ended.stderr == ""


AFTERWARDS = """
import multiprocessing as mp
import signal


def told():
    print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), signal.getsignal(signal.SIGINT).__name__, flush=True)


if __name__ == "__main__":
    import selfrepair_nn as sr
    from forked import fork_helpers

    fork_helpers()
    for out in ("one.zarr", "two.zarr"):
        sr.run(model="tiny-neox", tokens=64, length=8, heads="7.0", workers=2, out=out, progress=False)
        child = mp.get_context("forkserver").Process(target=told)
        child.start()
        child.join()
"""


def test_processes_of_the_user_hear_an_interrupt_afterwards(tmp_path):
    """Python's helper, which starts processes, passes on what it was started with: that of the workers ends with them.

    The second time it runs already: then it is left as it is.
    """
    (tmp_path / "script.py").write_text(AFTERWARDS)
    paths = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(Path(__file__).parent)])
    env = os.environ | ENVIRONMENT | {"PYTHONPATH": paths}
    ended = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert ended.stdout.splitlines() == ["[] default_int_handler"] * 2, ended.stderr
    assert ended.stderr == ""


# ---------------------------------------------------------------- shards


def test_shards_fill_one_store(choices, alone, tmp_path):
    store, ended = tmp_path / "s.zarr", []
    for part in (2, 3):
        ended.append(selfrepair(*arguments(choices, store, "--shard", f"{part}/3")))
        assert "finished" not in xr.open_zarr(store).attrs
    ended.append(selfrepair(*arguments(choices, store, "--shard", "1/3")))
    assert [each.code for each in ended] == [0, 0, 0]
    assert "66.7% of the run done" in " ".join(ended[1].out.split())
    assert "finished" in xr.open_zarr(store).attrs
    assert_same_numbers(store, alone)


def test_shards_at_once(choices, alone, tmp_path):
    """Started together, as a cluster does: one prepares the store, the others wait for that and no longer."""
    store = tmp_path / "s.zarr"
    parts = []
    for part in (1, 2, 3):
        (tmp_path / str(part)).mkdir()
        parts.append(Process(tmp_path / str(part), *arguments(choices, store, "--shard", f"{part}/3")))
    ended = [part.wait() for part in parts]
    assert [each.code for each in ended] == [0, 0, 0], ended
    assert_same_numbers(store, alone)
    assert "finished" in xr.open_zarr(store).attrs


def test_a_shard_lets_others_begin_and_no_whole_run(choices, tmp_path, monkeypatch):
    path, tried = tmp_path / "s.zarr", {}
    write = sr.store.Store.write_prompts

    def during(*given):
        monkeypatch.setattr(sr.store.Store, "write_prompts", write)
        for name, more in {"whole": {}, "same": {"shard": "1/2"}}.items():
            with pytest.raises(StoreError) as error:
                sr.run(out=path, **choices | more)
            tried[name] = str(error.value)
        sr.run(out=path, shard="2/2", **choices)
        write(*given)

    monkeypatch.setattr(sr.store.Store, "write_prompts", during)
    sr.run(out=path, shard="1/2", **choices)
    assert all("another run is writing" in said for said in tried.values())
    assert len(tried) == 2
    assert sr.open_store(path).done.all()


def test_a_shard_waits_for_a_whole_run(choices, alone, tmp_path):
    path = tmp_path / "s.zarr"
    with FileLock(tmp_path / ".s.zarr.lock"):
        child = Process(tmp_path, *arguments(choices, path, "--shard", "1/1"))
        child.until(lambda: (tmp_path / ".s.zarr.lock").exists())
        assert not path.exists()
    assert child.wait().code == 0
    assert_same_numbers(path, alone)


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", ""])
def test_shards_that_are_none(shard):
    with pytest.raises(UsageError, match=r"is not one of N: write 1/8 to 8/8"):
        sr.Options(shard=shard)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"shard": "1/2", "until_ci": 0.1}, "leave --shard out"),
        ({"workers": 2, "host": "http://127.0.0.1:1"}, "a server shares out the work itself"),
        ({"shard": "1/2", "remote": True}, "a server shares out the work itself"),
        ({"workers": 0}, "workers must be a whole number of at least 1"),
        ({"threads": 0}, "threads must be a whole number of at least 1"),
    ],
)
def test_what_does_not_go_together(choices, said):
    with pytest.raises(UsageError, match=said):
        sr.Options(**choices)


# ---------------------------------------------------------------- memory and threads


@contextmanager
def little_memory(model, tokens, error):
    """A forward pass of more than so many tokens is refused, as an accelerator refuses it."""

    def refuse(module, given):
        if given[0].shape[:-1].numel() > tokens:
            raise error

    hook = model.layers[-1].register_forward_pre_hook(refuse) if hasattr(model, "layers") else None
    try:
        yield
    finally:
        hook.remove()


ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
}


@pytest.mark.parametrize("error", representative(ERRORS, "cuda"))
@pytest.mark.parametrize(
    ("room", "said", "more"),
    [
        (60, "going on with 32 tokens in a pass", {}),
        (60, "going on with 32 tokens in a pass", {"ablation": "mean"}),
        (14, "in two halves", {}),
        (14, "in two halves", {"select": "top-share"}),
        (14, "in two halves", {"logprob": "top", "share": 0.3}),
    ],
)
def test_what_does_not_fit_is_done_in_smaller_pieces(tmp_path, capfd, error, room, said, more):
    module = families.build("llama-gqa")
    ids = families.random_ids(module, 6)
    given = {"model": wrap(module), "prompts": ids, "batch_size": 4, "tokens_per_pass": 224, "progress": False} | more
    given |= {"check": False}  # the proof is as large as a pass that fits anywhere else
    sr.run(out=tmp_path / "a.zarr", **given)
    with little_memory(module.model, room, ERRORS[error]):
        sr.run(out=tmp_path / "b.zarr", **given)
    assert said in capfd.readouterr().err
    one, other = (sr.open_store(tmp_path / name).load() for name in ("a.zarr", "b.zarr"))
    for name in one.data_vars:
        assert np.allclose(one[name], other[name], atol=1e-9, equal_nan=True), name


@pytest.mark.parametrize(("room", "said"), [(3, "looking at the model"), (15, "a smaller --length")])
def test_what_can_never_fit(tmp_path, room, said):
    module = families.build("llama-gqa")
    choices = {"prompts": families.random_ids(module, 4, 16), "out": tmp_path / "s.zarr", "check": False}
    with (
        little_memory(module.model, room, ERRORS["cuda"]),
        pytest.raises(SelfRepairError, match=f"out of memory.*{said}"),
    ):
        sr.run(model=wrap(module), **choices)


def test_other_errors_are_not_called_out_of_memory():
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert all(map(out_of_memory, (MemoryError(), *ERRORS.values())))


def shape(**sizes):
    given = {"n_layers": 30, "n_heads": 9, "d_model": 576, "d_mlp": 1536} | sizes
    blank = dict.fromkeys(Structure.__dataclass_fields__)
    return Structure(**blank | given)


def test_tokens_of_a_pass_fit_the_memory():
    """Half of a GPU's free memory is never exceeded by what a pass is reckoned to take."""
    for memory in (2**30, 2**32, 2**34):
        tokens = packing.tokens_for(shape(), 2, 128, memory, "cuda")
        assert tokens * packing.bytes_for_token(shape(), 2, 128) <= memory / 2
    assert packing.tokens_for(shape(), 4, 128, 2**40, "cpu") == packing.TOKENS_PER_PASS
    assert packing.tokens_for(shape(), 4, 128, 2**20, "cpu") == packing.LEAST
    assert packing.tokens_for(shape(), 4, 1024, 2**20, "cpu") == 1024
    assert packing.tokens_for(shape(d_mlp=30000), 4, 128, 2**31, "cpu") < packing.TOKENS_PER_PASS


def test_a_run_goes_on_with_the_tokens_per_pass_it_began_with(choices, tmp_path, monkeypatch):
    choices = choices | {"tokens_per_pass": None, "out": tmp_path / "s.zarr"}
    monkeypatch.setattr(packing, "free_memory", lambda device: 2**20)
    sr.run(**choices, shard="1/2")
    assert sr.open_store(tmp_path / "s.zarr").attrs["tokens_per_pass"] == packing.LEAST
    monkeypatch.undo()
    sr.run(**choices)
    assert sr.open_store(tmp_path / "s.zarr").attrs["tokens_per_pass"] == packing.LEAST


def test_a_store_that_calls_them_rows_goes_on(choices, tmp_path, monkeypatch):
    """Stores that were begun before the attribute was renamed."""
    path = tmp_path / "s.zarr"
    choices = choices | {"tokens_per_pass": None, "out": path}
    monkeypatch.setattr("selfrepair_nn.running.run.fitting_tokens", lambda *_: packing.LEAST + 1)
    monkeypatch.setattr(Store, "annotate", _calling_them_rows(Store.annotate))
    sr.run(**choices, shard="1/2")
    monkeypatch.undo()
    assert sr.open_store(path).attrs["rows"] == packing.LEAST + 1
    taken = []
    monkeypatch.setattr("selfrepair_nn.running.run.fitting_tokens", lambda *_: taken.append(1))
    sr.run(**choices)
    assert not taken
    assert "tokens_per_pass" not in sr.open_store(path).attrs


def _calling_them_rows(annotate):
    def annotated(store, **named):
        old = {"tokens_per_pass": "rows"}
        return annotate(store, **{old.get(name, name): value for name, value in named.items()})

    return annotated


def test_threads_are_those_that_pay():
    assert packing.fewest({1: 1.0, 2: 0.55, 4: 0.52}) == 2
    assert packing.fewest({1: 1.0, 2: 0.98, 4: 0.3}) == 4
    assert packing.fewest({1: 1.0}) == 1
    before = torch.get_num_threads()
    assert packing.fitting_threads(shape(), 2) in (1, 2)
    assert torch.get_num_threads() == before


def test_the_store_says_nothing_of_how_it_was_shared_out(alone):
    settings = json.loads(xr.open_zarr(alone).attrs["settings"])
    assert not {"workers", "shard", "threads", "tokens_per_pass"} & settings.keys()
