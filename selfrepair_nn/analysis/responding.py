"""Which components make up for an ablation, added up by groups of components: of any store with component changes."""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.tokens import batches, clusters
from selfrepair_nn.blocks import component_sums, direct_effects, done_cases
from selfrepair_nn.case_sites import Case, sites_of
from selfrepair_nn.components import Attention, Head, Layers
from selfrepair_nn.confidence import Tally


def cases_of(ds: xr.Dataset) -> list[Case]:
    """The sites of every ablated run of a store: of a grid of heads, layer by layer."""
    if "case" in ds.dims:
        return sites_of(ds)
    return [(Head(int(layer), int(head)),) for layer in ds["layer"].values for head in ds["head"].values]


def own_components(ds: xr.Dataset, case: Case) -> np.ndarray:
    """Which components a case ablates, or parts of which: bool [component]. What they change is not repair."""
    kind, layer, head = (ds[name].values for name in ("component_kind", "component_layer", "component_head"))
    found = np.zeros(len(kind), bool)
    for site in case:
        if isinstance(site, Layers):
            found |= (layer >= site.layer) & (layer < site.stop)
        elif isinstance(site, Head | Attention):
            here = (kind == "head") & (layer == site.layer)
            found |= here & (head == site.head) if isinstance(site, Head) else here
        else:
            found |= (kind == "mlp") & (layer == site.layer)
    return found


def by_group(ds: xr.Dataset, share: float, groups: Sequence[np.ndarray]) -> list[Tally]:
    """Of each case's top share, the summed change of all components of each group but its own: a Tally [case, cluster].

    `groups` are bool [component]. Clusters are joined where there are more than 100.
    """
    _, top = direct_effects(ds, done_cases(ds), share)
    joined, members = batches(clusters(ds)), np.array(groups, float)
    cases, width = cases_of(ds), int(joined.max()) + 1
    heads = ds.sizes.get("head", 1)
    sums, counts = np.zeros((len(groups), len(cases), width)), np.zeros((len(cases), width))
    for place, changes, number in component_sums(ds, top, joined):
        for head in range(heads):
            case = place * heads + head
            kept = members * ~own_components(ds, cases[case])
            sums[:, case], counts[case] = kept @ changes[head], number[head]
    return [Tally(each, counts) for each in sums]
