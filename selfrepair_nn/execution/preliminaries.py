"""What must be known of the whole run before its first unit: the heads, the noise floor, means, the top share."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from selfrepair_nn.components import Head, Mlp, Neuron
from selfrepair_nn.execution.backends import Backend, only
from selfrepair_nn.execution.experiment import Experiment
from selfrepair_nn.execution.units import Unit, ablation_shapes
from selfrepair_nn.graph import Graph, sweep

KEPT = {Head: "z", Mlp: "mlp", Neuron: "hidden"}
"""What the mean replaces of a kind of site."""


def loudest(experiment: Experiment, layout: dict[str, Any], runner: Backend) -> list[Head]:
    """The heads of largest mean direct effect over all prompts, as many as the graph asks for. Clean passes only."""
    plan = experiment.graph.plan(layout)
    sums = {
        block.start: effects.sum((1, 2), dtype=float)
        for block, effects in direct_effects(experiment, plan, runner)
    }
    order = np.argsort(-sum(sums[start] for start in sorted(sums)), kind="stable")[: experiment.graph.loudest]
    return [experiment.heads[case] for case in order]


def noise_floor(experiment: Experiment, layout: dict[str, Any], runner: Backend) -> np.ndarray:
    """Root mean square change of the logit that rounding alone makes of an ablation in each layer: [layer].

    A head is replaced by itself, and the residual stream that its pass takes up is moved by up to one rounding step
    of the model's dtype. Without that step a clean and an ablated pass round alike, and what is found is 0 however
    coarse the dtype: but where something is really ablated they round differently. Where there is no grid of heads
    it is [case], each as its first layer's.
    """
    from selfrepair_nn.tracing.jobs import ablation_job

    graph = Graph(
        ablate=sweep(Head(layer, 0) for layer in experiment.layers),
        replacement="identity",
        target=experiment.graph.target,
    )
    plan = graph.plan(layout) | {"rows": experiment.work.rows, "shaken": True}
    shapes = ablation_shapes(plan, experiment.prompts.length - 1, 0, packed=False)
    unit = Unit("noise floor", ablation_job, slice(0, 1), plan, experiment.as_read, shapes)
    changes = only(runner, unit)["logit_change"]
    floor = changes.double().square().mean((1, 2)).sqrt().numpy()
    if experiment.grid:
        return floor
    return floor[[experiment.layers.index(min(s.layer for s in case)) for case in experiment.graph.ablate]]


def means(experiment: Experiment, layout: dict[str, Any], runner: Backend) -> dict[str, dict[int, Any]]:
    """Mean activations of the reference prompts over all their positions: {what: {layer: [width]}}, in float64."""
    from selfrepair_nn.tracing.jobs import mean_job

    reference = min(experiment.options.mean_prompts, experiment.prompts.n)
    keep: dict[str, set[int]] = {}
    for site in (site for case in experiment.graph.ablate for site in case):
        keep.setdefault(KEPT.get(type(site), "z"), set()).add(site.layer)
    plan = {"model": layout, "keep": {what: sorted(layers) for what, layers in keep.items()}}
    width = {"z": layout["n_heads"] * layout["d_head"], "mlp": layout["d_model"], "hidden": layout["d_mlp"]}
    shapes = {what: dict.fromkeys(layers, (width[what],)) for what, layers in plan["keep"].items()}
    blocks = [slice(b.start, min(b.stop, reference)) for b in experiment.work.units if b.start < reference]
    units = [Unit("mean", mean_job, b, plan, experiment.as_read, shapes) for b in blocks]
    sums = {unit.prompts.start: found for unit, found in runner(units)}
    count = reference * experiment.prompts.length
    return {
        what: {layer: sum(sums[b.start][what][layer] for b in blocks) / count for layer in layers}
        for what, layers in plan["keep"].items()
    }


def top_thresholds(experiment: Experiment, found: Iterable[tuple[slice, np.ndarray]]) -> np.ndarray:
    """The least direct effect in each case's top share over the whole run: [case], from all `direct_effects`."""
    keep = max(1, int(experiment.options.share * experiment.prompts.n * (experiment.prompts.length - 1)))
    best = np.empty((len(experiment.graph.ablate), 0))
    for _, effects in found:
        best = np.concatenate([best, effects.reshape(len(effects), -1)], axis=1)
        best = -np.partition(-best, min(keep, best.shape[1]) - 1, axis=1)[:, :keep]
    return best.min(axis=1)


def direct_effects(
    experiment: Experiment, plan: dict[str, Any], runner: Backend, blocks: Sequence[slice] | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """Every unit's (or some `blocks`') prompts and clean direct effects [case, prompt, position], in any order.

    Clean passes only.
    """
    from selfrepair_nn.tracing.jobs import effects_job

    shapes = {"direct_effect": ("case", "prompt", experiment.prompts.length - 1)}
    name = f"direct effects of {len(plan['cases'])}"
    blocks = experiment.work.units if blocks is None else blocks
    units = [Unit(name, effects_job, block, plan, experiment.arrays, shapes) for block in blocks]
    for unit, found in runner(units):
        yield unit.prompts, found["direct_effect"].numpy()
