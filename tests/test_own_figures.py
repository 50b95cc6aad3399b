"""A recipe's file brings its own figure; a store only names it, and nothing that a store names is run."""

import json
import re
from pathlib import Path

import pytest
from made import any_store
from matplotlib.figure import Figure
from terminal import selfrepair

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.case_sites import sites_of
from selfrepair_nn.components import Head
from selfrepair_nn.drawing import Drawing
from selfrepair_nn.errors import UsageError
from selfrepair_nn.recipe import FOLDERS, find_recipe

PAIRS = '''"""Pairs of heads."""

from itertools import combinations

from matplotlib.figure import Figure

import selfrepair_nn as sr


@sr.figure("pairs of heads", lambda ds: "case" in ds.dims and all(len(c) == 2 for c in sr.sites_of(ds)))
def pair_map(stores, share):
    """Self-repair of each pair."""
    figure = Figure()
    for axes, (title, ds) in zip(figure.subplots(len(stores), squeeze=False)[:, 0], stores.items(), strict=True):
        axes.plot(sr.by_case(ds, share).top_self_repair)
        axes.set_title(title)
    return figure


FIGURES = (pair_map, "cases")


def graph(structure, options):
    heads = [sr.Head(structure.n_layers - 1, head) for head in range(3)]
    return sr.Graph(ablate=tuple(combinations(heads, 2)))
'''
GRAPH = "\ndef graph(s, o): pass\n"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A recipe's file, and the path of the store that a run of it made."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.py").write_text(PAIRS)
    taken = ["--tokens", "128", "--length", "32", "--out", folder / "p.zarr", "--no-progress", "--skip-check"]
    ended = selfrepair("run", folder / "pairs.py", *taken)
    assert ended.code == 0, ended.err
    assert f"its figures: selfrepair plot {folder / 'p.zarr'} --recipe {folder / 'pairs.py'}" in ended.err
    return folder / "pairs.py", folder / "p.zarr"


def recipe(folder, lines, name="mine"):
    path = folder / f"{name}.py"
    path.write_text('"""Mine."""\nimport selfrepair_nn as sr\n' + lines + GRAPH)
    return path


def drawn(paths):
    return sorted({Path(path).stem for path in paths})


def test_a_recipes_own_figure_is_drawn_where_its_file_is_given(pairs, tmp_path):
    file, store = pairs
    ended = selfrepair("plot", store, "--recipe", file, "--out", tmp_path / "a")
    assert (ended.code, ended.err) == (0, "")
    assert drawn(ended.out.split()) == ["cases", "pair_map"]
    assert drawn(sr.plot(store, tmp_path / "b", recipe=file)) == ["cases", "pair_map"]
    assert drawn(sr.plot(store, tmp_path / "c", ["pair_map"], recipe=file)) == ["pair_map"]
    assert drawn(sr.plot(store, tmp_path / "d", [find_recipe(str(file)).drawings["pair_map"]])) == ["pair_map"]
    assert drawn(sr.plot([store, store], tmp_path / "e", recipe=file)) == ["cases", "pair_map"]


def test_a_store_names_it_and_without_the_file_the_others_are_drawn(pairs, tmp_path, capsys):
    _, store = pairs
    assert json.loads(sr.open_store(store).attrs["figures"]) == ["pair_map", "cases"]
    ended = selfrepair("plot", store, "--out", tmp_path / "a")
    assert ended.code == 0
    assert drawn(ended.out.split()) == ["cases"]
    assert "figure pair_map is none of ours" in ended.err
    assert "--recipe FILE.py" in ended.err
    assert len(ended.err.splitlines()) == 1
    capsys.readouterr()
    assert drawn(sr.plot(store, tmp_path / "b")) == ["cases"]
    assert "--recipe FILE.py" in capsys.readouterr().err
    asked = selfrepair("plot", store, "--figure", "pair_map", "--out", tmp_path / "c")
    assert asked.code == 2
    assert "no figure 'pair_map'" in asked.err


def test_it_is_on_the_page_where_its_file_is_given(pairs, tmp_path):
    file, store = pairs
    assert selfrepair("report", store, "--recipe", file, "--out", tmp_path / "a.html").code == 0
    assert "Self-repair of each pair." in (tmp_path / "a.html").read_text()
    without = selfrepair("report", store, "--out", tmp_path / "b.html")
    assert (without.code, "figure pair_map is none of ours" in without.err) == (0, True)
    assert "Self-repair of each pair." not in (tmp_path / "b.html").read_text()


def test_a_figure_of_ones_own_that_does_not_suit_is_said(pairs, tmp_path):
    file, _ = pairs
    other = any_store("neurons")
    other.attrs["figures"] = "[]"
    with pytest.raises(UsageError, match="figure pair_map does not suit 'made': it needs pairs of heads"):
        sr.plot(other, tmp_path, ["pair_map"], recipe=file)
    assert drawn(sr.plot(other, tmp_path, recipe=file)) == ["cases"]


def test_a_function_is_a_figure_too(tmp_path):
    path = recipe(tmp_path, "def mine(stores, share): return 3\nFIGURES = mine")
    found = find_recipe(str(path))
    assert found.figures == ("mine",)
    assert found.drawings["mine"].suits(any_store("pairs", "dose"))
    with pytest.raises(UsageError, match="figure mine gives 3, not a matplotlib Figure"):
        sr.plot(any_store("pairs"), tmp_path, recipe=path)


def test_a_figure_that_fails_is_one_line(tmp_path):
    path = recipe(tmp_path, "def mine(stores, share): return 1 / 0\nFIGURES = (mine,)")
    with pytest.raises(UsageError, match="figure mine fails: ZeroDivisionError"):
        sr.plot(any_store("pairs"), tmp_path, recipe=path)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("def mine(ds): pass\nFIGURES = (mine,)", r"figure mine is drawn by a function: def mine\(stores, share\)"),
        ("FIGURES = (lambda stores, share: 1,)", "cannot be called"),
        ("FIGURES = (3,)", "FIGURES is a tuple of names of figures and of functions"),
        ("@sr.figure(name='a/b')\ndef mine(stores, share): pass", "a figure cannot be called 'a/b'"),
        ("FIGURES = (sr.Head,)", "FIGURES is a tuple of names of figures and of functions"),
    ],
)  # fmt: skip
def test_what_is_no_figure_is_told_as_the_recipe_loads(tmp_path, lines, said):
    with pytest.raises(UsageError, match=said):
        find_recipe(str(recipe(tmp_path, lines)))


def test_a_name_that_is_taken_is_refused_before_a_run(tmp_path):
    path = recipe(tmp_path, "def cases(stores, share): pass\nFIGURES = (cases,)")
    path.write_text(path.read_text().replace("pass\n", "return sr.Graph(ablate=((sr.Head(1, 0), sr.Head(1, 1)),))\n"))
    ended = selfrepair("run", path, "--tokens", "64", "--length", "32", "--out", tmp_path / "x.zarr")
    assert (ended.code, "defines a figure cases, and there is another" in ended.err) == (2, True), ended.err
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize(
    ("named", "flags", "said"),
    [
        ('("token_noise",)', ["--select", "top-share"], "token_noise cannot be drawn from this run: every token is"),
        ('("token_noise", "cases")', ["--until-ci", "5"], "to draw it, leave --until-ci out"),
        ('("pie_chart",)', [], "figure pie_chart, which the recipe names, is none of ours"),
        ('("freez",)', [], "did you mean freeze"),
    ],
)  # fmt: skip
def test_what_could_not_be_drawn_is_said_before_the_run(tmp_path, named, flags, said, monkeypatch):
    def stopped(*_, **__):
        raise UsageError("here a model would be loaded")

    monkeypatch.setattr("selfrepair_nn.running.run.loaded", stopped)
    path = recipe(tmp_path, f"FIGURES = {named}")
    path.write_text(path.read_text().replace("pass\n", "return sr.Graph(ablate=sr.sweep([sr.Head(6, 0)]))\n"))
    taken = ["--tokens", "64", "--length", "32", "--out", tmp_path / "x.zarr"]
    ended = selfrepair("run", path, *taken, *flags)
    before = ended.err.partition("here a model would be loaded")[0]
    assert said in before, ended.err
    assert said not in selfrepair("run", "heads", "--layers", "7", *taken).err


def test_every_figure_says_itself_what_it_suits():
    for name, each in figures.FIGURES.items():
        assert isinstance(each, Drawing)
        assert (each.name, bool(each.need.words)) == (name, True)
        assert not each.suits(object())


def test_the_sites_of_cases_are_data_and_older_stores_say_them_by_label():
    for cases in ("pairs", "neurons", "layers", "swaps", "mixed", "deleted and swapped"):
        ds = any_store(cases)
        assert sites_of(ds) == sites_of(ds.drop_vars("case_sites"))
        renamed = ds.assign_coords(case=[f"case {i}" for i in range(ds.sizes["case"])])
        assert sites_of(renamed) == sites_of(ds) == sites_of(sr.by_case(renamed))
        assert figures.suited(renamed) == figures.suited(ds)
        assert figures.suited(ds.drop_vars("case_sites")) == figures.suited(ds)
    assert sites_of(any_store("pairs").isel(case=[1])) == [(Head(1, 0), Head(1, 1))]


@pytest.mark.parametrize("held", ["[[", "3", '[["head", -1, 0]]', '[["pie", 1]]', "[[]]", '[["head"]]', "[" * 9999])
def test_sites_that_cannot_be_read_are_none(held):
    ds = any_store("neurons").assign_coords(case_sites=("case", [held]))
    assert sites_of(ds) == [()]
    assert str(sr.summary(ds))
    assert figures.suited(ds) == ["cases"]


def test_the_deleted_and_swapped_layers_are_found_whatever_they_are_called(tmp_path):
    ds = any_store("deleted and swapped")
    named = ds.assign_coords(case=["first", "second", "both"])
    assert figures.suited(named) == ["layer_position"]
    assert isinstance(figures.draw("layer_position", named), Figure)


def test_the_former_name_of_a_recipe_works_and_says_so(tmp_path):
    assert find_recipe("noise").name == "token_scatter"
    taken = ["--tokens", "64", "--length", "32", "--layers", "7", "--no-progress", "--skip-check", "--out", tmp_path]
    ended = selfrepair("run", "noise", *taken)
    assert ended.code == 0, ended.err
    assert "the recipe noise is called token_scatter now" in ended.err
    [store] = tmp_path.glob("*.zarr")
    assert store.name.startswith("token_scatter-tiny-neox")
    assert "is called" not in selfrepair("run", "token_scatter", *taken).err
    assert "the recipe noise is called token_scatter now" in selfrepair("plan", "noise", *taken[:2]).err


def test_a_store_of_the_former_name_goes_on(tmp_path):
    taken = ["--tokens", "64", "--length", "32", "--layers", "7", "--no-progress", "--skip-check", "--out", tmp_path]
    assert selfrepair("run", "token_scatter", *taken).code == 0
    [store] = tmp_path.glob("*.zarr")
    older = store.with_name(store.name.replace("token_scatter", "noise"))
    store.rename(older)
    for file in older.rglob("zarr.json"):
        file.write_text(re.sub(r'(recipe\\?": \\?")token_scatter', r"\1noise", file.read_text()))
    attributes = json.loads((older / "zarr.json").read_text())["attributes"]
    assert (attributes["recipe"], json.loads(attributes["settings"])["recipe"]) == ("noise", "noise")
    for name in ("noise", "token_scatter"):
        ended = selfrepair("run", name, *taken)
        assert (ended.code, f"store   {older}" in ended.out) == (0, True), ended.err
    assert [*tmp_path.glob("*.zarr")] == [older]


def test_late_heads_are_those_of_the_last_third_unless_some_are_chosen():
    class Sizes:
        n_layers, n_heads = 9, 2

    late = sr.late_heads(Sizes, sr.Options())
    assert late == tuple(Head(layer, head) for layer in (6, 7, 8) for head in (0, 1))
    assert sr.late_heads(Sizes, sr.Options(layers="1")) == (Head(1, 0), Head(1, 1))
    assert sr.late_heads(Sizes, sr.Options(heads="2.1")) == (Head(2, 1),)


def test_a_figure_of_a_recipe_that_ships_is_known_by_name(pairs, tmp_path, monkeypatch):
    file, store = pairs
    monkeypatch.setattr("selfrepair_nn.recipe.FOLDERS", (*FOLDERS, file.parent))
    ended = selfrepair("plot", store, "--out", tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert drawn(ended.out.split()) == ["cases", "pair_map"]
    assert "pair_map" in figures.suited(sr.open_store(store))
    assert drawn(sr.plot(store, tmp_path / "a", recipe=file)) == ["cases", "pair_map"]
