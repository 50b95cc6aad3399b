"""Run a command for as long as this process's standard input stays open, then end it and all that it started.

usage: python keeper.py COMMAND ARGUMENT ...

Whoever starts a keeper holds the other end of that pipe. However it ends, by kill -9 too, the pipe closes and nothing
is left running. Processes whose own parent ends become the keeper's children (Linux's child subreaper), so daemons and
processes in sessions of their own do not escape. The command's pid is written to standard output.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading

import psutil

PR_SET_CHILD_SUBREAPER = 36


def keep(command: list[str]) -> int:
    """Run the command to its end, or to the pipe's; then leave no descendant. Gives the command's exit code."""
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("this system does not let a process adopt its descendants (PR_SET_CHILD_SUBREAPER)")
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: child.kill())
    print(child.pid, flush=True)
    threading.Thread(target=_end_with_the_pipe, args=[child.pid], daemon=True).start()
    ended = status = 0
    while ended != child.pid:
        ended, status = os.wait()
    _end_descendants()
    return os.waitstatus_to_exitcode(status)


def _end_with_the_pipe(pid: int) -> None:
    os.read(0, 1)
    os.kill(pid, signal.SIGKILL)


def _end_descendants() -> None:
    """Those that a killed process leaves behind are adopted before it can be waited for: no generation is missed."""
    while children := psutil.Process().children():
        for child in children:
            child.kill()
        os.wait()


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
