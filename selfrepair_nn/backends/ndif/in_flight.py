"""Jobs in flight on a server: a bounded number, each in the ledger before anything waits, none sent twice in doubt."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from selfrepair_nn.backends.ndif.faults import KINDS, Fault, brief, job_fault
from selfrepair_nn.backends.ndif.ledger import FAILED, FETCHED, GIVEN_UP, SENDING, SENT, SPLIT, TAKEN, Ledger
from selfrepair_nn.backends.ndif.server import Answer, pause_before
from selfrepair_nn.errors import Incomplete
from selfrepair_nn.layout.units import Unit

UNKNOWN_SECONDS = 60.0
"""A job of which the server has told nothing after this long did not arrive, or is lost."""

SHORTEST_PAUSE, LONGEST_PAUSE = 0.02, 2.0
HOPELESS = 3
"""After so many parts given up in a row, nothing more is sent."""

SHOWN = 10


class Service(Protocol):
    """A model on a server, as the flight needs it: backends.ndif.served.ServedModel, or a test's stand-in."""

    def pack(self, unit: Unit) -> bytes:
        """The request, ready to be sent."""
        ...

    def send(self, request: bytes, job: str) -> str | None:
        """The id under which the server took the request, or None if that is not known."""

    @property
    def doubt(self) -> str:
        """What came in place of an answer to the last request, if something did."""
        ...

    def ask(self, job: str) -> Answer | None:
        """The latest status, or None if the server knows no such job."""

    def fetch(self, address: str) -> tuple[dict[Any, Any], int]:
        """A result and its size in bytes. Raises Fault "expired" if it is not kept any more."""
        ...


class Cutter(Protocol):
    """What knows how long jobs take: estimating.fitting.Cutting, or a test's stand-in."""

    def fits(self, unit: Unit) -> bool:
        """Whether a job stays clear of the server's time limit; else it is split before it is sent."""
        ...

    def took(self, unit: Unit, seconds: float) -> None:
        """Takes how long the server was at a job."""


@dataclass(eq=False)
class _Piece:
    """A unit on the way to its result. Once it is split its parts are asked for instead.

    `job` is what the server has of it; `heard` is when the job's status last changed, or when it was sent or taken up.
    """

    unit: Unit
    root: "_Piece | None" = None
    parts: list["_Piece"] = field(default_factory=list)
    result: dict[Any, Any] | None = None
    due: float = 0.0
    job: str = ""
    heard: float = 0.0
    status: str = ""
    known: bool = False
    doubt: str = ""

    def split(self) -> list["_Piece"]:
        """Its two halves; none at all if it cannot be halved."""
        self.parts = [_Piece(half, self.root or self) for half in self.unit.halves()]
        return self.parts

    def leaves(self) -> Iterator["_Piece"]:
        """What is asked for in one request each."""
        yield from (leaf for part in self.parts for leaf in part.leaves()) if self.parts else (self,)

    def gathered(self) -> dict[Any, Any] | None:
        """The result, joined from the parts, or None as long as one is missing."""
        if any(leaf.result is None for leaf in self.leaves()):
            return None
        return self._joined()

    def _joined(self) -> Any:
        return self.unit.join(*(part._joined() for part in self.parts)) if self.parts else self.result


class JobsInFlight:
    """A backend that runs units on a server, at most `in_flight` at a time, and gives them in the order they finish.

    What an earlier process sent is taken up again, by its id. A job that fails is sent again after a pause, or its unit
    split, as its kind of fault says. When a part is given up the others go on, and at the end Incomplete says what is
    missing and why.

    Args:
        patience: seconds without any change of a job's status after which it counts as lost.
        notify: takes a line for the user whenever something did not go as it should.
        clock: seconds that only ever pass: how late it is here, or was when something was sent, decides nothing.

    Raises (while iterating):
        Incomplete: something is missing; the same run goes on from there.
        Fault: of a kind that another attempt cannot mend, such as a wrong key.
    """

    def __init__(
        self,
        service: Service,
        ledger: Ledger,
        in_flight: int,
        patience: float,
        notify: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.service, self.ledger, self.notify = service, ledger, notify
        self.in_flight, self.patience, self.clock, self.sleep = in_flight, patience, clock, sleep
        self.watch: Callable[[str], None] = lambda state: None
        """Takes how the jobs stand, whenever they were looked at."""
        self.cutter: Cutter | None = None

    def __call__(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, dict[Any, Any]]]:
        return _Round(self, units).run()


class _Round:
    """One list of units on its way."""

    def __init__(self, flight: JobsInFlight, units: Iterable[Unit]) -> None:
        self._flight, self._ledger = flight, flight.ledger
        self._wholes = [self._planned(_Piece(unit)) for unit in units]
        leaves = [leaf for whole in self._wholes for leaf in whole.leaves()]
        self._waiting = sorted(leaves, key=lambda leaf: not self._ledger[leaf.unit.label].open)
        self._flying: list[_Piece] = []
        self._given_up: list[tuple[_Piece, Fault]] = []
        self._hopeless = 0

    def run(self) -> Iterator[tuple[Unit, dict[Any, Any]]]:
        """Send, look, wait, until everything has come back or been given up."""
        pause = SHORTEST_PAUSE
        while self._flying or (self._waiting and self._hopeless < HOPELESS):
            try:
                moved = [self._start(piece) for piece in self._due()] + [
                    self._look(p) for p in [*self._flying]
                ]
            except Fault as fault:
                if KINDS[fault.kind].passes:
                    raise Incomplete(f"{fault}\n{self._standing()}") from None
                raise
            self._flight.watch(self._states())
            yield from self._complete()
            pause = SHORTEST_PAUSE if any(moved) else min(1.5 * pause, LONGEST_PAUSE)
            self._flight.sleep(pause)
        if self._wholes:
            raise Incomplete(self._standing())

    def _planned(self, piece: _Piece) -> _Piece:
        """Split what an earlier process has split."""
        if self._ledger[piece.unit.label].split:
            for part in piece.split():
                self._planned(part)
        return piece

    def _due(self) -> list[_Piece]:
        """What can be sent now."""
        free = self._flight.in_flight - len(self._flying) if self._hopeless < HOPELESS else 0
        now = self._flight.clock()
        due = [piece for piece in self._waiting if piece.due <= now][: max(0, free)]
        self._waiting = [piece for piece in self._waiting if piece not in due]
        return due

    def _start(self, piece: _Piece) -> bool:
        """Take up the piece's job if there may be one; else send one."""
        self._flying.append(piece)
        record = self._ledger[piece.unit.label]
        if record.open:
            piece.job, piece.heard, piece.status = record.job, self._flight.clock(), ""
            piece.known = record.event in (FETCHED, TAKEN)
            return True
        if not self._fits(piece.unit) and self._split(piece):
            self._flying.remove(piece)
            return True
        try:
            self._send(piece)
        except Fault as fault:
            self._fail(piece, fault)
        return True

    def _fits(self, unit: Unit) -> bool:
        return self._flight.cutter is None or self._flight.cutter.fits(unit)

    def _split(self, piece: _Piece) -> bool:
        """Ask for the piece's halves instead, next; False if it has none."""
        if parts := piece.split():
            self._ledger.write(SPLIT, piece.unit.label, into=[part.unit.label for part in parts])
            self._waiting[:0] = parts
        return bool(parts)

    def _send(self, piece: _Piece) -> None:
        """The id goes to the ledger before the request goes out, so that its fate can be asked for."""
        label, service = piece.unit.label, self._flight.service
        request, piece.job, piece.status = service.pack(piece.unit), uuid.uuid4().hex, ""
        piece.known = False
        self._ledger.write(SENDING, label, job=piece.job, bytes=len(request))
        known = service.send(request, piece.job)
        piece.doubt = service.doubt
        if known:
            piece.job = known
            self._ledger.write(SENT, label, job=known)
        piece.heard = self._flight.clock()

    def _look(self, piece: _Piece) -> bool:
        """Ask about a job; whether there is anything new."""
        answer = self._flight.service.ask(piece.job)
        silent = self._flight.clock() - piece.heard
        status = f"{answer.status}: {answer.description}" if answer else ""
        if answer and answer.status == "COMPLETED":
            self._land(piece, answer)
        elif answer and answer.status == "ERROR":
            self._fail(piece, job_fault(answer.description))
        elif status != piece.status and answer:
            piece.status, piece.heard, piece.known = status, self._flight.clock(), True
        elif piece.known and not answer:
            self._fail(piece, Fault("forgotten", f"its last word of it was {piece.status or 'a result'!r}"))
        elif answer and silent > self._flight.patience:
            self._fail(piece, Fault("lost", f"{status!r} for {silent:.0f} s"))
        elif not answer and silent > min(UNKNOWN_SECONDS, self._flight.patience):
            self._fail(piece, Fault("unheard", piece.doubt))
        else:
            return False
        return True

    def _land(self, piece: _Piece, answer: Answer) -> None:
        """Fetch a result, and take it if it is what was asked for."""
        piece.known = True
        try:
            found, size = self._fetched(piece, answer.result)
            if flaw := piece.unit.flaw(found):
                raise Fault("result", flaw)
        except Fault as fault:
            if KINDS[fault.kind].passes:
                raise
            self._fail(piece, fault)
            return
        self._ledger.write(FETCHED, piece.unit.label, job=piece.job, bytes=size)
        self._flying.remove(piece)
        piece.result, self._hopeless = found, 0
        if self._flight.cutter and answer.seconds is not None:
            self._flight.cutter.took(piece.unit, answer.seconds)

    def _fetched(self, piece: _Piece, address: str) -> tuple[dict[Any, Any], int]:
        """A result; where its address has expired, from the one that the server gives when asked again, if it does."""
        service = self._flight.service
        try:
            return service.fetch(address)
        except Fault as fault:
            answer = service.ask(piece.job) if fault.kind == "expired" else None
            if not answer or answer.result in ("", address):
                raise
            return service.fetch(answer.result)

    def _fail(self, piece: _Piece, fault: Fault) -> None:
        """Send again, split, give up, or end the run: as the kind of fault says."""
        label, kind = piece.unit.label, KINDS[fault.kind]
        self._flying.remove(piece)
        self._ledger.write(FAILED, label, job=piece.job, kind=fault.kind, text=fault.text)
        failures = self._ledger[label].failures[fault.kind]
        if not kind.attempts:
            raise fault
        if failures < kind.attempts:
            piece.due = self._flight.clock() + pause_before(failures)
            self._waiting.insert(0, piece)
            self._flight.notify(f"{label}: {fault}; it is sent again")
        elif kind.split and self._split(piece):
            self._flight.notify(f"{label}: {fault}; it is split in two")
        else:
            self._ledger.write(GIVEN_UP, label, kind=fault.kind)
            self._given_up.append((piece, fault))
            self._hopeless += 1
            self._flight.notify(f"{label}: {fault}; it is given up")

    def _complete(self) -> Iterator[tuple[Unit, dict[Any, Any]]]:
        """The units that have come back whole; the ledger is told once the caller has done with them."""
        for whole in [*self._wholes]:
            found = whole.gathered()
            if found is not None:
                self._wholes.remove(whole)
                yield whole.unit, found
                for leaf in whole.leaves():
                    self._ledger.write(TAKEN, leaf.unit.label, job=leaf.job)

    def _states(self) -> str:
        """Of each status how many jobs have it, how long the first of them has, and what the server says of that."""
        now, found = self._flight.clock(), dict[str, list[_Piece]]()
        for piece in sorted(self._flying, key=lambda piece: piece.heard):
            found.setdefault(piece.status.partition(":")[0].lower() or "sent", []).append(piece)
        told = []
        for status, pieces in found.items():
            said = pieces[0].status.partition(":")[2].strip()
            waited = f"{now - pieces[0].heard:.0f} s"
            told.append(f"{len(pieces)} {status} ({', '.join(filter(None, [waited, brief(said)]))})")
        return ", ".join(told)

    def _standing(self) -> str:
        """What is missing and why."""
        lines = [f"  {piece.unit.label}: {fault}" for piece, fault in self._given_up]
        others = len(self._wholes) - len({piece.root or piece for piece, _ in self._given_up})
        rest = [f"  … and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        rest += [f"  {others} not tried, or still on the server"] if others else []
        missing = len(self._wholes)
        counted = "1 unit of work is missing" if missing == 1 else f"{missing} units of work are missing"
        return "\n".join([f"{counted}:", *lines[:SHOWN], *rest])
