"""The recipes on the command line, from a model to the figures: what they run, and their numbers by plain numpy."""

import json

import numpy as np
import pytest
from terminal import ids, saved, selfrepair

import selfrepair_nn as sr
from selfrepair_nn.recipe import recipe_paths


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return ids(tmp_path_factory.mktemp("prompts") / "p.npy", prompts=10, length=11)


@pytest.fixture(scope="module")
def ran(tmp_path_factory, model, prompts):
    """ran(recipe, *flags): the store of a recipe and the figures that `plot` drew of it."""

    def run(recipe, *flags):
        store = tmp_path_factory.mktemp(recipe) / "s.zarr"
        flags = ("--model", model, "--prompts", prompts, "--out", store, *flags)
        assert selfrepair("run", recipe, *flags).code == 0
        drawn = selfrepair("plot", store, "--share", "0.1")
        assert drawn.code == 0, drawn.err
        return sr.open_store(store).load(), sorted(line.rpartition("/")[2] for line in drawn.out.split())

    return run


def values(ds, *names):
    """Arrays [case, token] of a store's variables, in float64."""
    n_cases = ds.sizes["layer"] * ds.sizes["head"]
    return (ds[name].values.astype(float).reshape(n_cases, -1) for name in names)


@pytest.mark.usefixtures("hardly_written")
def test_noise_ablates_the_last_third(ran):
    ds, drawn = ran("token_scatter")
    assert drawn == ["token_noise.png", "token_noise.svg"]
    assert ds["layer"].values.tolist() == [2]  # of three
    effect, change = values(ds, "direct_effect", "logit_change")
    tokens = sr.token_noise(ds)
    order = np.argsort(-effect.mean(1))[:4]
    assert tokens["head"].values.tolist() == order.tolist()
    for rank, case in enumerate(order):
        slope = np.polyfit(effect[case], change[case], 1)[0]
        correlation = slope * effect[case].std() / change[case].std()
        assert float(tokens.correlation[rank]) == pytest.approx(correlation)
        turned = (
            np.degrees(np.arctan2(change[case], effect[case])) % 180
        )  # y = -x is 135 degrees, the x-axis 180
        for name, (low, high) in {"over": (0, 90), "broken": (90, 135), "under": (135, 180)}.items():
            assert float(tokens[name][rank]) == np.mean((turned > low) & (turned < high)), name


@pytest.mark.usefixtures("hardly_written")
@pytest.mark.parametrize(
    ("flags", "layers"), [(("--heads", "0.1,1.2"), [0, 1]), (("--layers", ":2"), [0, 1])]
)
def test_noise_takes_chosen_heads(ran, flags, layers):
    assert ran("token_scatter", *flags)[0]["layer"].values.tolist() == layers


@pytest.mark.usefixtures("hardly_written")
def test_norm_share_recomputed_from_the_scales(ran):
    """Appendix B from S, S' and the logits alone, and not from the stored parts."""
    ds, drawn = ran("norm_share", "--dtype", "float64")
    assert drawn == ["norm_share.png", "norm_share.svg"]
    effect, after, heads, mlps, scale = values(
        ds, "direct_effect", "ablated_direct_effect", "from_heads", "from_mlps", "ablated_norm_scale"
    )
    clean = (ds.logit - ds.target_constant).values.ravel()
    stretch = ds.norm_scale.values.ravel() / scale - 1
    existing, change = stretch * clean, stretch * (after - effect + heads + mlps)
    best = np.argsort(-effect, axis=1)[:, : int(0.1 * effect.shape[1])]
    norm = sr.norm_by_head(ds, 0.1)
    for name, array in (("norm_on_existing", existing), ("norm_on_change", change)):
        np.testing.assert_allclose(norm[name].values.ravel(), array.mean(1), rtol=1e-9)
        top = np.take_along_axis(array, best, 1).mean(1)
        np.testing.assert_allclose(norm[f"top_{name}"].values.ravel(), top, rtol=1e-9)
    ratio = (existing + change) / effect
    np.testing.assert_allclose(norm.norm_ratio.values.ravel(), ratio.mean(1), rtol=1e-9)
    top = np.clip(np.take_along_axis(ratio, best, 1), 0, 1).mean(1)
    np.testing.assert_allclose(norm.norm_share.values.ravel(), top, rtol=1e-9)


@pytest.mark.usefixtures("hardly_written")
def test_repairers_keeps_the_top_share_of_every_component(ran):
    ds, drawn = ran("repairers", "--share", "0.1")
    assert drawn == [f"repair_{name}.{ending}" for name in ("graph", "map") for ending in ("png", "svg")]
    assert json.loads(ds.attrs["settings"])["components"] == "top"
    whole, _ = ran("repairers", "--components", "all")
    pairs, [effect] = sr.who_repairs(ds, 0.1), values(ds, "direct_effect")
    changes = whole.component_change.values.reshape(*effect.shape, -1)
    best = np.argsort(-effect, axis=1)[:, : int(0.1 * effect.shape[1])]
    expected = np.take_along_axis(changes, best[..., None], 1).mean(1)
    np.testing.assert_allclose(pairs.repair.values.reshape(expected.shape), expected, rtol=1e-5, atol=1e-7)
    others = pairs.repair.where(~pairs.own, 0).sum("component")
    np.testing.assert_allclose(others + pairs.top_from_norm, pairs.top_self_repair, atol=2e-5)
    refused = selfrepair("plot", ds.encoding["source"], "--share", "0.2")
    assert refused.code == 2
    assert "top 10% of tokens only" in refused.err


def test_plot_draws_chosen_heads(ran):
    store = ran("token_scatter", "--layers", ":")[0].encoding["source"]
    drawn = selfrepair("plot", store, "--heads", "0.1,2.3", "--figure", "token_noise")
    svg = next(line for line in drawn.out.split() if line.endswith(".svg"))
    with open(svg) as file:
        text = file.read()
    assert [f">L{place}</text>" in text for place in ("0H1", "2H3", "1H0")] == [True, True, False]
    wrong = selfrepair("plot", store, "--heads", "7.1")
    assert (wrong.code, "layers 0 to 2" in wrong.err) == (2, True)


def test_recipes_are_listed_with_a_line_each():
    lines = selfrepair("recipes").out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipe_paths())
    assert all(len(line.split()) > 5 for line in lines)
