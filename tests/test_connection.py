"""What a server answers, and what the client makes of it: refusals, hiccups, silence, nonsense."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from selfrepair_nn.backends.ndif.faults import Fault
from selfrepair_nn.backends.ndif.server import Answer, Server
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
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def answering():
    """answering(*answers, patience): a client, what it asked, what it said; each answer a status and its text."""
    running = []

    def serve(*answers, patience=20):
        http = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
        http.answers = [(s, body if isinstance(body, str) else json.dumps(body)) for s, body in answers]
        http.asked, http.daemon_threads = [], True
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


@pytest.mark.parametrize("answer", [BROKEN, (500, "x"), (502, "x"), (504, "x")])
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
        ((200, {"hello": 1}), "not ndif"),
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
    [((200, {}), "not ndif"), ((200, "[]"), "not ndif"), ((401, "Invalid API key."), "key")],
)
def test_no_status_of_a_job(answering, answer, kind):
    client, _, _ = answering(answer)
    with pytest.raises(Fault) as error:
        client.ask("ours")
    assert error.value.kind == kind


def test_patience_ends(answering):
    client, asked, _ = answering((500, "broken"), patience=1)
    began = time.monotonic()
    with pytest.raises(Fault, match=r"does not answer.*broken"):
        client.ask("ours")
    assert len(asked) > 1
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("address", ["", "nowhere", "file:///etc/passwd"])
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


def test_an_address_in_the_configuration_is_looked_at_too(monkeypatch):
    from nnsight.schema.config import CONFIG

    monkeypatch.setattr(CONFIG.API, "HOST", "ndif.example")
    with pytest.raises(UsageError, match="is not an address"):
        Server(None, 1)
