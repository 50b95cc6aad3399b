"""How jobs stand: in the server's terms, once or again and again until the run has finished."""

import json
from io import StringIO
from shutil import copytree
from types import SimpleNamespace

import pytest
import terminal
from fake_ndif import FakeNdif
from fake_service import Clock, FakeService, unit
from terminal import ids, saved, selfrepair

import selfrepair_nn as sr
from selfrepair_nn.backends.ndif import history
from selfrepair_nn.backends.ndif.in_flight import JobsInFlight
from selfrepair_nn.backends.ndif.ledger import FAILED, FETCHED, SENDING, SENT, TAKEN, Ledger, ledger_path
from selfrepair_nn.backends.ndif.server import Answer
from selfrepair_nn.backends.ndif.standing import in_words
from selfrepair_nn.running import holding
from selfrepair_nn.running.holding import held, only_writer
from selfrepair_nn.store import Store


@pytest.mark.parametrize(
    ("status", "description", "words"),
    [
        ("QUEUED", "Added to Queue at position 3.", "queued at place 3"),
        ("QUEUED", "Moved to position 12 in Queue.", "queued at place 12"),
        ("PROVISIONING", "Model Provisioning...", "cold start: a place for the model is being found"),
        ("DEPLOYING", "Model Deploying...", "cold start: the model is being loaded"),
        ("RUNNING", "Your job has started running.", "running"),
        ("PAUSED", "lunch\nat noon", "paused (lunch)"),
    ],
)
def test_a_status_in_words(status, description, words):
    assert in_words(status, description) == words


def test_the_bar_shows_a_cold_start_a_place_in_the_queue_and_for_how_long(tmp_path):
    said = [("DEPLOYING", "Model Deploying..."), ("QUEUED", "Added to Queue at position 2."), ("RUNNING", "It runs.")]
    service, shown = FakeService(Clock(), ["slow"]), []
    ask = service.ask

    def telling(job):
        at = (service.clock() - 1.7e9) / 200
        return Answer(*said[int(at)], "") if at < 3 else ask(job)

    service.ask = telling
    flight = JobsInFlight(service, Ledger(tmp_path / "x", "r"), 1, 1800, clock=service.clock, sleep=service.clock.sleep)
    flight.watch = shown.append
    list(flight([unit(0, 2)]))
    for words in ("cold start: the model is being loaded for 3 min", "queued at place 2 for ", "running for 1 min"):
        assert any(each.startswith(f"1 {words}") for each in shown), words


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ran")
    source, prompts = saved(folder / "m"), ids(folder / "p.npy")
    sr.run(model=source, prompts=prompts, layers=0, heads="0.0", out=folder / "s.zarr", progress=False)
    Store(folder / "s.zarr").annotate(run="r")
    return folder / "s.zarr"


@pytest.fixture
def store(ran):
    """A store whose run is on a server, as far as `jobs` looks."""
    ledger_path(ran).unlink(missing_ok=True)
    return ran


@pytest.fixture
def fake():
    with FakeNdif(None, deployments={"m": {}}) as running:
        yield running


def test_jobs_says_what_the_server_says_now(store, fake, monkeypatch):
    sent = Clock()
    monkeypatch.setattr(history, "time", SimpleNamespace(time=lambda: sent() + 75))
    ledger = Ledger(ledger_path(store), "r", sent)
    for part, job in (("one", "a"), ("two", "b")):
        ledger.write(SENDING, part, job=job, host=fake.url, bytes=1)
        ledger.write(SENT, part, job=job)
    ledger.write(SENDING, "three", job="c", host="http://127.0.0.1:9", bytes=1)
    fake.jobs["a"] = {"status": "QUEUED", "description": "Added to Queue at position 4."}
    out = selfrepair("jobs", store).out.splitlines()
    assert out[0].startswith("one  on the server: queued at place 4, sent 1 min 15 s ago")
    assert fake.url in out[0]
    assert "not known there (yet)" in out[1]
    assert "not known: " in out[2]
    assert "refused" in out[2]
    told = json.loads(selfrepair("jobs", store, "--json").out)
    assert told["parts"][0]["server_says"].startswith("queued at place 4")


def finishing(store, fake, monkeypatch):
    """A run that goes on between two looks."""
    ledger = Ledger(ledger_path(store), "r")
    steps = iter(
        [
            lambda: ledger.write(SENDING, "one", job="a", host=fake.url, bytes=1),
            lambda: fake.jobs.update(a={"status": "RUNNING", "description": "x"}),
            lambda: None,
            lambda: ledger.write(FAILED, "one", job="a", kind="busy", text="full"),
            lambda: [ledger.write(event, "one", job="b", bytes=1) for event in (SENDING, FETCHED, TAKEN)],
            lambda: attributes.update(finished="now"),
        ]
    )
    attributes = {"run": "r"}
    monkeypatch.setattr(holding, "held", lambda path: True)
    monkeypatch.setattr(history, "contents_of", lambda path: SimpleNamespace(attributes=attributes))
    wait = history.watched.__defaults__
    monkeypatch.setattr(history.watched, "__defaults__", (wait[0], lambda seconds: next(steps)()))


def test_watching_prints_each_change_until_the_run_has_finished(store, fake, monkeypatch):
    finishing(store, fake, monkeypatch)
    ended = selfrepair("jobs", store, "--watch")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert [each.split("  ")[1].partition(",")[0] for each in lines[:4]] == [
        "not known there (yet)",
        "running",
        "failed",
        "done",
    ]
    assert lines[4].startswith("2 jobs sent for 1 parts")


def test_watching_as_json_gives_a_line_for_each_change(store, fake, monkeypatch):
    finishing(store, fake, monkeypatch)
    found = [json.loads(each) for each in selfrepair("jobs", store, "--watch", "--json").out.splitlines()]
    assert [each.get("state") for each in found] == [
        "sent, not acknowledged",
        "sent, not acknowledged",
        "failed, to be sent again",
        "done",
        None,
    ]
    assert found[-1] == {"store": str(store), "jobs": 2, "finished": True}


class Tty(StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_redrawn(store, fake, monkeypatch):
    finishing(store, fake, monkeypatch)
    monkeypatch.setattr(terminal, "StringIO", Tty)
    drawn = selfrepair("jobs", store, "--watch").out.split("\x1b[J")
    assert "run in this process" in drawn[0]
    assert drawn[0].endswith("\x1b[1F")
    assert drawn[2].startswith("one  sent, not acknowledged: running")
    assert drawn[2].endswith("\x1b[4F")
    assert drawn[-1].startswith("one  done")


def test_ctrl_c_ends_it_in_one_line(store, fake, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    finishing(store, fake, monkeypatch)
    monkeypatch.setattr(history.watched, "__defaults__", (1.0, interrupted))
    ended = selfrepair("jobs", store, "--watch")
    assert (ended.code, ended.err.strip()) == (130, "selfrepair: interrupted")


@pytest.fixture
def unfinished(ran, tmp_path):
    """The same of a run that has not finished."""
    copytree(ran, tmp_path / "s.zarr")
    Store(tmp_path / "s.zarr").reopen()
    Store(tmp_path / "s.zarr").annotate(command="selfrepair run heads --model m")
    return tmp_path / "s.zarr"


def looked(monkeypatch, *steps):
    """What happens between two looks; then it is enough."""
    left = iter(steps)

    def wait(seconds):
        step = next(left, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(history.watched, "__defaults__", (0.0, wait))


@pytest.mark.parametrize("part", [None, (1, 2)])
def test_a_store_is_held_as_long_as_a_run_or_a_part_of_one_is_at_work(tmp_path, part):
    """Also by a path that leads there; asking keeps nobody off."""
    path, link = tmp_path / "s.zarr", tmp_path / "elsewhere.zarr"
    path.mkdir()
    link.symlink_to(path)
    assert held(path) is held(link) is False
    with only_writer(path, part) as hold:
        assert held(path) is held(link) is True
        if part:
            hold.share()
            assert held(path) is True
    assert held(path) is False
    (tmp_path / ".s.zarr.lock").touch()  # as after kill -9
    assert held(path) is False
    with only_writer(path, part):
        assert held(path) is True


def test_whose_lock_cannot_be_looked_at_may_be_held(tmp_path, monkeypatch):
    def refused(*given):
        raise PermissionError

    (tmp_path / ".s.zarr.lock").touch()
    monkeypatch.setattr(holding.os, "open", refused)
    assert held(tmp_path / "s.zarr") is None


@pytest.mark.parametrize("machine", [False, True])
def test_watching_ends_where_nobody_is_at_work(unfinished, fake, monkeypatch, machine):
    """But not as long as a server is at a job, or another run may go on."""
    ledger = Ledger(ledger_path(unfinished), "r")
    ledger.write(SENDING, "one", job="a", host=fake.url, bytes=1)
    fake.jobs["a"] = {"status": "RUNNING", "description": "x"}
    done = {"status": "COMPLETED", "description": "x"}
    looked(monkeypatch, lambda: None, lambda: fake.jobs.update(a=done), lambda: pytest.fail("it has ended"))
    ended = selfrepair("jobs", unfinished, "--watch", *["--json"] * machine)
    assert ended.code == 75
    assert "no run is at work on" in ended.err
    assert ended.err.endswith("selfrepair run heads --model m\n")
    if machine:
        assert json.loads(ended.out.splitlines()[-1])["finished"] is False


def test_watching_goes_on_while_a_run_is_at_work(unfinished, monkeypatch):
    looked(monkeypatch, lambda: None, lambda: None)
    with only_writer(unfinished, None):
        assert selfrepair("jobs", unfinished, "--watch").code == 130
    looked(monkeypatch, lambda: pytest.fail("it has ended"))
    assert selfrepair("jobs", unfinished, "--watch").code == 75


def test_a_store_that_has_finished_is_looked_at_once(store):
    assert "run in this process" in selfrepair("jobs", store, "--watch").out


