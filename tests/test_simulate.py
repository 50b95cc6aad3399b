"""The simulator obeys the definitions, so that what is proven on it means something."""

import json

import numpy as np
import pytest
import xarray as xr
from made import CLEAN, COMPONENT, SWEPT

import selfrepair_nn as sr
from selfrepair_nn.components import Head
from selfrepair_nn.errors import UsageError
from selfrepair_nn.quantities import COORDINATES, QUANTITIES
from selfrepair_nn.simulate import simulate_heads, unfinished

ABLATIONS = ("resample", "mean", "zero", "identity")


def exact(ablation: str = "resample", **choices) -> xr.Dataset:
    return simulate_heads(4, 3, 6, 11, ablation=ablation, dtype="float64", **choices)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_equations_1_and_2_hold(ablation):
    ds = exact(ablation)
    own = ds.ablated_direct_effect - ds.direct_effect
    xr.testing.assert_allclose(ds.self_repair, ds.logit_change - own, atol=1e-12)
    xr.testing.assert_allclose(ds.self_repair, ds.from_heads + ds.from_mlps + ds.from_norm, atol=1e-12)
    assert abs(ds.closure).max() < 1e-12


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_the_norm_follows_appendix_b(ablation):
    ds = exact(ablation)
    gain = ds.norm_scale / ds.ablated_norm_scale - 1
    clean = ds.logit - ds.target_constant
    change = ds.ablated_direct_effect - ds.direct_effect + ds.from_heads + ds.from_mlps
    xr.testing.assert_allclose(ds.norm_on_existing, (gain * clean).transpose(*ds.from_norm.dims), atol=1e-12)
    xr.testing.assert_allclose(ds.norm_on_change, (gain * change).transpose(*ds.from_norm.dims), atol=1e-12)
    ablated = (clean + change) * ds.norm_scale / ds.ablated_norm_scale + ds.target_constant
    xr.testing.assert_allclose(
        ds.logit_change, (ablated - ds.logit).transpose(*ds.from_norm.dims), atol=1e-12
    )


def test_float32_closes_to_rounding():
    ds = simulate_heads(4, 3, 6, 11)
    assert ds.direct_effect.dtype == np.float32
    assert 0 < abs(ds.closure).max() < 1e-5


def test_components_add_up():
    ds = exact(components=True)
    clean = ds.component_direct_effect.sum("component") + ds.target_constant
    xr.testing.assert_allclose(clean, ds.logit, atol=1e-12)
    for layer in range(4):
        for head in range(3):
            change = ds.component_change.sel(layer=layer, head=head)
            mine = (ds.component_layer == layer) & (ds.component_head == head)
            parts = {
                "from_heads": (ds.component_kind == "head") & ~mine,
                "from_mlps": ds.component_kind == "mlp",
            }
            for name, among in parts.items():
                total = ds[name].sel(layer=layer, head=head)
                np.testing.assert_allclose(change.where(among, 0).sum("component"), total, atol=1e-12)
            own = (ds.ablated_direct_effect - ds.direct_effect).sel(layer=layer, head=head)
            np.testing.assert_allclose(change.where(mine, 0).sum("component"), own, atol=1e-12)
            earlier = (ds.component_layer < layer) | (
                (ds.component_layer == layer) & (ds.component_kind == "head")
            )
            assert not change.where(earlier & ~mine, 0).any()


def test_components_change_nothing_else():
    plain, full = exact(), exact(components=True)
    xr.testing.assert_equal(plain, full[list(plain.data_vars)])


def test_every_variable_and_coordinate_is_there_and_valid():
    ds = simulate_heads(4, 3, 6, 11, components=True)
    bookkeeping = {"done", "selected", "noise_floor", "threshold"}
    assert set(ds.data_vars) == bookkeeping | {*CLEAN, *SWEPT, *COMPONENT}
    assert set(ds.coords) < set(COORDINATES)
    for name, array in ds.variables.items():
        assert array.dims == QUANTITIES[name].dims, name
        assert array.attrs == QUANTITIES[name].attributes
    assert not any(np.isnan(ds[name]).any() for name in SWEPT)


def test_targets_are_the_next_tokens_and_partners_a_derangement():
    ds = simulate_heads(2, 2, 30, 11)
    np.testing.assert_array_equal(ds.token[:, 1:], ds.target[:, :-1])
    np.testing.assert_array_equal(ds.token_text[:, 1:], ds.target_text[:, :-1])
    assert sorted(ds.partner.values) == list(range(30))
    assert (ds.partner != ds.prompt).all()
    assert (simulate_heads(2, 2, 30, 11, ablation="zero").partner == -1).all()


def test_the_same_arguments_give_the_same_store():
    xr.testing.assert_identical(simulate_heads(3, 2, 5, 7, seed=4), simulate_heads(3, 2, 5, 7, seed=4))
    assert not simulate_heads(3, 2, 5, 7, seed=4).equals(simulate_heads(3, 2, 5, 7, seed=5))


def test_it_looks_like_a_model():
    ds = simulate_heads()
    effects = ds.direct_effect.stack(token=("prompt", "position"))
    kurtosis = (((effects - effects.mean("token")) / effects.std("token")) ** 4).mean("token")
    assert kurtosis.median() > 10  # a normal distribution has 3
    top = ds.self_repair.where(ds.direct_effect >= ds.direct_effect.quantile(0.98, ("prompt", "position")))
    by_layer = top.mean(("head", "prompt", "position"))
    assert by_layer[0] < -0.05
    assert by_layer[-1] > 0.1
    assert (ds.from_heads[-1] == 0).all()


def test_identity_is_noise():
    ds = simulate_heads(ablation="identity", noise=1e-3)
    assert abs(ds.self_repair).max() < 0.02
    assert abs(ds.self_repair).max() > 1e-4
    assert simulate_heads(ablation="zero").ablated_direct_effect.any() == np.False_


def test_attributes_are_those_of_a_run():
    attrs = simulate_heads(3, 2, model="gpt2", ablation="mean").attrs
    assert {k: attrs[k] for k in ("recipe", "model", "n_layers", "n_heads", "target", "ablation")} == {
        "recipe": "heads",
        "model": "gpt2",
        "n_layers": 3,
        "n_heads": 2,
        "target": "centred",
        "ablation": "mean",
    }
    assert all(isinstance(value, (str, int, float)) for value in attrs.values())
    assert json.loads(attrs["provenance"])["simulated"] is True


def test_unfinished_blanks_what_is_not_done():
    whole = simulate_heads(3, 2, 5, 7, components=True)
    part = unfinished(whole, [Head(0, 1), Head(2, 0)], np.arange(5) < 3)
    assert part.selected.values.tolist() == [[False, True], [False, False], [True, False]]
    assert part.done.sum() == 2 * 3
    for name in (*SWEPT, "component_change"):
        assert (np.isfinite(part[name]) == part.done).all()
        assert part[name].attrs == whole[name].attrs
    xr.testing.assert_equal(part.direct_effect[2, 0, :3], whole.direct_effect[2, 0, :3])
    assert whole.done.all()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"ablation": "noise"}, "resample, mean, zero, identity"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"n_prompts": 1}, "n_prompts should be 2 or more"),
    ],
)
def test_bad_arguments_are_named(choices, message):
    with pytest.raises(UsageError, match=message):
        simulate_heads(**choices)


def test_a_store_at_scale_is_a_store(tmp_path):
    """What the benchmark measures: whole, checked as any other, and of the same numbers in every block."""
    from benchmarks.wide import HEADS, POSITIONS, sizes, write_wide_store

    path = tmp_path / "s.zarr"
    write_wide_store(path, layers=1, prompts=12, block=4)
    assert sr.verify(path) == []
    ds = sr.open_store(path)
    assert ds.logit_change.shape == (1, HEADS, 12, POSITIONS)
    assert np.array_equal(ds.logit_change.values[:, :, :4], ds.logit_change.values[:, :, 8:])
    assert np.isfinite(sr.by_head(ds).self_repair.values).all()
    chunk = path / "logit_change" / "c" / "0" / "0" / "2" / "0"
    assert sizes(path)["bytes"] > 3 * chunk.stat().st_size
    chunk.unlink()
    with pytest.raises(sr.SelfRepairError, match="logit_change/c/0/0/2/0 is missing"):
        sr.open_store(path)
