"""One run of one approach in a process of its own: `python -m benchmarks.child JSON` prints what it took, as JSON.

The JSON holds approach ("run", or the name of one of Case's), model, prompts, and layers or heads.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

import selfrepair_nn as sr
from benchmarks.speed import LENGTH, Case
from selfrepair_nn.store import Store


def peak_mib() -> float:
    """Largest resident memory so far. Linux tells it in VmHWM; its ru_maxrss may still be the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def timed(owner, name: str, spent: list[float]) -> None:
    """Let every call of `owner.name` add its CPU seconds to `spent`."""
    inner = getattr(owner, name)

    def outer(*args, **kwargs):
        start = time.process_time()
        try:
            return inner(*args, **kwargs)
        finally:
            spent.append(time.process_time() - start)

    setattr(owner, name, outer)


def main(approach: str, model: str, prompts: int, **selection: str) -> dict[str, float]:
    torch.set_num_threads(1)
    case = Case(sr.load(model, device="cpu", check=False), prompts, selection)
    found = {"loaded_mib": peak_mib(), "heads": len(case.heads), "prompts": prompts, "length": LENGTH}
    start = time.process_time()
    if approach == "run":
        found |= run(case.choices)
    else:
        getattr(case, approach)()
    return found | {"cpu": time.process_time() - start, "peak_mib": peak_mib()}


def run(choices) -> dict[str, float]:
    """The package's own run into a store: its size, and the CPU seconds spent in writing it."""
    writes: list[float] = []
    timed(Store, "write_prompts", writes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        sr.run("heads", **choices, out=str(path), progress=False).close()
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    return {"store_bytes": size, "writes_cpu": sum(writes)}


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
