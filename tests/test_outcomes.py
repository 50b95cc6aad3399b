"""Self-repair in log-probability: every number against whole passes with plain hooks, and by what must hold by hand."""

from dataclasses import astuple

import families
import numpy as np
import oracle
import oracle_edits
import pytest
import torch
import xarray as xr
from matplotlib.text import Text
from numpy.testing import assert_allclose, assert_array_equal
from terminal import selfrepair
from test_tracing_law import counting
from tiers import representative
from torch import nn

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.components import Attention, FinalNorm, Head, Layers, Mlp, Neuron, Parallel, Swap
from selfrepair_nn.errors import UsageError
from selfrepair_nn.graph import Graph, freeze_set, sweep
from selfrepair_nn.models.architectures import structure_of
from selfrepair_nn.models.load import load
from selfrepair_nn.quantities import QUANTITIES
from selfrepair_nn.replacements import OtherHead, Reinforce, Scale
from selfrepair_nn.tracing import vocabulary
from selfrepair_nn.tracing.jobs import ablation_job
from selfrepair_nn.tracing.session import run_session

TIGHT = 1e-9
CLEAN = ("logprob", "logsumexp", "entropy", "target_rank")
CHANGED = (
    *("logprob_change", "self_repair_logprob", "norm_logprob", "logsumexp_change", "frozen_norm_logsumexp_change"),
    *("entropy_change", "kl", "ablated_target_rank"),
)
FAMILIES = [
    *("gpt2", "gptj", "neox-parallel", "neox-sequential", "llama-gqa", "opt"),
    *("gemma2", "gemma3", "olmo2", "cohere", "granite", "lfm2"),  # caps, norms behind, scales of logits, mixers
]


@pytest.fixture(autouse=True)
def no_float32(monkeypatch):
    """Eager attention takes its softmax in float32 whatever the model computes in: not here."""
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))


@pytest.fixture
def nats(wrapped, seeded):
    """nats(name, cases, …): what a job tells of them in log-probability: {name: array}."""

    def run(name, cases, replacement="resample", arrays=None, rows=100, **graph):
        model, ids = wrapped(name, exact=True), torch.as_tensor(seeded(name))
        given = {"tokens": ids, "partner_tokens": ids[families.derangement(len(ids))]} | (arrays or {})
        plan = Graph(ablate=cases, replacement=replacement, also=("logprob",), **graph).plan(model.layout)
        found = run_session(ablation_job, model.nn, given, plan | {"tokens_per_pass": rows})
        return {key: value.numpy() for key, value in found.items()}

    return run


def heads_of(name):
    """A few heads that there are, the first and the last layer's among them."""
    having = oracle.reference(families.build(name), [[1, 2]], partners=[0], heads=())["having"]
    return [(having[0], 0), (having[0], 1), (having[-1], 1)]


def test_every_quantity_is_tried():
    assert {*CLEAN, *CHANGED} == {name for name, each in QUANTITIES.items() if each.when == "logprob"}


@pytest.mark.parametrize("name", FAMILIES)
def test_against_whole_passes_that_return_logits(nats, seeded, name):
    """The model's own logits at the end: behind a scale, a soft cap, norms behind sublayers."""
    heads = heads_of(name)
    found = nats(name, sweep(Head(*head) for head in heads), rows=20)
    partners = families.derangement(len(seeded(name)))
    wanted = oracle.outcomes(families.build(name, exact=True), seeded(name), heads, partners=partners)
    for each in (*CLEAN, *CHANGED):
        assert_allclose(found[each], wanted[each], rtol=0, atol=TIGHT, err_msg=each)
    assert np.abs(wanted["norm_logprob"]).max() > 1e-3  # there is something to be seen
    assert np.abs(wanted["self_repair_logprob"] - wanted["norm_logprob"]).max() > 1e-3
    assert {*np.unique(wanted["ablated_target_rank"] != wanted["target_rank"])} == {False, True}


CASES = (
    (Head(0, 1), Head(2, 0)),
    (Attention(1), Mlp(2)),
    (Mlp(0),),
    (Neuron(1, 3), Neuron(1, 7), Head(2, 1)),
)
REPLACEMENTS = {"resample": "resample", "zero": "zero", "scale": Scale(2.0), "other": OtherHead(Head(1, 0))}


@pytest.mark.parametrize("replacement", REPLACEMENTS)
@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "llama-gqa"])
def test_several_sites_and_every_kind_of_them(nats, name, replacement):
    cases = sweep([Head(1, 2)]) if replacement == "other" else CASES
    compare(nats, name, cases, REPLACEMENTS[replacement])


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "olmo2"])
def test_deleted_and_swapped_layers(nats, name):
    compare(nats, name, ((Layers(1, 2),), (Swap(0),), (Parallel(0, 2),)), "zero")


@pytest.mark.parametrize("name", ["neox-parallel", "olmo2", "lfm2"])
def test_frozen_sites(nats, name):
    """Frozen, what is left is the norm's part; with the norm frozen too, nothing."""
    heads, every = sweep(Head(*head) for head in heads_of(name)), frozen(name, "all")
    alone = compare(nats, name, heads, "resample", every - {FinalNorm()})
    assert_allclose(alone["self_repair_logprob"], alone["norm_logprob"], rtol=0, atol=TIGHT)
    assert np.abs(alone["norm_logprob"]).max() > 1e-3
    still = compare(nats, name, heads, "resample", every)
    assert np.abs(still["self_repair_logprob"]).max() < TIGHT
    under = compare(nats, name, heads, "resample", {FinalNorm()})
    assert np.abs(under["norm_logprob"]).max() < TIGHT
    assert np.abs(under["self_repair_logprob"]).max() > 1e-3


def frozen(name, word):
    """A named set of frozen sites, as far as a model has them."""
    structure = structure_of(families.build(name))
    sites = freeze_set(word, structure.n_layers, structure.n_heads)
    return frozenset(site for site in sites if site == FinalNorm() or site.lies_in(structure))


def compare(nats, name, cases, replacement, freeze=frozenset()):
    """What a job tells of some cases, after it was compared with the oracle of edits."""
    model = families.build(name, exact=True)
    ids = torch.as_tensor(families.random_ids(model))
    arrays = {"tokens": ids, "partner_tokens": ids[families.derangement(len(ids))], "counterfactual_tokens": ids}
    edited, found = oracle_edits.Edited(model, arrays), nats(name, cases, replacement, freeze=freeze)
    for index, case in enumerate(cases):
        wanted = edited.in_nats([*map(plain, case)], plain(replacement), [*map(plain, freeze)])
        for each in CHANGED:
            assert_allclose(found[each][index], wanted[each], rtol=0, atol=TIGHT, err_msg=f"{each} of {case}")
    return found


def plain(site):
    """A site or replacement as the oracle takes it."""
    return site if isinstance(site, str) else (type(site).__name__.lower(), *astuple(site))


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize("target", ["centred", "raw"])
def test_log_probability_is_the_raw_logit_less_the_normaliser(nats, target):
    found = nats("neox-parallel", sweep([Head(0, 1), Head(2, 2)]), target=target)
    shift = [found[name] if target == "centred" else 0 for name in ("mean_logit", "mean_logit_change")]
    assert_allclose(found["logprob"], found["logit"] + shift[0] - found["logsumexp"], atol=1e-12)
    by_hand = found["logit_change"] + shift[1] - found["logsumexp_change"]
    assert_allclose(found["logprob_change"], by_hand, atol=1e-12)


def test_of_a_difference_it_is_the_target_itself(nats, seeded):
    other = torch.as_tensor(seeded("gpt2")).roll(3, 0)[:, 1:].contiguous()
    found = [
        nats("gpt2", sweep([Head(1, 1)]), target=target, arrays={"other": other}) for target in ("difference", "raw")
    ]
    assert not np.allclose(found[0]["logit"], found[1]["logit"])
    for name in (*CLEAN, *CHANGED):
        assert_array_equal(found[0][name], found[1][name])


def test_own_others_and_norm_add_up(nats):
    """What each adds when it is let in after the ones before: own write, other components, norm."""
    heads = sweep([Head(0, 1)])
    found = nats("neox-parallel", heads)
    own = found["logprob_change"] - found["self_repair_logprob"]
    alone = nats("neox-parallel", heads, freeze=freeze_set("all", 3, 3))["logprob_change"]
    others = nats("neox-parallel", heads, freeze={FinalNorm()})["self_repair_logprob"]
    assert_allclose(own, alone, atol=1e-12)
    assert_allclose(own + others + found["norm_logprob"], found["logprob_change"], atol=1e-12)
    assert min(np.abs(part).max() for part in (own, others, found["norm_logprob"])) > 1e-3


def test_nothing_changed_is_nothing(nats):
    found = nats("llama-gqa", sweep([Head(0, 0), Head(2, 1)]), "identity")
    assert max(np.abs(found[name]).max() for name in CHANGED[:-1]) < 1e-12
    assert_array_equal(found["ablated_target_rank"], np.broadcast_to(found["target_rank"], (2, 4, 7)))
    assert found["kl"].min() >= 0


def test_what_is_rounded_is_the_change():
    """In bfloat16 logits of tens are rounded to a sixteenth or so: their differences would say little."""
    model = load("tiny-neox", dtype="bfloat16", check=False)
    tokens = torch.arange(4 * 24).view(4, 24) * 7 % model.structure.vocab_size
    plan = Graph(ablate=sweep([Head(7, 1)]), replacement="zero", also=("logprob",)).plan(model.layout)
    found = run_session(ablation_job, model.nn, {"tokens": tokens}, plan | {"tokens_per_pass": 1000})
    raw = found["logit_change"] + found["mean_logit_change"]  # in float32, from probed rows of the unembedding
    off = found["logprob_change"] + found["logsumexp_change"] - raw
    assert off.square().mean() < 1e-4 * raw.square().mean()
    logits = (found["logit"] + found["mean_logit"]).abs().max() + raw.abs().max()
    assert off.abs().max() < 0.1 * logits * torch.finfo(torch.bfloat16).eps


# ---------------------------------------------------------------- which tokens, in which pieces, where


@pytest.mark.parametrize("rows", [8, 40, 1000])
@pytest.mark.parametrize("at_once", [1, 3, 10**6])
def test_pieces_change_nothing(nats, monkeypatch, rows, at_once):
    cases = sweep([Head(0, 1), Head(0, 2), Head(2, 1)])
    whole = nats("gpt2", cases)
    monkeypatch.setattr(vocabulary.Unembedding, "at_once", at_once)
    found = nats("gpt2", cases, rows=rows)
    for name in (*CLEAN, *CHANGED):
        assert_allclose(found[name], whole[name], atol=1e-12)


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_only_top_tokens_that_count_come_back(nats, limit):
    """In the order of case, prompt and position; of none, none."""
    cases = sweep([Head(0, 1), Head(2, 1)])
    whole, counted = nats("gpt2", cases), torch.rand(4, 7, generator=torch.manual_seed(0)) > 0.3
    found = nats("gpt2", cases, rows=8, arrays={"thresholds": torch.tensor([limit, limit]), "counted": counted})
    top = (whole["direct_effect"] >= limit) & counted.numpy()
    assert top.any() == (limit == 0)
    for name in CHANGED:
        assert_allclose(found[name], whole[name][top], atol=1e-12)
    assert_allclose(found["logprob"], whole["logprob"], atol=1e-12)


def test_what_is_not_wanted_is_left_out(nats):
    cases, wanted = sweep([Head(0, 1), Head(2, 1)]), torch.tensor([[3, 0, 8, 7], [0, 5, 0, 1]])
    whole, found = nats("gpt2", cases), nats("gpt2", cases, arrays={"wanted": wanted})
    asked = (torch.arange(7) < wanted[:, :, None]).numpy()
    for name in CHANGED:
        assert_allclose(found[name][asked], whole[name][asked], atol=1e-12)


def test_nothing_of_the_vocabularys_size_comes_back(nats):
    found = nats("gpt2", sweep([Head(0, 1)]))
    assert max(value.size for value in found.values()) == 4 * 7


def test_few_tokens_go_through_the_unembedding(wrapped, seeded):
    """Every one in the clean run, each kept one twice, and its clean one once for all the heads that keep it."""
    model, tokens = wrapped("gpt2"), torch.as_tensor(seeded("gpt2"))
    cases, rows = sweep([Head(1, 0), Head(1, 1), Head(1, 2)]), {}
    for also in ((), ("logprob",)):
        plan = Graph(ablate=cases, replacement="zero", also=also).plan(model.layout) | {"tokens_per_pass": 1000}
        with counting(model) as counted:
            found = run_session(ablation_job, model.nn, {"tokens": tokens, "thresholds": torch.zeros(3)}, plan)
        rows[also] = counted[1][model.structure.places["unembedding"]]
    top = (found["direct_effect"] >= 0).numpy()
    calls = 3  # on nothing, to know the bias, and on the norm's
    assert rows["logprob",] - rows[()] == tokens.numel() + 2 * top.sum() + top.any(0).sum() + calls


def test_a_plan_counts_them(runs):
    given = {"model": "tiny-neox", "tokens": 512, "length": 64}
    structure = load("tiny-neox", check=False).structure
    plain, top, every = (sr.preview("heads", logprob=word, **given)["flops"] for word in ("none", "top", "all"))
    token = 2 * structure.d_model * structure.vocab_size
    assert top - plain == pytest.approx(token * (512 + round(3 * 0.02 * 64 * 512)))
    assert every - plain == pytest.approx(token * (512 + 3 * 64 * 512))


def test_reinforced_heads_are_measured_in_logits():
    with pytest.raises(UsageError, match="measured in logits"):
        Graph(ablate=sweep([Head(0, 1)]), replacement=Reinforce(1.0), also=("logprob",))


# ---------------------------------------------------------------- runs, summaries, figures


CHOICES = {"heads": "0.*,2.1", "share": 0.2, "batch_size": 7, "progress": False}
SELECTED, PIECES = {"select": "top-share", "logprob": "all"}, {"tokens_per_pass": 9, "batch_size": 3}


@pytest.fixture(scope="module")
def runs(wrapped, seeded, tmp_path_factory):
    """runs(**choices): a finished run of the outcomes recipe on 25 prompts, made once; nobody may change it."""
    found, folder = {}, tmp_path_factory.mktemp("outcomes")

    def made(recipe="outcomes", **choices):
        key = repr((recipe, choices))
        if key not in found:
            given = CHOICES | {"prompts": seeded("neox-parallel", 25)} | choices
            out = folder / f"{len(found)}.zarr"
            found[key] = sr.run(recipe, model=wrapped("neox-parallel", exact=True), out=out, **given).load()
        return found[key]

    return made


def kept(ds):
    return np.isfinite(ds.logprob_change.values)


def test_a_run_keeps_the_top_share_or_all(runs):
    top, every = runs(), runs(logprob="all")
    done = every.selected.values[:, :, None, None] & np.ones((25, 7), bool)
    assert_array_equal(kept(every), done)
    assert_array_equal(kept(top), sr.top_share(every, 0.2).values & done)
    for name in CHANGED:
        assert_allclose(top[name].values[kept(top)], every[name].values[kept(top)], rtol=0, atol=1e-12)
        blank = -1 if name == "ablated_target_rank" else np.nan
        assert_array_equal(top[name].values[~kept(top)], blank)
    for name in CLEAN:
        assert_array_equal(top[name], every[name])
    assert_array_equal(top.logit_change, every.logit_change)


@pytest.mark.parametrize(
    "choices",
    representative(
        [
            {"backend": "simulated"},
            {"select": "top-share"},
            SELECTED,
            {"components": "top"},
            PIECES,
        ],
        SELECTED,
        PIECES,
    ),
    ids=str,
)
def test_whatever_else_is_chosen_it_is_the_same(runs, choices):
    ours, theirs = runs(), runs(**choices)
    assert_array_equal(kept(theirs), kept(ours))
    for name in CHANGED:
        assert_allclose(theirs[name].values[kept(ours)], ours[name].values[kept(ours)], rtol=0, atol=1e-9)
    assert_allclose(*(sr.outcomes_by_head(ds, 0.2).top_norm_logprob for ds in (ours, theirs)), atol=1e-9)


def test_until_an_interval_is_narrow(runs):
    ds = runs("heads", logprob="top", until_ci=100.0)
    mask = kept(ds)
    assert mask.any()
    by_hand = ds.logit_change + ds.mean_logit_change - ds.logsumexp_change
    assert_allclose(ds.logprob_change.values[mask], by_hand.values[mask], atol=1e-12)


def test_summaries_are_means_over_top_tokens(runs):
    ds = runs()
    found, nats, logits = sr.outcomes_by_head(ds, 0.2), sr.by_head(sr.in_nats(ds), 0.2), sr.by_head(ds, 0.2)
    means = {name: ds[name].where(kept(ds)).mean(("prompt", "position")) for name in CHANGED}
    for name in ("logprob_change", "self_repair_logprob", "norm_logprob", "entropy_change", "kl"):
        assert_allclose(found[f"top_{name}"], means[name], atol=1e-12)
        known = [np.isfinite(each) for each in (found[f"top_{name}_half_width"], logits.top_self_repair_half_width)]
        assert_array_equal(*known)
        assert known[0].any()
        assert found[f"top_{name}"].attrs["units"] == "nat"
        assert np.isnan(found[name]).all()  # not every token is kept
    own = means["self_repair_logprob"] - means["logprob_change"]
    assert_allclose(found.top_removed_logprob, own, atol=1e-12)
    assert_allclose(nats.top_self_repair, means["self_repair_logprob"], atol=1e-12)
    assert_allclose(nats.top_from_norm, means["norm_logprob"], atol=1e-12)
    for name in ("top_direct_effect", "top_removed"):
        assert_allclose(nats[name], own, atol=1e-12)
    assert_allclose(nats.top_distance, means["self_repair_logprob"] / np.sqrt(2), atol=1e-12)
    share = (ds.norm_logprob / (ds.self_repair_logprob - ds.logprob_change)).clip(0, 1).where(kept(ds))
    assert_allclose(nats.norm_share, share.mean(("prompt", "position")), atol=1e-12)
    assert {nats[f"top_{name}"].attrs["units"] for name in ("self_repair", "direct_effect", "removed")} == {"nat"}
    assert "top_from_heads" not in nats
    xr.testing.assert_identical(logits, found[[*logits.data_vars]].assign_attrs(logits.attrs))
    xr.testing.assert_identical(sr.outcomes_by_head(found, 0.2), found)


def test_of_every_token_there_are_all_means(runs):
    ds = runs(logprob="all")
    found = sr.by_head(sr.in_nats(ds), 0.2)
    assert_allclose(found.self_repair, ds.self_repair_logprob.mean(("prompt", "position")), atol=1e-12)
    tokens = sr.token_noise(sr.in_nats(ds), 0.2)
    best = {name: int(tokens[name][0]) for name in ("layer", "head")}
    assert_allclose(tokens.logit_change[0], ds.logprob_change.sel(best), atol=1e-12)
    own = ds.self_repair_logprob - ds.logprob_change
    assert_allclose(tokens.direct_effect[0], own.sel(best), atol=1e-12)
    assert_array_equal(tokens.top[0], sr.top_share(ds, 0.2).sel(best))


def test_part_of_a_run_has_what_was_kept_of_it(runs):
    """Its top tokens are of its own; those of them that the whole run did not keep are left out."""
    ds = runs()
    part = ds.isel(prompt=slice(0, 6))
    found = sr.outcomes_by_head(part, 0.2)
    mask = kept(part) & sr.top_share(part, 0.2).values
    assert mask.sum() < sr.top_share(part, 0.2).values[ds.selected.values].sum()
    expected = part.kl.where(mask).mean(("prompt", "position"))
    assert_allclose(found.top_kl, expected, atol=1e-12)


def test_it_is_said_what_a_store_does_not_hold(runs, tmp_path):
    plain, top = runs("heads"), runs()
    with pytest.raises(UsageError, match="holds no log-probability: run its recipe with --logprob top, or all"):
        sr.in_nats(plain)
    for function in (sr.outcomes_by_head, lambda ds: sr.plot(ds, tmp_path, outcome="logprob")):
        with pytest.raises(UsageError, match="holds no log-probability"):
            function(plain)
    with pytest.raises(UsageError, match=r"top 0\.2 of tokens, not of share 0\.5: run with"):
        sr.by_head(sr.in_nats(top), 0.5)
    with pytest.raises(UsageError, match=r"repair_map is of logits alone; .* has self_repair_by_layer"):
        sr.plot(top, tmp_path, ["repair_map"], outcome="logprob")
    with pytest.raises(UsageError, match="outcome 'nats' is not known"):
        sr.plot(top, tmp_path, outcome="nats")
    with pytest.raises(UsageError, match="components 'all' and logprob 'top'"):
        sr.preview("heads", components="all", logprob="top")
    with pytest.raises(UsageError, match="choose logprob 'top' or 'none'"):
        sr.preview("neurons", logprob="all")
    with pytest.raises(UsageError, match="takes no --logprob"):
        sr.preview("self_reinforcement", logprob="top")


FIGURES = ("self_repair_by_layer", "direct_effect_vs_logit_change", "distance_by_layer", "norm_share")


def test_figures_draw_either(runs, tmp_path):
    top, every = runs(), runs(logprob="all")
    assert {*figures.suited(top)} == {*FIGURES, "token_noise", "outcomes"}
    found = {path.stem for path in sr.plot(top, tmp_path, outcome="logprob", share=0.2, formats="svg")}
    assert found == {f"{name}_logprob" for name in FIGURES}
    found = {path.stem for path in sr.plot(every, tmp_path, outcome="logprob", share=0.2, formats="svg")}
    assert found == {f"{name}_logprob" for name in (*FIGURES, "token_noise")}


@pytest.mark.parametrize("name", [*FIGURES, "token_noise"])
def test_a_figure_says_what_it_shows(runs, name):
    ds = runs(logprob="all")
    words = [
        " ".join(text.get_text() for text in figures.draw(name, each, share=0.2).findobj(Text))
        for each in (ds, sr.in_nats(ds))
    ]
    assert "logit" in words[0]
    assert "nats" not in words[0]
    assert "nats" in words[1]
    assert "(logits)" not in words[1]


def test_the_figure_of_both_shows_their_means(runs):
    ds = runs()
    panels = figures.draw("outcomes", ds, share=0.2).axes
    layers, lines = sr.by_layer(sr.outcomes_by_head(ds, 0.2), 0.2), [line for axes in panels for line in axes.lines]
    drawn = [line.get_ydata() for line in lines]
    for name in ("self_repair", "self_repair_logprob", "from_norm", "norm_logprob", "removed", "kl"):
        assert any(np.array_equal(values, layers[f"top_{name}"].values) for values in drawn), name
    two = figures.draw("outcomes", {"one": ds, "other": ds}, share=0.2)
    assert len(two.axes) == 8
    assert min(each.get_position().width for each in two.axes) > 0.15, "what stands above a panel takes its room"


def test_the_command_line_draws_it(runs, tmp_path):
    store = runs().encoding["source"]
    one = ("--figure", "distance_by_layer", "--outcome", "logprob", "--share", 0.2)
    told = selfrepair("plot", store, *one, "--out", tmp_path)
    assert f"{tmp_path}/distance_by_layer_logprob.png" in told.out.splitlines()
    refused = selfrepair("plot", runs("heads").encoding["source"], "--outcome", "logprob")
    assert refused.code == 2
    assert "run its recipe with --logprob top" in refused.err
    assert selfrepair("plot", store, "--outcome", "nats").code == 2


def test_a_summary_in_logits_is_told_from_a_store_without_log_probability(runs):
    with pytest.raises(UsageError, match="this is a summary in logits: give its store"):
        sr.in_nats(sr.by_head(runs(), 0.2))
