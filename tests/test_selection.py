"""Fewer passes, the same numbers: only the top share is ablated, or only as many prompts as an answer needs."""

import json

import families
import numpy as np
import pytest
import torch
import xarray as xr
from scipy.special import gamma
from scipy.stats import binomtest, skew
from scipy.stats import t as student
from terminal import assert_same_numbers, selfrepair
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.analysis import by_head, by_layer, top_share
from selfrepair_nn.confidence import CLUSTERS, Tally, clusters_of
from selfrepair_nn.errors import Incomplete, UsageError
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.models.load import wrap
from selfrepair_nn.quantities import QUANTITIES, SWEEP
from selfrepair_nn.running.rounds import schedule
from selfrepair_nn.store import Store
from selfrepair_nn.tracing.memory import Room
from selfrepair_nn.tracing.replacements import Zero
from selfrepair_nn.tracing.rows import Batch, batches
from selfrepair_nn.tracing.sites import Head

SHARE, GOAL, LAYER_GOAL = 0.04, 0.5, 0.2
FAMILIES = ["neox-parallel", "llama-gqa"]
OF_ONE_FAMILY = pytest.mark.parametrize("asked", representative(FAMILIES, "llama-gqa"), indirect=True)
"""What does not depend on the family is tried on one in every run of the tests."""


@pytest.fixture(scope="module", params=FAMILIES)
def asked(request):
    """A model in float64 and prompts, as choices of a run."""
    module = families.build(request.param)
    ids = families.random_ids(module, 160)
    return {"model": wrap(module), "prompts": ids, "share": SHARE, "batch_size": 10, "progress": False}


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory):
    return sr.run(out=tmp_path_factory.mktemp("whole") / "s.zarr", **asked).load()


@pytest.fixture(scope="module")
def selected(asked, tmp_path_factory):
    return sr.run(out=tmp_path_factory.mktemp("top") / "s.zarr", select="top-share", **asked).load()


@pytest.fixture(scope="module")
def estimated(asked, tmp_path_factory):
    return sr.run(out=tmp_path_factory.mktemp("ci") / "s.zarr", until_ci=GOAL, **asked).load()


@pytest.fixture(scope="module")
def of_layers(asked, tmp_path_factory):
    choices = asked | {"until_ci": LAYER_GOAL, "ci_of": "layers"}
    return sr.run(out=tmp_path_factory.mktemp("layers") / "s.zarr", **choices).load()


@pytest.fixture(scope="module", params=["heads", "layers"])
def known(request, estimated, of_layers):
    return {"heads": estimated, "layers": of_layers}[request.param]


def swept(ds):
    return [name for name in ds.data_vars if ds[name].dims[:4] == SWEEP and name != "direct_effect"]


def close(one, other):
    return np.nanmax(np.abs(np.asarray(one) - np.asarray(other))) <= 1e-9


# ---------------------------------------------------------------- the top share alone


@OF_ONE_FAMILY
def test_the_top_share_is_what_a_whole_run_finds_there_and_the_rest_is_left_out(whole, selected):
    top = top_share(whole, SHARE).values
    for name in swept(whole):
        values = selected[name].values
        assert np.array_equal(np.isfinite(values), top), name
        assert close(values[top], whole[name].values[top]), name


def test_what_belongs_to_the_clean_run_is_kept_of_every_token(whole, selected):
    for name in ("direct_effect", "logit", "mean_logit", "target_constant", "norm_scale"):
        assert np.isfinite(selected[name]).all()
        assert close(selected[name], whole[name])


def test_every_statistic_of_the_top_share_is_the_same(whole, selected):
    for summary in (by_head, by_layer):
        one, other = summary(selected, SHARE), summary(whole, SHARE)
        names = [n for n in other.data_vars if n.startswith("top_") or n == "norm_share"]
        assert len(names) > 9
        for name in names:
            assert close(one[name].astype(float), other[name].astype(float)), name
    assert np.isnan(by_head(selected, SHARE).self_repair).all()


def test_a_smaller_share_can_be_asked_for_and_a_larger_one_not(whole, selected):
    one, other = (by_head(ds, SHARE / 2).top_self_repair for ds in (selected, whole))
    assert close(one, other)
    with pytest.raises(UsageError, match=r"top 0.04 of tokens, not share 0.1: run without --select"):
        by_head(selected, 0.1)


def test_figures_of_every_token_are_refused(selected):
    assert "token_noise" not in figures.suited(selected)
    with pytest.raises(UsageError, match="not every token: run without --select"):
        figures.draw("token_noise", selected)


@pytest.mark.parametrize("flags", [["--select", "top-share"], ["--until-ci", "0.1"]], ids=str)
def test_a_recipe_of_every_token_is_refused_before_anything_runs(tmp_path, flags):
    refused = selfrepair("run", "token_scatter", "--model", "tiny-neox", *flags, "--out", tmp_path / "x.zarr")
    assert refused.code == 2
    assert "token_scatter shows every token of a head, not the top share: choose --select all" in refused.err
    assert not (tmp_path / "x.zarr").exists()


@OF_ONE_FAMILY
@pytest.mark.parametrize(
    "choices", [{"ablation": "mean"}, {"ablation": "zero"}, {"components": "top"}], ids=str
)
def test_with_other_choices(asked, tmp_path, choices):
    choices = asked | choices | {"layers": "1", "prompts": asked["prompts"][:24]}
    one = sr.run(out=tmp_path / "a.zarr", **choices).load()
    other = sr.run(out=tmp_path / "b.zarr", select="top-share", **choices).load()
    top = top_share(one, SHARE).values
    for name in swept(one):
        assert close(one[name].values[top], other[name].values[top]), name


@OF_ONE_FAMILY
def test_several_variants(asked, tmp_path):
    choices = asked | {"recipe": "ablation_kinds", "prompts": asked["prompts"][:24], "layers": "1"}
    one = sr.run(out=tmp_path / "a.zarr", **choices).load()
    other = sr.run(out=tmp_path / "b.zarr", select="top-share", **choices).load()
    for kind in one["ablation"].values:
        a, b = (by_head(ds.sel(ablation=kind), SHARE) for ds in (one, other))
        assert close(a.top_self_repair, b.top_self_repair)


def test_rows_end_after_what_is_wanted_and_others_are_left_out():
    cases = [[Head(0, 0)], [Head(0, 1)], [Head(2, 0)]]
    wanted = torch.tensor([[0, 3, 10], [2, 0, 0], [0, 0, 4]])
    plan, room, found = {"model": {"parallel": False}, "replacement": Zero()}, Room(6), []
    for each in batches(cases, plan, torch.arange(30).reshape(3, 10), room, torch.device("cpu"), wanted):
        room.fits(each.tokens.numel())
        found.append(each)
    rows = [[(i, p) for i, prompts in each.cases for p in prompts.tolist()] for each in found]
    assert rows == [[(0, 2)], [(0, 1), (1, 0)], [(2, 2)]]
    assert [each.length for each in found] == [10, 3, 4]
    assert found[1].tokens.tolist() == [[10, 11, 12], [0, 1, 2]]


def test_every_prompt_under_every_case_needs_no_copy_of_what_is_kept():
    """Shortened rows too: the same as gathering it row by row."""
    kept, x = torch.randn(3, 7, 2), torch.randn(6, 4, 2)
    batch = Batch((0, False), [], torch.tensor([0, 1, 2, 0, 1, 2]), True, torch.zeros(6, 4), 4)
    gathered = x * batch.of(kept)
    assert torch.equal(batch.against(torch.mul, x, kept), gathered)
    assert torch.equal(Batch(**vars(batch) | {"whole": False}).against(torch.mul, x, kept), gathered)


@OF_ONE_FAMILY
def test_less_is_ablated(asked, tmp_path, monkeypatch):
    counted, asked = {}, asked | {"prompts": asked["prompts"][:40]}
    for select in ("all", "top-share"):
        total = 0

        def update(self, n=1):
            nonlocal total
            total += n

        monkeypatch.setattr("tqdm.tqdm.update", update)
        sr.run(out=tmp_path / f"{select}.zarr", select=select, **asked | {"progress": True})
        counted[select] = total
    assert (
        counted["all"]
        == asked["prompts"].size * asked["model"].structure.n_layers * asked["model"].structure.n_heads
    )
    assert counted["top-share"] < 0.5 * counted["all"]


def test_a_unit_may_lack_what_was_not_wanted_and_nothing_else():
    wanted = np.array([[2, 0], [0, 1]])
    unit = Unit("x", None, slice(0, 2), {"cases": [0, 1]}, None, {"y": ("case", "prompt", 3)}, wanted=wanted)
    values = torch.full((2, 2, 3), float("nan"))
    values[0, 0, :2], values[1, 1, :1] = 1, 1
    assert unit.flaw({"y": values}) is None
    values[0, 0, 1] = float("nan")
    assert unit.flaw({"y": values}) == "y is not finite"
    first, second = unit.halves()
    values[0, 0, 1] = 2
    halves = ({"y": values[:, :1]}, {"y": values[:, 1:]})
    assert [half.flaw(found) for half, found in zip((first, second), halves, strict=True)] == [None, None]
    assert torch.equal(unit.join(*halves)["y"].nan_to_num(), values.nan_to_num())
    assert [half.wanted.tolist() for half in first.halves()] == [[[2, 0]], [[0, 1]]]


# ---------------------------------------------------------------- until the answer is known


@OF_ONE_FAMILY
def test_what_was_computed_is_what_a_whole_run_finds(whole, known):
    by_label = known.sortby("prompt")
    assert np.array_equal(by_label.prompt, whole.prompt)
    for name in ("token", "partner", "document"):
        assert np.array_equal(by_label[name], whole[name]), name
    assert close(by_label.direct_effect, whole.direct_effect)
    top = top_share(whole, SHARE).values & by_label.done.values[..., None]
    for name in swept(whole):
        assert np.array_equal(np.isfinite(by_label[name].values), top), name
        assert close(by_label[name].values[top], whole[name].values[top]), name


@OF_ONE_FAMILY
def test_prompts_come_in_an_order_of_the_seed(asked, estimated, tmp_path):
    other = sr.run(out=tmp_path / "s.zarr", until_ci=GOAL, **asked | {"seed": 1})
    for ds in (estimated, other):
        assert sorted(ds.prompt.values) == [*range(len(ds.prompt))] != [*ds.prompt.values]
    assert not np.array_equal(estimated.prompt, other.prompt)


@OF_ONE_FAMILY
def test_the_estimates_are_the_means_of_what_is_stored(known):
    heads, layers = by_head(known, SHARE), by_layer(known, SHARE)
    assert close(heads.top_self_repair, known.estimate)
    assert close(layers.top_self_repair, known.layer_estimate)
    assert np.array_equal(known.prompts_used, known.done.sum("prompt"))


@OF_ONE_FAMILY
def test_heads_stop_when_they_are_known_or_nothing_is_left(estimated):
    used, width = estimated.prompts_used.values, estimated.half_width.values
    assert ((width <= GOAL) | (used == estimated.sizes["prompt"])).all()
    assert len(np.unique(used)) > 1


@OF_ONE_FAMILY
def test_layers_can_be_asked_for(of_layers):
    """All heads of a layer go on until it is known."""
    used, total = of_layers.prompts_used.values, of_layers.sizes["prompt"]
    assert (used == used[:, :1]).all()
    narrow = of_layers.layer_half_width.values <= LAYER_GOAL
    assert (narrow | (used[:, 0] == total)).all()
    assert narrow.any()
    assert (of_layers.half_width.values > LAYER_GOAL).any()


def of_single_tokens(values):
    """What is known of a mean over tokens of which each is a cluster."""
    clusters = np.arange(len(values))
    tally = Tally.empty(1, clusters)
    tally.add(values[None, :, None], np.ones((1, len(values), 1), bool), clusters)
    return tally


def test_half_widths_are_students_of_a_mean_over_clusters():
    """Where every cluster has one token, and as much is above as below: the interval of every textbook."""
    values = np.random.default_rng(0).normal(size=15)
    values = np.concatenate([1 + values, 1 - values])
    tally = of_single_tokens(values)
    low, high = student.interval(0.95, 29, values.mean(), values.std(ddof=1) / np.sqrt(30))
    assert tally.mean[0] == pytest.approx(values.mean())
    assert tally.half_width[0] == pytest.approx((high - low) / 2)
    means, widths = tally.of_groups(np.array([0]))
    assert (means[0], widths[0]) == pytest.approx((tally.mean[0], tally.half_width[0]))


def test_half_widths_of_skewed_values_are_johnsons():
    values = np.random.default_rng(0).exponential(size=30)
    error, quantile = values.std(ddof=1) / np.sqrt(30), student.ppf(0.975, 29)
    added = skew(values) / np.sqrt(30) * (1 + 2 * quantile**2) / 6
    assert of_single_tokens(values).half_width[0] == pytest.approx(error * (quantile + added))
    assert of_single_tokens(-values).half_width[0] == pytest.approx(error * (quantile + added))


def test_intervals_of_skewed_values_cover_the_truth_as_often_as_they_say():
    """Where Student's alone do not."""
    rng, trials = np.random.default_rng(3), 2000
    values = rng.exponential(size=(trials, 25)) ** 1.2
    truth = gamma(2.2)
    off = np.abs(values.mean(1) - truth)
    widths = np.array([of_single_tokens(row).half_width[0] for row in values])
    students = values.std(1, ddof=1) / 5 * student.ppf(0.975, 24)
    assert (off <= students).mean() < 0.93
    assert (off <= widths).mean() == pytest.approx(0.95, abs=0.02)


def test_a_group_counts_what_its_cases_share():
    """Two equal cases are known no better than one; two opposite ones cancel."""
    values = np.random.default_rng(0).normal(size=(1, 30, 1))
    both = Tally.empty(2, np.arange(30))
    both.add(np.concatenate([values, values]), np.ones((2, 30, 1), bool), np.arange(30))
    assert both.of_groups(np.array([0, 0]))[1][0] == pytest.approx(both.half_width[0])
    against = Tally.empty(2, np.arange(30))
    against.add(np.concatenate([values, -values]), np.ones((2, 30, 1), bool), np.arange(30))
    assert against.of_groups(np.array([0, 0]))[1][0] == pytest.approx(0, abs=1e-12)


def test_too_little_is_not_called_known():
    few = Tally.empty(2, np.arange(CLUSTERS))
    counted = np.ones((2, CLUSTERS, 1), bool)
    counted[0, 0] = False
    counted[1, 1:] = False
    few.add(np.ones((2, CLUSTERS, 1)), counted, np.arange(CLUSTERS))
    assert np.isinf(few.half_width).all()
    assert np.isinf(few.of_groups(np.array([0, 0]))[1]).all()


def test_clusters_are_documents_if_there_are_enough_of_them():
    assert clusters_of(np.array([3, 3, 7] * 9)).tolist() == [*range(27)]
    many = np.repeat(np.arange(CLUSTERS) * 2, 2)
    assert clusters_of(many).tolist() == np.repeat(np.arange(CLUSTERS), 2).tolist()


def test_the_jackknife_is_what_the_mean_moves_by():
    """Clusters of unequal size: the error, and its skewness, by leaving each of them out in turn."""
    rng = np.random.default_rng(0)
    counted = np.arange(8) < rng.integers(1, 9, 30)[:, None]
    values = rng.normal(size=counted.shape)
    tally = Tally.empty(1, np.arange(30))
    tally.add(values[None], counted[None], np.arange(30))
    without = [np.delete(values, i, 0)[np.delete(counted, i, 0)].mean() for i in range(30)]
    moved = np.array(without) - values[counted].mean()
    error = np.sqrt(29 / 30 * np.square(moved).sum())
    skewness = abs((moved**3).sum()) / np.square(moved).sum() ** 1.5
    alike = counted.sum() ** 2 / np.square(counted.sum(1)).sum()
    quantile = student.ppf(0.975, alike - 1)
    assert tally.half_width[0] == pytest.approx(error * (quantile + skewness * (1 + 2 * quantile**2) / 6))


ENOUGH = {0.3: 1200, 0.15: 4800}
"""So many prompts an interval of this width takes at most."""


@pytest.mark.parametrize("goal", representative(ENOUGH, 0.3))
def test_intervals_cover_the_truth_as_often_as_they_say(goal):
    """Documents of several prompts, heavy tails, uneven numbers of tokens, stopped as a run stops."""
    rng, trials, covered = np.random.default_rng(1), 1500, 0
    documents, prompts, positions = 8000, 2, 6
    common = rng.gamma(2.0, 0.5, documents).repeat(prompts)[:, None]
    values = common + rng.standard_t(5, (documents * prompts, positions))
    counted = rng.random(values.shape) < rng.beta(1, 4, len(values))[:, None]
    truth = values[counted].mean()
    rounds = [*schedule([slice(i, i + 4) for i in range(0, ENOUGH[goal], 4)])]
    for _ in range(trials):
        order = rng.permutation(len(values))[: ENOUGH[goal]]
        _, clusters = np.unique(order // prompts, return_inverse=True)
        tally = Tally.empty(1, clusters)
        for blocks in rounds:
            here = slice(blocks[0].start, blocks[-1].stop)
            tally.add(values[None, order[here]], counted[None, order[here]], clusters[here])
            if tally.half_width[0] <= goal:
                break
        assert tally.half_width[0] <= goal
        covered += abs(tally.mean[0] - truth) <= tally.half_width[0]
    interval = binomtest(covered, trials).proportion_ci(0.999)
    assert interval.low < 0.97
    assert interval.high > 0.93
    assert abs(covered / trials - 0.95) < 0.02


@pytest.mark.thorough
def test_intervals_of_layers_cover_the_truth_as_often_as_they_say():
    """Heads of one layer that share prompts and differ in spread."""
    rng, trials, covered = np.random.default_rng(2), 1000, 0
    spread, n, layer = np.array([0.3, 0.6, 1.0, 3.0]), 2000, np.zeros(4, int)
    common = rng.gamma(2.0, 0.3, n)
    values = (common + rng.standard_t(5, (4, n)) * spread[:, None])[..., None]
    counted = rng.random(values.shape) < 0.7
    truth = np.mean([v[c].mean() for v, c in zip(values, counted, strict=True)])
    most = np.arange(800)
    rounds = [*schedule([slice(i, i + 4) for i in most[::4]])]
    for _ in range(trials):
        order, tally = rng.permutation(n), Tally.empty(4, most)
        for blocks in rounds:
            here = slice(blocks[0].start, blocks[-1].stop)
            tally.add(values[:, order[here]], counted[:, order[here]], most[here])
            means, widths = tally.of_groups(layer)
            if widths[0] <= 0.25:
                break
        assert widths[0] <= 0.25
        covered += abs(means[0] - truth) <= widths[0]
    assert abs(covered / trials - 0.95) < 0.02


def test_rounds_grow_by_a_share_of_what_was_used():
    units = [slice(i, i + 4) for i in range(0, 200, 4)]
    found = [*schedule(units)]
    assert [block for blocks in found for block in blocks] == units
    assert [blocks[-1].stop for blocks in found] == [20, 28, 36, 48, 60, 76, 96, 120, 152, 192, 200]


# ---------------------------------------------------------------- stopped, and refused


WAYS = {
    "selected": {"select": "top-share"},
    "estimated": {"until_ci": GOAL},
    "of_layers": {"until_ci": LAYER_GOAL, "ci_of": "layers"},
}


@pytest.mark.parametrize("whole", representative(WAYS, "selected", "estimated"))
@pytest.mark.parametrize("writes", representative([3, 24], 24))
@OF_ONE_FAMILY
def test_a_run_that_is_interrupted_ends_with_the_same_numbers(
    request, asked, tmp_path, monkeypatch, whole, writes
):
    """When direct effects are ranked, after 3 blocks of them; or when heads are ablated, in a later round."""
    path, choices = tmp_path / "s.zarr", WAYS[whole]
    write, count = Store.write_prompts, iter(range(writes))

    def interrupted(*arguments):
        if next(count, None) is None:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_prompts", interrupted)
        with pytest.raises(Incomplete):
            sr.run(out=path, **asked | choices)
    assert "finished" not in sr.open_store(path).attrs
    sr.run(out=path, **asked | choices)
    assert_same_numbers(path, request.getfixturevalue(whole).encoding["source"])


@OF_ONE_FAMILY
def test_other_settings_are_another_run(asked, tmp_path):
    choices = asked | {"out": tmp_path / "s.zarr", "prompts": asked["prompts"][:24], "layers": "1"}
    sr.run(select="top-share", **choices)
    with pytest.raises(sr.errors.StoreError, match=r"select top-share there, left open here"):
        sr.run(**choices)
    with pytest.raises(sr.errors.StoreError, match=r"share 0\.04 there, 0\.1 here"):
        sr.run(select="top-share", **choices | {"share": 0.1})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["heads", "--until-ci", "0"], "until_ci must be a number of logits above 0, not 0.0"),
        (["heads", "--until-ci", "nan"], "until_ci must be a number of logits above 0, not nan"),
        (["heads", "--ci-of", "layers"], "ci_of layers says what until_ci must know: give --until-ci too"),
        (["ablation_kinds", "--until-ci", "0.1"], "single heads under one ablation"),
        (["ioi", "--until-ci", "0.1"], "single heads under one ablation"),
        (["self_reinforcement", "--select", "top-share"], "leave out --select and --until-ci"),
    ],
)
def test_what_cannot_be_asked(tmp_path, arguments, said):
    ended = selfrepair("run", *arguments, "--out", tmp_path / "s.zarr")
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert not [*tmp_path.iterdir()]


def test_the_command_says_how_well_it_is_known(tmp_path):
    ended = selfrepair(
        "run", "heads", "--tokens", 4096, "--layers", "6:", "--until-ci", 0.2, "--ci-of", "layers",
        "--out", tmp_path / "s.zarr",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "the 95% intervals of the layers' means" in " ".join(ended.out.split())
    found = xr.open_zarr(tmp_path / "s.zarr")
    assert json.loads(found.attrs["settings"])["until_ci"] == [0.2, "layers"]
    assert found.layer_half_width.max() <= 0.2
    assert {
        "estimate",
        "half_width",
        "layer_estimate",
        "threshold",
    } <= QUANTITIES.keys() & found.variables.keys()


# ---------------------------------------------------------------- passes that depend on their own length


def positioned(rope):
    """A model whose rotary positions are set by `rope`: its passes may depend on how long they are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 44, "max_position_embeddings": 64}
    module = (
        LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters={"rope_theta": 1e4} | rope)).double().eval()
    )
    families.randomise(module)
    return module


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}


ROPES = {
    "default": ({"rope_type": "default"}, "to the last token wanted"),
    "just above its limit": (LONGROPE | {"original_max_position_embeddings": 30}, "whole"),
    "far above its limit": (LONGROPE | {"original_max_position_embeddings": 2}, "whole"),
    "below its limit": (LONGROPE | {"original_max_position_embeddings": 48}, "to the last token wanted"),
    "yarn": ({"rope_type": "yarn", "factor": 4.0}, "to the last token wanted"),
}


@pytest.mark.parametrize("name", representative(ROPES, "just above its limit", "below its limit"))
def test_prompts_are_cut_short_only_where_that_changes_nothing(tmp_path, capfd, name):
    """The same numbers as a whole run has, on the tokens that are kept."""
    rope, lengths = ROPES[name]
    module = positioned(rope)
    ids = families.random_ids(module, 12, 32)
    given = {"model": module, "prompts": ids, "share": 0.05, "progress": False}
    every = sr.run(out=tmp_path / "all.zarr", **given).load()
    top = sr.run(out=tmp_path / "top.zarr", select="top-share", **given).load()
    assert top.attrs["pass_lengths"] == lengths
    assert ("not cut short" in capfd.readouterr().err) == (lengths == "whole")
    kept = top.self_repair.notnull()
    assert 0 < kept.mean() < 0.2
    for name in ("self_repair", "logit_change", "from_norm"):
        np.testing.assert_allclose(top[name].values[kept], every[name].values[kept], atol=1e-5)
