"""The ledger: every line is on the disk when it is written, and no process killed within one spoils the rest."""

import json
import os
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfrepair_nn.backends.ndif.history import history
from selfrepair_nn.backends.ndif.ledger import (
    FAILED,
    FETCHED,
    GIVEN_UP,
    SENDING,
    SENT,
    SPLIT,
    TAKEN,
    Ledger,
    ledger_path,
    lines,
)
from selfrepair_nn.errors import StoreError

PART = "ablation, prompts 0 to 3"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.jobs.jsonl"


def begun(path, run="run"):
    ledger = Ledger(path, run, clock=lambda: 1000.5)
    ledger.write(SENDING, PART, job="a", bytes=10)
    return ledger


def test_it_lies_beside_the_store(tmp_path):
    assert ledger_path(tmp_path / "x.zarr") == tmp_path / "x.jobs.jsonl"


def test_another_process_reads_what_was_written(path):
    begun(path).write(SENT, PART, job="b")
    record = Ledger(path, "run")[PART]
    assert (record.event, record.job, record.sent, record.jobs, record.open) == (SENT, "b", 1000.5, 1, True)


def test_a_line_is_on_the_disk_before_write_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(path.read_text()))
    begun(path)
    assert PART in synced[-1]
    assert synced[-1].endswith("\n")


@pytest.mark.parametrize(
    ("events", "open_"),
    [
        ([SENDING], True),
        ([SENDING, SENT], True),
        ([SENDING, SENT, FETCHED], True),
        ([SENDING, SENT, FETCHED, TAKEN], True),
        ([SENDING, SENT, FAILED], False),
        ([SENDING, SENT, FAILED, SENDING], True),
        ([SENDING, FAILED, SPLIT], False),
        ([SENDING, FAILED, GIVEN_UP], False),
    ],
)
def test_what_the_server_may_still_have_is_open(path, events, open_):
    ledger = Ledger(path, "run")
    for event in events:
        ledger.write(event, PART, job="a", bytes=1, kind="time", text="")
    assert Ledger(path, "run")[PART].open is open_


def test_failures_are_counted_by_kind_until_the_part_is_given_up(path):
    ledger = Ledger(path, "run")
    for kind in ("busy", "time", "busy"):
        ledger.write(FAILED, PART, job="a", kind=kind, text="why")
    assert Ledger(path, "run")[PART].failures == {"busy": 2, "time": 1}
    ledger.write(GIVEN_UP, PART, kind="busy")
    assert not Ledger(path, "run")[PART].failures


def test_lines_of_another_run_are_kept_and_not_believed(path):
    begun(path, "first")
    assert not Ledger(path, "second").records
    begun(path, "second").write(FAILED, PART, job="a", kind="busy", text="")
    assert Ledger(path, "first")[PART].open
    assert not Ledger(path, "second")[PART].open


def test_a_part_is_split_once_and_for_all(path):
    ledger = begun(path)
    ledger.write(SPLIT, PART, into=["one", "other"])
    ledger.write(TAKEN, PART)
    assert Ledger(path, "run")[PART].split


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 6), cut=st.integers(0, 400), more=st.integers(0, 3))
def test_cut_off_anywhere_it_says_what_its_whole_lines_say(tmp_path_factory, count, cut, more):
    """As after a kill, or a full disk, within a write; and the next process goes on with a line of its own."""
    path = tmp_path_factory.mktemp("ledger") / "x.jsonl"
    ledger = Ledger(path, "run")
    for number in range(count):
        ledger.write(SENDING, f"part {number}", job=f"é{number}", bytes=1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - min(cut, len(whole))])
    complete = path.read_bytes().count(b"\n")
    left = complete + (path.read_bytes()[-1:] == b"}")
    after = Ledger(path, "run")
    assert list(after.records) == [f"part {n}" for n in range(left)]
    for number in range(more):
        after.write(SENDING, f"new {number}", job="j", bytes=1)
    expected = [f"part {n}" for n in range(left)] + [f"new {n}" for n in range(more)]
    assert list(Ledger(path, "run").records) == expected


@pytest.mark.parametrize("text", ["", "\n\n", "null\n[1]\n{}\n", '{"event": "sent"}\n', "\x00\x00\n"])
def test_what_is_no_line_is_passed_over(path, text):
    path.write_text(text)
    assert lines(path) == []
    assert begun(path)[PART].open


def test_a_long_ledger_is_made_compact_and_says_the_same(path):
    """Lines of other runs stay, what comes afterwards is added, and a short one is left as it is."""
    begun(path, "other")
    ledger = Ledger(path, "run")
    for number in range(120):
        for event in (SENDING, SENT, FAILED, SENDING, FETCHED, TAKEN):
            more = {"host": "http://a", "bytes": 5, "kind": "busy", "text": "why"}
            ledger.write(event, f"part {number}", job=f"{number}", **more)
    ledger.write(SPLIT, "part 7", into=["a", "b"])
    ledger.write(SENDING, "part 8", job="open", bytes=3, host="http://b")
    size, records = path.stat().st_size, Ledger(path, "run").records
    Ledger(path, "run").compact()
    assert path.stat().st_size < size / 3
    assert Ledger(path, "run").records == records
    assert Ledger(path, "other")[PART].open
    Ledger(path, "run").write(FETCHED, "part 8", job="open", bytes=9)
    assert Ledger(path, "run")["part 8"].bytes_returned == records["part 8"].bytes_returned + 9
    assert len(lines(path)) == 122


def test_a_short_ledger_keeps_all_its_lines(path):
    before = begun(path).path.read_bytes()
    Ledger(path, "run").compact()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "record", [{}, {"failures": {"a": "x"}}, {"failures": {}, "jobs": "x"}, {"failures": {}, "y": 1}]
)
def test_a_record_that_says_what_none_does_is_passed_over(path, record):
    line = {"time": "2026-01-01T00:00:00+00:00", "run": "run", "event": "record", "part": PART, "record": record}
    path.write_text(json.dumps(line) + "\n")
    assert lines(path) == []


def test_a_ledger_that_cannot_be_written_says_so(path):
    path.mkdir()
    with pytest.raises(StoreError, match=r"cannot read .*x\.jobs\.jsonl"):
        begun(path)


def test_history_names_what_is_open_or_failed_and_adds_up_the_rest(tmp_path):
    store = tmp_path / "x.zarr"
    ledger = begun(ledger_path(store))
    for number in range(3):
        part = f"ablation, prompts {4 * number + 4} to {4 * number + 7}"
        ledger.write(SENDING, part, job=f"j{number}", bytes=2**20)
        ledger.write(FETCHED, part, job=f"j{number}", bytes=2**21)
        ledger.write(TAKEN, part, job=f"j{number}")
    ledger.write(FAILED, PART, job="a", kind="time", text="Your job exceeded the execution timeout of 10.0s.")
    said = history(store, "run").splitlines()
    assert len(said) == 4
    assert said[0].startswith(PART)
    assert "1 x the job exceeded the server's time limit (Your job exceeded" in said[0]
    assert said[2:] == [
        "4 jobs sent for 4 parts: 3 done, 1 failed, to be sent again",
        "3.00 MiB sent, 6.00 MiB came back",
    ]


@pytest.mark.parametrize(
    ("backend", "said"), [("local", "it was run in this process"), ("remote", "is gone, damaged or of another run")]
)
def test_history_without_records_says_why_there_are_none(tmp_path, monkeypatch, backend, said):
    found = SimpleNamespace(attributes={"backend": backend})
    monkeypatch.setattr("selfrepair_nn.backends.ndif.history.contents_of", lambda store: found)
    assert said in history(tmp_path / "x.zarr", "")
