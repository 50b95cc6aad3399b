"""Where a result comes from: versions, source state and machine type. Never a name, a key or an address."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("selfrepair_nn", "nnsight", "torch", "transformers", "numpy", "xarray", "zarr")

CONVENTIONS = "CF-1.11, ACDD-1.3"
"""Whose global attributes a store has: Climate and Forecast, and the Attribute Convention for Data Discovery."""

PAPER = "Rushing and Nanda (2024), Explorations of Self-Repair in Language Models, arXiv:2402.15390"


def discovery(source: str, command: str) -> dict[str, str]:
    """Global attributes that tell any reader what a store is: of what `source`, how to cite it, its history."""
    package = f"selfrepair_nn {_version('selfrepair_nn')}"
    return {
        "Conventions": CONVENTIONS,
        "source": f"{source}; {package}",
        "references": f"{PAPER}; {package}",
        "history": event(command),
    }


def event(command: str) -> str:
    """A line of a store's history: the time, and the command as one line."""
    return f"{now()} {' '.join(command.split())}"


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of every package the numbers depend on."""
    return {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine() -> str:
    """Operating system and processor type."""
    return f"{platform.system()} {platform.machine()}"


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout this package runs from, and whether it was changed; None for an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    return {"commit": commit, "changed": bool(_git(root, "status", "--porcelain"))} if commit else None


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
