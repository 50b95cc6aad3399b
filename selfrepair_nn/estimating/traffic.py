"""How many bytes a remote run moves: requests, results, and what crosses into a sandbox that holds no weights."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from selfrepair_nn.backends.ndif.limits import Limits
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.layout.plan import Work
from selfrepair_nn.layout.sweep import Sweep, plans
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.models.load import structure_only
from selfrepair_nn.models.model import layout_of
from selfrepair_nn.quantities import QUANTITIES

READ = 2
"""A tensor that is read crosses twice: to the reader, and back in case it was changed."""

TAKEN_UP_INSIDE, TAKEN_UP = 2, 1
"""Crossings of the residual stream where a pass begins: after the attention of a layer, or between two layers."""

INDEXED = "head", "neuron"
"""Kinds of sites of which a layer has many: what they cost follows from the layer alone."""

def request_bytes(experiment: Experiment) -> int:
    """The size of a request, measured on the first one, which is put together but not sent."""
    from selfrepair_nn.backends.ndif.served import packed

    model = structure_only(experiment.description, experiment.tokenizer)
    limits = np.zeros(len(experiment.graph.ablate)) if experiment.shared else None
    sweep = Sweep(experiment, plans(experiment, model.layout), {}, limits)
    return len(packed(model, sweep.units(experiment.work.units[:1])[0]))


def at_the_end_alone(experiment: Experiment, limits: Limits) -> dict[str, int]:
    """total_crossing_bytes, if the run reads sums: what crosses if it reads the final residual stream alone."""
    work = experiment.work
    if any(g.record != "sums" or g.neurons is not None or g.words or g.reinforces for g in work.graphs):
        return {}
    structure, graphs = work.structure, {n: replace(g, record="total") for n, g in work.variants.items()}
    unembedded = limits.itemsize * experiment.unembedded * (structure.d_model + structure.vocab_size)
    crossed = unembedded + crossing_bytes(replace(work, variants=graphs), limits.itemsize)
    return {"total_crossing_bytes": limits.degree * crossed}


def result_bytes(unit: Unit, precision: str) -> int:
    """Bytes of what an ablation unit without thresholds gives, in this floating-point type, before compression."""
    sizes = {"prompt": unit.prompts.stop - unit.prompts.start, "case": len(unit.plan["cases"])}
    counts = {
        name: prod(size if isinstance(size, int) else sizes[size] for size in shape)
        for name, shape in unit.shapes.items()
    }
    return sum(n * np.dtype(QUANTITIES[name].dtype(precision)).itemsize for name, n in counts.items())


def crossing_bytes(work: Work, itemsize: int) -> int:
    """Bytes that cross between a sandboxed job's process and the model's, in a whole run of one job for each unit.

    `itemsize` is that of the server's dtype. What is read of each pass, what it begins with, and the probed maps; token
    ids and the like are left out.
    """
    count, blocks = 0, work.units
    for graph in work.graphs:
        plan = graph.plan(layout_of(work.structure)) | {"tokens_per_pass": work.tokens_per_pass}
        once, of_token = crossing(plan, work.runs(graph))
        count += len(blocks) * once + of_token * work.prompts * work.length
    return itemsize * count


def crossing(plan: dict[str, Any], runs: int) -> tuple[int, int]:
    """Numbers that cross in a job, with so many partners: once, and for each token of its prompts."""
    from selfrepair_nn.tracing.cases import begins, needs, read_out, realised

    counts = alike(plan["cases"])
    plan = realised(plan | {"cases": [*counts]})
    cases, width = plan["cases"], _widths(plan["model"])
    kept, told = needs(plan, cases), read_out(plan, cases) - {*plan["model"]["headless"]}
    count = READ * sum(len(layers) * width[what] for what, layers in kept.items())
    if plan["replacement"].text is not None:
        lent = {(site.kept, site.layer) for case in cases for site in case if site.kept}
        count += runs * READ * sum(width[what] for what, _ in lent)
    for case, times in zip(cases, counts.values(), strict=True):
        count += runs * times * _pass(plan, told, *begins(case, plan))
    return _probe(plan, len(told)), count


def depth(plan: dict[str, Any]) -> int:
    """Layers that a plan's ablated cases go through, summed."""
    from selfrepair_nn.tracing.cases import begins, realised

    counts, model = alike(plan["cases"]), plan["model"]
    found = realised(plan | {"cases": [*counts]})
    starts = (begins(case, found)[0] for case in found["cases"])
    return sum(
        times * (model["n_layers"] - start - model["parallel"])
        for start, times in zip(starts, counts.values(), strict=True)
    )


def alike(cases: Iterable[Any]) -> Counter[Any]:
    """How many cases cost alike, by one that stands for them: heads, or neurons, of a layer do."""
    return Counter(tuple(_standing_for(*entry) for entry in case) for case in cases)


def _standing_for(kind: str, *numbers: Any) -> tuple[Any, ...]:
    return kind, *((numbers[0], 0) if kind in INDEXED else (tuple(n) if isinstance(n, list) else n for n in numbers))


def _pass(plan: dict[str, Any], told: set[int], start: int, inside: bool) -> int:
    """Numbers that cross for each token of a pass that begins at a layer; z is read of `told` layers alone."""
    from selfrepair_nn.tracing.routing import routing_needs

    model = plan["model"]
    begun = (TAKEN_UP_INSIDE if inside else TAKEN_UP) * model["d_model"]
    layers = model["n_layers"] - start
    headless = sum(layer >= start for layer in model["headless"])
    routed = READ * sum(layer >= start for layer in routing_needs(plan)) * _widths(model)["routing"]
    if plan["record"] == "total":
        return begun + routed + READ * model["d_model"]
    heads = [n for n in range(start + inside, model["n_layers"]) if n not in model["headless"]]
    z = READ * sum(model["n_heads"] * model["d_head"] if n in told else model["d_model"] for n in heads)
    read = layers + 1 + headless + (layers if "post_norm" in model["places"] else 0)
    return begun + routed + z + READ * read * model["d_model"]


def _probe(plan: dict[str, Any], layers: int) -> int:
    """Numbers that cross while the linear maps are probed: what is put in, and what comes out."""
    model = plan["model"]
    width = model["n_heads"] * model["d_head"]
    return layers * width * (width + model["d_model"]) + model["d_model"] * (
        model["d_model"] + model["vocab_size"]
    )


def _widths(model: dict[str, Any]) -> dict[str, int]:
    """Numbers for each token of what a clean pass keeps."""
    ends = ("input", "attention", "mlp", "attention_scale", "mlp_scale", "post_scale", "mixer")
    residual: dict[str, int] = dict.fromkeys(ends, model["d_model"])
    routing = model["experts"] + 3 * model["n_choices"]  # logits, weights, and indices twice as wide
    return residual | {
        "z": model["n_heads"] * model["d_head"],
        "neurons": model["d_mlp"],
        "routing": routing,
    }
