"""Figures draw what analysis computed, leave nothing behind and are the same bytes each time."""

import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from tiers import representative

from selfrepair_nn import figures
from selfrepair_nn.analysis import by_head, by_layer
from selfrepair_nn.choosing import viewed
from selfrepair_nn.components import Head
from selfrepair_nn.errors import UsageError
from selfrepair_nn.figures import labels
from selfrepair_nn.simulate import simulate_heads, unfinished

LAYER, PLANE = "self_repair_by_layer", "direct_effect_vs_logit_change"
OF_HEADS = figures.suited(simulate_heads(1, 1, 2, 1, components=True))


@pytest.fixture(scope="module")
def ds():
    return simulate_heads(6, 4, 8, 13, seed=1, model="gpt2")


@pytest.fixture(scope="module")
def part(ds):
    return unfinished(ds, [Head(i, j) for i in (1, 2, 4) for j in (0, 3)], np.arange(8) < 5)


@pytest.fixture(scope="module")
def files(ds, tmp_path_factory):
    return figures.plot(ds, tmp_path_factory.mktemp("plain"), figures.suited(ds))


def same(first: list, second: list) -> bool:
    return all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))


def dots(axes) -> np.ndarray:
    scatters = [c for c in axes.collections if isinstance(c, PathCollection)]
    return np.concatenate([c.get_offsets() for c in scatters])


def in_order(points: np.ndarray) -> np.ndarray:
    return points[np.lexsort(points.T)]


def words(figure) -> str:
    return " ".join([figure.get_supxlabel(), *(a.get_title("left") for a in figure.axes)])


@pytest.mark.parametrize("store", ["ds", "part"])
def test_figure_1_shows_every_head_and_the_layer_means(store, request):
    ds = request.getfixturevalue(store)
    axes = figures.draw(LAYER, ds).axes[0]
    heads, layers = by_head(ds), by_layer(ds)
    known = (heads.tokens > 0).values
    layer = np.broadcast_to(heads["layer"].values[:, None], known.shape)
    expected = np.column_stack([layer[known], heads.top_self_repair.values[known]])
    drawn = dots(axes)
    np.testing.assert_allclose(in_order(np.column_stack([drawn[:, 0].round(), drawn[:, 1]])), in_order(expected))
    assert len(np.unique(drawn[:, 0])) == known.sum()  # side by side
    line = next(line for line in axes.lines if line.get_label() == "gpt2")
    np.testing.assert_allclose(line.get_xdata(), range(6))
    np.testing.assert_allclose(line.get_ydata(), layers.top_self_repair)
    assert any(np.all(line.get_ydata() == np.zeros(2)) for line in axes.lines)


def test_figure_1_labels(ds):
    figure = figures.draw(LAYER, ds, share=0.05)
    axes = figure.axes[0]
    assert axes.get_xlabel() == "layer"
    assert axes.get_ylabel() == "self-repair, mean on top 5% of tokens (logits)"
    for fact in (
        "gpt2, resample ablation",
        "104 tokens",
        "5 in the top 5%",
        "centred target",
        "noise floor 8e-07",
    ):
        assert fact in words(figure)


def test_figure_1_compares_models_by_depth(ds):
    other = simulate_heads(3, 2, 4, 5, model="pythia")
    figure = figures.draw(LAYER, [ds, other])
    axes = figure.axes[0]
    assert axes.get_xlabel() == "depth (% of layers)"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["gpt2", "pythia"]
    lines = [line for line in axes.lines if line.get_label() in ("gpt2", "pythia")]
    np.testing.assert_allclose(lines[0].get_xdata(), [0, 20, 40, 60, 80, 100])
    np.testing.assert_allclose(lines[1].get_xdata(), [0, 50, 100])
    assert len({line.get_color() for line in lines}) == 2
    assert len(dots(axes)) == 24 + 6


def test_depth_is_of_the_model_not_of_the_store(ds):
    lower = ds.isel(layer=slice(0, 3))
    axes = figures.draw(LAYER, [lower, ds]).axes[0]
    line = next(line for line in axes.lines if line.get_label().startswith("gpt2"))
    np.testing.assert_allclose(line.get_xdata(), [0, 20, 40])


@pytest.mark.parametrize(("noise", "band"), [(2e-6, 0), (0.1, 1)])
def test_figure_1_marks_what_may_be_zero(noise, band):
    """Heads whose interval holds zero, and those under the noise floor."""
    ds = simulate_heads(6, 4, 60, 40, seed=1, noise=noise)
    axes = figures.draw(LAYER, ds).axes[0]
    hollow = [c for c in axes.collections if isinstance(c, PathCollection) and not len(c.get_facecolor())]
    heads = by_head(ds)
    size = abs(heads.top_self_repair)
    near = int((size <= np.fmax(heads.top_self_repair_half_width, heads.noise_floor)).sum())
    assert 0 < near < 24
    assert sum(len(c.get_offsets()) for c in hollow) == near
    assert sum(not isinstance(c, (PathCollection, LineCollection)) for c in axes.collections) == band


def test_figure_1_has_the_intervals_of_the_layers():
    ds = simulate_heads(6, 4, 60, 40, seed=1)
    every = [c for c in figures.draw(LAYER, ds).axes[0].collections if isinstance(c, LineCollection)]
    of_heads, bars = every
    heads, layers = by_head(ds), by_layer(ds)
    widths = [np.ptp(each[:, 1]) / 2 for each in of_heads.get_segments() if len(each)]
    expected = heads.top_self_repair_half_width.values.ravel()
    np.testing.assert_allclose(widths, expected[np.isfinite(expected)])
    assert len(widths) > 12
    expected = [layers.top_self_repair + sign * layers.top_self_repair_half_width for sign in (-1, 1)]
    np.testing.assert_allclose([each[:, 1] for each in bars.get_segments()], np.transpose(expected))
    assert "Too few prompts for an interval" in words(figures.draw(LAYER, simulate_heads(6, 4, 8, 13)))


def with_far(ds: xr.Dataset, far: dict[tuple[int, int], float]) -> xr.Dataset:
    """The summary of a store in which some heads lie far from the others."""
    heads = by_head(ds).copy(deep=True)
    for place, value in far.items():
        heads.top_self_repair.values[place] = value
    return heads


@pytest.mark.parametrize(("far", "sign"), [({(2, 1): 400.0}, 1), ({(2, 1): -70.0, (0, 3): -3000.0, (5, 0): -90.0}, -1)])
def test_far_heads_do_not_change_the_axis_by_which_the_others_are_drawn(far, sign):
    ds = simulate_heads(6, 4, 60, 40, seed=1)
    plain, axes = (figures.draw(LAYER, heads).axes[0] for heads in (with_far(ds, {}), with_far(ds, far)))
    assert not any("strip" in told or "Triangles" in told for told in [words(plain.figure)])
    assert "Triangles in grey" in words(axes.figure)
    assert np.ptp(axes.get_ylim()) < 1.6 * np.ptp(plain.get_ylim())
    assert max(abs(np.array(axes.get_yticks()))) <= max(abs(np.array(plain.get_ylim())))
    marks = [line for line in axes.lines if line.get_marker() == ("^" if sign > 0 else "v")]
    told = {text.get_text().split("\n")[0]: text.get_text().replace("\N{MINUS SIGN}", "-") for text in axes.texts}
    for (layer, head), value in far.items():
        assert float(told[f"L{layer}H{head}"].split("\n")[1].split(" ")[0]) == pytest.approx(value, rel=0.06)
        assert "±" in told[f"L{layer}H{head}"]
        assert any(abs(line.get_xdata()[0] - layer) < 0.4 for line in marks)
    layers = {f"layer {layer}" for layer, _ in far}
    assert layers <= {*told}  # whose means are far too


@pytest.mark.parametrize(("reach", "cut"), [(0.0, False), (30.0, True), (np.inf, False)])
def test_an_interval_that_is_cut_is_said_to_go_on(reach, cut):
    heads = by_head(simulate_heads(6, 4, 60, 40, seed=1)).copy(deep=True)
    heads.top_self_repair_half_width.values[:] = 0.01
    heads.top_self_repair_half_width.values[2, 1] = reach * np.ptp(heads.top_self_repair.values)
    axes = figures.draw(LAYER, heads).axes[0]
    drawn = [each.get_segments() for each in axes.collections if isinstance(each, LineCollection)]
    ends = np.concatenate([part[:, 1] for each in drawn for part in each if len(part)])
    assert (min(ends) < axes.get_ylim()[0] or max(ends) > axes.get_ylim()[1]) == cut
    assert ("goes on beyond it" in words(axes.figure)) == cut


def test_of_many_far_heads_the_farthest_are_named_and_nothing_overlaps():
    ds = simulate_heads(12, 12, 40, 13, seed=1)
    heads = with_far(ds, {(11, i): 50.0 + i for i in range(8)} | {(0, i): -50.0 - i for i in range(3)})
    figure = figures.draw(LAYER, heads)
    axes = figure.axes[0]
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    frame = axes.get_window_extent().padded(1)
    assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes)
    told = [text.get_text().split("\n")[0] for text in axes.texts]
    assert {"L11H7", "L0H2", "layer 11"} <= {*told}
    leaders = [line for text in axes.texts for line in labels.leader(text, figure.canvas.get_renderer())]
    assert not any(labels._cross(a, b) for i, a in enumerate(leaders) for b in leaders[:i])


def test_more_than_a_few_far_heads_are_no_outliers():
    """Half of the heads are never far: then the axis has all of them."""
    ds = simulate_heads(6, 4, 40, 13, seed=1)
    axes = figures.draw(LAYER, with_far(ds, {(i, j): 50.0 for i in range(6) for j in (1, 2, 3)})).axes[0]
    assert axes.get_ylim()[1] > 50
    assert not any(line.get_marker() == "^" for line in axes.lines)


@pytest.mark.parametrize("crowd", [1, 40])
def test_lines_from_names_to_dots_do_not_cross(crowd):
    figure = Figure(figsize=(5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = np.column_stack([np.linspace(0, 0.5, 12) / crowd + 0.3, np.tile([0.5, 0.52, 0.48], 4)])
    axes.scatter(*places.T)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    figure.draw_without_rendering()
    labels.label_points(axes, places, [f"L{i}H{i}" for i in range(12)], places)
    renderer = figure.canvas.get_renderer()
    leaders = [line for text in axes.texts for line in labels.leader(text, renderer)]
    assert len(axes.texts) >= 3
    assert leaders or crowd == 1
    assert not any(labels._cross(a, b) for i, a in enumerate(leaders) for b in leaders[:i])
    boxes = [labels.box_of(text, renderer) for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    own = [sum(labels._touches(line, box) for line in leaders) for box in boxes]
    assert not any(own)


def test_labels_side_by_side_keep_their_order_and_do_not_overlap():
    wanted, widths = np.array([50.0, 10, 52, 51, 300]), np.array([30.0, 40, 30, 50, 20])
    found = labels.spread(wanted, widths, 0, 310)
    assert (np.argsort(found) == np.argsort(wanted)).all()
    order = np.argsort(found)
    ends = found[order] + widths[order] / 2
    assert (ends[:-1] <= (found - widths / 2)[order][1:]).all()
    assert found[0] - 15 >= 0
    assert found[4] + 10 <= 310
    near = labels.spread_near(np.array([10.0, 11, 12]), np.array([50.0, 50, 50]), [1, 9, 5], 0, 112)
    assert [*near] == [1, 2]  # there is room for two
    crowd = labels.spread_near(np.zeros(9), np.full(9, 10.0), range(9), -500, 500)
    assert [*crowd] == [7, 8]
    assert max(map(abs, crowd.values())) <= 1.5 * 10


OF_TOKENS = {"token_noise", "repair_map", "stages"}


@pytest.mark.parametrize("name", OF_HEADS)
def test_every_mean_has_its_interval(name):
    """As bars, bands, or a number behind ± where cells are numbers; and none where too few prompts hold a token."""
    figure = figures.draw(name, simulate_heads(3, 3, 60, 40, components=True))
    panels = [axes for axes in figure.axes if axes.get_xlabel() or axes.get_ylabel() or axes.texts]
    if name in OF_TOKENS:
        assert any("±" in text.get_text() for axes in panels for text in axes.texts)
        return
    for axes in panels:
        barred = any(type(each).__name__ == "ErrorbarContainer" for each in axes.containers)
        assert barred or any("±" in text.get_text() for text in axes.texts) or axes.get_label() == "<colorbar>"


@pytest.mark.parametrize(("against", "name"), [(None, "removed"), ("direct-effect", "direct_effect")])
@pytest.mark.parametrize("store", ["ds", "part"])
def test_figure_2_shows_every_head_in_its_layers_colour(store, against, name, request):
    ds = request.getfixturevalue(store)
    axes = figures.draw(PLANE, viewed(ds, None, None, against)).axes[0]
    heads = by_head(ds)
    known = (heads.tokens > 0).values
    expected = np.column_stack([heads[name].values[known], heads.logit_change.values[known]])
    np.testing.assert_allclose(dots(axes), expected)
    scatter = next(c for c in axes.collections if isinstance(c, PathCollection))
    np.testing.assert_array_equal(scatter.get_array(), np.broadcast_to(np.arange(6)[:, None], (6, 4))[known])
    assert scatter.get_cmap().name == "viridis"
    (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    inside = (expected > [low, bottom]) & (expected < [high, top])
    assert inside.all()


def test_figure_2_has_the_line_and_names_the_wedge(ds):
    figure = figures.draw(PLANE, ds)
    axes = figure.axes[0]
    assert axes.get_xlabel() == "direct effect removed, mean over all tokens (logits)"
    assert axes.get_ylabel() == "logit change when ablated,\nmean over all tokens (logits)"
    assert any(
        len(x) == 3 and np.array_equal(line.get_ydata(), -x)
        for line in axes.lines
        for x in [line.get_xdata()]
    )
    assert "the x-axis: self-repaired" in words(figure)
    wedge = next(c for c in axes.collections if not isinstance(c, PathCollection))
    paths = wedge.get_paths()
    x = axes.get_xlim()[1] / 2
    assert any(path.contains_point((x, -x / 2)) for path in paths)
    assert not any(path.contains_point((x, x / 2)) or path.contains_point((x, -2 * x)) for path in paths)
    assert "top 2%" not in words(figure)


@pytest.mark.parametrize(
    "ablation", representative(["resample", "mean", "zero", "identity"], "resample", "zero")
)
def test_what_logit_changes_are_set_against(ablation):
    """What was removed, but where nothing takes the head's place, or it is put back: there DE, as in the paper."""
    ds = simulate_heads(3, 2, 8, 13, ablation=ablation)
    usual = "direct effect removed" if ablation in ("resample", "mean") else "direct effect"
    for against, label in ((None, usual), ("removed", "direct effect removed"), ("direct-effect", "direct effect")):
        chosen = viewed(ds, None, None, against)
        assert figures.draw(PLANE, chosen).axes[0].get_xlabel().startswith(f"{label}, mean over")
        assert figures.draw("token_noise", chosen).axes[0].get_xlabel() == f"{label} (logits)"
        told = "direct effect removed) / √2 = self-repair / √2" if label != "direct effect" else "direct effect) / √2,"
        assert told in words(figures.draw("distance_by_layer", chosen))
    with pytest.raises(UsageError, match="against 'all' is not known; choose one of removed, direct-effect"):
        figures.plot(ds, "nowhere", against="all")


def test_figure_2_has_one_scale_where_it_can():
    axes = figures.draw(PLANE, simulate_heads()).axes[0]
    assert np.ptp(axes.get_xlim()) == pytest.approx(np.ptp(axes.get_ylim()))
    null = figures.draw(PLANE, simulate_heads(ablation="identity")).axes[0]
    assert np.ptp(null.get_xlim()) > 100 * np.ptp(null.get_ylim())


@pytest.mark.parametrize("seed", [0, 2])
def test_figure_2_names_the_extreme_heads_without_overlap(seed):
    ds = simulate_heads(8, 8, 8, 13, seed=seed)
    figure = figures.draw(PLANE, ds)
    axes = figure.axes[0]
    figure.draw_without_rendering()
    notes = [t for t in axes.texts if isinstance(t, Annotation)]
    assert 7 <= len(notes) <= 8
    assert axes.texts[0].get_text() == "self-repaired"
    boxes = [Text.get_window_extent(t) for t in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    points = axes.transData.transform(dots(axes))
    assert not any(box.contains(*point) for box in boxes for point in points)
    frame = axes.get_window_extent()
    assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes)
    heads = by_head(ds)
    size = np.hypot(heads.removed, heads.logit_change).values
    farthest = Head(*map(int, np.unravel_index(size.argmax(), size.shape))).label
    note = next(t for t in notes if t.get_text() == farthest)
    place = np.unravel_index(size.argmax(), size.shape)
    np.testing.assert_allclose(note.xy, [heads.removed.values[place], heads.logit_change.values[place]])


def test_figure_2_has_a_panel_for_each_store(ds):
    figure = figures.draw(PLANE, {"one": ds, "two": ds, "three": ds, "four": ds})
    panels = [a for a in figure.axes if a.get_xlabel().startswith("direct")]
    assert [a.get_title("left") for a in panels] == ["one", "two", "three", "four"]


@pytest.mark.parametrize("name", OF_HEADS)
@pytest.mark.parametrize("size", representative([(1, 1, 2, 1), (2, 1, 2, 3)], (1, 1, 2, 1)))
def test_small_stores_are_drawn(name, size):
    assert figures.draw(name, simulate_heads(*size, components=True)).axes


@pytest.mark.parametrize("name", representative(OF_HEADS, LAYER, PLANE, "token_noise", "repair_map"))
def test_bare_attributes_are_drawn(name):
    bare = simulate_heads(3, 2, 4, 5, components=True).drop_vars("noise_floor")
    bare.attrs = {}
    figure = figures.draw(name, [bare, bare])
    assert "noise floor not measured" in figure.get_supxlabel()


def test_a_summary_draws_the_same_bytes(ds, files, tmp_path):
    drawn = figures.plot(by_head(ds), tmp_path, figures.suited(by_head(ds)))
    assert same(drawn, [file for file in files if file.name in {path.name for path in drawn}])
    assert {LAYER, PLANE} < {path.stem for path in drawn}


def test_the_same_model_twice_is_told_apart(ds):
    def legend(*stores):
        figure = figures.draw(LAYER, list(stores))
        return [t.get_text() for t in figure.legends[0].get_texts()], figure.axes[0].get_title("left")

    zero = simulate_heads(6, 4, 8, 13, model="gpt2", ablation="zero")
    assert legend(ds, zero) == (["gpt2, resample ablation", "gpt2, zero ablation"], "gpt2")
    assert legend(ds, ds)[0] == ["gpt2, resample ablation", "gpt2, resample ablation (2)"]
    assert legend(ds, simulate_heads(model="pythia")) == (["gpt2", "pythia"], "2 models, resample ablation")


def test_files_are_named_and_hold_no_date(files):
    shown = (LAYER, PLANE, "distance_by_layer", "token_noise", "norm_share")
    assert [p.name for p in files] == [f"{name}.{ending}" for name in shown for ending in ("png", "svg")]
    texts = [p.read_text() for p in files if p.suffix == ".svg"]
    assert not any(word in text for text in texts for word in ("dc:date", "Matplotlib v"))


def test_files_are_as_promised(ds, tmp_path):
    figure = figures.draw(LAYER, ds)
    png, svg = figures.save(figure, tmp_path / "deep" / "er", "figure-1")
    assert png.read_bytes().startswith(b"\x89PNG")
    width, height = (int.from_bytes(png.read_bytes()[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == tuple(int(inches * 200) for inches in figure.get_size_inches())
    assert (width, height >= int(4.2 * 200)) == (int(6.4 * 200), True)  # small print of many lines makes it higher
    assert ">gpt2, resample ablation</text>" in svg.read_text()


FEW = [(LAYER, PLANE), pytest.param(None, marks=pytest.mark.thorough)]


@pytest.mark.parametrize("names", FEW, ids=["two", "all"])
def test_the_callers_settings_do_not_change_and_what_would_break_a_figure_does_not_matter(ds, files, tmp_path, names):
    broken = {"svg.hashsalt": "mine", "text.parse_math": True, "figure.autolayout": True, "svg.fonttype": "path"}
    with matplotlib.rc_context(broken):
        before = dict(matplotlib.rcParams)
        plain = figures.plot(ds, tmp_path, names or figures.suited(ds))
        assert dict(matplotlib.rcParams) == before
    assert same(plain, files[: len(plain)])


def test_the_callers_fonts_sizes_and_colours_are_kept(ds):
    with matplotlib.rc_context({"axes.facecolor": "#ffeedd", "font.size": 13, "axes.titlesize": 17}):
        [figure] = figures.plot(ds, names=LAYER)
    [axes] = figure.axes
    assert axes.get_facecolor() == matplotlib.colors.to_rgba("#ffeedd")
    assert axes.yaxis.label.get_fontsize() == 13
    assert axes._left_title.get_fontsize() == 17


def test_without_a_directory_figures_are_returned_and_nothing_is_written(ds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = figures.plot(ds)
    assert [type(each).__name__ for each in drawn] == ["Figure"] * len(figures.own(ds))
    assert not list(tmp_path.iterdir())


def test_a_notebook_shows_what_is_returned(ds, monkeypatch):
    shown = []
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    module = SimpleNamespace(display=shown.append, get_ipython=lambda: shell, version_info=(9, 0))
    module.Image = lambda data, width: data
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    [figure], [image] = figures.plot(ds, names=LAYER), shown
    assert image.startswith(b"\x89PNG")
    assert type(figure).__name__ == "Figure"


def test_size_small_print_and_formats_are_chosen(ds, tmp_path):
    [plain] = figures.plot(ds, names=LAYER, size="5x3", caption=False)
    assert tuple(plain.get_size_inches()) == (5, 3)
    assert plain.get_supxlabel() == ""
    [usual] = figures.plot(ds, names=LAYER)
    assert usual.get_supxlabel() != ""
    [path] = figures.plot(ds, tmp_path, LAYER, formats="pdf")
    assert path.read_bytes().startswith(b"%PDF")
    again = path.read_bytes()
    assert figures.plot(ds, tmp_path, LAYER, formats=["pdf"])[0].read_bytes() == again
    for wrong in ({"size": "wide"}, {"size": (0, 3)}, {"size": 5}, {"formats": ["bmp"]}, {"axes": 5}):
        with pytest.raises(UsageError):
            figures.plot(ds, names=LAYER, **wrong)


@pytest.mark.parametrize("formats", ["png", "svg"])
def test_a_size_that_has_no_room_is_refused(ds, tmp_path, formats):
    with pytest.raises(UsageError, match=r"size 1x0.5 inches has no room .* give a larger one"):
        figures.plot(ds, tmp_path, names="norm_share", size=(1, 0.5), formats=formats)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", [LAYER, PLANE, "norm_share", "distance_by_layer"])
def test_a_figure_is_drawn_in_the_place_of_axes(ds, name):
    whole = Figure(figsize=(14, 6), layout="constrained")
    left, right = whole.subplots(1, 2)
    left.plot([0, 1])
    assert figures.plot(ds, names=name, axes=right) == [whole]
    FigureCanvasAgg(whole)
    whole.draw_without_rendering()
    [part] = whole.subfigs
    assert part.axes
    assert all(axes.get_window_extent().x0 > left.get_window_extent().x1 for axes in part.axes)
    assert tuple(whole.get_size_inches()) == (14, 6)
    with pytest.raises(UsageError, match="one figure: name it"):
        figures.plot(ds, axes=left)


def test_pyplot_is_not_even_imported(tmp_path):
    code = f"""
import sys
from types import SimpleNamespace
from selfrepair_nn import figures
from selfrepair_nn.simulate import simulate_heads
figures.plot(simulate_heads(2, 2, 4, 5), {str(tmp_path)!r})
print([name for name in ("matplotlib.pyplot", "torch", "transformers", "nnsight") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_figure_has_a_description():
    for name, each in figures.FIGURES.items():
        assert each.name == name
        assert each.about.endswith(".")
        assert len(each.about) < 120
        assert each.need.words


def test_errors_say_what_to_do(ds):
    with pytest.raises(UsageError, match=f"no figure 'pie'; there are {LAYER}, {PLANE}, "):
        figures.draw("pie", ds)
    with pytest.raises(UsageError, match="no dataset was given"):
        figures.draw(LAYER, [])
    with pytest.raises(UsageError, match="has nothing done yet"):
        figures.draw(LAYER, unfinished(ds, done=False))
    with pytest.raises(UsageError, match="not a store of the heads recipe"):
        figures.draw(LAYER, xr.Dataset())


LONG = "organisation/a model of a very long name instruct preview"


@pytest.mark.parametrize("name", OF_HEADS)
@pytest.mark.parametrize("several", representative([False, True], True))
def test_titles_keep_from_one_another_and_from_the_edge(name, several):
    ds = simulate_heads(3, 3, 22, 9, components=True, model=LONG)
    figure = figures.draw(name, {f"{LONG} 1": ds, "other": ds} if several else ds)
    figure.draw_without_rendering()
    titles = [each for axes in figure.axes for each in axes.get_children()
              if isinstance(each, Text) and each.get_text() and each.get_text() == axes.get_title("left")]  # fmt: skip
    boxes = [each.get_window_extent() for each in titles]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
