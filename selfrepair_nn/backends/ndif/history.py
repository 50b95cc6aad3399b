"""A ledger in words: what is on the server, what came back, what failed and why."""

from collections import Counter
from pathlib import Path
from typing import Any

from selfrepair_nn.backends.ndif.faults import KINDS, brief
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


def told(store: Path, run: str) -> dict[str, Any]:
    """The same as plain data: every part with its state, job, failures and bytes, and what there was in all."""
    records = Ledger(ledger_path(store), run).records.values()
    parts = [
        {
            "part": record.part,
            "state": MEANINGS.get(record.event, record.event),
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
        return "no job was ever sent for this store: it was run in this process"
    shown = [record for record in ledger.records.values() if record.event != TAKEN or record.failures]
    return "\n".join([*map(_line, shown), *([""] if shown else []), _total(ledger)])


def _line(record: Record) -> str:
    meanings = {kind: KINDS[kind].meaning if kind in KINDS else kind for kind in record.failures}
    why = "; ".join(f"{count} x {meanings[kind]}" for kind, count in record.failures.items())
    said = f" ({brief(record.text)})" if record.text else ""
    job = f"job {record.job}{f' at {record.host}' if record.host else ''}" if record.open else ""
    parts = (record.part, MEANINGS.get(record.event, record.event), job, f"{why}{said}")
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
