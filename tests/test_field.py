"""Faults as they come in the field: what is between answers, results that lie elsewhere, expire and are forgotten.

The server is `fake_ndif`, on loopback. After each fault the store is that of an undisturbed run, bit for bit.
"""

import base64
import io
import json
from types import SimpleNamespace
from typing import ClassVar
from zipfile import ZipFile

import fake_ndif
import httpx
import pytest
import torch
import zstandard
from fake_ndif import FakeNdif
from fake_service import Clock, FakeService, unit
from terminal import assert_same_numbers, ids, resume_command, saved, selfrepair

from selfrepair_nn.backends.ndif import connection, in_flight
from selfrepair_nn.backends.ndif.agreement import duration, place
from selfrepair_nn.backends.ndif.answers import carried, result_in
from selfrepair_nn.backends.ndif.doctor import doctor
from selfrepair_nn.backends.ndif.faults import KINDS, Fault
from selfrepair_nn.backends.ndif.in_flight import JobsInFlight
from selfrepair_nn.backends.ndif.ledger import Ledger, ledger_path, lines
from selfrepair_nn.backends.ndif.server import Server
from selfrepair_nn.models.load import load
from selfrepair_nn.running.run import _tell_changed

KEY = "d0f1a2b3-4c5d-6e7f-8091-a2b3c4d5e6f7"
DEPLOYED = {"m": {"model_key": "m", "application_state": "RUNNING", "repo_id": "m", "dtype": "float32"}}
DONE = {"status": "COMPLETED", "description": "done", "blob": None}


@pytest.fixture
def quick(monkeypatch):
    """What is tried again is tried again soon; requests name units of this process."""
    monkeypatch.setattr(connection, "BACKOFF", lambda state: 0.01)
    monkeypatch.setattr(in_flight, "pause_before", lambda attempt: 0.01)
    monkeypatch.setattr(fake_ndif.ServedModel, "pack", fake_ndif.named)


@pytest.fixture
def serving(quick, monkeypatch):
    """serving(fault, patience, …): a fake server without a model, and a client that has a key."""
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    running = []

    def start(fault=lambda what, job: None, patience=0.2, **said):
        running.append(FakeNdif(None, fault, deployments=DEPLOYED, **said))
        return running[-1], Server(running[-1].url, patience)

    yield start
    for each in running:
        each.__exit__()


def only_at(endpoint, fault, times=10**9):
    """A fault at one endpoint, the first so many times that this is asked."""
    left = [times]

    def found(what, job):
        left[0] -= what == endpoint
        return fault if what == endpoint and left[0] >= 0 else None

    return found


def result_of(values):
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return zstandard.ZstdCompressor().compress(buffer.getvalue())


def asked(client, fake, endpoint):
    """What a client does to ask this of a server."""
    asking = {
        "ping": client.greet,
        "status": client.status,
        "env": client.environment,
        "response": lambda: client.ask("j"),
        "result": lambda: client.fetch(f"{fake.store_url}/result/j"),
    }
    return asking[endpoint]()


ENDPOINTS = ("ping", "status", "env", "response", "result")
ALL_KEYS = {("api", KEY), ("store", None)}


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(("fault", "title"), [("page", "Sign in"), ("502", "502 from a gateway"), ("504", "504 from")])
def test_a_page_in_place_of_an_answer_is_called_what_it_is(serving, endpoint, fault, title):
    fake, client = serving(only_at(endpoint, fault))
    with pytest.raises(Fault) as error:
        asked(client, fake, endpoint)
    assert f"a web page, '{title}" in error.value.text
    assert error.value.kind == ("between" if fault == "page" else "unreachable")
    assert "<" not in str(error.value)
    assert KINDS[error.value.kind].passes


@pytest.mark.parametrize("endpoint", ["status", "env", "response", "result"])
@pytest.mark.parametrize("fault", ["page", "login", "502", "503", "504", "reset", "cut"])
def test_a_question_is_asked_again_until_the_server_itself_answers(serving, endpoint, fault):
    fake, client = serving(only_at(endpoint, fault, times=2), patience=20)
    fake.jobs["j"] = DONE | {"blob": result_of({"x": 1})}
    assert asked(client, fake, endpoint)
    assert fake.keys <= ALL_KEYS


@pytest.mark.parametrize("fault", ["page", "502", "504"])
def test_a_page_in_answer_to_a_request_leaves_its_fate_open_and_is_told(serving, fault):
    fake, client = serving(only_at("request", fault))
    assert client.send(b"x", "m", {}, "j") is None
    assert "a web page" in client.doubt
    assert fake.sent() == ["j"]


def test_what_a_page_says_is_cut_and_shows_no_key_and_no_escape(serving, monkeypatch):
    monkeypatch.setattr(fake_ndif, "PAGE", "<html><body><script>{}</script><p>\x1b[31m" + KEY + " word" * 500)
    _, client = serving(only_at("ping", "page"))
    with pytest.raises(Fault) as error:
        client.greet()
    assert "*** word word" in error.value.text
    assert KEY not in error.value.text
    assert "\x1b" not in error.value.text
    assert "Sign in" not in error.value.text
    assert len(error.value.text) < 200


# ---------------------------------------------------------------- redirects


@pytest.mark.parametrize("endpoint", ["response", "result"])
def test_behind_a_redirect_lies_the_same_and_no_key_goes_there(serving, endpoint):
    """The store of results leads back to the API, which has the same jobs, and the API to the store."""
    fake, client = serving(only_at(endpoint, "307", times=1), patience=5)
    fake.jobs["j"] = DONE | {"blob": result_of({"x": 1})}
    assert asked(client, fake, endpoint)
    assert {where for what, _, where in fake.asked if what == endpoint} == {"api", "store"}
    assert fake.keys <= ALL_KEYS


def test_a_result_of_the_api_that_lies_in_the_store(serving):
    fake, client = serving(only_at("result", "307", times=1), patience=5)
    fake.jobs["j"] = DONE | {"blob": result_of({"x": 1})}
    assert client.fetch("/result/j")[0] == {"x": 1}
    assert fake.keys == ALL_KEYS


@pytest.mark.parametrize("fault", ["307", "login"])
def test_a_server_that_is_elsewhere_is_named_and_gets_no_key(serving, fault):
    fake, client = serving(only_at("ping", fault))
    with pytest.raises(Fault, match=f"leads to {fake.store_url}/") as error:
        client.greet()
    assert error.value.kind == "moved"
    assert fake.keys == {("api", KEY)}


@pytest.mark.parametrize("fault", ["307", "login"])
def test_a_request_goes_to_no_other_origin(serving, fault):
    fake, client = serving(only_at("request", fault))
    with pytest.raises(Fault) as error:
        client.send(b"x", "m", {}, "j")
    assert error.value.kind == "moved"
    assert fake.keys == {("api", KEY)}
    assert not fake.sent()


def test_redirects_in_a_circle_end(serving):
    fake, client = serving(only_at("result", "307"))
    with pytest.raises(Fault) as error:
        asked(client, fake, "result")
    assert error.value.kind == "between"


# ---------------------------------------------------------------- results that are not there


@pytest.mark.parametrize(
    ("status", "code", "said", "kind"),
    [
        (400, "ExpiredToken", "The provided token has expired.", "expired"),
        (403, "AccessDenied", "Request has expired", "expired"),
        (404, "NoSuchKey", "The specified key does not exist.", "expired"),
        (403, "SignatureDoesNotMatch", "Check your key.", "store"),
        (403, "RequestTimeTooSkewed", "The difference is too large.", "clocks"),
        (403, "AccessDenied", "Request is not yet valid", "clocks"),
        (503, "SlowDown", "Reduce your request rate.", "unreachable"),
        (400, "RequestTimeout", "Idle connections will be closed.", "unreachable"),
    ],
)
def test_a_store_that_refuses_is_quoted_and_understood(serving, monkeypatch, status, code, said, kind):
    fake, client = serving()
    refusal = status, {"Content-Type": "application/xml"}, fake_ndif.REFUSAL.format(code, said).encode()
    monkeypatch.setattr(FakeNdif, "_result", lambda self, job: refusal)
    with pytest.raises(Fault) as error:
        asked(client, fake, "result")
    assert (error.value.kind, f"{code}: {said}" in error.value.text) == (kind, True)


def test_a_result_that_arrives_broken_is_fetched_again_before_its_job_is_run_again(serving):
    fake, client = serving(only_at("result", "short", times=1))
    fake.jobs["j"] = DONE | {"blob": result_of({"x": 1})}
    assert asked(client, fake, "result")[0] == {"x": 1}


# ---------------------------------------------------------------- results that come with the answer


@pytest.mark.parametrize("how", ["within", "carried"])
def test_a_result_may_come_with_the_answer(serving, how):
    fake, client = serving(only_at("response", how))
    fake.jobs["j"] = DONE | {"blob": result_of({"x": 1})}
    answer = client.ask("j")
    assert (answer.status, answer.description) == ("COMPLETED", "done")
    assert answer.seconds == (1.5 if how == "carried" else None)
    assert client.fetch(answer.result) == ({"x": 1}, len(fake.jobs["j"]["blob"]))
    assert not [what for what, *_ in fake.asked if what == "result"]


@pytest.mark.parametrize("alphabet", [base64.b64encode, base64.urlsafe_b64encode])
def test_both_alphabets_of_base64_are_read(alphabet):
    every = bytes(range(256))
    assert result_in(alphabet(every).decode()) == every


@pytest.mark.parametrize(
    ("data", "found"),
    [(None, ""), ("", ""), ({"a": 1}, ""), ([1], ""), (7, ""), ("no base 64!", "no base 64!")]
    + [(each, each) for each in ("http://a/b", "https://a/b", "/result/j", b"x")],
)
def test_what_is_no_result_is_an_address_or_nothing(data, found):
    assert result_in(data) == found


NO_RESULTS = [{"a": 1}, [1], 7, True, "no base 64!", "eA==", base64.b64encode(result_of([1])).decode()]


@pytest.mark.parametrize("data", NO_RESULTS)
def test_what_comes_in_a_results_place_is_no_result(serving, monkeypatch, data):
    """A mistake in words, of a job that is sent again: never a traceback."""
    _, client = serving()
    said = fake_ndif._json({"id": "j", "status": "COMPLETED", "description": ["x"], "data": data})
    monkeypatch.setattr(FakeNdif, "_response", lambda self, job, fault: said)
    answer = client.ask("j")
    assert answer.description == ""  # no text, so nothing is said
    with pytest.raises(Fault) as error:
        client.fetch(answer.result)
    assert error.value.kind == "result"
    assert len(str(error.value)) < 500


class Code:
    """What runs where it is unpickled."""

    ran: ClassVar[list[str]] = []

    def __reduce__(self):
        return Code.ran.append, ("x",)


@pytest.mark.parametrize("found", [{"status": "COMPLETED", "data": Code()}, Code(), [1], {"status": Code()}])
def test_nothing_that_an_answer_carries_is_run(serving, monkeypatch, found):
    buffer = io.BytesIO()
    torch.save(found, buffer)
    body = 200, {"Content-Type": "application/octet-stream"}, buffer.getvalue()
    _, client = serving()
    monkeypatch.setattr(FakeNdif, "_response", lambda self, job, fault: body)
    with pytest.raises(Fault) as error:
        client.ask("j")
    assert error.value.kind == "between"
    assert not Code.ran


FAR = 2**27


@pytest.mark.parametrize(
    "pickled",
    [b"\x80\x04}r" + FAR.to_bytes(4, "little") + b".", b"(dp%d\n." % FAR, b"cnnsight.schema.response\nStatus\n(](tR."],
    ids=["kept at a far number", "the same in letters", "a status that is a list"],
)
def test_a_pickle_that_asks_for_room_that_it_does_not_fill_is_none(pickled):
    """Sixteen bytes could ask for gigabytes."""
    archive = io.BytesIO()
    with ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    assert carried(httpx.Response(200, content=archive.getvalue())) is None


def flown(path, service, units, wall=None):
    ledger = Ledger(path, "run", wall or service.clock)
    flight = JobsInFlight(service, ledger, 2, 1800, clock=service.clock, sleep=service.clock.sleep)
    return list(flight(units))


UNITS = [unit(0, 4), unit(4, 8)]


def test_an_address_that_has_expired_is_asked_for_anew(tmp_path):
    """Some servers sign another one whenever they are asked: then nothing is sent again."""
    service = FakeService(Clock())
    ask, fetch, signed = service.ask, service.fetch, []

    def signing(job):
        answer = ask(job)
        signed.append(f"{job}?{len(signed)}")
        return answer and type(answer)(answer.status, answer.description, answer.result and signed[-1])

    def fetching(address):
        if address != signed[-1] or len(signed) % 2:
            raise Fault("expired", "HTTP 403: AccessDenied: Request has expired")
        return fetch(address.partition("?")[0])

    service.ask, service.fetch = signing, fetching
    assert len(flown(tmp_path / "x.jsonl", service, UNITS[:1])) == 1
    assert len(service.sent) == 1


def test_a_finished_job_that_is_forgotten_is_sent_again_at_once(tmp_path):
    """A damaged store is filled again a week later: its jobs were fetched once, and nobody knows them any more."""
    service, path = FakeService(Clock()), tmp_path / "x.jsonl"
    flown(path, service, UNITS)
    service.jobs.clear()
    began = service.clock()
    assert len(flown(path, service, UNITS)) == 2
    assert len(service.sent) == 4
    assert service.clock() - began < 30
    assert {each["kind"] for each in lines(path) if each["event"] == "failed"} == {"forgotten"}


@pytest.mark.parametrize("hours", [-30, 0, 30])
def test_a_clock_that_is_put_right_between_two_processes_decides_nothing(tmp_path, hours):
    """What was just sent is given time to appear, however late it is here now."""
    service, path = FakeService(Clock(), ["slow"]), tmp_path / "x.jsonl"
    ledger = Ledger(path, "run", service.clock)
    ledger.write("sending", UNITS[0].label, job="j", bytes=1)
    ask, began = service.ask, service.clock()

    def late(job):
        if job == "j" and job not in service.jobs and service.clock() - began > 20:
            service.send(service.pack(UNITS[0]), "j")
        return ask(job)

    service.ask = late
    assert len(flown(path, service, UNITS[:1], wall=lambda: service.clock() + hours * 3600)) == 1
    assert len(service.sent) == 1
    assert not [each for each in lines(path) if each["event"] == "failed"]


# ---------------------------------------------------------------- clocks and versions


@pytest.mark.parametrize(
    ("skew", "said"), [(0, "to a minute"), (300, "5 min ahead of"), (-7200, "2 h behind"), (40, "to a minute")]
)
def test_doctor_compares_clocks(serving, monkeypatch, skew, said):
    fake, _ = serving(skew=skew)
    now = Clock()
    monkeypatch.setattr(fake_ndif, "time", SimpleNamespace(time=now))
    monkeypatch.setattr(connection, "now", now)
    (found,) = [each for each in doctor(fake.url) if each.what == "clock"]
    assert said in found.seen
    assert found.right is (True if abs(skew) < 60 else None)


def moved(version, at):
    """A version that differs at this place alone."""
    parts = version.partition("+")[0].split(".")
    return ".".join(str(int(each) + 1) if n == at else each for n, each in enumerate(parts, start=1))


@pytest.mark.parametrize(("at", "said", "right"), [(3, "third place, which is allowed", True), (2, "may differ", None)])
def test_doctor_tells_versions_apart_by_their_place(serving, at, said, right):
    other = {name: moved(v, at) for name, v in fake_ndif.PACKAGES.items()}
    fake, _ = serving(packages=other, python="3.11.99 (main)" if at == 3 else "3.99.1 (main)")
    found = {each.what: each for each in doctor(fake.url)}
    for name in ("python", "nnsight", "transformers", "torch"):
        assert said in found[name].seen
        assert found[name].right is right
    assert f"{other['nnsight']} there, {fake_ndif.PACKAGES['nnsight']} here" in found["nnsight"].seen


def test_places_of_versions():
    assert place("0.8.1", "0.8.1+cu128") is None
    assert [place("0.8.1", other) for other in ("0.8.3", "0.9.1", "1.8.1", "0.8")] == [3, 2, 1, 3]
    assert [duration(s) for s in (0.4, 75, 3600, 93600)] == ["0 s", "1 min 15 s", "1 h", "1 d 2 h"]


def test_a_server_that_was_updated_meanwhile_is_told_and_both_are_kept(caplog):
    kept = {"server": json.dumps({"host": "http://a", "nnsight": "0.8.1", "torch": "2.9"})}
    store = SimpleNamespace(path="s.zarr", attributes=kept, annotate=kept.update)
    _tell_changed(store, {"server": {"host": "http://b", "nnsight": "0.8.3", "torch": "2.9"}})
    assert "(nnsight 0.8.1 then, 0.8.3 now)" in caplog.text
    assert kept["earlier_servers"] == [json.loads(kept["server"])]
    caplog.clear()
    _tell_changed(store, {"server": json.loads(kept["server"]) | {"host": "http://b"}})
    assert not caplog.text


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(directory of a model, prompts, the same model loaded, an undisturbed store)."""
    folder = tmp_path_factory.mktemp("tiny")
    source, prompts = saved(folder / "m"), ids(folder / "p.npy")
    with pytest.MonkeyPatch.context() as patched, FakeNdif(load(str(source))) as fake:
        patched.setattr(fake_ndif.ServedModel, "pack", fake_ndif.named)
        ended = selfrepair(*command(source, prompts, fake, folder / "u.zarr"))
    assert ended.code == 0, ended.err
    return source, prompts, fake.model, folder / "u.zarr"


def command(source, prompts, fake, out, *more):
    choices = ["--prompts", prompts, "--layers", "0:2", "--batch-size", 1]
    return ["run", "heads", "--model", source, "--host", fake.url, "--out", out, *choices, *more]


ONCE = [
    ("request", "503"),
    ("request", "lost"),
    ("request", "502"),
    ("request", "page"),
    ("response", "page"),
    ("response", "login"),
    ("response", "504"),
    ("response", "reset"),
    ("response", "cut"),
    ("response", "none"),
    ("response", "within"),
    ("response", "torn"),
    ("response", "carried"),
    ("result", "page"),
    ("result", "307"),
    ("result", "expired"),
    ("result", "short"),
    ("result", "cut"),
    ("request", "fails"),
    ("request", "429"),
    ("request", "null"),
    ("response", "null"),
    ("response", "gzip"),
    ("response", "429"),
    ("result", "gzip"),
    ("result", "429"),
    ("result", "another"),
]


def test_after_every_fault_of_the_field_the_store_is_that_of_an_undisturbed_run(tiny, quick, tmp_path, monkeypatch):
    source, prompts, model, undisturbed = tiny
    monkeypatch.setattr(in_flight, "UNKNOWN_SECONDS", 0.5)
    todo, begun = list(ONCE), []

    def one_after_the_other(what, job):
        begun.extend([job] * (what == "request"))
        spared = what == "request" and len(begun) % 2
        able = {each: each[0] == what and (each[1] != "another" or fake.another(job) != job) for each in todo}
        found = None if spared or not begun else next(filter(able.get, todo), None)
        return found and todo.pop(todo.index(found))[1]

    with FakeNdif(model, one_after_the_other) as fake:
        ended = selfrepair(*command(source, prompts, fake, tmp_path / "s.zarr"))
    assert ended.code == 0, ended.err
    assert not todo
    assert_same_numbers(tmp_path / "s.zarr", undisturbed)
    stored = [each for each in lines(ledger_path(tmp_path / "s.zarr")) if each["event"] == "taken"]
    assert len({each["part"] for each in stored}) == len(stored)
    failed = [each for each in lines(ledger_path(tmp_path / "s.zarr")) if each["event"] == "failed"]
    assert len(set(fake.sent())) <= len(stored) + len(failed)
    (other,) = [each for each in failed if "it is that of" in each["text"]]
    assert other["part"] not in other["text"]


@pytest.mark.parametrize(
    ("endpoint", "fault", "said"),
    [
        ("response", "page", "something else answered in the server's place"),
        ("result", "skewed", "the server's clock and that of its store of results differ"),
        ("request", "307", "the server's address leads to another one"),
    ],
)
def test_what_does_not_pass_ends_the_run_which_goes_on_later(
    tiny, quick, patient, tmp_path, monkeypatch, endpoint, fault, said
):
    monkeypatch.setattr(connection, "BACKOFF", lambda state: 60)
    source, prompts, model, undisturbed = tiny
    store, broken = tmp_path / "s.zarr", []
    with FakeNdif(model, lambda what, job: fault if broken and what == endpoint else None) as fake:
        taken = fake._result
        fake._result = lambda job: (broken.append(job), taken(job))[1]
        ended = selfrepair(*command(source, prompts, fake, store, "--patience", 300))
        assert ended.code == 75, ended.err
        assert said in ended.err
        assert "Traceback" not in ended.err
        fake.fault, before = (lambda what, job: None), set(fake.sent())
        fake._result = taken
        again = selfrepair(*resume_command(ended.err))
    assert again.code == 0, again.err
    assert_same_numbers(store, undisturbed)
    assert len(fake.sent()) == len(set(fake.sent())), "a job was sent twice"
    assert before


def test_versions_that_differ_in_the_third_place_are_no_hindrance_and_are_kept(tiny, quick, tmp_path):
    source, prompts, model, undisturbed = tiny
    packages = {name: moved(v, 3) for name, v in fake_ndif.PACKAGES.items()}
    with FakeNdif(model, packages=packages, python="3.11.99") as fake:
        ended = selfrepair(*command(source, prompts, fake, tmp_path / "s.zarr"))
    assert (ended.code, ended.err) == (0, "")
    assert_same_numbers(tmp_path / "s.zarr", undisturbed)
    attributes = json.loads((tmp_path / "s.zarr" / "zarr.json").read_text())["attributes"]
    assert packages["nnsight"] in attributes["server"]
    assert "nnsight" in json.loads(attributes["server"])["apart"]
