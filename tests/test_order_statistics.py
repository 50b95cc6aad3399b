"""Medians, ranks, counts of signs and shares that never vary: their intervals, beside brute force."""

import numpy as np
import pytest
from scipy.stats import binomtest, rankdata

import selfrepair_nn as sr
from selfrepair_nn.confidence import CLUSTERS, Estimate, Tally
from selfrepair_nn.order_statistics import bootstrap, median_reach
from selfrepair_nn.quantities import recorded
from selfrepair_nn.simulate import simulate_heads

DRAWS = 600


def drawn_again(statistic, clusters):
    """Half the 95% interval of a statistic of [token] indices, by drawing whole clusters anew, one draw at a time."""
    rng, tokens = np.random.default_rng(3), [np.flatnonzero(clusters == each) for each in np.unique(clusters)]
    picks = rng.integers(len(tokens), size=(DRAWS, len(tokens)))
    found = [statistic(np.concatenate([tokens[i] for i in pick])) for pick in picks]
    low, high = np.quantile(found, [0.025, 0.975])
    return (high - low) / 2


def spread_out(rng, count, length):
    """Values that documents share a part of, skewed, and the document of each."""
    clusters = np.repeat(np.arange(count), rng.integers(1, length, count))
    return rng.normal(size=count)[clusters] * 0.5 + rng.exponential(size=clusters.size), clusters


@pytest.mark.parametrize(("count", "length"), [(30, 40), (80, 9), (200, 3)])
def test_a_median_is_known_as_well_as_drawing_documents_anew_says(count, length):
    rng = np.random.default_rng(count)
    values, clusters = spread_out(rng, count, length)
    order = rng.permutation(values.size)
    both = np.stack([values, -3 * values])
    found = median_reach(both[:, order], clusters[order])
    for width, each in zip(found, both, strict=True):
        assert 0.8 < width / drawn_again(lambda some, each=each: np.median(each[some]), clusters) < 1.7
    assert found[1] == pytest.approx(3 * found[0], rel=0.25)  # between two tokens the one beside is taken


def test_medians_hold_the_truth_as_often_as_they_say():
    rng, truth, held = np.random.default_rng(0), np.log(2), 0
    for _ in range(300):
        clusters = np.repeat(np.arange(25), 4)
        values = rng.exponential(size=clusters.size)
        held += abs(np.median(values) - truth) <= median_reach(values[None], clusters)[0]
    assert held / 300 > 0.94


def test_of_too_few_documents_no_median_is_known():
    values = np.random.default_rng(0).normal(size=(1, 200))
    assert np.isinf(median_reach(values, np.arange(200) % (CLUSTERS - 1))).all()
    assert np.isfinite(median_reach(values, np.arange(200) % CLUSTERS)).all()
    assert bootstrap(lambda drawn: drawn[:, 0], np.arange(200) < CLUSTERS - 1) == np.inf
    np.testing.assert_array_equal(median_reach(np.ones((1, 200)), np.arange(200)), 0)


def test_counts_of_signs_vary_as_those_of_fresh_text_do():
    """The jackknife would say three times as much."""
    rng, count = np.random.default_rng(1), 60
    means = rng.normal(size=500) / np.sqrt(count)
    shared = rng.normal(size=500)
    fresh = [means + rng.normal(size=(count, 500)) + rng.normal(size=(count, 1)) * shared for _ in range(200)]
    true = 2 * np.std([(x.sum(0) > 0).sum() for x in fresh])
    held = np.ones(count, bool)
    found = [bootstrap(lambda drawn, x=x: (drawn @ x > 0).sum(1), held) for x in fresh[:20]]
    assert 0.8 < np.mean(found) / true < 1.2
    without = [(x.sum(0) - x > 0).sum(1) for x in fresh[:20]]
    assert np.mean([2 * np.sqrt((count - 1) * np.var(each)) for each in without]) > 2 * true


@pytest.mark.parametrize("count", [CLUSTERS, 50])
def test_shares_that_never_vary_are_those_of_as_many_trials(count):
    rng, counts = np.random.default_rng(0), np.ones((3, count))
    marks = np.stack([np.zeros(count), np.ones(count), rng.integers(0, 2, count)])
    tally = Tally(marks, counts)
    ends = [binomtest(int(each.sum()), count).proportion_ci() for each in marks[:2]]
    expected = [ends[0].high, 1 - ends[1].low]
    np.testing.assert_allclose(tally.share.half_width[:2], expected)
    assert tally.share.half_width[2] == tally.estimate.half_width[2] > 0
    np.testing.assert_array_equal(tally.estimate.half_width[:2], 0)  # of other means nothing else is known
    few = Tally(np.zeros((1, CLUSTERS - 1)), np.ones((1, CLUSTERS - 1))).share
    assert np.isinf(few.half_width).all()
    assert isinstance(tally.share.minus(tally.share), Estimate)


@pytest.fixture(scope="module")
def neurons():
    """A store of four heads and forty neurons whose numbers the documents share a part of."""
    ds = simulate_heads(2, 2, 48, 13, seed=4)
    rng, sizes = np.random.default_rng(0), [ds.sizes[d] for d in ("layer", "head", "prompt", "position")]
    own = rng.normal(size=40) / 4
    of_prompts = rng.normal(size=(sizes[2], 1, 40))
    change = own + of_prompts / 2 + rng.normal(size=(*sizes, 40))
    clean = own + of_prompts / 2 + rng.normal(size=(*sizes[2:], 40))
    dims = ("layer", "head", "prompt", "position", "neuron")
    needed = {q.name: (q.dims, np.zeros([{"rank": 1, "neuron": 40}.get(d) or ds.sizes[d] for d in q.dims]))
              for q in recorded(("neurons",))}  # fmt: skip
    return ds.assign(needed | {"neuron_change": (dims, change), "neuron_direct_effect": (dims[2:], clean)})


def test_medians_and_numbers_of_rising_neurons_beside_brute_force(neurons):
    found, top = sr.neuron_changes(neurons, 0.3, 2), sr.top_share(neurons, 0.3)
    for rank in range(2):
        one = found.isel(rank=rank)
        marks = top.sel(layer=one["layer"], head=one["head"]).values
        prompt = np.nonzero(marks)[0]
        change = neurons.neuron_change.sel(layer=one["layer"], head=one["head"]).values[marks]
        clean = neurons.neuron_direct_effect.values[marks]
        expected = drawn_again(lambda some, change=change: (change[some].mean(0) > 0).sum(), prompt)
        assert 0.7 < float(one.rising_half_width) / expected < 1.4
        ratios = []
        for place in (0, 11, 25, 39):
            values = clean[:, int(one.neuron[place])]
            expected = drawn_again(lambda some, values=values: np.median(values[some]), prompt)
            ratios.append(float(one.median_direct_effect_half_width[place]) / expected)
        assert min(ratios) > 0.7
        assert max(ratios) < 1.8


def test_correlations_over_heads_beside_brute_force():
    from selfrepair_nn.patching import _over_heads

    rng, count = np.random.default_rng(5), 60
    counts = np.broadcast_to(rng.integers(3, 9, count), (30, count))
    truth = rng.normal(size=(30, 1))
    one, other = (counts * (truth + rng.normal(size=(30, count)) * 3) for _ in range(2))
    found = _over_heads(Tally(one, counts), Tally(other, counts))
    for name, of in (("rank", rankdata), ("linear", np.asarray)):

        def correlation(some, of=of):
            means = (each[:, some].sum(1) / counts[:, some].sum(1) for each in (one, other))
            return np.corrcoef(*map(of, means))[0, 1]

        assert found[f"{name}_correlation"] == pytest.approx(correlation(np.arange(count)))
        width = found[f"{name}_correlation_half_width"]
        assert width == pytest.approx(drawn_again(correlation, np.arange(count)), rel=0.25)
    nothing = _over_heads(Tally(one[:2], counts[:2]), Tally(other[:2], counts[:2]))
    assert np.isnan(nothing["rank_correlation"])
    assert np.isinf(nothing["rank_correlation_half_width"])
