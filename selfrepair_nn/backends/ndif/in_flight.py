"""Jobs in flight on a server: a bounded number, each in the ledger before anything waits, none sent twice in doubt."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from selfrepair_nn.backends.ndif.agreement import duration
from selfrepair_nn.backends.ndif.faults import KINDS, Fault, job_fault
from selfrepair_nn.backends.ndif.hosts import Host, Hosts, Service
from selfrepair_nn.backends.ndif.ledger import FAILED, FETCHED, GIVEN_UP, SENDING, SENT, SPLIT, TAKEN, Ledger
from selfrepair_nn.backends.ndif.pieces import Piece
from selfrepair_nn.backends.ndif.server import Answer, pause_before
from selfrepair_nn.backends.ndif.standing import standing
from selfrepair_nn.errors import Incomplete
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.shown import line
from selfrepair_nn.tracing.session import ASKED

UNKNOWN_SECONDS = 60.0
"""A job of which the server has told nothing after this long did not arrive, or is lost."""

SHORTEST_PAUSE, LONGEST_PAUSE = 0.02, 2.0
HOPELESS = 3
"""After so many parts given up in a row, nothing more is sent."""

SHOWN = 10


Watch = Callable[[str], None]
"""Takes how the jobs stand, whenever they were looked at."""


def unwatched(state: str) -> None:
    """For nobody who watches."""


class Cutter(Protocol):
    """What knows how long jobs take: estimating.fitting.Cutting, or a test's stand-in."""

    def cut(self, unit: Unit) -> Sequence[Unit]:
        """The two parts of a job that would come near the server's time limit; none of one that is sent as it is."""
        ...

    def took(self, unit: Unit, seconds: float) -> None:
        """Takes how long the server was at a job."""


class JobsInFlight:
    """A backend that runs units on one host or several, at most `in_flight` at a time on each.

    It gives them in the order they finish. What an earlier process sent is taken up again, by its id, where it is. A
    job that fails is sent again after a pause, or its unit split, as its kind of fault says. When a part is given up
    the others go on, and at the end Incomplete says what is missing and why. What a host has that is silent for too
    long, or refuses, goes to the others; it may come back.

    Args:
        services: the model on a host, or on each of several.
        patience: seconds without any change of a job's status after which it counts as lost; and of silence after
            which a host's work goes to the others.
        notify: takes a line for the user whenever something did not go as it should.
        clock: seconds that only ever pass: how late it is here, or was when something was sent, decides nothing.

    Raises (while iterating):
        Incomplete: something is missing; the same run goes on from there.
        Fault: of a kind that another attempt cannot mend, such as a wrong key, from the last host there is.
    """

    def __init__(
        self,
        services: Service | Sequence[Service],
        ledger: Ledger,
        in_flight: int,
        patience: float,
        notify: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        every = services if isinstance(services, Sequence) else [services]
        self.hosts, self.ledger, self.notify = Hosts(every, patience), ledger, notify
        self.in_flight, self.patience, self.clock, self.sleep = in_flight, patience, clock, sleep
        self.watch: Watch = unwatched
        self.cutter: Cutter | None = None

    def __call__(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, dict[Any, Any]]]:
        return _Round(self, units).run()


class _Round:
    """One list of units on its way."""

    def __init__(self, flight: JobsInFlight, units: Iterable[Unit]) -> None:
        self._flight, self._ledger, self._hosts = flight, flight.ledger, flight.hosts
        self._wholes = dict.fromkeys(self._planned(Piece(unit)) for unit in units)
        leaves = [leaf for whole in self._wholes for leaf in whole.leaves()]
        self._waiting = sorted(leaves, key=lambda leaf: not self._ledger[leaf.unit.label].open)
        self._flying: list[Piece] = []
        self._landed: list[Piece] = []
        self._given_up: list[tuple[Piece, Fault]] = []
        self._hopeless = 0

    def run(self) -> Iterator[tuple[Unit, dict[Any, Any]]]:
        """Send, look, wait, until everything has come back or been given up."""
        self._settle()
        pause = SHORTEST_PAUSE
        while self._flying or (self._waiting and self._hopeless < HOPELESS):
            moved = [self._turn(host) for host in self._hosts.awake(self._flight.clock())]
            self._flight.watch(standing(self._flying, self._hosts, self._flight.clock()))
            yield from self._complete()
            pause = SHORTEST_PAUSE if any(moved) else min(1.5 * pause, LONGEST_PAUSE)
            self._flight.sleep(pause)
        if self._wholes:
            raise Incomplete(self._standing())

    def _planned(self, piece: Piece) -> Piece:
        """Split what an earlier process has split."""
        unit, record = piece.unit, self._ledger[piece.unit.label]
        if record.split:
            along = 0 < record.cases < len(unit.plan.get("cases", ()))
            for part in piece.split(unit.cut(record.cases) if along else unit.halves()):
                self._planned(part)
        return piece

    def _settle(self) -> None:
        """Find the jobs of a host that is not among these, or was not noted: under another address it may be."""
        for piece in self._waiting:
            record = self._ledger[piece.unit.label]
            if record.open and record.host not in {host.name for host in self._hosts}:
                knows = (host.name for host in self._hosts.left if self._knows(host, record.job))
                record.host = next(knows, record.host or self._hosts.every[0].name)

    def _knows(self, host: Host, job: str) -> bool:
        try:
            return host.silent is None and host.service.ask(job) is not None
        except Fault as fault:
            self._without(host, fault)
            return False

    def _turn(self, host: Host) -> bool:
        """Send to a host what it has room for, and look at what it has; whether there was anything new."""
        try:
            if host.silent is not None:
                host.service.greet(host.out)
            moved = False
            while piece := self._next(host):
                moved |= self._start(piece, host)
            for piece in [piece for piece in self._flying if piece.host is host]:
                moved |= self._look(piece)
        except Fault as fault:
            self._without(host, fault)
            return False
        if host.answered():
            self._flight.notify(f"{host.name} answers again")
        return moved

    def _without(self, host: Host, fault: Fault) -> None:
        """Wait for a silent host, or give what it has to the others. Raises what ends the run, if none is left."""
        passes, now = KINDS[fault.kind].passes, self._flight.clock()
        before = host.silent
        if passes and not host.said_nothing(now, self._hosts.patience, fault.after):
            if before is None:
                self._flight.notify(f"{fault}; the others go on, and it is tried again")
            return
        host.refused = None if passes else fault
        if not self._hosts.left:
            raise Incomplete(f"{fault}\n{self._standing()}") if passes else fault
        back = [piece for piece in self._flying if piece.host is host]
        self._flying = [piece for piece in self._flying if piece.host is not host]
        self._waiting[:0] = back
        waited = f" for {duration(now - host.silent)}" if passes and host.silent is not None else ""
        had = f"what it had ({len(back)} jobs) goes to the others"
        self._flight.notify(f"{host.name} is left out{waited}: {fault}; {had}")

    def _next(self, host: Host) -> Piece | None:
        """What can be sent to a host now, or is there; it no longer waits."""
        busy = sum(piece.host is host for piece in self._flying)
        if busy >= self._flight.in_flight or self._hopeless >= HOPELESS:
            return None
        now = self._flight.clock()
        for index, piece in enumerate(self._waiting):
            if piece.due <= now and self._may_go(piece, host):
                return self._waiting.pop(index)
        return None

    def _may_go(self, piece: Piece, host: Host) -> bool:
        """Whether a piece is a host's: where its job is, else anywhere but where it failed, if there is a choice."""
        if home := self._home(piece):
            return home is host
        others = [other for other in self._hosts.left if other is not host and other.silent is None]
        return piece.failed_at is not host or not others

    def _home(self, piece: Piece) -> Host | None:
        """The host that has a piece's job, or may have it."""
        record = self._ledger[piece.unit.label]
        return self._hosts.named(record.host) if record.open else None

    def _start(self, piece: Piece, host: Host) -> bool:
        """Take up the piece's job if there may be one; else send one."""
        record, home = self._ledger[piece.unit.label], self._home(piece)
        self._flying.append(piece)
        piece.host = host
        if home:
            piece.job, piece.heard, piece.status = record.job, self._flight.clock(), ""
            piece.known = record.event in (FETCHED, TAKEN)
            return True
        if self._flight.cutter and self._split(piece, self._flight.cutter.cut(piece.unit)):
            self._flying.remove(piece)
            return True
        try:
            self._send(piece, host.service)
        except Fault as fault:
            self._fail(piece, fault)
        return True

    def _split(self, piece: Piece, parts: Sequence[Unit]) -> bool:
        """Ask for these parts of the piece instead, next; False if there are none."""
        if pieces := piece.split(parts):
            along = {"cases": len(parts[0].plan["cases"])} if parts[0].prompts == piece.unit.prompts else {}
            self._ledger.write(SPLIT, piece.unit.label, into=[part.label for part in parts], **along)
            self._waiting[:0] = pieces
        return bool(pieces)

    def _send(self, piece: Piece, service: Service) -> None:
        """The id goes to the ledger before the request goes out, so that its fate can be asked for."""
        label = piece.unit.label
        request, piece.job, piece.status = service.pack(self._asked(piece)), uuid.uuid4().hex, ""
        piece.known = False
        self._ledger.write(SENDING, label, job=piece.job, host=service.name, bytes=len(request))
        known = service.send(request, piece.job)
        piece.doubt = service.doubt
        if known:
            piece.job = known
            self._ledger.write(SENT, label, job=known)
        piece.heard = self._flight.clock()

    def _asked(self, piece: Piece) -> Unit:
        return replace(piece.unit, run=self._ledger.run)

    def _look(self, piece: Piece) -> bool:
        """Ask about a job; whether there is anything new."""
        assert piece.host is not None
        answer = piece.host.service.ask(piece.job)
        silent = self._flight.clock() - piece.heard
        status = f"{answer.status}: {answer.description}" if answer else ""
        if answer and answer.status == "COMPLETED":
            self._land(piece, answer, piece.host.service)
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

    def _land(self, piece: Piece, answer: Answer, service: Service) -> None:
        """Fetch a result, and take it if it is what was asked for."""
        piece.known = True
        try:
            found, size = _fetched(service, piece.job, answer.result)
            if flaw := _of_another(found, self._asked(piece)) or piece.unit.flaw(found):
                raise Fault("result", flaw)
        except Fault as fault:
            if KINDS[fault.kind].passes:
                raise
            self._fail(piece, fault)
            return
        self._ledger.write(FETCHED, piece.unit.label, job=piece.job, bytes=size)
        self._flying.remove(piece)
        self._landed.append(piece)
        piece.result, self._hopeless = found, 0
        if self._flight.cutter and answer.seconds is not None:
            self._flight.cutter.took(piece.unit, answer.seconds)

    def _fail(self, piece: Piece, fault: Fault) -> None:
        """Send again, split, give up, or raise what is no fault of the job's: as the kind of fault says."""
        label, kind = piece.unit.label, KINDS[fault.kind]
        self._flying.remove(piece)
        self._ledger.write(FAILED, label, job=piece.job, kind=fault.kind, text=fault.text)
        failures = self._ledger[label].failures[fault.kind]
        if not kind.attempts:
            self._waiting.insert(0, piece)
            raise fault
        piece.failed_at = piece.host
        if failures < kind.attempts:
            piece.due = self._flight.clock() + pause_before(failures)
            self._waiting.insert(0, piece)
            self._flight.notify(f"{label}: {fault}; it is sent again")
        elif kind.split and self._split(piece, piece.unit.halves()):
            self._flight.notify(f"{label}: {fault}; it is split in two")
        else:
            self._ledger.write(GIVEN_UP, label, kind=fault.kind)
            self._given_up.append((piece, fault))
            self._hopeless += 1
            self._flight.notify(f"{label}: {fault}; it is given up")

    def _complete(self) -> Iterator[tuple[Unit, dict[Any, Any]]]:
        """The units that have come back whole; the ledger is told once the caller has done with them."""
        landed, self._landed = self._landed, []
        for whole in dict.fromkeys(piece.root or piece for piece in landed):
            found = whole.gathered()
            if found is not None:
                del self._wholes[whole]
                yield whole.unit, found
                for leaf in whole.leaves():
                    self._ledger.write(TAKEN, leaf.unit.label, job=leaf.job)

    def _standing(self) -> str:
        """What is missing and why."""
        lines = [f"  {piece.unit.label}: {fault}" for piece, fault in self._given_up]
        others = len(self._wholes) - len({piece.root or piece for piece, _ in self._given_up})
        rest = [f"  … and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        rest += [f"  {others} not tried, or still on the server"] if others else []
        missing = len(self._wholes)
        counted = "1 unit of work is missing" if missing == 1 else f"{missing} units of work are missing"
        return "\n".join([f"{counted}:", *lines[:SHOWN], *rest])


def _fetched(service: Service, job: str, result: str | bytes) -> tuple[dict[Any, Any], int]:
    """A result; where its address has expired, or what came with the answer is broken, by asking the server again."""
    try:
        return service.fetch(result)
    except Fault as fault:
        mended = fault.kind == "expired" or (fault.kind == "result" and isinstance(result, bytes))
        answer = service.ask(job) if mended else None
        if not answer or answer.result in ("", result):
            raise
        return service.fetch(answer.result)


def _of_another(found: Any, unit: Unit) -> str | None:
    """Whose result it is by its own words, which are taken off it, if that is another unit's.

    One that says nothing, as of a job that an earlier version of this package sent, is told by its shape alone.
    """
    said = found.pop(ASKED, None) if isinstance(found, dict) else None
    return None if said is None or said == unit.asked else f"it is that of {line(str(said), 200)!r}"
