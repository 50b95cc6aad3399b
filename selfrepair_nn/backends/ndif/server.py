"""One NDIF server over HTTP: sending a job, asking about it, fetching its result. Every wait has an end."""

import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from weakref import finalize

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential_jitter,
    wait_random_exponential,
)

from selfrepair_nn.backends.ndif.faults import Fault, refusal
from selfrepair_nn.options import require_address
from selfrepair_nn.secrets import ndif_key
from selfrepair_nn.settings import require_ndif
from selfrepair_nn.shown import line

CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
IDLE_SECONDS = 1.0
"""A connection idle for longer is not used again: servers close it after 2 s, and what is sent just then is lost."""

GREETING_SECONDS, INQUIRY_SECONDS = 10.0, 30.0
BACKOFF = wait_random_exponential(multiplier=0.25, max=30)
BETWEEN_JOBS = wait_exponential_jitter(initial=2, max=60, jitter=2)
LONGEST_SAID = 300
NEVER_ARRIVED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)


@dataclass(frozen=True)
class Answer:
    """What the server says of a job: its status, a sentence, and the result's address once it is completed.

    `seconds` is how long the job ran there, if the server tells.
    """

    status: str
    description: str
    result: str
    seconds: float | None = None


class _Again(Exception):
    """The same call may succeed a little later; the text says what happened."""


class Server:
    """The NDIF server at `host`, or at the one that nnsight is configured for.

    `patience` is how many seconds to go on trying while it does not answer; `notify` takes a line for the user
    whenever something has to be tried again.

    Raises SelfRepairError at once for a key or a proxy that cannot work; and from every method that asks the server:
        Fault: "unreachable" when patience is over; else what the answer means.
    """

    def __init__(
        self, host: str | None, patience: float, notify: Callable[[str], None] = lambda line: None
    ) -> None:
        from nnsight.schema.config import CONFIG

        self.host = (host or CONFIG.API.HOST).strip().rstrip("/")
        require_address(self.host)
        require_ndif()
        self.patience, self._notify = patience, notify
        timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        limits = httpx.Limits(keepalive_expiry=IDLE_SECONDS)
        self._http = httpx.Client(base_url=self.host, timeout=timeout, limits=limits, headers=_headers())
        self._plain = httpx.Client(timeout=timeout)  # results lie elsewhere: no key goes there
        for client in (self._http, self._plain):
            finalize(self, client.close)

    def greet(self) -> None:
        """Find out, within seconds, whether an NDIF server answers at all."""
        answer = self._patiently(self._get, "/ping", patience=min(GREETING_SECONDS, self.patience))
        if answer.status_code != 200 or "pong" not in answer.text:
            raise Fault("not ndif", f"HTTP {answer.status_code} at {self.host}/ping")

    def status(self) -> list[dict[str, Any]]:
        """What is deployed there: model_key, repo_id, revision, application_state, dtype … for each replica."""
        return list(self._json("/status").get("deployments", {}).values())

    def environment(self) -> dict[str, str]:
        """Versions there: python, and every package by its import name."""
        python, packages = _named(self._json("/env"), "python_version", "packages")
        return {"python": python.split()[0]} | packages

    def send(self, blob: bytes, model_key: str, environment: dict[str, Any], job: str) -> str | None:
        """Submit a serialised request under the id `job`.

        Returns the id under which the server knows it (its own, if it does not take ours), or None if the connection
        broke after the request was sent: then only asking tells whether it arrived.
        """
        envelope = {"model_key": model_key, "compress": True, "env": environment, "id": job}
        answer = self._patiently(self._post, json.dumps(envelope), blob)
        if answer is None or answer.status_code in (500, 502, 504):
            return None
        if answer.status_code != 200:
            raise refusal(answer.status_code, _detail(answer))
        return _named(_parsed(answer), "id")[0]

    def ask(self, job: str) -> Answer | None:
        """The latest status of a job, or None if the server knows no job of that id (any more, or not yet)."""
        answer = self._patiently(self._get, f"/response/{job}")
        if answer.status_code == 404:
            return None
        if answer.status_code != 200:
            raise refusal(answer.status_code, _detail(answer))
        found = _parsed(answer)
        (status,) = _named(found, "status")
        return Answer(status, found.get("description") or "", found.get("data") or "", _runtime(found))

    def fetch(self, address: str) -> tuple[dict[str, Any], int] | None:
        """A result and the bytes that it took, or None if it is not kept there any more."""
        if not address.startswith(("http://", "https://")):
            raise Fault("result", f"it lies nowhere: {address!r}")
        answer = self._patiently(self._download, address)
        if answer.status_code in (403, 404, 410):
            return None
        return _loaded(answer.content), len(answer.content)

    def _get(self, path: str) -> httpx.Response:
        return _served(self._http.get(path))

    def _download(self, address: str) -> httpx.Response:
        return _served(self._plain.get(address))

    def _post(self, envelope: str, blob: bytes) -> httpx.Response | None:
        try:
            answer = self._http.post(
                "/request",
                data={"data": envelope},
                files={"blob": ("request", blob, "application/octet-stream")},
                headers={"ndif-timestamp": repr(time.time())},
            )
        except NEVER_ARRIVED:
            raise
        except httpx.RequestError:
            return None
        if answer.status_code in (429, 503):
            raise _Again(f"HTTP {answer.status_code}: {_detail(answer)}")
        return answer

    def _json(self, path: str) -> dict[str, Any]:
        answer = self._patiently(self._get, path, patience=min(INQUIRY_SECONDS, self.patience))
        if answer.status_code != 200:
            raise refusal(answer.status_code, _detail(answer))
        return _parsed(answer)

    def _patiently(self, call: Callable, *arguments: Any, patience: float | None = None) -> Any:
        """The call's answer; tried again, ever more slowly, until patience is over."""
        trying = Retrying(
            stop=stop_after_delay(self.patience if patience is None else patience),
            wait=BACKOFF,
            retry=retry_if_exception_type((_Again, httpx.RequestError)),
            before_sleep=self._say,
            reraise=True,
        )
        try:
            return trying(call, *arguments)
        except (_Again, httpx.RequestError) as error:
            raise Fault("unreachable", f"{self.host}: {error or type(error).__name__}") from None

    def _say(self, state: RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        said = line(error, LONGEST_SAID) or type(error).__name__
        self._notify(f"{self.host} does not answer ({said}); trying again in {state.upcoming_sleep:.1f} s")


def pause_before(attempt: int) -> float:
    """Seconds to wait before a failed job is sent for the `attempt`-th time again."""
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = attempt
    return BETWEEN_JOBS(state)


def _headers() -> dict[str, str]:
    """What nnsight's own client sends: the server may refuse versions that it does not work with."""
    key = ndif_key()
    known = {"nnsight-version": version("nnsight"), "python-version": sys.version.replace("\n", " ")}
    return known | ({"ndif-api-key": key} if key else {})


def _served(answer: httpx.Response) -> httpx.Response:
    if answer.status_code == 429 or answer.status_code >= 500:
        raise _Again(f"HTTP {answer.status_code}: {_detail(answer)}")
    return answer


def _detail(answer: httpx.Response) -> str:
    try:
        found = answer.json()
    except ValueError:
        return line(answer.text, LONGEST_SAID)
    return str(found.get("detail", found) if isinstance(found, dict) else found)


def _parsed(answer: httpx.Response) -> dict[str, Any]:
    try:
        found = answer.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Fault("not ndif", f"HTTP {answer.status_code}: {line(answer.text, LONGEST_SAID)}")
    return found


def _named(found: dict[str, Any], *names: str) -> list[Any]:
    """Parts of an answer that an NDIF server always gives."""
    if missing := [name for name in names if name not in found]:
        raise Fault("not ndif", f"an answer without {', '.join(missing)}")
    return [found[name] for name in names]


def _runtime(found: dict[str, Any]) -> float | None:
    """Seconds that a job ran, as NDIF tells them with its end."""
    meta = found.get("meta")
    seconds = meta.get("runtime") if isinstance(meta, dict) else None
    return float(seconds) if isinstance(seconds, int | float) else None


def _loaded(content: bytes) -> dict[str, Any]:
    """The saved values of a result. Only tensors, numbers, text and their containers are ever unpickled."""
    import torch
    import zstandard

    try:
        unpacked = zstandard.ZstdDecompressor().decompress(content)
        return torch.load(io.BytesIO(unpacked), map_location="cpu", weights_only=True)
    except Exception as error:
        raise Fault("result", f"{type(error).__name__}: {error}") from error
