"""The command as a user of an NDIF server runs it: each in a process of its own, forked from one that has imported all.

That one is started with the server's environment, since huggingface_hub and nnsight read theirs when they are imported.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil
from standing import stand
from terminal import Outcome

TESTS = Path(__file__).parent
RUN = ["--layers", "4:6", "--tokens", 1024, "--length", 32, "--batch-size", 2]
"""How much a run does that is to be disturbed: enough jobs for that, and small ones."""

SECONDS = 900
"""More than any command here takes, on a slow machine."""

IMPORTED = (
    "nnsight.modeling.transformers",
    "selfrepair_nn.backends.ndif.served",
    "selfrepair_nn.running.run",
    "selfrepair_nn.text",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "transformers.models.llama.modeling_llama",
)
"""What takes long to import, and is the same for every command."""


class Far:
    """Starts commands that see the servers and hubs that `env` names; a context manager."""

    def __init__(self, env: dict[str, str], folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._key = {"NDIF_API_KEY": env.get("NDIF_API_KEY", "")}  # nnsight would keep the importing one's
        paths = {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
        paths |= {"NNSIGHT_CONFIG": str(folder / "none")}
        self._mother = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env=os.environ | env | paths | {"NDIF_API_KEY": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Far":
        return self

    def __exit__(self, *_: object) -> None:
        self._mother.stdin.close()
        self._mother.wait(SECONDS)
        self._mother.stdout.close()

    def start(self, *arguments: object, blocks: int | None = None, **env: str) -> "Command":
        """`selfrepair ARGUMENTS` in a new process, with more of an environment.

        Once it has stored so many `blocks` it stands still, until `go_on`.
        """
        self._count += 1
        out, err, go = (self._folder / f"{self._count}.{name}" for name in ("out", "err", "go"))
        request = {
            "argv": list(map(str, arguments)),
            "out": str(out),
            "err": str(err),
            "env": self._key | env,
            "stand": None if blocks is None else (blocks, str(go)),
        }
        return Command(self, self._asked(request), out, err, go)

    def run(self, *arguments: object, **env: str) -> Outcome:
        """The same, and wait for it."""
        return self.start(*arguments, **env).wait()

    def ended(self, pid: int) -> int:
        """The exit code of a process that has ended, minus the signal if one killed it."""
        return self._asked({"wait": pid})

    def _asked(self, request: dict) -> int:
        self._mother.stdin.write(json.dumps(request) + "\n")
        self._mother.stdin.flush()
        return int(self._mother.stdout.readline())


class Command:
    """One such process."""

    def __init__(self, far: Far, pid: int, out: Path, err: Path, go: Path) -> None:
        self._far, self.pid, self._out, self._err, self._go = far, pid, out, err, go

    @property
    def running(self) -> bool:
        return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE

    @property
    def said(self) -> str:
        """What it has written to stderr so far."""
        return self._err.read_text() if self._err.exists() else ""

    def until(self, condition, seconds: float = SECONDS) -> None:
        """Wait until `condition()`; AssertionError if the process ends before that."""
        limit = time.monotonic() + seconds
        while not condition():
            assert self.running, f"ended too early: {self.wait()}"
            assert time.monotonic() < limit, f"nothing happened: {self.said}"
            time.sleep(0.02)

    def go_on(self) -> None:
        self._go.touch()

    def send(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = SECONDS) -> Outcome:
        """Its outcome; AssertionError, and its end, if it still runs after `seconds`."""
        limit = time.monotonic() + seconds
        while self.running and time.monotonic() < limit:
            time.sleep(0.02)
        late = self.running
        if late:
            self.send()
        code = self._far.ended(self.pid)
        assert not late, f"still running after {seconds} s: {self.said}"
        return Outcome(code, self._out.read_text(), self.said)


def _fork(request: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(request["env"])
    sys.argv = ["selfrepair", *request["argv"]]
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 0
    try:
        from selfrepair_nn.cli import main

        if request["stand"]:
            blocks, go = request["stand"]
            stand(blocks, Path(go))
        main()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _mother() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        request = json.loads(line)
        replies.write(f"{_ended(request['wait']) if 'wait' in request else _fork(request)}\n")


def _ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    _mother()
