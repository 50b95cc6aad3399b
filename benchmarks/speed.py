"""CPU time of every approach on the same heads, tokens and partners, interleaved in one process with one thread."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import selfrepair_nn as sr
from benchmarks.baselines import naive, suffix
from benchmarks.parts import Parts
from selfrepair_nn.backends.local import backend
from selfrepair_nn.equations import complete
from selfrepair_nn.layout.experiment import prepare
from selfrepair_nn.layout.sweep import Sweep, plans
from selfrepair_nn.options import Options

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
    prompts: int
    selection: dict[str, str]
    """`layers` or `heads`, as a run takes them."""

    @property
    def choices(self):
        return {"model": self.model, "tokens": self.prompts * LENGTH, "length": LENGTH} | self.selection

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
        return suffix(*self.plain, rows=self.experiment.work.tokens_per_pass)

    @cached_property
    def through_transformerlens(self):
        """The model in TransformerLens, and what the baselines take."""
        from benchmarks.transformerlens import hooked

        return hooked(self.plain[0], LENGTH), *self.plain

    def published(self):
        from benchmarks.transformerlens import published

        return published(*self.through_transformerlens)

    def careful(self):
        from benchmarks.transformerlens import careful

        return careful(*self.through_transformerlens)

    @property
    def letter(self):
        """CPU seconds of `published` for one head if TransformerLens itself writes every head's output, in without."""
        from benchmarks.transformerlens import published

        *rest, heads = self.through_transformerlens
        with_them, without = (partial(published, *rest, heads[:1], own_results=own) for own in (True, False))
        return cpu(with_them)[1] / cpu(without)[1]

    def job(self):
        """The engine alone, unit by unit: no store, no noise floor."""
        sweep = Sweep(self.experiment, plans(self.experiment, self.model.layout), {}, None)
        units = sweep.units(self.experiment.work.units)
        found = [result for _, (result,) in sweep.by_block(backend("local", self.model)(units))]
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


@dataclass(frozen=True)
class Measured:
    """CPU seconds of each approach, the rate of large products (FLOP per CPU second) before each, what they gave."""

    seconds: dict[str, list[float]]
    rates: list[float]
    results: dict[str, Any]

    @property
    def medians(self) -> dict[str, Any]:
        return {name: median(taken) for name, taken in self.seconds.items()} | {"cpu_seconds": self.seconds}

    def ratio(self, above: str, below: str) -> float:
        """Median over the repeats of one approach's seconds in another's."""
        return median(a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True))


def interleaved(case: Case, approaches: Sequence[str], repeats: int) -> Measured:
    """Every approach in turn, `repeats` times."""
    found = Measured({name: [] for name in approaches}, [], {})
    for name in list(approaches) * repeats:
        found.rates.append(gemm_rate())
        found.results[name], taken = cpu(getattr(case, name))
        found.seconds[name].append(taken)
        print(
            f"  {case.model.name} {name}: {taken:.1f} CPU s, {found.rates[-1] / 1e9:.0f} GFLOP/s", flush=True
        )
    return found


def measure(model: Any, prompts: int, repeats: int, **selection: str) -> dict[str, Any]:
    """Medians over `repeats` of each approach's CPU seconds, and of their ratios within a repeat."""
    case = Case(model, prompts, selection)
    flops = case.flops  # first, since it prepares what the clock is not for
    found = interleaved(case, ("naive", "suffix", "job", "run"), repeats)
    rate, agreed = median(found.rates), agreement(found.results, ("naive", "suffix"))
    return (
        _shape(case, repeats)
        | found.medians
        | agreed
        | {
            "limit": flops / rate,
            "gemm_gflops": rate / 1e9,
            "gemm_gflops_range": [min(found.rates) / 1e9, max(found.rates) / 1e9],
            "naive/run": found.ratio("naive", "run"),
            "run/suffix": found.ratio("run", "suffix"),
            "naive/job": found.ratio("naive", "job"),
            "job/suffix": found.ratio("job", "suffix"),
            "job/limit": median(found.seconds["job"]) * rate / flops,
        }
    )


def through_transformerlens(model: Any, prompts: int, repeats: int, **selection: str) -> dict[str, Any]:
    """As `measure`, of the baselines that go through TransformerLens, on heads and prompts of their own.

    "letter/published" is what the paper's algorithm takes for one head if TransformerLens itself writes every head's
    output, as in the paper's code, relative to what it takes here.
    """
    case = Case(model, prompts, selection)
    letter = case.letter  # first, since it prepares what the clock is not for
    found = interleaved(case, ("published", "careful", "job", "run"), repeats)
    agreed = agreement(found.results, ("published", "careful"))
    return (
        _shape(case, repeats)
        | found.medians
        | agreed
        | {
            "letter/published": letter,
            "published/run": found.ratio("published", "run"),
            "published/job": found.ratio("published", "job"),
            "careful/run": found.ratio("careful", "run"),
            "careful/job": found.ratio("careful", "job"),
        }
    )


def _shape(case: Case, repeats: int) -> dict[str, int]:
    return {"heads": len(case.heads), "prompts": case.prompts, "length": LENGTH, "repeats": repeats}


def agreement(results: dict[str, Any], baselines: Sequence[str]) -> dict[str, float]:
    """Largest differences between the baselines and the job, in logits, and the largest change, to judge them by."""
    job = results["job"]
    parts = complete({name: value.numpy() for name, value in job.items()})
    ours = {name: torch.as_tensor(parts[name]) for name in ("from_heads", "from_mlps", "from_norm")}
    ours["logit_change"] = job["logit_change"] + job["mean_logit_change"]
    ours["own_change"] = job["ablated_direct_effect"] - job["direct_effect"]
    ours["ablated_norm_scale"] = job["ablated_norm_scale"]
    found = {"largest_change": ours["logit_change"].abs().max().item()}
    for name in baselines:
        theirs = results[name]
        found[f"differs_from_{name}"] = max((ours[k] - theirs[k]).abs().max().item() for k in theirs)
    return found
