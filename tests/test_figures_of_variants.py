"""Figures of variants, cases and reinforced heads draw the numbers that analysis finds, store by store."""

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from test_variant_analysis import (
    HEADS,
    KINDS,
    LAYERS,
    POSITIONS,
    PROMPTS,
    SHARE,
    SIZES,
    cases_of,
    reinforced,
    side_by_side,
)
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.errors import UsageError
from selfrepair_nn.simulate import simulate_heads

FROZEN = ("nothing", "all but the final norm", "everything")
NORMS = ("none", "L1.mlp_norm", "final_norm", "all")


def variants(axis, labels, model="gpt2", sizes=SIZES):
    """Made-up stores of one clean run along an axis."""
    kinds = dict(zip(labels, ("resample", "zero", "mean", "zero"), strict=False))
    stores = {
        label: simulate_heads(*sizes, seed=5, ablation=kind, model=model) for label, kind in kinds.items()
    }
    return side_by_side(stores, axis)


def layers_of(model="gpt2"):
    """A made-up store of layers deleted and swapped."""
    cases = cases_of(simulate_heads(*SIZES, seed=2, ablation="zero", model=model))
    labels = ["layer 0", "layer 1", "layer 2", "swap 0,1", "swap 1,2", "swap 2,3"]
    return cases.assign_coords(case=labels, case_layer=("case", [0, 1, 2, 0, 1, 2]))


def made(model="gpt2"):
    """A store for every figure: {figure: store}."""
    ablations = variants("ablation", KINDS, model)
    answers = reinforced([-0.3, 0.0, 0.2], noise=0.01).assign_attrs(model=model)
    return dict.fromkeys(("norm_scale", "residual_norm", "ablation_kinds"), ablations) | {
        "freeze": variants("frozen", FROZEN, model),
        "freeze_norms": variants("norm", NORMS, model),
        "path_patching": variants("receiver", NORMS, model),
        "self_reinforcement": answers,
        "reinforced_heads": answers,
        "layer_position": layers_of(model),
    }


STORES = made()
OF_A_KIND = representative(STORES, "ablation_kinds", "freeze", "self_reinforcement", "layer_position")


def words(figure):
    """All that is written in a figure, legends included."""
    figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


@pytest.mark.parametrize("name", OF_A_KIND)
def test_one_store_two_stores_and_a_name(name):
    alone = figures.draw(name, STORES[name], share=SHARE)
    assert "gpt2" in words(alone)
    both = figures.draw(name, [STORES[name], made("opt")[name]], share=SHARE)
    told = words(both)
    assert "gpt2" in told
    assert "opt" in told
    assert len(both.axes) == 2 * len(alone.axes)


@pytest.mark.parametrize("name", OF_A_KIND)
def test_what_is_not_finished_is_drawn_and_what_is_not_begun_is_said(name):
    store = STORES[name]
    some = store.assign(done=store.done & (np.arange(store.sizes["prompt"]) < PROMPTS - 2))
    blanked = {
        n: v.where(some.done)
        for n, v in some.data_vars.items()
        if {"prompt", "position"} < {*v.dims} and v.ndim > 3
    }
    assert (
        "of the run done" in words(figures.draw(name, some.assign(blanked), share=SHARE))
        or "scale" in store.dims
    )
    with pytest.raises(UsageError, match="nothing to draw"):
        figures.draw(name, store.assign(done=store.done & False), share=SHARE)


@pytest.mark.parametrize("name", STORES)
def test_a_store_is_suited_to_its_own_figures(name):
    suited = figures.suited(STORES[name])
    assert name in suited
    assert "self_repair_by_layer" not in suited
    assert not {*suited} & {*STORES} - {n for n in STORES if {*STORES[n].dims} == {*STORES[name].dims}}


def test_histograms_hold_every_token_and_tell_their_shares():
    found = sr.token_variants(STORES["norm_scale"], SHARE)
    figure = figures.draw("norm_scale", STORES["norm_scale"], share=SHARE)
    for rank, axes in enumerate(figure.axes):
        top = found.scale_ratio.isel(rank=rank).values[:, found.top.isel(rank=rank).values]
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        assert legend == [f"{k}: {s:.1%} above 1" for k, s in zip(KINDS, (top > 1).mean(1), strict=True)]
        for patch in axes.patches:
            outline = patch.get_xy()
            width = np.diff(np.unique(outline[:, 0])).min()
            heights = outline[outline[:, 0].argsort(), 1]
            assert heights.max() <= 1
            assert width > 0
    figure = figures.draw("residual_norm", STORES["residual_norm"], share=SHARE)
    ratio = np.median(found.residual_ratio.isel(rank=0).values.reshape(3, -1), axis=1)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    short = (found.residual_ratio.isel(rank=0).values.reshape(3, -1) < 1).mean(1)
    told = zip(KINDS, ratio, short, legend, strict=True)
    assert all(line.startswith(f"{kind}: median {m:.4f}, shorter on {s:.0%}") for kind, m, s, line in told)


def test_shares_and_medians_of_tokens_are_known_as_well_as_drawing_documents_anew_says():
    """And said with their intervals, a share of none or of all too."""
    ds = variants("ablation", KINDS, sizes=(3, 2, 60, 14))
    ds["logit_change"][2] = -abs(ds.logit_change[2])  # under the last no logit rises
    found, rng = sr.token_variants(ds, 0.3, 1).isel(rank=0), np.random.default_rng(0)
    _, document = np.unique(ds.document.values, return_inverse=True)
    prompts = [np.flatnonzero(document == i) for i in range(document.max() + 1)]
    draws = rng.integers(len(prompts), size=(300, len(prompts)))
    picks = [np.concatenate([prompts[i] for i in draw]) for draw in draws]
    for i in range(3):
        one, top = found.isel(ablation=i), found.top.values
        rises, above = (np.where(top, x, np.nan) for x in (one.logit_change > 0, one.scale_ratio > 1))
        values = {"top_over": rises, "top_above_one": above, "shortened": one.residual_ratio.values < 1}
        drawn = {name: [np.nanmean(each[pick]) for pick in picks] for name, each in values.items()}
        drawn["median_residual_ratio"] = [np.median(one.residual_ratio.values[pick]) for pick in picks]
        for name, each in drawn.items():
            width = float(one[f"{name}_half_width"])
            low, high = np.quantile(each, [0.025, 0.975])
            if (i, name) == (2, "top_over"):
                count = len({*document[top.any(1)]})
                assert width == pytest.approx(1 - 0.025 ** (1 / count))
            elif name.startswith("median") or 0 < low < high < 1:
                assert 0.7 < 2 * width / (high - low) < 1.7, (i, name)
    told = words(figures.draw("ablation_kinds", ds, share=0.3))
    for one in (found.isel(ablation=i) for i in range(3)):
        assert f"logit rises on {float(one.top_over):.0%} ± {float(one.top_over_half_width):.0%}" in told
    told = words(figures.draw("residual_norm", ds, share=0.3))
    one = found.isel(ablation=1)
    median, width = (float(one[f"median_residual_ratio{end}"]) for end in ("", "_half_width"))
    assert f": median {median:.4f} ± {width:.4f}" in told


def test_every_token_of_the_loudest_head_is_a_dot():
    found = sr.token_variants(STORES["ablation_kinds"], SHARE, 1).isel(rank=0)
    figure = figures.draw("ablation_kinds", STORES["ablation_kinds"], share=SHARE)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(KINDS)
    for axes, kind in zip(figure.axes, KINDS, strict=True):
        dots = [c.get_offsets() for c in axes.collections if isinstance(c, PathCollection)]
        top = found.top.values
        expected = np.column_stack(
            [found.direct_effect.values[top], found.logit_change.sel(ablation=kind).values[top]]
        )
        np.testing.assert_allclose(np.asarray(dots[1]), expected)
        assert len(dots[0]) == (~top).sum()


def test_freezing_shows_means_of_layers_and_the_norm_alone():
    found = sr.by_variant(STORES["freeze"], SHARE)
    layers, plane = figures.draw("freeze", STORES["freeze"], share=SHARE).axes[:2]
    lines = [line for line in layers.get_lines() if str(line.get_label()).startswith("frozen")]
    for line, label in zip(lines, FROZEN, strict=True):
        np.testing.assert_allclose(line.get_ydata(), found.top_self_repair.sel(frozen=label).mean("head"))
    [dots] = [c for c in plane.collections if isinstance(c, PathCollection)]
    parts = [found.top_from_norm.sel(frozen=label).values.ravel() for label in FROZEN[:2]]
    np.testing.assert_allclose(np.asarray(dots.get_offsets()), np.column_stack(parts))


@pytest.mark.parametrize("name", ["freeze_norms", "path_patching"])
def test_changes_stand_at_their_variants_with_their_errors(name):
    axis = {"freeze_norms": "norm", "path_patching": "receiver"}[name]
    store = variants(axis, NORMS, sizes=(LAYERS, HEADS, 40, POSITIONS))
    changes = sr.differences(store, SHARE)
    effects = sr.by_variant(store, SHARE).direct_effect.values
    best = np.unravel_index(np.argsort(-effects.ravel(), kind="stable")[0], effects.shape)
    [axes] = figures.draw(name, store, share=SHARE).axes
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels == ["L1\nmlp\nnorm", "final\nnorm", "all"]
    marks, _, (bars,) = axes.containers[0]
    one = changes.isel(layer=best[0], head=best[1])
    np.testing.assert_allclose(marks.get_ydata(), one.top_self_repair[1:])
    lengths = [np.ptp(segment[:, 1]) for segment in bars.get_segments()]
    np.testing.assert_allclose(lengths, 2 * one.top_self_repair_half_width[1:])
    [few] = figures.draw(name, STORES[name], share=SHARE).axes
    assert "Too few prompts for an interval" in words(few.figure)


def test_many_variants_have_upright_labels():
    names = ("none", *(f"L{i}.mlp_norm" for i in range(1, 14)))
    stores = {name: simulate_heads(*SIZES, seed=5, ablation=KINDS[i % 3]) for i, name in enumerate(names)}
    [axes] = figures.draw("freeze_norms", side_by_side(stores, "norm"), share=SHARE).axes
    assert axes.get_xticklabels()[0].get_text() == "L1.mlp norm"
    assert axes.get_xticklabels()[0].get_rotation() == 90


def test_reinforced_heads_are_marked_by_what_they_are():
    found = sr.reinforcement_by_head(STORES["reinforced_heads"])
    figure = figures.draw("reinforced_heads", STORES["reinforced_heads"])
    told = words(figure)
    assert "L0H0" in told
    assert "L0H2" in told
    assert "L0H1" not in told
    drawn = np.concatenate([each[0].get_ydata() for each in figure.axes[0].containers])
    np.testing.assert_allclose(np.sort(drawn), np.sort(found.slope.values[0].ravel()))
    rows = figures.draw("self_reinforcement", STORES["self_reinforcement"]).axes
    assert rows[0].get_ylabel().startswith("L0H0, self-repressing")
    assert rows[2].get_ylabel().startswith("L0H2, self-reinforcing")
    assert f"slope {float(found.slope[1, 0, 2]):+.2f}" in rows[3].texts[0].get_text()


def test_layers_and_swaps_have_a_panel_each():
    found = sr.by_case(layers_of(), SHARE)
    deleted, swapped = figures.draw("layer_position", layers_of(), share=SHARE).axes
    for axes, chosen, shift in ((deleted, slice(0, 3), 0), (swapped, slice(3, 6), 0.5)):
        own, change, repair = (each[0] for each in axes.containers)
        one = found.isel(case=chosen)
        np.testing.assert_allclose(own.get_xdata(), one.case_layer + shift)
        np.testing.assert_allclose(own.get_ydata(), one.ablated_direct_effect - one.direct_effect)
        np.testing.assert_allclose(change.get_ydata(), one.logit_change)
        np.testing.assert_allclose(repair.get_ydata(), one.self_repair)


def test_other_cases_are_not_layers():
    with pytest.raises(UsageError, match="it needs layers deleted and swapped"):
        figures.draw("layer_position", cases_of(simulate_heads(*SIZES, ablation="zero")))


def test_a_head_that_is_not_done_is_left_out():
    store = STORES["freeze_norms"]
    selected = store.selected.copy(data=[[True, False]] * 3)
    [axes] = figures.draw("freeze_norms", store.assign(selected=selected), share=SHARE).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] != []
    assert all(text.get_text().endswith("H0") for text in axes.get_legend().get_texts())


def test_doses_are_whole_numbers_of_a_line_and_parts_are_on_lines_of_their_own():
    doses = variants("dose", ("0.5", "L1.mlp norm", "alone"))
    labels = figures.draw("variants", doses, share=SHARE).axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["0.5", "L1\nmlp\nnorm", "alone"]
