"""NDIF's sandboxed runners, forked from a process that has imported what they run: NDIF's own each import it anew.

usage: python runners.py PEERS MODEL_KEY

For each line of its standard input, the path of a socket, a runner is forked that serves there as NDIF's own does; its
process id is written to standard output. It has the environment that NDIF gives to runners, and no weights.
"""

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from threading import Lock

TURN = Lock()


class Forked:
    """Stands in for `subprocess.Popen` where NDIF starts a runner: what it uses of that."""

    def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
        python, _, _, path, peers, model_key, _ = command
        with TURN:
            mother = _mother(python, peers, model_key, tuple(env.items()))
            mother.stdin.write(f"{path}\n")
            mother.stdin.flush()
            self._handle = os.pidfd_open(int(mother.stdout.readline()))

    def __del__(self) -> None:
        os.close(self._handle)

    def poll(self) -> int | None:
        return 0 if select.select([self._handle], [], [], 0)[0] else None

    def wait(self, timeout: float | None = None) -> None:
        if not select.select([self._handle], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a runner", timeout)

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            signal.pidfd_send_signal(self._handle, number)


@cache
def _mother(python: str, peers: str, model_key: str, env: tuple[tuple[str, str], ...]) -> subprocess.Popen:
    command, pipe = [python, __file__, peers, model_key], subprocess.PIPE
    return subprocess.Popen(command, env=dict(env), stdin=pipe, stdout=pipe, text=True)


def main(peers: str, model_key: str) -> None:
    from ndif.services.ray.sandbox import nns

    nns.load_meta_model(model_key)
    for line in sys.stdin:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        pid = os.fork()
        if not pid:
            _serve(line.rstrip("\n"), int(peers))
        print(pid, flush=True)


def _serve(path: str, peers: int) -> None:
    """Be a runner, until this process is ended."""
    from ndif.services.ray.sandbox.runner import Runner, die_with_parent

    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nothing, stream)
    die_with_parent()
    Runner(path, peers).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
