"""Which GPU a worker takes, where a machine has several."""

import os
import tempfile
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

_held: list[FileLock] = []


def own_device(device: str) -> str:
    """Where the worker of this process computes: on a GPU of its own, where it sees several and none is named."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus < 2 or device not in ("auto", "cuda"):
        return device
    return f"cuda:{own_index(gpus)}"


def own_index(gpus: int) -> int:
    """A GPU that no other worker of this machine has; where each is taken, one that the fewest have.

    It is taken by a lock, for as long as the process lives or until `let_go`: who starts workers on many machines does
    not tell them which of a machine's they are.
    """
    folder = (
        Path(tempfile.gettempdir()) / f"selfrepair_nn-gpus-{os.getuid() if hasattr(os, 'getuid') else 'all'}"
    )
    folder.mkdir(mode=0o700, exist_ok=True)
    places = ((turn, index) for turn in count() for index in range(gpus))
    return next(index for turn, index in places if _taken(folder / f"{index}-{turn}.lock"))


def _taken(file: Path) -> bool:
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    _held.append(lock)
    return True


def let_go() -> None:
    """Leave this process's GPU to others."""
    while _held:
        _held.pop().release()
