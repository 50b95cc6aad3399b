"""Who repairs whom: what each component does when a head is ablated."""

import json

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.summaries import HEADS, among, by_head, check_store, percent, share_of
from selfrepair_nn.blocks import component_sums, direct_effects, done_cases
from selfrepair_nn.errors import UsageError

PAIRS = (*HEADS, "component")
COUNT = 24


def who_repairs(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """The summary of `by_head`, and what every component does for each ablated head, on its top share of tokens.

    - repair(layer, head, component): mean change of the component's direct effect, in logits; > 0 repairs, < 0
      breaks. At the ablated head itself it is the head's own change, which is not repair: `own` marks it;
    - repair_tokens(layer, head): how many tokens that is over. Of a finished run it is top_tokens; of an unfinished
      one with components="top" it can be fewer, for what is stored is the top share of the whole run.

    For each head, the sum of repair over all components but its own, and top_from_norm, is top_self_repair
    (Equation 2). A result of this function is returned as it is.

    Raises:
        UsageError: the store holds no component changes, or only those of a smaller share; else as by_head.
    """
    share = share_of(ds, share)
    if "repair" in ds:
        return by_head(ds, share)
    check_store(ds)
    _check_components(ds, share)
    _, top = direct_effects(ds, done_cases(ds), share)
    sums, counts = component_sums(ds, top)
    shape = [ds.sizes[d] for d in HEADS]
    with np.errstate(invalid="ignore"):
        means = (sums / counts[:, None]).reshape(*shape, -1)
    found = by_head(ds, share).assign(repair=(PAIRS, means), repair_tokens=(HEADS, counts.reshape(shape)))
    found = found.assign_coords({n: c for n, c in ds.coords.items() if c.dims == ("component",)})
    found["own"] = (PAIRS, _own(ds))
    told = f"mean change of direct effect, {among(share)}"
    found.repair.attrs = {"units": "logit", "long_name": told}
    found.repair_tokens.attrs = {"units": "1", "long_name": "number of tokens"}
    found.own.attrs = {"units": "1", "long_name": "the ablated head itself"}
    return found


def strongest_repairs(ds: xr.Dataset, count: int = COUNT, share: float | None = None) -> xr.Dataset:
    """The `count` largest mean changes that an ablation makes of another component, by size, over (rank).

    - repair: the change, in logits, of either sign; layer, head: the ablated head;
    - component, component_kind, component_layer, component_head: which component changes.

    `ds` is a store or a result of `who_repairs`. The final norm is no component. Errors as in `who_repairs`.
    """
    pairs = who_repairs(ds, share)
    sizes = abs(pairs.repair).where(~pairs.own, 0).fillna(0).values.ravel()
    order = np.argsort(-sizes, kind="stable")[: min(count, int((sizes > 0).sum()))]
    layer, head, component = np.unravel_index(order, pairs.repair.shape)
    found = xr.Dataset({"repair": ("rank", pairs.repair.values[layer, head, component])}, attrs=pairs.attrs)
    found.repair.attrs = pairs.repair.attrs
    labels = {d: ("rank", pairs[d].values[at]) for d, at in zip(HEADS, (layer, head), strict=True)}
    of_component = [name for name, c in pairs.coords.items() if c.dims == ("component",)]
    return found.assign_coords(labels | {n: ("rank", pairs[n].values[component]) for n in of_component})


def _own(ds: xr.Dataset) -> np.ndarray:
    """bool [layer, head, component]"""
    layer, head = (ds[d].values for d in HEADS)
    same_layer = ds.component_layer.values == layer[:, None, None]
    return same_layer & (ds.component_head.values == head[:, None])


def _check_components(ds: xr.Dataset, share: float) -> None:
    if "component_change" not in ds:
        raise UsageError("this store holds no component changes: run its recipe with --components top")
    settings = json.loads(ds.attrs.get("settings", "{}"))
    stored = settings.get("share") if settings.get("components") == "top" else None
    if stored is not None and share > stored:
        raise UsageError(
            f"this store holds component changes of the top {percent(stored)} of tokens only: "
            f"a share of {share!r} is more than that; give {stored} or less"
        )
