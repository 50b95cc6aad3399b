"""Nulls of what is found: by hand, by naive code, and on made-up stores where the null holds."""

import numpy as np
import pytest
import xarray as xr
from made import hand_made
from numpy.testing import assert_allclose
from scipy.stats import linregress

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.analysis import by_layer
from selfrepair_nn.confidence import Tally
from selfrepair_nn.errors import UsageError
from selfrepair_nn.simulate import simulate_heads

WRITES = ["own", "reversed", "partner", "random"]
VARIED = ["ablated_direct_effect", "logit_change", "self_repair", "closure"]


def covered(low, high, truth=0):
    """The share of intervals that hold the truth; all must have ends."""
    assert np.isfinite(low).all()
    assert np.isfinite(high).all()
    return float(((low <= truth) & (truth <= high)).mean())


# ---------------------------------------------------------------- the norm's share


def test_the_mirror_of_the_norms_share_by_hand():
    """Ratios of 1/2, -1/4, 3 and -2: shares 1/2, 0, 1, 0, mirrors 0, 1/4, 0, 1."""
    ds = hand_made([[2, 4], [1, 3]], from_norm=[[1, -1], [3, -6]])
    found = sr.by_head(ds, 1).squeeze()
    assert float(found.norm_share) == 0.375
    assert float(found.norm_mirror) == 0.3125
    assert float(found.norm_excess) == 0.0625


def test_the_excess_is_that_of_every_token():
    ds = simulate_heads(2, 3, 30, 40, seed=3)
    found = sr.by_head(ds, 0.1)
    ratio = (ds.from_norm / ds.direct_effect).values.reshape(6, -1).astype(float)
    best = np.argsort(-ds.direct_effect.values.reshape(6, -1), axis=1)[:, :120]
    values = np.take_along_axis(np.clip(ratio, -1, 1), best, 1)
    assert_allclose(found.norm_excess.values.ravel(), values.mean(1), rtol=1e-6)
    assert_allclose(found.norm_excess, found.norm_share - found.norm_mirror, atol=1e-12)
    layers = by_layer(found, 0.1)
    assert_allclose(layers.norm_excess, found.norm_excess.mean("head"))
    assert np.isfinite(layers.norm_excess_half_width).all()


def test_a_norm_that_breaks_as_often_as_it_repairs_has_no_excess():
    """600 heads whose norm's part has either sign alike: a clipped share of a third, and intervals that hold 0."""
    ds, rng = simulate_heads(6, 100, 40, 6, seed=2), np.random.default_rng(5)
    ds = ds.assign(from_norm=ds.direct_effect * rng.standard_t(3, ds.direct_effect.shape).astype("float32"))
    found = sr.by_head(ds.assign_coords(document=("prompt", np.arange(40))), 1)
    assert float(found.norm_share.mean()) > 0.25
    width = found.norm_excess_half_width
    assert 0.93 <= covered(found.norm_excess - width, found.norm_excess + width) <= 0.985


# ---------------------------------------------------------------- erasure


def neurons(seed=0, lean=0.5):
    """A store of 200 heads, whose most rising and most falling neurons wrote against the target on `lean` of tokens."""
    ds, rng = simulate_heads(2, 100, 40, 10, seed=seed), np.random.default_rng(seed)
    sweep, token = ("layer", "head", "prompt", "position"), ("prompt", "position")
    shape = ds.self_repair.shape
    size, change = (np.abs(rng.normal(size=shape)) for _ in range(2))
    against, mirrored = (np.where(rng.random(shape) < share, -1, 1) for share in (lean, 0.5))
    values = {
        "mlp_direct_effect": (token, rng.normal(size=shape[2:])),
        "mlp_change": (sweep, rng.normal(size=shape)),
        "falling_neuron": (sweep, np.zeros(shape, int)),
        "falling_neuron_change": (sweep, -change),
        "falling_neuron_direct_effect": (sweep, mirrored * size),
    }
    ranked = {"top_neuron": np.zeros(shape, int), "top_neuron_change": change}
    ranked["top_neuron_direct_effect"] = against * size
    values |= {name: ((*sweep, "rank"), array[..., None]) for name, array in ranked.items()}
    values |= {
        name: ((*sweep, "neuron"), np.zeros((*shape, 1))) for name in ("neuron_change", "neuron_direct_effect")
    }
    return ds.assign(values).assign_coords(document=("prompt", np.arange(40)), rank=[0], neuron=[0])


def test_the_mirror_of_erasure_by_naive_code():
    ds = neurons(1)
    found = sr.erasure_neurons(ds, 0.1, 3)
    for rank in range(3):
        one = ds.sel(layer=found["layer"][rank], head=found["head"][rank])
        change = one.mlp_change.values.ravel()
        order = np.argsort(-change)
        repaired, broken = order[:40], order[-40:]
        rises = one.top_neuron_direct_effect.values.ravel()[repaired] < 0
        falls = one.falling_neuron_direct_effect.values.ravel()[broken] > 0
        assert_allclose(found.anti_erasing[rank], rises.mean())
        assert_allclose(found.mirror[rank], falls.mean())
        assert_allclose(found.excess[rank], rises.mean() - falls.mean())
        tallies = []
        for marks, where in ((rises, repaired), (falls, broken)):
            sums, counts = (np.bincount(where // 10, w, 40)[None] for w in (marks, np.ones(40)))
            tallies.append(Tally(sums, counts).estimate)
        moved = tallies[0].influence - tallies[1].influence
        assert_allclose(tallies[0].minus(tallies[1]).error, np.sqrt((moved**2).sum(1)))
        assert_allclose(found.excess_half_width[rank], tallies[0].minus(tallies[1]).half_width[0])


def test_neurons_of_either_sign_alike_have_no_excess_of_erasure():
    found = sr.erasure_neurons(neurons(), 0.3, 200)
    width = found.excess_half_width
    assert 0.92 <= covered(found.excess - width, found.excess + width) <= 0.99
    assert float(found.anti_erasing.mean()) == pytest.approx(0.5, abs=0.02)
    erasing = sr.erasure_neurons(neurons(lean=0.9), 0.3, 200)
    assert ((erasing.excess - erasing.excess_half_width) > 0).mean() > 0.95


def test_older_stores_have_no_mirror():
    ds = neurons().drop_vars([f"falling_neuron{end}" for end in ("", "_change", "_direct_effect")])
    found = sr.erasure_neurons(ds, 0.3, 2)
    assert np.isnan(found.excess).all()
    assert np.isfinite(found.anti_erasing).all()
    assert "mirrored" not in str([t.get_text() for a in figures.draw("erasure_neurons", ds).axes for t in a.texts])


# ---------------------------------------------------------------- heads that answer to their own write


def answering(slopes, seed=0, heads=(4, 25), prompts=60, noise=0.3):
    """A store of heads whose direct effect changes by these slopes [write] times it, and by chance."""
    rng = np.random.default_rng(seed)
    ds, parts = simulate_heads(*heads, prompts, 1, seed=seed), []
    ds = ds.assign(direct_effect=ds.direct_effect.copy(data=rng.normal(size=ds.direct_effect.shape)))
    for slope in slopes:
        drawn = ds.direct_effect * (1 + slope) + noise * rng.normal(size=ds.direct_effect.shape)
        parts.append(ds[VARIED].assign(ablated_direct_effect=drawn))
    varied = xr.concat(parts, xr.Variable("write", WRITES))
    found = ds.drop_vars(VARIED).assign(varied)
    found = found.assign_coords(
        edited_position=("prompt", np.zeros(prompts, int)), document=("prompt", np.arange(prompts))
    )
    return found.assign_attrs(ablation="reinforce_5, reinforce_-5, reinforcepartner_5, reinforcerandom_5")


def test_slopes_and_their_excess_are_those_of_regressions():
    ds = answering([-0.4, 0.1, -0.3, 0], heads=(2, 3))
    found = sr.reinforcement_nulls(ds)
    assert found["null"].values.tolist() == WRITES[1:]
    before = ds.direct_effect.values[..., 0].astype(float)
    after = ds.ablated_direct_effect.values[..., 0].astype(float)
    for layer in range(2):
        for head in range(3):
            x, y = before[layer, head], after[:, layer, head]
            at = {"layer": layer, "head": head}
            for index, write in enumerate(WRITES):
                assert_allclose(found.slope.sel(write=write, **at), linregress(x, y[index] - x).slope, rtol=1e-6)
            for index, null in enumerate(WRITES[1:], 1):
                expected = linregress(x, y[0] - y[index]).slope
                assert_allclose(found.excess.sel(null=null, **at), expected, rtol=1e-6, atol=1e-9)


def test_heads_that_answer_to_anything_are_not_beyond_the_nulls():
    """100 heads that shrink by as much whatever is added: self-repressing by their own write, and beyond no null."""
    found = sr.reinforcement_nulls(answering([-0.5] * 4))
    assert (found.kind == -1).mean() > 0.9
    assert (found.beyond == 0).all()


@pytest.mark.thorough
def test_the_intervals_of_the_excess_hold_together():
    """Of 60 stores of 20 heads without excess, one in twenty may have any head whose interval leaves 0 out."""
    outside = []
    for seed in range(60):
        found = sr.reinforcement_nulls(answering([-0.3] * 4, seed, heads=(1, 20), prompts=40))
        away = (found.excess_low > 0) | (found.excess_high < 0)
        outside.append(away.any(["layer", "head"]).values)
    assert np.mean(outside) <= 0.09  # 180 families, one in twenty expected at most


def test_a_head_that_answers_to_its_own_write_alone():
    ds = answering([-0.6, 0.6, 0, 0])
    found = sr.reinforcement_nulls(ds)
    assert ((found.beyond == -1) | (found.kind == 0)).mean() > 0.95
    assert (found.beyond == -1).sum() > 50
    assert sr.reinforcement_nulls(found) is found
    assert str(sr.summary(found)) == str(sr.summary(ds))
    text = str(sr.summary(ds))
    [row] = [line.split() for line in text.splitlines() if line.startswith("self-repressing")]
    assert row[1:4] == [str(int((found.kind == -1).sum())), "of", "100"]
    assert row[-1] == str(int((found.beyond == -1).sum()))
    figure = figures.draw("reinforcement_nulls", ds)
    assert len(figure.axes) == 4
    assert f"{row[1]} repress, 0 reinforce" in figure.axes[0].get_title("left")
    assert "and nulls of it" in figure.get_suptitle()


def test_what_has_no_nulls_is_refused():
    with pytest.raises(UsageError, match="this is not a store of reinforced heads: it lacks"):
        sr.reinforcement_nulls(simulate_heads(2, 2, 4, 3))
    lone = answering([0] * 4, heads=(1, 1)).isel(write=[1, 2])
    with pytest.raises(UsageError, match="no null beside 'own', but reversed, partner: run reinforcement_nulls"):
        sr.reinforcement_nulls(lone)
