"""Whole attention layers and MLPs ablated: effect of ablation against direct effect, and which layers compensate."""

from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.repairers import check_components
from selfrepair_nn.analysis.responding import by_group
from selfrepair_nn.analysis.summaries import by_case
from selfrepair_nn.analysis.tokens import HALF_WIDTH
from selfrepair_nn.case_sites import sites_of
from selfrepair_nn.components import Attention, Mlp
from selfrepair_nn.confidence import RATE, q_values
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public

PARTS = {"attention": ("head", "attention_bias", "mixer"), "mlp": ("mlp",)}
"""Kinds of components that the two sublayers of a layer are."""


@public
def hydra(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """What ablating whole sublayers does, over (case); the summary of `by_case`, and:

    - kind: "attention" or "mlp", case_layer: which layer's;
    - effect = -top_logit_change, what the logit loses: the effect of ablation, to be set against top_removed, the
      direct effect that is taken (McGrath et al. (2023), The Hydra effect, Figure 2); effect_half_width;
    - response(case, responding_layer, part): mean change of the direct effect of all components of the layer's
      attention, or of its MLP, on the case's top share, in logits, that of the ablated sublayer itself left out (0);
      with response_half_width, response_q_value (controlled for all of a store that can respond) and response_known,
      whether that is at most 5%;
    - compensation: the sum of these over all layers behind; compensation_attention, compensation_mlp: over their
      attention and their MLPs alone; each with x_half_width. With top_from_norm (and top_from_post_norms) it is
      top_self_repair.

    Raises:
        UsageError: `ds` has no attention layers or MLPs that are ablated whole and alone, or no component changes;
            else as `by_case`.
    """
    if "compensation" in ds:
        return by_case(ds, share)
    if "case" not in ds.coords:
        raise UsageError("this store ablates no whole attention layers and MLPs: run hydra")
    kinds = [_kind(case) for case in sites_of(ds)] if ds["case"].ndim else []
    whole = np.flatnonzero([kind != "" for kind in kinds])
    if not whole.size:
        raise UsageError("this store ablates no whole attention layers and MLPs: run hydra")
    ds = ds.isel(case=whole)
    found = by_case(ds, share)
    check_components(ds, found.attrs["share"])
    found = found.assign(effect=-found.top_logit_change, effect_half_width=found.top_logit_change_half_width)
    variables = _responses(ds, found.attrs["share"])
    variables["kind"] = ("case", np.array([kinds[i] for i in whole], object))
    n_layers = int(ds.component_layer.max()) + 1
    found = found.assign_coords(responding_layer=np.arange(n_layers), part=list(PARTS)).assign(variables)
    return _described(found)


def _responses(ds: xr.Dataset, share: float) -> dict[str, Any]:
    kind, layer = ds.component_kind.values, ds.component_layer.values
    n_layers = int(layer.max()) + 1
    parts = [np.isin(kind, names) & (layer >= 0) for names in PARTS.values()]
    single = [part & (layer == at) for at in range(n_layers) for part in parts]
    *each, attention, mlp, both = by_group(ds, share, [*single, *parts, parts[0] | parts[1]])
    known = [tally.estimate for tally in each]
    shape = (ds.sizes["case"], n_layers, len(PARTS))
    mean, width, p = (
        np.stack([getattr(one, name) for one in known], 1).reshape(shape)
        for name in ("mean", "half_width", "p_value")
    )
    q = q_values(np.where((mean == 0) & (width == 0), np.nan, p))
    dims = ("case", "responding_layer", "part")
    found: dict[str, Any] = {"response": (dims, mean), f"response{HALF_WIDTH}": (dims, width)}
    found |= {"response_q_value": (dims, q), "response_known": (dims, q <= RATE)}
    for name, tally in (
        ("compensation", both),
        ("compensation_attention", attention),
        ("compensation_mlp", mlp),
    ):
        one = tally.estimate
        found |= {name: ("case", one.mean), name + HALF_WIDTH: ("case", one.half_width)}
    return found


def _kind(case: Any) -> str:
    if len(case) != 1:
        return ""
    return {Attention: "attention", Mlp: "mlp"}.get(type(case[0]), "")


def _described(found: xr.Dataset) -> xr.Dataset:
    names = {
        "effect": "mean effect of ablation",
        "response": "mean change of direct effect",
        "compensation": "mean change of direct effect of all that lies behind",
        "compensation_attention": "mean change of direct effect of attention",
        "compensation_mlp": "mean change of direct effect of MLPs",
    }
    for name, told in names.items():
        found[name].attrs = {"units": "logit", "long_name": told}
        found[name + HALF_WIDTH].attrs = {
            "units": "logit",
            "long_name": f"half-width of the 95% interval of {told}",
        }
    return found
