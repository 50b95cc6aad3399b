"""Each text a row of its own: what is measured is what each gives by itself, and nothing that fills up a row counts."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import families
import numpy as np
import oracle
import pandas as pd
import pytest
import torch
import xarray as xr
from datasets import Dataset
from numpy.testing import assert_allclose, assert_array_equal

import selfrepair_nn as sr
from selfrepair_nn import auditing, report, wording
from selfrepair_nn.analysis.words import _Contexts
from selfrepair_nn.blocks import Top
from selfrepair_nn.errors import UsageError
from selfrepair_nn.explorer.contents import Contents
from selfrepair_nn.options import Options
from selfrepair_nn.padding import alike, padded
from selfrepair_nn.prompts import several_partners
from selfrepair_nn.quantities import QUANTITIES
from selfrepair_nn.simulate import simulate_heads

TIGHT = 1e-10
MODEL = "neox-sequential"
LENGTHS = (5, 9, 3, 12, 2, 9)
PARTNERS = np.array([[1, 3, 4, 0, 5, 2], [5, 0, 3, 4, 1, 2]])
COVERED = {0: [4, 8, 2, 5, 1, 3], 1: [4, 5, 2, 2, 1, 3]}
"""By hand: the text's tokens less its last, or its partner's, whichever are fewer."""
PARTS = ("ablated_direct_effect", "logit_change", "self_repair", "from_heads", "from_mlps", "from_norm", "closure")


def rows_of(name=MODEL, lengths=LENGTHS):
    vocabulary = families.build(name).config.vocab_size
    return [np.random.default_rng(length).integers(0, vocabulary, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def ran(wrapped, tmp_path_factory):
    """ran(**choices): a run of texts of unequal length, made once."""
    made, folder = {}, tmp_path_factory.mktemp("texts")

    def run(recipe="heads", name=MODEL, lengths=LENGTHS, **choices):
        key = repr((recipe, name, lengths, choices))
        if key not in made:
            out = folder / f"{len(made)}.zarr"
            given = {"prompts": rows_of(name, lengths), "rows_are": "texts", "out": out, "progress": False}
            given |= {"check": False}
            made[key] = sr.run(recipe, model=wrapped(name, exact=True), **given | choices).load()
        return made[key]

    return run


def cut(ds, prompt, stop):
    return ds.isel(prompt=prompt, position=slice(stop))


@pytest.mark.parametrize("name", ["gpt2", "mistral-sliding", "jamba"])
def test_each_text_has_the_numbers_that_it_has_by_itself(name, ran, wrapped, tmp_path):
    """Learned and rotary positions, a sliding window, state spaces; in units that texts share."""
    choices = {"ablation": "zero", "components": "all", "check": False}
    found = ran(name=name, lengths=LENGTHS[:3], batch_size=2, **choices)
    for prompt, row in list(enumerate(rows_of(name, LENGTHS[:3])))[::2]:
        given = {"model": wrapped(name, exact=True), "progress": False} | choices
        alone = sr.run(prompts=[row], out=tmp_path / f"{prompt}.zarr", **given).load()
        for each in [str(n) for n in alone.data_vars if "position" in alone[n].dims]:
            here = cut(found[each], prompt, len(row) - 1)
            assert_allclose(here, alone[each].isel(prompt=0), rtol=0, atol=TIGHT, err_msg=each)


@pytest.mark.parametrize("resample", [0, 1])
def test_a_partner_lends_as_far_as_it_goes(ran, resample):
    """Against plain hooks: the text and its partner alone, both cut to what both have."""
    found, rows = ran(partners=PARTNERS), rows_of()
    model = families.build(MODEL, exact=True)
    for prompt, lender in enumerate(PARTNERS[resample]):
        stop = min(len(rows[prompt]) - 1, len(rows[lender]))
        assert stop == COVERED[resample][prompt]
        lent = [*rows[lender], *rows[prompt]][: stop + 1]  # the last position lends to no token that counts
        expected = oracle.reference(model, [rows[prompt][: stop + 1], lent], partners=[1, 0], heads=[(0, 1), (2, 2)])
        both = min(stop, COVERED[1 - resample][prompt])
        for layer, head in ((0, 1), (2, 2)):
            for each in ("direct_effect", *PARTS):
                here = found[each].isel(resample=resample, missing_dims="ignore").sel(layer=layer, head=head)
                assert_allclose(cut(here, prompt, both), expected[each][layer, head, 0, :both], rtol=0, atol=TIGHT)


def test_nothing_but_the_text_counts_and_filler_holds_nothing(ran):
    found, rows = ran(partners=PARTNERS), rows_of()
    least = np.minimum(COVERED[0], COVERED[1])
    assert_array_equal(found.text_positions, least)
    assert_array_equal(found.counted, np.arange(11) < least[:, None])
    for name in found.data_vars:
        dims = QUANTITIES[name].dims
        if "position" in dims:
            ends = least if "layer" in dims else np.array(LENGTHS) - 1
            for prompt, end in enumerate(ends):
                here = found[name].isel(prompt=prompt)
                assert here.isel(position=slice(end)).notnull().all(), name
                assert here.isel(position=slice(end, None)).isnull().all(), name
    for prompt, row in enumerate(rows):
        assert_array_equal(found.token[prompt], [*row[:11], *[-1] * (11 - len(row))])
        assert_array_equal(found.target[prompt], [*row[1:], *[-1] * (12 - len(row))])
        assert (found.token_text[prompt, len(row) :] == "").all()


@pytest.mark.parametrize("ablation", ["zero", "resample"])
def test_summaries_are_over_the_tokens_of_the_texts(ran, ablation):
    lengths = (20, 2, 24, 7, 23, 12, 24, 9, 5, 24)
    found = ran(ablation=ablation, lengths=lengths, layers=[2])
    heads, counted = sr.by_head(found), found.counted.values
    repair, effect = (found[name].values[0][:, counted] for name in ("self_repair", "direct_effect"))
    assert_allclose(heads.self_repair[0], repair.mean(1), atol=TIGHT)
    assert (heads.share, heads.counted_share) == (0.02, 1), "no choice of tokens was made by the prompts"
    best = np.argsort(-effect, axis=1)[:, : max(1, counted.sum() * 2 // 100)]
    assert_allclose(heads.top_self_repair[0], np.take_along_axis(repair, best, 1).mean(1), atol=TIGHT)
    top = ran(ablation=ablation, lengths=lengths, layers=[2], select="top-share")
    again = sr.by_head(top)
    assert_allclose(again.top_self_repair, heads.top_self_repair, atol=TIGHT)
    assert_allclose(again.direct_effect, heads.direct_effect, atol=TIGHT)
    assert top.counted.equals(found.counted)


def test_the_mean_is_over_all_tokens_of_the_texts_and_no_filler(ran):
    model = families.build(MODEL, exact=True)
    for count in (1, len(LENGTHS)):
        found, rows = ran(ablation="mean", mean_prompts=count), rows_of()
        parts = oracle.find_parts(model)
        every = [oracle.run(parts, torch.tensor([row])).z[1][0] for row in rows[:count]]
        mean = torch.cat(every).mean(0)  # [head, d_head]
        for prompt in (1, 3):
            setting = oracle.Setting(parts, torch.tensor([rows[prompt]]), "centred", "output", None)
            clean = oracle._clean(setting)
            lent = oracle._new_z(setting, clean, "mean", None, {1: mean}, 1, 2)
            seen = oracle._ablated(setting, clean, 1, 2, lent)
            expected = oracle._measure(setting, clean, seen, clean.labels.index("L1H2"))
            for each in PARTS:
                here = cut(found[each].sel(layer=1, head=2), prompt, len(rows[prompt]) - 1)
                assert_allclose(here, expected[each][0], rtol=0, atol=TIGHT, err_msg=f"{each} of {count}")


def test_units_passes_and_the_way_to_a_server_change_nothing(ran):
    whole = ran(resamples=2, layers=[2])
    for how in ({"batch_size": 1}, {"tokens_per_pass": 12}, {"backend": "simulated"}):
        other = ran(resamples=2, layers=[2], **how)
        for each in ("logit", "direct_effect", *PARTS):
            assert_allclose(other[each], whole[each], rtol=0, atol=TIGHT, err_msg=f"{how}: {each}")
    whole, other = (ran(ablation="mean", layers=[2], backend=where) for where in ("local", "simulated"))
    assert_allclose(other.self_repair, whole.self_repair, rtol=0, atol=TIGHT)


def test_shards_and_workers_give_the_same(tmp_path):
    given = {"model": "tiny-neox", "prompts": rows_of(), "rows_are": "texts", "layers": [7], "batch_size": 2}
    given |= {"progress": False, "check": False}
    whole = sr.run(out=tmp_path / "whole.zarr", **given).load()
    for part in ("1/2", "2/2"):
        shards = sr.run(out=tmp_path / "shards.zarr", shard=part, **given)
    with ThreadPoolExecutor(1) as executor:
        shared = sr.run(out=tmp_path / "shared.zarr", executor=executor, **given).load()
    for other in (shards.load(), shared):
        assert bool(other.done.all())
        for each in ("logit", "direct_effect", *PARTS, "counted"):
            assert_array_equal(other[each], whole[each], err_msg=each)


def test_a_run_that_goes_on_is_the_same_and_ranks_nothing_again(ran, wrapped, tmp_path, monkeypatch):
    """Of the top share, whose direct effects are kept beforehand: blanks of filler are not what is missing."""
    from selfrepair_nn.running import filling

    written, ranked, write, effects = [], [], filling.Filling._write, filling.direct_effects

    def once(self, *given):
        if written:
            raise KeyboardInterrupt
        written.append(write(self, *given))

    def watched(experiment, plan, runner, blocks):
        ranked.append(blocks)
        return effects(experiment, plan, runner, blocks)

    choices = {"select": "top-share", "share": 0.5, "batch_size": 2}
    given = {"model": wrapped(MODEL, exact=True), "prompts": rows_of(), "rows_are": "texts", "progress": False}
    monkeypatch.setattr(filling, "direct_effects", watched)
    with monkeypatch.context() as patched:
        patched.setattr(filling.Filling, "_write", once)
        with pytest.raises(sr.SelfRepairError, match="interrupted"):
            sr.run(out=tmp_path / "x.zarr", **given, **choices)
    found = sr.run(out=tmp_path / "x.zarr", **given, **choices).load()
    assert [len(blocks) for blocks in ranked] == [3, 0]
    xr.testing.assert_identical(found.drop_attrs(), ran(**choices).drop_attrs())


def test_a_run_stops_by_what_is_known_of_the_texts_alone(ran):
    lengths = tuple(np.random.default_rng(0).integers(2, 13, 60).tolist())
    found = ran(lengths=lengths, until_ci=100.0, batch_size=5, layers=[2], share=0.3)
    used = int(found.prompts_used.max())
    assert 20 <= used < 60
    kept = found.self_repair.notnull() & found.done & found.counted
    assert_allclose(found.self_repair.where(kept).mean(("prompt", "position")), found.estimate, atol=TIGHT)
    assert (found.direct_effect >= found.threshold).where(found.counted, False).sum() >= kept.sum() > 0


def test_shuffled_targets_and_edited_positions_are_of_the_text(ran):
    found = ran("norm_share")
    for prompt, length in enumerate(LENGTHS):
        own = found.target[prompt, : length - 1].values
        assert_array_equal(np.sort(found.shuffled_target[prompt, : length - 1]), np.sort(own))
    found = ran("reinforcement_nulls")
    assert (found.edited_position < found.text_positions).all()
    assert_array_equal(found.counted.sum("position"), 1)


def test_partners_are_of_like_length_and_nest():
    lengths = np.random.default_rng(0).integers(2, 300, 400)
    lent = several_partners(400, 3, 2, lengths)
    assert_array_equal(lent[:1], several_partners(400, 3, 1, lengths))
    for row in lent:
        assert_array_equal(np.sort(row), np.arange(400))
        assert (row != np.arange(400)).all()
    kept, drawn = (np.minimum(lengths - 1, lengths[each]).sum() for each in (lent[0], several_partners(400, 3, 1)[0]))
    assert kept > 0.97 * (lengths - 1).sum() > drawn
    assert not np.array_equal(lent[0], several_partners(400, 4, 1, lengths)[0])
    assert_array_equal(several_partners(12, 5, 2, np.full(12, 7)), several_partners(12, 5, 2))
    groups = alike(lengths)
    assert sorted(np.concatenate(groups).tolist()) == list(range(400))
    assert min(map(len, groups)) >= 10
    assert all(lengths[a].max() < lengths[b].min() for a, b in pairwise(groups))


def test_lengths_are_part_of_what_prompts_are(wrapped):
    tokens, lengths = padded([np.array([1, 2, 3, 4]), np.array([5, 6])])
    one = sr.Prompts(tokens, np.arange(2), {"name": "mine"}, lengths=lengths)
    other = sr.Prompts(tokens, np.arange(2), {"name": "mine"}, lengths=[4, 3])
    assert one.sha256 != other.sha256
    filler = tokens.copy()
    filler[1, 2:] = -100
    assert sr.Prompts(filler, np.arange(2), {"name": "mine"}, lengths=lengths).sha256 == one.sha256
    assert_array_equal(one.counts, [[True, True, True], [True, False, False]])
    assert one.all_count
    assert_array_equal(one.tokens[1], [5, 6, 6, 6])
    for wrong in ([4], [4, 5], [1, 4], [[4, 2]]):
        with pytest.raises(UsageError, match="lengths"):
            sr.Prompts(tokens, np.arange(2), {}, lengths=wrong)
    with pytest.raises(UsageError, match="filler"):
        sr.Prompts(tokens, np.arange(2), {}, lengths=[2, 2], counted=np.array([[False, True, True]] * 2))


def test_a_model_that_reads_the_length_of_a_pass_is_refused(wrapped, tmp_path):
    given = {"rows_are": "texts", "out": tmp_path / "x.zarr", "progress": False}
    model = longrope(6)
    with pytest.raises(UsageError, match=r"depends on how long the pass is.*--length"):
        sr.run(model=model, prompts=rows_of(lengths=(5, 9)), **given)
    assert not (tmp_path / "x.zarr").exists()
    sr.run(model=longrope(16), prompts=rows_of(lengths=(5, 9)), **given)  # below the length at which it changes


def longrope(original):
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {"vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 40, "max_position_embeddings": 64}
    rope |= {"original_max_position_embeddings": original}
    return LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope)).eval()


# As a user has them: texts, a module, few of each

SHORT = ["The cat sat on the mat and looked at the dog.", "Once there was a king.", "Γειά σου 😀 in the house."]


@pytest.fixture(scope="module")
def module():
    from transformers import AutoModelForCausalLM

    from selfrepair_nn.models.load import find

    return AutoModelForCausalLM.from_pretrained(find("tiny-neox").location)


@pytest.fixture
def go(module, tmp_path):
    """go(**choices): what a notebook's first line does, and what is told of it."""
    return lambda **choices: sr.run(model=module, layers=[5, 6], out=tmp_path, progress=False, **choices).load()


def test_a_module_and_texts_are_all_that_is_needed(go, module):
    found = go(prompts=SHORT)
    tokenizer = sr.load("tiny-neox", check=False).tokenizer
    for prompt, text in enumerate(SHORT):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        begun = ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]
        assert [*found.token[prompt].values[found.token[prompt] >= 0]][: len(begun)] == begun[: found.sizes["position"]]
    assert_array_equal(found.document, [0, 1, 2])
    assert found.attrs["ablation"] == "resample"
    assert "texts_" in found.encoding["source"]
    assert "rows-are" not in found.encoding["source"]
    assert found.self_repair.where(found.counted).notnull().sum() == 16 * found.counted.sum()


def test_one_text_is_ablated_by_its_mean_and_that_is_told(go, capfd):
    found = go(prompts=SHORT[:1])
    assert found.attrs["ablation"] == "mean"
    assert "no other to lend it activations" in capfd.readouterr().err
    go(prompts=SHORT[:1], ablation="mean")
    assert "no other to lend" not in capfd.readouterr().err
    with pytest.raises(UsageError, match=r"two prompts and there is 1.*texts.*form feed.*mean or zero"):
        go(prompts=SHORT[:1], ablation="resample")
    with pytest.raises(UsageError, match="two prompts and there is 1"):
        go(recipe="ablation_kinds", prompts=SHORT[:1])


def test_what_cannot_be_a_row_of_its_own_is_told_or_refused(go, capfd, tmp_path):
    found = go(prompts=["", *SHORT[:2]])
    assert_array_equal(found.document, [1, 2])
    assert "1 text is shorter than 2 tokens" in capfd.readouterr().err
    with pytest.raises(UsageError, match="no text of 2 tokens"):
        go(prompts=[""])
    found = go(prompts=["a long text. " * 30, *SHORT], rows_are="texts", length=20)
    assert found.sizes["position"] == 19
    assert "2 texts are longer than 20 tokens, and cut there" in capfd.readouterr().err
    with pytest.raises(UsageError, match=r"too few for one row of 128.*--rows-are texts"):
        go(prompts=SHORT, rows_are="packed")
    with pytest.raises(UsageError, match=r"wrap\(module, tokenizer\)"):
        go(prompts=SHORT, tokenizer=None)


@pytest.mark.parametrize(
    "given",
    [iter, lambda t: (each for each in t), np.array, pd.Series, lambda t: Dataset.from_dict({"text": t})["text"]],
)
def test_texts_come_from_whatever_gives_them_one_by_one(given, monkeypatch):
    """Once: an audit, which looks at them before it runs, passes them on."""
    texts, seen = ["The dog ran.", "", "Once there was"], []
    assert Options(prompts=given(texts)) == Options(prompts=tuple(texts))
    assert Options(prompts=given(texts)).rows == "texts"
    monkeypatch.setattr(auditing, "run", lambda *_, **choices: seen.append(choices["prompts"]))
    monkeypatch.setattr(auditing, "told", lambda *_: None)
    sr.audit("tiny-neox", prompts=given(texts))
    assert seen == [tuple(texts)]


@pytest.mark.parametrize("given", [pd.DataFrame({"a": ["x"]}), {"x"}, {"text": ["x"]}, b"x", iter([])])
def test_what_only_holds_texts_somewhere_is_refused(given):
    with pytest.raises(UsageError, match="give a path, a dataset's name, a list of texts"):
        Options(prompts=given)


def test_one_text_beside_empty_ones_is_one_text():
    assert Options(prompts=["", "The dog ran."]).alone
    assert not Options(prompts=["The dog", "The dog ran."]).alone


def test_rows_of_ids_of_unequal_length_are_asked_about(go):
    rows = [[1, 2, 3, 4], [5, 6]]
    with pytest.raises(UsageError, match=r"rows of 4 and of 2 tokens.*rows_are='texts'"):
        go(prompts=rows)
    found = go(prompts=rows, rows_are="texts")
    assert_array_equal(found.token, [[1, 2, 3], [5, 6, -1]])
    assert_array_equal(found.text_positions, [2, 1])
    for wrong in ([[1, 2], []], [[1, 2, 3], ["a", "b"]], [[1, 2], [3]], [[1.5, 2], [3, 4, 5]]):
        with pytest.raises(UsageError, match=r"row 1 of prompts|row 0 of prompts"):
            go(prompts=wrong, rows_are="texts")
    with pytest.raises(UsageError, match="rows_are 'packed' is for text"):
        go(prompts=[[1, 2], [3, 4]], rows_are="packed")


def test_a_module_without_a_name_asks_for_its_tokenizer(tmp_path):
    model = families.build(MODEL)
    with pytest.raises(UsageError, match=r"model=sr.wrap\(module, tokenizer\)"):
        sr.run(model=model, prompts=SHORT, out=tmp_path, progress=False)


def test_documents_of_a_file_are_rows_too_and_a_plan_tells_what_fills_them_up(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n\f\n".join(SHORT))
    plan = sr.preview(model="tiny-neox", prompts=file, rows_are="texts")
    assert plan["prompts"].startswith("3 of ")
    assert "of the rows is filler" in plan["prompts"]
    assert plan["ablated_tokens"] < 64 * plan["tokens"] / 2
    assert plan["store"].endswith("heads-tiny-neox-texts-rows-are-texts.zarr")
    few = sr.preview(model="tiny-neox", prompts=file, rows_are="texts", tokens=20, ablation="zero")
    assert few["prompts"].startswith("1 of ")
    with pytest.raises(UsageError, match="makes prompts of its own and takes no --rows-are"):
        sr.preview("ioi", model="tiny-neox", rows_are="texts")


# What is said of them


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A run of three short texts with words."""
    out = tmp_path_factory.mktemp("few") / "few.zarr"
    return sr.run(model="tiny-neox", prompts=SHORT, layers=[6], words=2, out=out, progress=False).load()


def test_too_little_text_is_said_to_be_too_little_and_how_much_it_takes(few):
    said = " ".join(str(sr.summary(few)).split())
    for told in (said, sr.by_head(few).attrs["too_short"], Contents.of(few).data()["notes"][0]["text"]):
        assert "Too short to say anything" in told
        assert "3 prompts" in told
        assert "at least 20 prompts with 1,000 tokens" in told
    assert "at least 20 prompts." in sr.by_head(few, share=1.0).attrs["too_short"]
    assert "it takes at least 20 prompts with 1,000 tokens" in wording.intervals(sr.by_head(few))
    assert wording.intervals(sr.by_head(few), "self_repair").endswith("it takes at least 20 prompts")
    heads = sr.by_head(few)
    assert "L6H" not in report._facts(heads, sr.by_layer(heads))
    enough = simulate_heads(2, 2, 40, 60)
    assert "too_short" not in sr.by_head(enough).attrs
    assert "Too short" not in str(sr.summary(enough))


def test_a_page_shows_the_texts_and_no_filler(few):
    text = Contents.of(few).data()["text"]
    assert text["ends"] == [int((row >= 0).sum()) for row in few.target.values]
    assert Contents.of(simulate_heads(2, 2, 3, 6)).data()["text"]["ends"] is None


def test_words_are_looked_for_in_texts_that_are_as_long(few):
    """The null of a word at a position of the longest text: no other is so long, so there is none."""
    lengths = (few.token >= 0).sum("position").values
    read, longest = _Contexts(few, np.arange(3)), int(lengths.argmax())
    n_positions, last = few.sizes["position"], sorted(lengths)[-2]
    token = longest * n_positions + np.array([0, last - 1, last])
    words = few.token.values[longest, [0, last - 1, last]]
    own, null = read.shares(words, Top(np.zeros(3, int), token, np.zeros(3), np.ones(3)))
    assert own.tolist() == [1, 1, 1]
    assert np.isnan(null).tolist() == [False, False, True]
    assert -1 not in words
    told = sr.words_in_context(few)
    assert told.in_context_null.max() <= 1


def test_attribution_is_of_the_texts_alone(few):
    """No gradient comes from filler, nor from beyond a partner's end."""
    found = sr.attribution(few, "tiny-neox")
    assert np.isfinite(found.attributed_change).all()
    beyond = few.position >= few.text_positions
    assert (abs(found.attribution.where(beyond, 0)) == 0).all()
