"""An NDIF server in this process, on loopback: it runs real jobs on a real model, and breaks as it is told to.

It speaks as NDIF does, but a request only names its unit (code read back in the process it came from would replace that
process's own). One thread runs what comes. Results lie at another origin, as in an object store.
"""

import io
import json
import queue
import sys
import threading
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Callable
from email.parser import BytesParser
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import torch
import zstandard
from nnsight.schema.response import ResponseModel

from selfrepair_nn.backends.ndif.served import ServedModel
from selfrepair_nn.tracing.readouts import to_cpu
from selfrepair_nn.tracing.session import ASKED, RESULT, run_here

PAGE = "<!DOCTYPE html><html><head><title>{}</title><style>x</style></head><body><h1>Please wait</h1></body></html>"
REFUSAL = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"
BUSY = "Error submitting request to model deployment. Please try again later. Sorry for the inconvenience."
PACKAGES = {name: version(name) for name in ("torch", "transformers", "nnsight")} | {"ndif": "0.1.2"}

UNITS: dict[str, object] = {}
"""What requests name."""


def named(served: ServedModel, unit) -> bytes:
    """A request, in place of `ServedModel.pack`."""
    name = uuid.uuid4().hex
    UNITS[name] = unit
    return name.encode()


Fault = Callable[[str, str], str | None]
"""What is asked for (ping, status, env, request, response, result) and of which job; gives the name of a fault."""


class FakeNdif:
    """A server of `model` (a loaded one), at `url`; a context manager.

    Faults: "page", "login" (a redirect to a page), "502" to "504", "reset" (no answer), "cut" (half of one), "short"
    (half of one, said to be whole), "another" (a result of another job for as much), "null" (JSON that names nothing),
    "gzip" (what cannot be unpacked), "429", "none" (no such job), "expired", "skewed", "307", "lost" (a request), and
    of a job "fails" and "late" (it never ends). Results come with the answer to a question where that is "within" (in
    JSON), "torn" (half of one), or "carried" (as nnsight itself writes an answer that has bytes).
    """

    def __init__(self, model, fault: Fault = lambda what, job: None, **said) -> None:
        self.model, self.fault, self.skew = model, fault, said.pop("skew", 0)
        self.packages, self.deployments = PACKAGES | said.pop("packages", {}), said.pop("deployments", None)
        self.python = said.pop("python", sys.version)
        self.jobs: dict[str, dict] = {}
        self.broken: list[str] = []
        self.asked: list[tuple[str, str, str]] = []
        self.keys: set[tuple[str, str | None]] = set()
        self._todo: queue.Queue = queue.Queue()
        self._api, self._store = (_serving(self, name) for name in ("api", "store"))
        self.url, self.store_url = (f"http://127.0.0.1:{s.server_port}" for s in (self._api, self._store))
        self.worker = threading.Thread(target=self._work, daemon=True)
        self.worker.start()

    def __enter__(self) -> "FakeNdif":
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        self._todo.put(None)
        self.worker.join()

    def stop(self) -> None:
        """Nothing answers there any more."""
        for each in (self._api, self._store):
            each.shutdown()
            each.server_close()

    def start(self) -> None:
        """It answers again, at the same address."""
        ports = (self._api.server_port, self._store.server_port)
        self._api, self._store = (
            _serving(self, n, port) for n, port in zip(("api", "store"), ports, strict=True)
        )

    def sent(self) -> list[str]:
        """The jobs that arrived."""
        return [job for what, job, _ in self.asked if what == "request"]

    def _work(self) -> None:
        while known := self._todo.get():  # its job may be forgotten meanwhile
            try:
                blob = _run(self.model, known.pop("unit"))
                ended = {"status": "COMPLETED", "description": "Your job has been completed.", "blob": blob}
            except Exception as error:
                ended = {"status": "ERROR", "description": f"{type(error).__name__}: {error}"}
            if known["fault"] == "fails":
                ended = {"status": "ERROR", "description": BUSY}
            if known["fault"] == "late":
                ended = {"status": "RUNNING", "description": "Your job has started running."}
            known.update(ended)

    # ------------------------------------------------------------ answers

    def get(self, where: str, path: str) -> tuple[int, dict, bytes]:
        what, _, job = path.partition("?")[0].strip("/").partition("/")
        self.asked.append((what, job, where))
        if what == "login":
            return _page(200, "Sign in")
        fault = self.fault(what, job)
        broken = self._broken(fault, where, path)
        return broken or _cut(fault, *self._whole(what, job, fault))

    def _whole(self, what: str, job: str, fault: str | None) -> tuple[int, dict, bytes]:
        if what == "ping":
            return _json("pong")
        if what == "env":
            return _json({"python_version": self.python, "packages": self.packages})
        if what == "status":
            return _json({"deployments": self.deployments or {"m": self._deployed()}})
        if what == "response":
            return self._response(job, fault)
        return self._result(self.another(job) if fault == "another" else job)

    def post(self, body: bytes, kind: str) -> tuple[int, dict, bytes]:
        message = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
        envelope, blob = (part.get_payload(decode=True) for part in message.get_payload())
        job = json.loads(envelope).get("id") or uuid.uuid4().hex
        fault = self.fault("request", job)
        if fault in ("503", "307", "login", "429"):
            return self._broken(fault, "api", "/request")
        self.asked.append(("request", job, "api"))
        lost = fault in ("lost", "page", "502", "504", "null", "gzip")
        unit = UNITS.pop(blob.decode(), None)
        if not lost:
            queued = {"status": "QUEUED", "description": "Added to Queue at position 1."}
            self.jobs[job] = queued | {"unit": unit, "fault": fault, "size": unit and _size(unit)}
            self._todo.put(self.jobs[job])
        answer = self._broken(fault, "api", "/request") or _json({"id": job, "status": "RECEIVED"})
        return _cut("reset" if fault == "lost" else fault, *answer)

    def _broken(self, fault: str | None, where: str, path: str) -> tuple[int, dict, bytes] | None:
        if fault in ("502", "503", "504"):
            return _page(int(fault), f"{fault} from a gateway")
        if fault == "page":
            return _page(200, "Sign in")
        if fault == "null":
            return _json(None)
        if fault == "gzip":
            return 200, {"Content-Encoding": "gzip"}, b"no such thing"
        if fault == "429":
            return 429, {"Retry-After": "0"}, b"slower"
        if fault == "login":
            return 302, {"Location": f"{self.store_url}/login"}, b""
        if fault == "307":
            other = self.store_url if where == "api" else self.url
            return 307, {"Location": f"{other}{path}"}, b""
        if fault == "expired":
            return 400, {}, REFUSAL.format("ExpiredToken", "The provided token has expired.").encode()
        if fault == "skewed":
            return 403, {}, REFUSAL.format("RequestTimeTooSkewed", "The difference is too large.").encode()
        return None

    def _deployed(self) -> dict:
        return {
            "application_state": "RUNNING",
            "deployment_level": "HOT",
            "model_key": self.model.nn.to_model_key(),
            "repo_id": "tiny",
            "dtype": "float32",
        }

    def _response(self, job: str, fault: str | None) -> tuple[int, dict, bytes]:
        known = self.jobs.get(job)
        if fault == "none":
            self.jobs.pop(job, None)
            known = None
        if known is None:
            return 404, {}, json.dumps({"detail": f"No response for request {job}."}).encode()
        found = {"id": job} | {name: known[name] for name in ("status", "description")}
        if found["status"] == "COMPLETED" and fault in ("within", "torn", "carried"):
            return _with_result(found, known["blob"], fault)
        signed = f"{self.store_url}/result/{job}?X-Amz-Signature={uuid.uuid4().hex}"
        return _json(found | {"data": signed if found["status"] == "COMPLETED" else None})

    def another(self, job: str) -> str:
        """A job for as much that is done, if there is one."""
        size = self.jobs.get(job, {}).get("size")
        done = [name for name, each in [*self.jobs.items()] if "blob" in each and each.get("size") == size]
        return next((name for name in done if name != job), job)

    def _result(self, job: str) -> tuple[int, dict, bytes]:
        if job not in self.jobs or "blob" not in self.jobs[job]:
            return 404, {}, REFUSAL.format("NoSuchKey", "The key does not exist.").encode()
        return 200, {"Content-Type": "application/octet-stream"}, self.jobs[job]["blob"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        owner, where = self.server.owner, self.server.where
        owner.keys.add((where, self.headers["ndif-api-key"]))
        self._give(*owner.get(where, self.path))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.owner.keys.add((self.server.where, self.headers["ndif-api-key"]))
        self._give(*self.server.owner.post(body, self.headers["Content-Type"]))

    def _give(self, status: int, headers: dict, body: bytes) -> None:
        if not status:
            self.close_connection = True
            return
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body)), "Date": self._date()} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = len(body) < int(headers.get("Content-Length", 0))

    def _date(self) -> str:
        return formatdate(time.time() + self.server.owner.skew, usegmt=True)

    def log_message(self, *_) -> None:
        pass


def _serving(owner: FakeNdif, where: str, port: int = 0) -> ThreadingHTTPServer:
    found = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    found.owner, found.where, found.daemon_threads = owner, where, True
    threading.Thread(target=found.serve_forever, args=[0.01], daemon=True).start()
    return found


def _cut(fault: str | None, status: int, headers: dict, body: bytes) -> tuple[int, dict, bytes]:
    """An answer that breaks off."""
    if fault == "reset":
        return 0, {}, b""
    if fault == "cut":
        return status, headers | {"Content-Length": str(len(body))}, body[: len(body) // 2]
    return status, headers, body[: len(body) // 2] if fault == "short" else body


def _json(value: object) -> tuple[int, dict, bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _with_result(found: dict, blob: bytes, how: str) -> tuple[int, dict, bytes]:
    if how == "carried":
        answer = ResponseModel(**found, data=blob, meta={"runtime": 1.5})
        return 200, {"Content-Type": "application/octet-stream"}, answer.pickle()
    return _json(found | {"data": urlsafe_b64encode(blob if how == "within" else blob[: len(blob) // 2]).decode()})


def _page(status: int, title: str) -> tuple[int, dict, bytes]:
    return status, {"Content-Type": "text/html; charset=utf-8"}, PAGE.format(title).encode()


def _size(unit) -> tuple:
    return unit.job, unit.prompts.stop - unit.prompts.start, len(unit.plan.get("cases", ()))


def _run(model, unit) -> bytes:
    """What comes back of a unit, as a server stores it."""
    with torch.no_grad():
        found = to_cpu(run_here(unit.job, model.nn, unit.arrays, unit.plan))
    buffer = io.BytesIO()
    torch.save({RESULT: found | {ASKED: unit.asked}}, buffer)
    return zstandard.ZstdCompressor(level=3).compress(buffer.getvalue())
