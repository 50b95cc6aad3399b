"""`python -m benchmarks [--quick] [--json FILE]`: one table of speed and memory. See README.md beside this file."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import argparse
import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import selfrepair_nn as sr
from benchmarks.footprint import by_heads, footprint, imports
from benchmarks.speed import measure
from benchmarks.table import table
from selfrepair_nn.provenance import machine, now, versions
from tests.smollm2 import Unavailable, smollm2

SIZES = [16, 64, 256]
QUICK = {"layers": "3,11,18,26", "prompts": 8}
"""Four of SmolLM2's thirty layers, of the mean depth of all, and half the prompts."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"SmolLM2: less, but as deep: {QUICK}")
    parser.add_argument("--only", choices=("smollm2", "tiny-neox"), help="one model instead of both")
    parser.add_argument("--repeats", type=int, help="default: 3, of SmolLM2 with all layers 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        found = {"when": now(), "machine": machine(), "versions": versions(), "imports": imports()}
        found["models"] = {}
        if asked.only != "smollm2":
            found["models"]["tiny-neox"] = tiny_neox(asked.repeats or 3)
        if asked.only != "tiny-neox":
            with _reported():
                found["models"]["smollm2"] = real(str(smollm2()), asked.quick, asked.repeats)
    print(table(found))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


def tiny_neox(repeats: int) -> dict[str, Any]:
    found = measure(_load("tiny-neox"), ":", SIZES[0], repeats)
    found |= footprint("tiny-neox", ",".join(f"{layer}.*" for layer in range(8)), ":", SIZES)
    return found | by_heads("tiny-neox", 8, [2, 4, 8], SIZES[1])


def real(directory: str, quick: bool, repeats: int | None) -> dict[str, Any]:
    what = QUICK if quick else {"layers": ":", "prompts": SIZES[0]}
    found = measure(_load(directory), **what, repeats=repeats or (3 if quick else 1))
    spread, sizes = ("0.*,29.*", SIZES[:2]) if quick else ("0.*,15.*,29.*", SIZES)
    return found | footprint(directory, spread, "28:30", sizes)


def _load(name: str):
    return sr.load(name, device="cpu")


@contextlib.contextmanager
def _reported():
    try:
        yield
    except Unavailable as error:
        print(f"SmolLM2 is left out: {error}")


main()
