"""A run shared out by an engine that exists already, an executor or a real Dask cluster: the same numbers."""

import os
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from multiprocessing import get_context
from time import monotonic, sleep

import families
import numpy as np
import psutil
import pytest
import xarray as xr
from standing import stand
from terminal import FORKS, HANGING, assert_same_numbers, ids, saved, selfrepair
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.errors import Incomplete, SelfRepairError, StoreError, UsageError
from selfrepair_nn.models.load import load, wrap
from selfrepair_nn.models.model import release
from selfrepair_nn.running import devices, sharing, worker
from selfrepair_nn.running.filling import Known
from selfrepair_nn.running.holding import Hold
from selfrepair_nn.running.worker import Order, Setup
from selfrepair_nn.store import Store

PROMPTS, BATCH = 16, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def choices(folder):
    model, prompts = saved(folder / "m"), ids(folder / "p.npy", PROMPTS)
    given = {"model": str(model), "prompts": str(prompts), "batch_size": BATCH, "tokens_per_pass": 64}
    return given | {"progress": False}


@pytest.fixture(scope="module")
def alone(choices, tmp_path_factory):
    """The store of one process."""
    path = tmp_path_factory.mktemp("alone") / "s.zarr"
    sr.run(out=path, **choices)
    return path


@pytest.fixture(scope="module")
def processes():
    """Two processes from a helper that has imported all, which they keep for all tests here."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["selfrepair_nn.running.worker", "nnsight.modeling.transformers"])
    with ProcessPoolExecutor(2, context) as pool:
        yield pool


class Watched(Executor):
    """An executor as a cluster has one: `sent` is called for each block, and what that raises comes back instead."""

    def __init__(self, inner, sent):
        self._inner, self._sent = inner, sent

    def submit(self, function, *given):
        if function is not os.getpid:
            try:
                self._sent(given[-1].block)
            except Exception as error:
                failed = Future()
                failed.set_exception(error)
                return failed
        return self._inner.submit(function, *given)


def standing(go):
    """Two processes of a pool, each of which stores one block and no more until there is such a file."""
    return ProcessPoolExecutor(2, get_context("forkserver"), stand, (1, go))


def after_block(monkeypatch, number, act):
    """Call `act` in the process that drives the run, once so many blocks are stored."""
    times, require = count(), Hold.require  # before the store is made, and after each block

    def required(hold):
        require(hold)
        if next(times) == number:
            act()

    monkeypatch.setattr(Hold, "require", required)


# ---------------------------------------------------------------- the same numbers


def test_processes_of_an_executor_give_the_numbers_of_this_one(choices, alone, processes, tmp_path):
    sr.run(out=tmp_path / "s.zarr", executor=processes, **choices)
    assert_same_numbers(tmp_path / "s.zarr", alone)
    assert "finished" in sr.open_store(tmp_path / "s.zarr").attrs
    assert processes.submit(os.getpid).result()  # it stays open


OTHER = {
    "until an interval": {"until_ci": 0.5, "share": 0.2},
    "top share": {"select": "top-share", "share": 0.2, "layers": 1},
    "mean": {"ablation": "mean", "components": "top", "layers": 1},
}


@pytest.mark.parametrize("name", representative(OTHER, "mean"))
def test_an_executor_with_other_choices(choices, processes, tmp_path, name):
    more = OTHER[name]
    sr.run(out=tmp_path / "one.zarr", **choices | more)
    sr.run(out=tmp_path / "two.zarr", executor=processes, **choices | more)
    assert_same_numbers(tmp_path / "two.zarr", tmp_path / "one.zarr")


def test_threads_of_this_process_take_turns(choices, alone, tmp_path, monkeypatch):
    inside, filled, fill = [], [], worker._Worker.__call__

    def watched(self, order):
        inside.append(order.block)
        filled.append(len(inside))
        try:
            return fill(self, order)
        finally:
            inside.remove(order.block)

    monkeypatch.setattr(worker._Worker, "__call__", watched)
    with ThreadPoolExecutor(3) as threads:
        sr.run(out=tmp_path / "s.zarr", executor=threads, **choices)
    assert filled == [1] * (PROMPTS // BATCH)
    assert_same_numbers(tmp_path / "s.zarr", alone)


def test_a_part_of_a_run_by_an_executor(choices, alone, processes, tmp_path):
    for part in (2, 1):
        sent = []
        more = {"shard": (part, 2), "executor": Watched(processes, sent.append)}
        sr.run(out=tmp_path / "s.zarr", **choices | more)
        assert [block.start for block in sent] == [*range((part - 1) * BATCH, PROMPTS, 2 * BATCH)]
    assert_same_numbers(tmp_path / "s.zarr", alone)


def test_what_is_relative_is_relative_to_the_run(choices, alone, folder, tmp_path, monkeypatch):
    """A worker of a cluster was started in another directory, where it is again afterwards."""
    monkeypatch.chdir(folder)
    with ProcessPoolExecutor(1, get_context("forkserver"), os.chdir, ("/",)) as pool:
        out = os.path.relpath(tmp_path / "s.zarr")
        sr.run(executor=pool, **choices | {"model": "./m", "prompts": "p.npy", "out": out})
        assert pool.submit(os.getcwd).result() == "/"
    assert_same_numbers(tmp_path / "s.zarr", alone)


def test_token_ids_that_are_handed_in_reach_workers(choices, alone, processes, tmp_path):
    given = choices | {"prompts": np.load(choices["prompts"])}
    sr.run(out=tmp_path / "s.zarr", executor=processes, **given)
    assert_same_numbers(tmp_path / "s.zarr", alone)


# ---------------------------------------------------------------- workers that die


def test_a_process_that_is_killed_ends_a_run_that_resumes(choices, alone, tmp_path, monkeypatch):
    """Python's own executor takes no more work then: what is stored is kept."""
    path = tmp_path / "s.zarr"
    with standing(tmp_path / "never") as pool:
        with monkeypatch.context() as patched:
            after_block(patched, 2, lambda: psutil.Process(next(iter(pool._processes))).kill())
            said = r"(?s)lost a worker.* units are kept in .*the same command resumes"
            with pytest.raises(Incomplete, match=said) as told:
                sr.run(out=path, executor=pool, **choices)
        assert told.value.exit_code == 75
        assert 0 < xr.open_zarr(path).done.mean() < 1
        with pytest.raises(UsageError, match="takes no work"):
            sr.run(out=path, executor=pool, **choices)
    sr.run(out=path, **choices)
    assert_same_numbers(path, alone)


def test_a_block_that_is_lost_is_sent_again(choices, alone, processes, tmp_path):
    """As by a cluster that gives up a block after its workers died: not what the worker itself said."""
    lost = iter([ConnectionError("gone"), TimeoutError("gone")])

    def sent(block):
        if block.start == 4 and (error := next(lost, None)):
            raise error

    sr.run(out=tmp_path / "s.zarr", executor=Watched(processes, sent), **choices)
    assert next(lost, None) is None
    assert_same_numbers(tmp_path / "s.zarr", alone)


def test_a_cluster_that_does_nothing_at_all(choices, processes, tmp_path):
    def sent(_):
        raise ConnectionError("no route to host")

    path = tmp_path / "s.zarr"
    with pytest.raises(Incomplete, match=r"died 4 times .*\(ConnectionError: no route to host\)\n0 of 8 units"):
        sr.run(out=path, executor=Watched(processes, sent), **choices)


def test_workers_without_the_package(choices, processes, tmp_path):
    def sent(_):
        raise ModuleNotFoundError("No module named 'selfrepair_nn'")

    with pytest.raises(SelfRepairError, match="install selfrepair_nn where the workers are") as told:
        sr.run(out=tmp_path / "s.zarr", executor=Watched(processes, sent), **choices)
    assert not isinstance(told.value, Incomplete)


def test_an_interrupt_keeps_what_is_under_way_and_cancels_the_rest(choices, alone, tmp_path, monkeypatch):
    path, go = tmp_path / "s.zarr", tmp_path / "go"

    def interrupt():
        go.touch()
        raise KeyboardInterrupt

    with standing(go) as pool:
        with monkeypatch.context() as patched:
            after_block(patched, 1, interrupt)
            with pytest.raises(Incomplete, match="interrupted"):
                sr.run(out=path, executor=pool, **choices)
        kept = int(xr.open_zarr(path).done.any(["layer", "head"]).sum())
        assert BATCH <= kept < PROMPTS
        pool.submit(os.getpid).result()
        assert int(xr.open_zarr(path).done.any(["layer", "head"]).sum()) == kept  # nothing went on
        sr.run(out=path, executor=pool, **choices)
    assert_same_numbers(path, alone)


# ---------------------------------------------------------------- Dask


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'selfrepair_nn[dask]'")
    import dask

    given = {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1"}
    FORKS.Process(target=int).start()  # what has imported all then starts the workers, too
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        distributed.LocalCluster(dashboard_address=None, silence_logs=50, **given) as found,
    ):
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["address", "file"])
def test_the_address_of_a_dask_scheduler(choices, alone, cluster, tmp_path, how):
    where = cluster.scheduler_address
    if how == "file":
        (tmp_path / "scheduler.json").write_text(f'{{"address": "{where}"}}')
        where = tmp_path / "scheduler.json"
    given = [x for name, v in choices.items() if name != "progress" for x in (f"--{name.replace('_', '-')}", v)]
    ended = selfrepair("run", "heads", *given, "--dask", where, "--out", tmp_path / "s.zarr")
    assert (ended.code, ended.err) == (0, "")
    assert_same_numbers(tmp_path / "s.zarr", alone)


@pytest.mark.slow
def test_a_dask_worker_that_is_killed_loses_nothing(choices, alone, cluster, tmp_path, monkeypatch):
    from distributed import Client

    with Client(cluster, set_as_default=False) as client:
        pids = [*client.run(os.getpid).values()]
        assert len({os.getpid(), *pids}) == 3
        after_block(monkeypatch, 2, lambda: psutil.Process(pids[0]).kill())
        sr.run(out=tmp_path / "s.zarr", executor=client.get_executor(), **choices)
    end = monotonic() + HANGING
    while psutil.pid_exists(pids[0]):  # until whoever started it has looked at how it ended
        assert monotonic() < end
        sleep(0.02)
    assert_same_numbers(tmp_path / "s.zarr", alone)


def test_a_scheduler_that_does_not_answer(choices, tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason="Dask is not installed: pip install 'selfrepair_nn[dask]'")
    monkeypatch.setattr(sharing, "PATIENCE", 0.3)
    monkeypatch.setattr("selfrepair_nn.running.run.prepare", lambda *_: pytest.fail("something slow was begun"))
    with pytest.raises(UsageError, match=r"dask 'tcp://127.0.0.1:1': no scheduler answers there"):
        sr.run(out=tmp_path / "s.zarr", dask="tcp://127.0.0.1:1", **choices)
    with pytest.raises(UsageError, match="there is no such file"):
        sr.run(out=tmp_path / "s.zarr", dask=str(tmp_path / "no.json"), **choices)


def test_without_dask(choices, tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"not installed: pip install 'selfrepair_nn\[dask\]'"):
        sr.run(out=tmp_path / "s.zarr", dask="tcp://127.0.0.1:1", **choices)


@pytest.mark.parametrize(
    "dask", ["x", "8786", "tcp://", "host:", "http://a b:1", "tcp://me:secret@host:8786", "", 3, "a\0.json"]
)
def test_addresses_that_are_none(dask):
    with pytest.raises(UsageError, match="dask"):
        sr.Options(dask=dask)


# ---------------------------------------------------------------- what is refused


class Client:
    def get_executor(self):
        raise AssertionError


@pytest.mark.parametrize(
    ("executor", "more", "said"),
    [
        (Client(), {}, r"no concurrent.futures.Executor: its get_executor\(\) gives one"),
        (2, {}, r"executor 2 is no concurrent.futures.Executor; give for example"),
        (ThreadPoolExecutor, {}, "is no concurrent.futures.Executor"),
        (ThreadPoolExecutor(1), {"remote": True}, "a server shares out the work itself: leave out executor"),
        (ThreadPoolExecutor(1), {"host": "http://127.0.0.1:1"}, "a server shares out the work itself"),
        (ThreadPoolExecutor(1), {"workers": 2}, "leave out workers, or the executor"),
        (ThreadPoolExecutor(1), {"dask": "tcp://127.0.0.1:1"}, "leave out dask, or the executor"),
    ],
)
def test_executors_that_cannot_be(choices, executor, more, said, tmp_path, monkeypatch):
    monkeypatch.setattr("selfrepair_nn.running.run.prepare", lambda *_: pytest.fail("something slow was begun"))
    with pytest.raises(UsageError, match=said):
        sr.run(out=tmp_path / "s.zarr", executor=executor, **choices | more)
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    "more", [{"dask": "tcp://127.0.0.1:1"}, {"workers": 2}, {"executor": ThreadPoolExecutor(1)}], ids=str
)
def test_a_loaded_model_cannot_be_given_to_workers(tmp_path, more):
    with pytest.raises(UsageError, match="give its name or directory"):
        sr.run(model=wrap(families.build("gpt2")), out=tmp_path, **more)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"dask": "tcp://127.0.0.1:1", "remote": True}, "leave out dask"),
        ({"dask": "tcp://127.0.0.1:1", "workers": 2}, "leave out workers, or dask"),
    ],
)
def test_clusters_that_cannot_be(more, said):
    with pytest.raises(UsageError, match=said):
        sr.Options(**more)


def test_an_executor_that_is_shut_down(choices, tmp_path):
    with ThreadPoolExecutor(1) as closed:
        pass
    with pytest.raises(UsageError, match=r"takes no work \(RuntimeError: .*shutdown"):
        sr.run(out=tmp_path / "s.zarr", executor=closed, **choices)


# ---------------------------------------------------------------- what a worker is told


@pytest.fixture
def setup(choices, alone):
    options = sr.Options(**{n: v for n, v in choices.items() if n != "progress"}, out=str(alone))
    yield Setup("heads", options, alone, Store(alone).attributes["id"], Known({}, None, None), None)
    worker._let_go()


def outcome(setup):
    return worker.fill(setup.packed(), Order(slice(0, BATCH), np.ones(4, bool), None))


@pytest.mark.parametrize(
    ("other", "kind", "said"),
    [
        ({"id": "0"}, SelfRepairError, "not the run's store there: .*--out on a disk that all of them share"),
        ({"version": "0.0"}, SelfRepairError, "it has selfrepair_nn .*, and the run 0.0: install the same"),
        ({"id": "0", "host": "elsewhere"}, SelfRepairError, r"a worker cannot begin: StoreError.*\(on .+\)"),
    ],
    ids=str,
)
def test_why_a_worker_cannot_begin(setup, other, kind, said):
    found = outcome(replace(setup, **other)).refused
    assert isinstance(found, kind)
    with pytest.raises(SelfRepairError, match=said):
        raise found


def test_a_store_that_a_worker_does_not_see(setup, tmp_path):
    with pytest.raises(SelfRepairError, match="is not the run's store there"):
        raise outcome(replace(setup, path=tmp_path / "elsewhere.zarr")).refused


def test_what_a_worker_refuses_is_refused_by_the_run(choices, tmp_path, monkeypatch):
    """Not taken for a death: it would be tried again and again."""
    times = []

    def full(*_):
        times.append(1)
        raise StoreError("cannot write: no space left on device")

    monkeypatch.setattr(Store, "write_prompts", full)
    with ThreadPoolExecutor(1) as thread, pytest.raises(StoreError, match="no space left"):
        sr.run(out=tmp_path / "s.zarr", executor=thread, **choices)
    assert len(times) <= 2


def test_what_nobody_foresaw_keeps_its_traceback(choices, tmp_path, monkeypatch):
    monkeypatch.setattr(worker._Worker, "__call__", lambda *_: 1 / 0)
    with ThreadPoolExecutor(1) as thread, pytest.raises(RuntimeError, match=r"(?s)in a worker:.*ZeroDivisionError"):
        sr.run(out=tmp_path / "s.zarr", executor=thread, **choices)


def test_a_model_is_let_go_once_nobody_asks(setup, monkeypatch):
    """A cluster outlives its runs: it must not hold their models for ever."""
    timers = []

    class Timer(threading.Timer):
        def start(self):
            timers.append(self)
            super().start()

    monkeypatch.setattr(worker, "IDLE", 0.05)
    monkeypatch.setattr(worker.threading, "Timer", Timer)
    monkeypatch.setattr(worker, "_begun", lambda setup: lambda order: 7)
    assert outcome(setup).tokens == 7
    timers[-1].join(HANGING)
    assert not worker._mine


def test_a_model_is_not_let_go_while_it_is_asked(setup, monkeypatch):
    monkeypatch.setattr(worker, "_begun", lambda setup: lambda order: 7)
    outcome(setup)
    first = worker._mine["timer"]
    outcome(setup)
    assert worker._mine["timer"] is not first
    first.function()  # as if it had fired while the second block was under way
    assert "worker" in worker._mine
    assert threading.active_count() < 50


def test_several_gpus_are_shared_out(monkeypatch, tmp_path):
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [devices.own_device(d) for d in ("auto", "cuda", "auto")] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [devices.own_device(d) for d in ("cuda:0", "cpu", "balanced")] == ["cuda:0", "cpu", "balanced"]
    devices.let_go()
    assert devices.own_index(2) == 0
    devices.let_go()
    for gpus in (0, 1):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert devices.own_device("auto") == "auto"


def test_another_process_has_another_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(devices.tempfile, "tempdir", None)
    context = get_context("forkserver")
    with ProcessPoolExecutor(1, context) as one, ProcessPoolExecutor(1, context) as other:
        taken = [pool.submit(devices.own_index, 2) for pool in (one, other)]
        assert sorted(each.result() for each in taken) == [0, 1]


def test_memory_is_shared_by_the_workers_of_a_device(monkeypatch):
    for gpus, device, expected in ((0, "auto", 8), (4, "auto", 2), (3, "cuda", 3), (4, "cuda:1", 8), (4, "cpu", 8)):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert sharing.Sharing(sr.Options(workers=8, device=device), None).on_one_device == expected


def test_who_only_waits_holds_no_model(choices, processes, tmp_path, monkeypatch):
    held = []
    model = load(choices["model"])
    release(model)
    assert sum(x.numel() for x in [*model.module.parameters(), *model.module.buffers()]) == 0
    monkeypatch.setattr(sharing, "release", held.append)
    sr.run(out=tmp_path / "s.zarr", executor=processes, layers=1, **choices)
    assert len(held) == 1
