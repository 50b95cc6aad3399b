"""Several hosts in one run: each with its own budget and patience, one ledger; one that dies loses nothing."""

import json
import re
import threading
import time
from collections import Counter

import fake_ndif
import numpy as np
import pytest
import torch
from fake_ndif import FakeNdif
from fake_service import Clock, FakeService, Killed, assert_right, unit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from terminal import assert_same_numbers, ids, resume_command, saved, selfrepair

import selfrepair_nn as sr
from selfrepair_nn.backends.ndif import connection, hosts, in_flight
from selfrepair_nn.backends.ndif.agreement import differences
from selfrepair_nn.backends.ndif.doctor import doctor
from selfrepair_nn.backends.ndif.faults import Fault
from selfrepair_nn.backends.ndif.in_flight import JobsInFlight
from selfrepair_nn.backends.ndif.ledger import Ledger, ledger_path, lines
from selfrepair_nn.backends.ndif.side_by_side import side_by_side
from selfrepair_nn.errors import Incomplete, UsageError
from selfrepair_nn.models.load import load
from selfrepair_nn.options import Options

UNITS = [unit(i, i + 1) for i in range(8)]


class Mortal(FakeService):
    """A host that does not answer between two times of its clock; what it had it still has afterwards."""

    down = (float("inf"), float("inf"))

    def step(self):
        super().step()
        if self.down[0] <= self.clock() < self.down[1]:
            raise Fault("unreachable", f"{self.name}: Connection refused")


def fleet(clock, count=2, **more):
    hosts = [Mortal(clock, **more) for _ in range(count)]
    for index, host in enumerate(hosts):
        host.name = f"http://host-{index}"
    return hosts


def flown(path, hosts, units=UNITS, in_flight=2, patience=900, said=None):
    clock = hosts[0].clock
    ledger = Ledger(path, "run", clock)
    notify = (said if said is not None else []).append
    flight = JobsInFlight(hosts, ledger, in_flight, patience, notify, clock=clock, sleep=clock.sleep)
    return list(flight(units))


def sent(hosts):
    return Counter(str(each) for host in hosts for each in host.sent)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "jobs.jsonl"


def test_every_host_has_its_own_budget_and_all_share_the_work(path):
    hosts, most = fleet(Clock(), 3), Counter()
    for host in hosts:
        ask = host.ask

        def asking(job, host=host, ask=ask):
            flying = sum(host.clock() < each.done for each in host.jobs.values())
            most[host.name] = max(most[host.name], flying)
            return ask(job)

        host.ask = asking
    for each, found in flown(path, hosts):
        assert_right(each, found)
    assert set(most.values()) == {2}
    assert set(sent(hosts).values()) == {1}
    assert all(len(host.sent) >= 2 for host in hosts)


def test_the_ledger_names_the_host_of_every_job(path):
    hosts = fleet(Clock())
    flown(path, hosts)
    by_host = Counter(each["host"] for each in lines(path) if each["event"] == "sending")
    assert by_host == {host.name: len(host.sent) for host in hosts}


def test_what_a_dead_host_had_goes_to_the_others_once_and_that_is_said_once(path):
    clock, said = Clock(), []
    hosts = fleet(clock)
    hosts[1].down = (clock() + 0.1, float("inf"))
    found = flown(path, hosts, said=said)
    assert sorted(each.label for each, _ in found) == sorted(each.label for each in UNITS)
    assert len([line for line in said if "is left out for 15 min" in line and "goes to the others" in line]) == 1
    assert len(said) == 2
    assert set(sent(hosts).values()) <= {1, 2}
    assert sum(sent(hosts).values()) == len(UNITS) + 2


def test_the_others_do_not_wait_for_a_silent_host(path):
    clock = Clock()
    hosts = fleet(clock)
    hosts[1].down = (clock() + 0.1, float("inf"))
    began, when = clock(), []
    ledger = Ledger(path, "run", clock)
    for _ in JobsInFlight(hosts, ledger, 2, 300, clock=clock, sleep=clock.sleep)(UNITS):
        when.append(clock() - began)
    assert sum(at < 10 for at in when) == len(UNITS) - 2
    assert 300 <= max(when) < 320


@pytest.mark.parametrize("silent", [20, 2000])
def test_a_host_that_comes_back_is_used_again_and_its_jobs_are_taken_up(path, silent):
    clock, said = Clock(), []
    hosts = fleet(clock, outcomes=["slow"] * 60)
    hosts[1].down = (clock() + 5, clock() + 5 + silent)
    flown(path, hosts, [unit(i, i + 1) for i in range(20)], said=said)
    assert any("host-1 answers again" in line for line in said) is (silent > 900)
    again = sum(count - 1 for count in sent(hosts).values())
    assert again == (2 if silent > 900 else 0)
    assert len([job for job in hosts[1].jobs.values() if job.done > hosts[1].down[1] + 60]) > 2


def test_all_dead_is_the_end_and_the_same_run_goes_on_later(path):
    clock = Clock()
    hosts = fleet(clock)
    for host in hosts:
        host.down = (clock() + 0.35, clock() + 5000)
    with pytest.raises(Incomplete, match=r"Connection refused(.|\n)*units of work are missing") as error:
        flown(path, hosts)
    assert error.value.exit_code == 75
    clock.sleep(6000)
    assert flown(path, hosts)


def test_each_job_is_taken_up_at_its_host(path):
    clock = Clock()
    hosts = fleet(clock, outcomes=["slow"] * 10)
    hosts[0].kill_at = 14
    with pytest.raises(Killed):
        flown(path, hosts)
    before = sent(hosts)
    assert len(before) == 4
    assert len(flown(path, hosts[::-1])) == len(UNITS)
    assert set(sent(hosts).values()) == {1}


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_jobs_of_a_host_that_was_not_noted_or_has_another_address_are_found(path, old, alone):
    """As in the ledgers of earlier versions; and where a tunnel ends at another port."""
    clock = Clock()
    hosts = fleet(clock, outcomes=["slow"] * 10)
    hosts[1].kill_at = 14
    with pytest.raises(Killed):
        flown(path, hosts[1:], UNITS[:2])
    if old:
        stripped = [{k: v for k, v in each.items() if k != "host"} for each in lines(path)]
        path.write_text("".join(json.dumps(each) + "\n" for each in stripped))
    hosts[1].name = "http://another"
    flown(path, hosts[1:] if alone else hosts)
    assert set(sent(hosts).values()) == {1}


def test_jobs_of_a_host_that_is_no_longer_named_are_sent_to_the_others(path):
    clock = Clock()
    hosts = fleet(clock, 3, outcomes=["slow"] * 10)
    hosts[0].kill_at = 14
    with pytest.raises(Killed):
        flown(path, hosts[:1], UNITS[:2])
    assert len(flown(path, hosts[1:], UNITS[:2])) == 2
    assert sum(len(host.sent) for host in hosts[1:]) == 2


def test_what_fails_at_one_host_is_tried_at_another(path):
    hosts = fleet(Clock())
    hosts[0].outcomes = ["Internal server error"] * 100
    flown(path, hosts)
    assert max(sent(hosts).values()) <= 2
    assert len(hosts[1].sent) == len(UNITS)


@pytest.mark.parametrize("kind", ["key", "differs", "version"])
def test_a_host_that_refuses_is_left_out_and_the_last_one_ends_the_run(path, kind):
    hosts, said = fleet(Clock()), []

    def refuse(request, job):
        raise Fault(kind, "no")

    hosts[1].send = refuse
    assert len(flown(path, hosts, said=said)) == len(UNITS)
    assert len([line for line in said if "http://host-1 is left out" in line]) == 1
    hosts[0].send = refuse
    with pytest.raises(Fault):
        flown(path, hosts, [unit(20, 21)])


DOWN = st.tuples(st.floats(0, 600), st.floats(1, 2000))
OUTCOMES = st.sampled_from(["ok", "ok", "slow", "in doubt", "vanishes", "forgotten", "expired", "refused", "never"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    outcomes=st.lists(OUTCOMES, max_size=8),
    downs=st.lists(DOWN, min_size=3, max_size=3),
    kills=st.lists(st.integers(0, 80), max_size=4),
)
def test_whatever_dies_everything_comes_back(tmp_path_factory, outcomes, downs, kills):
    path, clock, stored = tmp_path_factory.mktemp("fleet") / "jobs.jsonl", Clock(), {}
    hosts = fleet(clock, 3)
    for host, (start, length) in zip(hosts, downs, strict=True):
        host.outcomes, host.down = list(outcomes), (clock() + start, clock() + start + length)
    for kill in [*kills, *[None] * 12]:
        hosts[0].kill_at = None if kill is None else hosts[0].steps + kill
        flight = JobsInFlight(hosts, Ledger(path, "run", clock), 2, 300, clock=clock, sleep=clock.sleep)
        try:
            for each, found in flight([u for u in UNITS if u.label not in stored]):
                assert each.label not in stored
                stored[each.label] = found
        except (Killed, Incomplete):
            clock.sleep(120)
    for each in UNITS:
        assert_right(each, stored[each.label])


# ---------------------------------------------------------------- who they are


GREETING = {"host": "http://a", "torch": "2.9.1", "transformers": "5.23.0", "dtype": "float32", "revision": "x"}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"dtype": "bfloat16"}, ["dtype bfloat16, not float32"]),
        ({"transformers": "5.22.0"}, ["transformers 5.22.0, not 5.23.0"]),
        ({"revision": "y", "torch": "2.9.2"}, ["revision y, not x"]),
        ({"torch": "2.9.4+cpu", "host": "http://b", "ndif": "0.1.3"}, []),
        ({"configuration": "what only one of them says"}, []),
    ],
)
def test_two_greetings_differ_in_what_numbers_depend_on(other, said):
    assert differences(GREETING, GREETING | other) == said


@pytest.mark.parametrize(
    ("given_", "kept"),
    [
        ("http://a:1", ("http://a:1",)),
        (["http://a:1", "http://b"], ("http://a:1", "http://b")),
        (None, ()),
        (["HTTP://A:80/", " https://a:443", "http://A:0443//X/"], ("http://a", "https://a", "http://a:443//X")),
        (["http://[0:0:0:0:0:0:0:1]:8001/", "http://a?"], ("http://[::1]:8001", "http://a")),
    ],
)
def test_hosts_as_they_are_given(given_, kept):
    assert Options(host=given_).host == kept
    assert Options(host=given_).served == bool(kept)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        (["http://a", "http://A/"], "'http://a' is named twice .'http://a' and 'http://A/'."),
        (["http://a", "http://b", "http://a:80"], "named twice"),
        (["http://[::1]:8001", "http://[0::1]:8001"], "named twice"),
        (["http://[v1.a]"], "is not an address"),
        (["http://a", "b"], "'b' is not an address"),
        (["http://a", "http://u:secret@b"], "must not hold a name or a password"),
        ([], "is empty"),
        ([5], "must be a text"),
    ],
)
def test_hosts_that_cannot_be(given_, said):
    with pytest.raises(UsageError, match=said):
        Options(host=given_)


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(connection, "BACKOFF", lambda state: 0.01)
    monkeypatch.setattr(in_flight, "pause_before", lambda attempt: 0.01)
    monkeypatch.setattr(fake_ndif.ServedModel, "pack", fake_ndif.named)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    source, prompts = saved(folder / "m"), ids(folder / "p.npy", 8)
    choices = ["--prompts", prompts, "--layers", "0:2", "--batch-size", 1]
    with pytest.MonkeyPatch.context() as patched, FakeNdif(load(str(source))) as fake:
        patched.setattr(fake_ndif.ServedModel, "pack", fake_ndif.named)
        undisturbed = ["run", "heads", "--model", source, "--host", fake.url, "--out", folder / "u.zarr"]
        assert selfrepair(*undisturbed, *choices).code == 0
    return source, choices, fake.model, folder / "u.zarr"


def command(tiny, out, *hosts, more=()):
    named = [each for host in hosts for each in ("--host", host.url)]
    return ["run", "heads", "--model", tiny[0], *named, "--out", out, *tiny[1], *more]


def test_a_host_that_dies_in_the_middle_of_a_run_loses_nothing(tiny, quick, tmp_path):
    store = tmp_path / "s.zarr"
    with FakeNdif(tiny[2]) as one, FakeNdif(load(str(tiny[0]))) as other:
        taken = other._result
        other._result = lambda job: (len(other.sent()) > 2 and other.broken.append(job), taken(job))[1]
        other.fault = lambda what, job: "reset" if other.broken else None
        ended = selfrepair(*command(tiny, store, one, other, more=["--patience", 1]))
        assert ended.code == 0, ended.err
        assert re.search(rf"{other.url} is left out for [1-9]", ended.err), ended.err
        assert min(len(one.sent()), len(other.sent())) > 2
    assert_same_numbers(store, tiny[3])
    attributes = json.loads((store / "zarr.json").read_text())["attributes"]
    assert [each["host"] for each in json.loads(attributes["servers"])] == [one.url, other.url]
    sending = [each for each in lines(ledger_path(store)) if each["event"] == "sending"]
    assert {each["host"] for each in sending} == {one.url, other.url}


def test_all_hosts_dead_is_resumable_with_the_same_hosts(tiny, quick, tmp_path):
    store = tmp_path / "s.zarr"
    with FakeNdif(tiny[2]) as one, FakeNdif(load(str(tiny[0]))) as other:
        for host in (one, other):
            taken = host._result
            host._result = lambda job, t=taken: (len(one.sent()) > 4 and one.broken.append(job), t(job))[1]
            host.fault = lambda what, job: "reset" if one.broken else None
        ended = selfrepair(*command(tiny, store, one, other, more=["--patience", 1]))
        assert ended.code == 75, ended.err
        assert resume_command(ended.err).count("--host") == 2
        one.fault = other.fault = lambda what, job: None
        one._result, other._result = (lambda job, h=h: FakeNdif._result(h, job) for h in (one, other))
        assert selfrepair(*resume_command(ended.err)).code == 0
    assert_same_numbers(store, tiny[3])


def test_a_host_that_serves_something_else_gets_no_job_of_the_run(tiny, quick, tmp_path):
    store = tmp_path / "s.zarr"
    with FakeNdif(tiny[2]) as one, FakeNdif(load(str(tiny[0])), packages={"transformers": "4.57.0"}) as other:
        ended = selfrepair(*command(tiny, store, one, other))
        assert ended.code == 1
        assert f"{other.url} serves something else than {one.url}: transformers 4.57.0, not" in ended.err
        assert len(other.sent()) == len(one.sent()) == 1
        (found,) = [each for each in doctor([one.url, other.url]) if each.what == "hosts"]
    assert found.right is False
    assert "transformers 4.57.0" in found.seen


def test_a_host_that_is_not_there_at_the_beginning_is_left_out(tiny, quick, tmp_path):
    store = tmp_path / "s.zarr"
    with FakeNdif(tiny[2]) as one, FakeNdif(None, deployments={}) as other:
        other.fault = lambda what, job: "reset"
        ended = selfrepair(*command(tiny, store, one, other, more=["--patience", 1]))
    assert ended.code == 0, ended.err
    assert f"{other.url} is left out until it answers" in ended.err
    assert_same_numbers(store, tiny[3])


def test_hosts_are_greeted_side_by_side(tiny, quick, tmp_path):
    """None waits for another's cold start; the store names them in the order of the command line."""
    store, starting = tmp_path / "s.zarr", fake_ndif._json({"status": "DEPLOYING", "description": "A cold start."})
    with FakeNdif(tiny[2]) as one, FakeNdif(load(str(tiny[0]))) as other:
        for host, awaited in ((one, other), (other, one)):
            told = host._response
            host._response = lambda *job, told=told, other=awaited: told(*job) if other.sent() else starting
        ended = selfrepair(*command(tiny, store, one, other, more=["--patience", 60]))
    assert ended.code == 0, ended.err
    assert "left out" not in ended.err
    attributes = json.loads((store / "zarr.json").read_text())["attributes"]
    assert [each["host"] for each in json.loads(attributes["servers"])] == [one.url, other.url]
    assert json.loads(attributes["server"])["host"] == one.url


def test_what_is_said_side_by_side_has_the_order_that_was_given():
    said = side_by_side({"b": lambda _: time.sleep(0.02) or 1, "a": lambda _: 2}, lambda _: None)
    assert [*said.items()] == [("b", 1), ("a", 2)]


@pytest.mark.parametrize("interrupted", [True, False])
def test_where_one_is_broken_or_all_are_interrupted_none_goes_on(interrupted):
    over = threading.Event()

    def goes_on(watch):
        try:
            while True:
                watch("running")
                time.sleep(0.01)
        finally:
            over.set()

    def refuses(watch):
        raise Fault("key") if interrupted else UsageError("no")

    def look(state):
        if interrupted and state == "b: running":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt if interrupted else UsageError):
        side_by_side({"a": refuses, "b": goes_on}, look)
    assert over.wait(5)


def test_two_addresses_of_one_server_are_one_host(tiny, quick, tmp_path):
    store = tmp_path / "s.zarr"
    with FakeNdif(tiny[2]) as one:
        again = one.url.replace("127.0.0.1", "localhost")
        ended = selfrepair(*command(tiny, store, one, more=["--host", again]))
        assert ended.code == 0, ended.err
        assert f"{again} is left out: it is the server at {one.url}" in ended.err
        found = [each.seen for each in doctor([one.url, again], model=str(tiny[0]), trip=True) if each.what == "hosts"]
    assert f"{again} is the server at {one.url}" in found[0]
    assert "servers" not in json.loads((store / "zarr.json").read_text())["attributes"]
    assert {each["host"] for each in lines(ledger_path(store)) if "units" in each["part"]} <= {one.url}


def test_a_host_that_refuses_from_the_beginning_is_left_out_by_name(tiny, quick, tmp_path):
    """One key goes to all of them, and one of them does not know it; where none does, each is named."""
    store = tmp_path / "s.zarr"
    with FakeNdif(tiny[2]) as one, FakeNdif(load(str(tiny[0]))) as other:
        refusal = 401, {"Content-Type": "application/json"}, b'{"detail": "Invalid API key."}'
        other.post = lambda *_: refusal
        ended = selfrepair(*command(tiny, store, one, other))
        assert ended.code == 0, ended.err
        assert f"{other.url} is left out: the server does not accept the API key (HTTP 401" in ended.err
        assert_same_numbers(store, tiny[3])
        one.post = other.post
        ended = selfrepair(*command(tiny, tmp_path / "n.zarr", one, other))
        assert ended.code == 1
        assert all(f"{each.url}: the server does not accept the API key" in ended.err for each in (one, other))
        found = [each for each in doctor([one.url, other.url], model=str(tiny[0]), trip=True) if each.right is False]
    assert [each.seen.partition(": ")[0] for each in found] == [one.url, other.url]


def test_doctor_says_how_the_model_stands_where_versions_are_not_told(tiny, monkeypatch):
    monkeypatch.setattr("selfrepair_nn.backends.ndif.doctor.PATIENCE", 0.2)
    with FakeNdif(tiny[2], lambda what, job: "page" if what == "env" else None) as one:
        found = {each.what: each for each in doctor(one.url, model=str(tiny[0]))}
    assert found["model"].right
    assert found["cluster"].right is False


def test_a_cold_start_is_shown_from_the_first_job_on(tiny, quick, tmp_path, monkeypatch):
    """The greeting is the first job that a model which is not deployed has to be loaded for."""
    shown, place = [], [2]
    monkeypatch.setattr("selfrepair_nn.progress.Bar.note", lambda self, state: shown.append(state))
    with FakeNdif(tiny[2]) as one:
        told = one._response

        def queued(job, fault):
            if not place:
                return told(job, fault)
            said = {"id": job, "status": "QUEUED", "description": f"Moved to position {place.pop()} in Queue."}
            return fake_ndif._json(said)

        one._response = queued
        assert selfrepair(*command(tiny, tmp_path / "s.zarr", one)).code == 0
        assert len(one.sent()) > 1
    assert any("queued at place 2" in each for each in shown)


def test_a_host_that_wants_to_be_asked_later_is_not_asked_sooner(path):
    clock, said, asked = Clock(), [], []
    hosts = fleet(clock, outcomes=["slow"] * 8)

    def full(request, job):
        asked.append(clock())
        raise Fault("crowded", "HTTP 429: full", after=100)

    hosts[1].send = full
    assert len(flown(path, hosts, said=said)) == len(UNITS)
    assert min(np.diff(asked)) >= 100
    assert "has more requests than it takes (HTTP 429: full)" in said[0]


@pytest.fixture
def strange(tiny):
    """The same model, but for one weight of its last MLP."""
    model = load(str(tiny[0]))
    with torch.no_grad():
        model.nn._module.transformer.h[-1].mlp.c_proj.weight[3, 2] += 0.1
    return model


def test_hosts_with_other_weights_are_no_fleet(tiny, strange, quick, tmp_path):
    with FakeNdif(tiny[2]) as one, FakeNdif(strange) as other:
        ended = selfrepair(*command(tiny, tmp_path / "s.zarr", one, other))
    assert ended.code == 1
    assert f"{other.url} serves something else than {one.url}: other weights: the MLP of layer 2" in ended.err


def test_a_host_that_comes_back_with_other_weights_gets_nothing(
    tiny, strange, quick, patient, tmp_path, monkeypatch
):
    """Its words are the same; what its weights make of known vectors is not. It comes back in the middle of the run."""
    monkeypatch.setattr(hosts, "LATE", 0.1)
    monkeypatch.setattr(connection, "BACKOFF", lambda state: 5)
    store = tmp_path / "s.zarr"
    with FakeNdif(tiny[2]) as one, FakeNdif(strange) as other:
        other.fault = lambda what, job: "reset" if len(one.sent()) < 4 else None
        told = one._response

        def going_on(job, fault):
            if len(one.sent()) < 4 or other.sent():
                return told(job, fault)
            return fake_ndif._json({"id": job, "status": "RUNNING", "description": "until the other has come back"})

        one._response = going_on
        ended = selfrepair(*command(tiny, store, one, other, more=["--patience", 60, "--in-flight", 1]))
    assert ended.code == 0, ended.err
    assert f"{other.url} is left out until it answers" in ended.err
    assert f"{other.url} is left out: " in ended.err
    assert "other weights: the MLP of layer 2" in ended.err
    assert len(other.sent()) == 1
    assert_same_numbers(store, tiny[3])


def test_an_audit_asks_the_server_that_it_is_given(tiny, quick, tmp_path):
    given_ = {"prompts": tiny[1][1], "heads": "1.0,2.1", "progress": False}
    with FakeNdif(tiny[2]) as one:
        there = sr.audit(str(tiny[0]), host=one.url, out=tmp_path / "there.zarr", **given_)
        assert len(one.sent()) > 1
    here = sr.audit(str(tiny[0]), out=tmp_path / "here.zarr", **given_)
    for name, column in here.items():
        if column.dtype == float:
            np.testing.assert_allclose(there[name], column, atol=1e-5, err_msg=name)
    assert list(there.verdict) == list(here.verdict)
