"""Whatever recipe made a store, ours or anybody's, it is summarised, drawn and reported on; and never runs anything."""

import html
import json
import re
import shutil
from functools import cache
from pathlib import Path

import further
import numpy as np
import pytest
import xarray as xr
from terminal import selfrepair
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.analysis.repairers import repairs_of_cases
from selfrepair_nn.errors import UsageError
from selfrepair_nn.explorer.contents import Contents
from selfrepair_nn.recipe import find_recipe, recipe_paths
from selfrepair_nn.store import Store

SMALL = {"tokens": 128, "length": 16}
LATE = {"layers": "5:7"}
CHOICES = {
    "layer_position": SMALL,
    "layer_order": SMALL | {"param": {"step": 3}},
    "backups": LATE | {"param": {"count": 8}},
    "ioi": {"param": {"count": 8}},
    "induction": LATE | {"param": {"count": 4, "period": 8}},
}
"""Of our recipes; the others take SMALL and LATE."""

BODIES = {
    "own_axis": (
        'heads = sr.select_heads("5:7", None, s.n_layers, s.n_heads)\n'
        "    plain = sr.Graph(ablate=sr.sweep(heads))\n"
        '    return sr.Variants("last mlp", {"live": plain, "kept": plain.freezing([sr.Mlp(s.n_layers - 1)])})'
    ),
    "own_cases": "return sr.Graph(ablate=((sr.Head(5, 0), sr.Head(5, 1)), (sr.Attention(6),), (sr.Mlp(5),)))",
    "own_doses": (
        "cases = ((sr.Head(5, 0), sr.Head(5, 1)), (sr.Mlp(5),))\n"
        '    return sr.Variants("dose", {k: sr.Graph(ablate=cases, replacement=sr.Scale(k)) for k in (0.0, 0.5)})'
    ),
    "own_deletions": 'return sr.Graph(ablate=sr.sweep([sr.Layers(3, 4), sr.Layers(4, 6)]), replacement="zero")',
    "own_recordings": (
        'heads = sr.select_heads("6,7", None, s.n_layers, s.n_heads)\n'
        '    return sr.Graph(ablate=sr.sweep(heads), attention=(1,), record="full", neurons=5, residual_norm=True)'
    ),
} | {
    f"own_{axis}": (
        'heads = sr.select_heads("6,7", None, s.n_layers, s.n_heads)\n'
        '    graphs = {"mean": sr.Graph(ablate=sr.sweep(heads), replacement="mean")}\n'
        '    graphs["half"] = sr.Graph(ablate=sr.sweep(heads), replacement=sr.Scale(0.5))\n'
        f'    return sr.Variants("{axis}", graphs)'
    )
    for axis in ("ablation", "frozen", "norm", "receiver", "scale")
}
"""Recipes that the package does not know: axes and cases of their own, and axes that ours name otherwise."""

FIGURES = {"own_cases": ("self_repair_by_layer", "cases"), "own_axis": ("no_such_figure",)}
EVERY = [*recipe_paths(), *BODIES]
KINDS = ("heads", "freeze", "ioi", "self_reinforcement", "own_axis", "own_cases", "own_doses")
"""One of each kind: a grid of heads, variants, cases, heads that read their own write, and what nobody knows."""

USUAL = (*recipe_paths(), "own_axis", "own_cases", "own_doses")


def mixture(tokenizer):
    """A random mixture of experts with tiny-neox's vocabulary, for the recipe that needs one."""
    sizes = {"vocab_size": 2048, "num_hidden_layers": 8, "max_position_embeddings": 32}
    model = further._made("Mixtral", num_local_experts=4, num_experts_per_tok=2, **sizes).eval()
    return sr.wrap(model, tokenizer)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """stored(name): the dataset of a recipe's small run of tiny-neox; the recipe's own file is gone by then."""
    folder, neox = tmp_path_factory.mktemp("stores"), sr.load("tiny-neox", check=False)

    @cache
    def run(name):
        recipe, choices = name, CHOICES.get(name, SMALL | LATE)
        model = mixture(neox.tokenizer) if name == "routing" else neox
        if name in BODIES:
            recipe, choices = str(folder / f"{name}.py"), SMALL
            lines = ['"""Mine."""', "import selfrepair_nn as sr", f"FIGURES = {FIGURES.get(name, ())}"]
            Path(recipe).write_text("\n".join([*lines, "def graph(s, options):", f"    {BODIES[name]}", ""]))
        ds = sr.run(recipe, model=model, out=folder / f"{name}.zarr", progress=False, **choices)
        if name in BODIES:
            Path(recipe).unlink()
        return ds

    return run


@pytest.mark.parametrize("name", representative(EVERY, *USUAL))
def test_every_store_has_a_summary(stored, name):
    lines = str(sr.summary(stored(name))).splitlines()
    assert lines[0].startswith("MixtralForCausalLM" if name == "routing" else "tiny-neox")
    assert "nothing is done yet" not in lines


def drawn(ds, name, folder, ending):
    """All that suits it; of our recipes but `heads`, whose stores suit much the same, their own and the overview."""
    overview = [n for n in ("variants", "cases") if figures.FIGURES[n].suits(ds)]
    names = figures.suited(ds) if name in ("heads", *BODIES) else [*figures.own(ds), *overview]
    paths = sr.plot(ds, folder, names, formats=ending)
    assert names
    assert [path.name for path in paths] == [f"{figure}.{ending}" for figure in names]
    return paths


@pytest.mark.parametrize("name", representative(EVERY, *USUAL))
def test_every_store_is_drawn(stored, name, tmp_path, hardly_written):
    assert drawn(stored(name), name, tmp_path, "svg")


@pytest.mark.parametrize("ending", representative(["svg", "png"], "svg"))
@pytest.mark.parametrize("name", representative(EVERY, *KINDS))
def test_every_store_is_drawn_in_files(stored, name, ending, tmp_path):
    assert all(path.stat().st_size > 1000 for path in drawn(stored(name), name, tmp_path, ending))


@pytest.mark.parametrize("name", recipe_paths())
def test_every_store_of_ours_names_its_recipes_figures(stored, name):
    assert figures.own(stored(name)) == find_recipe(name).figures


@pytest.mark.parametrize(
    "name",
    representative(
        ["freeze", "ioi", "own_axis", "own_cases", "own_doses", "own_norm"], "freeze", "own_cases", "own_doses"
    ),
)
def test_every_store_is_drawn_on_the_command_line(stored, name, tmp_path):
    ended = selfrepair("plot", stored(name).encoding["source"], "--out", tmp_path)
    assert ended.code == 0, ended.err
    expected = {"freeze": "freeze", "ioi": "ioi", "own_cases": "cases"}.get(name, "variants")
    assert {Path(line).stem for line in ended.out.split()} == {expected}


@pytest.mark.parametrize("name", representative(EVERY, *KINDS))
def test_every_store_has_a_page(stored, name, tmp_path, monkeypatch):
    ds, drawn = stored(name), figures.drawn
    few = {"freeze", "ioi", "own_axis", "own_cases", "own_doses"}  # all are drawn above
    monkeypatch.setattr(figures, "drawn", lambda *a, **k: drawn(*a, **k) if name in few else ())
    page = sr.write_report(ds, tmp_path / "page.html").read_text()
    assert page.count("<figure>") == (len(figures.suited(ds)) if name in few else 0)
    axis = None if "edited_position" in ds.coords else figures.suiting.axis(ds)
    for dim in ({axis} if axis else set()) | {"case"} & {*ds.dims}:
        assert all(f"<td>{label}</td>" in page for label in ds[dim].values)
    monkeypatch.setattr(figures, "drawn", lambda *a, **k: ())
    assert selfrepair("report", ds.encoding["source"], "--out", tmp_path / "other.html").code == 0


@pytest.mark.parametrize("name", ["own_axis", "own_cases", "own_doses", "freeze", "ioi"])
def test_the_pages_snippet_opens_the_store(stored, name, tmp_path, no_figures):
    ds = stored(name)
    page = html.unescape(sr.write_report(ds, tmp_path / "page.html").read_text())
    snippet = re.search(r"^ds\.self_repair\.sel\(.*\)\.where\(ds\.counted\)\.mean\(\)", page, re.MULTILINE)[0]
    found = eval(snippet, {"ds": xr.open_zarr(ds.encoding["source"])})
    page = page[page.index("\ntop = ") :]
    names = {"ds": xr.open_zarr(ds.encoding["source"])}
    exec(page[: page.index("\nds.")], names)
    assert (names["top"].any(("prompt", "position")) == ds.selected).all()
    first = ds.self_repair[(0,) * (ds.self_repair.ndim - 2)].values[ds.counted.values]
    assert float(found) == pytest.approx(float(first.mean(dtype=float)), rel=1e-5)


@pytest.mark.parametrize("name", representative(EVERY, *KINDS))
def test_bare_xarray_gives_every_stores_statistic_by_its_threshold(stored, name):
    """Of each variant, by the README's lines; partners are averaged."""
    ds = stored(name)
    bare = xr.open_zarr(ds.encoding["source"])
    assert np.array_equal(bare.threshold.isnull(), ~bare.selected)
    top = bare.counted & (bare.direct_effect >= bare.threshold)
    repair = bare.self_repair.where(top).mean(("prompt", "position"), dtype=float)
    repair = repair.mean("resample") if "resample" in repair.dims else repair
    axes = [d for d in repair.dims if d not in ("layer", "head", "case")]
    one = sr.by_case if "case" in ds.dims else sr.by_head
    for place in np.ndindex(*(ds.sizes[d] for d in axes)):
        here = dict(zip(axes, place, strict=True))
        known = one(ds.isel(here).assign_attrs(half="whole"))
        np.testing.assert_allclose(repair.isel(here), known.top_self_repair, rtol=0, atol=1e-6, err_msg=str(here))


@pytest.mark.parametrize("name", ["hydra", "interactions", "ioi"])
def test_what_components_do_for_each_case_adds_up(stored, name):
    """Equation 2, of heads together, whole layers, attention and MLPs: what is ablated itself is told apart exactly."""
    ds = stored(name)
    found = repairs_of_cases(ds)
    total = found.repair.where(~found.own, 0).sum("component") + found.top_from_norm
    np.testing.assert_allclose(total, found.top_self_repair, rtol=0, atol=1e-5)
    told = Contents.of(ds).data()["repairs"]
    for case, means in enumerate(told["means"][0]):
        shown = [told["labels"][index] for index, *_ in means["rows"]]
        assert shown
        assert not {*shown} & {*found.component.values[found.own.values[case]]}


@pytest.mark.parametrize("name", ["own_axis", "own_doses", "own_cases"])
def test_the_page_and_the_summary_hold_the_means(stored, name, tmp_path, no_figures):
    """Of a store that the package does not know, by plain numpy from the store."""
    ds = stored(name).load()
    effect = ds.direct_effect.transpose(..., "prompt", "position").values.astype(float)
    sites = effect.reshape(-1, effect.shape[-2] * effect.shape[-1])
    repair = ds.self_repair.values.astype(float).reshape(-1, *sites.shape)
    count = max(1, int(0.02 * sites.shape[1]))
    best = np.argsort(-sites, axis=1, kind="stable")[:, :count]
    means = np.take_along_axis(repair, np.broadcast_to(best, (len(repair), *best.shape)), 2).mean(2)
    shown = means[0] if name == "own_cases" else means.mean(1)
    text = str(sr.summary(ds))
    page = sr.write_report(ds, tmp_path / "page.html").read_text()
    for value in shown:
        assert f"{value:+.3f}" in text
    for value in means.ravel():
        assert f"<td>{value:+.3f}</td>" in page


def test_a_store_names_its_figures_and_its_options(stored):
    ds = stored("own_cases")
    assert json.loads(ds.attrs["figures"]) == ["self_repair_by_layer", "cases"]
    assert json.loads(stored("freeze").attrs["figures"]) == ["freeze"]
    chosen = json.loads(stored("freeze").attrs["options"])
    assert (chosen["tokens"], chosen["length"], chosen["layers"]) == (128, 16, "5,6")


def with_attributes(ds, **attributes):
    changed = ds.assign_attrs({k: v for k, v in attributes.items() if v is not None})
    changed.attrs = {k: v for k, v in changed.attrs.items() if attributes.get(k, "") is not None}
    return changed


def test_an_older_store_has_the_figures_of_our_recipe_of_its_name(stored):
    old = with_attributes(stored("freeze"), figures=None)
    assert figures.own(old) == ("freeze",)
    assert figures.own(with_attributes(old, recipe="mine")) == ("freeze",)
    assert figures.own(with_attributes(stored("token_scatter"), figures=None)) == ("token_noise",)
    assert (
        figures.own(with_attributes(stored("token_scatter"), figures=None, recipe="x/token_scatter.py"))[0]
        == "self_repair_by_layer"
    )


@pytest.mark.parametrize("named", ['["ioi"]', '["nope", 3]', "3", "[", "null", '{"a": 1}', '"freeze"'])
def test_figures_that_are_none_of_ours_or_do_not_suit_give_way(stored, named):
    """Names only are taken from a store, and only those of figures that it holds enough for."""
    ds = with_attributes(stored("freeze"), figures=named, recipe="mine")
    assert figures.own(ds) == ("freeze",)


def test_the_unspecific_figures_draw_our_recipes_stores_too(stored, tmp_path):
    for name, figure in {"freeze": "variants", "contrastive": "variants", "ioi": "cases"}.items():
        assert len(sr.plot(stored(name), tmp_path, [figure])) == 2


def test_nothing_that_a_store_names_is_run(stored, tmp_path):
    """A recipe's name in a store is a name: no file of it is looked for, whatever path it is."""
    evil, marker = tmp_path / "x.zarr" / "evil.py", tmp_path / "marker"
    shutil.copytree(stored("own_cases").encoding["source"], tmp_path / "x.zarr")
    evil.write_text(f"open({str(marker)!r}, 'w')\nFIGURES = ('cases',)\ndef graph(s, o): pass\n")
    store = Store(tmp_path / "x.zarr")
    for named in ("[]", f'["{evil}"]', None):
        without = {} if named is None else {"figures": named}
        store._describe(
            lambda now, more=without: (
                {k: v for k, v in now.items() if k != "figures"} | {"recipe": str(evil)} | more
            )
        )
        for command in (
            ["plot", "--out", tmp_path / "f"],
            ["report", "--out", tmp_path / "p.html"],
            ["info"],
        ):
            ended = selfrepair(command[0], tmp_path / "x.zarr", *command[1:])
            assert ended.code == 0, ended.err
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    representative(["heads", "freeze", "ioi", "own_doses", "self_reinforcement"], "heads", "own_doses"),
)
def test_a_figure_that_does_not_suit_is_refused_in_words(stored, name):
    ds = stored(name)
    for figure in {*figures.FIGURES} - {*figures.suited(ds), "variants", "cases"}:
        with pytest.raises(
            UsageError, match=f"figure {figure} does not suit 'tiny-neox.*: it needs "
        ) as refused:
            figures.draw(figure, ds)
        assert f"suited are {', '.join(figures.suited(ds))}" in str(refused.value)


def test_a_figure_that_does_not_suit_is_refused_on_the_command_line(stored, tmp_path):
    for figure in ("freeze", "cases", "ioi", "variants"):
        ended = selfrepair("plot", stored("heads").encoding["source"], "--figure", figure, "--out", tmp_path)
        assert (ended.code, len(ended.err.splitlines())) == (2, 1)
        assert f"figure {figure} does not suit" in ended.err
    assert not list(tmp_path.iterdir())


def test_a_figure_that_there_is_not_is_told_before_any_store_is_opened(tmp_path):
    ended = selfrepair("plot", tmp_path / "none.zarr", "--figure", "freez")
    assert ended.code == 2
    assert "no figure 'freez' (did you mean freeze?); there" in ended.err
    with pytest.raises(UsageError, match="no figure 'pie'"):
        sr.plot(sr.simulate_heads(1, 1, 2, 1), tmp_path, ["pie"])


def test_figures_and_pages_go_beside_the_store(tmp_path, monkeypatch, no_figures):
    monkeypatch.chdir(tmp_path)
    ds = sr.simulate_heads(2, 2, 4, 3)
    assert figures.beside(ds) == Path("figures")
    for source, folder in (("a/x.zarr", "a/x"), ("a/x.v2", "a/x.v2-figures")):
        ds.encoding["source"] = str(tmp_path / source)
        assert figures.beside(ds) == tmp_path / folder
        assert sr.write_report(ds) == tmp_path / f"{folder}.html"
