"""Questions to one server over HTTP, asked again while it does not answer. Its key goes to it and nowhere else."""

import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit
from weakref import finalize

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    wait_random_exponential,
)

from selfrepair_nn.backends.ndif.agreement import duration
from selfrepair_nn.backends.ndif.answers import (
    LONGEST_SAID,
    clock_of,
    detail,
    now,
    page,
    pause_of,
    said,
    text,
)
from selfrepair_nn.backends.ndif.faults import Fault
from selfrepair_nn.secrets import ndif_key
from selfrepair_nn.shown import line

CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
SLOWEST = 1000
"""Bytes of an answer that come in a second at least: of one that trickles in there would be no end."""

IDLE_SECONDS = 1.0
"""A connection idle for longer is not used again: servers close it after 2 s, and what is sent just then is lost."""

BACKOFF = wait_random_exponential(multiplier=0.25, max=30)
REDIRECTS = 5
AS_IT_IS = (307, 308)
"""Redirects after which a request may be sent again as it was."""

PROXY_ASKS = 407
CROWDED, LATER = 429, (408, 425, 429)
"""Too many requests; and, as that, to be asked again though it is no failure of the server's."""

IN_DOUBT = (500, 502, 504)
"""After which a request may have arrived."""

NEVER_ARRIVED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)


NONSENSE = (httpx.DecodingError, httpx.InvalidURL, UnicodeError)
"""What cannot be unpacked, or leads to no place."""


class Again(Exception):
    """The same question may be answered later, after so many seconds. `kind` is the fault that it is if it is not."""

    def __init__(self, text: str, kind: str = "unreachable", after: float = 0.0) -> None:
        self.kind, self.after = kind, after
        super().__init__(text)


PASSING = (Again, httpx.RequestError, *NONSENSE)


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
        hooks: dict[str, list[Callable]] = {"response": [_in_time]}
        self._own = httpx.Client(timeout=timeout, limits=limits, headers=self.headers, event_hooks=hooks)
        self._elsewhere = httpx.Client(timeout=timeout, event_hooks=hooks)  # no key goes there
        for client in (self._own, self._elsewhere):
            finalize(self, client.close)

    def patiently(self, patience: float, call: Callable, *arguments: Any) -> Any:
        """The call's answer; tried again, ever more slowly, until patience is over. Then it is a Fault that passes.

        Not sooner than the server wants it; where that is after patience is over, not at all.
        """
        trying = Retrying(
            stop=lambda state: (state.seconds_since_start or 0.0) + _wanted(state) >= patience,
            wait=lambda state: max(BACKOFF(state), _wanted(state)),
            retry=retry_if_exception_type(PASSING),
            before_sleep=self._say,
            reraise=True,
        )
        try:
            return trying(call, *arguments)
        except PASSING as error:
            kind = "between" if isinstance(error, NONSENSE) else getattr(error, "kind", "unreachable")
            after = error.after if isinstance(error, Again) else 0.0
            wanted = f"; it wants to be asked again in {duration(after)}" if after else ""
            raise Fault(kind, f"{self.host}: {error or type(error).__name__}{wanted}", after) from None

    def ping(self, seconds: float) -> httpx.Response:
        """What the server says to a ping: itself, not what stands somewhere else. It has so many seconds for it."""
        answer = self._one(f"{self.host}/ping", seconds)
        for _ in range(REDIRECTS):
            if answer.has_redirect_location:
                answer = self._one(self._within(answer), seconds)
        return answer if page(answer) and not answer.is_server_error else _served(answer)

    def get(self, address: str, seconds: float = READ_SECONDS) -> httpx.Response:
        """What an address answers, wherever it leads to; it has so many seconds before something comes."""
        answer = self._one(address, seconds)
        for _ in range(REDIRECTS):
            if answer.has_redirect_location:
                answer = self._one(_target(answer), seconds)
        return _served(answer)

    def post(self, address: str, led: int = 0, **parts: Any) -> httpx.Response | None:
        """The answer to a request, or None if it may have arrived. It goes where it is led as it is, or not at all."""
        self.doubt = ""
        try:
            answer = self._own.post(address, headers={"ndif-timestamp": repr(time.time())}, **parts)
        except NEVER_ARRIVED:
            raise
        except (httpx.RequestError, *NONSENSE) as error:
            self.doubt = f"{type(error).__name__}: {error}"
            return None
        self._compare_clocks(answer)
        if answer.has_redirect_location and led < REDIRECTS:
            return self.post(self._led(answer), led + 1, **parts)
        if answer.status_code not in IN_DOUBT and (not answer.is_success or _named(answer)):
            return _served(answer)
        self.doubt = f"HTTP {answer.status_code}: {detail(answer)}"
        self._notify(f"{self.host} answers a request with {self.doubt}: it is asked whether that arrived")
        return None

    def _one(self, address: str, seconds: float) -> httpx.Response:
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        if _origin(address) != _origin(self.host):
            return self._elsewhere.get(address, timeout=timeout)
        answer = self._own.get(address, timeout=timeout)
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
        why = line(error, LONGEST_SAID) or type(error).__name__
        does = "asks to wait" if getattr(error, "kind", "") == "crowded" else "does not answer"
        self._notify(f"{self.host} {does} ({why}); trying again in {state.upcoming_sleep:.1f} s")


class _InTime(httpx.SyncByteStream):
    """What comes of an answer, as long as enough of it comes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        began, come = time.monotonic(), 0
        for part in self._stream:
            come += len(part)
            if time.monotonic() - began > READ_SECONDS + come / SLOWEST:
                raise httpx.ReadTimeout(f"only {come} bytes came in {duration(time.monotonic() - began)}")
            yield part

    def close(self) -> None:
        self._stream.close()


def _in_time(answer: httpx.Response) -> None:
    answer.stream = _InTime(answer.stream)


def _wanted(state: RetryCallState) -> float:
    """After how many seconds the server wants to be asked again."""
    error = state.outcome and state.outcome.exception()
    return error.after if isinstance(error, Again) else 0.0


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
    words = f"HTTP {status}: {found or detail(answer)}"
    if status in LATER or status >= 500:
        raise Again(words, "crowded" if status == CROWDED else "unreachable", pause_of(answer))
    if found or status == PROXY_ASKS or answer.has_redirect_location:
        raise Again(words, "between")
    return answer


def _named(answer: httpx.Response) -> bool:
    """Whether an answer gives the name of a job."""
    return bool(text((said(answer) or {}).get("id")))


def _target(answer: httpx.Response) -> str:
    """The address that an answer leads to."""
    found = str(answer.url.join(answer.headers["location"]))
    if not leads_somewhere(found):
        raise Again(f"HTTP {answer.status_code}: {answer.url} leads to {line(found, LONGEST_SAID)}", "between")
    return found


def leads_somewhere(address: str) -> bool:
    """Whether something may be found at an address."""
    try:
        url, parts = httpx.URL(address), urlsplit(address)
        named = bool(url.host) and bool((parts.hostname or "").encode("idna"))
        return named and parts.scheme in ("http", "https") and parts.port != 0
    except (httpx.InvalidURL, ValueError):
        return False


def _origin(address: str) -> tuple[str, str, int | None]:
    """What a key is for: scheme, host and port."""
    url = httpx.URL(address)
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)
