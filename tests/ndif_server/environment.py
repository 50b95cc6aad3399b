"""What the server needs of this machine: Redis from its system, the rest in a virtual environment of its own.

`python -m tests.ndif_server install` makes both ready.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
VENV = HERE.parents[1] / ".cache" / "ndif-venv"
INSTALL = "python -m tests.ndif_server install"


class Unavailable(RuntimeError):
    """The server cannot run here; says what is missing and how to get it."""


def missing() -> str | None:
    """Why the server cannot start here as things are, or None."""
    if sys.platform != "linux":
        return f"it needs Linux, this is {sys.platform}"
    if not shutil.which("redis-server"):
        return f"redis-server is not installed: {INSTALL} (as root), or your system's package manager"
    if not _is_installed():
        return f"its environment is not installed (about 1.7 GB): {INSTALL}"
    return None


def install() -> None:
    """Make ready what is missing; nothing is done twice.

    Raises:
        Unavailable: something cannot be installed.
    """
    if sys.platform == "linux" and not shutil.which("redis-server"):
        _install_redis()
    if sys.platform == "linux" and not _is_installed():
        VENV.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(VENV.parent / ".ndif-venv.lock"):
            if not _is_installed():
                _install_environment()
    if reason := missing():
        raise Unavailable(reason)


def _is_installed() -> bool:
    installed = VENV / "installed.txt"
    return installed.is_file() and installed.read_bytes() == REQUIREMENTS.read_bytes()


def _install_redis() -> None:
    if os.geteuid() or not shutil.which("apt-get"):
        raise Unavailable("redis-server is not installed, and only root on Debian can be helped: install it")
    _run(["apt-get", "update", "-qq"])
    _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "redis-server"])


def _install_environment() -> None:
    """Exactly the listed versions; NDIF asks for Python 3.12, and what is used of it runs on 3.11."""
    _run([sys.executable, "-m", "venv", "--clear", str(VENV)])
    options = [
        "--quiet",
        "--no-compile",
        "--no-deps",
        "--ignore-requires-python",
        "--disable-pip-version-check",
    ]
    _run([str(VENV / "bin" / "python"), "-m", "pip", "install", *options, "-r", str(REQUIREMENTS)])
    shutil.copy(REQUIREMENTS, VENV / "installed.txt")


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Unavailable(f"{' '.join(command)} failed: {last}")
