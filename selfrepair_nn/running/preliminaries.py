"""What must be known of the whole run before its first unit: the heads, the noise floor, means, the top share."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from selfrepair_nn.backends.local import Backend, only
from selfrepair_nn.choosing import selecting_half
from selfrepair_nn.components import Head
from selfrepair_nn.equations import TOLERANCE
from selfrepair_nn.errors import UsageError
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.padding import within
from selfrepair_nn.quantities import QUANTITIES

TRIED = 4
"""Prompts on which it is tried whether passes depend on their length."""


def strongest(experiment: Experiment, layout: dict[str, Any], runner: Backend) -> list[Head]:
    """The heads of largest mean direct effect, over the tokens that count, as many as asked for. Clean passes only."""
    plan, counted = experiment.graph.plan(layout), experiment.counted
    if experiment.graph.found_on == "half":
        counted = counted & selecting_half(experiment.prompts.document)[:, None]
    sums = {
        block.start: effects.sum((1, 2), dtype=float, where=counted[block])
        for block, effects in direct_effects(experiment, plan, runner)
    }
    order = np.argsort(-sum(sums[start] for start in sorted(sums)), kind="stable")[
        : experiment.graph.strongest
    ]
    return [experiment.heads[case] for case in order]


def noise_floor(experiment: Experiment, layout: dict[str, Any], runner: Backend) -> np.ndarray:
    """Root mean square change of the logit that rounding alone makes of an ablation in each layer: [layer].

    A head is replaced by itself, and the residual stream where its pass begins is moved by up to one rounding step
    of the model's dtype. Without that step a clean and an ablated pass round alike, and what is found is 0 however
    coarse the dtype: but where something is really ablated they round differently. It is over the counted tokens of
    the first prompts, at least as many as a prompt has where there are so many in a unit. Where there is no grid of
    heads it is [case], each as its first layer's; a layer without heads has that of the next that has some.
    """
    from selfrepair_nn.tracing.noise import noise_job

    graph = Graph(
        ablate=sweep(Head(_with_heads(layer, layout), 0) for layer in experiment.layers),
        replacement="identity",
        target=experiment.graph.target,
        record="total",
    )
    plan = graph.plan(layout) | {"tokens_per_pass": experiment.work.tokens_per_pass}
    shapes = {"logit_change": QUANTITIES["logit_change"].shape(experiment.work.sizes)}
    rows = _first_counted(experiment)
    unit = Unit(
        "noise floor",
        noise_job,
        slice(0, len(rows)),
        plan,
        lambda part: experiment.arrays(rows[part]),
        shapes,
    )
    changes = only(runner, unit)["logit_change"].numpy()[:, experiment.counted[rows]]
    floor = np.sqrt(np.square(changes, dtype=float).mean(1))
    if experiment.grid:
        return floor
    return floor[[experiment.layers.index(min(s.layer for s in case)) for case in experiment.graph.ablate]]


def _with_heads(layer: int, layout: dict[str, Any]) -> int:
    """The layer, or the next one that has heads, or else the last that has."""
    having = [n for n in range(layout["n_layers"]) if n not in layout["headless"]]
    return next((n for n in having if n >= layer), having[-1])


def follows_length(experiment: Experiment, layout: dict[str, Any], dtype: str, runner: Backend) -> bool:
    """Whether a prompt cut short gives other numbers than the same positions of the whole one, beyond rounding.

    Causal attention alone does not see what comes later, but positions may be coded by the length of the pass, as in
    longrope and dynamic NTK. Tried on the run's first prompts, cut to a half, a quarter … and by one token: whatever
    length a model changes at, one of these lies below it.
    """
    from selfrepair_nn.tracing.jobs import lengths_job

    length = experiment.prompts.length
    cut = sorted({length >> step for step in range(1, length.bit_length())} | {length - 1} - {0})
    plan = {"model": layout, "lengths": cut}
    shapes = {"apart": ("prompt", len(cut))}
    tried = slice(0, min(TRIED, experiment.prompts.n))
    unit = Unit("passes of several lengths", lengths_job, tried, plan, experiment.arrays, shapes)
    return bool((only(runner, unit)["apart"] > TOLERANCE[dtype] / 10).any())


def require_alone(experiment: Experiment, layout: dict[str, Any], dtype: str, runner: Backend) -> None:
    """Raise UsageError for a model of which texts that are filled up give other numbers than each by itself."""
    if follows_length(experiment, layout, dtype, runner):
        lengths = experiment.prompts.ends
        raise UsageError(
            f"what {experiment.description.source.name} computes of a token depends on how long the pass is, and these "
            f"texts have {lengths.min()} to {lengths.max()} tokens: filled up to one length they would not give the "
            "numbers of each by itself; cut them to one length, --length, or pack them, --rows-are packed"
        )


def _first_counted(experiment: Experiment) -> np.ndarray:
    """Rows of the first prompts of the text that together have as many counted tokens as one prompt has positions."""
    order = np.argsort(experiment.order)
    counts = experiment.counted[order].sum(1)
    rows, counts = order[counts > 0], counts[counts > 0]
    enough = np.searchsorted(np.cumsum(counts), experiment.prompts.length - 1) + 1
    return rows[: min(enough, experiment.work.block)]


def means(experiment: Experiment, layout: dict[str, Any], runner: Backend) -> dict[str, dict[int, Any]]:
    """Mean activations of the reference prompts over all their tokens: {what: {layer: [width]}}, in float64."""
    import torch

    from selfrepair_nn.tracing.cases import realised
    from selfrepair_nn.tracing.jobs import mean_job

    reference = min(experiment.options.mean_prompts, experiment.prompts.n)
    keep: dict[str, set[int]] = {}
    for site in (site for case in realised(experiment.graph.plan(layout))["cases"] for site in case if site.kept):
        keep.setdefault(site.kept, set()).add(site.layer)
    if not keep:  # whole layers have no mean
        return {}
    plan = {"model": layout, "keep": {what: sorted(layers) for what, layers in keep.items()}}
    width = {"z": layout["n_heads"] * layout["d_head"], "mlp": layout["d_model"], "neurons": layout["d_mlp"]}
    shapes = {what: dict.fromkeys(layers, (width[what],)) for what, layers in plan["keep"].items()}
    blocks = [slice(b.start, min(b.stop, reference)) for b in experiment.work.units if b.start < reference]
    own = _own_tokens(experiment)

    def inputs(block: slice) -> dict[str, Any]:
        return experiment.as_read(block) | ({} if own is None else {"own": torch.from_numpy(own[block])})

    units = [Unit("mean", mean_job, b, plan, inputs, shapes) for b in blocks]
    sums = {unit.prompts.start: found for unit, found in runner(units)}
    count = reference * experiment.prompts.length if own is None else int(own[:reference].sum())
    return {
        what: {layer: sum(sums[b.start][what][layer] for b in blocks) / count for layer in layers}
        for what, layers in plan["keep"].items()
    }


def _own_tokens(experiment: Experiment) -> np.ndarray | None:
    """Which tokens are no filler, in the order of the text: bool [prompt, position]; None where all are."""
    prompts = experiment.prompts
    if prompts.lengths is None:
        return None
    return within(prompts.ends[np.argsort(experiment.order)], prompts.length)


def top_thresholds(
    experiment: Experiment, found: Iterable[tuple[slice, np.ndarray]], share: float
) -> np.ndarray:
    """The least direct effect in each case's top `share` over the whole run: [case], from all `direct_effects`.

    It is that of the last of the tokens that `analysis.top_share` marks. What is held is the top share, twice at most,
    and a block; of all tokens only the least.
    """
    counted = experiment.counted
    keep = max(1, int(share * counted.sum()))
    kept = [np.empty((len(experiment.graph.ablate), 0), experiment.precision)]
    for block, effects in found:
        kept.append(effects[:, counted[block]])
        if keep == counted.sum():
            kept = [_least(kept)]
        elif sum(part.shape[1] for part in kept) > 2 * keep:
            kept = [_highest(kept, keep)]
    return _least([_highest(kept, keep)])[:, 0]


def _highest(parts: Sequence[np.ndarray], keep: int) -> np.ndarray:
    """The highest direct effects of each case, at most so many: [case, token]."""
    joined = np.concatenate(parts, axis=1)
    if joined.shape[1] <= keep:
        return joined
    np.negative(joined, out=joined)
    joined.partition(keep - 1, axis=1)
    return -joined[:, :keep]


def _least(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The least direct effect of each case: [case, 1]; none where there is none."""
    joined = np.concatenate(parts, axis=1)
    return joined.min(axis=1, keepdims=True) if joined.size else joined


def direct_effects(
    experiment: Experiment, plan: dict[str, Any], runner: Backend, blocks: Sequence[slice] | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """Every unit's (or some `blocks`') prompts and clean direct effects [case, prompt, position], in any order.

    Clean passes only.
    """
    from selfrepair_nn.tracing.jobs import effects_job

    shapes = {"direct_effect": QUANTITIES["direct_effect"].shape(experiment.work.sizes)}
    name = f"direct effects of {len(plan['cases'])}"
    blocks = experiment.work.units if blocks is None else blocks
    units = [Unit(name, effects_job, block, plan, experiment.arrays, shapes) for block in blocks]
    for unit, found in runner(units):
        yield unit.prompts, found["direct_effect"].numpy()
