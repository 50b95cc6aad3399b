"""Whether an ablation's result is masked by self-repair: verdicts of planted stores and by hand, in any spelling."""

import json

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import t as student
from terminal import selfrepair

import selfrepair_nn as sr
from selfrepair_nn.analysis.masking import AMPLIFIED, MASKED, PLAIN, UNKNOWN
from selfrepair_nn.confidence import q_values
from selfrepair_nn.errors import UsageError
from selfrepair_nn.head_names import plain
from selfrepair_nn.simulate import simulate_heads

PROMPTS, POSITIONS = 80, 12
PLANTED = {(0, 0): MASKED, (0, 1): PLAIN, (0, 2): AMPLIFIED, (1, 0): UNKNOWN, (1, 1): UNKNOWN, (1, 2): MASKED}
SMALL = {"tokens": 512, "length": 16, "heads": "6.1,7.5", "progress": False}


def planted(sizes=(PROMPTS, POSITIONS), seed=0):
    """A store in which it is known what happens to what each head wrote.

    Half of it is repaired, by MLPs; next to none; half of it again is lost; the repair is wide, about 0; nothing is
    taken; and a head that writes against the target is repaired as much.
    """
    ds, rng = simulate_heads(2, 3, *sizes, seed=seed), np.random.default_rng(seed)
    wrote = 2 + 0.2 * rng.standard_normal((2, 3, *sizes))
    wrote[1, 2] *= -1
    after = np.zeros_like(wrote)
    after[1, 1] = wrote[1, 1] + 0.5 * rng.standard_normal(sizes)
    share = np.array([[0.5, 0.01, -0.5], [0.0, 0.5, 0.5]])[..., None, None]
    wide = np.zeros_like(wrote)
    wide[1, 0] = 3 * rng.standard_normal(sizes)
    repair = share * (wrote - after) + wide + 0.01 * rng.standard_normal(wrote.shape)
    norm = np.zeros_like(wrote)
    values = {"direct_effect": wrote, "ablated_direct_effect": after, "self_repair": repair, "from_mlps": repair}
    values |= {"from_heads": norm, "from_norm": norm, "logit_change": after - wrote + repair, "closure": norm}
    ds = ds.assign({name: (ds[name].dims, each.astype("float32"), ds[name].attrs) for name, each in values.items()})
    return ds.assign_coords(document=("prompt", np.arange(sizes[0])))


def test_planted_heads_are_told():
    for seed in range(3):
        found = sr.audit(planted(seed=seed), share=1)
        told = dict(zip(PLANTED, found.verdict, strict=True))
        assert told == PLANTED, seed
    assert list(found.index) == ["L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]
    first = found.loc["L0H0"]
    assert "50% ± " in first.says
    assert "most by MLPs" in first.says
    assert "within 10%" in found.says["L0H1"]
    assert "more than was taken" in found.says["L0H2"]
    assert "cannot be told from 0" in found.says["L1H1"]
    assert "2 masked by self-repair (L0H0, L1H2), 1 amplified (L0H2), 1 not masked (L0H1)" in found.attrs["answer"]
    assert "960 tokens each, from 80 documents" in found.attrs["answer"]


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("0.0", "What ablating L0H0 shows is masked by self-repair; on"),
        ("0.1", "What ablating L0H1 shows is not masked by self-repair; on"),
        ("0.2", "What ablating L0H2 shows is amplified: more is lost than was taken; on"),
        ("1.1", "Whether what ablating L1H1 shows is masked by self-repair cannot be told; on"),
    ],
)
def test_of_one_head_the_question_is_answered(head, said):
    answer = sr.audit(planted(), heads=head, share=1).attrs["answer"]
    assert answer.startswith(said)
    assert answer.endswith("960 tokens, from 80 documents.")


def test_one_token_is_one_token():
    found = sr.audit(planted((2, 1)), share=0.01, heads="0.0")
    assert found.attrs["answer"].endswith("1 token, from 2 prompts.")


def test_numbers_are_those_of_by_head():
    ds = simulate_heads(3, 4, 60, 20, seed=2)
    found, heads = sr.audit(ds, share=0.2), sr.by_head(ds, 0.2)
    for name in ("removed", "logit_change", "self_repair", "from_heads", "from_mlps", "from_norm", "share_repaired"):
        mean, width = heads[f"top_{name}"].values.ravel(), heads[f"top_{name}_half_width"].values.ravel()
        known = np.isfinite(mean) & np.isfinite(width)
        assert known.sum() > 5
        np.testing.assert_array_equal(found[name].to_numpy(float)[known], mean[known])
        np.testing.assert_allclose(found[f"{name}_low"].to_numpy(float)[known], (mean - width)[known])
    split = found.from_heads + found.from_mlps + found.from_norm
    np.testing.assert_allclose(split.to_numpy(float), found.self_repair.to_numpy(float), atol=1e-5)
    np.testing.assert_allclose(
        (found.logit_change + found.removed).to_numpy(float), found.self_repair.to_numpy(float), atol=1e-5
    )


def test_verdicts_by_hand():
    """One token a prompt, so that a mean's error is that of independent numbers; each test by the book."""
    ds, m = planted((60, 1)), 0.1
    repair = ds.self_repair.values[..., 0].astype(float).reshape(6, -1)
    removed = (ds.direct_effect - ds.ablated_direct_effect).values[..., 0].astype(float).reshape(6, -1)

    def p_value(x):
        """Student's, with what skewness adds (Johnson 1978) solved for the quantile by trying."""
        error, n = x.std(1, ddof=1) / np.sqrt(x.shape[1]), x.shape[1]
        moved = (x - x.mean(1, keepdims=True)) / (n - 1) * np.sqrt((n - 1) / n)
        skew = abs((moved**3).sum(1)) / (moved**2).sum(1) ** 1.5
        tried = np.linspace(0, 400, 400_001)
        each = zip(abs(x.mean(1)) / error, skew, strict=True)
        reached = [np.searchsorted(tried + g * (1 + 2 * tried**2) / 6, away) for away, g in each]
        return 2 * student.sf(tried[np.minimum(reached, tried.size - 1)], n - 1)

    side = np.sign(removed.mean(1))[:, None] * removed
    both = [np.where((m * side + s * repair).mean(1) > 0, p_value(m * side + s * repair), 1) for s in (-1, 1)]
    heads = sr.masking(ds, 1.0)
    either = q_values(np.maximum(p_value(repair), p_value(removed)))
    np.testing.assert_allclose(heads.masking_q_value.values.ravel(), either, rtol=0.02, atol=1e-9)
    np.testing.assert_allclose(heads.small_q_value.values.ravel(), q_values(np.maximum(*both)), rtol=0.02, atol=1e-9)


def test_heads_that_are_not_repaired_are_seldom_called_so():
    """Of pure noise about no repair: no more than a false discovery rate of 5% lets through."""
    told = 0
    for seed in range(8):
        ds, rng = simulate_heads(1, 5, 40, 3, seed=seed), np.random.default_rng(seed)
        wrote = 1 + 0.1 * rng.standard_normal((1, 5, 40, 3))
        repair = 2 * rng.standard_normal(wrote.shape)
        values = {"direct_effect": wrote, "ablated_direct_effect": 0 * wrote, "self_repair": repair}
        values |= {"logit_change": repair - wrote}
        ds = ds.assign({name: (ds[name].dims, each, ds[name].attrs) for name, each in values.items()})
        told += bool({*sr.masking(ds, 1.0).verdict.values.ravel()} & {MASKED, AMPLIFIED, PLAIN})
    assert told <= 2


def test_nothing_is_claimed_of_too_little():
    found = sr.audit(planted((12, 6)), share=1)
    assert {*found.verdict} == {UNKNOWN}
    assert found.self_repair_low.isna().all()
    assert all("too few prompts" in each or "too few documents" in each for each in found.says)
    assert "masked by" not in found.attrs["answer"]


def test_nothing_is_claimed_where_the_parts_do_not_add_up():
    ds = planted()
    found = sr.audit(ds.assign(closure=ds.closure + 1).assign_attrs(dtype="float32"), share=1)
    assert {*found.verdict} == {UNKNOWN}
    assert found.attrs["answer"].startswith("Nothing can be told")
    assert "do not use these numbers" in str(found)


@pytest.mark.parametrize(
    "name",
    [
        "9.6",
        "a9.h6",
        "l9h6",
        "L9.H6",
        "head 9.6",
        "layer 9 head 6",
        "blocks.9.attn.hook_z[6]",
        "blocks.9.attn.hook_result[:, :, 6]",
        "blocks.9.attn.hook_z[None, None, 6, :]",
        "model.layers.9.self_attn.o_proj[6]",
        "transformer.h.9.attn.c_proj[6]",
        "gpt_neox.layers.9.attention.dense[6]",
        "(9, 6)",
        "[9,6]",
    ],
)
def test_heads_are_known_by_what_tools_call_them(name):
    assert sr.select_heads(None, name, 12, 12) == (sr.Head(9, 6),)
    assert sr.select_heads(None, [name, "10.7"], 12, 12) == (sr.Head(9, 6), sr.Head(10, 7))
    assert sr.select_heads(None, f"10.7,{name},a11.h0", 12, 12) == (sr.Head(9, 6), sr.Head(10, 7), sr.Head(11, 0))


def test_heads_of_each_layer_are_a_mapping():
    assert sr.select_heads(None, {9: [6, 9], 10: 0}, 12, 12) == (sr.Head(9, 6), sr.Head(9, 9), sr.Head(10, 0))
    assert sr.select_heads(None, {"9": ["6", 9], "10": "*"}, 12, 2 + 8) == (
        sr.Head(9, 6),
        sr.Head(9, 9),
        *(sr.Head(10, head) for head in range(10)),
    )


def test_heads_as_a_file_of_json_holds_them():
    wanted = (sr.Head(9, 6), sr.Head(10, 0))
    records = '[{"layer": 9, "head": 6, "score": 0.5}, {"layer": "10", "head": 0}]'
    listed = '[["9", "6"], [10, 0]]', '["(9, 6)", "[10, 0]"]', '["L9H6", "10.0"]', " [[9, 6], \n[10, 0]]"
    for held in (*listed, '{"9": [6], "10": [0]}', records):
        assert sr.select_heads(None, json.loads(held), 12, 12) == wanted
        assert sr.select_heads(None, held, 12, 12) == wanted
    assert sr.select_heads(None, {"layer": 9, "head": 6}, 12, 12) == wanted[:1]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_heads_as_a_mask_marks_them(kind):
    mask = np.zeros((12, 12), bool)
    mask[9, 6] = mask[10, 0] = True
    assert sr.select_heads(None, kind(mask), 12, 12) == (sr.Head(9, 6), sr.Head(10, 0))


@pytest.mark.parametrize("none", [[], (), set(), {}, "[]", "{}", np.zeros((12, 12), bool), np.zeros((0, 2), int)])
def test_no_heads_at_all_are_empty(none):
    with pytest.raises(UsageError, match="heads is empty"):
        sr.select_heads(None, none, 12, 12)


@pytest.mark.parametrize("heads", ["-1.3", (-1, 3), [(0, -1)], {-1: 0}])
def test_heads_are_not_counted_from_the_end(heads):
    with pytest.raises(UsageError, match="of layers 0 to 11 and heads 0 to 7"):
        sr.select_heads(None, heads, 12, 8)


@pytest.mark.parametrize(
    "name", ["m9", "blocks.9.attn.hook_q[6]", "a9.h6<q>", "model.layers.9.self_attn.q_proj[6]", "logits"]
)
def test_what_is_no_heads_write_is_refused(name):
    assert plain(name) == name
    with pytest.raises(UsageError, match="is not understood"):
        sr.select_heads(None, name, 12, 12)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("audit") / "s.zarr"
    return out, sr.audit("tiny-neox", out=out, **SMALL)


def test_a_model_is_audited_and_its_store_kept(ran):
    out, found = ran
    assert found.attrs["store"] == str(out)
    assert list(found.index) == ["L6H1", "L7H5"]
    ds = xr.open_zarr(out)
    assert ds.attrs["recipe"] == "heads"
    assert str(sr.audit(out)) == str(found)
    assert list(sr.audit(out, heads="L7H5").index) == ["L7H5"]
    last = found.loc["L7H5"]
    assert last.self_repair == pytest.approx(last.from_norm, abs=1e-5)
    assert json.loads(json.dumps(found.records()))[1]["head"] == "L7H5"


def test_a_share_is_what_the_audit_is_of(ran, capsys):
    """Nothing that is run depends on it, and what is told does; so nobody is told that it is idle."""
    out, found = ran
    again = sr.audit("tiny-neox", out=out, share=0.5, **SMALL)
    assert (again.tokens == 240).all()
    assert (found.tokens < 240).all()
    assert "nothing in this run depends" not in capsys.readouterr().err


def test_the_command_tells_a_script_the_same(ran):
    out, found = ran
    heads = ("--heads", "a6.h1,a7.h5")
    ended = selfrepair("audit", "tiny-neox", "--tokens", 512, "--length", 16, *heads, "--out", out, "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["heads"] == json.loads(json.dumps(found.records()))
    assert json.loads(ended.out)["answer"] == found.attrs["answer"]
    printed = selfrepair("audit", out)
    assert (printed.code, printed.out.strip().endswith(f"store   {out}")) == (0, True)
    assert str(found) in printed.out


def test_of_heads_that_a_store_does_not_hold_it_is_said(ran, caplog):
    out, found = ran
    few = sr.audit(out, heads=(each for each in ("6.1", "6.2", (7, 0))))
    assert list(few.index) == ["L6H1"]
    assert few.loc["L6H1", "self_repair"] == found.loc["L6H1", "self_repair"]
    assert "the store holds nothing of L6H2, L7H0" in caplog.text
    caplog.clear()
    sr.audit(out, heads="6.1")
    assert not caplog.text


def test_a_task_is_audited_on_its_difference(tmp_path):
    tokenizer = sr.load("tiny-neox", check=False).tokenizer
    prompts = sr.ioi_prompts(tokenizer, 24)
    out = tmp_path / "t.zarr"
    found = sr.audit("tiny-neox", prompts=prompts, out=out, heads=SMALL["heads"], progress=False)
    ds = xr.open_zarr(tmp_path / "t.zarr")
    assert ds.attrs["target"] == "difference"
    assert "difference target" in str(found)
    assert "tokens that count" in found.attrs["answer"]
    assert (found.tokens == 24).all()
    change = ds.logit_change.where(ds.counted).mean(("prompt", "position")).stack(site=("layer", "head"))
    np.testing.assert_allclose(found.logit_change.to_numpy(float), change.values[ds.selected.values.ravel()], atol=1e-5)


def test_what_cannot_be_audited_is_refused_in_words(ran, tmp_path):
    out, _ = ran
    for wrong, words in (
        ({"audited": out, "tokens": 5}, "tokens is a choice of a run"),
        ({"audited": "tiny-neox", "model": "tiny-neox"}, "given twice"),
        ({"audited": "tiny-neox", "revisions": "a,b"}, "one model"),
        ({"audited": out, "small": 2}, "small 2.0 is a part"),
        ({"audited": out, "share": 10**400}, "share must be a number"),
        ({"audited": "tiny-neox", "headz": "1.1"}, "heads"),
        ({"audited": out, "heads": "1.1"}, "holds no head"),
    ):
        audited = wrong.pop("audited")
        with pytest.raises(UsageError, match=words):
            sr.audit(audited, **wrong)
