"""How much of a whole run an answer needs: ablated head-tokens and CPU seconds with `--select` and `--until-ci`."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import selfrepair_nn as sr
from benchmarks.speed import cpu
from selfrepair_nn.analysis import by_head, by_layer, top_share
from selfrepair_nn.confidence import Tally, clusters_of


def fewer(model: Any, layers: str, tokens: int, texts: list[int], goals: list[float]) -> dict[str, Any]:
    """A whole run of `tokens`, what may be left out of it, and how that grows with the text.

    "widest" are the widest half-widths that the whole run itself reaches, of its layers' and of its heads' means:
    what the other runs are asked for, so that their answer is as good. "grown" are, by half-widths that are asked for
    (`goals`, in logits), runs on `texts` of so many tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        choices = {"model": model, "layers": layers, "out": Path(folder), "progress": False}
        whole, of_whole = _run(choices, tokens)
        layers_known, heads_known = known(whole)
        widest = {"layers": _widest(layers_known), "heads": _widest(heads_known)}
        top, of_top = _run(choices, tokens, select="top-share")
        until = {what: _run(choices, tokens, until_ci=goal, ci_of=what) for what, goal in widest.items()}
        grown = [_grown(choices, texts, goal) for goal in goals]
    return {
        "heads": int(whole.selected.sum()),
        "prompts": whole.sizes["prompt"],
        "length": whole.sizes["position"] + 1,
        "whole": of_whole,
        "top_share": of_top | {"differs": differs(whole, top)},
        "widest": widest,
        "layers": until["layers"][1] | agreeing(until["layers"][0], "layer", layers_known[0]),
        "each_head": until["heads"][1] | agreeing(until["heads"][0], "", heads_known[0]),
        "texts": texts,
        "grown": dict(zip(map(str, goals), grown, strict=True)),
    }


def _widest(known_: tuple[np.ndarray, np.ndarray]) -> float:
    """The widest of half-widths, of those that have any."""
    return float(known_[1][np.isfinite(known_[1])].max())


def _run(choices: dict[str, Any], tokens: int, **asked: Any) -> tuple[xr.Dataset, dict[str, float]]:
    """The store of a run, and what it took."""
    path = choices["out"] / f"{tokens}{''.join(map(str, asked.values()))}.zarr"
    ds, seconds = cpu(lambda: sr.run("heads", **choices | asked | {"out": path}, tokens=tokens))
    ds = ds.load()  # its folder is gone when it is looked at
    found = {"head_tokens": head_tokens(ds), "cpu": seconds}
    print(f"  {choices['model'].name}, {tokens} tokens, {asked or 'all'}: {found}", flush=True)
    return ds, found


def _grown(choices: dict[str, Any], texts: list[int], goal: float) -> dict[str, list[float]]:
    """Head-tokens of a whole run for each that is ablated, and the CPU seconds, as the text grows."""
    saved, seconds = [], []
    for tokens in texts:
        ds, found = _run(choices, tokens, until_ci=goal, ci_of="layers")
        whole = int(ds.selected.sum()) * ds.sizes["prompt"] * ds.sizes["position"]
        saved.append(whole / found["head_tokens"])
        seconds.append(found["cpu"])
    return {"saved": saved, "cpu": seconds}


def head_tokens(ds: xr.Dataset) -> int:
    """Tokens that were ablated, over all heads: of every prompt those up to the last one that is stored."""
    positions = np.arange(1, ds.sizes["position"] + 1)
    return int(sum((np.isfinite(layer) * positions).max(-1).sum() for layer in ds.self_repair.values))


def known(ds: xr.Dataset) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Mean self-repair on the top share and the half-width of its interval, of each layer and of each head."""
    clusters, top = clusters_of(ds.document.values), top_share(ds).values
    layers, heads, *rest = top.shape
    tally = Tally.empty(layers * heads, clusters)
    tally.add(ds.self_repair.values.reshape(-1, *rest), top.reshape(-1, *rest), clusters)
    return tally.of_groups(np.repeat(np.arange(layers), heads)), (tally.mean, tally.half_width)


def differs(whole: xr.Dataset, top: xr.Dataset) -> float:
    """Largest difference of any statistic of the top share."""
    found = 0.0
    for summary in (by_head, by_layer):
        one, other = str(summary(whole)), str(summary(top))
        for name in one.data_vars:
            if name.startswith("top_"):
                found = max(found, float(abs(one[name].astype(float) - other[name]).max()))
    return found


def agreeing(ds: xr.Dataset, what: str, means: np.ndarray) -> dict[str, Any]:
    """How many of the estimates have the whole run's mean in their interval, and the largest difference."""
    prefix = f"{what}_" if what else ""
    off = np.abs(ds[f"{prefix}estimate"].values.ravel() - means)
    return {
        "agree": [int((off <= ds[f"{prefix}half_width"].values.ravel()).sum()), len(off)],
        "differs": float(off.max()),
        "prompts_used": float(ds.prompts_used.values[ds.selected.values].mean()),
    }
