"""Other shares of a head's tokens than the top, and selecting on other prompts than those that are reported."""

import numpy as np
import pytest
from made import hand_made
from numpy.testing import assert_allclose, assert_array_equal
from terminal import ids, saved, selfrepair
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.analysis import MEANS
from selfrepair_nn.choosing import TAILS, in_half, selecting_half
from selfrepair_nn.errors import UsageError
from selfrepair_nn.simulate import simulate_heads
from selfrepair_nn.wording import selection

SHARE = 0.1
KEYS = {"top": lambda x: x, "bottom": lambda x: -x, "absolute": abs}
READ = [*MEANS, "norm_on_existing", "norm_on_change"]


@pytest.fixture(scope="module")
def ds():
    """More documents than intervals need; heads that write for the target and against it."""
    found = simulate_heads(3, 2, 90, 11, seed=4, components=True)
    return found.assign_coords(document=("prompt", np.arange(90) // 2))


def flat(ds, name):
    """[head, token], of a store's variable, in float64."""
    return ds[name].values.reshape(6, -1).astype(float)


def naive(ds, tail, prompts=None, limits=None):
    """Which tokens of each head are in the share: bool [head, token], by a sort, or by a limit that each must reach."""
    key = KEYS[tail](flat(ds, "direct_effect"))
    known = np.repeat(np.ones(90, bool) if prompts is None else prompts, 11)
    ranked = np.where(known, key, -np.inf)
    if limits is not None:
        return ranked >= limits[:, None]
    marks = np.zeros(key.shape, bool)
    best = np.argsort(-ranked, axis=1, kind="stable")[:, : int(SHARE * known.sum())]
    np.put_along_axis(marks, best, True, 1)
    return marks


def mean(ds, name, marks, tail):
    """Mean of a variable over the marked tokens of each head, counted along the sign of DE where that is asked."""
    sign = np.where((tail == "absolute") & (flat(ds, "direct_effect") < 0), -1, 1)
    return (flat(ds, name) * sign).mean(1, where=marks)


@pytest.mark.parametrize("tail", TAILS)
def test_each_tail_is_a_naive_sort(ds, tail):
    found = sr.by_head(sr.choose_tokens(ds, tail=tail), SHARE)
    marks = naive(ds, tail)
    for name in MEANS:
        assert_allclose(found[f"top_{name}"].values.ravel(), mean(ds, name, marks, tail), rtol=1e-12)
        assert_allclose(found[name].values.ravel(), flat(ds, name).mean(1), rtol=1e-9)
    assert_array_equal(sr.top_share(sr.choose_tokens(ds, tail=tail), SHARE).values.reshape(6, -1), marks)
    ratio = flat(ds, "from_norm") / flat(ds, "direct_effect")
    assert_allclose(found.norm_share.values.ravel(), np.clip(ratio, 0, 1).mean(1, where=marks), rtol=1e-12)
    assert found.attrs["tail"] == tail


@pytest.mark.parametrize("tail", TAILS)
def test_every_statistic_is_of_that_tail(ds, tail):
    """Means of parts, of the norm and of components, over the same tokens with the same signs."""
    chosen, marks = sr.choose_tokens(ds, tail=tail), naive(ds, tail)
    heads = sr.norm_by_head(chosen, SHARE)
    for name in ("norm_on_existing", "norm_on_change"):
        assert_allclose(heads[f"top_{name}"].values.ravel(), mean(ds, name, marks, tail), rtol=1e-9)
    pairs = sr.who_repairs(chosen, SHARE)
    own = pairs.repair.where(~pairs.own).sum("component") + pairs.top_from_norm
    assert_allclose(own, pairs.top_self_repair, atol=1e-5)
    ratio = (ds.norm_scale / ds.ablated_norm_scale).transpose("layer", "head", "prompt", "position")
    ratio = ratio.values.reshape(6, -1)
    scales = sr.scale_by_head(chosen, SHARE)
    assert_allclose(scales.top_scale_ratio.values.ravel(), ratio.mean(1, where=marks), rtol=1e-6)
    noise = sr.token_noise(chosen, SHARE, 2)
    where = [2 * int(i) + int(j) for i, j in zip(noise["layer"], noise["head"], strict=True)]
    assert_array_equal(noise.top.values.reshape(2, -1), marks[where])


def test_by_hand():
    """DE of 4, -1, 0, -3: of two tokens the top are 4 and 0, the bottom -1 and -3, the largest 4 and -3."""
    ds = hand_made([[4, -1], [0, -3]], self_repair=[[2, 1], [5, 0.5]], ablated_direct_effect=[[1, 0], [0, 1]])
    expected = {
        "top": {"top_direct_effect": 2, "top_self_repair": 3.5, "top_removed": 1.5},
        "bottom": {"top_direct_effect": -2, "top_self_repair": 0.75, "top_removed": -2.5},
        "absolute": {"top_direct_effect": 3.5, "top_self_repair": 0.75, "top_removed": 3.5},
    }
    for tail, values in expected.items():
        found = sr.by_head(sr.choose_tokens(ds, tail=tail), 0.5)
        assert {name: float(found[name].squeeze()) for name in values} == values


def test_the_most_repaired_of_negative_tokens_have_the_lowest_mean(ds):
    chosen = sr.choose_tokens(ds, tail="bottom")
    heads = sr.by_head(chosen, SHARE)
    best = sr.most_repaired(chosen, 3, SHARE)
    assert best.top_self_repair.values.tolist() == sorted(heads.top_self_repair.values.ravel())[:3]


def test_halves_are_of_documents_and_always_alike(ds):
    selecting = selecting_half(ds.document.values)
    assert abs(selecting.sum() - 45) <= 1
    for document in range(45):
        assert len({*selecting[ds.document.values == document]}) == 1
    assert_array_equal(selecting, selecting_half(ds.document.values + 7))
    few = selecting_half(np.zeros(90, int))
    assert few.sum() == 45  # of prompts
    assert not in_half(sr.choose_tokens(ds, split_selection=True))[selecting].any()
    assert in_half(ds).all()


@pytest.mark.parametrize("tail", TAILS)
def test_a_split_selection_by_naive_code(ds, tail):
    """Thresholds and ranks from one half, numbers from the other; and what selecting on the same half would add."""
    selecting = selecting_half(ds.document.values)
    found = sr.by_head(sr.choose_tokens(ds, tail=tail, split_selection=True), SHARE)
    chosen_by = naive(ds, tail, selecting)
    key = KEYS[tail](flat(ds, "direct_effect"))
    limits = np.where(chosen_by, key, np.inf).min(1)
    marks, alone = naive(ds, tail, ~selecting, limits), naive(ds, tail, ~selecting)
    assert_array_equal(found.top_tokens.values.ravel(), marks.sum(1))
    reported = np.repeat(~selecting, 11)
    for name in MEANS:
        assert_allclose(found[f"top_{name}"].values.ravel(), mean(ds, name, marks, tail), rtol=1e-9)
        assert_allclose(found[name].values.ravel(), flat(ds, name)[:, reported].mean(1), rtol=1e-9)
    for name in ("direct_effect", "self_repair"):
        added = mean(ds, name, alone, tail) - mean(ds, name, marks, tail)
        assert_allclose(found[f"bias_{name}"].values.ravel(), added, rtol=1e-9, atol=1e-12)
    by = mean(ds, "self_repair", chosen_by, tail)
    assert_allclose(found.selecting_top_self_repair.values.ravel(), by, rtol=1e-9)
    assert_allclose(found.selecting_direct_effect.values.ravel(), flat(ds, "direct_effect")[:, ~reported].mean(1))
    ranked = sr.most_repaired(sr.choose_tokens(ds, tail=tail, split_selection=True), 6, SHARE)
    order = np.argsort(by if tail == "bottom" else -by, kind="stable")
    assert_allclose(ranked.top_self_repair, found.top_self_repair.values.ravel()[order])
    assert found.attrs["prompts_selecting"] + found.attrs["prompts_reporting"] == 90


def test_the_first_of_many_alike_are_not_the_best_on_other_prompts():
    """64 heads that are alike: the most repaired look repaired where they were ranked, and are not elsewhere."""
    rng = np.random.default_rng(0)
    whole, split = [], []
    for _ in range(12):
        ds = simulate_heads(8, 8, 40, 5, seed=1)
        drawn = rng.normal(size=ds.self_repair.shape).astype("float32")
        ds = ds.assign(self_repair=ds.self_repair.copy(data=drawn))
        whole.append(float(sr.most_repaired(ds, 4, 0.5).top_self_repair.mean()))
        chosen = sr.choose_tokens(ds, split_selection=True)
        split.append(float(sr.most_repaired(chosen, 4, 0.5).top_self_repair.mean()))
    error = np.std(split) / len(split) ** 0.5
    assert np.mean(whole) > 0.15
    assert abs(np.mean(split)) < 3 * error < 0.15


def test_the_strongest_heads_are_those_of_the_other_half(ds):
    chosen = sr.choose_tokens(ds, split_selection=True)
    known = sr.by_head(chosen, SHARE).selecting_direct_effect.values[2]
    names = sr.token_noise(chosen, SHARE, 1)  # of the last layer
    assert (int(names["layer"][0]), int(names["head"][0])) == (2, int(known.argmax()))
    assert int(names.tokens[0]) == 11 * in_half(chosen).sum()


def test_all_tokens_of_the_other_half_where_there_is_no_share(ds):
    found = sr.by_head(sr.choose_tokens(ds, split_selection=True), 1)
    assert_array_equal(found.top_tokens, found.tokens)
    assert_allclose(found.top_self_repair, found.self_repair)


def test_summaries_figures_and_pages_say_which_tokens(ds, tmp_path):
    chosen = sr.choose_tokens(ds, tail="bottom", split_selection=True)
    text = " ".join(str(sr.summary(chosen)).split())
    heads = sr.by_head(chosen)
    assert "each head's bottom 2% of tokens by direct effect" in text
    assert selection(heads)[0] in text
    assert f"{float(heads.bias_self_repair.mean()):+.3f}" in selection(heads)[0]
    for name in ("self_repair_by_layer", "distance_by_layer", "token_noise"):
        drawn = figures.draw(name, chosen)
        words = drawn.get_supxlabel() + str([axes.get_ylabel() + axes.get_title() for axes in drawn.axes])
        assert "bottom 2%" in words, name
        assert "Selected on" in words, name
    page = sr.write_report(ds, tmp_path / "x.html", tail="absolute", split_selection=True).read_text()
    assert "largest |DE|" in page
    assert "Selected on" in page
    assert "of either sign, counted along its sign" in page
    largest = figures.draw("self_repair_by_layer", sr.choose_tokens(ds, tail="absolute"))
    assert "of largest |DE|" in largest.axes[0].get_ylabel()
    with pytest.raises(UsageError, match="different tails, bottom and top"):
        figures.draw("self_repair_by_layer", [ds, chosen])


def test_a_store_of_the_top_alone_has_no_other_tail(tmp_path):
    model, prompts = saved(tmp_path / "gpt2"), ids(tmp_path / "p.npy", prompts=40)
    store = tmp_path / "s.zarr"
    ran = selfrepair(
        *("run", "heads", "--model", model, "--prompts", prompts, "--out", store, "--layers", "2"),
        *("--select", "top-share", "--share", "0.2"),
    )
    assert ran.code == 0, ran.err
    for tail in ("bottom", "absolute"):
        shown = selfrepair("info", store, "--tail", tail)
        assert (shown.code, shown.err.count("\n")) == (2, 1)
        assert "without --select top-share" in shown.err
    ds = sr.open_store(store)
    smaller = sr.by_head(sr.choose_tokens(ds, split_selection=True), 0.02)
    whole = ("run", "heads", "--model", model, "--prompts", prompts, "--layers", "2", "--out", tmp_path / "w.zarr")
    assert selfrepair(*whole).code == 0
    full = sr.by_head(sr.choose_tokens(sr.open_store(tmp_path / "w.zarr"), split_selection=True), 0.02)
    assert_allclose(smaller.top_self_repair, full.top_self_repair, rtol=1e-4, atol=1e-6)
    with pytest.raises(UsageError, match=r"needs tokens beyond the top 0\.2 that this store keeps"):
        sr.by_head(sr.choose_tokens(ds, split_selection=True), 0.2)
    shown = selfrepair("plot", tmp_path / "w.zarr", "--tail", "bottom", "--split-selection", "--against", "removed")
    assert shown.code == 0
    assert shown.out.count(".png") == 2
    wrong = selfrepair("plot", store, "--tail", "lowest")
    assert wrong.code == 2
    assert "bottom" in wrong.err


def test_what_is_kept_of_the_top_alone_is_refused(ds):
    chosen = sr.choose_tokens(ds.assign_attrs(settings='{"components": "top", "share": 0.02}'), tail="bottom")
    with pytest.raises(UsageError, match="holds component changes for each head's top share of tokens alone"):
        sr.who_repairs(chosen)
    with pytest.raises(UsageError, match="tail 'lowest' is not known; choose one of top, bottom, absolute"):
        sr.choose_tokens(ds, tail="lowest")
    with pytest.raises(UsageError, match="the published means are of each head's top share, not its bottom"):
        sr.compare_paper(sr.choose_tokens(ds, tail="bottom"), "gpt2-small")


# ---------------------------------------------------------------- of stores that keep some tokens alone


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Late heads with log-probability and components of the top share, and with log-probability of every token."""
    folder = tmp_path_factory.mktemp("kept")
    given = {"model": "tiny-neox", "tokens": 1024, "length": 32, "layers": "6:8", "share": 0.1, "progress": False}
    some = sr.run("heads", logprob="top", components="top", out=folder / "top.zarr", **given)
    return some, sr.run("heads", logprob="all", out=folder / "all.zarr", **given)


@pytest.mark.parametrize(
    "asked", representative([{"tail": "bottom"}, {"tail": "absolute"}, {"split_selection": True}], {"tail": "absolute"})
)
def test_what_is_kept_of_other_tokens_alone_is_left_out(kept, tmp_path, capsys, asked):
    some, _ = kept
    assert sr.plot(some, tmp_path, **asked)
    assert capsys.readouterr().err == ""
    assert sr.write_report(some, tmp_path / "x.html", **asked).exists()
    said = capsys.readouterr().err
    if "tail" in asked:
        assert "leaves out outcomes" in said
        assert "--logprob all" in said
        with pytest.raises(UsageError, match="run with --logprob all"):
            figures.draw("outcomes", sr.choose_tokens(some, **asked))


def test_selecting_on_half_of_kept_log_probability(kept):
    nats = sr.choose_tokens(sr.in_nats(kept[0]), split_selection=True)
    with pytest.raises(UsageError, match="or run with --logprob all"):
        sr.by_head(nats, 0.1)
    assert np.isfinite(sr.by_head(nats, 0.02).top_self_repair).all()


def test_outcomes_count_along_the_sign_as_their_store_in_nats(kept):
    ds = sr.choose_tokens(kept[1], tail="absolute")
    one, other = sr.outcomes_by_head(ds, 0.2), sr.by_head(sr.in_nats(ds), 0.2)
    same = {"self_repair_logprob": "self_repair", "logprob_change": "logit_change", "norm_logprob": "from_norm"}
    for name, own in same.items():
        assert_allclose(one[f"top_{name}"], other[f"top_{own}"], atol=1e-12)
    left = one.top_self_repair_logprob - one.top_logprob_change
    assert_allclose(one.top_removed_logprob, left, atol=1e-12)
    assert "largest |DE|" in one.top_self_repair_logprob.attrs["long_name"]


def test_neurons_of_the_top_share_alone_are_drawn(tmp_path):
    """Without the mirror, for which the other tail would have to be there."""
    choices = {"model": "tiny-neox", "tokens": 512, "length": 32, "progress": False, "param": {"count": 2}}
    ds = sr.run("neurons", out=tmp_path / "n.zarr", select="top-share", **choices)
    assert sr.plot(ds, tmp_path)
    assert np.isnan(sr.erasure_neurons(ds).mirror).all()
