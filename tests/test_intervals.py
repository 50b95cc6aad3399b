"""Intervals, "repaired" and closure against resampling, null stores and stores with too little in them."""

import numpy as np
import pytest
import xarray as xr
from scipy.stats import bootstrap, false_discovery_control
from scipy.stats import t as student
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.analysis import remembering
from selfrepair_nn.analysis.contrast import _root
from selfrepair_nn.analysis.neurons import _reach_of_sums
from selfrepair_nn.analysis.words import _often
from selfrepair_nn.confidence import CLUSTERS, Estimate, Tally, q_values
from selfrepair_nn.figures import paper_comparison
from selfrepair_nn.report import render
from selfrepair_nn.simulate import simulate_heads

SHARE = 0.2
SWEEP = ("layer", "head", "prompt", "position")


pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def ds():
    """Some 120 documents of one to several prompts: what a document does to a head, it does on all of its tokens."""
    made = simulate_heads(3, 4, 200, 12, seed=4, components=True)
    return made.assign(self_repair=made.self_repair + shared(made, np.random.default_rng(0)))


def shared(ds, rng):
    """An effect of each document on each head, half of it common to all heads."""
    _, document = np.unique(ds.document.values, return_inverse=True)
    common, own = (rng.normal(0, 0.1, (*shape, document.max() + 1)) for shape in ((1, 1), (3, 4)))
    return xr.DataArray((common + own)[:, :, document], dims=SWEEP[:3])


def by_document(ds, name, share=SHARE):
    """Sums of a variable over each head's top share and numbers of these tokens: [layer, head, document]."""
    marks = sr.top_share(ds, share)
    values = ds[name].astype(float).where(marks, 0).sum("position")
    return [
        each.groupby("document").sum().transpose("layer", "head", "document").values
        for each in (values, marks.sum("position").assign_coords(document=ds.document))
    ]


def ratio(sums, counts, axis=-1):
    return sums.sum(axis) / counts.sum(axis)


def resampled(statistic, *parts):
    """Half the 95% interval that resampling documents gives."""
    found = bootstrap(parts, statistic, paired=True, vectorized=True, n_resamples=3000, method="basic", rng=0)
    return (found.confidence_interval.high - found.confidence_interval.low) / 2


def near(widths, *statistics_of):
    """Half-widths against resampled ones: within a fourth of each, and right on average."""
    ratios = np.array(widths) / [resampled(*each) for each in statistics_of]
    assert np.all((ratios > 0.75) & (ratios < 1.3)), ratios
    return ratios


def test_a_share_of_means_and_its_interval(ds):
    """The norm's repair over the direct effect: of heads, of layers' means, and of nothing where that may be 0."""
    heads, places = sr.norm_by_head(ds, SHARE), [*np.ndindex(3, 4)]
    (above, counts), (below, _) = (by_document(ds, name) for name in ("from_norm", "direct_effect"))
    expected = above.sum(-1) / below.sum(-1)
    np.testing.assert_allclose(heads.norm_of_means, expected, rtol=1e-5)
    near([heads.norm_of_means_half_width.values[p] for p in places], *((ratio, above[p], below[p]) for p in places))

    def of_layer(a, b, n):  # [head, document] each
        return (a.sum(-1) / n.sum(-1)).mean(0) / (b.sum(-1) / n.sum(-1)).mean(0)

    expected = [of_layer(*parts) for parts in zip(above, below, counts, strict=True)]
    np.testing.assert_allclose(heads.layer_norm_of_means, expected, rtol=1e-5)
    layers = sr.by_layer(heads, SHARE)
    np.testing.assert_array_equal(layers.norm_of_means, heads.layer_norm_of_means)
    np.testing.assert_array_equal(layers.norm_of_means_half_width, heads.layer_norm_of_means_half_width)
    turned = ds.assign(direct_effect=ds.direct_effect * np.where(np.arange(200) % 2, 1, -1)[:, None].astype("float32"))
    quiet = turned.assign(direct_effect=turned.direct_effect.where(ds["layer"] != 1, turned.direct_effect * 0))
    found = sr.norm_by_head(quiet, 1.0)
    assert found.norm_of_means.sel(layer=1).isnull().all()
    assert np.isnan(found.layer_norm_of_means[1])


def test_the_interval_of_a_correlation_is_the_jackknifes_over_documents(ds):
    found = sr.token_noise(ds, SHARE, 2)
    _, document = np.unique(ds.document.values, return_inverse=True)
    for rank in range(2):
        one = found.isel(rank=rank)
        for prefix, marks in (("", np.ones((200, 12), bool)), ("top_", one.top.values)):
            kept = [marks & (document != left)[:, None] for left in np.unique(document[marks.any(1)])]
            pairs = ((one.direct_effect.values[each], one.logit_change.values[each]) for each in kept)
            without = np.array([np.corrcoef(*pair)[0, 1] for pair in pairs])
            error = np.sqrt((len(kept) - 1) / len(kept) * ((without - without.mean()) ** 2).sum())
            width = student.ppf(0.975, len(kept) - 1) * error
            assert float(one[f"{prefix}correlation_half_width"]) == pytest.approx(width, rel=1e-6)
    few = sr.token_noise(ds.isel(prompt=slice(10)), SHARE, 2)
    assert np.isinf(few.correlation_half_width).all()


def test_further_intervals_are_those_of_resampled_clusters():
    """Of a root mean square, of the part of all that the first neurons have, and of how often a word is said."""
    rng = np.random.default_rng(1)
    sums, counts = rng.gamma(2, 1, (2, 60)), rng.integers(1, 9, (2, 60)).astype(float)
    known = _root(Tally(sums, counts).estimate)

    def root(a, b, axis=-1):
        return np.sqrt(ratio(a, b, axis))

    near(known.half_width, *((root, a, b) for a, b in zip(sums, counts, strict=True)))
    sizes = rng.gamma(2, 1, (60, 5))
    first = sizes.cumsum(1)
    near(_reach_of_sums(sizes)[:4], *((ratio, first[:, i], first[:, -1]) for i in range(4)))
    assert _reach_of_sums(sizes)[4] == pytest.approx(0, abs=1e-12)
    words, clusters = rng.integers(0, 4, (400, 2)), np.repeat(np.arange(40), 10)
    said = _often(words, np.array([0, 3]), clusters)
    marks = np.stack([(words == word).any(1).reshape(40, 10).sum(1) for word in (0, 3)])
    np.testing.assert_array_equal(said.sums, marks)
    np.testing.assert_array_equal(said.counts, np.full((2, 40), 10))


@pytest.mark.parametrize("name", ["self_repair", "from_norm", "logit_change"])
def test_intervals_of_heads_are_those_of_resampled_documents(ds, name):
    heads = sr.by_head(ds, SHARE)
    assert heads.attrs["clustered_by"] == "document"
    sums, counts = by_document(ds, name)
    ratios = [
        heads[f"top_{name}_half_width"].values[i, j] / resampled(ratio, sums[i, j], counts[i, j])
        for i, j in np.ndindex(3, 4)
    ]
    assert np.median(ratios) == pytest.approx(1.06, abs=0.08)  # Student's and Johnson's are a little wider
    assert 0.85 < min(ratios) < max(ratios) < 1.4


def test_documents_count_and_not_their_prompts(ds):
    """As if its prompts were independent, a document that repeats itself would make everything look better known."""
    twice = xr.concat([ds, ds.assign_coords(prompt=ds.prompt + 200)], "prompt", data_vars="minimal")
    one, two = sr.by_head(ds, SHARE), sr.by_head(twice, SHARE)
    np.testing.assert_allclose(two.top_self_repair_half_width, one.top_self_repair_half_width, rtol=0.02)
    alone = twice.assign_coords(document=("prompt", np.arange(400)))
    assert (sr.by_head(alone, SHARE).top_self_repair_half_width < 0.9 * one.top_self_repair_half_width).all()


def test_intervals_of_layers_are_those_of_documents_resampled_for_all_heads_at_once(ds):
    layers = sr.by_layer(ds, SHARE)
    sums, counts = by_document(ds, "self_repair")

    def mean_of_means(*parts, axis=-1):
        return np.mean([ratio(*pair, axis) for pair in zip(parts[:4], parts[4:], strict=True)], axis=0)

    for layer in range(3):
        expected = resampled(mean_of_means, *sums[layer], *counts[layer])
        assert float(layers.top_self_repair_half_width[layer]) == pytest.approx(expected, rel=0.2)
    heads = sr.by_head(ds, SHARE).top_self_repair_half_width
    independent = np.sqrt((heads**2).sum("head")) / 4
    assert (layers.top_self_repair_half_width > 1.1 * independent).all()  # heads share their documents


@pytest.mark.parametrize("common", representative([0, 1, -1], -1))
def test_of_a_store_without_repair_hardly_anything_is_discovered(common):
    """Self-repair is noise about zero, of each head or common to all of them, with one sign or with two."""
    wrong = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        made = simulate_heads(3, 4, 60, 6, seed=seed)
        noise = rng.standard_t(4, (3, 4, 60, 6)) + 2 * common * rng.normal(size=(1, 1, 60, 1))
        signs = np.where(np.arange(4) % 2 == 0, 1, np.sign(common) or 1)[:, None, None]
        heads = sr.by_head(made.assign(self_repair=(SWEEP, 0.1 * signs * noise)), 0.5)
        assert (heads.top_p_value.notnull()).all()
        wrong += bool((heads.top_repaired | heads.top_broken).any())
    assert wrong <= 7  # at most this many with probability 0.99, were it 5% of stores


def test_what_is_repaired_is_found_and_what_is_broken_is_told_apart():
    made = simulate_heads(2, 3, 80, 10, seed=1)
    effects = np.array([[0.5, -0.5, 0], [0, 0.02, 0.5]])[..., None, None]
    noise = np.random.default_rng(0).normal(0, 0.5, made.self_repair.shape)
    made = made.assign(self_repair=(SWEEP, effects + noise)).assign(noise_floor=("layer", [1e-6, 0.1]))
    heads = sr.by_head(made, 0.5)
    np.testing.assert_array_equal(heads.top_repaired, [[True, False, False], [False, False, True]])
    np.testing.assert_array_equal(heads.top_broken, [[False, True, False], [False, False, False]])
    loud = sr.by_head(made.assign(noise_floor=("layer", [1.0, 1.0])), 0.5)
    assert not loud.top_repaired.any()  # rounding would do as much


def test_the_false_discovery_rate_is_over_all_heads_that_have_an_interval(ds):
    heads = sr.by_head(ds, SHARE)
    expected = false_discovery_control(heads.top_p_value.values.ravel()).reshape(3, 4)
    np.testing.assert_allclose(heads.top_q_value, expected)
    np.testing.assert_allclose(
        q_values(np.array([[0.01, np.nan], [0.04, 0.5]])), [[0.03, np.nan], [0.06, 0.5]]
    )
    few = ds.assign(done=ds.done & ~((ds["head"] == 1) & (ds.prompt >= 15)))
    part = sr.by_head(few, SHARE)
    assert part.top_q_value[:, 1].isnull().all()
    others = part.top_p_value.values[:, [0, 2, 3]]
    np.testing.assert_allclose(
        part.top_q_value.values[:, [0, 2, 3]].ravel(), false_discovery_control(others.ravel())
    )


def test_p_values_and_intervals_say_the_same():
    rng = np.random.default_rng(0)
    values = rng.exponential(size=(400, 30)) ** rng.uniform(0.2, 2, (400, 1))
    known = Tally(values - rng.uniform(0, 2, (400, 1)), np.ones((400, 30))).estimate
    excludes = abs(known.mean) > known.half_width
    assert 0.2 < excludes.mean() < 0.9
    np.testing.assert_array_equal(excludes, known.p_value < 0.05)
    at = np.argsort(known.p_value)[[100, 200, 300]]
    for case in at:
        edge = known.reach(1 - known.p_value[case])[case]
        assert abs(known.mean[case]) == pytest.approx(edge)


def test_values_that_never_vary_are_known_for_sure():
    known = Tally(np.array([[1.0] * 20, [0.0] * 20]), np.ones((2, 20))).estimate
    np.testing.assert_array_equal(known.p_value, [0, 1])
    np.testing.assert_array_equal(known.half_width, [0, 0])


def test_p_values_of_nothing_are_even():
    rng = np.random.default_rng(1)
    known = Tally(rng.standard_t(4, (4000, 40)), np.ones((4000, 40))).estimate
    assert 0.025 < (known.p_value < 0.05).mean() < 0.055  # the wider side of two is that of both
    assert 0.003 < (known.p_value < 0.01).mean() < 0.012


def test_a_cluster_that_says_it_all_leaves_nothing_known():
    known = Estimate(np.array([1.0]), np.full((1, 30), np.inf), np.eye(30)[:1])
    assert np.isinf(known.half_width[0])
    assert np.isnan(known.p_value[0])
    assert np.isnan(known.error[0])


# ---------------------------------------------------------------- what is said


def test_few_prompts_are_said_to_be_few():
    few = simulate_heads(2, 2, CLUSTERS - 1, 12, components=True)
    for said in (str(sr.summary(few)), render(few)):
        assert "too few prompts for an interval" in said
        assert "0 of" not in said
    with remembering():
        for name in figures.suited(few):
            assert "oo few prompts for an interval" in figures.draw(name, few).get_supxlabel(), name


def test_it_is_said_what_is_independent(ds):
    assert "95% intervals, clustered by document" in str(sr.summary(ds, SHARE))
    few = ds.assign_coords(document=("prompt", np.arange(200) % 7))
    told = str(sr.summary(few, SHARE))
    assert "clustered by prompt (200; documents are few: 7)" in told
    assert "clustered by prompt (200)" in str(sr.summary(ds.drop_vars("document"), SHARE))
    assert "Clustered by prompt" not in figures.draw("self_repair_by_layer", ds, share=SHARE).get_supxlabel()


def test_repaired_is_counted_by_the_rule_everywhere(ds):
    heads = sr.by_head(ds, SHARE)
    count, broken = int(heads.top_repaired.sum()), int(heads.top_broken.sum())
    told = str(sr.summary(ds, SHARE))
    assert f"repaired: {count} of 12 heads, broken: {broken}, neither for sure: {12 - count - broken}" in told
    rows = [line for line in told.splitlines() if line[:5].strip().isdigit()]
    assert [row.split()[-3:] for row in rows] == [
        [str(int(n)), "of", "4"] for n in heads.top_repaired.sum("head")
    ]
    page = render(ds, share=SHARE)
    assert f"<b>{count} of 12</b><span>heads repaired" in page
    layers = sr.by_layer(heads, SHARE)
    np.testing.assert_allclose(layers.top_repaired, heads.top_repaired.mean("head"))


def test_summaries_and_tables_show_the_intervals(ds):
    layers, told = sr.by_layer(ds, SHARE), str(sr.summary(ds, SHARE))
    for width in layers.top_self_repair_half_width.values:
        assert f"±{width:.3f}" in told
    assert f"±{layers.top_self_repair_half_width.values[0]:.3f}" in render(ds, share=SHARE)
    assert max(map(len, told.splitlines())) <= 100


def test_the_map_and_the_graph_know_how_well_their_pairs_are_known(ds):
    pairs = sr.who_repairs(ds, SHARE)
    marks = sr.top_share(ds, SHARE)
    layer, head, component = 0, 1, int(np.flatnonzero(ds.component.values == "L1.mlp")[0])
    change = ds.component_change.isel(layer=layer, head=head, component=component).astype(float)
    top = marks.isel(layer=layer, head=head)
    sums = change.where(top, 0).sum("position").groupby("document").sum().values
    counts = top.sum("position").assign_coords(document=ds.document).groupby("document").sum().values
    expected = resampled(ratio, sums, counts)
    assert float(pairs.repair_half_width[layer, head, component]) == pytest.approx(expected, rel=0.3)
    others = pairs.repair_q_value.values[~pairs.own.values]
    assert np.isnan(pairs.repair_q_value.values[pairs.own.values]).all()
    np.testing.assert_array_equal(pairs.repair_known.values[~pairs.own.values], others <= 0.05)
    edges = sr.strongest_repairs(pairs, 5, SHARE)
    assert {"repair_half_width", "repair_q_value", "repair_known"} <= {*edges.data_vars}


# ---------------------------------------------------------------- closure


TOO_FAR = {"float32": 0.05, "float64": 1e-6, "bfloat16": 5.0}
"""A closure that no computation in this dtype leaves."""


def closed(dtype):
    """A store of which every closure is as it should be, and the same but for one of them."""
    stored = "float64" if dtype == "float64" else "float32"
    good = simulate_heads(2, 2, 24, 9, model="gpt2", components=True, dtype=stored).assign_attrs(dtype=dtype)
    bad = good.assign(closure=good.closure.copy(deep=True))
    bad.closure[1, 0, 3, 4] = -TOO_FAR[dtype]
    return good, bad


@pytest.mark.parametrize("dtype", TOO_FAR)
def test_a_closure_beyond_its_dtype_is_said_loudly(dtype):
    good, bad = closed(dtype)
    assert "WARNING" not in str(sr.summary(good)) + render(good)
    assert "WARNING: do not use these numbers" in str(sr.summary(bad))
    assert "class='banner loud'" in render(bad)


@pytest.mark.parametrize("dtype", representative(TOO_FAR, "float32"))
def test_a_closure_beyond_its_dtype_is_said_loudly_in_every_figure(dtype):
    good, bad = closed(dtype)
    with remembering():
        for name in figures.suited(bad):
            assert "WARNING" in figures.draw(name, bad).get_supxlabel(), name
            assert "WARNING" not in figures.draw(name, good).get_supxlabel(), name
    assert "WARNING" in paper_comparison.draw(bad).get_supxlabel()
    both = figures.draw("self_repair_by_layer", {"sound": good, "unsound": bad}).get_supxlabel()
    assert both.startswith("unsound: WARNING")


def test_a_closure_that_is_not_done_does_not_matter():
    bad = simulate_heads(2, 2, 24, 9)
    bad.closure[0, 0, 3] = 9
    assert "WARNING" not in sr.summary(bad.assign(done=bad.done & (bad.prompt != 3)))


def test_the_limit_is_a_share_of_the_spread_of_the_logits():
    one = simulate_heads(2, 2, 24, 9)
    limit = sr.by_head(one).attrs["closure_limit"]
    assert limit == pytest.approx(1e-3 * one.logit.values.astype(float).std(), rel=1e-6)
    wide = sr.by_head(one.assign(logit=10 * one.logit)).attrs["closure_limit"]
    assert wide == pytest.approx(10 * limit, rel=1e-6)


# ---------------------------------------------------------------- parts of a store


PARTS = {
    "layer": lambda ds: ds.sel(layer=2),
    "head": lambda ds: ds.sel(head=3),
    "both": lambda ds: ds.sel(layer=2, head=3),
    "list": lambda ds: ds.isel(layer=[0]),
    "slice": lambda ds: ds.sel(layer=slice(1, 2), head=[0, 3]),
    "where": lambda ds: ds.where(ds.layer >= 1, drop=True),
}


@pytest.mark.parametrize("part", representative(PARTS, "both", "where"))
@pytest.mark.parametrize("source", representative(["memory", "opened", "saved", "loaded"], "memory", "saved"))
def test_parts_of_a_store_are_summed_up_as_in_the_whole(ds, part, source, tmp_path):
    store = ds.drop_vars([n for n in ds.variables if "component" in str(n)])
    if source != "memory":
        store.to_zarr(tmp_path / "whole.zarr", consolidated=False)
        store = xr.open_zarr(tmp_path / "whole.zarr", consolidated=False, chunks=None)
    chosen = PARTS[part](store)
    if source == "saved":
        chosen.to_zarr(tmp_path / "part.zarr", consolidated=False)
        chosen = xr.open_zarr(tmp_path / "part.zarr", consolidated=False, chunks=None)
    if source == "loaded":
        chosen = chosen.load()
    found, whole = sr.by_head(chosen, SHARE), sr.by_head(ds, SHARE)
    assert found.sizes["layer"] * found.sizes["head"] < 12
    there = whole.sel(layer=found.layer, head=found["head"])
    for name in ("top_self_repair", "top_self_repair_half_width", "norm_share", "self_repair_se", "tokens"):
        np.testing.assert_allclose(found[name], there[name], rtol=1e-6, err_msg=name)
    assert "self-repair" in str(sr.summary(chosen, SHARE))
    assert sr.norm_by_head(chosen, SHARE).sizes["layer"] == found.sizes["layer"]


@pytest.mark.parametrize("chosen", [{"prompt": 3}, {"prompt": slice(10, 40)}, {"layer": 1, "prompt": [5, 2]}])
def test_some_prompts_are_what_a_store_of_these_alone_would_say(ds, chosen):
    part = ds.isel(chosen)
    rows = np.atleast_1d(np.arange(200)[chosen["prompt"]])
    values = ds.isel(prompt=rows).self_repair.astype(float).mean(("prompt", "position"))
    expected = values if "layer" not in chosen else values.isel(layer=[1])
    np.testing.assert_allclose(sr.by_head(part, SHARE).self_repair, expected, rtol=1e-6)


def test_every_function_and_figure_takes_a_part(ds):
    part = ds.sel(layer=1)
    for function in (
        sr.by_head,
        sr.by_layer,
        sr.norm_by_head,
        sr.who_repairs,
        sr.token_noise,
        sr.most_repaired,
    ):
        function(part, share=SHARE)
    assert sr.top_share(part, SHARE).sizes["layer"] == 1
    np.testing.assert_array_equal(sr.top_share(part, SHARE)[0], sr.top_share(ds, SHARE)[1])
    whole, one = sr.who_repairs(ds, SHARE), sr.who_repairs(part, SHARE)
    np.testing.assert_allclose(one.repair[0], whole.repair[1])
    assert sr.only(part, heads="1.2").selected.sum() == 1
    assert "L1H" in render(part, share=SHARE)
    with remembering():
        for name in figures.suited(part):
            assert figures.draw(name, part, share=SHARE).axes


def test_a_large_store_is_not_read_into_memory_by_a_selection(ds, tmp_path):
    ds.drop_vars("component_change").to_zarr(tmp_path / "s.zarr", consolidated=False)
    opened = xr.open_zarr(tmp_path / "s.zarr", consolidated=False, chunks=None).sel(layer=1)
    sr.by_head(opened, SHARE)
    assert not opened.from_heads.variable._in_memory
