"""Every job that was ever sent for a store, on disk before anything waits for it: one JSON line for each thing known.

A part is what one request asks for, by its label. Its record is what the lines about it add up to. A line that a
killed process left unfinished is no line. A long ledger is made compact when a run begins or ends: a line a part.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from selfrepair_nn.files import Files
from selfrepair_nn.store import explained

SENDING, SENT, FETCHED, TAKEN, FAILED, SPLIT, GIVEN_UP, RECORD = (
    "sending", "sent", "fetched", "taken", "failed", "split", "given up", "record",
)  # fmt: skip

LONG = 2**16
"""Bytes from which on a ledger is made compact."""

NEEDED = {"time": str, "event": str, "part": str}
OF_EVENTS = {
    SENDING: {"bytes": int, "job": str},
    FETCHED: {"bytes": int},
    FAILED: {"kind": str, "text": str},
    RECORD: {"record": dict},
}
OPTIONAL = {"job": str, "host": str, "cases": int}
"""What every line holds, what those of some events do, and what any may."""


@dataclass
class Record:
    """What is known of one part: its last event and job, when and to which host that was sent, how its jobs failed.

    `split` says whether it was split, and `cases` how many cases the first part then got: 0 where it was halved.
    """

    part: str
    event: str = ""
    job: str = ""
    host: str = ""
    sent: float = 0.0
    jobs: int = 0
    bytes_sent: int = 0
    bytes_returned: int = 0
    failures: Counter = field(default_factory=Counter)
    text: str = ""
    split: bool = False
    cases: int = 0

    @property
    def open(self) -> bool:
        """Whether the server has, or may have, its job or the job's result: also where that was taken once already."""
        return self.event in (SENDING, SENT, FETCHED, TAKEN)

    @property
    def kept(self) -> dict[str, Any]:
        """All of it but its part, and what says nothing, for one line."""
        known = {name: value for name, value in vars(self).items() if name != "part" and value}
        return known | {"failures": dict(self.failures)}

    def add(self, line: dict[str, Any]) -> None:
        """Take in one line about this part."""
        if line["event"] == RECORD:
            vars(self).update(line["record"] | {"part": self.part, "failures": Counter(line["record"]["failures"])})
            return
        self.event, self.job = line["event"], line.get("job", self.job)
        self.bytes_returned += line["bytes"] if self.event == FETCHED else 0
        if self.event == SENDING:
            self.sent, self.jobs = datetime.fromisoformat(line["time"]).timestamp(), self.jobs + 1
            self.bytes_sent, self.host = self.bytes_sent + line["bytes"], line.get("host", "")
        if self.event == FAILED:
            self.failures[line["kind"]] += 1
            self.text = line["text"]
        if self.event == GIVEN_UP:
            self.failures.clear()
        if self.event == SPLIT:
            self.split, self.cases = True, line.get("cases", 0)


class Ledger:
    """The jobs of one run of one store. `run` tells this store from an earlier one at the same path.

    Raises:
        StoreError: the file cannot be read or written.
    """

    def __init__(self, path: Path, run: str, clock: Callable[[], float] = time.time) -> None:
        self.path, self.run, self._clock = path, run, clock
        self.records: dict[str, Record] = {}
        for line in lines(path):
            if line.get("run") == run:
                self[line["part"]].add(line)

    def __getitem__(self, part: str) -> Record:
        return self.records.setdefault(part, Record(part))

    def write(self, event: str, part: str, **facts: Any) -> None:
        """One more line, on the disk when this returns."""
        line = self._line(event, part, facts)
        with explained(self.path), open(self.path, "ab+") as file:
            file.write((b"" if _whole(file) else b"\n") + json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self[part].add(line)

    def compact(self) -> "Ledger":
        """Where it has become long, one line for each part of this run; lines of other runs stay as they are."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < LONG:
            return self
        others = [line for line in lines(self.path) if line.get("run") != self.run]
        own = [self._line(RECORD, part, {"record": record.kept}) for part, record in self.records.items()]
        content = "".join(f"{json.dumps(line)}\n" for line in [*others, *own]).encode()
        if len(content) < size / 2:
            with explained(self.path):
                Files(self.path.parent).put({self.path.name: content})
        return self

    def _line(self, event: str, part: str, facts: dict[str, Any]) -> dict[str, Any]:
        now = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        return {"time": now, "run": self.run, "event": event, "part": part} | facts


def ledger_path(store: Path) -> Path:
    """Where the ledger of a store lies: beside it, so that the store holds nothing but arrays."""
    return store.with_suffix(".jobs.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    """Everything that a ledger says, in order; empty if there is none."""
    with explained(path, "read"):
        text = path.read_text(errors="replace") if path.exists() else ""
    return [found for line in text.splitlines() if (found := _read(line)) is not None]


def _read(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and _fits(found) else None


def _fits(line: dict[str, Any]) -> bool:
    """Whether a line says what lines say: what somebody edited or a disk damaged is no line."""
    needed = NEEDED | OF_EVENTS.get(str(line.get("event")), {})
    if not all(isinstance(line.get(name), kind) for name, kind in needed.items()):
        return False
    try:
        datetime.fromisoformat(line["time"]).timestamp()
    except (ValueError, OverflowError, OSError):
        return False
    if line["event"] == RECORD and not _is_record(line["record"]):
        return False
    return all(isinstance(line.get(name, kind()), kind) for name, kind in OPTIONAL.items())


def _is_record(found: dict[str, Any]) -> bool:
    """Whether it is what a Record keeps."""
    usual = vars(Record("")) | {"failures": {}}
    fits = (name in usual and isinstance(value, type(usual[name])) for name, value in found.items())
    failures = found.get("failures", {})
    return all(fits) and "failures" in found and all(isinstance(count, int) for count in failures.values())


def _whole(file: Any) -> bool:
    """Whether the file's last line is finished."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return True
    file.seek(size - 1)
    return file.read(1) == b"\n"
