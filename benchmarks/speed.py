"""CPU time of every approach on the same heads, tokens and partners, interleaved in one process with one thread."""

import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch

import selfrepair_nn as sr
from benchmarks.baselines import naive, suffix
from benchmarks.parts import Parts
from selfrepair_nn.equations import complete
from selfrepair_nn.execution.backends import backend
from selfrepair_nn.execution.experiment import prepare
from selfrepair_nn.options import Options
from selfrepair_nn.tracing.jobs import ablation_job

LENGTH = 64
GEMM = 2048


def cpu(work) -> tuple[Any, float]:
    """What `work()` returns, and the CPU seconds of this process that it took."""
    start = time.process_time()
    return work(), time.process_time() - start


@dataclass(frozen=True)
class Case:
    """One model and what is ablated in it; its methods are the approaches, named as in the table."""

    model: Any
    layers: str
    prompts: int

    @property
    def choices(self):
        tokens = self.prompts * LENGTH
        return {"model": self.model, "layers": self.layers, "tokens": tokens, "length": LENGTH}

    @cached_property
    def experiment(self):
        return prepare("heads", Options(**self.choices))

    @cached_property
    def heads(self):
        return [(head.layer, head.head) for head in self.experiment.heads]

    @cached_property
    def plain(self):
        """Module, tokens, partners and heads: what the baselines take."""
        tokens = torch.from_numpy(self.experiment.prompts.tokens)
        return self.model.nn._module, tokens, torch.from_numpy(self.experiment.partners), self.heads

    def naive(self):
        return naive(*self.plain)

    def suffix(self):
        return suffix(*self.plain, rows=self.experiment.options.rows)

    def job(self):
        """The engine alone, unit by unit: no store, no noise floor."""
        runner, work = backend("local", self.model), self.experiment.work
        plan = work.graph.plan(self.model.layout) | {"rows": work.rows}
        found = [runner(ablation_job, self.experiment.arrays(block), plan) for block in work.units]
        axis = {name: value.dim() - 2 for name, value in found[0].items()}
        return {name: torch.cat([f[name] for f in found], axis[name]) for name in axis}

    def run(self):
        """Everything but loading the model: preparation, noise floor, engine, store."""
        with tempfile.TemporaryDirectory() as folder:
            sr.run("heads", **self.choices, out=str(Path(folder) / "run.zarr"), progress=False).close()

    @property
    def flops(self):
        """Of the linear maps that every ablation has to go through: from its layer's MLP on, no vocabulary."""
        parts = Parts(self.model.nn._module)
        mlps = [_linear(layer.mlp) for layer in parts.layers]
        layers = [_linear(layer) for layer in parts.layers]
        first = [0] * len(mlps) if parts.parallel else mlps
        per_token = sum(first[layer] + sum(layers[layer + 1 :]) for layer, _ in self.heads)
        return 2 * self.prompts * LENGTH * per_token


def _linear(module):
    """Weights of the linear maps: multiply-adds for each token."""
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)


def gemm_rate() -> float:
    """FLOP per CPU second of large square matrix products."""
    a = torch.randn(GEMM, GEMM)
    return 3 * 2 * GEMM**3 / cpu(lambda: [a @ a for _ in range(3)])[1]


def measure(model, layers: str, prompts: int, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` of each approach's CPU seconds, and of their ratios within a repeat."""
    case = Case(model, layers, prompts)
    approaches = {"naive": case.naive, "suffix": case.suffix, "job": case.job, "run": case.run}
    seconds: dict[str, list[float]] = {name: [] for name in approaches}
    rates, results = [], {}
    for _ in range(repeats):
        for name, approach in approaches.items():
            rates.append(gemm_rate())
            results[name], taken = cpu(approach)
            seconds[name].append(taken)
            print(f"  {model.name} {name}: {taken:.1f} CPU s, {rates[-1] / 1e9:.0f} GFLOP/s", flush=True)
    rate = median(rates)
    return {
        "heads": len(case.heads),
        "prompts": prompts,
        "length": LENGTH,
        "repeats": repeats,
        "cpu_seconds": seconds,
        "naive": median(seconds["naive"]),
        "suffix": median(seconds["suffix"]),
        "job": median(seconds["job"]),
        "run": median(seconds["run"]),
        "limit": case.flops / rate,
        "gemm_gflops": rate / 1e9,
        "gemm_gflops_range": [min(rates) / 1e9, max(rates) / 1e9],
        "naive/run": _ratio(seconds, "naive", "run"),
        "run/suffix": _ratio(seconds, "run", "suffix"),
        "job/suffix": _ratio(seconds, "job", "suffix"),
        "run/limit": median(seconds["run"]) * rate / case.flops,
    } | agreement(results)


def _ratio(seconds, above, below):
    return median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def agreement(results) -> dict[str, float]:
    """Largest differences between the approaches, in logits, and the largest change, to judge them by."""
    job = results["job"]
    parts = complete({name: value.numpy() for name, value in job.items()})
    ours = {name: torch.as_tensor(parts[name]) for name in ("from_heads", "from_mlps", "from_norm")}
    ours["logit_change"] = job["logit_change"] + job["mean_logit_change"]
    ours["own_change"] = job["ablated_direct_effect"] - job["direct_effect"]
    ours["ablated_norm_scale"] = job["ablated_norm_scale"]
    found = {"largest_change": ours["logit_change"].abs().max().item()}
    for name in ("naive", "suffix"):
        theirs = results[name]
        found[f"differs_from_{name}"] = max((ours[k] - theirs[k]).abs().max().item() for k in theirs)
    return found
