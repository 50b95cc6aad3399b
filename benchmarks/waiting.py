"""What a user waits for: imports, the command line, a first figure, a figure of a large store. CPU seconds."""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.large import TOKENS, write_large_store

REPEATS = 5
LIBRARIES = "selfrepair_nn.run, selfrepair_nn.load; import selfrepair_nn.tracing.jobs, transformers"
TORCH = "import sys, selfrepair_nn; sys.exit('torch' in sys.modules)"


def waiting() -> dict[str, Any]:
    """Medians of the short ones; the figures are drawn once."""
    with tempfile.TemporaryDirectory() as folder:
        return starts() | first_figure(Path(folder)) | large_figure(Path(folder))


def starts() -> dict[str, Any]:
    """Starting: Python alone, the package, all that a run needs, and the commands that compute nothing."""
    commands = {
        "python": ("-c", ""),
        "import": ("-c", "import selfrepair_nn"),
        "import_for_run": ("-c", f"import selfrepair_nn; {LIBRARIES}"),
        "help": ("-m", "selfrepair_nn", "--help"),
        "recipes": ("-m", "selfrepair_nn", "recipes"),
    }
    found = {name: median(spent(*command) for _ in range(REPEATS)) for name, command in commands.items()}
    loads = subprocess.run([sys.executable, "-c", TORCH], check=False).returncode != 0
    return found | {"import_loads_torch": loads}


def first_figure(folder: Path) -> dict[str, float]:
    """What `make demo` does once its environment is there: every head of tiny-neox, and the figures."""
    store = str(folder / "first.zarr")
    run = spent("-m", "selfrepair_nn", "run", "heads", "--model", "tiny-neox", "--out", store)
    return {"first_run": run, "first_figure": run + spent("-m", "selfrepair_nn", "plot", store)}


def large_figure(folder: Path) -> dict[str, Any]:
    """One figure, and all of the recipe's, from a simulated store on disk."""
    path = folder / "large.zarr"
    write_large_store(path)
    plot = ("-m", "selfrepair_nn", "plot", str(path))
    found = {"large_tokens": TOKENS, "large_mib": _mib(path)}
    found["large_figure"] = spent(*plot, "--figure", "self_repair_by_layer")
    found["large_figures"] = spent(*plot)
    return found


def spent(*arguments: str) -> float:
    """CPU seconds of a Python process of its own, with whatever it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _mib(path: Path) -> float:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 2**20
