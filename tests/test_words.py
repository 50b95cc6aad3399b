"""Which tokens a write promotes: every number against whole passes with plain hooks, and by what must hold by hand."""

import base64
import zlib

import families
import numpy as np
import oracle
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from test_outcomes import CASES, heads_of, no_float32  # noqa: F401
from test_tracing_law import counting
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.components import Head, Layers, Mlp, Neuron, Swap
from selfrepair_nn.errors import UsageError
from selfrepair_nn.explorer.contents import Contents
from selfrepair_nn.figures import words as words_figure
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.quantities import QUANTITIES
from selfrepair_nn.replacements import Reinforce
from selfrepair_nn.tracing import lens
from selfrepair_nn.tracing.jobs import ablation_job
from selfrepair_nn.tracing.session import run_session
from selfrepair_nn.tracing.vocabulary import Unembedding

TIGHT = 1e-9
ENDS = {"promoted": 1, "demoted": -1}


@pytest.fixture
def worded(wrapped, seeded):
    """worded(name, cases, words, …): what a job tells of them in words: {name: array}."""

    def run(name, cases, words=4, replacement="resample", arrays=None, rows=20, **graph):
        model, ids = wrapped(name, exact=True), torch.as_tensor(seeded(name))
        given = {"tokens": ids, "partner_tokens": ids[families.derangement(len(ids))]} | (arrays or {})
        plan = Graph(ablate=cases, replacement=replacement, words=words, **graph).plan(model.layout)
        found = run_session(ablation_job, model.nn, given, plan | {"tokens_per_pass": rows})
        return {key: value.numpy() for key, value in found.items()}

    return run


def at(logits, ids):
    """The entries of logits [..., vocab] at ids [..., word]."""
    return np.take_along_axis(np.asarray(logits), ids, -1)


FAMILIES = ("gpt2", "gptj", "neox-parallel", "llama-gqa", "gemma2", "cohere", "granite", "lfm2")


@pytest.mark.parametrize("name", FAMILIES)
def test_against_whole_passes(worded, seeded, name):
    """Behind a scale of logits, norms behind sublayers, mixers; before a soft cap."""
    heads = heads_of(name)
    found = worded(name, sweep(Head(*head) for head in heads))
    partners, moved = families.derangement(len(seeded(name))), []
    for index, head in enumerate(heads):
        wanted = oracle.words(families.build(name, exact=True), seeded(name), head, partners=partners)
        got = {key: value[index] for key, value in found.items() if len(value) == len(heads)}
        for end, sign in ENDS.items():
            ids, effect = got[end], got[f"{end}_effect"]
            assert_allclose(effect, sign * -np.sort(-sign * wanted["write"].numpy())[..., :4], atol=TIGHT)
            for key, logits in {f"{end}_effect": "write", f"ablated_{end}_effect": "ablated"}.items():
                assert_allclose(got[key], at(wanted[logits], ids), atol=TIGHT, err_msg=key)
            assert_allclose(got[f"{end}_logit_change"], at(wanted["change"], ids), atol=TIGHT)
            assert np.abs(got[f"{end}_logit_change"] - (got[f"ablated_{end}_effect"] - effect)).max() > 1e-3
        moved.append(compare_movers(got, wanted))
    assert max(moved) > 1e-3


def compare_movers(got, wanted):
    effects = wanted["effects"].numpy()
    sizes = np.sort(np.abs(effects))[..., ::-1][..., :3]
    assert_allclose(np.abs(got["changed_effect"]), sizes, atol=TIGHT)
    assert_allclose(got["changed_effect"], at(effects, got["changed_component"]), atol=TIGHT)
    changes = torch.stack(wanted["changes"], 2).numpy()  # [prompt, position, component, vocab]
    own = np.take_along_axis(changes, got["changed_component"][..., None], 2)
    for end, sign in ENDS.items():
        effect = got[f"change_{end}_effect"]
        assert_allclose(effect, sign * -np.sort(-sign * own)[..., :4], atol=TIGHT)
        assert_allclose(effect, at(own, got[f"change_{end}"]), atol=TIGHT)
    return sizes.max()


@pytest.mark.parametrize(
    ("cases", "replacement"),
    [(CASES, "resample"), (CASES, "zero"), (((Layers(1, 2),), (Swap(0),)), "zero")],
    ids=["resample", "zero", "layers"],
)
@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "olmo2"])
def test_of_the_target_they_are_what_is_stored_of_it(worded, seeded, wrapped, name, cases, replacement):
    """With the whole vocabulary as words, the next token is among them."""
    if name == "olmo2" and cases is CASES:
        cases = cases[:3]  # neurons behind a norm are not split
    size = wrapped(name).structure.vocab_size
    found = worded(name, cases, words=size, replacement=replacement, record="full" if cases is CASES else "sums")
    goal = seeded(name)[None, :, 1:, None]
    for end in ENDS:
        here = (found[end] == goal).argmax(-1)[..., None]
        for wanted, key in {
            "direct_effect": f"{end}_effect",
            "ablated_direct_effect": f"ablated_{end}_effect",
            "logit_change": f"{end}_logit_change",
        }.items():
            if wanted == "ablated_direct_effect" and (Swap(0),) in cases and name == "olmo2":
                continue  # there the norms behind the swapped layers are counted in
            assert_allclose(at(found[key], here)[..., 0], found[wanted], atol=TIGHT, err_msg=key)
        here = (found[f"change_{end}"] == goal[..., None]).argmax(-1)[..., None]
        moved = at(found[f"change_{end}_effect"], here)[..., 0]
        assert_allclose(moved, found["changed_effect"], atol=TIGHT)
    if "component_change" in found:
        assert_allclose(at(found["component_change"], found["changed_component"]), found["changed_effect"], atol=TIGHT)
    assert_allclose(found["promoted_effect"].sum(-1), 0, atol=1e-7)  # centred over the vocabulary


def test_frozen_nothing_but_the_norm_changes(worded):
    from selfrepair_nn.graph import freeze_set

    found = worded("neox-parallel", sweep([Head(0, 1)]), freeze=freeze_set("downstream", 3, 3))
    assert np.abs(found["changed_effect"]).max() < TIGHT
    assert np.abs(found["change_promoted_effect"]).max() < TIGHT


# ---------------------------------------------------------------- which tokens, in which pieces


@pytest.mark.parametrize(("at_once", "rows"), [(1, 40), (3, 8)])
def test_pieces_change_nothing(worded, monkeypatch, at_once, rows):
    cases = sweep([Head(0, 1), Head(0, 2), Head(2, 1)])
    whole = worded("gpt2", cases, rows=1000)
    monkeypatch.setattr(Unembedding, "at_once", at_once)
    found = worded("gpt2", cases, rows=rows)
    for name in found:
        assert_allclose(found[name], whole[name], atol=1e-12)


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_only_top_tokens_that_count_come_back(worded, limit):
    cases = sweep([Head(0, 1), Head(2, 1)])
    whole, counted = worded("gpt2", cases), torch.rand(4, 7, generator=torch.manual_seed(0)) > 0.3
    found = worded("gpt2", cases, arrays={"thresholds": torch.tensor([limit, limit]), "counted": counted})
    top = (whole["direct_effect"] >= limit) & counted.numpy()
    assert top.any() == (limit == 0)
    for name in (each for each in found if QUANTITIES[each].when == "words"):
        assert_allclose(found[name], whole[name][top], atol=1e-12)


def test_nothing_of_the_vocabularys_size_comes_back_and_few_tokens_go_through(wrapped, seeded):
    model, tokens = wrapped("gpt2"), torch.as_tensor(seeded("gpt2"))
    cases, rows = sweep([Head(1, 0), Head(1, 1)]), {}
    for words in (0, 2):
        plan = Graph(ablate=cases, replacement="zero", words=words).plan(model.layout) | {"tokens_per_pass": 1000}
        with counting(model) as counted:
            found = run_session(ablation_job, model.nn, {"tokens": tokens, "thresholds": torch.zeros(2)}, plan)
        rows[words] = counted[1][model.structure.places["unembedding"]]
    top = int((found["direct_effect"] >= 0).sum())
    assert rows[2] - rows[0] == (4 + lens.Words(2, 3).movers) * top + 2
    assert max(value.numel() for name, value in found.items() if "promoted" in name) == top * 3 * 2


def test_what_cannot_be_is_said():
    one = sweep([Head(0, 1)])
    with pytest.raises(UsageError, match="parts are told apart"):
        Graph(ablate=one, words=3, record="total")
    with pytest.raises(UsageError, match="leave Reinforce out"):
        Graph(ablate=one, words=3, replacement=Reinforce(1.0))
    with pytest.raises(UsageError, match="words"):
        Graph(ablate=one, words=-1)
    with pytest.raises(UsageError, match="vocabulary has 61"):
        raise UsageError(Graph(ablate=one, words=62).misfit(structure("gpt2")))
    assert Graph(ablate=one).digest == Graph(ablate=one, words=0).digest != Graph(ablate=one, words=1).digest


def structure(name):
    from selfrepair_nn.models.architectures import structure_of

    return structure_of(families.build(name))


def test_sites_without_heads_have_words_too(worded):
    found = worded("lfm2", sweep([Mlp(0)]))
    assert np.abs(found["change_promoted_effect"]).max() > 1e-3


# ---------------------------------------------------------------- runs


CHOICES = {"heads": "0.*,2.1", "share": 0.2, "batch_size": 7, "progress": False, "words": 3}


@pytest.fixture(scope="module")
def runs(wrapped, seeded, tmp_path_factory):
    """runs(**choices): a finished run of 25 prompts, made once; nobody may change it."""
    found, folder = {}, tmp_path_factory.mktemp("words")

    def made(recipe="heads", **choices):
        key = repr((recipe, choices))
        if key not in found:
            given = CHOICES | {"prompts": seeded("neox-parallel", 25)} | choices
            out = folder / f"{len(found)}.zarr"
            found[key] = sr.run(recipe, model=wrapped("neox-parallel", exact=True), out=out, **given).load()
        return found[key]

    return made


STORED = [name for name, each in QUANTITIES.items() if each.when == "words" and each.source != "label"]


CHOSEN = [{"backend": "simulated"}, {"select": "top-share"}, {"components": "top"}]


@pytest.mark.parametrize("choices", representative(CHOSEN, {"select": "top-share"}), ids=str)
def test_whatever_else_is_chosen_they_are_the_same(runs, choices):
    ours, theirs = runs(), runs(**choices)
    top = sr.top_share(ours, 0.2).values & ours.selected.values[:, :, None, None]
    for name in STORED:
        blank = -1 if QUANTITIES[name].kind == "int" else np.nan
        if "backend" in choices:
            assert_array_equal(theirs[name].values, ours[name].values)
        assert_allclose(theirs[name].values, ours[name].values, rtol=0, atol=1e-12)
        assert_array_equal(ours[name].values[~top], blank)
        assert np.isfinite(ours[name].values[top]).all()
        assert (ours[name].values[top] != blank).all()


def test_a_plan_counts_them():
    given = {"model": "tiny-neox", "tokens": 512, "length": 64}
    plain, top = (sr.preview("heads", words=words, **given)["flops"] for words in (0, 5))
    assert top - plain == pytest.approx(2 * 128 * 2048 * round(7 * 0.02 * 64 * 512))


def test_a_store_says_what_its_tokens_are(runs):
    ds = runs()
    assert ds.vocabulary_text.dims == ("vocabulary",)
    assert ds.sizes["vocabulary"] == ds.vocabulary.max() + 1
    assert [*map(str, ds.vocabulary_text.values[:3])] == ["0", "1", "2"]  # without a tokenizer the ids in figures
    assert ds.component.values[int(ds.changed_component.max())].startswith("L")


# ---------------------------------------------------------------- summaries, figures


def entries(ds, share):
    """(layer, head, prompt, position) of every head's top tokens."""
    return np.argwhere((sr.top_share(ds, share) & ds.selected.values[:, :, None, None]).values)


def test_the_most_frequent_words_are_counted(runs):
    ds, counts = runs(), {}
    found = sr.frequent_words(ds, count=4, share=0.2)
    for layer, head, prompt, position in entries(ds, 0.2):
        for token in ds.demoted.values[layer, head, prompt, position]:
            counts.setdefault((layer, head), []).append(int(token))
    for (layer, head), tokens in counts.items():
        each = found.sel(end="demoted").isel(layer=layer, head=head)
        often = sorted((tokens.count(t) for t in set(tokens)), reverse=True)[:4]
        n = int(each.top_tokens)
        assert_allclose(each.word_share, np.array(often) / n)
        assert [tokens.count(int(t)) for t in each.word] == often
        assert [*each.word_text.values] == [str(int(t)) for t in each.word]  # a vocabulary of figures
        assert (each.word_effect < 0).all()


@pytest.mark.parametrize("end", ENDS)
def test_contexts_are_searched_token_by_token(runs, end):
    """By hand: each first word in its own prompt so far, and in as much of every other prompt."""
    ds = runs()
    found, rows, tokens = sr.words_in_context(ds, 0.2).sel(end=end), {}, ds.token.values
    for layer, head, prompt, position in entries(ds, 0.2):
        word, others = ds[end].values[layer, head, prompt, position, 0], [p for p in range(25) if p != prompt]
        own = word in tokens[prompt, : position + 1]
        null = np.mean([word in tokens[p, : position + 1] for p in others])
        at = (layer, head, prompt, position, 0)
        before, after = (ds[name].values[at] for name in (f"{end}_effect", f"ablated_{end}_effect"))
        change = ds[f"{end}_logit_change"].values[at]
        row = (own, null, before, before - after, change, change + before - after)
        rows.setdefault((layer, head), []).append(row)
    for (layer, head), values in rows.items():
        each, table = found.isel(layer=layer, head=head), np.array(values, float)
        assert_allclose([each.in_context, each.in_context_null], table[:, :2].mean(0), atol=1e-12)
        assert_allclose(each.in_context_excess, (table[:, 0] - table[:, 1]).mean(), atol=1e-12)
        there = table[table[:, 0] > 0]
        assert int(each.tokens_in_context) == len(there)
        if not len(there):
            assert np.isnan(each.word_effect)
            continue
        means = [each[f"word_{n}"] for n in ("effect", "removed", "logit_change", "repair")]
        assert_allclose(means, there[:, 2:].mean(0), atol=1e-12)
    assert found.tokens_in_context.sum() > 3
    assert np.isfinite(found.in_context_excess_half_width.values[found.tokens.values > 0]).any()
    assert not found.excess_known.values[found.tokens.values == 0].any()


def copied(ds, end):
    """The store, each word of an end replaced by the token that is read there: in every context of its own."""
    here = np.broadcast_to(ds.token.values[..., None], ds[end].shape)
    return ds.assign({end: (ds[end].dims, np.where(ds[end].values < 0, -1, here), ds[end].attrs)})


def test_copies_are_told_from_the_null_and_chance_is_not(runs):
    ds = copied(runs(), "demoted")
    found = sr.words_in_context(ds, 0.2)
    tested = np.isfinite(found.in_context_excess_half_width)  # enough prompts hold a token
    assert (found.in_context.sel(end="demoted").values[found.tokens.values > 0] == 1).all()
    assert tested.sel(end="demoted").sum() >= 3
    assert_array_equal(found.excess_known.sel(end="demoted"), tested.sel(end="demoted"))
    assert not found.excess_known.sel(end="promoted").any()  # random weights copy nothing


def test_changes_are_gathered_by_the_component_that_repairs(runs):
    ds, rows, tokens = runs(), {}, runs().token.values
    found = sr.changes_in_context(ds, 0.2)
    for layer, head, prompt, position in entries(ds, 0.2):
        at = (layer, head, prompt, position)
        effect = ds.changed_effect.values[at][0]
        if effect * ds.direct_effect.values[at] > 0:
            word = ds.change_promoted.values[at][0, 0]
            own = word in tokens[prompt, : position + 1]
            rows.setdefault(int(ds.changed_component.values[at][0]), []).append((own, abs(effect)))
    assert_array_equal(np.flatnonzero(found.tokens), sorted(rows))
    for component, values in rows.items():
        each = found.sel(end="promoted").isel(component=component)
        assert int(each.tokens) == len(values)
        assert_allclose([each.in_context, each.repair], np.mean(np.array(values, float), 0), atol=1e-12)


def test_it_is_said_what_a_store_does_not_hold(runs):
    with pytest.raises(UsageError, match="holds no words: run its recipe with --words 5"):
        sr.words_in_context(runs(words=0))
    with pytest.raises(UsageError, match="words of the top 20% of tokens only"):
        sr.frequent_words(runs(), share=0.3)
    with pytest.raises(UsageError, match="holds words for each head's top share"):
        sr.words_in_context(sr.choose_tokens(runs(), tail="bottom"), 0.2)
    with pytest.raises(UsageError, match="choose components 'top'"):
        sr.run("heads", model="tiny-neox", words=2, components="all", tokens=256)
    with pytest.raises(UsageError, match="takes no --words"):
        sr.run("neurons", model="tiny-neox", words=2, tokens=256)


def test_the_figure_shows_them_and_hostile_tokens_are_text(runs, tmp_path):
    ds = runs()
    texts = np.array(["$\\frac", "<b>", " \ufffd", "\ufffd"] * 99, object)[: ds.sizes["vocabulary"]]
    ds = ds.assign_coords(vocabulary_text=("vocabulary", texts))
    drawn = figures.draw("words", ds, share=0.2)
    written = {text.get_text() for axes in drawn.axes for text in axes.texts}
    told = sr.frequent_words(ds, 3, 0.2)
    best = told.sel(end="promoted").isel(layer=0, head=0, place=0)
    shown = words_figure.shown(int(best.word), str(best.word_text.values))
    assert any(each.startswith(f"{shown}  {100 * float(best.word_share):.0f}") for each in written)
    excess = [line for line in drawn.axes[2].lines if len(line.get_xdata()) == 1]
    first = sr.words_in_context(ds, 0.2).in_context_excess.sel(end="promoted").isel(layer=0, head=0)
    assert any(np.isclose(line.get_xdata()[0], float(first)) for line in excess)
    assert words_figure.shown(7, "\ufffd") == "⟨7⟩"
    assert words_figure.shown(7, " a\x07") == "␣a\\x07"
    assert [path.suffix for path in sr.plot(ds, tmp_path, "words", share=0.2)] == [".png", ".svg"]


# ---------------------------------------------------------------- the explorer


def unpacked(text, size, count, changed):
    """What the page's script reads of one head's words."""
    raw, at = zlib.decompress(base64.b64decode(text)), 0

    def whole(n, width):
        nonlocal at
        bytes_ = np.frombuffer(raw[at : at + n * width], np.uint8).reshape(width, n).astype(int)
        at += n * width
        return (bytes_ * 256 ** np.arange(width)[:, None]).sum(0)

    token = np.cumsum(whole(size, 4))
    words = [whole(size * n, 4).reshape(size, -1) for n in (count, count, changed * count, changed * count)]
    folded = [whole(size * n, 2).reshape(size, -1) for n in (count, count, changed)]
    effects = [np.where(n % 2, -(n + 1) // 2, n // 2) for n in folded]
    return token, words, effects, whole(size * changed, 2).reshape(size, -1)


def test_the_explorer_holds_the_words_of_every_top_token(runs):
    ds = runs()
    data = Contents.of(ds, 0.2).data()["promoted"]
    assert data["count"] == 3
    site = 1
    size, text = data["tokens"][0][site]
    token, words, effects, component = unpacked(text, size, data["count"], data["changed"])
    where = [(p, i) for layer, head, p, i in entries(ds, 0.2) if (layer, head) == (0, 1)]
    assert_array_equal(token, sorted(p * 7 + i for p, i in where))
    for n, flat in enumerate(token):
        at = (0, site, *divmod(int(flat), 7))
        for j, name in enumerate(("promoted", "demoted", "change_promoted", "change_demoted")):
            assert [data["vocabulary"][i] for i in words[j][n]] == [str(i) for i in ds[name].values[at].ravel()]
        for j, name in enumerate(("promoted_effect", "demoted_effect", "changed_effect")):
            assert_allclose(effects[j][n] * data["step"], ds[name].values[at], atol=data["step"])
        assert_array_equal(component[n], ds.changed_component.values[at])
    often = sr.frequent_words(ds, 5, 0.2).sel(end="demoted").isel(layer=0, head=1)
    assert [data["vocabulary"][i] for i, _ in data["often"][0][site][1]] == [*often.word_text.values]


def test_hostile_words_are_data_of_the_page(runs, tmp_path):
    ds = runs()
    bad = "</script><img src=x onerror=alert(1)>"
    texts = np.full(ds.sizes["vocabulary"], bad, object)
    page = sr.view(ds.assign_coords(vocabulary_text=("vocabulary", texts)), tmp_path / "x.html", share=0.2)
    assert bad not in page.read_text()
    assert "onerror" in page.read_text()
    plain_page = sr.view(runs(words=0), tmp_path / "y.html", share=0.2)
    assert '"promoted": null' in plain_page.read_text() or '"promoted":null' in plain_page.read_text()


# ---------------------------------------------------------------- mean writes, and neurons


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "cohere"])
def test_words_of_mean_writes_by_hand(wrapped, seeded, name):
    """A head's and an MLP's mean write, and a neuron's own, against the weights."""
    model, ids = wrapped(name, exact=True), seeded(name)
    module = families.build(name, exact=True)
    parts = oracle.find_parts(module)
    clean = oracle.run(parts, torch.as_tensor(ids))
    scale = oracle.scale(parts.final_norm, clean.final)
    found = sr.write_words(model, [Head(1, 1), Mlp(2)], ids, words=5)
    writes = {w.label: w.x for w in oracle.component_writes(parts, clean, "output", clean)}
    for label, site in (("L1H1", "L1H1"), ("L2.mlp", Mlp(2).label)):
        u = parts.logit_multiplier * module.get_output_embeddings().weight.detach().double()
        x = oracle.gain(parts.final_norm) * oracle.centre(parts.final_norm, writes[label]) / scale[..., None]
        logits = (x.mean((0, 1)) @ u.T).numpy()
        logits -= logits.mean()
        one = found.sel(site=site)
        assert_allclose(one.promoted_effect, np.sort(logits)[::-1][:5], atol=TIGHT)
        assert_allclose(one.demoted_effect, logits[one.demoted.values], atol=TIGHT)


def test_words_of_neurons_by_hand(wrapped):
    module = families.build("gpt2", exact=True)
    parts, rows = oracle.find_parts(module), oracle._matrix(module.transformer.h[1].mlp.c_proj)
    x = oracle.gain(parts.final_norm) * oracle.centre(parts.final_norm, rows[7])
    logits = (x @ module.get_output_embeddings().weight.detach().double().T).numpy()
    found = sr.write_words(wrapped("gpt2", exact=True), [Neuron(1, 7)], words=4)
    assert_allclose(found.promoted_effect[0], np.sort(logits - logits.mean())[::-1][:4], atol=TIGHT)
    assert [*found.promoted_text.values[0]] == [str(i) for i in found.promoted.values[0]]


def test_words_of_what_there_is_not(wrapped):
    model = wrapped("gpt2", exact=True)
    for sites, more, said in (
        ([Head(0, 1)], {}, "only neurons write the same"),
        ([Head(9, 1)], {"tokens": [[1, 2]]}, "L9H1"),
        ([], {}, "name at least one site"),
        ([Neuron(0, 1)], {"words": 99}, "vocabulary has 61"),
    ):
        with pytest.raises(UsageError, match=said):
            sr.write_words(model, sites, **more)
    with pytest.raises(UsageError, match="model must be a Model"):
        sr.write_words("tiny-neox", [Neuron(0, 1)])
