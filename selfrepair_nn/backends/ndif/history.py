"""A ledger in words: what is on the server, what came back, what failed and why."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selfrepair_nn.backends.ndif.agreement import duration
from selfrepair_nn.backends.ndif.faults import KINDS, Fault, brief
from selfrepair_nn.backends.ndif.ledger import (
    FAILED,
    FETCHED,
    GIVEN_UP,
    SENDING,
    SENT,
    SPLIT,
    TAKEN,
    Ledger,
    Record,
    ledger_path,
)
from selfrepair_nn.backends.ndif.server import Server
from selfrepair_nn.backends.ndif.standing import WORDS, in_words
from selfrepair_nn.errors import SelfRepairError
from selfrepair_nn.integrity import contents_of
from selfrepair_nn.shown import line

MEANINGS = {
    SENDING: "sent, not acknowledged",
    SENT: "on the server",
    FETCHED: "came back",
    TAKEN: "done",
    FAILED: "failed, to be sent again",
    SPLIT: "split in two",
    GIVEN_UP: "given up",
}

AT_REST = "not known", WORDS["COMPLETED"], WORDS["ERROR"]
"""What is said of a job that no longer goes on."""

WATCH_SECONDS = 2.0
"""Between two looks."""


def told(store: Path, run: str) -> dict[str, Any]:
    """The same as plain data: every part with its state, job, failures and bytes, and what there was in all."""
    records, asked = Ledger(ledger_path(store), run).records.values(), _Asked()
    parts = [
        {
            "part": record.part,
            "state": MEANINGS.get(record.event, record.event),
            "server_says": asked(record),
            "job": record.job if record.open else None,
            "host": record.host or None,
            "failures": dict(record.failures),
            "said": brief(record.text) if record.text else None,
            "bytes_sent": record.bytes_sent,
            "bytes_returned": record.bytes_returned,
        }
        for record in records
    ]
    return {"jobs": sum(record.jobs for record in records), "parts": parts}


def history(store: Path, run: str) -> str:
    """Every part of a store's run that is not simply done, one line each, and what was sent and came back in all."""
    ledger = Ledger(ledger_path(store), run)
    if not ledger.records:
        return _without_records(store, ledger.path)
    shown, asked = [r for r in ledger.records.values() if r.event != TAKEN or r.failures], _Asked()
    lines = [_line(record, asked(record)) for record in shown]
    return "\n".join([*lines, *([""] if shown else []), _total(ledger)])


def _without_records(store: Path, ledger: Path) -> str:
    """What is known where no job of a run is: none was sent, or what told of them is gone."""
    if contents_of(store).attributes.get("backend") != "remote":
        return "no job was ever sent for this store: it was run in this process"
    why = f"none was sent yet, or {str(ledger)!r} is gone, damaged or of another run"
    return f"no job of this store's run is known: {why}"


def watched(
    store: Path,
    pause: float = WATCH_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
    *,
    held: Callable[[], bool | None] = lambda: None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """How the jobs of a store stand, in words and as plain data, again and again until the run has finished.

    Or until nobody is at work on it (`held` says so) and no server has a job of it that goes on.
    """
    while True:
        busy = held()  # asked first: a run says that it has finished before it lets go
        attributes = contents_of(store).attributes
        run, finished = attributes.get("run", ""), "finished" in attributes
        now = told(store, run)
        yield history(store, run), now | {"finished": finished}
        if finished or (busy is False and not any(map(_goes_on, now["parts"]))):
            return
        sleep(pause)


def _goes_on(part: dict[str, Any]) -> bool:
    """Whether a server says of a part that it is at it, or will be."""
    return not (part["server_says"] or AT_REST[0]).startswith(AT_REST)


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts that stand otherwise than they did, as they stand now."""
    known = {part["part"]: _standing(part) for part in before.get("parts", ())}
    return [part for part in now["parts"] if known.get(part["part"]) != _standing(part)]


def _standing(part: dict[str, Any]) -> dict[str, Any]:
    """All that is said of a part but for how long ago it was sent."""
    return part | {"server_says": str(part["server_says"]).partition(", sent")[0]}


class _Asked:
    """What servers say of the jobs that they have; one that does not answer is asked once."""

    def __init__(self) -> None:
        self._servers: dict[str, Server | str] = {}

    def __call__(self, record: Record) -> str | None:
        """In words, with the time since it was sent; None of a job that no server has."""
        if record.event not in (SENDING, SENT) or not record.host:
            return None
        said = self._of(record)
        return f"{said}, sent {duration(max(0.0, time.time() - record.sent))} ago"

    def _of(self, record: Record) -> str:
        try:
            server = self._servers.setdefault(record.host, Server(record.host, patience=0))
            if isinstance(server, str):
                return server
            answer = server.ask(record.job)
        except (Fault, SelfRepairError) as error:
            found = self._servers[record.host] = f"not known: {brief(getattr(error, 'text', '') or str(error))}"
            return found
        return in_words(answer.status, answer.description) if answer else "not known there (yet)"


def _line(record: Record, says: str | None) -> str:
    meanings = {kind: KINDS[kind].meaning if kind in KINDS else kind for kind in record.failures}
    why = "; ".join(f"{count} x {meanings[kind]}" for kind, count in record.failures.items())
    said = f" ({brief(record.text)})" if record.text else ""
    job = f"job {record.job}{f' at {record.host}' if record.host else ''}" if record.open else ""
    state = MEANINGS.get(record.event, record.event) + (f": {says}" if says else "")
    parts = (record.part, state, job, f"{why}{said}")
    return "  ".join(line(part) for part in parts if part)


def _total(ledger: Ledger) -> str:
    records = ledger.records.values()
    states = Counter(MEANINGS.get(record.event, record.event) for record in records)
    sent, back = (sum(r.bytes_sent for r in records), sum(r.bytes_returned for r in records))
    counted = ", ".join(f"{count} {state}" for state, count in states.most_common())
    jobs = sum(record.jobs for record in records)
    counted = line(counted)
    return (
        f"{jobs} jobs sent for {len(records)} parts: {counted}\n{_size(sent)} sent, {_size(back)} came back"
    )


def _size(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"
