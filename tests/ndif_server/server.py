"""NDIF's published server on this machine's CPU, with stand-ins for the model hub and the object store, on loopback."""

import http.client
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from signal import SIGKILL, Signals

import psutil

from . import services
from .environment import HERE, Unavailable, missing

MODES = {"trusted": "ndif_cpu.CPUModelActor", "sandboxed": "ndif_cpu.CPUSandboxModelActor"}
SERVICES = ("redis", "hub", "store", "ray", "api")
PARTS = {
    "api worker": ("api", r"gunicorn"),
    "dispatcher": ("api", r"multiprocessing\.spawn"),
    "raylet": ("ray", r"/raylet/raylet "),
    "controller": ("ray", r"^ray::CPUController"),
    "model actor": ("ray", r"^ray::CPU(Sandbox)?Model"),
}
"""What can be killed inside a service: the service, and what its processes are called."""
PATIENCE = 900.0


class Process:
    """A program and all that it starts, none of which outlives this Python process."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self.keeper = subprocess.Popen(
                [sys.executable, str(HERE / "keeper.py"), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=env,
                start_new_session=True,
            )
        self.keeper.stdout.readline()

    @property
    def running(self) -> bool:
        return self.keeper.poll() is None

    def tree(self) -> list[psutil.Process]:
        """The program itself first, then its descendants."""
        return psutil.Process(self.keeper.pid).children(recursive=True) if self.running else []

    def stop(self) -> None:
        """Kill everything: nothing here has anything to save."""
        self.keeper.stdin.close()
        self.wait()

    def wait(self) -> int:
        """Until the program has ended; its exit code."""
        code = self.keeper.wait(PATIENCE)
        self.keeper.stdin.close()
        self.keeper.stdout.close()
        return code

    def written(self) -> str:
        return self.log.read_text(errors="replace")


class Ndif:
    """A server for some models; a context manager.

        with Ndif({"local/tiny-neox": directory}, mode="sandboxed") as server:
            subprocess.run(client, env=os.environ | server.env)
            server.kill("redis")
            server.start("redis")

    Args:
        models: directories as `save_pretrained` writes them, by the names "owner/model" that the hub has them under.
        mode: "trusted" runs every request beside the weights. "sandboxed" does as a shared server: a request needs a
            key, and runs in a process of its own that has no weights (unless the key carries the tag "trusted").
        dtype: what the models compute in.
        time_limit: seconds after which a request is ended; None for no limit.
        deploy: models to have running from the start (default: all); the others are deployed when asked for.
        special: what differs for single models, {name: {field of NDIF's DeploymentConfig: value}}, for example
            {"local/tiny-neox": {"dtype": "bfloat16", "execution_timeout_seconds": 2.0, "replicas": 2}}.
        slow: seconds that each sequence of a pass takes at least, by model: what exceeds a limit on any machine.
        settings: further NDIF_… variables of the server's environment.

    Attributes:
        url, hub_url: where clients find the API and the model hub.
        env, trusted_env: what a client's environment needs (read when nnsight and huggingface_hub are first imported),
            with `key` and `trusted_key`: the API keys that "sandboxed" lets in, without and with the tag "trusted".
        seconds: how long the start took, until every model of `deploy` answered.
    """

    def __init__(
        self,
        models: Mapping[str, str | Path],
        mode: str = "trusted",
        dtype: str = "float32",
        time_limit: float | None = None,
        deploy: list[str] | None = None,
        special: Mapping[str, dict] | None = None,
        slow: Mapping[str, float] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is not known; choose one of {', '.join(MODES)}")
        self.mode = mode
        actor = {"NDIF_DEFAULT_DTYPE": dtype, "NDIF_MODEL_IMPORT_PATH": MODES[mode]}
        limit = {"NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": str(time_limit)} if time_limit else {}
        self.place = services.Place(
            models={name: Path(directory).resolve() for name, directory in models.items()},
            deploy=list(models) if deploy is None else deploy,
            special=dict(special or {}),
            slow=dict(slow or {}),
            settings=actor | limit | dict(settings or {}),
        )
        self.key, self.trusted_key = str(uuid.uuid4()), str(uuid.uuid4())
        self.running: dict[str, Process] = {}

    def __enter__(self) -> "Ndif":
        """Start it. Raises Unavailable where it cannot run, RuntimeError if a part does not come up."""
        if reason := missing():
            raise Unavailable(f"an NDIF server CANNOT BE STARTED HERE: {reason}")
        began = time.monotonic()
        self.place.directory = Path(tempfile.mkdtemp(prefix="ndif-", dir="/tmp"))  # for sockets: a short path
        self.place.ports = dict(zip(services.PORTS, free_ports(len(services.PORTS)), strict=True))
        try:
            (self.place.directory / "actors").mkdir()
            self.write_keys({self.key: [], self.trusted_key: ["trusted"]})
            self.start(*SERVICES)
            self.wait_for_models()
        except BaseException:
            self.close()
            raise
        self.seconds = time.monotonic() - began
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End every process and remove the server's files."""
        for process in self.running.values():
            process.stop()
        shutil.rmtree(self.place.directory, ignore_errors=True)

    # ------------------------------------------------------------ for clients

    @property
    def url(self) -> str:
        return self.place.url("api")

    @property
    def hub_url(self) -> str:
        return self.place.url("hub")

    @property
    def client_cache(self) -> Path:
        """Where clients with `env` keep what they take from the hub."""
        return self.place.directory / "client"

    @property
    def env(self) -> dict[str, str]:
        return self._env_with(self.key)

    @property
    def trusted_env(self) -> dict[str, str]:
        return self._env_with(self.trusted_key)

    def _env_with(self, key: str) -> dict[str, str]:
        key = key if self.mode == "sandboxed" else ""
        return services.hub_environment(self.place, "client") | {"NDIF_HOST": self.url, "NDIF_API_KEY": key}

    def status(self) -> dict[str, list[str]]:
        """What the server tells: by its hub name, the state of every replica of a model ("RUNNING", "DEPLOYING", …)."""
        states: dict[str, list[str]] = {}
        for each in json.loads(services.get(f"{self.url}/status", timeout=30))["deployments"].values():
            if "application_state" in each:
                states.setdefault(each.get("repo_id"), []).append(each["application_state"])
        return states

    def crossed(self) -> list[dict[str, float]]:
        """Of each request that ended in the sandbox, in order: the "bytes" that crossed, both ways, and "seconds"."""
        notes = self.place.directory / "crossed.jsonl"
        return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []

    def wait_for_models(self) -> None:
        """Until each model of `deploy` is running. Raises RuntimeError after some minutes."""
        wanted = self.place.deploy

        def ready() -> bool:
            states = self.status()
            return all(set(states.get(name, [])) == {"RUNNING"} for name in wanted)

        _wait(ready, f"not all of {', '.join(wanted)} are running", self.running["ray"])

    # ------------------------------------------------------------ faults and repairs

    def kill(self, name: str, signal: Signals = SIGKILL, model: str | None = None) -> None:
        """Send a signal to all processes of a service or of a part of one (SERVICES, PARTS), or to a model's actors.

        A killed service stays down; SIGSTOP makes it hang, SIGCONT go on.
        """
        if name in SERVICES and signal == SIGKILL:
            self.running[name].stop()
            return
        found = self.processes(name, model)
        if not found:
            raise RuntimeError(f"no process of {name!r} is running")
        for process in found:
            process.send_signal(signal)

    def start(self, *names: str, **settings: str) -> None:
        """Start services that are down and wait until they answer. `settings`: NDIF_… variables from now on."""
        self.place.settings |= settings
        for name in names:
            self._launch(name)
        for name in names:
            self._wait_until_it_answers(name)

    def restart(self, name: str, **settings: str) -> None:
        """Kill a service and start it again, with all that belongs to it."""
        self.kill(name)
        self.start(name, **settings)

    def processes(self, name: str, model: str | None = None) -> list[psutil.Process]:
        """The processes of a service or of a part of one; of model actors, those of a model if one is named."""
        if name in SERVICES:
            return self.running[name].tree()
        if name not in PARTS:
            raise ValueError(f"part {name!r} is not known; choose one of {', '.join((*SERVICES, *PARTS))}")
        service, pattern = PARTS[name]
        found = [each for each in self.running[service].tree()[1:] if re.search(pattern, _title(each))]
        return [each for each in found if model is None or self._serves(each, model)]

    def _serves(self, process: psutil.Process, model: str) -> bool:
        """Whether a model's actor is that of a certain model, as it has noted."""
        note = self.place.directory / "actors" / str(process.pid)
        return note.exists() and note.read_text() == services.model_key(model)

    def write_keys(self, keys: Mapping[str, list[str]]) -> None:
        """Let in these API keys and no others, each with its tags."""
        (self.place.directory / "keys.json").write_text(json.dumps(keys))

    def _launch(self, name: str) -> Process:
        if name in self.running and self.running[name].running:
            raise RuntimeError(f"{name} is already running")
        command = services.COMMANDS[name](self.place)
        log = self.place.directory / f"{name}.log"
        self.running[name] = Process(command, services.environment(self.place), log)
        return self.running[name]

    def _wait_until_it_answers(self, name: str) -> None:
        process = self.running[name]

        def ready() -> bool:
            services.ask(self.place, name)
            return True

        _wait(ready, f"{name} does not answer", process)
        if name == "ray" and self._launch("controller").wait():
            raise RuntimeError(
                f"NDIF's controller did not start:\n{self.running['controller'].written()[-2000:]}"
            )


def _wait(ready: Callable[[], bool], problem: str, process: Process) -> None:
    """Until `ready()`; no answer, or a broken one, means not yet.

    Raises RuntimeError when the process ends or patience does.
    """
    limit = time.monotonic() + PATIENCE
    while process.running and time.monotonic() < limit:
        try:
            if ready():
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.1)
    raise RuntimeError(f"{problem}; last written:\n{process.written()[-2000:]}")


def _title(process: psutil.Process) -> str:
    """A process's command line; empty if it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, between those that Ray's client and the system choose: free until they are used."""
    sockets: list[socket.socket] = []
    while len(sockets) < count:
        each = socket.socket()
        try:
            each.bind(("127.0.0.1", random.randrange(24_000, 32_000)))
            sockets.append(each)
        except OSError:
            each.close()
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
