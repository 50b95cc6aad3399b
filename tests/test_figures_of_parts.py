"""Figures of single tokens, of the norm, of the distance from y = -x and of who repairs whom show the numbers."""

from collections import Counter

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Text

from selfrepair_nn import figures
from selfrepair_nn.analysis import (
    by_head,
    by_layer,
    norm_by_head,
    token_noise,
    who_repairs,
)
from selfrepair_nn.analysis.repairers import changes_of, clear_heads
from selfrepair_nn.choosing import viewed
from selfrepair_nn.components import Head
from selfrepair_nn.errors import UsageError
from selfrepair_nn.simulate import simulate_heads, unfinished


@pytest.fixture(scope="module")
def ds():
    return simulate_heads(6, 4, 8, 13, seed=1, model="gpt2", components=True)


@pytest.fixture(scope="module")
def sure():
    """In which many changes are known to differ from zero."""
    return simulate_heads(6, 4, 40, 40, seed=1, components=True)


@pytest.fixture(scope="module")
def part(ds):
    heads = [Head(i, j) for i in (1, 2, 4) for j in (0, 3)]
    return unfinished(ds.drop_vars(("component_change", "component_direct_effect")), heads, np.arange(8) < 5)


def dots(axes):
    scatters = [c.get_offsets() for c in axes.collections if isinstance(c, PathCollection)]
    points = np.concatenate(scatters)
    return points[np.lexsort(points.T)]


def in_layers(axes):
    """The same, each at its layer's middle: they stand side by side there."""
    points = dots(axes)
    points[:, 0] = points[:, 0].round()
    return points[np.lexsort(points.T)]


def means(axes):
    """The lines through layers, without those that span the panel."""
    return [line for line in axes.lines if line.get_marker() not in ("None", "") and len(line.get_xdata()) > 1]


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
    whole, parts, clipped, balance = figures.draw("norm_share", ds, share=0.1).axes
    heads, layers = norm_by_head(ds, 0.1), by_layer(norm_by_head(ds, 0.1), 0.1)
    layer = np.broadcast_to(heads["layer"].values[:, None], heads.tokens.shape)
    shown = {whole: "top_from_norm", clipped: "norm_share", balance: "norm_of_means"}
    for axes, name in shown.items():
        known = (heads.tokens > 0).values & heads[name].notnull().values
        expected = np.column_stack([layer[known], heads[name].values[known]])
        drawn = dots(axes)
        drawn[:, 0] = drawn[:, 0].round()
        np.testing.assert_allclose(drawn[np.lexsort(drawn.T)], expected[np.lexsort(expected.T)])
        np.testing.assert_allclose(means(axes)[0].get_ydata(), layers[name])
    for line, name in zip(means(parts), ("top_norm_on_existing", "top_norm_on_change"), strict=True):
        np.testing.assert_allclose(line.get_ydata(), layers[name])
    beside = {line.get_label(): line.get_ydata() for axes in (clipped, balance) for line in axes.lines}
    for label, name in (("its mirror: clipped breakage", "norm_mirror"), ("clipped, less its mirror", "norm_excess")):
        np.testing.assert_allclose(beside[label], layers[name])
    assert clipped.yaxis.get_major_formatter()(0.4, 0) == "40%"
    assert balance.yaxis.get_major_formatter()(-1, 0) == "\N{MINUS SIGN}100%"


def test_a_share_of_hardly_any_direct_effect_squashes_no_panel():
    """Of a head that may write nothing it is left out, and told; one far beyond 100% stands at the edge."""
    ds = simulate_heads(4, 4, 60, 40, seed=2)
    heads = norm_by_head(ds).copy(deep=True)
    heads.norm_of_means.values[1, 2] = np.nan
    heads.norm_of_means.values[2, 3] = -10_000.0
    figure = figures.draw("norm_share", heads)
    balance = figure.axes[3]
    assert max(map(abs, balance.get_ylim())) < 2
    assert len(dots(balance)) == 15
    assert any(text.get_text().startswith("L2H3\n\N{MINUS SIGN}1000000%") for text in balance.texts)
    assert "may be 0: 1 of 16 heads" in " ".join(figure.get_supxlabel().split())


def test_several_norms_are_drawn_by_depth(ds):
    figure = figures.draw("norm_share", [ds, simulate_heads(3, 2, 4, 5, model="pythia")])
    assert all(axes.get_xlabel() == "depth (% of layers)" for axes in figure.axes)
    ends = {line.get_label(): line.get_xdata()[-1] for line in means(figure.axes[2])}
    assert (ends["gpt2"], ends["pythia"]) == (100, 100)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["gpt2", "pythia"]


def test_distance_is_shown_over_all_and_over_top_tokens(ds):
    heads, layers = by_head(ds), by_layer(ds)
    layer = np.broadcast_to(heads["layer"].values[:, None], heads.tokens.shape).ravel()
    drawn = figures.draw("distance_by_layer", viewed(ds, None, None, "direct-effect"))
    for axes, prefix in zip(drawn.axes, ("", "top_"), strict=True):
        distance = (heads[f"{prefix}logit_change"] + heads[f"{prefix}direct_effect"]) / np.sqrt(2)
        expected = np.column_stack([layer, distance.values.ravel()])
        np.testing.assert_allclose(in_layers(axes), expected[np.lexsort(expected.T)])
        np.testing.assert_allclose(means(axes)[0].get_ydata(), layers[f"{prefix}distance"])
    for axes, prefix in zip(figures.draw("distance_by_layer", ds).axes, ("", "top_"), strict=True):
        expected = np.column_stack([layer, heads[f"{prefix}self_repair"].values.ravel() / np.sqrt(2)])
        np.testing.assert_allclose(in_layers(axes), expected[np.lexsort(expected.T)], atol=1e-9)
        np.testing.assert_allclose(means(axes)[0].get_ydata(), layers[f"{prefix}self_repair"] / np.sqrt(2), atol=1e-9)


def test_the_map_shows_the_heads_that_are_surely_repaired_or_broken(sure):
    pairs = who_repairs(sure)
    tree, components, totals, _bar = figures.draw("repair_map", pairs).axes
    names = [label.get_text() for label in components.get_yticklabels()]
    known = (pairs.top_repaired | pairs.top_broken).values
    assert 3 < len(names) <= 20
    assert len({*names}) == len(names)
    places = [tuple(map(int, name[1:].split("H"))) for name in names]
    assert all(known[place] for place in places)
    columns = [label.get_text() for label in components.get_xticklabels()]
    image = np.ma.filled(components.images[0].get_array(), np.nan)
    shown = pairs.repair.where(~pairs.own).sel(component=pairs.component)
    at = [pairs.component.values.tolist().index(column) for column in columns]
    np.testing.assert_array_equal(image, [shown.values[place][at] for place in places])
    kinds, layers = pairs.component_kind.values[at], pairs.component_layer.values[at]
    order = [(["head", "mixer", "mlp"].index(kind), layer) for kind, layer in zip(kinds, layers, strict=True)]
    assert order == sorted(order)
    clear = np.asarray(components.images[0].get_alpha()) == 1
    expected = (pairs.repair_known | pairs.own).values
    np.testing.assert_array_equal(clear, [expected[place][at] for place in places])
    summed = ("top_from_heads", "top_from_mlps", "top_from_norm", "top_self_repair")
    np.testing.assert_allclose(totals.images[0].get_array(), [[pairs[n].values[p] for n in summed] for p in places])
    assert sum("±" in text.get_text() for text in totals.texts) > len(names)
    scale = components.images[0].norm
    assert totals.images[0].norm is scale
    assert scale.vmin == -scale.vmax
    assert scale(0) == 0.5
    blue, red = (components.images[0].cmap(scale(value)) for value in (scale.vmax, scale.vmin))
    assert blue[2] > blue[0]
    assert red[0] > red[2]
    assert len(tree.lines) == len(names) - 1


def test_rows_of_the_map_that_are_alike_stand_together(sure):
    pairs = who_repairs(sure).copy(deep=True)
    first, last = "L0H0", "L5H3"
    pairs.repair.values[5, 3] = pairs.repair.values[0, 0] = np.where(np.arange(pairs.sizes["component"]) % 2, 3, -3)
    pairs.own.values[5, 3] = pairs.own.values[0, 0] = False
    for place in ((5, 3), (0, 0)):
        pairs.top_self_repair.values[place], pairs.top_repaired.values[place] = 100, True
    names = [t.get_text() for t in figures.draw("repair_map", pairs).axes[1].get_yticklabels()]
    assert abs(names.index(first) - names.index(last)) == 1


@pytest.mark.parametrize("name", ["repair_map", "repair_graph"])
def test_of_very_many_heads_those_that_matter_are_shown_with_names_that_can_be_read(name):
    figure = figures.draw(name, simulate_heads(12, 16, 24, 6, components=True, seed=3))
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    assert width < 14
    assert height < 9
    for axes in figure.axes:
        texts = [*axes.get_xticklabels(), *axes.get_yticklabels(), *axes.texts]
        texts = [each for each in texts if each.get_text() and each.get_fontsize() > 0]
        boxes = [Text.get_window_extent(each) for each in texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def arrows_of(axes):
    """The strongest first."""
    return [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)][::-1]


def rows_of(axes):
    found = [(*t.get_position(), t.get_text()) for t in axes.texts]
    return {height: sorted((x, text) for x, y, text in found if y == height) for height in (0, 1)}


def test_the_graph_has_the_known_changes_of_heads_of_largest_net_repair(sure):
    pairs = who_repairs(sure)
    axes, sizes = figures.draw("repair_graph", pairs).axes
    chosen, _ = clear_heads(pairs, 10)
    net = abs(pairs.top_self_repair.values)
    known = (pairs.top_repaired | pairs.top_broken).values
    assert all(known[place] for place in chosen)
    left_out = {*np.ndindex(6, 4)} - {*chosen} - {*clear_heads(pairs, 10)[1]}
    assert not any(known[place] and net[place] > min(net[one] for one in chosen) for place in left_out)
    told = {text.split("\n")[0]: text for _, text in rows_of(axes)[1]}
    assert {*told} <= {f"L{layer}H{head}" for layer, head in chosen}
    for layer, head in chosen:
        if f"L{layer}H{head}" in told:
            value = float(pairs.top_self_repair[layer, head])
            assert f"{value:+.2f}".replace("-", "\N{MINUS SIGN}") in told[f"L{layer}H{head}"]
            assert "±" in told[f"L{layer}H{head}"]
    edges = changes_of(pairs, chosen)
    assert edges.repair_known.all()
    assert {"norm"} < {*edges.component_kind.values.tolist()}
    arrows = arrows_of(axes)
    assert len(arrows) == edges.sizes["rank"] <= 24
    expected = ["#0072b2" if value > 0 else "#d55e00" for value in edges.repair.values]
    assert [to_hex(arrow.get_edgecolor()) for arrow in arrows] == expected
    widths = [arrow.get_linewidth() for arrow in arrows]
    assert widths == sorted(widths, reverse=True)
    assert {arrow.get_linestyle() for arrow in arrows} == {"-"}
    lines = [c for c in sizes.collections if isinstance(c, LineCollection)]
    bars = np.concatenate([np.concatenate(each.get_segments()) for each in lines])
    half = np.sort([np.ptp(pair) / 2 for pair in bars[:, 1].reshape(-1, 2)])
    np.testing.assert_allclose(half, np.sort(edges.half_width.values))


def test_a_head_whose_changes_cancel_does_not_dominate_the_graph(sure):
    pairs = who_repairs(sure)
    plain = figures.draw("repair_graph", pairs)
    loud = pairs.copy(deep=True)
    place = next(p for p in np.ndindex(6, 4) if p not in clear_heads(pairs, 10)[0] and p[0] < 3)
    late = np.flatnonzero((pairs.component_layer.values > place[0]) & (pairs.component_kind.values == "mlp"))[:2]
    loud.repair.values[place][late], loud.repair_known.values[place][late] = (500, -500), True
    loud.top_self_repair.values[place], loud.top_repaired.values[place] = 9, True
    figure = figures.draw("repair_graph", loud)
    name = f"L{place[0]}H{place[1]}"
    assert rows_of(figure.axes[0]) == rows_of(plain.axes[0])
    widths = [[arrow.get_linewidth() for arrow in arrows_of(each.axes[0])] for each in (plain, figure)]
    assert widths[0] == widths[1]
    assert f"cancel: {name}" in " ".join(figure.get_supxlabel().split())


def test_what_is_not_sure_is_dotted_where_nothing_is(ds):
    axes, _ = figures.draw("repair_graph", ds, share=0.1).axes
    assert {arrow.get_linestyle() for arrow in arrows_of(axes)} == {":"}
    assert "No change is known to differ from zero" in " ".join(axes.figure.get_supxlabel().split())


@pytest.mark.parametrize("store", ["ds", "sure"])
def test_arrows_begin_at_their_heads_and_end_over_their_change(store, request):
    pairs = who_repairs(request.getfixturevalue(store), 0.1)
    axes, sizes = figures.draw("repair_graph", pairs, share=0.1).axes
    edges = changes_of(pairs, clear_heads(pairs, 10)[0])
    rows = {height: {text.split("\n")[0]: x for x, text in row} for height, row in rows_of(axes).items()}
    points = np.concatenate([line.get_xydata() for line in sizes.lines if line.get_marker() == "o"])
    for rank, arrow in enumerate(arrows_of(axes)):
        one = edges.isel(rank=rank)
        start, *_, end = arrow._path_original.vertices
        assert abs(start[0] - rows[1][f"L{int(one['layer'])}H{int(one['head'])}"]) < 0.4
        assert abs(end[0] - rows[0][str(one.component.values)]) < 0.4
        assert np.abs(points - [end[0], float(one.repair)]).sum(1).min() < 1e-9
    assert axes.get_xlim() == sizes.get_xlim()


@pytest.mark.parametrize("store", ["ds", "sure"])
def test_labels_of_a_row_stand_apart_and_in_the_order_of_layers(store, request):
    axes = figures.draw("repair_graph", request.getfixturevalue(store), share=0.1).axes[0]
    for row in rows_of(axes).values():
        assert np.diff([x for x, _ in row]).min() >= 1
        layers = [99 if text == "final norm" else int(text[1]) for _, text in row]
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


@pytest.fixture(scope="module")
def unsure():
    """Enough prompts for intervals, in which no head is surely repaired, and changes are of either sign."""
    ds, rng = simulate_heads(2, 16, 24, 9, seed=2, components=True), np.random.default_rng(0)
    names = ("self_repair", "from_heads", "from_mlps", "from_norm")
    noise = {name: (ds[name].dims, 1e-3 * rng.normal(size=ds[name].shape)) for name in names}
    change = ds.component_change
    return ds.assign(noise | {"component_change": (change.dims, 1e-3 * rng.normal(size=change.shape))})


@pytest.mark.parametrize("name", ["repair_graph", "repair_map"])
def test_where_no_head_is_sure_the_largest_are_shown_and_nothing_else_is_said(unsure, name):
    pairs = who_repairs(unsure, 0.5)
    assert pairs.top_p_value.notnull().all()
    assert not (pairs.top_repaired | pairs.top_broken).any()
    figure = figures.draw(name, pairs, share=0.5)
    said = " ".join(figure.get_supxlabel().split())
    assert "surely not 0" not in said
    if name == "repair_graph":
        assert len(arrows_of(figure.axes[0])) >= 10
        assert "the 10 heads of largest self-repair, with" in said
    else:
        told = [text.get_text().replace("\N{MINUS SIGN}", "-") for text in figure.axes[2].texts]
        values = [abs(float(text.split()[0])) for text in told]
        assert 0 < max(values) < 0.01  # small numbers have digits enough
        assert all("±" in text for text in told if float(text.split()[0]))
