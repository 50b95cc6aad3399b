"""One NDIF server: sending a job, asking about it, fetching its result. Every wait has an end."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
from tenacity import RetryCallState, Retrying, wait_exponential_jitter

from selfrepair_nn.backends.ndif.answers import (
    LONGEST_SAID,
    amount,
    carried,
    detail,
    loaded,
    of_store,
    page,
    replicas_in,
    result_in,
    said,
    text,
    versions_in,
)
from selfrepair_nn.backends.ndif.connection import READ_SECONDS, Again, Connection, leads_somewhere
from selfrepair_nn.backends.ndif.faults import Fault, refusal
from selfrepair_nn.options import address
from selfrepair_nn.settings import require_ndif
from selfrepair_nn.shown import line

GREETING_SECONDS, INQUIRY_SECONDS = 10.0, 30.0
SHORTEST_READ = 10.0
"""So many seconds a server has for an answer, however little patience there is."""

BETWEEN_JOBS = wait_exponential_jitter(initial=2, max=60, jitter=2)
NOT_YET = ("RequestTimeTooSkewed", "RequestNotYetValid")
SOON = ("RequestTimeout", "SlowDown", "InternalError")
GONE = ("AccessDenied", "ExpiredToken", "TokenRefreshRequired", "NoSuchKey", "NoSuchBucket")
"""Codes of a store: its clock is behind the signer's; it is busy; what it had is gone, or the address is too old."""


@dataclass(frozen=True)
class Answer:
    """What the server says of a job: its status, a sentence, and once it is completed the result's address.

    A small result may come with the answer, in place of its address. `seconds` is how long the job ran there, if the
    server tells.
    """

    status: str
    description: str
    result: str | bytes
    seconds: float | None = None


class Server:
    """The NDIF server at `host`, or at the one that nnsight is configured for.

    `patience` is how many seconds to go on trying while it does not answer; `notify` takes a line for the user
    whenever something has to be tried again. Redirects are followed; the key goes to the host's own origin alone.

    Raises SelfRepairError at once for a key or a proxy that cannot work; and from every method that asks the server:
        Fault: "unreachable" or "between" when patience is over; else what the answer means.
    """

    def __init__(
        self, host: str | None, patience: float, notify: Callable[[str], None] = lambda line: None
    ) -> None:
        from nnsight.schema.config import CONFIG

        self.host = address(host or CONFIG.API.HOST)
        require_ndif()
        self.patience, self._http = patience, Connection(self.host, notify)

    @property
    def ahead(self) -> float | None:
        """By how many seconds the server's clock was ahead of ours when it last answered; None if it has not said."""
        return self._http.ahead

    @property
    def doubt(self) -> str:
        """What came in place of an answer to the last request, if something did."""
        return self._http.doubt

    def greet(self) -> None:
        """Find out, within seconds, whether an NDIF server answers at all."""
        answer = self._http.patiently(min(GREETING_SECONDS, self.patience), self._http.ping, GREETING_SECONDS)
        where = f"HTTP {answer.status_code} at {self.host}/ping"
        if found := page(answer):
            raise Fault("between", f"{where}: {found}")
        if answer.status_code != 200 or answer.content.strip().strip(b'"') != b"pong":
            raise Fault("not ndif", where)

    def status(self) -> list[dict[str, Any]]:
        """What is deployed there: model_key, repo_id, revision, application_state, dtype … for each replica."""
        return self._told("/status", replicas_in)

    def environment(self) -> dict[str, str]:
        """Versions there: python, and every package by its import name."""
        return self._told("/env", versions_in)

    def send(self, blob: bytes, model_key: str, environment: dict[str, Any], job: str) -> str | None:
        """Submit a serialised request under the id `job`.

        Returns the id under which the server knows it (its own, if it does not take ours), or None if the connection
        broke after the request was sent, or something else answered: then only asking tells whether it arrived.
        """
        envelope = {"model_key": model_key, "compress": True, "env": environment, "id": job}
        parts = {
            "data": {"data": json.dumps(envelope)},
            "files": {"blob": ("request", blob, "application/octet-stream")},
        }
        answer = self._http.patiently(self.patience, lambda: self._http.post(f"{self.host}/request", **parts))
        if answer is None:
            return None
        if answer.status_code != 200:
            raise refusal(answer.status_code, detail(answer))
        return (said(answer) or {})["id"]

    def ask(self, job: str) -> Answer | None:
        """The latest status of a job, or None if the server knows no job of that id (any more, or not yet)."""
        address = f"{self.host}/response/{quote(job, safe='')}"
        return self._http.patiently(self.patience, self._asked, address, _job_in, True)

    def fetch(self, address: str | bytes) -> tuple[dict[str, Any], int]:
        """A result, at its address or here already, and the bytes that it took. What arrives broken is fetched again.

        Raises Fault also for what another job may mend: "expired" if the result is not kept there any more, "result" if
        what lies there is none, "store" if it is not handed out.
        """
        if isinstance(address, bytes):
            return loaded(address), len(address)
        address = f"{self.host}{address}" if address.startswith("/") else address
        if not leads_somewhere(address):
            raise Fault("result", f"it lies nowhere: {line(address, LONGEST_SAID)!r}")
        try:
            return self._result(address)
        except Fault as fault:
            if fault.kind != "result":
                raise
            return self._result(address)

    def _result(self, address: str) -> tuple[dict[str, Any], int]:
        content = self._http.patiently(self.patience, self._stored, address).content
        return loaded(content), len(content)

    def _stored(self, address: str) -> httpx.Response:
        """A result as its store hands it out."""
        answer = self._http.get(address)
        if answer.is_success:
            return answer
        code, said = of_store(answer), f"HTTP {answer.status_code}: {detail(answer)}"
        if code in NOT_YET or "not yet valid" in said:
            raise Again(said, "clocks")
        if code in SOON:
            raise Again(said)
        gone = answer.status_code in (404, 410) or code in GONE or (not code and answer.status_code == 403)
        raise Fault("expired" if gone or "expired" in said else "store", said)

    def _told(self, path: str, read: Callable[[dict[str, Any]], Any]) -> Any:
        patience = min(INQUIRY_SECONDS, self.patience)
        return self._http.patiently(patience, self._asked, f"{self.host}{path}", read)

    def _asked(self, address: str, read: Callable[[dict[str, Any]], Any], may_lack: bool = False) -> Any:
        """What `read` makes of the server's answer; None where it says that there is none, if it may."""
        answer = self._http.get(address, min(READ_SECONDS, max(SHORTEST_READ, self.patience)))
        found = said(answer) or carried(answer)
        if may_lack and answer.status_code == 404 and found is not None and "detail" in found:
            return None
        told = read(found) if answer.status_code == 200 and found is not None else None
        if told is not None:
            return told
        if answer.status_code in (200, 404):
            raise Again(f"HTTP {answer.status_code}, not what a server says: {detail(answer)!r}", "between")
        raise refusal(answer.status_code, detail(answer))


def pause_before(attempt: int) -> float:
    """Seconds to wait before a failed job is sent for the `attempt`-th time again."""
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = attempt
    return BETWEEN_JOBS(state)


def _job_in(found: dict[str, Any]) -> Answer | None:
    """How a job stands, and the seconds that it ran, as NDIF tells them with its end; None if that is no job's."""
    meta = found.get("meta")
    seconds = amount(meta.get("runtime")) if isinstance(meta, dict) else None
    status, description = (text(found.get(name)) or "" for name in ("status", "description"))
    ran = None if seconds is None else float(seconds)
    return Answer(status, description, result_in(found.get("data")), ran) if status else None
