"""What must be known of the whole run before its first unit: the noise floor, mean activations, the top share."""

from typing import Any

import numpy as np

from selfrepair_nn.execution.backends import Backend
from selfrepair_nn.execution.experiment import Experiment
from selfrepair_nn.graph import Graph

CONTROL_HEADS = 3


def noise_floor(experiment: Experiment, layout: dict[str, Any], runner: Backend) -> np.ndarray:
    """Root mean square change of the logit that rounding alone makes of an ablation in each layer: [layer].

    Heads are replaced by themselves, and the residual stream that their pass takes up is moved by up to one rounding
    step of the model's dtype. Without that step a clean and an ablated pass round alike, and what is found is 0
    however coarse the dtype: but where something is really ablated they round differently.
    """
    from selfrepair_nn.tracing.jobs import ablation_job

    heads = [[h for h in experiment.heads if h.layer == layer][:CONTROL_HEADS] for layer in experiment.layers]
    cases = tuple((own[i % len(own)],) for own in heads for i in range(CONTROL_HEADS))
    graph = Graph(ablate=cases, replacement="identity", target=experiment.options.target)
    plan = graph.plan(layout) | {"rows": experiment.work.rows, "shaken": True}
    changes = runner(ablation_job, experiment.arrays(slice(0, 1)), plan, None)["logit_change"]
    return changes.double().square().unflatten(0, (-1, CONTROL_HEADS)).mean((1, 2, 3)).sqrt().numpy()


def mean_z(experiment: Experiment, layout: dict[str, Any], runner: Backend) -> dict[int, Any]:
    """Mean z of the reference prompts over all their positions: {layer: [heads * d_head]}, in float64."""
    from selfrepair_nn.tracing.jobs import mean_job

    reference = min(experiment.options.mean_prompts, experiment.prompts.n)
    plan = {"model": layout, "layers": experiment.layers}
    totals: dict[int, Any] = dict.fromkeys(experiment.layers, 0)
    for block in experiment.work.units:
        within = slice(block.start, min(block.stop, reference))
        if within.start < within.stop:
            summed = runner(mean_job, experiment.arrays(within), plan, None)
            totals = {layer: totals[layer] + summed[layer] for layer in totals}
    return {layer: total / (reference * experiment.prompts.length) for layer, total in totals.items()}


def top_thresholds(experiment: Experiment, plan: dict[str, Any], runner: Backend) -> np.ndarray:
    """The least direct effect in each case's top share over the whole run: [case]. Clean passes only."""
    from selfrepair_nn.tracing.jobs import effects_job

    keep = max(1, int(experiment.options.share * experiment.prompts.n * (experiment.prompts.length - 1)))
    best = np.empty((len(experiment.heads), 0))
    for block in experiment.work.units:
        effects = (
            runner(effects_job, experiment.arrays(block), plan, None)["direct_effect"].flatten(1).numpy()
        )
        best = np.concatenate([best, effects], axis=1)
        best = -np.partition(-best, min(keep, best.shape[1]) - 1, axis=1)[:, :keep]
    return best.min(axis=1)
