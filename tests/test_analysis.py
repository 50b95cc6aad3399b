"""Summaries against hand-worked numbers, naive code and what must not matter."""

import math
import tracemalloc

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from made import hand_made
from xarray.backends.zarr import ZarrArrayWrapper

from selfrepair_nn import blocks
from selfrepair_nn.analysis import MEANS, by_head, by_layer, done_share, most_repaired, top_share
from selfrepair_nn.components import Head
from selfrepair_nn.errors import StoreError, UsageError
from selfrepair_nn.simulate import simulate_heads, unfinished
from selfrepair_nn.table import COLUMNS
from selfrepair_nn.text import number, summary

SWEEP = ("layer", "head", "prompt", "position")


@pytest.fixture
def ds():
    return simulate_heads(4, 3, 8, 13, seed=3)


@pytest.fixture
def part(ds):
    """Heads with everything, some, one or none of their prompts done; one head is not selected."""
    done = np.arange(8) < np.array([[8, 5, 0], [1, 2, 8], [8, 8, 8], [8, 8, 8]])[..., None]
    heads = [Head(i, j) for i in range(4) for j in range(3) if (i, j) != (3, 1)]
    return unfinished(ds, heads, done)


def naive_top(effects: np.ndarray, done: np.ndarray, share: float) -> np.ndarray:
    """The top share of one head by a stable sort, over [prompt, position]."""
    tokens = [(p, t) for p in np.flatnonzero(done) for t in range(effects.shape[1])]
    marks = np.zeros(effects.shape, bool)
    ranked = sorted(tokens, key=lambda token: -effects[token])
    for token in ranked[: max(1, math.floor(share * len(tokens)))]:
        marks[token] = True
    return marks


def test_by_hand():
    ds = hand_made(
        [[4, -1, 0], [2, 1, 0]],
        logit_change=[[-1, 0, 0], [-3, 0, 1]],
        self_repair=[[3, 1, 2], [-1, 1, 0]],
        from_norm=[[2, 9, 9], [-1, 9, 9]],
        closure=[[0, -1e-6, 0], [0, 0, 1e-7]],
    )
    heads = by_head(ds, 0.4).isel(layer=0, head=0)
    expected = {
        "tokens": 6,
        "top_tokens": 2,
        "direct_effect": 1,
        "top_direct_effect": 3,
        "logit_change": -0.5,
        "top_logit_change": -2,
        "self_repair": 1,
        "top_self_repair": 1,
        "self_repair_se": 1,
        "top_self_repair_se": 2,
        "distance": 0.5 / math.sqrt(2),
        "top_distance": 1 / math.sqrt(2),
        "between": True,
        "top_between": True,
        "repaired": False,  # two prompts say too little
        "top_repaired": False,
        "self_repair_half_width": math.inf,
        "removed": 1,
        "top_removed": 3,
        "share_repaired": 1,
        "top_share_repaired": 1 / 3,
        "norm_share": 0.25,
        "worst_closure": 1e-6,
        "noise_floor": 0.01,
    }
    for name, value in expected.items():
        assert heads[name].item() == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize(
    ("effect", "repair", "floor", "repaired"),
    [(2, 1, 0, True), (2, -1, 0, False), (-2, -1, 0, True), (-2, 1, 0, False), (2, 1, 1.5, False)],
)
def test_repair_has_the_sign_of_the_direct_effect_and_exceeds_the_noise(effect, repair, floor, repaired):
    """Of a head whose self-repair is known: broken is what has the other sign."""
    rows = [[effect]] * 20
    ds = hand_made(rows, self_repair=[[repair]] * 20).assign(noise_floor=("layer", [floor]))
    heads = by_head(ds, 1)
    assert heads.top_repaired.item() is repaired
    assert heads.top_broken.item() is (effect * repair < 0)


@pytest.mark.parametrize(
    ("change", "between"), [(-1, True), (-2, False), (-3, False), (0, False), (1, False)]
)
def test_the_wedge_of_figure_2(change, between):
    assert by_head(hand_made([[2]], logit_change=[[change]])).between.item() is between
    assert by_head(hand_made([[-2]], logit_change=[[-change]])).between.item() is between


def test_norm_share_is_clipped_per_token_and_zero_without_an_effect():
    effects, norm = [[4, 2, 1, 0]], [[2, -5, 7, 3]]
    heads = by_head(hand_made(effects, from_norm=norm), 1.0)
    assert heads.norm_share.item() == pytest.approx((0.5 + 0 + 1 + 0) / 4)


def test_standard_error_is_that_of_the_prompts_means(ds):
    heads = by_head(ds)
    means = ds.self_repair.astype(float).mean("position")
    np.testing.assert_allclose(heads.self_repair_se, means.std("prompt", ddof=1) / math.sqrt(8), rtol=1e-6)


def test_standard_error_of_the_top_share_is_the_jackknife_of_a_ratio(ds):
    """Each prompt left out in turn: documents are few."""
    marks = top_share(ds, 0.1)
    sums = ds.self_repair.astype(float).where(marks, 0).sum("position")
    counts = marks.sum("position")
    without = (sums.sum("prompt") - sums) / (counts.sum("prompt") - counts)
    held = counts > 0
    moved = (without - sums.sum("prompt") / counts.sum("prompt")).where(held, 0)
    n = held.sum("prompt")
    np.testing.assert_allclose(
        by_head(ds, 0.1).top_self_repair_se, np.sqrt((1 - 1 / n) * (moved**2).sum("prompt")), rtol=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(
    effects=arrays(np.float32, (1, 2, 5, 4), elements=st.integers(-3, 3).map(float)),
    done=arrays(bool, (1, 2, 5)),
    share=st.floats(0.001, 1),
    block=st.integers(1, 60),
)
def test_top_share_is_a_naive_sort(effects, done, share, block):
    ds = simulate_heads(1, 2, 5, 4).assign(direct_effect=(SWEEP, effects), done=(SWEEP[:3], done))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        marks = top_share(ds, share).values
    for head in range(2):
        if done[0, head].any():
            np.testing.assert_array_equal(marks[0, head], naive_top(effects[0, head], done[0, head], share))
        else:
            assert not marks[0, head].any()


@pytest.mark.parametrize("block", [1, 200, 10**6])
def test_means_are_the_naive_ones_on_a_partly_done_store(part, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    heads = by_head(part, 0.1)
    marks = top_share(part, 0.1)
    counted = (part.done & part.selected).broadcast_like(part.direct_effect).transpose(*SWEEP)
    for name in MEANS:
        values = part[name].astype(float)
        np.testing.assert_allclose(heads[name], values.where(counted).mean(SWEEP[2:]), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            heads[f"top_{name}"], values.where(marks).mean(SWEEP[2:]), rtol=1e-9, atol=1e-12
        )
    np.testing.assert_array_equal(heads.tokens, counted.sum(SWEEP[2:]))
    np.testing.assert_array_equal(heads.top_tokens, marks.sum(SWEEP[2:]))
    np.testing.assert_array_equal(heads.worst_closure, abs(part.closure).where(counted).max(SWEEP[2:]))
    shares = (part.from_norm / part.direct_effect).clip(0, 1).where(marks).mean(SWEEP[2:])
    np.testing.assert_allclose(heads.norm_share, shares, rtol=1e-5, atol=1e-7)


def test_nothing_done_is_nan_and_not_counted(part):
    heads = by_head(part)
    for layer, head in ((0, 2), (3, 1)):
        one = heads.isel(layer=layer, head=head)
        assert one.tokens == one.top_tokens == 0
        assert all(
            np.isnan(one[name]) for name in ("self_repair", "top_self_repair", "norm_share", "worst_closure")
        )
        assert not one.top_repaired
    assert np.isnan(heads.self_repair_se[1, 0])  # one prompt
    layers = by_layer(part)
    assert layers.heads.values.tolist() == [2, 3, 3, 2]
    np.testing.assert_allclose(layers.top_self_repair[0], heads.top_self_repair[0, :2].mean())


def test_what_is_not_done_does_not_matter(part):
    rubbish = part.assign({n: part[n].fillna(1e6) for n in (*MEANS, "closure")})
    xr.testing.assert_identical(by_head(part), by_head(rubbish))


def test_what_is_not_selected_does_not_count(ds):
    chosen = ds.selected.copy(data=ds["head"].values == np.ones((4, 1)))
    heads = by_head(ds.assign(selected=chosen), 0.1)
    np.testing.assert_array_equal(heads.tokens > 0, chosen)
    np.testing.assert_array_equal(heads.top_self_repair, by_head(ds, 0.1).top_self_repair.where(chosen))


def test_a_broken_value_that_is_done_is_refused(ds):
    ds.self_repair[2, 1, 0, 0] = np.nan
    with pytest.raises(StoreError, match="self_repair of prompt 0 is blank though it is marked done"):
        by_head(ds)


@pytest.fixture(scope="module")
def in_order():
    """A store of eight prompts, and its summary."""
    ds = simulate_heads(2, 2, 8, 5)
    return ds, by_head(ds, 0.2)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(8)))
def test_order_of_prompts_does_not_matter(in_order, order):
    ds, known = in_order
    xr.testing.assert_allclose(known, by_head(ds.isel(prompt=list(order)), 0.2), rtol=1e-9, atol=1e-14)


def test_dimension_order_does_not_matter(ds):
    turned = ds.transpose("position", "prompt", "head", "layer")
    xr.testing.assert_allclose(by_head(ds), by_head(turned).transpose("layer", "head"))
    xr.testing.assert_equal(top_share(ds), top_share(turned))


def test_share_of_one_is_all_tokens(ds):
    heads = by_head(ds, 1.0)
    for name in MEANS:
        np.testing.assert_allclose(heads[f"top_{name}"], heads[name], rtol=1e-9, atol=1e-12)


def test_lazily_opened_equals_in_memory(part, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 100)
    layout = {
        n: {"chunks": [3 if d == "prompt" else part.sizes[d] for d in part[n].dims]} for n in part.data_vars
    }
    part.to_zarr(tmp_path / "run.zarr", encoding=layout, consolidated=False)
    opened = xr.open_zarr(tmp_path / "run.zarr", consolidated=False, chunks=None)
    xr.testing.assert_identical(by_head(opened, 0.1), by_head(part, 0.1))
    xr.testing.assert_equal(top_share(opened, 0.1), top_share(part, 0.1))
    np.testing.assert_array_equal(done_share(opened), done_share(part))


def test_what_every_statistic_looks_at_is_read_once(tmp_path, monkeypatch):
    """Of a store on a slow disk, or far away, each time would count."""
    ds, read = simulate_heads(2, 2, 8, 5), []
    ds = ds.assign_coords(counted=(("prompt", "position"), ds.logit.values > 0))
    ds.to_zarr(tmp_path / "run.zarr", consolidated=False)
    opened = xr.open_zarr(tmp_path / "run.zarr", consolidated=False, chunks=None)
    real = ZarrArrayWrapper.__getitem__

    def seen(array, key):
        read.append(array._array.basename)
        return real(array, key)

    monkeypatch.setattr(ZarrArrayWrapper, "__getitem__", seen)
    by_head(opened, 0.2)
    assert read.count("counted") == read.count("done") == read.count("selected") == read.count("document") == 1


def test_no_variable_is_held_whole(tmp_path, monkeypatch):
    big = simulate_heads(3, 4, 600, 200)
    layout = {
        n: {"chunks": [20 if d == "prompt" else big.sizes[d] for d in big[n].dims]} for n in big.data_vars
    }
    big.to_zarr(tmp_path / "run.zarr", encoding=layout, consolidated=False)
    opened = xr.open_zarr(tmp_path / "run.zarr", consolidated=False, chunks=None)
    monkeypatch.setattr(blocks, "BLOCK", 1)
    by_head(opened.isel(prompt=slice(0, 20)), 0.001)
    tracemalloc.start()
    by_head(opened, 0.001)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < big.direct_effect.nbytes / 2


def test_every_variable_is_read_once_in_whole_chunks(ds, monkeypatch):
    read, real = [], blocks._blocks

    def counted(store, name):
        for start, values in real(store, name):
            read.append((name, start))
            yield start, values

    monkeypatch.setattr(blocks, "_blocks", counted)
    monkeypatch.setattr(blocks, "BLOCK", 3 * 4 * 13 * 4)
    for name in ds.data_vars:
        ds[name].encoding["preferred_chunks"] = {"prompt": 3}
    by_head(ds)
    assert sorted(read) == sorted((name, start) for name in (*MEANS, "closure") for start in (0, 3, 6))


def test_layers_are_means_over_heads(ds):
    heads, layers = by_head(ds), by_layer(ds)
    for name in ("top_self_repair", "logit_change", "norm_share", "top_between", "distance"):
        np.testing.assert_allclose(layers[name], heads[name].mean("head"))
    np.testing.assert_array_equal(layers.tokens, heads.tokens.sum("head"))
    np.testing.assert_array_equal(layers.worst_closure, heads.worst_closure.max("head"))
    assert layers.attrs == heads.attrs


def test_under_noise_marks_layers():
    ds = hand_made([[1]], self_repair=[[0.005]])
    assert by_layer(ds).under_noise.item() is True
    assert by_layer(ds.assign(noise_floor=("layer", [0.004]))).under_noise.item() is False
    assert by_layer(ds.drop_vars("noise_floor")).under_noise.item() is False


def test_a_summary_stands_for_its_store(ds):
    heads = by_head(ds, 0.1)
    assert by_head(heads, 0.1) is heads
    xr.testing.assert_identical(by_layer(heads, 0.1), by_layer(ds, 0.1))
    with pytest.raises(UsageError, match=r"share 0\.1, not 0\.02"):
        by_head(heads)


def test_summaries_say_what_they_are(ds):
    heads = by_head(ds)
    assert all({"units", "long_name"} <= set(heads[name].attrs) for name in heads.data_vars)
    assert heads.top_self_repair.attrs["long_name"] == "mean self-repair, top 2% of tokens"
    assert heads.attrs.items() >= ds.attrs.items()
    assert all(heads[name].dtype == float for name in MEANS)


def test_most_repaired_ranks_heads(part):
    heads = by_head(part)
    best, worst = most_repaired(part, 4), most_repaired(part, -4)
    known = np.sort(heads.top_self_repair.values[(heads.tokens > 0).values])
    np.testing.assert_array_equal(best.top_self_repair, known[::-1][:4])
    np.testing.assert_array_equal(worst.top_self_repair, known[:4])
    for one in (best, worst):
        for rank in range(4):
            place = {"layer": one["layer"][rank].item(), "head": one["head"][rank].item()}
            assert heads.top_self_repair.sel(place) == one.top_self_repair[rank]
    assert most_repaired(part, 99).sizes["rank"] == 10


def test_done_share(part):
    np.testing.assert_array_equal(done_share(part)[0], [1, 5 / 8, 0])
    assert np.isnan(done_share(part)[3, 1])


@pytest.mark.parametrize("share", [0, -0.1, 1.001, math.nan, 2])
@pytest.mark.parametrize("function", [top_share, by_head, by_layer])
def test_bad_shares_are_refused(ds, function, share):
    with pytest.raises(UsageError, match=r"not in \(0, 1\]"):
        function(ds, share)


@pytest.mark.parametrize("function", [top_share, by_head, by_layer, done_share, summary])
def test_other_datasets_are_refused(ds, function):
    with pytest.raises(UsageError, match="lacks done, closure"):
        function(ds.drop_vars(["done", "closure"]))


def test_bare_attributes_do(ds):
    ds.attrs = {}
    assert "unnamed model, ablation not recorded" in str(summary(ds))


def test_summary_shows_the_numbers(part):
    text = str(summary(part))
    layers = by_layer(part)
    lines = [line.split() for line in text.splitlines() if line[:5].strip().isdigit()]
    assert [int(line[0]) for line in lines] == [0, 1, 2, 3]
    assert [int(line[1]) for line in lines] == [2, 3, 3, 2]
    for column, name in enumerate(COLUMNS.values(), start=2):
        assert [line[column] for line in lines] == [number(v) for v in layers[name].values]
    assert [line[8:] for line in lines] == [["-"]] * 4
    assert text.count("too few prompts for an interval") == 2
    assert text.count("most repaired") == 1
    best = most_repaired(part, 1)
    assert f"L{best['layer'].item()}H{best['head'].item()} {number(best.top_self_repair.item())}" in text
    assert "72.7% of the run done" in " ".join(text.split())
    assert "8e-07 to 2e-06" in text
    assert "~" not in text


@pytest.mark.parametrize("model", ["m", "organisation/" + "a-very-long-name-" * 12])
def test_summary_fits_its_width(model):
    ds = simulate_heads(40, 2, 4, 5, model=model, noise=10)
    assert max(map(len, str(summary(ds)).splitlines())) <= 100
    assert "~ mean self-repair under the noise floor" in str(summary(ds))


def test_the_columns_are_equation_2():
    assert [*COLUMNS.values()] == [
        f"top_{name}"
        for name in ("direct_effect", "logit_change", "self_repair", "from_heads", "from_mlps", "from_norm")
    ]


def test_a_models_directory_is_not_shown(ds):
    assert str(summary(ds.assign_attrs(model="/models/tiny"))).startswith("tiny, resample")


def test_summary_of_nothing(ds):
    assert "nothing is done yet" in str(summary(unfinished(ds, done=False)))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.1234, "+0.123"),
        (-0.0005, "-0.001"),
        (0, "+0.000"),
        (-2.34e-5, "-2e-05"),
        (math.nan, "-"),
        (12.5, "+12.500"),
    ],
)
def test_numbers(value, shown):
    assert number(value) == shown
