"""A summary as a frame: the analysis's numbers, printed as text and shown as a table without others' markup."""

import json

import numpy as np
import pandas as pd
import pytest
from made import any_store
from test_variant_analysis import HEADS, LAYERS, SHARE, cases_of, reinforced

import selfrepair_nn as sr


@pytest.fixture(scope="module")
def heads():
    return sr.simulate_heads(n_layers=LAYERS, n_heads=HEADS, n_prompts=30, seed=5)


def test_rows_of_layers_are_the_analysis(heads):
    frame, layers = sr.summary(heads, SHARE), sr.by_layer(heads, SHARE)
    assert isinstance(frame, pd.DataFrame)
    assert frame.index.tolist() == list(range(LAYERS))
    np.testing.assert_array_equal(frame.self_repair, layers.top_self_repair)
    np.testing.assert_array_equal(frame.from_norm, layers.top_from_norm)
    width = layers.top_self_repair_half_width.values
    np.testing.assert_allclose(frame.self_repair_high - frame.self_repair_low, 2 * width)
    assert (frame.repaired + frame.broken <= frame.tested).all()
    total = frame.from_heads + frame.from_mlps + frame.from_norm
    np.testing.assert_allclose(frame.self_repair, total, atol=1e-5)


def test_it_prints_as_text_and_what_is_cut_from_it_as_a_frame(heads):
    frame = sr.summary(heads)
    assert repr(frame) == str(frame) == frame.attrs["text"]
    assert str(frame).startswith("simulated, resample ablation")
    assert any("95% intervals" in line for line in frame.attrs["below"])
    part = frame[frame.index > 0]
    assert type(part) is pd.DataFrame
    assert "self_repair" in str(part[["self_repair"]])
    assert frame.self_repair.idxmax() == part.self_repair.idxmax()


def test_a_notebook_shows_words_and_numbers(heads):
    shown = sr.summary(heads)._repr_html_()
    assert shown.count("<tr") == LAYERS + 2
    assert f"{sr.summary(heads).self_repair[1]:+.3f}" in shown
    assert "noise floor" in shown


def test_markup_of_others_is_data(heads):
    labels = [f"<script>alert({i})</script>" for i in range(12)]
    cases = cases_of(heads).assign_coords(case=labels[:6]).assign_attrs(model="<b>x</b>")
    shown = sr.summary(cases, SHARE)._repr_html_()
    assert "<script>" not in shown
    assert "<b>x</b>" not in shown
    assert "&lt;script&gt;alert(3)" in shown


def test_rows_of_cases_and_variants(heads):
    cases = sr.summary(cases_of(heads), SHARE)
    found = sr.by_case(cases_of(heads), SHARE)
    assert cases.index.name == "case"
    np.testing.assert_array_equal(cases.self_repair, found.top_self_repair)
    assert cases.repaired.tolist() == found.top_repaired.values.tolist()
    both = sr.summary(any_store(axis="dose"))
    assert both.index.name == "dose"
    assert {"tested", "repaired", "self_repair_low"} <= {*both.columns}


def test_rows_of_heads_that_answer_to_their_own_write():
    frame = sr.summary(reinforced([-0.6, 0.0, 0.8], prompts=400))
    assert frame.index.name == "head"
    assert set(frame.kind) == {"self-repressing", "self-reinforcing"}
    worst = frame[frame.kind == "self-repressing"].iloc[0]
    assert worst.slope_1_low < worst.slope_1 < worst.slope_1_high < 0


def test_nothing_done_is_a_frame_without_rows():
    blank = sr.summary(any_store(axis="dose", done=False))
    assert len(blank) == 0
    assert blank.records() == []
    assert "nothing is done yet" in blank._repr_html_()


@pytest.mark.parametrize("make", [lambda h: h, cases_of, lambda h: any_store(axis="dose")])
def test_records_are_plain(heads, make):
    frame = sr.summary(make(heads))
    rows = json.loads(json.dumps(frame.records(), allow_nan=False))
    assert [row[frame.index.name] for row in rows] == frame.index.tolist()
    assert all(type(row["self_repair"]) is float for row in rows)
