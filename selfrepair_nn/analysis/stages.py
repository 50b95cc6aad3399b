"""Self-repair by stage of inference: of the ablated component, and of the component that makes up for it."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import check_axes, require, required, restored, share_of
from selfrepair_nn.analysis.repairers import check_components
from selfrepair_nn.analysis.responding import by_group, cases_of
from selfrepair_nn.analysis.summaries import summed_up
from selfrepair_nn.analysis.tokens import HALF_WIDTH, Groups
from selfrepair_nn.blocks import done_cases
from selfrepair_nn.case_sites import Case
from selfrepair_nn.components import Attention, Head, Mlp, Neuron, layer_numbers
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public

STAGES = {
    "detokenisation": 0.2,
    "feature engineering": 0.5,
    "prediction ensembling": 0.9,
    "residual sharpening": 1.0,
}
"""The share of the layers at which each stage ends, by default: our reading of the figures of Lad, Gurnee and Tegmark
(2024), The remarkable robustness of LLMs: stages of inference?, who see them in depth but draw no borders."""
MEANS = ("removed", "logit_change", "self_repair", "from_norm")


def stages_of(n_layers: int, ends: Mapping[str, float] = STAGES) -> dict[str, range]:
    """The layers of each stage of a model of so many layers; a stage may be left without any in a small model."""
    last = [round(end * n_layers) for end in ends.values()]
    if n_layers > 1 and len(last) > 1:
        last[-2] = min(last[-2], n_layers - 1)
    return {name: range(first, stop) for name, first, stop in zip(ends, [0, *last], last, strict=False)}


@public
def by_stage(ds: xr.Dataset, stages: Mapping | None = None, share: float | None = None) -> xr.Dataset:
    """Self-repair by stage of the ablated component and of the repairing one; in logits.

    `ds` has component changes, and ablates heads, attention layers, MLPs or neurons one by one: a store of `heads` with
    --components, of `repairers`, of `hydra`. Over (ablated), the stage of what is ablated:

    - removed, logit_change, self_repair, from_norm and, where a model has it, from_post_norms: means over the
      components that are ablated there, of their means on their top share of tokens; components: how many they are;
    - repair(ablated, repairing): the same of the summed change of direct effect of all components of a stage, but that
      of the ablated itself. Over the stages, with from_norm (and from_post_norms), it adds up to self_repair;
    - x_half_width of each: half the width of the 95% interval. The errors of components of a stage go together.

    Args:
        stages: {name: layers}, in order, which together are the model's layers: {"early": "0:4", "late": range(4, 8)}.
            By default shares of the depth (`STAGES`): they are our reading of a paper that draws no borders, and no
            measurement on this model. Coordinate `layers` says which they are.

    Raises:
        UsageError: stages that leave a layer out or name one twice; no component changes; else as `by_head`.
    """
    ds = restored(ds)
    require(ds, required(ds))
    check_axes(ds)
    share = share_of(ds, share)
    check_components(ds, share)
    layer = ds.component_layer.values
    n_layers = int(ds.attrs.get("n_layers", layer.max() + 1))
    named: Mapping[str, Any] = stages_of(n_layers) if stages is None else _given(stages, n_layers)
    index = _stage_of_cases(ds, named)
    found = _of_ablated(
        summed_up(ds, share, {"ablated": Groups(("ablated",), index, len(named))}), index, len(named)
    )
    tallies = by_group(ds, share, [np.isin(layer, list(layers)) for layers in named.values()])
    each = [tally.estimate.of_groups(index, len(named)) for tally in tallies]
    dims = ("ablated", "repairing")
    found["repair"] = (dims, np.stack([one.mean for one in each], 1))
    found[f"repair{HALF_WIDTH}"] = (dims, np.stack([one.half_width for one in each], 1))
    told = found.pop("attrs")
    labels: Any = {"ablated": [*named], "repairing": [*named]}
    labels["layers"] = ("repairing", [_told(layers) for layers in named.values()])
    return _described(xr.Dataset(found, labels, told))


def _of_ablated(cases: xr.Dataset, index: np.ndarray, count: int) -> dict[str, Any]:
    """Means over the cases of each stage of what a summary has, and their half-widths."""
    found: dict[str, Any] = {"attrs": cases.attrs}
    for name in (*MEANS, "from_post_norms"):
        if f"top_{name}" in cases:
            values = cases[f"top_{name}"].values.ravel()
            means = [values[index == i].mean() if (index == i).any() else np.nan for i in range(count)]
            found[name] = ("ablated", np.array(means))
            found[name + HALF_WIDTH] = ("ablated", cases[f"ablated_top_{name}{HALF_WIDTH}"].values)
    found["components"] = ("ablated", np.bincount(index[index >= 0], minlength=count))
    return found


def single_sites(ds: xr.Dataset) -> bool:
    """Whether every run of a store ablates one component."""
    return all(map(_alone, cases_of(ds)))


def _alone(case: Case) -> bool:
    return len(case) == 1 and isinstance(case[0], Head | Attention | Mlp | Neuron)


def _stage_of_cases(ds: xr.Dataset, named: Mapping[str, Iterable[int]]) -> np.ndarray:
    """The index of each case's stage: [case]; -1 of what is not done, or ablates more than one component."""
    some, place = done_cases(ds).any(1), {layer: i for i, each in enumerate(named.values()) for layer in each}
    found = [place[case[0].layer] if _alone(case) else -1 for case in cases_of(ds)]
    index = np.where(some, found, -1)
    if (index < 0).all():
        raise UsageError(
            "this store ablates no heads, attention layers, MLPs or neurons one by one: run hydra"
        )
    return index


def _given(stages: Mapping, n_layers: int) -> dict[str, list[int]]:
    named = {str(name): layer_numbers(layers, n_layers) for name, layers in stages.items()}
    every = sorted(layer for layers in named.values() for layer in layers)
    if every != [*range(n_layers)]:
        wrong = sorted({*range(n_layers)} - {*every}) or sorted({x for x in every if every.count(x) > 1})
        what = "left out" if len({*every}) < n_layers else "named twice"
        raise UsageError(
            f"stages: layers {', '.join(map(str, wrong))} are {what}; each of {n_layers} is in one stage"
        )
    return named


def _told(layers: Any) -> str:
    numbers = [*layers]
    if numbers == [*range(numbers[0], numbers[-1] + 1)] if numbers else False:
        return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers)) or "none"


def _described(found: xr.Dataset) -> xr.Dataset:
    names = {name: name.replace("_", " ") for name in (*MEANS, "from_post_norms")}
    names["repair"] = "change of direct effect of the stage's components"
    for name, told in names.items():
        if name in found:
            found[name].attrs = {"units": "logit", "long_name": f"mean {told}"}
            width = f"half-width of the 95% interval of mean {told}"
            found[name + HALF_WIDTH].attrs = {"units": "logit", "long_name": width}
    found.components.attrs = {"units": "1", "long_name": "number of ablated components"}
    return found
