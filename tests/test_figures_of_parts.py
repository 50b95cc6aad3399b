"""Figures of single tokens, of the norm, of the distance from y = -x and of who repairs whom show the numbers."""

from collections import Counter

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch

from selfrepair_nn import figures
from selfrepair_nn.analysis import (
    by_head,
    by_layer,
    norm_by_head,
    strongest_repairs,
    token_noise,
    who_repairs,
)
from selfrepair_nn.choosing import viewed
from selfrepair_nn.components import Head
from selfrepair_nn.errors import UsageError
from selfrepair_nn.simulate import simulate_heads, unfinished


@pytest.fixture(scope="module")
def ds():
    return simulate_heads(6, 4, 8, 13, seed=1, model="gpt2", components=True)


@pytest.fixture(scope="module")
def part(ds):
    heads = [Head(i, j) for i in (1, 2, 4) for j in (0, 3)]
    return unfinished(ds.drop_vars(("component_change", "component_direct_effect")), heads, np.arange(8) < 5)


def dots(axes):
    scatters = [c.get_offsets() for c in axes.collections if isinstance(c, PathCollection)]
    points = np.concatenate(scatters)
    return points[np.lexsort(points.T)]


def means(axes):
    """The lines through layers, without those that span the panel."""
    return [line for line in axes.lines if line.get_marker() not in ("None", "")]


@pytest.mark.parametrize(("against", "name"), [("removed", "removed"), ("direct-effect", "direct_effect")])
@pytest.mark.parametrize("store", ["ds", "part"])
def test_every_done_token_is_a_dot(store, against, name, request):
    ds = request.getfixturevalue(store)
    figure = figures.draw("token_noise", viewed(ds, None, None, against), share=0.1)
    tokens = token_noise(ds, 0.1, against=against)
    assert len(figure.axes) == tokens.sizes["rank"]
    for rank, axes in enumerate(figure.axes):
        one = tokens.isel(rank=rank)
        known = one.direct_effect.notnull().values
        expected = np.column_stack([one[name].values[known], one.logit_change.values[known]])
        np.testing.assert_allclose(dots(axes), expected[np.lexsort(expected.T)])
        assert axes.get_title("left") == f"L{int(one['layer'])}H{int(one['head'])}"
        said = axes.texts[0].get_text().replace("\N{MINUS SIGN}", "-")
        assert f"all {known.sum()} tokens: correlation {float(one.correlation):.2f}; " in said
        assert f"top 10%: correlation {float(one.top_correlation):.2f}; broken" in said
        assert f"under {float(one.under):.0%}, over {float(one.over):.0%}" in said
        dotted = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
        rings = [len(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]
        assert dotted == ([] if against == "removed" else [one.direct_effect.where(one.top).min()])
        assert rings == ([int(one.top.sum())] if against == "removed" else [])
        (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert ((expected > [low, bottom]) & (expected < [high, top])).all()


def test_where_tokens_are_dense_dots_are_bright():
    """The colour is the number of tokens in the dot's cell of a grid of 80 by 80, counted here one by one."""
    axes = figures.draw("token_noise", simulate_heads(3, 2, 60, 63)).axes[0]
    scatter = next(c for c in axes.collections if isinstance(c, PathCollection))
    limits = np.array([axes.get_xlim(), axes.get_ylim()])
    points = np.asarray(scatter.get_offsets())
    cells = [tuple(cell) for cell in ((points - limits[:, 0]) / np.ptp(limits, axis=1) * 80).astype(int)]
    counts = Counter(cells)
    assert scatter.get_array().tolist() == [counts[cell] for cell in cells]
    assert scatter.get_array()[-1] == max(counts.values()) > 20  # the brightest on top


def test_noise_has_a_row_for_each_store(ds, part):
    figure = figures.draw("token_noise", {"one": ds, "two": part})
    titles = [axes.get_title("left").split(", ")[0] for axes in figure.axes]
    assert titles == ["one"] * 4 + ["two"] * 2  # of part, two heads are in the last third


@pytest.mark.parametrize("store", ["ds", "part"])
def test_the_norms_panels_show_heads_and_layers(store, request):
    ds = request.getfixturevalue(store)
    whole, parts, clipped, ratio = figures.draw("norm_share", ds, share=0.1).axes
    heads, layers = norm_by_head(ds, 0.1), by_layer(norm_by_head(ds, 0.1), 0.1)
    known = (heads.tokens > 0).values
    layer = np.broadcast_to(heads["layer"].values[:, None], known.shape)[known]
    for axes, name in ((whole, "top_from_norm"), (clipped, "norm_share"), (ratio, "norm_ratio")):
        expected = np.column_stack([layer, heads[name].values[known]])
        np.testing.assert_allclose(dots(axes), expected[np.lexsort(expected.T)])
        [line] = means(axes)
        np.testing.assert_allclose(line.get_ydata(), layers[name])
    for line, name in zip(means(parts), ("top_norm_on_existing", "top_norm_on_change"), strict=True):
        np.testing.assert_allclose(line.get_ydata(), layers[name])
    beside = {line.get_label(): line.get_ydata() for line in clipped.lines}
    for label, name in (("its mirror: clipped breakage", "norm_mirror"), ("excess over the mirror", "norm_excess")):
        np.testing.assert_allclose(beside[label], layers[name])
    assert clipped.get_ylim()[1] == 1
    assert (clipped.get_ylim()[0] == 0) == (not (layers.norm_excess < 0).any())
    assert clipped.yaxis.get_major_formatter()(0.4, 0) == "40%"
    assert ratio.yaxis.get_major_formatter()(-1000, 0) == "\N{MINUS SIGN}100,000%"


def test_several_norms_are_drawn_by_depth(ds):
    figure = figures.draw("norm_share", [ds, simulate_heads(3, 2, 4, 5, model="pythia")])
    assert all(axes.get_xlabel() == "depth (% of layers)" for axes in figure.axes)
    assert [line.get_xdata()[-1] for line in means(figure.axes[2])] == [100, 100]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["gpt2", "pythia"]


def test_distance_is_shown_over_all_and_over_top_tokens(ds):
    heads, layers = by_head(ds), by_layer(ds)
    layer = np.broadcast_to(heads["layer"].values[:, None], heads.tokens.shape).ravel()
    drawn = figures.draw("distance_by_layer", viewed(ds, None, None, "direct-effect"))
    for axes, prefix in zip(drawn.axes, ("", "top_"), strict=True):
        distance = (heads[f"{prefix}logit_change"] + heads[f"{prefix}direct_effect"]) / np.sqrt(2)
        expected = np.column_stack([layer, distance.values.ravel()])
        np.testing.assert_allclose(dots(axes), expected[np.lexsort(expected.T)])
        np.testing.assert_allclose(means(axes)[0].get_ydata(), layers[f"{prefix}distance"])
    for axes, prefix in zip(figures.draw("distance_by_layer", ds).axes, ("", "top_"), strict=True):
        expected = np.column_stack([layer, heads[f"{prefix}self_repair"].values.ravel() / np.sqrt(2)])
        np.testing.assert_allclose(dots(axes), expected[np.lexsort(expected.T)], atol=1e-9)
        np.testing.assert_allclose(means(axes)[0].get_ydata(), layers[f"{prefix}self_repair"] / np.sqrt(2), atol=1e-9)


def test_the_map_shows_every_change(ds):
    heads, mlps, norm, _bar = figures.draw("repair_map", ds, share=0.1).axes
    pairs = who_repairs(ds, 0.1)
    shown = pairs.repair.where(~pairs.own).stack(rank=("layer", "head")).transpose("rank", "component")
    kinds = ds.component_kind.values
    for axes, kind in ((heads, "head"), (mlps, "mlp")):
        image = np.ma.filled(axes.images[0].get_array(), np.nan)
        np.testing.assert_array_equal(image, shown.values[:, kinds == kind])
    np.testing.assert_array_equal(norm.images[0].get_array()[:, 0], pairs.top_from_norm.values.ravel())
    assert len({axes.images[0].norm for axes in (heads, mlps, norm)}) == 1
    scale = heads.images[0].norm
    assert scale.vmin == -scale.vmax
    assert scale(0) == 0.5
    blue, red = (heads.images[0].cmap(scale(value)) for value in (scale.vmax, scale.vmin))
    assert blue[2] > blue[0]
    assert red[0] > red[2]


def test_the_map_has_rows_for_done_heads_and_columns_from_the_first_ablated_layer(ds):
    part = unfinished(ds, [Head(3, 1), Head(4, 0), Head(5, 2)]).isel(layer=slice(3, 6))
    heads, mlps, *_ = figures.draw("repair_map", part).axes
    assert heads.images[0].get_array().shape == (3, 3 * 4)
    assert mlps.images[0].get_array().shape == (3, 3)
    assert [label.get_text() for label in heads.get_xticklabels()] == ["3", "4", "5"]


def test_the_graph_has_an_arrow_for_each_strong_change(ds):
    axes = figures.draw("repair_graph", ds, share=0.1).axes[0]
    edges = strongest_repairs(ds, share=0.1)
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) == edges.sizes["rank"] == 24
    blue, orange = "#0072b2", "#d55e00"
    expected = [blue if value > 0 else orange for value in edges.repair.values]
    assert [to_hex(arrow.get_edgecolor()) for arrow in reversed(arrows)] == expected
    widths = [arrow.get_linewidth() for arrow in arrows]
    assert widths == sorted(widths)  # the strongest on top
    rows = {height: {t.get_text() for t in axes.texts if t.get_position()[1] == height} for height in (0, 1)}
    pairs = zip(edges["layer"].values, edges["head"].values, strict=True)
    assert rows[1] == {f"L{layer}H{head}" for layer, head in pairs}
    assert rows[0] == set(edges.component.values.tolist())


def test_arrows_begin_and_end_at_their_labels(ds):
    axes = figures.draw("repair_graph", ds, share=0.1).axes[0]
    edges = strongest_repairs(ds, share=0.1)
    places = {(t.get_text(), t.get_position()[1]): t.get_position()[0] for t in axes.texts}
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    for rank, arrow in enumerate(reversed(arrows)):
        one = edges.isel(rank=rank)
        start, *_, end = arrow._path_original.vertices
        assert abs(start[0] - places[f"L{int(one['layer'])}H{int(one['head'])}", 1]) < 0.31
        assert abs(end[0] - places[str(one.component.values), 0]) < 0.31


def test_labels_of_a_row_stand_apart_and_in_the_order_of_layers(ds):
    axes = figures.draw("repair_graph", ds, share=0.1).axes[0]
    for height in (0, 1):
        row = sorted((t.get_position()[0], t.get_text()) for t in axes.texts if t.get_position()[1] == height)
        assert np.diff([x for x, _ in row]).min() >= 1
        layers = [int(label[1]) for _, label in row]
        assert layers == sorted(layers)


def test_a_store_is_suited_to_what_it_holds(ds, part):
    every = ["self_repair_by_layer", "direct_effect_vs_logit_change", "distance_by_layer", "token_noise", "norm_share"]
    assert figures.suited(ds) == [*every, "repair_map", "repair_graph", "stages"]
    assert figures.suited([ds, part]) == every
    assert figures.suited(by_head(ds)) == every[:3]
    with pytest.raises(UsageError, match="no dataset was given"):
        figures.suited([])


@pytest.mark.parametrize(
    "name", ["token_noise", "norm_share", "repair_map", "repair_graph", "distance_by_layer"]
)
def test_nothing_done_is_said(name, ds):
    with pytest.raises(UsageError, match="has nothing done yet"):
        figures.draw(name, unfinished(ds, done=False))


def test_what_is_missing_is_said(ds, part):
    with pytest.raises(UsageError, match="--components top"):
        figures.draw("repair_map", part)
    with pytest.raises(UsageError, match="lacks done"):
        figures.draw("token_noise", by_head(ds))


def test_of_very_many_tokens_one_is_drawn_on_each_spot(ds, monkeypatch):
    whole = [dots(axes) for axes in figures.draw("token_noise", ds, share=0.1).axes]
    monkeypatch.setattr(figures.token_noise, "MANY", 10)
    monkeypatch.setattr(figures.token_noise, "PIXELS", 20)
    figure = figures.draw("token_noise", ds, share=0.1)
    assert "Of tokens that lie on one spot, one is drawn." in " ".join(figure.get_supxlabel().split())
    for axes, every in zip(figure.axes, whole, strict=True):
        drawn = dots(axes)
        assert len(drawn) < len(every)
        assert {*map(tuple, drawn)} <= {*map(tuple, every)}
        side = [np.ptp(axes.get_xlim()) / 20, np.ptp(axes.get_ylim()) / 20]
        apart = abs(every[:, None] - drawn[None]) / side
        assert (apart.max(2).min(1) <= 1).all()


def test_what_is_said_of_very_many_tokens_fits_over_its_panel(ds, monkeypatch):
    long = "all 1,040,384 tokens: correlation -0.38; broken 25% ± 0%, under 31% ± 0%, over 44% ± 0%"
    monkeypatch.setattr(figures.token_noise, "_said", lambda *_: long)
    figure = figures.draw("token_noise", ds, share=0.1)
    figure.draw_without_rendering()
    for axes in figure.axes:
        text, panel = axes.texts[0].get_window_extent(), axes.get_window_extent()
        assert text.width < 1.15 * panel.width
        assert panel.width > 0.3 * figure.bbox.width
        assert axes.title.get_window_extent().y0 > 0
        assert axes._left_title.get_window_extent().y0 >= text.y1 - 2
