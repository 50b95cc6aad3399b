"""The hosts of a run: who has room for a job, who is silent, who is out until it answers again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from selfrepair_nn.backends.ndif.faults import Fault
from selfrepair_nn.backends.ndif.server import Answer
from selfrepair_nn.layout.units import Unit

SOON, LATE = 1.0, 60.0
"""Seconds before a silent host is asked again: at first, and at most."""


class Service(Protocol):
    """A model on a server, as the flight needs it: backends.ndif.served.ServedModel, or a test's stand-in."""

    @property
    def name(self) -> str:
        """The host's address."""
        ...

    @property
    def doubt(self) -> str:
        """What came in place of an answer to the last request, if something did."""
        ...

    def greet(self, anew: bool = False) -> None:
        """Raises Fault if the host does not answer, or is no more what it was; `anew`: ask its weights, too."""

    def pack(self, unit: Unit) -> bytes:
        """The request, ready to be sent."""
        ...

    def send(self, request: bytes, job: str) -> str | None:
        """The id under which the server took the request, or None if that is not known."""

    def ask(self, job: str) -> Answer | None:
        """The latest status, or None if the server knows no such job."""

    def fetch(self, address: str | bytes) -> tuple[dict[Any, Any], int]:
        """A result and its size in bytes. Raises Fault "expired" if it is not kept any more."""
        ...


@dataclass(eq=False)
class Host:
    """One host: since when it has been silent, when it is asked again, and whether its work goes to the others.

    `refused` is why nothing is sent there any more.
    """

    service: Service
    silent: float | None = None
    again: float = 0.0
    pause: float = SOON
    out: bool = False
    refused: Fault | None = None

    @property
    def name(self) -> str:
        return self.service.name

    def answered(self) -> bool:
        """Take note that it answers; whether it had been out."""
        was = self.out
        self.silent, self.out, self.pause = None, False, SOON
        return was

    def said_nothing(self, now: float, patience: float, after: float = 0.0) -> bool:
        """Take note that it does not answer, or wants to be asked later; whether that lasts too long, since now."""
        self.silent = now if self.silent is None else self.silent
        self.again, self.pause = now + max(self.pause, after), min(2 * self.pause, LATE)
        late = not self.out and now - self.silent >= patience
        self.out = self.out or late
        return late


@dataclass
class Hosts:
    """All of them. `patience` is how long one may be silent before its work goes to the others.

    A single one waits itself for as long as it should, so that it is out at once.
    """

    services: Sequence[Service]
    patience: float
    every: list[Host] = field(init=False)

    def __post_init__(self) -> None:
        self.every = [Host(service) for service in self.services]
        self.patience = self.patience if len(self.every) > 1 else 0.0

    def __iter__(self) -> Iterator[Host]:
        return iter(self.every)

    @property
    def several(self) -> bool:
        return len(self.every) > 1

    @property
    def left(self) -> list[Host]:
        """Those that may still do something."""
        return [host for host in self.every if not host.out and not host.refused]

    def named(self, name: str) -> Host | None:
        """The one at an address, if it may still do something."""
        return next((host for host in self.left if host.name == name), None)

    def awake(self, now: float) -> list[Host]:
        """Those to be asked now."""
        return [host for host in self.every if not host.refused and (host.silent is None or host.again <= now)]

    def without(self, name: str, now: float, refused: Fault | None = None) -> None:
        """Begin without one that did not answer, or that `refused`."""
        host = next(host for host in self.every if host.name == name)
        host.silent, host.out, host.again, host.refused = now, True, now + LATE, refused
