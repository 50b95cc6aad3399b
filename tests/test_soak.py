"""Some ninety jobs with faults on both sides: the numbers, the sendings, memory and ledger of a campaign."""

import pytest
from soak import KILLS, soak

from selfrepair_nn.backends.ndif import ledger

UNITS = 90


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ledger, "LONG", 2**14)
        return soak(tmp_path_factory.mktemp("soak"), UNITS)


def test_each_unit_is_stored_once_and_the_store_is_that_of_an_undisturbed_run(counts):
    assert counts.kills == KILLS
    assert sum(counts.faults.values()) > UNITS / 10
    assert len(counts.written) == UNITS
    assert sum(count > 1 for count in counts.written.values()) <= KILLS


def test_no_more_is_sent_than_was_lost(counts):
    assert counts.sent <= UNITS + 8 * counts.starts + sum(counts.failed.values())


def test_memory_stays_flat(counts):
    early, late = counts.held
    assert late["tensors"] - early["tensors"] < 50
    assert (late["objects"] - early["objects"]) / (UNITS / 3) < 10


def test_the_ledger_stays_small(counts):
    assert counts.bytes_of_job < 800
