"""Several partners of each prompt: what a run of them stores, and how a token's self-repair varies with them."""

import numpy as np
import pytest
import xarray as xr
from made import SWEEP
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.analysis.partners import averaged
from selfrepair_nn.errors import UsageError
from selfrepair_nn.prompts import derangements, load_partners, partners, several_partners
from selfrepair_nn.quantities import QUANTITIES
from selfrepair_nn.running.filling import moments

K = 3
CHOICES = {"model": "tiny-neox", "tokens": 96, "length": 16, "heads": "6.1,7.*", "progress": False}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """ran(name, recipe, **choices): a store under that name, made once."""
    folder, made = tmp_path_factory.mktemp("partners"), {}

    def found(name, recipe="heads", **choices):
        if name not in made:
            made[name] = sr.run(recipe, out=folder / f"{name}.zarr", **CHOICES | choices).load()
        return made[name]

    return found


def test_derangements_nest_differ_and_begin_with_the_one_of_a_single_partner():
    for n in (4, 9, 40):
        found = several_partners(n, 5, 6)
        assert (found[0] == partners(n, 5)).all()
        assert (several_partners(n, 5, 4) == found[:4]).all()
        assert (np.sort(found, 1) == np.arange(n)).all()
        assert (found != np.arange(n)).all()
        assert len({row.tobytes() for row in found}) == 6
    assert not (several_partners(9, 4, 6) == several_partners(9, 5, 6)).all()


def test_there_are_no_more_partners_than_derangements():
    assert [derangements(n) for n in range(7)] == [1, 0, 1, 2, 9, 44, 265]
    assert len(several_partners(4, 0, 9)) == 9
    with pytest.raises(UsageError, match=r"resamples 10: 4 prompts .* in 9 ways alone"):
        several_partners(4, 0, 10)


def test_each_partner_gives_what_a_run_with_it_alone_gives(ran):
    one, three = ran("one"), ran("three", resamples=K)
    assert three.sizes["resample"] == K
    assert three.partner.dims == ("resample", "prompt")
    for k, alone in ((0, one), (2, ran("last alone", partners=three.partner.values[2]))):
        for name in alone.data_vars:
            stored = three[name].isel(resample=k) if QUANTITIES[name].ablated else three[name]
            np.testing.assert_array_equal(stored, alone[name], name)
    assert (three.self_repair.std("resample") > 1e-3).any()


def test_partners_do_not_depend_on_units_or_shards(ran, tmp_path):
    three, other = ran("three", resamples=K), ran("units", resamples=K, batch_size=1)
    np.testing.assert_array_equal(other.partner, three.partner)
    np.testing.assert_allclose(other.self_repair, three.self_repair, atol=2e-5)
    for part in ("1/2", "2/2"):
        path = tmp_path / "shards.zarr"
        other = sr.run("heads", out=path, resamples=K, shard=part, batch_size=2, **CHOICES)
    np.testing.assert_allclose(other.self_repair, three.self_repair, atol=2e-5)


def test_moments_are_those_of_what_each_partner_gives(ran):
    three, found = ran("three", resamples=K), ran("moments", resamples=K, resamples_as="moments")
    assert found.self_repair.dims == SWEEP
    assert found.partner.dims == ("resample", "prompt")
    for name in [name for name in three.data_vars if "resample" in three[name].dims]:
        each = three[name].values.astype(float)
        if name == "closure":
            np.testing.assert_allclose(abs(found[name]), abs(each).max(0))
            continue
        np.testing.assert_allclose(found[name], each.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[f"{name}_variance"], each.var(0, ddof=1), rtol=1e-4, atol=1e-6)
    again = ran("units of moments", resamples=K, resamples_as="moments", batch_size=2)
    np.testing.assert_allclose(again.self_repair_variance, found.self_repair_variance, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("count", [2, 7, 50])
def test_moments_are_streamed_and_exact_far_from_zero(count):
    values = 1e6 + np.random.default_rng(count).normal(size=(count, 3, 4))
    found = moments({"self_repair": each, "logit": each} for each in values)
    np.testing.assert_allclose(found["self_repair"], values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["self_repair_variance"], values.var(0, ddof=1), rtol=1e-8)
    assert (found["logit"] == values[0]).all()
    assert "logit_variance" not in found


def test_every_statistic_is_over_the_mean_of_a_tokens_partners(ran):
    three, found = ran("three", resamples=K), ran("moments", resamples=K, resamples_as="moments")
    plain = three.mean("resample", keep_attrs=True).assign_coords(partner=("prompt", three.partner.values[0]))
    plain = plain.assign(closure=abs(three.closure).max("resample"))
    for summary in (sr.by_head, sr.by_layer, sr.most_repaired, sr.token_noise):
        here, mean, kept = (summary(ds) for ds in (three, plain, found))
        for name in here.data_vars:
            np.testing.assert_allclose(here[name], mean[name], rtol=1e-4, atol=2e-6, err_msg=name)
            if not name.endswith(("p_value", "q_value")):
                np.testing.assert_allclose(kept[name], mean[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert sr.by_head(three).attrs["worst_closure"] == pytest.approx(float(abs(three.closure).max()))


def test_what_is_averaged_is_read_lazily_and_in_parts(ran):
    three = ran("three", resamples=K)
    found = averaged(three)
    assert averaged(found) is found
    part = found.self_repair.isel(prompt=slice(1, 3), head=[2, 0]).transpose("head", ...)
    expected = three.self_repair.astype(float).mean("resample").isel(prompt=slice(1, 3), head=[2, 0])
    np.testing.assert_allclose(part, expected.transpose("head", ...), rtol=1e-12)
    np.testing.assert_allclose(sr.by_head(three.sel(layer=7)).self_repair, sr.by_head(three).self_repair[1:])


@pytest.mark.parametrize("mode", representative(["all", "moments"], "moments"))
def test_a_resumed_run_of_several_partners_is_the_same(ran, tmp_path, monkeypatch, mode):
    from selfrepair_nn.running import filling

    written, write = [], filling.Filling._write

    def once(self, *given):
        if written:
            raise KeyboardInterrupt
        written.append(write(self, *given))

    choices = {
        "resamples": K,
        "batch_size": 2,
        "resamples_as": mode,
        "out": tmp_path / "resumed.zarr",
        **CHOICES,
    }
    with monkeypatch.context() as patched:
        patched.setattr(filling.Filling, "_write", once)
        with pytest.raises(sr.SelfRepairError, match="interrupted"):
            sr.run("heads", **choices)
    found = sr.run("heads", **choices).load()
    whole = ran(f"whole {mode}", resamples=K, batch_size=2, resamples_as=mode)
    xr.testing.assert_identical(found.drop_attrs(), whole.drop_attrs())


def test_clean_work_and_probes_are_shared_between_partners(wrapped, monkeypatch, tmp_path):
    from selfrepair_nn.tracing import cases, jobs, resamples

    calls = {"clean": 0, "probes": 0}

    def counted(name, function):
        def called(*given, **more):
            calls[name] += 1
            return function(*given, **more)

        return called

    monkeypatch.setattr(jobs, "clean_pass", counted("clean", jobs.clean_pass))
    monkeypatch.setattr(jobs, "probe", counted("probes", jobs.probe))
    lent = counted("lent", cases.sources)
    calls["lent"] = 0
    monkeypatch.setattr(jobs, "sources", lent)
    monkeypatch.setattr(resamples, "sources", lent)
    sr.run("heads", out=tmp_path / "x.zarr", resamples=4, batch_size=6, **CHOICES)
    here = dict(calls)
    calls |= dict.fromkeys(calls, 0)
    sr.run("heads", out=tmp_path / "y.zarr", batch_size=6, **CHOICES)
    assert here == calls | {"lent": calls["lent"] + 3}


def test_top_share_and_until_ci_go_with_partners(ran):
    every = ran("every", resamples=K, tokens=384)
    top = ran("top", resamples=K, tokens=384, select="top-share", share=0.1)
    kept = np.isfinite(top.self_repair)
    assert (kept.values == kept.isel(resample=0).values).all()
    assert 0 < float(kept.mean()) < 0.2
    np.testing.assert_allclose(top.self_repair.values[kept], every.self_repair.values[kept], atol=2e-5)
    for mode in ("all", "moments"):
        known = ran(f"ci {mode}", resamples=K, tokens=384, until_ci=0.5, share=0.3, resamples_as=mode)
        heads = sr.by_head(known, 0.3)
        np.testing.assert_allclose(
            known.estimate.values[known.selected], heads.top_self_repair.values[known.selected], atol=1e-5
        )


def test_other_variants_stand_beside_partners(ran):
    found = ran("kinds", "ablation_kinds", resamples=2, heads="7.1", tokens=64)
    assert found.self_repair.dims == ("ablation", "resample", *SWEEP)
    mean = found.sel(ablation="mean").self_repair
    np.testing.assert_array_equal(mean[0], mean[1])
    summary = sr.by_variant(found)
    expected = found.self_repair.astype(float).mean("resample").mean(("prompt", "position"))
    np.testing.assert_allclose(summary.self_repair, expected.transpose(*summary.self_repair.dims), atol=1e-6)


def test_each_partner_can_be_summarised_by_itself(ran):
    three = ran("three", resamples=K)
    each = sr.by_variant(three)
    assert each.self_repair.dims == ("resample", "layer", "head")
    for k in range(K):
        np.testing.assert_allclose(each.self_repair[k], sr.by_head(three.isel(resample=k)).self_repair)
    np.testing.assert_allclose(each.self_repair.mean("resample"), sr.by_head(three).self_repair, atol=1e-9)


def test_what_cannot_have_several_partners_says_why(tmp_path):
    refused = {
        "resamples are for resample ablation": {"ablation": "zero", "resamples": 2},
        "resamples must": {"resamples": 0},
        "resamples 3, but the partners given are 2": {"resamples": 3, "partners": several_partners(6, 0, 2)},
        "resamples_as 'some'": {"resamples_as": "some"},
    }
    for told, choices in refused.items():
        with pytest.raises(UsageError, match=told):
            sr.run("heads", out=tmp_path / "x.zarr", **CHOICES | choices)
    assert not (tmp_path / "x.zarr").exists()


def test_partners_of_a_users_own_may_be_several(ran, tmp_path):
    rows = several_partners(6, 11, 2)
    np.save(tmp_path / "rows.npy", rows)
    found = ran("own", partners=str(tmp_path / "rows.npy"))
    np.testing.assert_array_equal(found.partner, rows)
    for bad, told in {
        "row 1: entry 0, 9": np.array([rows[0], [9, *rows[1][1:]]]),
        "rows 0 and 1 are the same": np.array([rows[0], rows[0]]),
        r"has shape \(2, 5\)": rows[:, :5],
    }.items():
        with pytest.raises(UsageError, match=bad):
            load_partners(told, 6)


def test_a_plan_counts_every_partner(ran):
    choices = {name: value for name, value in CHOICES.items() if name != "progress"}
    one, four = (sr.preview("heads", resamples=k, **choices) for k in (1, 4))
    assert four["ablated_tokens"] == 4 * one["ablated_tokens"]
    assert four["passes"] == 4 * one["passes"]
    assert four["tokens"] == one["tokens"] / 2 * 5
    stored = ran("four", resamples=4)
    sizes = {n: v.nbytes for n, v in stored.data_vars.items()}
    assert four["store_bytes"] == sum(sizes.values())


# Variance components


def drawn(document, token, text, alone, *, documents=60, prompts=180, tokens=20, partners=4, seed=0, whole=False):
    """A store of one head whose self-repair has these components of variance, with unequal numbers of tokens."""
    rng = np.random.default_rng(seed)
    of = np.sort(rng.integers(0, documents, prompts))
    y = rng.normal(size=documents)[of][None, :, None] * document**0.5
    y = y + rng.normal(size=(1, prompts, tokens)) * token**0.5
    y = y + rng.normal(size=(partners, prompts, 1)) * text**0.5
    y = y + rng.normal(size=(partners, prompts, tokens)) * alone**0.5
    ds = sr.simulate_heads(1, 1, prompts, tokens, seed=seed, resamples=partners)
    ds = ds.assign(self_repair=(("resample", *SWEEP), y[:, None, None]))
    counted = np.ones((prompts, tokens), bool) if whole else rng.random((prompts, tokens)) < rng.random((prompts, 1))
    return ds.assign_coords(document=("prompt", of), counted=(("prompt", "position"), counted))


def test_components_are_those_that_were_put_in():
    known = {"document": 1.0, "token": 2.0, "partner": 2.0, "partner_text": 0.5}
    found = [sr.variance_components(drawn(1, 2, 0.5, 1.5, seed=seed)) for seed in range(16)]
    for name, value in known.items():
        each = np.array([one[f"variance_{name}"].item() for one in found])
        error = each.std(ddof=1) / np.sqrt(len(each))
        assert abs(each.mean() - value) < 3 * error < 0.3 * value
        widths = np.array([one[f"variance_{name}_half_width"].item() for one in found])
        assert (abs(each - value) < widths).mean() > 0.8
        assert 1.2 < widths.mean() / each.std(ddof=1) < 5


def test_balanced_components_are_the_textbooks_by_hand():
    """A balanced nested design of documents of one prompt each: mean squares and their expectations."""
    ds = drawn(1, 2, 0, 1, documents=25, prompts=25, tokens=6, partners=3, whole=True)
    ds = ds.assign_coords(document=("prompt", np.arange(25)))
    y = ds.self_repair.values[:, 0, 0].transpose(1, 2, 0)
    d, t, k = y.shape
    within = ((y - y.mean(2, keepdims=True)) ** 2).sum() / (d * t * (k - 1))
    means = y.mean(2)
    tokens = k * ((means - means.mean(1, keepdims=True)) ** 2).sum() / (d * (t - 1))
    documents = k * t * ((means.mean(1) - means.mean()) ** 2).sum() / (d - 1)
    moments_alone = averaged(ds).drop_vars("self_repair_by_partner")
    spread = ds.self_repair.var("resample", ddof=1)
    found = sr.variance_components(moments_alone.assign(self_repair_variance=spread))
    assert found.variance_partner.item() == pytest.approx(within)
    assert found.variance_token.item() == pytest.approx((tokens - within) / k)
    assert found.variance_document.item() == pytest.approx((documents - tokens) / (k * t))
    assert np.isnan(found.variance_partner_text).all()


def test_an_estimate_below_zero_stays_and_counts_as_none_in_the_shares():
    found = [sr.variance_components(drawn(0, 1, 0, 1, seed=seed)) for seed in range(8)]
    below = [one for one in found if one.variance_document.item() < 0]
    assert below
    for one in below:
        assert one.document_share.item() == 0
        assert one.token_share.item() + one.partner_share.item() == pytest.approx(1)


def test_a_text_that_matters_is_told_from_its_tokens():
    ds = drawn(0, 0, 3, 0.1, seed=3)
    found = sr.variance_components(ds)
    assert found.variance_partner_text.item() == pytest.approx(3, rel=0.2)
    assert found.partner_share.item() > 0.95


def test_components_of_one_partner_are_refused(ran):
    with pytest.raises(UsageError, match=r"one partner of each prompt.*--resamples"):
        sr.variance_components(ran("one"))


def test_components_are_told_and_drawn(ran, tmp_path):
    three = ran("three", resamples=K)
    assert "mean over 3 partners" in str(sr.summary(three))
    assert "is its partner's" in str(sr.summary(three)).replace("\n", " ")
    kept = ran("moments", resamples=K, resamples_as="moments")
    assert "is its partner's" in str(sr.summary(kept)).replace("\n", " ")
    assert len(sr.plot(kept, tmp_path, ["variance_components"])) == 2
    text = sr.write_report(three, tmp_path / "x.html", names=()).read_text()
    assert "mean over 3 partners" in text
    assert "with each partner, of which that is the mean" in text
    with pytest.raises(UsageError, match="several partners"):
        sr.plot(ran("one"), tmp_path, ["variance_components"])


def test_log_probability_has_components_too(ran):
    found = ran("nats", resamples=2, logprob="all", heads="7.1")
    nats = sr.variance_components(sr.in_nats(found))
    each = found.self_repair_logprob.values.astype(float)
    within = ((each - each.mean(0)) ** 2).sum(0).mean()
    assert nats.variance_partner.item() == pytest.approx(within, rel=1e-5)


def test_neurons_are_averaged_but_not_named(ran, tmp_path):
    found = ran("neurons", "neurons", resamples=2, heads="6.1", share=0.1)
    assert sr.neuron_sparsity(found, 0.1).repairs.notnull().all()
    with pytest.raises(UsageError, match="resample=0"):
        sr.erasure_neurons(found, 0.1)
    assert sr.erasure_neurons(found.isel(resample=0), 0.1).entries.item() > 0


def test_simulated_stores_have_partners_too():
    one, two = sr.simulate_heads(2, 2, 6, 5), sr.simulate_heads(2, 2, 6, 5, resamples=2)
    xr.testing.assert_equal(two.isel(resample=0).drop_vars("resample"), one)
    assert sr.by_head(two).self_repair.shape == (2, 2)


def test_words_that_each_partner_changes_are_not_shown_as_one(tmp_path):
    """The page, the figures and the report of such a store are of all else."""
    given = {"model": "tiny-llama", "layers": "7", "tokens": 256, "length": 16, "check": False, "progress": False}
    ds = sr.run("heads", words=2, resamples=2, out=tmp_path / "w.zarr", **given)
    page = sr.view(ds, tmp_path / "w.html")
    assert page.stat().st_size > 1000
    assert sr.write_report(ds, tmp_path / "r.html", names=["self_repair_by_layer"]).exists()
    assert "layer" in sr.frequent_words(ds).dims
    with pytest.raises(UsageError, match=r"changes of its own: choose one, ds.isel\(resample=0\)"):
        sr.changes_in_context(ds)
    assert sr.changes_in_context(ds.isel(resample=0)).sizes["end"] == 2
