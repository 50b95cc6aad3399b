"""What a server answers, and what the client makes of it: refusals, hiccups, silence, nonsense."""

import io
import json
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest
import torch
import zstandard

from selfrepair_nn.backends.ndif import connection, server
from selfrepair_nn.backends.ndif import served as served_module
from selfrepair_nn.backends.ndif.answers import READ, loaded
from selfrepair_nn.backends.ndif.faults import Fault
from selfrepair_nn.backends.ndif.limits import Limits, told
from selfrepair_nn.backends.ndif.served import ServedModel, deployed, states
from selfrepair_nn.backends.ndif.server import Answer, Server
from selfrepair_nn.backends.ndif.standing import in_words
from selfrepair_nn.errors import UsageError

ENVIRONMENT = {"packages": {}}
BROKEN = (0, "")
"""The connection ends without an answer."""


class Answering(BaseHTTPRequestHandler):
    """Gives the prepared answers one after the other, the last of them for ever; notes what was asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        answers, asked = self.server.answers, self.server.asked
        asked.append((self.command, self.path, self.rfile.read(int(self.headers["Content-Length"] or 0))))
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        if (status, body) == BROKEN:
            self.close_connection = True
            return
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **self.server.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def answering():
    """answering(*answers, patience): a client, what it asked, what it said; each answer a status and its text."""
    running = []

    def serve(*answers, patience=20, **headers):
        http = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
        http.answers = [(s, body if isinstance(body, str) else json.dumps(body)) for s, body in answers]
        http.asked, http.daemon_threads, http.headers = [], True, headers
        threading.Thread(target=http.serve_forever, args=[0.01], daemon=True).start()
        running.append(http)
        said = []
        client = Server(f"http://127.0.0.1:{http.server_port}", patience, said.append)
        return client, http.asked, said

    yield serve
    for http in running:
        http.shutdown()
        http.server_close()


def test_a_request_is_sent_once_and_keeps_its_id(answering):
    client, asked, said = answering((200, {"id": "renamed"}))
    assert client.send(b"blob", "model", ENVIRONMENT, "ours") == "renamed"
    ((command, path, body),) = asked
    assert (command, path) == ("POST", "/request")
    assert b'"id": "ours"' in body
    assert b"blob" in body
    assert not said


NOTHING = ["null", "[]", "3", "{}", '"x"', "[" * 100_000, "{", '{"id": 5, "status": []}', "\xff", ""]
"""What names nothing that a server names."""


@pytest.mark.parametrize("answer", [BROKEN, (500, "x"), (502, "x"), (504, "x"), *[(200, each) for each in NOTHING]])
def test_after_a_request_in_doubt_nothing_more_is_sent(answering, answer):
    client, asked, _ = answering(answer)
    assert client.send(b"blob", "model", ENVIRONMENT, "ours") is None
    assert len(asked) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_request_that_was_not_taken_is_sent_again(answering, status):
    client, asked, said = answering((status, {"detail": "full"}), (200, {"id": "ours"}))
    assert client.send(b"blob", "model", ENVIRONMENT, "ours") == "ours"
    assert len(asked) == 2
    assert "full" in said[0]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((401, {"detail": "Missing or invalid API key."}), "key"),
        ((400, {"detail": "Client nnsight version 0.1 is below the minimum supported 0.8"}), "version"),
        ((413, "too large"), "size"),
        ((404, "not found"), "not ndif"),
    ],
)
def test_a_refusal_says_what_it_is(answering, answer, kind):
    client, asked, _ = answering(answer)
    with pytest.raises(Fault) as error:
        client.send(b"blob", "model", ENVIRONMENT, "ours")
    assert error.value.kind == kind
    assert len(asked) == 1


def test_a_question_is_asked_again_until_it_is_answered(answering):
    running = {"status": "RUNNING", "description": "started"}
    client, asked, said = answering(BROKEN, (500, "x"), (503, "x"), (200, running))
    assert client.ask("ours") == Answer("RUNNING", "started", "")
    assert len(asked) == 4
    assert len(said) == 3


def test_a_job_that_nobody_knows(answering):
    client, _, _ = answering((404, {"detail": "not found"}))
    assert client.ask("ours") is None


@pytest.mark.parametrize(
    ("answer", "kind"),
    [((404, "404 page not found"), "between"), ((404, {"message": "no route"}), "between"), ((401, "no"), "key")],
)
def test_no_status_of_a_job(answering, answer, kind):
    """A 404 is the server's own if it is written as the server writes."""
    client, _, _ = answering(answer, patience=0)
    with pytest.raises(Fault) as error:
        client.ask("ours")
    assert error.value.kind == kind


@pytest.mark.parametrize("ask", [lambda client: client.ask("j"), Server.status, Server.environment])
def test_an_answer_that_says_nothing_is_asked_for_again(answering, ask):
    whole = {"status": "RUNNING", "python_version": "3.12", "packages": {}, "deployments": {"m": {"gpus": 1}}}
    client, asked, _ = answering((200, "null"), (200, whole))
    assert ask(client)
    assert len(asked) == 2


SENSELESS = [None, [], 0, -1, float("inf"), True, "", "x", "\ud800", {}, {"a": 1}, [{}], [[1]], 10**400]
FORMS = [
    *[{"deployments": {"m": {"model_key": "m", name: ...}}} for name in READ],
    {"deployments": {"m": {"model_key": "m", "actor_class": "a.tp.X", "gpus": ...}}},
    *[{"status": "COMPLETED", "data": "/x", name: ...} for name in ("status", "description", "data", "meta")],
    {"status": "COMPLETED", "meta": {"runtime": ...}},
    {"python_version": ..., "packages": {}},
    {"python_version": "3.12", "packages": ...},
    {"python_version": "3.12", "packages": {"torch": ...}},
    {"deployments": ...},
    {"deployments": {"m": ...}},
    ...,
]


def filled(form, value):
    if form is ...:
        return value
    return {name: filled(each, value) for name, each in form.items()} if isinstance(form, dict) else form


def test_whatever_a_server_answers_it_is_a_fault_or_makes_sense(answering, monkeypatch):
    """Every part of every answer in every other form, in all that is read of it."""
    client, _, _ = answering(*[(200, filled(form, value)) for form in FORMS for value in SENSELESS], patience=0)
    served = object.__new__(ServedModel)
    served.server, served.key, served.model = client, "m", SimpleNamespace(name="m")
    chosen, body = SimpleNamespace(job_seconds=None, tensor_parallel=None), {}
    reading = {
        "status": lambda: (states(served), *served.replicas()),
        "facts": lambda: json.dumps(served_module._identified(served.replicas())).encode(),
        "deployed": lambda: deployed(served).get("tensor_parallel") is None or deployed(served)["tensor_parallel"] > 0,
        "limits": lambda: told(Limits(), chosen, served.replicas()).seconds > 0,
        "env": lambda: json.dumps(client.environment(), ensure_ascii=False).encode(),
        "job": lambda: client.ask("j") and in_words(client.ask("j").status, client.ask("j").description).encode(),
    }
    monkeypatch.setattr(client._http, "get", lambda *_: httpx.Response(200, content=body["now"]))
    for form in FORMS:
        for value in SENSELESS:
            body["now"] = json.dumps(filled(form, value)).encode()
            for read in reading.values():
                with suppress(Fault):
                    assert read() is not False, body


def test_patience_ends(answering, patient):
    client, asked, _ = answering((500, "broken"), patience=1)
    began = patient()
    with pytest.raises(Fault, match=r"does not answer.*broken"):
        client.ask("ours")
    assert len(asked) > 1
    assert 1 <= patient() - began < 10


NOWHERE = ["http://", "http://[", "https://x:abc/", "http://xn--/", "http://a\x00b/", "http://" + "a" * 300]


@pytest.mark.parametrize("address", ["", "nowhere", "file:///etc/passwd", *NOWHERE])
def test_a_result_that_lies_nowhere(answering, address):
    client, asked, _ = answering((200, "x"))
    with pytest.raises(Fault, match="lies nowhere"):
        client.fetch(address)
    assert not asked


def test_a_result_that_is_none_or_is_gone(answering):
    client, _, _ = answering((200, "what a proxy says"))
    with pytest.raises(Fault, match="not what was asked for"):
        client.fetch(f"{client.host}/result")
    client, _, _ = answering((404, "NoSuchKey"))
    with pytest.raises(Fault, match=r"no longer keeps the job's result.*NoSuchKey"):
        client.fetch(f"{client.host}/result")


@pytest.mark.parametrize("address", NOWHERE)
@pytest.mark.parametrize("ask", [Server.greet, Server.status, lambda client: client.fetch(f"{client.host}/result")])
def test_a_redirect_that_leads_nowhere(answering, address, ask):
    client, _, _ = answering((307, ""), patience=0, Location=address.replace("\x00", " "))
    with pytest.raises(Fault) as error:
        ask(client)
    assert error.value.kind in ("between", "unreachable", "moved")


@pytest.mark.parametrize("kind", ["gzip", "deflate", "zstd"])
def test_what_cannot_be_unpacked_is_not_the_servers(answering, kind):
    client, _, _ = answering((200, "garbage"), patience=0, **{"Content-Encoding": kind})
    for ask in (client.greet, client.status, lambda: client.ask("j"), lambda: client.fetch(f"{client.host}/result")):
        with pytest.raises(Fault) as error:
            ask()
        assert error.value.kind == "between"
    assert client.send(b"blob", "model", ENVIRONMENT, "ours") is None


@pytest.mark.parametrize("value", [None, 1, [1], torch.ones(2), "x"], ids=str)
def test_a_result_without_names(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with pytest.raises(Fault, match="which names nothing"):
        loaded(zstandard.compress(buffer.getvalue()))


def nested(way):
    """A result whose containers lie within each other without end, or so often that a walk through them never ends."""
    found = {"result": 1}
    if way == "deep":
        for _ in range(100):
            found = {"result": {"asked": [found]}}
    elif way == "within itself":
        found["result"] = found
    else:
        for _ in range(5):
            found = {"result": dict.fromkeys("abc", found)}
    return found


@pytest.mark.parametrize("way", ["deep", "within itself", "many times"])
def test_a_result_that_nobody_can_walk_through(way):
    buffer = io.BytesIO()
    torch.save(nested(way), buffer)
    with pytest.raises(Fault, match="nested more than 8 deep, or within itself") as error:
        loaded(zstandard.compress(buffer.getvalue()))
    assert error.value.kind == "result"


# ---------------------------------------------------------------- a server that wants time, and one that takes it

NOON = "Thu, 01 Jan 2026 12:00:00 GMT"


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("headers", "after"),
    [
        ({"Retry-After": "1800"}, 1800),
        ({"Retry-After": "Thu, 01 Jan 2026 12:30:00 GMT", "Date": NOON}, 1800),
        ({"Retry-After": "Thu, 01 Jan 2026 11:30:00 GMT", "Date": NOON}, 0),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": "-5"}, 0),
        ({}, 0),
    ],
)
def test_a_server_that_wants_to_be_asked_later_is(answering, monkeypatch, status, headers, after):
    """In seconds, or at a time, which is one of its own clock; what is later than patience lasts is left at once."""
    monkeypatch.setattr(connection, "BACKOFF", lambda state: 0.01)
    client, asked, _ = answering((status, {"detail": "full"}), patience=0.1, **headers)
    with pytest.raises(Fault) as error:
        client.ask("j")
    assert error.value.after == after
    assert not after or len(asked) == 1
    assert ("asked again in 30 min" in str(error.value)) == bool(after)
    assert error.value.kind == ("crowded" if status == 429 else "unreachable")


def test_a_pause_that_a_server_asks_for_is_made(answering, patient, monkeypatch):
    monkeypatch.setattr(connection, "BACKOFF", lambda state: 0.01)
    client, asked, said = answering((429, {"detail": "full"}), (200, {"id": "ours"}), **{"Retry-After": "1"})
    began = patient()
    assert client.send(b"blob", "model", ENVIRONMENT, "ours") == "ours"
    assert patient() - began == 1
    assert len(asked) == 2
    assert "asks to wait (HTTP 429: full); trying again in 1.0 s" in said[0]


@pytest.fixture
def trickling():
    """The address of a server that says `begin`, and then a byte now and then; how often it was asked."""
    listening, ended, begin, asked = socket.create_server(("127.0.0.1", 0)), threading.Event(), [], []
    listening.settimeout(0.05)

    def serve():
        while not ended.is_set():
            with suppress(OSError), listening.accept()[0] as one:
                asked.append(1)
                one.sendall(begin[0])
                while not ended.wait(0.02):
                    one.sendall(b" " if begin[0] else b"")

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", begin, asked
    ended.set()
    thread.join()
    listening.close()


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"])
@pytest.mark.parametrize("ask", [Server.greet, Server.status])
def test_no_server_keeps_us_waiting_for_ever(trickling, monkeypatch, said, ask):
    """One that takes a question and is silent, or answers a byte at a time: patience is over soon after it is over.

    That is, with the answer that was waited for then: sooner than any is that was to be waited for longer.
    """
    longer = min(connection.READ_SECONDS, server.SHORTEST_READ, server.GREETING_SECONDS)
    for module, name in ((connection, "READ_SECONDS"), (server, "SHORTEST_READ"), (server, "GREETING_SECONDS")):
        monkeypatch.setattr(module, name, 0.3)
    monkeypatch.setattr(connection, "SLOWEST", 10_000)
    address, begin, asked = trickling
    begin.append(said)
    began = time.monotonic()
    with pytest.raises(Fault) as error:
        ask(Server(address, 0.1))
    assert error.value.kind == "unreachable"
    assert 0.2 < time.monotonic() - began < longer
    assert len(asked) == 1


def test_an_address_in_the_configuration_is_looked_at_too(monkeypatch):
    from nnsight.schema.config import CONFIG

    monkeypatch.setattr(CONFIG.API, "HOST", "ndif.example")
    with pytest.raises(UsageError, match="is not an address"):
        Server(None, 1)
