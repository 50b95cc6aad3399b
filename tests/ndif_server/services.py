"""The programs that make up the server: how each is started, and how one sees that it answers.

Every function takes a `Place`, where they all run.
"""

import json
import socket
import sys
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from .environment import HERE, VENV

BUCKET = "ndif-results"
MEMORY = 16 * 2**30  # of the one GPU that Ray is told of; a number, not a device
PORTS = ("redis", "hub", "store", "api", "gcs", "client", "dashboard", "agent")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Place:
    """What is particular to one server. `directory` and `ports` are given when it starts."""

    models: dict[str, Path]
    deploy: list[str]
    special: dict[str, dict]
    slow: dict[str, float]
    settings: dict[str, str]
    hub_token: str = field(default_factory=lambda: str(uuid.uuid4()))
    directory: Path = Path()
    ports: dict[str, int] = field(default_factory=dict)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.ports[name]}"


def hub_environment(place: Place, home: str) -> dict[str, str]:
    """What makes Hugging Face's libraries use our hub, and a cache of their own in `home`; no token."""
    return {
        "HF_ENDPOINT": place.url("hub"),
        "HF_HOME": str(place.directory / home),
        "HF_TOKEN": "",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


def environment(place: Place) -> dict[str, str]:
    """Of all the programs; nothing is inherited, so no setting or secret of this machine's user gets in."""
    return {
        "PATH": f"{VENV / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(place.directory),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(HERE / "inside"),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **hub_environment(place, "hf"),
        "HF_TOKEN": place.hub_token,
        "RAY_ADDRESS": place.address("gcs"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_MEMORY_MONITOR": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # which keeps every address on loopback
        "NDIF_HOME": str(place.directory / "ndif"),
        "NDIF_API_URL": place.url("api"),
        "NDIF_REDIS_URL": f"redis://{place.address('redis')}",
        "NDIF_RAY_ADDRESS": f"ray://{place.address('client')}",
        "NDIF_OBJECT_STORE_URL": place.url("store"),
        "NDIF_OBJECT_STORE_ACCESS_KEY": "local",
        "NDIF_OBJECT_STORE_SECRET_KEY": "locallocal",
        "NDIF_CONTROLLER_IMPORT_PATH": "ndif_cpu.CPUControllerActor",
        "NDIF_DEPLOYMENTS": "|".join(model_key(name) for name in place.deploy),
        "NDIF_SPECIAL": json.dumps({model_key(name): fields for name, fields in place.special.items()}),
        "NDIF_SLOW": json.dumps({model_key(name): seconds for name, seconds in place.slow.items()}),
        "NDIF_DEFAULT_PADDING_BIAS": "0",
        "NDIF_SANDBOX_POOL_SIZE": "1",
        "NDIF_AUTOSCALING_MAX_REPLICAS": "1",
        "NDIF_STATUS_TTL_S": "1",
        "NDIF_KEYS": str(place.directory / "keys.json"),
        "NDIF_CROSSED": str(place.directory / "crossed.jsonl"),
        "NDIF_ACTORS": str(place.directory / "actors"),
    } | place.settings


def model_key(name: str) -> str:
    """A model as NDIF names it."""
    identity = {"repo_id": name, "revision": None, "task": "text-generation"}
    return f"nnsight.modeling.transformers.TransformersModel:{json.dumps(identity)}"


# ---------------------------------------------------------------- commands


def redis(place: Place) -> list[str]:
    options = {"bind": "127.0.0.1", "port": place.ports["redis"], "save": "", "dir": place.directory}
    return ["redis-server", *(str(x) for key, value in options.items() for x in (f"--{key}", value))]


def hub(place: Place) -> list[str]:
    models = [f"{name}={directory}" for name, directory in place.models.items()]
    return [
        sys.executable,
        str(HERE / "inside" / "hub.py"),
        str(place.ports["hub"]),
        place.hub_token,
        *models,
    ]


def store(place: Place) -> list[str]:
    return ["moto_server", "-H", "127.0.0.1", "-p", str(place.ports["store"])]


def ray(place: Place) -> list[str]:
    """A head node alone. NDIF gives work only to nodes with a GPU: one is declared."""
    memory = {"head": 10, "cuda_memory_bytes": MEMORY, "cpu_memory_bytes": MEMORY}
    options = {
        "node-ip-address": "127.0.0.1",
        "port": place.ports["gcs"],
        "ray-client-server-port": place.ports["client"],
        "dashboard-host": "127.0.0.1",
        "dashboard-port": place.ports["dashboard"],
        "dashboard-agent-listen-port": place.ports["agent"],
        "include-dashboard": "true",  # which NDIF asks about nodes and actors
        "include-log-monitor": "false",
        "num-cpus": len(place.models) + 4,
        "num-gpus": 1,
        "resources": json.dumps(memory),
        "object-store-memory": 300_000_000,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "temp-dir": place.directory / "ray",
    }
    given = [f"--{key}={value}" for key, value in options.items()]
    return ["ray", "start", "--head", "--block", "--no-monitor", *given]


def controller(place: Place) -> list[str]:
    """Leaves a controller running in Ray, and ends."""
    return ["python", "-m", "ndif.services.ray.deployments.controller.controller"]


def api(place: Place) -> list[str]:
    app = (
        "ndif_keys:app"
        if "Sandbox" in place.settings["NDIF_MODEL_IMPORT_PATH"]
        else "ndif.services.api.app:app"
    )
    return [
        "gunicorn",
        "--config",
        "python:ndif.services.api.gunicorn_conf",
        "--bind",
        place.address("api"),
        app,
    ]


COMMANDS = {each.__name__: each for each in (redis, hub, store, ray, controller, api)}


# ---------------------------------------------------------------- readiness


def get(url: str, timeout: float = 5, method: str = "GET") -> bytes:
    """The body of a reply; raises OSError where there is none or it is no success."""
    with DIRECT.open(urllib.request.Request(url, method=method), timeout=timeout) as reply:
        return reply.read()


def ask(place: Place, name: str) -> None:
    """Raises OSError unless the service answers. The object store is asked for NDIF's bucket, which makes it."""
    if name == "redis":
        with socket.create_connection(("127.0.0.1", place.ports["redis"]), timeout=5) as connection:
            connection.sendall(b"PING\r\n")
            if b"PONG" not in connection.recv(64):
                raise OSError("redis does not answer")
    elif name == "ray":
        socket.create_connection(("127.0.0.1", place.ports["client"]), timeout=5).close()
        get(f"{place.url('dashboard')}/api/version")
    elif name == "store":
        get(f"{place.url('store')}/{BUCKET}", method="PUT")
    else:
        get(f"{place.url(name)}/{'ping' if name == 'hub' else 'connected'}")
