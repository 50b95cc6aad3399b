"""What is said of variants, cases and reinforced heads, against the formulas written out, on made-up stores."""

import numpy as np
import pytest
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import t as student

import selfrepair_nn as sr
from selfrepair_nn import blocks
from selfrepair_nn.analysis import axis_of
from selfrepair_nn.components import Head
from selfrepair_nn.errors import UsageError
from selfrepair_nn.simulate import simulate_heads, unfinished

KINDS = ("resample", "mean", "zero")
LAYERS, HEADS, PROMPTS, POSITIONS, SHARE = 3, 2, 8, 13, 0.1
SIZES = (LAYERS, HEADS, PROMPTS, POSITIONS)


@pytest.fixture(scope="module")
def single():
    """A made-up store for each kind of ablation, of one and the same clean run."""
    return {kind: simulate_heads(*SIZES, seed=3, ablation=kind, model="gpt2") for kind in KINDS}


@pytest.fixture(scope="module")
def ds(single):
    return side_by_side(single, "ablation")


def side_by_side(stores, axis):
    """Stores as the variants of one, along an axis; with lengths of the residual stream."""
    first = next(iter(stores.values()))
    last = list(stores.values())[-1]
    varied = [name for name in first.data_vars if not first[name].variable.equals(last[name].variable)]
    index = xr.IndexVariable(axis, list(stores))
    parts = [ds[varied].drop_vars(["ablation", "partner"]) for ds in stores.values()]
    found = first.drop_vars(["ablation", "partner", *varied]).merge(xr.concat(parts, index))
    lengths = {"residual_norm": 24 * found.norm_scale, "ablated_residual_norm": 25 * found.ablated_norm_scale}
    return found.assign(lengths).assign_attrs(first.attrs | {"ablation": ", ".join(map(str, stores))})


@pytest.fixture(scope="module")
def part(ds):
    """The same with one head left out and the last prompts missing."""
    done = np.arange(PROMPTS) < 5
    return unfinished(ds, [Head(i, j) for i in range(LAYERS) for j in range(HEADS) if (i, j) != (1, 0)], done)


def top_of(ds, layer, head, share=SHARE):
    """The done tokens of a head and which of them are in its top share."""
    done = ds.done.values[layer, head]
    effect = ds.direct_effect.values[layer, head][done].ravel().astype(float)
    best = np.argsort(-effect, kind="stable")[: max(1, int(share * effect.size))]
    return done, best


def places(ds):
    return [(i, j) for i in range(LAYERS) for j in range(HEADS) if ds.done.values[i, j].any()]


@pytest.fixture(params=["whole", "part"])
def store(request, ds, part):
    return {"whole": ds, "part": part}[request.param]


def test_side_by_side_is_each_by_itself(ds, single):
    found = sr.by_variant(ds, SHARE)
    for kind, one in single.items():
        alone = sr.by_head(one, SHARE)
        for name in alone.data_vars:
            ours = found[name].sel(ablation=kind) if "ablation" in found[name].dims else found[name]
            assert_array_equal(ours, alone[name], err_msg=name)
    assert "ablation" not in found.direct_effect.dims
    assert "ablation" in found.top_self_repair.dims
    assert axis_of(ds) == axis_of(found) == "ablation"


def test_a_summary_of_variants_is_returned_as_it_is(ds):
    found = sr.by_variant(ds, SHARE)
    assert sr.by_variant(found, SHARE) is found
    with pytest.raises(UsageError, match="summary is of share"):
        sr.by_variant(found, 0.5)


def test_stores_without_variants_say_so(single):
    for ask in (sr.by_variant, sr.differences, sr.token_variants):
        with pytest.raises(UsageError, match="not several variants"):
            ask(single["zero"])


def test_by_head_asks_to_choose_a_variant(ds):
    with pytest.raises(UsageError, match="ablation"):
        sr.by_head(ds)


def test_differences_token_by_token(store):
    found = sr.differences(store, SHARE)
    for layer, head in places(store):
        done, best = top_of(store, layer, head)
        values = store.self_repair.values[:, layer, head].astype(float)
        apart = (values - values[0])[:, done]
        one = found.isel(layer=layer, head=head)
        assert_allclose(one.self_repair, apart.mean((1, 2)), atol=1e-12)
        spread = apart.mean(2).std(1, ddof=1) / np.sqrt(done.sum())
        assert_allclose(one.self_repair_se, spread, atol=1e-12)
        assert_allclose(one.top_self_repair, apart.reshape(len(KINDS), -1)[:, best].mean(1), atol=1e-12)
        assert (one.self_repair_se.values[1:] > 0).all()
    assert_array_equal(found.self_repair.isel(ablation=0).fillna(0), 0)


def test_paired_errors_are_smaller_where_variants_go_together(ds):
    """The second variant is the first plus a little noise: what they differ by is known far better than either."""
    noise = np.random.default_rng(0).normal(0, 1e-3, ds.self_repair.shape[1:])
    twice = xr.concat([ds.isel(ablation=0), ds.isel(ablation=0)], xr.IndexVariable("frozen", ["a", "b"]))
    twice = twice.assign(direct_effect=ds.direct_effect, selected=ds.selected, done=ds.done)
    twice["self_repair"] = twice.self_repair + np.stack([0 * noise, noise])
    paired = sr.differences(twice.drop_vars("ablation"), SHARE).self_repair_se.isel(frozen=1)
    assert (paired < 0.2 * sr.by_head(ds.isel(ablation=0).drop_vars("ablation"), SHARE).self_repair_se).all()


def test_scale_ratios_of_every_head(store):
    found = sr.by_variant(store, SHARE, sr.scale_by_head)
    ratio = store.norm_scale.values / store.ablated_norm_scale.values.astype(float)
    for layer, head in places(store):
        done, best = top_of(store, layer, head)
        every = ratio[:, layer, head][:, done].reshape(len(KINDS), -1)
        one = found.isel(layer=layer, head=head)
        assert_allclose(one.scale_ratio, every.mean(1), rtol=1e-6)
        assert_allclose(one.above_one, (every > 1).mean(1), atol=1e-12)
        assert_allclose(one.top_scale_ratio, every[:, best].mean(1), rtol=1e-6)
        assert_allclose(one.top_above_one, (every[:, best] > 1).mean(1), atol=1e-12)
    missing = (store.done.sum("prompt") == 0).values
    assert np.isnan(found.above_one.values[:, missing]).all()


def test_tokens_of_the_loudest_heads(store):
    found = sr.token_variants(store, SHARE, 2)
    for rank in range(2):
        layer, head = int(found["layer"][rank]), int(found["head"][rank])
        done, best = top_of(store, layer, head)
        one = found.isel(rank=rank)
        marks = np.zeros(done.sum() * POSITIONS, bool)
        marks[best] = True
        assert_array_equal(one.top.values[done].ravel(), marks)
        scale = store.norm_scale.values / store.ablated_norm_scale.values[:, layer, head].astype(float)
        assert_allclose(one.scale_ratio.values[:, done], scale[:, done], rtol=1e-6)
        assert_allclose(one.residual_ratio.values[:, done], 25 / 24 / scale[:, done], rtol=1e-6)
        assert_array_equal(
            one.logit_change.values[:, done], store.logit_change.values[:, layer, head][:, done]
        )
        assert np.isnan(one.scale_ratio.values[:, ~done]).all()


def test_small_blocks_give_the_same(store, monkeypatch):
    ask = (
        lambda: sr.by_variant(store, SHARE, sr.scale_by_head),
        lambda: sr.differences(store, SHARE),
        lambda: sr.token_variants(store, SHARE, 2),
    )
    whole = [one() for one in ask]
    monkeypatch.setattr(blocks, "BLOCK", 1)
    for one, before in zip(ask, whole, strict=True):
        xr.testing.assert_allclose(one(), before, rtol=1e-12)


def cases_of(one):
    """A store of heads, its heads as the cases of a store without a grid."""
    stacked = one.stack(case=("layer", "head")).transpose("case", ...).reset_index("case")
    labels = [Head(i, j).label for i in range(LAYERS) for j in range(HEADS)]
    floor = np.repeat(one.noise_floor.values, HEADS)
    stacked = stacked.drop_vars(["layer", "head", "noise_floor"]).assign(noise_floor=("case", floor))
    return stacked.assign_coords(case=labels, case_layer=("case", np.repeat(range(LAYERS), HEADS)))


def test_cases_are_summed_up_as_heads_are(single):
    one = unfinished(single["zero"], None, np.arange(PROMPTS) < 6)
    heads, cases = sr.by_head(one, SHARE), sr.by_case(cases_of(one), SHARE)
    for name in cases.data_vars:
        theirs = heads[name].broadcast_like(heads.tokens).values.ravel()
        assert_array_equal(cases[name], theirs, err_msg=name)
    assert list(cases.case_layer.values) == [0, 0, 1, 1, 2, 2]
    assert sr.by_case(cases, SHARE) is cases


def test_cases_and_heads_are_not_mixed_up(single):
    with pytest.raises(UsageError, match="use by_head"):
        sr.by_case(single["zero"])
    with pytest.raises(UsageError, match="lacks layer, head"):
        sr.by_head(cases_of(single["zero"]))


# ---------------------------------------------------------------- reinforced heads


def reinforced(slopes, prompts=60, noise=0.05, seed=0, scales=(1.0, 3.0)):
    """A store of one layer whose heads answer to their own write with these slopes for each unit of scale."""
    rng = np.random.default_rng(seed)
    one = simulate_heads(1, len(slopes), prompts, 5, seed=seed, ablation="zero")
    where = rng.integers(0, 5, prompts)
    change = np.array(scales)[:, None, None, None, None] * np.array(slopes)[None, None, :, None, None]
    after = one.direct_effect.values * (1 + change) + rng.normal(
        0, noise, (len(scales), *one.direct_effect.shape)
    )
    elsewhere = np.arange(5) != where[:, None]
    after = np.where(elsewhere, 1e3, after)
    dims = ("scale", *one.direct_effect.dims)
    one = one.assign(
        ablated_direct_effect=(dims, after), self_repair=(dims, after), logit_change=(dims, after)
    )
    return one.assign_coords(scale=list(scales), edited_position=("prompt", where)).drop_vars("ablation")


def test_slopes_are_those_of_least_squares():
    ds = unfinished(reinforced([-0.2, 0.1]), None, np.arange(60) < 40)
    found = sr.reinforcement_by_head(ds)
    for scale, head in np.ndindex(2, 2):
        at = [(p, int(i)) for p, i in enumerate(ds.edited_position.values[:40])]
        x = np.array([ds.direct_effect.values[0, head, p, i] for p, i in at], float)
        y = np.array([ds.ablated_direct_effect.values[scale, 0, head, p, i] for p, i in at], float) - x
        one = found.isel(scale=scale, layer=0, head=head)
        assert_allclose([one.slope, one.intercept], np.polyfit(x, y, 1), rtol=1e-6)
        assert_allclose(
            (one.high - one.low) / 2, interval(x, y, ds.document.values[:40], 1 - 0.05 / 2), rtol=1e-6
        )
        assert int(one.tokens) == 40
    assert np.isnan(found.before.values[..., 40:]).all()


def interval(x, y, document, level):
    """Half the slope's interval: numpy's regression without each document in turn, and Student's quantile."""
    kept = [document != name for name in np.unique(document)]
    moved = np.array([np.polyfit(x[keep], y[keep], 1)[0] for keep in kept]) - np.polyfit(x, y, 1)[0]
    held = np.array([np.square(x - x.mean())[~keep].sum() for keep in kept])
    freedom = held.sum() ** 2 / np.square(held).sum() - 1
    return np.sqrt((1 - 1 / len(kept)) * np.square(moved).sum()) * student.ppf((1 + level) / 2, freedom)


def test_slopes_of_few_prompts_are_not_judged():
    found = sr.reinforcement_by_head(reinforced([-0.3, 0.2], prompts=19, noise=0.001))
    assert not found.kind.values.any()
    assert np.isinf(found.high).all()
    assert "too few prompts for an interval" in str(sr.summary(reinforced([-0.3], prompts=19)))


def test_repressing_and_reinforcing_heads_are_found_and_ranked():
    ds = reinforced([-0.1, 0.0, 0.2, -0.3, 0.0], prompts=200, noise=0.002)
    found = sr.reinforcement_by_head(ds)
    assert_array_equal(found.kind[0], [-1, 0, 1, -1, 0])
    assert list(sr.strongest_responses(ds)["head"].values) == [3, 0]
    assert list(sr.strongest_responses(found, 1)["head"].values) == [3]
    assert list(sr.strongest_responses(found, -5)["head"].values) == [2]
    told = str(sr.summary(ds))
    assert "self-repressing: 2 of 5 heads" in told
    assert told.index("L0H3") < told.index("L0H0") < told.index("L0H2")


def test_heads_that_do_not_answer_are_seldom_listed():
    """All intervals of a scale hold together with 95%: of 40 stores of heads of slope 0 some two have one wrong."""
    wrong = 0
    for seed in range(40):
        found = sr.reinforcement_by_head(reinforced([0.0] * 10, seed=seed, scales=(1.0,)))
        wrong += bool(found.kind.values.any())
    assert wrong <= 5  # at most this many with probability 0.98


def test_a_head_that_never_writes_has_no_slope():
    ds = reinforced([0.1, 0.1])
    effects = ds.direct_effect.copy(data=ds.direct_effect.values * np.array([1, 0])[:, None, None])
    found = sr.reinforcement_by_head(ds.assign(direct_effect=effects))
    assert np.isnan(found.slope.values[:, 0, 1]).all()
    assert found.kind.values[0, 1] == 0


def test_stores_and_confidences_that_cannot_be(single):
    with pytest.raises(UsageError, match="lacks edited_position, scale"):
        sr.reinforcement_by_head(single["zero"])
    with pytest.raises(UsageError, match="confidence 95"):
        sr.reinforcement_by_head(reinforced([0.1]), 95)


def test_summaries_have_a_line_for_each_variant_and_case(ds, single):
    told = str(sr.summary(ds, SHARE))
    means = sr.by_variant(ds, SHARE).top_self_repair.mean(("layer", "head"))
    for kind in KINDS:
        [line] = [line for line in told.splitlines() if line.startswith(kind)]
        assert f"{float(means.sel(ablation=kind)):+.3f}" in line
    told = str(sr.summary(cases_of(single["zero"]), SHARE))
    assert "6 cases" in told
    assert [line.split()[0] for line in told.splitlines() if line.startswith("L")] == [
        "L0H0", "L0H1", "L1H0", "L1H1", "L2H0", "L2H1"
    ]  # fmt: skip


def test_summaries_of_nothing(ds, single):
    for store in (ds, cases_of(single["zero"]), reinforced([0.1])):
        blank = store.assign(done=xr.zeros_like(store.done))
        assert "nothing is done yet" in str(sr.summary(blank))
