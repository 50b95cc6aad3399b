"""A store as large as a whole run of a large model: a thousand heads, a million tokens. What it costs to keep and read.

`python -m benchmarks --only store` writes one, made up by `simulate`, through the package's own `Store`, measures it,
each reading in a process of its own, and removes it. One block's chunks are made and written; those of the others are
the same files under further names (hard links), with notes and marks of their own. So a store of 44 GB takes the disk
of one block, all of it is read and checked as ever, and what reading takes is the processor's time, not the disk's.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from selfrepair_nn.contents import notes_of
from selfrepair_nn.files import sealed, unsealed
from selfrepair_nn.integrity import contents_of
from selfrepair_nn.simulate import simulate_heads
from selfrepair_nn.store import Store

LAYERS, HEADS, PROMPTS, POSITIONS = 32, 32, 8192, 127
READINGS = {
    "open": "sr.open_store(path)",
    "by_head": "sr.by_head(sr.open_store(path))",
    "by_layer": "sr.by_layer(sr.open_store(path))",
    "a figure": "sr.plot(sr.open_store(path), folder, ['self_repair_by_layer'])",
    "the page": "sr.write_report(sr.open_store(path), folder + '/page.html')",
    "verify": "sr.verify(path)",
}
CHILD = """
import json, resource, sys, time
import selfrepair_nn as sr
path, folder = sys.argv[1:3]
sr.analysis, sr.plot, sr.open_store, sr.verify
began = time.process_time()
{reading}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({{"cpu": time.process_time() - began, "peak_mib": peak}}))
"""


def store_at_scale(layers: int = LAYERS, prompts: int = PROMPTS, block: int = 4) -> dict[str, Any]:
    """Files, bytes, and what it takes to read a store of so many layers of HEADS heads."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wide.zarr"
        found = {"cases": layers * HEADS, "tokens": prompts * POSITIONS, "block": block}
        found |= write_wide_store(path, layers, prompts, block) | sizes(path)
        for name, reading in READINGS.items():
            found[name] = read(path, folder, reading)
            print(f"  {name}: {found[name]}", flush=True)
    head_tokens = found["cases"] * found["tokens"]
    cost = {"bytes": found["bytes"], "write_cpu": found["write_cpu"] * prompts / block}
    cost |= {name: found[name]["cpu"] for name in READINGS}
    found["for_a_head_token"] = {name: value / head_tokens for name, value in cost.items()}
    return found


def write_wide_store(path: Path, layers: int, prompts: int, block: int) -> dict[str, float]:
    """Write a complete store of so many prompts. Returns what writing one block took, in seconds."""
    labels = simulate_heads(1, 1, prompts, POSITIONS)
    some = simulate_heads(layers, HEADS, max(2, block), POSITIONS).isel(prompt=slice(block))
    axes = {name: some[name].values for name in ("layer", "head", "head_label")}
    store = Store.create(
        path,
        {name: values.values for name, values in labels.coords.items()} | axes,
        {name: None if "prompt" in values.dims else values.values for name, values in some.items()},
        prompts_per_chunk=block,
        precision="float32",
        attributes=some.attrs,
    )
    values = {name: v.values for name, v in some.items() if "prompt" in v.dims and name != "done"}
    began, cpu = perf_counter(), os.times()
    store.write_prompts(slice(0, block), values, some.selected.values)
    spent = os.times()
    taken = {"write_s": perf_counter() - began, "write_cpu": sum(spent[:2]) - sum(cpu[:2])}
    _repeat(path, prompts // block)
    return taken


def _repeat(path: Path, blocks: int) -> None:
    """The first block's files under the names of all others, with the notes that each block has."""
    contents = contents_of(path)
    noted = unsealed(path / notes_of(0), contents.attributes["id"])
    first = [*contents.block_files(0), ("done", contents.mark(0))]
    for index in range(1, blocks):
        here = [*contents.block_files(index), ("done", contents.mark(index))]
        own = {}
        for (_, old), (_, new) in zip(first, here, strict=True):
            (path / new).parent.mkdir(parents=True, exist_ok=True)
            (path / new).unlink(missing_ok=True)
            os.link(path / old, path / new)
            own[new] = noted[old]
        (path / notes_of(index)).write_bytes(sealed(own, contents.attributes["id"]))


def sizes(path: Path) -> dict[str, int]:
    """Files and bytes, each name of a file counted."""
    found = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    return {"files": len(found), "bytes": sum(found), "largest": max(found)}


def read(path: Path, folder: str, reading: str) -> dict[str, float]:
    """CPU seconds, and the process's peak memory in MiB."""
    order = [sys.executable, "-W", "ignore", "-c", CHILD.format(reading=reading), str(path), folder]
    done = subprocess.run(order, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{reading} failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
