"""Everything that can break, broken on a real NDIF server: a clear message, no lost data, the same store in the end.

Each test leaves the server whole. `pytest -rP` prints what the client said to each fault.
"""

import json
import re
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from far import RUN
from standing import BLOCKS
from terminal import assert_same_numbers, resume_command
from tiers import representative

from selfrepair_nn.backends.local import only
from selfrepair_nn.backends.ndif.faults import Fault
from selfrepair_nn.backends.ndif.in_flight import JobsInFlight
from selfrepair_nn.backends.ndif.ledger import Ledger, ledger_path, lines
from selfrepair_nn.backends.ndif.served import ServedModel
from selfrepair_nn.backends.ndif.server import Server
from selfrepair_nn.layout.greeting import first_unit
from selfrepair_nn.models.load import describe, find, structure_only

pytestmark = pytest.mark.slow
MODEL, IMPATIENT = "local/tiny-neox", "local/impatient"
HASTY = ["--patience", 6]
"""Less than a fault lasts, and many times what a server that is whole needs for a few jobs."""


@pytest.fixture
def store(tmp_path):
    return tmp_path / "s.zarr"


def command(ndif, store, *more, model=MODEL):
    return ["run", "heads", "--model", model, "--host", ndif.url, "--out", store, *RUN, *more]


def done(store):
    return int(xr.open_zarr(store).done.sum()) if store.exists() else 0


def begun(far, ndif, store, *more):
    """A client in the middle of its run, until it may go on: some of it stored, jobs on the server."""
    ndif.wait_for_models()
    client = far.start(*command(ndif, store, *more), blocks=BLOCKS)
    client.until(lambda: done(store) > 0)
    return client


def goes_on(client, store):
    """Wait until the client has done a few things more, or has ended."""
    before = len(lines(ledger_path(store)))
    client.until(lambda: len(lines(ledger_path(store))) > before + 4 or not client.running)


def failed(store):
    return [each for each in lines(ledger_path(store)) if each["event"] == "failed"]


def report(what, ended, store):
    """For the fault table: what the client said and what became of the jobs."""
    kinds = [each["kind"] for each in failed(store)]
    said = [line for line in ended.err.splitlines() if line.startswith("selfrepair:")]
    print(f"{what}: exit {ended.code}; failed jobs {kinds}; said {said[:1]}")


def assert_whole(far, ndif, store, undisturbed):
    """The same command finishes the run, and its numbers are an undisturbed run's, bit for bit.

    It does not wait long for jobs that were running when the server broke: their status never changes again. For the
    server it does not wait at all, which may take minutes to be whole again.
    """
    ndif.wait_for_models()
    again = far.run(*command(ndif, store, "--patience", 30))
    assert again.code == 0, again.err
    assert_same_numbers(store, undisturbed)


def kill(ndif, part, number=signal.SIGKILL):
    """A part of the server gets a signal; of the models' actors, the one of the model that runs here."""
    ndif.kill(part, number, MODEL if part == "model actor" else None)


@contextmanager
def broken(ndif, fault):
    """Something is broken, and mended whatever becomes of the test, as the server's owner would."""
    if fault == "hanging":
        kill(ndif, "model actor", signal.SIGSTOP)
    else:
        kill(ndif, fault)
    try:
        yield
    finally:
        mend(ndif, fault)
        ndif.wait_for_models()


def mend(ndif, fault):
    if fault == "hanging":
        kill(ndif, "model actor", signal.SIGCONT)
    elif fault == "dispatcher":
        ndif.restart("api")
    else:
        ndif.start(fault)
    if fault in ("redis", "store"):  # without which the API's dispatcher loses count of its models for good
        ndif.restart("api")


# ---------------------------------------------------------------- before


def test_no_server_there(far, store):
    nobody = ["--host", "http://127.0.0.1:9", *HASTY]
    ended = far.run("run", "heads", "--model", MODEL, *nobody, "--out", store, *RUN)
    report("no server", ended, store)
    assert ended.code == 1
    assert "does not answer" in ended.err
    assert "Connection refused" in ended.err
    assert "check --host" in ended.err
    assert not store.exists()
    pauses = re.findall(r"trying again in ([\d.]+) s", ended.err)
    assert sum(map(float, pauses[:-1])) < HASTY[-1]


def test_something_else_than_ndif_answers(far, ndif, store):
    ended = far.run("run", "heads", "--model", MODEL, "--host", ndif.hub_url, "--out", store, *RUN)
    report("the hub's address", ended, store)
    assert ended.code == 1
    assert "not an NDIF server" in ended.err
    assert not store.exists()


@pytest.mark.thorough
def test_a_model_that_is_deployed_when_it_is_asked_for(far, ndif, store, undisturbed):
    ended = far.run(*command(ndif, store, model="local/late"))
    report("model not deployed yet", ended, store)
    assert ended.code == 0, ended.err
    assert "local/late is not deployed" in ended.err
    assert_same_numbers(store, undisturbed)


@pytest.mark.thorough
def test_a_model_that_the_server_cannot_load(far, ndif, store):
    ended = far.run(*command(ndif, store, model="local/broken"))
    report("model that cannot be deployed", ended, store)
    assert ended.code == 75
    assert "the server failed to start this model" in ended.err
    assert "choose one that runs there" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.thorough
def test_a_server_that_wants_newer_clients(far, ndif, store, undisturbed):
    ndif.restart("api", NDIF_MIN_NNSIGHT_VERSION="99.0")
    try:
        ended = far.run(*command(ndif, store))
    finally:
        ndif.restart("api", NDIF_MIN_NNSIGHT_VERSION="0.0")
        ndif.wait_for_models()
    report("version too old", ended, store)
    assert ended.code == 1
    assert "below the minimum supported 99.0" in ended.err
    assert "selfrepair doctor" in ended.err
    assert_whole(far, ndif, store, undisturbed)


def test_a_server_that_builds_the_model_otherwise(server, tmp_path, monkeypatch):
    """A client whose model has a layer more than the server's, under the same name."""
    monkeypatch.setenv("NDIF_API_KEY", server.trusted_key)
    config = json.loads(Path(find("tiny-neox").location, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    served = ServedModel(Server(server.url, 60), structure_only(describe(str(tmp_path)), None))
    served.key = served.key.replace(str(tmp_path), MODEL)
    flight = JobsInFlight(served, Ledger(tmp_path / "x.jsonl", "run"), 1, 60)
    with pytest.raises(Fault, match="other modules") as error:
        only(flight, first_unit(served.model.layout))
    print(f"architecture mismatch: {error.value}")
    assert "has no module at" in error.value.text


# ---------------------------------------------------------------- in the middle


@pytest.mark.parametrize("part", representative(["api worker", "model actor", "controller"], "model actor"))
def test_a_part_that_is_killed_and_heals(far, ndif, store, undisturbed, part):
    client = begun(far, ndif, store)
    kill(ndif, part)
    client.go_on()
    ended = client.wait()
    report(f"{part} killed", ended, store)
    assert ended.code == 0, ended.err
    assert_same_numbers(store, undisturbed)


FAULTS = {
    "api": ("does not answer", "FAIL  server"),
    "redis": ("of the job", "FAIL  cluster"),
    "store": ("does not answer", "answers"),
    "ray": ("of the job", "FAIL  cluster"),
    "dispatcher": ("of the job", "FAIL  cluster"),
    "hanging": ("nothing more was heard of the job", "answers"),
}
"""What a client and the doctor say while it is broken."""


@pytest.mark.parametrize("fault", representative(FAULTS, "hanging"))
def test_what_does_not_heal_by_itself(far, ndif, store, undisturbed, fault):
    """The client ends, with what is missing and how to go on; when the server is mended it does.

    Where everything is stored already, nobody is asked.
    """
    said, found = FAULTS[fault]
    client = begun(far, ndif, store, *HASTY)
    with broken(ndif, fault):
        client.go_on()
        doctor = far.start("doctor", "--host", ndif.url)
        finished = far.run(*command(ndif, undisturbed))
        ended, looked = client.wait(), doctor.wait()
    report(fault, ended, store)
    print("doctor:", [line for line in looked.out.splitlines() if "FAIL" in line])
    assert (finished.code, finished.err) == (0, "")
    assert ended.code == 75, ended.err
    assert said in ended.err
    assert "of work are missing" in ended.err
    assert "are kept in" in ended.err
    assert resume_command(ended.err)[:2] == ["run", "heads"]
    assert found in looked.out
    assert "Traceback" not in ended.err + looked.err
    assert_whole(far, ndif, store, undisturbed)


@pytest.mark.thorough
def test_a_patient_client_goes_on_with_the_server(far, ndif, store, undisturbed):
    client = begun(far, ndif, store)
    with broken(ndif, "hanging"):
        client.go_on()
        time.sleep(3)
    ended = client.wait()
    report("hanging for 3 s, patient client", ended, store)
    assert ended.code == 0, ended.err
    assert_same_numbers(store, undisturbed)


def test_a_time_limit_splits_the_units_until_they_fit(far, ndif, store, undisturbed):
    """Rounding may differ where fewer heads ride in a pass; nothing else does. The model is deployed when asked for."""
    whole = ["--batch-size", 32, "--tokens-per-pass", 32]
    ended = far.run(*command(ndif, store, *whole, model=IMPATIENT))
    report("time limit", ended, store)
    assert ended.code == 0, ended.err
    assert f"{IMPATIENT} is not deployed" in ended.err
    assert {each["kind"] for each in failed(store)} == {"time"}
    assert [each for each in lines(ledger_path(store)) if each["event"] == "split"]
    with xr.open_zarr(store) as one, xr.open_zarr(undisturbed) as other:
        scale = float(other.logit.std())
        assert np.abs(one.logit_change - other.logit_change).max() <= 1e-4 * scale
        assert np.abs(one.from_heads - other.from_heads).max() <= 1e-4 * scale


# ---------------------------------------------------------------- both at once


def test_client_and_server_killed_at_random_moments(far, ndif, store, undisturbed):
    """Both in turn: whatever the server forgot meanwhile is found out by asking, and only that is sent again."""
    for part in ("api worker", "model actor", None, "api worker"):
        client = far.start(*command(ndif, store))
        goes_on(client, store)
        if part:
            kill(ndif, part)
        client.send(signal.SIGKILL)
        client.wait()
    assert_whole(far, ndif, store, undisturbed)
