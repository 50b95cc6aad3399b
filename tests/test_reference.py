"""A store beside the paper's published per-layer means: which reference, the same definitions, clear errors."""

import numpy as np
import pytest
from terminal import ids, saved, selfrepair

import selfrepair_nn as sr
from selfrepair_nn.analysis import QUANTITIES, by_head, compare_paper, references
from selfrepair_nn.errors import UsageError
from selfrepair_nn.figures import paper_comparison
from selfrepair_nn.simulate import simulate_heads, unfinished
from selfrepair_nn.text import QUANTITY_NAMES, comparison, number

ROUNDING = 2e-4  # of four numbers with four decimals


@pytest.fixture(scope="module")
def ds():
    return simulate_heads(12, 3, 8, 13, seed=3, model="EleutherAI/pythia-160m")


@pytest.mark.parametrize("name", references())
def test_the_published_numbers_obey_the_equations(name):
    one = references()[name]
    found = {quantity: np.array(one[quantity]) for quantity in QUANTITIES}
    assert all(values.shape == (one["layers"],) for values in found.values())
    own = found["ablated_direct_effect"] - found["direct_effect"]
    np.testing.assert_allclose(found["self_repair"], found["logit_change"] - own, atol=ROUNDING)
    parts = found["from_heads"] + found["from_mlps"] + found["from_norm"]
    np.testing.assert_allclose(found["self_repair"], parts, atol=ROUNDING)
    assert ((found["norm_share"] > 0) & (found["norm_share"] < 1)).all()
    assert found["from_heads"][-1] == 0  # no head comes after the last layer's


def test_the_store_is_measured_as_the_paper_did(ds):
    """Each quantity again: top 2% of each head's tokens by a sort, means over tokens, then over heads."""
    found = compare_paper(ds)
    flat = {n: ds[n].values.reshape(12, 3, -1).astype(float) for n in QUANTITIES if n != "norm_share"}
    flat["norm_share"] = np.clip(flat["from_norm"] / flat["direct_effect"], 0, 1)
    best = np.argsort(-flat["direct_effect"], axis=-1)[..., : int(0.02 * 8 * 13)]
    for name, values in flat.items():
        expected = np.take_along_axis(values, best, -1).mean((1, 2))
        np.testing.assert_allclose(found[name].sel(source="store"), expected, rtol=1e-6, err_msg=name)
        assert found[name].sel(source="paper").values.tolist() == references()["pythia-160m"][name]
    np.testing.assert_array_equal(found.reference_layer, range(12))
    assert found.attrs["reference"] == "pythia-160m"
    assert "differs" not in found.attrs


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt2", "gpt2-small"),
        ("openai-community/gpt2", "gpt2-small"),
        ("/models/GPT2-medium/", "gpt2-medium"),
    ],
)
def test_the_reference_has_the_models_name(ds, model, name):
    assert compare_paper(ds.assign_attrs(model=model)).attrs["reference"] == name


def test_what_there_is_no_reference_of(ds):
    other = ds.assign_attrs(model="EleutherAI/pythia-160m-deduped")
    with pytest.raises(UsageError, match=r"gpt2-small, .* none of them 'EleutherAI/pythia-160m-deduped'"):
        compare_paper(other)
    with pytest.raises(
        UsageError, match="no reference 'gpt2'; the paper's per-layer means are of gpt2-small"
    ):
        compare_paper(other, "gpt2")
    assert compare_paper(other, "pythia-160m").attrs["reference"] == "pythia-160m"


def test_models_of_other_depths_are_compared_at_the_same_depth():
    found = compare_paper(simulate_heads(8, 2, 4, 5), "gpt2-small")
    assert found.reference_layer.values.tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
    published = references()["gpt2-small"]["self_repair"]
    assert found.self_repair.sel(source="paper").values.tolist() == [
        published[i] for i in found.reference_layer.values
    ]
    part = compare_paper(simulate_heads(8, 2, 4, 5).isel(layer=slice(5, 8)), "gpt2-small")
    assert part.reference_layer.values.tolist() == [8, 9, 11]


def test_other_measurements_are_said_to_be():
    found = compare_paper(simulate_heads(12, 2, 4, 5, ablation="zero"), "gpt2-small")
    assert found.attrs["differs"] == "Not measured as in the paper: ablation is zero here, resample there."


def test_the_table_holds_the_numbers(ds):
    found, text = compare_paper(ds), comparison(by_head(ds))
    rows = [line.split() for line in text.splitlines() if line[:5].strip().isdigit()]
    assert [int(row[0]) for row in rows] == [*range(12)] * 2
    cells = np.concatenate([[row[1:] for row in rows[:12]], [row[1:] for row in rows[12:]]], axis=1)
    for column, name in enumerate(QUANTITY_NAMES):
        for shift, source in enumerate(("store", "paper")):
            expected = [number(v) for v in found[name].sel(source=source).values]
            assert cells[:, 2 * column + shift].tolist() == expected
    apart = " ".join(line for line in text.splitlines() if line.startswith("apart")).split()
    gap = abs(found.norm_share[0] - found.norm_share[1]).mean().item()
    assert apart[-1] == f"{gap:.3f}"
    assert max(map(len, text.splitlines())) <= 100


def test_the_table_says_what_is_compared():
    text = comparison(simulate_heads(8, 2, 4, 5, ablation="zero"), "gpt2-small")
    assert "8 layers here, 12 there: each stands beside the layer of gpt2-small at the same depth." in text
    assert "ablation is zero here" in text
    assert any(line.startswith("    1 / 2 ") for line in text.splitlines())
    assert "nothing is done yet" in comparison(unfinished(simulate_heads(), done=False), "gpt2-small")


def test_the_figure_draws_both(ds):
    figure = paper_comparison.draw(ds)
    found = compare_paper(ds)
    for axes, name in zip(figure.axes, QUANTITIES, strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        own = lines["EleutherAI/pythia-160m, resample ablation"]
        np.testing.assert_allclose(own.get_ydata(), found[name].sel(source="store"))
        published = lines["pythia-160m, as published"]
        assert list(published.get_ydata()) == references()["pythia-160m"][name]
        np.testing.assert_array_equal(published.get_xdata(), own.get_xdata())
    shorter = paper_comparison.draw(simulate_heads(3, 2, 4, 5, ablation="mean"), reference="gpt2-medium")
    ends = [
        (line.get_xdata()[0], line.get_xdata()[-1])
        for line in shorter.axes[0].lines
        if line.get_marker() != "None"
    ]
    assert ends == [(0, 100), (0, 100)]
    assert "ablation is mean here" in shorter.get_supxlabel()


def test_on_the_command_line(tmp_path):
    model, store = saved(tmp_path / "gpt2"), tmp_path / "s.zarr"
    ran = selfrepair("run", "heads", "--model", model, "--prompts", ids(tmp_path / "p.npy"), "--out", store)
    assert ran.code == 0
    shown = selfrepair("compare-paper", store)
    assert shown.code == 0
    text, files = shown.out.split("\n\n" + str(tmp_path))
    assert text == comparison(sr.open_store(store))
    assert "3 layers here, 12 there" in text
    assert (tmp_path / "s" / "paper_comparison.png").is_file()
    assert files.endswith("paper_comparison.svg\n")
    wrong = selfrepair("compare-paper", store, "--reference", "gpt3")
    assert (wrong.code, wrong.out) == (2, "")
    assert "gpt2-small, pythia-160m, gpt2-medium, pythia-410m" in wrong.err
