"""The law of the rooms that run inside the model: what they may touch, and how much the model may be made to work."""

import ast
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn import tracing
from selfrepair_nn.components import Head
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.layout.plan import Work
from selfrepair_nn.tracing.jobs import ablation_job
from selfrepair_nn.tracing.session import run_session

MODULES = sorted(Path(tracing.__file__).parent.glob("*.py"))
ALLOWED = {"torch": None, "nnsight": {"save"}, "functools": None}
FORBIDDEN = {"weight", "bias", "parameters", "named_parameters", "state_dict", "buffers", "grad", "backward"}
FAMILIES = ["gpt2", "gptj", "neox-parallel", "neox-sequential", "llama-gqa", "opt"]


# ---------------------------------------------------------------- what the code may name


def imports(tree):
    """(module, names or None) of every import of a module, wherever it stands in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), {alias.name for alias in node.names}


def lawful_import(module, names):
    """torch, functools, nnsight's save, and each other."""
    if module.startswith("selfrepair_nn.tracing."):
        return True
    root = module.split(".")[0]
    return root in ALLOWED and (ALLOWED[root] is None or (names or {"?"}) <= ALLOWED[root])


def touched(tree):
    """Every attribute that a module names, also in getattr and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            yield from (a.value for a in node.args[1:2] if isinstance(a, ast.Constant))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_and_attributes(path):
    tree = ast.parse(path.read_text())
    assert [found for found in imports(tree) if not lawful_import(*found)] == []
    assert FORBIDDEN & set(touched(tree)) == set()


def test_the_law_can_be_broken():
    """Else the test above says nothing."""
    for unlawful in ("import numpy", "from nnsight import trace", "import nnsight", "from . import x"):
        assert not all(lawful_import(*found) for found in imports(ast.parse(unlawful)))
    for unlawful in ("from selfrepair_nn.graph import Graph", "def f():\n    import os"):
        assert not all(lawful_import(*found) for found in imports(ast.parse(unlawful)))
    for unlawful in ("layer.weight.T", "getattr(layer, 'bias')", "loss.backward()"):
        assert FORBIDDEN & set(touched(ast.parse(unlawful)))
    assert len(MODULES) > 5


# ---------------------------------------------------------------- how much the model works


@contextmanager
def counting(model):
    """Calls and rows of every module of the real model, by its name, while the block runs."""
    calls, rows = Counter(), Counter()

    def hook(name):
        def count(module, args, output):
            calls[name] += 1
            first = output[0] if isinstance(output, tuple) else output
            rows[name] += first.shape[:-1].numel() if isinstance(first, torch.Tensor) else 0

        return count

    module = model.nn._module
    handles = [part.register_forward_hook(hook(name)) for name, part in module.named_modules()]
    try:
        yield calls, rows
    finally:
        for handle in handles:
            handle.remove()


def work(model, ids, cases, rows, replacement="resample", **graph):
    """Calls and rows of every module during one job."""
    tokens = torch.as_tensor(ids)
    arrays = {"tokens": tokens, "partner_tokens": tokens.roll(1, 0)}
    graph = Graph(ablate=cases, replacement=replacement, **graph)
    with counting(model) as counted:
        run_session(ablation_job, model.nn, arrays, graph.plan(model.layout) | {"tokens_per_pass": rows})
    return counted


def in_layer(model, layer, part):
    """The full name of a part of a layer."""
    places = model.structure.places
    return f"{places['layers']}.{layer}.{places[part]}"


@pytest.mark.parametrize("record", ["sums", "full"])
@pytest.mark.parametrize("name", representative(FAMILIES, "gpt2", "llama-gqa"))
def test_no_product_with_the_vocabulary_in_the_ablated_passes(wrapped, seeded, name, record):
    """The unembedding sees the rows of the probe, however many heads are ablated, in however many passes."""
    model, ids = wrapped(name), seeded(name)
    unembedding = model.structure.places["unembedding"]
    one, every = sweep((Head(0, 0),)), sweep(tuple(Head(0, h) for h in range(model.structure.n_heads)))
    probing = model.structure.d_model + 1
    for cases in (one, every, every * 3):
        for limit in (1, 10**6):
            _, rows = work(model, ids, cases, limit, record=record)
            assert rows[unembedding] == probing


@pytest.mark.parametrize("name", FAMILIES)
def test_the_counter_sees_the_vocabulary(wrapped, seeded, name):
    """A whole pass makes that product for every token: the hook of the test above would have seen it."""
    model, ids = wrapped(name), seeded(name)
    with counting(model) as (_, rows), torch.no_grad():
        model.nn._module(torch.as_tensor(ids), use_cache=False)
    assert rows[model.structure.places["unembedding"]] == ids.size


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_work_is_proportional(wrapped, seeded, name, layer):
    """More passes in layer l: no part of a layer below runs again, nor l's attention; nor l's MLP if parallel."""
    model, ids = wrapped(name), seeded(name)
    structure = model.structure
    cases = sweep(tuple(Head(layer, h) for h in range(structure.n_heads)))
    once, often = work(model, ids, cases, 10**6)[0], work(model, ids, cases, 1)[0]
    more = structure.n_heads - 1
    places = structure.places
    inside = {n: often[n] - once[n] for n in often if n.startswith(f"{places['layers']}.")}
    for name_of_part, extra in inside.items():
        at_layer = int(name_of_part.removeprefix(f"{places['layers']}.").split(".")[0])
        whole_layer = name_of_part == f"{places['layers']}.{at_layer}"
        if at_layer < layer and not whole_layer:
            assert extra == 0, name_of_part
    parts = ("output_projection", "value", "mlp")
    for k in range(structure.n_layers):
        expected = dict.fromkeys(parts, more if k > layer else 0)
        expected["mlp"] = more if k >= layer + structure.parallel else 0
        assert {part: inside[in_layer(model, k, part)] for part in parts} == expected


@pytest.mark.parametrize("replacement", ["resample", "zero"])
@pytest.mark.parametrize("name", FAMILIES)
def test_several_heads_ride_in_one_pass(wrapped, seeded, name, replacement):
    """Whole passes: the clean one, the partners', the probe, and as many as `rows` makes of the heads of each layer."""
    model, ids = wrapped(name), seeded(name)
    heads = tuple(Head(layer, h) for layer in range(3) for h in range(model.structure.n_heads))
    for batch in (1, 2, 3, 10**3):
        calls, rows = work(model, ids, sweep(heads), batch * ids.size, replacement)
        ablated = 3 * -(-model.structure.n_heads // min(batch, model.structure.n_heads))
        clean = 2 if replacement == "resample" else 1
        assert calls[""] == clean + 1 + ablated
        graph = Graph(ablate=sweep(heads), replacement=replacement)
        planned = Work(None, {"": graph}, model.structure, len(ids), ids.shape[1], len(ids), batch * ids.size)
        assert planned.cost()["passes"] == ablated
        # the last layer's MLP does all clean rows, one of the probe, and those of every head that reaches it
        reached = len(heads) - (model.structure.n_heads if model.structure.parallel else 0)
        final = rows[in_layer(model, 2, "mlp")]
        assert final == (clean + reached) * ids.size + 1


def test_progress_is_told_after_every_pass(wrapped, seeded):
    """The ticks add up to the cases, pass by pass."""
    model, tokens = wrapped("gpt2"), torch.as_tensor(seeded("gpt2"))
    cases = sweep(tuple(Head(layer, h) for layer in (0, 2) for h in range(5)))
    plan = Graph(ablate=cases, replacement="zero").plan(model.layout) | {"tokens_per_pass": 3 * tokens.numel()}
    ticks = []
    run_session(ablation_job, model.nn, {"tokens": tokens}, plan, ticks.append)
    assert ticks == [3 * len(tokens), 2 * len(tokens)] * 2


def test_layers_below_the_first_ablated_one_are_not_probed(wrapped, seeded):
    """Reading out a late head asks nothing of the early layers but to run."""
    model, ids = wrapped("gpt2"), seeded("gpt2")
    calls, _ = work(model, ids, sweep((Head(2, 0),)), 10**6)
    early, late = (calls[in_layer(model, layer, "output_projection")] for layer in (0, 2))
    assert early == 3  # clean, partners, the probe's own pass
    assert late == 3 + 2  # … and called with zero and with the identity


# ---------------------------------------------------------------- one body, wherever it runs


@pytest.mark.parametrize("choices", [{"components": "all"}, {"ablation": "mean"}, {"freeze": "all"}])
@pytest.mark.parametrize("name", representative(["gpt2", "neox-parallel", "llama-gqa"], "llama-gqa"))
def test_simulated_is_local(wrapped, seeded, tmp_path, name, choices):
    """The code and the arrays by value, run with our modules hidden: the same bits."""
    stores = {}
    for backend in ("local", "simulated"):
        out = tmp_path / f"{backend}.zarr"
        stores[backend] = sr.run(
            model=wrapped(name), prompts=seeded(name), out=out, backend=backend, progress=False, **choices
        ).load()
    assert stores["simulated"].backend == "simulated"
    for variable in stores["local"].variables:
        assert_array_equal(stores["simulated"][variable], stores["local"][variable], err_msg=variable)
    assert np.abs(stores["local"].direct_effect).mean() > 1e-2


EDITS = '''"""Sites, replacements and records of every kind."""

import selfrepair_nn as sr

PARAMETERS = {"what": "mixed"}


def graph(structure, options):
    mixed = ((sr.Head(0, 1), sr.Mlp(0), sr.Neuron(1, 2)), (sr.Attention(1),), (sr.Mlp(1), sr.Head(1, 0)))
    heads, sizes = sr.sweep([sr.Head(0, 1), sr.Head(2, 0)]), (structure.n_layers, structure.n_heads)
    norms = frozenset({sr.Norm(1, "mlp"), sr.Norm(2, "attention"), sr.Mlp(2)})
    graphs = {
        "mixed": sr.Graph(mixed, neurons=2, residual_norm=True, freeze=norms),
        "mean": sr.Graph(mixed, "mean", record="full"),
        "deleted": sr.Graph(sr.sweep([sr.Layers(0, 2), sr.Layers(1, 2)]), "zero", record="full"),
        "swapped": sr.Graph(sr.sweep([sr.Swap(0), sr.Permuted((2, 0, 1)), sr.Parallel(0, 3)]), "zero"),
        "path": sr.Graph(heads, attention=(0, 2)).path((sr.Mlp(2),), *sizes),
        "scale": sr.Variants("scale", {s: sr.Graph(heads, sr.Reinforce(s)) for s in (0.5, 3.0)}),
        "other": sr.Graph(heads, sr.OtherHead(sr.Head(1, 1))),
    }
    return graphs[options.param["what"]]
'''


@pytest.mark.parametrize(
    "what", representative(["mixed", "mean", "deleted", "swapped", "path", "scale", "other"], "mixed", "path", "scale")
)
def test_simulated_is_local_for_every_kind_of_edit(wrapped, seeded, tmp_path, what):
    """… and for recipes of one's own, whose code never travels."""
    (tmp_path / "mine.py").write_text(EDITS)
    stores = {}
    for backend in ("local", "simulated"):
        stores[backend] = sr.run(
            str(tmp_path / "mine.py"),
            model=wrapped("neox-sequential"),
            prompts=seeded("neox-sequential"),
            out=tmp_path / f"{backend}.zarr",
            backend=backend,
            progress=False,
            share=0.2,
            param={"what": what},
        ).load()
    for variable in stores["local"].variables:
        assert_array_equal(stores["simulated"][variable], stores["local"][variable], err_msg=variable)
    assert np.abs(stores["local"].logit_change).mean() > 1e-3
