"""Recipes by name and by path, and the graphs they give."""

import pytest

import selfrepair_nn as sr
from selfrepair_nn.components import FinalNorm, Head, Mixers, Mlp, PostNorms
from selfrepair_nn.errors import UsageError
from selfrepair_nn.graph import Graph, freeze_set, sweep
from selfrepair_nn.options import Options
from selfrepair_nn.recipe import find_recipe, recipes


class Sizes:
    n_layers, n_heads, headless = 3, 2, ()


def test_every_recipe_has_a_line_and_figures_that_exist():
    from selfrepair_nn.figures import known

    for recipe in recipes():
        assert recipe.summary.endswith(".")
        assert len(recipe.summary) < 110
        assert set(recipe.figures) <= set(known())


def test_heads_is_one_graph_swept():
    graph = find_recipe("heads").graph(Sizes, Options(layers="1:", ablation="zero", target="raw"))
    assert graph.ablate == ((Head(1, 0),), (Head(1, 1),), (Head(2, 0),), (Head(2, 1),))
    assert (graph.replacement, graph.target, graph.record) == ("zero", "raw", "sums")


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text('"""Mine."""\nimport selfrepair_nn as sr\n\ndef graph(structure, options):\n'
                    '    return sr.Graph(ablate=((sr.Head(0, 0), sr.Head(0, 1)),))\n')  # fmt: skip
    recipe = find_recipe(str(path))
    assert (recipe.name, recipe.summary, recipe.figures) == ("mine", "Mine.", ())
    assert recipe.graph(Sizes, Options()).ablate == ((Head(0, 0), Head(0, 1)),)


@pytest.mark.parametrize(
    ("text", "said"),
    [("def graph(:", "SyntaxError"), ("x = 1", "defines no function graph"), ("1 / 0", "ZeroDivision")],
)
def test_a_recipe_that_is_none(tmp_path, text, said):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UsageError, match=said):
        find_recipe(str(tmp_path / "bad.py"))


def test_unknown_recipe_lists_ours():
    with pytest.raises(UsageError, match="heads"):
        find_recipe("tails")


def test_freezing_downstream_and_all():
    down, everything = (freeze_set(name, 2, 2) for name in ("downstream", "all"))
    assert down == {Head(0, 0), Head(0, 1), Head(1, 0), Head(1, 1), Mlp(0), Mlp(1), Mixers()}
    assert everything == down | {PostNorms(), FinalNorm()}


def test_a_graph_names_what_it_does_not_know():
    heads = sweep((Head(0, 0),))
    for choice in ({"replacement": "noise"}, {"target": "loss"}, {"record": "all"}, {"value_bias": "mlp"}):
        with pytest.raises(UsageError, match="choose one of"):
            Graph(ablate=heads, **choice)


@pytest.mark.parametrize(
    "choice", [{"tokens": 0}, {"length": -1}, {"batch_size": 0}, {"tokens_per_pass": 1.5}, {"share": 0}, {"share": 1.1},
               {"ablation": "noise"}, {"components": "some"}, {"backend": "cloud"}]
)  # fmt: skip
def test_options_refuse_what_cannot_be(choice):
    with pytest.raises(UsageError, match=next(iter(choice))):
        Options(**choice)


def test_a_recipes_defaults_give_way_to_what_is_asked_for(tmp_path):
    path = tmp_path / "mine.py"
    lines = [
        '"""Mine."""',
        'DEFAULTS = {"components": "top", "ablation": "mean"}',
        "def graph(s, o):",
        "    pass",
    ]
    path.write_text("\n".join(lines))
    options = find_recipe(str(path)).resolved(Options(components="all"))
    assert (options.components, options.ablation, options.target) == ("all", "mean", "centred")
    path.write_text("\n".join(lines).replace("ablation", "ablate"))
    with pytest.raises(UsageError, match="DEFAULTS names ablate, which is no option"):
        find_recipe(str(path)).resolved(Options())


OWN = '''"""Prompts of its own."""

import numpy as np

import selfrepair_nn as sr


def prompts(structure, tokenizer, options):
    return sr.Prompts(np.full((2, {length}), {token}), np.arange(2), {{"name": "counts"}})


def graph(structure, options):
    return sr.Graph(ablate=sr.sweep([sr.Head(0, 0)]), freeze={{sr.Norm(1, "{norm}")}})
'''


@pytest.mark.parametrize(
    ("family", "wrong", "said"),
    [
        ("gpt2", {"length": 25}, "counts has prompts of 25 tokens, beyond the model: it reads 24 at most"),
        ("gpt2", {"token": 61}, "counts: token id 61 at prompt 0, position 0 is not one of 0 to 60"),
        ("gptj", {"norm": "mlp"}, r"names L1.mlp_norm: .* and in each a norm before attention$"),
    ],
)
def test_what_a_recipe_of_ones_own_asks_that_a_model_does_not_have(wrapped, tmp_path, family, wrong, said):
    """Told before anything is computed, for prompts that a recipe makes as for those that are given."""
    (tmp_path / "own.py").write_text(OWN.format(**{"length": 8, "token": 5, "norm": "attention"} | wrong))
    with pytest.raises(UsageError, match=said):
        sr.run(str(tmp_path / "own.py"), model=wrapped(family), out=tmp_path / "s.zarr", progress=False)
