"""Who repairs whom: means by hand and by naive code, Equation 2 row by row, what is stored and what is not."""

import json
import tracemalloc

import numpy as np
import pytest
import xarray as xr
from made import hand_made

from selfrepair_nn.analysis import by_head, strongest_repairs, top_share, who_repairs
from selfrepair_nn.analysis.repairers import ablated_itself
from selfrepair_nn.case_sites import written
from selfrepair_nn.components import Attention, Head, Layers, Mlp, Neuron
from selfrepair_nn.errors import UsageError
from selfrepair_nn.simulate import simulate_heads, unfinished

TOP = ("layer", "head", "prompt", "position")


@pytest.fixture(scope="module")
def ds():
    return simulate_heads(4, 3, 8, 13, seed=3, components=True)


def named(pairs):
    """Layer, head, component and change of each rank."""
    columns = (pairs[name].values.tolist() for name in ("layer", "head", "component", "repair"))
    return list(zip(*columns, strict=True))


def by_hand() -> xr.Dataset:
    """One head of one layer; of its four tokens the first and the last have the highest direct effects."""
    labels = {"component": ["embed", "L0H0", "L0.mlp", "L1H0", "L1.mlp"]}
    places = {"component_layer": [-1, 0, 0, 1, 1], "component_head": [-1, 0, -1, 0, -1]}
    kinds = ["embedding", "head", "mlp", "head", "mlp"]
    changes = [[0, -4, 1, -3, 0], [0, 9, 9, 9, 9], [0, 9, 9, 9, 9], [0, -2, 2, -1, 0.5]]
    ds = hand_made([[4, 0], [1, 3]]).assign_coords(layer=[0], head=[0])
    ds = ds.assign(component_change=((*TOP, "component"), np.reshape(changes, (1, 1, 2, 2, 5))))
    kinds = {"component_kind": ("component", kinds)}
    return ds.assign_coords(labels | kinds | {name: ("component", at) for name, at in places.items()})


def test_means_by_hand():
    pairs = who_repairs(by_hand(), 0.5).isel(layer=0, head=0)
    np.testing.assert_array_equal(pairs.repair, [0, -3, 1.5, -2, 0.25])
    np.testing.assert_array_equal(pairs.own, [False, True, False, False, False])
    assert pairs.repair_tokens == pairs.top_tokens == 2


def test_strongest_by_hand():
    ds = by_hand()
    expected = [(0, 0, "L1H0", -2), (0, 0, "L0.mlp", 1.5), (0, 0, "L1.mlp", 0.25)]
    assert named(strongest_repairs(ds, 99, 0.5)) == expected
    assert named(strongest_repairs(who_repairs(ds, 0.5), 2, 0.5)) == expected[:2]
    assert strongest_repairs(ds, 3, 0.5).component_kind.values.tolist() == ["head", "mlp", "mlp"]


def test_a_row_is_equation_2(ds):
    pairs = who_repairs(ds, 0.1)
    others = pairs.repair.where(~pairs.own, 0)
    np.testing.assert_allclose(
        others.sum("component") + pairs.top_from_norm, pairs.top_self_repair, atol=2e-6
    )
    for kind, name in (("head", "top_from_heads"), ("mlp", "top_from_mlps")):
        of_kind = others.isel(component=np.flatnonzero(ds.component_kind == kind))
        np.testing.assert_allclose(of_kind.sum("component"), pairs[name], atol=2e-6)
    own = pairs.repair.where(pairs.own, 0).sum("component")
    np.testing.assert_allclose(own, pairs.top_ablated_direct_effect - pairs.top_direct_effect, atol=2e-6)
    assert pairs.own.sum() == 12


def test_means_are_the_naive_ones_on_a_partly_done_store(ds):
    part = unfinished(
        ds, done=np.arange(8) < np.array([[8, 5, 0], [1, 2, 8], [8, 8, 8], [8, 8, 8]])[..., None]
    )
    pairs = who_repairs(part, 0.1)
    naive = part.component_change.astype(float).where(top_share(part, 0.1)).mean(("prompt", "position"))
    np.testing.assert_allclose(pairs.repair, naive, rtol=1e-6, atol=1e-9)
    assert pairs.repair[0, 2].isnull().all()
    assert not any(place[:2] == (0, 2) for place in named(strongest_repairs(pairs, 999, 0.1)))


def test_strongest_is_a_naive_sort(ds):
    pairs = who_repairs(ds, 0.1)
    labels = ds.component.values
    naive = [
        (i, j, str(labels[c]), float(pairs.repair[i, j, c]))
        for i in range(4)
        for j in range(3)
        for c in range(len(labels))
        if labels[c] != f"L{i}H{j}"
    ]
    naive.sort(key=lambda row: -abs(row[3]))
    assert named(strongest_repairs(ds, 7, 0.1)) == naive[:7]


def top_store(ds, share):
    """The store as a run with components="top" leaves it."""
    settings = json.dumps({"components": "top", "share": share})
    kept = ds.component_change.where(top_share(ds, share))
    return ds.assign(component_change=kept).assign_attrs(settings=settings)


def test_a_store_of_the_top_share_is_enough(ds):
    whole, kept = who_repairs(ds, 0.1), who_repairs(top_store(ds, 0.1), 0.1)
    np.testing.assert_array_equal(kept.repair, whole.repair)
    smaller = who_repairs(top_store(ds, 0.2), 0.1)
    np.testing.assert_array_equal(smaller.repair, whole.repair)
    with pytest.raises(UsageError, match=r"of the top 10% of tokens only: a share of 0\.2 is more"):
        who_repairs(top_store(ds, 0.1), 0.2)


def test_tokens_that_are_not_stored_are_not_counted(ds):
    """Of the first prompts, the top share holds tokens that are not in the top share of the whole run."""
    part = unfinished(top_store(ds, 0.1), done=np.arange(8) < 3)
    pairs, stored = who_repairs(part, 0.1), part.component_change.notnull().all("component")
    expected = (stored & top_share(part, 0.1)).sum(("prompt", "position"))
    np.testing.assert_array_equal(pairs.repair_tokens, expected)
    assert (pairs.repair_tokens < pairs.top_tokens).any()


def test_no_component_changes_is_said():
    with pytest.raises(UsageError, match="run its recipe with --components top"):
        who_repairs(simulate_heads(2, 2, 4, 5))
    with pytest.raises(UsageError, match="lacks done"):
        who_repairs(by_head(simulate_heads(2, 2, 4, 5)))


def test_lazily_opened_equals_in_memory_and_is_never_held_whole(tmp_path):
    big = simulate_heads(4, 3, 120, 40, components=True)
    sizes = {**big.sizes, "prompt": 5}
    chunks = {n: {"chunks": [sizes[d] for d in big[n].dims]} for n in big.data_vars}
    chunks["component_change"] = {"chunks": [1, *(sizes[d] for d in big.component_change.dims[1:])]}
    big.to_zarr(tmp_path / "run.zarr", encoding=chunks, consolidated=False)
    opened = xr.open_zarr(tmp_path / "run.zarr", consolidated=False, chunks=None)
    np.testing.assert_array_equal(who_repairs(opened).repair, who_repairs(big).repair)
    tracemalloc.start()
    who_repairs(opened)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < big.component_change.nbytes / 3


def test_what_each_kind_of_case_is_made_of():
    cases = [(Head(0, 1),), (Attention(1),), (Mlp(0),), (Neuron(1, 3), Neuron(1, 5)), (Layers(0, 2),)]
    cases.append((Head(1, 0), Mlp(1)))
    labels = ["embedding", "L0H0", "L0H1", "L0.mlp", "L1H0", "L1H1", "L1.mlp", "L2H0"]
    layer, head = [-1, 0, 0, 0, 1, 1, 1, 2], [-1, 0, 1, -1, 0, 1, -1, 0]
    about = {"component": labels, "component_layer": ("component", layer), "component_head": ("component", head)}
    about |= {"case": range(6), "case_sites": ("case", [*map(written, cases)])}
    ds = xr.Dataset({"x": ("case", np.zeros(6))}, about)
    found = [[labels[i] for i in np.flatnonzero(row)] for row in ablated_itself(ds)]
    assert found == [["L0H1"], ["L1H0", "L1H1"], ["L0.mlp"], ["L1.mlp"], labels[1:7], ["L1H0", "L1.mlp"]]
