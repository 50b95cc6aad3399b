"""Questions to one server over HTTP, asked again while it does not answer. Its key goes to it and nowhere else."""

import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any
from weakref import finalize

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from selfrepair_nn.backends.ndif.answers import LONGEST_SAID, clock_of, detail, is_json, now, page
from selfrepair_nn.backends.ndif.faults import Fault
from selfrepair_nn.secrets import ndif_key
from selfrepair_nn.shown import line

CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
IDLE_SECONDS = 1.0
"""A connection idle for longer is not used again: servers close it after 2 s, and what is sent just then is lost."""

BACKOFF = wait_random_exponential(multiplier=0.25, max=30)
REDIRECTS = 5
AS_IT_IS = (307, 308)
"""Redirects after which a request may be sent again as it was."""

PROXY_ASKS = 407
IN_DOUBT = (500, 502, 504)
"""After which a request may have arrived."""

NEVER_ARRIVED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)


class Again(Exception):
    """The same question may be answered a little later. `kind` is the fault that it is if it is not."""

    def __init__(self, text: str, kind: str = "unreachable") -> None:
        self.kind = kind
        super().__init__(text)


class Connection:
    """What is sent to the server at `host`, and to where it leads.

    `ahead` is by how many seconds the server's clock was ahead of ours when it last answered, None as long as it has
    not said; `doubt` is what came in place of an answer to a request. `notify` takes a line for the user whenever
    something has to be tried again.
    """

    def __init__(self, host: str, notify: Callable[[str], None]) -> None:
        self.host, self._notify = host, notify
        self.headers = _headers()
        """What goes to the server with every question."""
        self.ahead: float | None = None
        self.doubt = ""
        timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        limits = httpx.Limits(keepalive_expiry=IDLE_SECONDS)
        self._own = httpx.Client(timeout=timeout, limits=limits, headers=self.headers)
        self._elsewhere = httpx.Client(timeout=timeout)  # no key goes there
        for client in (self._own, self._elsewhere):
            finalize(self, client.close)

    def patiently(self, patience: float, call: Callable, *arguments: Any) -> Any:
        """The call's answer; tried again, ever more slowly, until patience is over. Then it is a Fault that passes."""
        trying = Retrying(
            stop=stop_after_delay(patience),
            wait=BACKOFF,
            retry=retry_if_exception_type((Again, httpx.RequestError)),
            before_sleep=self._say,
            reraise=True,
        )
        try:
            return trying(call, *arguments)
        except (Again, httpx.RequestError) as error:
            kind = error.kind if isinstance(error, Again) else "unreachable"
            raise Fault(kind, f"{self.host}: {error or type(error).__name__}") from None

    def ping(self) -> httpx.Response:
        """What the server says to a ping: itself, not what stands somewhere else."""
        answer = self._one(f"{self.host}/ping")
        for _ in range(REDIRECTS):
            if answer.has_redirect_location:
                answer = self._one(self._within(answer))
        return answer if page(answer) and not answer.is_server_error else _served(answer)

    def get(self, address: str) -> httpx.Response:
        """What an address answers, wherever it leads to."""
        answer = self._one(address)
        for _ in range(REDIRECTS):
            if answer.has_redirect_location:
                answer = self._one(_target(answer))
        return _served(answer)

    def post(self, address: str, led: int = 0, **parts: Any) -> httpx.Response | None:
        """The answer to a request, or None if it may have arrived. It goes where it is led as it is, or not at all."""
        self.doubt = ""
        try:
            answer = self._own.post(address, headers={"ndif-timestamp": repr(time.time())}, **parts)
        except NEVER_ARRIVED:
            raise
        except httpx.RequestError as error:
            self.doubt = f"{type(error).__name__}: {error}"
            return None
        self._compare_clocks(answer)
        if answer.has_redirect_location and led < REDIRECTS:
            return self.post(self._led(answer), led + 1, **parts)
        if answer.status_code not in IN_DOUBT and (is_json(answer) or not answer.is_success):
            return _served(answer)
        self.doubt = f"HTTP {answer.status_code}: {detail(answer)}"
        self._notify(f"{self.host} answers a request with {self.doubt}: it is asked whether that arrived")
        return None

    def _one(self, address: str) -> httpx.Response:
        if _origin(address) != _origin(self.host):
            return self._elsewhere.get(address)
        answer = self._own.get(address)
        self._compare_clocks(answer)
        return answer

    def _led(self, answer: httpx.Response) -> str:
        """Where a request is led to."""
        try:
            address = self._within(answer)
        except Fault as fault:
            raise Again(fault.text, fault.kind) from None
        if answer.status_code not in AS_IT_IS:
            raise Again(f"HTTP {answer.status_code}: a request is led to {address}", "between")
        return address

    def _within(self, answer: httpx.Response) -> str:
        """Where an answer leads to. Raises Fault "moved" if that is not the server itself."""
        address = _target(answer)
        if _origin(address) != _origin(self.host):
            raise Fault("moved", f"{answer.url} leads to {address}")
        return address

    def _compare_clocks(self, answer: httpx.Response) -> None:
        there = clock_of(answer)
        self.ahead = self.ahead if there is None else there - now()

    def _say(self, state: RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        said = line(error, LONGEST_SAID) or type(error).__name__
        self._notify(f"{self.host} does not answer ({said}); trying again in {state.upcoming_sleep:.1f} s")


def _headers() -> dict[str, str]:
    """What nnsight's own client sends: the server may refuse versions that it does not work with."""
    key = ndif_key()
    known = {"nnsight-version": version("nnsight"), "python-version": sys.version.replace("\n", " ")}
    return known | ({"ndif-api-key": key} if key else {})


def _served(answer: httpx.Response) -> httpx.Response:
    """The answer, if it can be the server's; else it is asked for again."""
    status, found = answer.status_code, page(answer)
    if answer.is_success and not found:
        return answer
    said = f"HTTP {status}: {found or detail(answer)}"
    if status == 429 or status >= 500:
        raise Again(said)
    if found or status == PROXY_ASKS or answer.has_redirect_location:
        raise Again(said, "between")
    return answer


def _target(answer: httpx.Response) -> str:
    """The address that an answer leads to."""
    found = str(answer.url.join(answer.headers["location"]))
    if not found.startswith(("http://", "https://")):
        raise Again(f"HTTP {answer.status_code}: {answer.url} leads to {found}", "between")
    return found


def _origin(address: str) -> tuple[str, str, int | None]:
    """What a key is for: scheme, host and port."""
    url = httpx.URL(address)
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)
