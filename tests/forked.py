"""What a process starts its workers by, as a fork of itself: it has imported all, which takes a new Python seconds."""

import os
import signal
from contextlib import suppress
from multiprocessing import util

from selfrepair_nn.ending import ENDING

HELPER = "from multiprocessing.forkserver import main"
"""How the program begins that Python gives to its helper."""

_spawned = util.spawnv_passfds


def fork_helpers() -> None:
    """From now on the helper that this process starts is such a fork, with all that it does and hears as ever."""
    util.spawnv_passfds = _started


def _started(path: bytes, args: list[str], passed: list[int]) -> int:
    """As Python starts a helper: the number of its process."""
    program = args[-1]
    if not program.startswith(HELPER):
        return _spawned(path, args, passed)
    if pid := os.fork():
        return pid
    try:
        _as_if_new({0, 1, 2, *passed})
        exec(program, {})
    finally:
        os._exit(1)


def _as_if_new(kept: set[int]) -> None:
    """No file stays open but these, and no signal is heard in the way of the process that it was forked from."""
    for number in ENDING:
        if callable(signal.getsignal(number)):
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
    for each in {int(name) for name in os.listdir("/proc/self/fd")} - kept:
        with suppress(OSError):
            os.close(each)
