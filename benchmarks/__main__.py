"""`python -m benchmarks [--quick] [--json FILE]`: one table of speed and memory. See README.md beside this file."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import argparse
import contextlib
import json
import logging
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import selfrepair_nn as sr
from benchmarks.counts import counts
from benchmarks.fewer import fewer
from benchmarks.footprint import by_depth, by_heads, child, footprint
from benchmarks.gpu import on_gpu
from benchmarks.plans import as_table, plans
from benchmarks.speed import measure, through_transformerlens
from benchmarks.table import table
from benchmarks.waiting import waiting
from benchmarks.wide import PROMPTS, store_at_scale
from selfrepair_nn.provenance import machine, now, versions
from tests.smollm2 import Unavailable, smollm2

PARTS = ("tiny-neox", "smollm2", "transformerlens", "waiting", "fewer", "store", "counts", "gpu", "plans")
SIZES = [16, 64, 256]
QUICK = {"layers": "3,11,18,26", "prompts": 8}
"""Four of SmolLM2's thirty layers, of the mean depth of all, and half the prompts."""
HOOKED = {"layers": "7,22", "prompts": 8}
"""What TransformerLens gets of SmolLM2, for it takes so long: two layers of the same mean depth."""

FEWER = {
    "tiny-neox": {"layers": ":", "tokens": 16384, "texts": [16384, 32768, 65536], "goals": [0.1, 0.05]},
    "smollm2": {"layers": "23,26,29", "tokens": 16384, "texts": [16384], "goals": [0.1]},
}
"""What is run as a whole and with less: of SmolLM2 late layers only, since a whole run takes so long."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"SmolLM2: less, but as deep: {QUICK}; the store: a 16th")
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    parser.add_argument("--repeats", type=int, help="default: 3, of SmolLM2 with all layers 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        found = {"when": now(), "machine": machine(), "versions": versions()} | collected(asked)
    print("\n\n".join([table(found), *([as_table(found["plans"])] if "plans" in found else [])]))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


def collected(asked: argparse.Namespace) -> dict[str, Any]:
    """The parts that were asked for."""
    parts = [asked.only] if asked.only else PARTS
    found: dict[str, Any] = {"waiting": waiting()} if "waiting" in parts else {}
    if "store" in parts:
        found["store"] = store_at_scale(prompts=PROMPTS // 16 if asked.quick else PROMPTS)
    if "counts" in parts:
        found["counts"] = counts()
    if "plans" in parts:
        found["plans"] = plans()
    if "gpu" in parts:
        found["gpu"] = on_gpu(asked.quick)
    found["models"] = models = {}
    if "tiny-neox" in parts:
        models["tiny-neox"] = tiny_neox(asked.repeats or 3)
    with _reported():
        if "smollm2" in parts:
            models["smollm2"] = real(str(smollm2()), asked.quick, asked.repeats)
        if "transformerlens" in parts:
            models["smollm2"] = models.get("smollm2", {}) | through(asked.repeats or 3)
        if "fewer" in parts:
            for name, directory in {"tiny-neox": "tiny-neox", "smollm2": str(smollm2())}.items():
                spared = {"fewer": fewer(_load(directory), **FEWER[name])}
                models[name] = models.get(name, {}) | spared
    return found


def tiny_neox(repeats: int) -> dict[str, Any]:
    found = measure(_load("tiny-neox"), SIZES[0], repeats, layers=":")
    found |= footprint("tiny-neox", ",".join(f"{layer}.*" for layer in range(8)), ":", SIZES)
    found |= by_depth("tiny-neox", [6, 4, 2, 0], SIZES[2])
    return found | by_heads("tiny-neox", 8, [2, 4, 8], SIZES[1])


def real(directory: str, quick: bool, repeats: int | None) -> dict[str, Any]:
    what = QUICK if quick else {"layers": ":", "prompts": SIZES[0]}
    found = measure(_load(directory), **what, repeats=repeats or (3 if quick else 1))
    spread, sizes = ("0.*,29.*", SIZES[:2]) if quick else ("0.*,15.*,29.*", SIZES)
    found |= by_depth(directory, [26, 18, 10, 2], QUICK["prompts"])
    return found | footprint(directory, spread, "28:30", sizes)


def through(repeats: int) -> dict[str, Any]:
    """The baselines through TransformerLens; their peaks with one head of the first and one of the last layer."""
    if not find_spec("transformer_lens"):
        raise Unavailable(
            "TransformerLens is not here: pip install -r benchmarks/requirements-transformerlens.txt"
        )
    logging.disable(logging.WARNING)
    directory = str(smollm2())
    found = through_transformerlens(_load(directory), **HOOKED, repeats=repeats)
    peaks = {
        name: child(name, directory, HOOKED["prompts"], heads="0.0,29.8") for name in ("published", "careful")
    }
    found["peak_mib"] = {name: peak["peak_mib"] for name, peak in peaks.items()}
    return {"transformerlens": found}


def _load(name: str):
    return sr.load(name, device="cpu")


@contextlib.contextmanager
def _reported():
    try:
        yield
    except Unavailable as error:
        print(f"left out: {error}")


main()
