"""The test server's own promises: nothing outlives its owner, and its hub keeps weights to itself."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from ndif_server import Ndif
from ndif_server.server import free_ports

from selfrepair_nn.models.load import find

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NO NDIF SERVER HERE: it needs Linux")

SECONDS = 200
"""Many times more than anything here takes, on a machine that stalls; and less than what must not outlive its owner."""

OWNER = """
import os, sys, time
from pathlib import Path
from ndif_server.server import Process
Process(["bash", "-c", "setsid sleep 300 & (sleep 300 &); wait"], dict(os.environ), Path(sys.argv[1]))
print("started", flush=True)
time.sleep(300)
"""


@pytest.fixture
def owner(tmp_path):
    """A Python process that owns a program, which has a session's leader and an orphan among its children."""
    command = [sys.executable, "-c", OWNER, str(tmp_path / "log")]
    env = os.environ | {"PYTHONPATH": str(TESTS)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        yield psutil.Process(process.pid)
        process.kill()


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_nothing_outlives_an_owner_that_is_killed(owner, how):
    wait_until(lambda: len(owner.children(recursive=True)) == 4)
    started = owner.children(recursive=True)
    getattr(owner, how)()
    _, left = psutil.wait_procs(started, timeout=SECONDS)
    assert not left


def wait_until(true):
    limit = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Address of a hub that has tiny-neox, and its token."""
    port, log = free_ports(1)[0], tmp_path_factory.mktemp("hub") / "log"
    command = [sys.executable, str(TESTS / "ndif_server" / "inside" / "hub.py"), str(port), "secret"]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as file:
        process = subprocess.Popen([*command, f"local/tiny-neox={find('tiny-neox').location}"], stderr=file)
    wait_until(lambda: reply(f"{url}/ping")[0] == 200)
    yield url
    process.kill()
    process.wait()


def reply(url, **headers):
    """Status and body; a hub that is not there yet answers 0."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["X-Error-Code"]
    except urllib.error.URLError:
        return 0, b""


def test_the_hub_gives_weights_only_to_the_bearer_of_its_token(hub):
    directory = Path(find("tiny-neox").location)
    weights, config = (directory / name for name in ("model.safetensors", "config.json"))
    at = f"{hub}/local/tiny-neox/resolve/main"
    assert reply(f"{at}/{config.name}") == (200, config.read_bytes())
    assert reply(f"{at}/{weights.name}") == (403, "GatedRepo")
    assert reply(f"{at}/{weights.name}", Authorization="Bearer guess") == (403, "GatedRepo")
    assert reply(f"{at}/{weights.name}", Authorization="Bearer secret") == (200, weights.read_bytes())
    part = reply(f"{at}/{weights.name}", Authorization="Bearer secret", Range="bytes=10-19")
    assert part == (206, weights.read_bytes()[10:20])


def test_the_hub_says_what_it_has_not(hub):
    assert reply(f"{hub}/local/tiny-neox/resolve/main/nothing.json") == (404, "EntryNotFound")
    assert reply(f"{hub}/local/nothing/resolve/main/config.json") == (404, "RepoNotFound")
    assert reply(f"{hub}/local/tiny-neox/resolve/main/../../../secrets") == (404, "EntryNotFound")


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="trusted, sandboxed"):
        Ndif({}, mode="safe")
    with pytest.raises(ValueError, match="model actor"):
        Ndif({}).processes("modem")
