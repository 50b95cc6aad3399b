"""Experts: which ones each token uses, clean and ablated, and the clean choice kept; by plain hooks in float64.

What the package reads off a router's output is seen here where it arrives: in what the experts are called with. Llama
4's are called with every token times its weight for each of them, 0 where one is not chosen.
"""

from contextlib import ExitStack
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from test_sandbox import INSTALL, REQUIRED, assert_same, save_with_tokenizer

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.components import Head, Layers, Mlp, Parallel, Routing, Swap
from selfrepair_nn.errors import UsageError
from selfrepair_nn.estimating.traffic import crossing_bytes
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.layout.experiment import prepare
from selfrepair_nn.layout.plan import Work
from selfrepair_nn.models.load import load, wrap
from selfrepair_nn.options import Options
from selfrepair_nn.tracing.jobs import ablation_job
from selfrepair_nn.tracing.session import run_session

MIXTURES = (
    *("mixtral", "olmoe", "qwen2-moe", "qwen3-moe", "glm4-moe", "minimax-m2", "phi-moe", "granite-moe"),
    *("gpt-oss", "deepseek-v2", "deepseek-v3", "llama4", "jamba"),
)
ROUTED = {"glm4-moe": (1, 2), "deepseek-v2": (1, 2), "deepseek-v3": (1, 2), "llama4": (1,), "jamba": (1, 3)}
"""Layers with experts, where that is not all three."""
TIGHT, STOCK = 1e-9, 1e-5
IN_FLOAT32 = ("llama4", "jamba")
"""Whose norms or state spaces are computed in float32, whatever they are asked."""


# ---------------------------------------------------------------- plain hooks


class Plain:
    """Whole passes of a model, by hooks: a head's z taken from the partner's prompt, or experts called as before.

    A pass has `used` {layer: [prompt, position, choice]}, the experts in ascending order, `weights` as the experts get
    them, `z` and `logit` [prompt, position], the next token's less the mean.
    """

    def __init__(self, model, ids):
        self.model, self.ids, self.clean = model, ids, None
        self.mixtures = {
            layer: part.get_submodule(name.removesuffix(".experts"))
            for layer, part in enumerate(model.model.layers)
            for name, _ in part.named_modules()
            if name.endswith(".experts")
        }
        self.clean = self.run()

    def run(self, head=None, frozen=()):
        """A pass with a head (layer, head) ablated, in which these layers' experts are chosen as in the clean run."""
        seen = SimpleNamespace(used={}, weights={}, z={}, hidden={})
        with ExitStack() as stack, torch.no_grad():
            for layer, part in enumerate(self.model.model.layers):
                if not hasattr(part, "self_attn"):
                    continue
                hooked = part.self_attn.o_proj.register_forward_pre_hook(self._z(layer, head, seen))
                stack.callback(hooked.remove)
            for layer, part in self.mixtures.items():
                choose = self._weighted if type(part).__name__ == "Llama4TextMoe" else self._chosen
                kept = self.clean if layer in frozen else None
                for each, hook in (
                    (part, self._hidden(layer, seen)),
                    (part.experts, choose(layer, kept, seen)),
                ):
                    stack.callback(each.register_forward_pre_hook(hook).remove)
            logits = self.model(self.ids, use_cache=False).logits[:, :-1]
        seen.logit = logits.gather(-1, self.ids[:, 1:, None])[..., 0] - logits.mean(-1)
        return seen

    def _z(self, layer, head, seen):
        def hook(module, args):
            seen.z[layer] = args[0]
            if head is None or head[0] != layer:
                return None
            heads = self.model.config.num_attention_heads
            z, partner = (
                x.clone().unflatten(-1, (heads, -1)) for x in (args[0], self.clean.z[layer].roll(1, 0))
            )
            z[:, :, head[1]] = partner[:, :, head[1]]
            return (z.flatten(-2),)

        return hook

    def _hidden(self, layer, seen):
        def hook(module, args):
            seen.hidden[layer] = args[0].flatten(0, -2)

        return hook

    def _chosen(self, layer, kept, seen):
        """Experts that are called with tokens, experts and weights."""

        def hook(module, args):
            chosen, weights = args[1:] if kept is None else kept.weights[layer]
            seen.weights[layer] = chosen, weights
            seen.used[layer] = self._by_position(chosen)
            return args[0], chosen, weights

        return hook

    def _weighted(self, layer, kept, seen):
        """Llama 4's, one for each token: its weight is the sigmoid of the router's largest product with the token."""

        def hook(module, args):
            source = seen if kept is None else kept
            products = source.hidden[layer] @ self.mixtures[layer].router.weight.T
            largest, chosen = products.max(-1, keepdim=True)
            weights = torch.zeros_like(products).scatter(-1, chosen, largest.float().sigmoid().double())
            seen.used[layer] = self._by_position(chosen)
            given = (weights.T[..., None] * seen.hidden[layer]).flatten(0, 1)
            assert kept is not None or torch.allclose(given, args[0], rtol=1e-12)
            return (given,)

        return hook

    def _by_position(self, chosen):
        return chosen.view(*self.ids.shape, -1).sort(-1)[0][:, :-1]


@cache
def plain(name):
    """The oracle of an exact tiny model; the same weights as the package's."""
    model = families.build(name, exact=True)
    return Plain(model, torch.as_tensor(families.random_ids(model)))


def heads_of(name):
    return [(layer, 1 + layer % 2) for layer in plain(name).clean.z]


def planned(model, name, cases=None, **graph):
    cases = sweep(Head(*head) for head in heads_of(name)) if cases is None else cases
    return Graph(ablate=cases, also="routing", **graph).plan(model.layout) | {"tokens_per_pass": 64}


def arrays_of(name):
    ids = plain(name).ids
    return {"tokens": ids, "partner_tokens": ids.roll(1, 0)}


@pytest.fixture(scope="module")
def job(wrapped):
    """job(name, layers): the ablation job's result with these layers' routing frozen."""

    @cache
    def run(name, frozen=()):
        model = wrapped(name, exact=True)
        plan = planned(model, name, freeze=frozenset(map(Routing, frozen)))
        return run_session(ablation_job, model.nn, arrays_of(name), plan)

    return run


def side_by_side(used):
    return torch.cat([used[layer] for layer in sorted(used)], -1)


# ---------------------------------------------------------------- recorded


@pytest.mark.parametrize("name", MIXTURES)
def test_where_experts_are(wrapped, name):
    structure = wrapped(name, exact=True).structure
    assert structure.routed == tuple(plain(name).mixtures) == ROUTED.get(name, (0, 1, 2))
    assert structure.experts == 4
    assert structure.n_choices == next(iter(plain(name).clean.used.values())).shape[-1]


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_those_that_are_called(job, name):
    """Clean and ablated, every token's; and the share that is new, counted as sets."""
    found, oracle = job(name), plain(name)
    clean = side_by_side(oracle.clean.used)
    assert_array_equal(found["routing"], clean)
    for case, head in enumerate(heads_of(name)):
        used = oracle.run(head).used
        assert_array_equal(found["ablated_routing"][case], side_by_side(used))
        reached = [layer for layer in used if layer >= head[0]]
        assert_allclose(found["rerouted"][case], share_of_new(used, oracle.clean.used, reached), atol=1e-12)
    assert 0.02 < found["rerouted"].mean() < 0.9


def share_of_new(used, clean, layers):
    """Of the experts in these layers, the share that is not in the clean set: [prompt, position]."""
    shape = next(iter(used.values())).shape[:2]
    share = np.zeros(shape)
    for at in np.ndindex(*shape) if layers else ():
        new = [len({*used[layer][at].tolist()} - {*clean[layer][at].tolist()}) for layer in layers]
        share[at] = sum(new) / sum(used[layer].shape[-1] for layer in layers)
    return share


# ---------------------------------------------------------------- frozen


@pytest.mark.parametrize("name", MIXTURES)
def test_frozen_routing_is_the_clean_one(job, name):
    """Against experts that are called with the clean pass's choice and weights; and it is not the live run."""
    layers = plain(name).mixtures
    found, live, oracle = job(name, tuple(layers)), job(name), plain(name)
    for case, head in enumerate(heads_of(name)):
        for run, frozen in ((live, ()), (found, layers)):
            change = oracle.run(head, frozen).logit - oracle.clean.logit
            assert_allclose(run["logit_change"][case], change, atol=STOCK if name in IN_FLOAT32 else TIGHT)
        assert_array_equal(found["ablated_routing"][case], found["routing"])
    assert (found["rerouted"] == 0).all()
    moved = live["rerouted"] > 0
    assert (found["logit_change"] - live["logit_change"])[moved].abs().mean() > 1e-2


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3"])
def test_one_layers_routing_alone(job, name):
    found, oracle, head = job(name, (1,)), plain(name), heads_of(name)[0]
    ablated = oracle.run(head, (1,))
    assert_allclose(found["logit_change"][0], ablated.logit - oracle.clean.logit, atol=TIGHT)
    assert_array_equal(found["ablated_routing"][0], side_by_side(ablated.used))
    assert found["rerouted"][0].mean() > 0


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_where_nothing_is_ablated_nothing_is_rerouted(name):
    """The null control, with live and with clean routing."""
    model = wrap(plain(name).model)
    freeze = frozenset(map(Routing, model.structure.routed))
    for frozen in (frozenset(), freeze):
        plan = planned(model, name, replacement="identity", freeze=frozen)
        found = run_session(ablation_job, model.nn, arrays_of(name), plan)
        assert found["rerouted"].abs().max() == 0
        assert found["logit_change"].abs().max() < TIGHT


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_parts_add_up_with_clean_routing(wrapped, name):
    model = wrapped(name, exact=True)
    cases = ((Head(0, 1), Mlp(1)), (Mlp(0),))
    plan = planned(model, name, cases, freeze={Routing(1), Routing(2)}, record="full")
    found = run_session(ablation_job, model.nn, arrays_of(name), plan)
    scale, after = found["norm_scale"], found["ablated_norm_scale"]
    before = found["logit"] - found["target_constant"]
    change = (before + found["component_change"].sum(-1)) * scale / after - before
    assert_allclose(found["logit_change"], change, atol=TIGHT)


def test_where_only_the_last_stream_is_compared_routing_is_the_same(wrapped, job):
    """With record "total" no part is read but the routers."""
    model, layers = wrapped("mixtral", exact=True), (1, 2)
    for frozen in ((), layers):
        plan = planned(model, "mixtral", freeze=frozenset(map(Routing, frozen)), record="total")
        found, whole = run_session(ablation_job, model.nn, arrays_of("mixtral"), plan), job("mixtral", frozen)
        assert "from_heads" not in found
        for name in ("routing", "ablated_routing", "rerouted", "logit_change"):
            assert_allclose(found[name], whole[name], atol=TIGHT, err_msg=name)


# ---------------------------------------------------------------- where it runs


@pytest.mark.skipif(
    find_spec("ndif") is None and not REQUIRED, reason=f"the job was NOT tried without weights: {INSTALL}"
)
def test_it_is_the_same_without_weights(tmp_path):
    """In the process of a shared server; and about as much crosses as is foretold."""
    from sandbox import Sandbox

    save_with_tokenizer("gpt-oss", tmp_path)
    model = load(str(tmp_path), check=False)
    sandbox = Sandbox(model.nn, str(tmp_path))
    ids = torch.as_tensor(families.random_ids(model.module, 16, 24))
    arrays, planned_bytes, bytes_crossed = {"tokens": ids, "partner_tokens": ids.roll(1, 0)}, [], []
    frozen = frozenset(map(Routing, model.structure.routed))
    try:
        for also, freeze in (((), ()), ("routing", ()), ("routing", frozen)):
            graph = Graph(ablate=sweep(Head(layer, 1) for layer in range(3)), also=also, freeze=freeze)
            plan = graph.plan(model.layout) | {"tokens_per_pass": 1024}
            here = run_session(ablation_job, model.nn, arrays, plan)
            assert_same(sandbox.run(ablation_job, arrays, plan), here)
            assert not also or (here["rerouted"].mean() > 0.05) == (not freeze)
            work = Work(None, {"": graph}, model.structure, *ids.shape, len(ids), 1024)
            planned_bytes.append(crossing_bytes(work, 4))
            bytes_crossed.append(sandbox.crossed)
    finally:
        sandbox.close()
    (more, no_more), (planned_more, _) = np.diff(bytes_crossed), np.diff(planned_bytes)
    assert no_more == 0
    assert 0.7 < planned_more / more < 1


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The recipe's stores of a mixture, run here and simulated, of a third of the tokens."""
    folder, model = tmp_path_factory.mktemp("stores"), wrap(families.build("mixtral", exact=True))
    choices = {"prompts": families.random_ids(model.module, 24, 8), "share": 0.3, "progress": False}
    return {
        backend: sr.run(
            "routing", model=model, out=folder / f"{backend}.zarr", backend=backend, layers="1:", **choices
        ).load()
        for backend in ("local", "simulated")
    }


def test_simulated_is_local(stores):
    for name, values in stores["local"].variables.items():
        assert_array_equal(stores["simulated"][name], values, err_msg=name)


def test_a_store_has_the_experts_of_top_tokens(stores):
    """Of the top share, and of nothing else, by variant; the clean ones of every token."""
    ds = stores["local"]
    assert ds.routing.dims == ("prompt", "position", "choice")
    assert ds.choice_layer.values.tolist() == [0, 0, 1, 1, 2, 2]
    assert int(ds.routing.min()) >= 0
    kept = (ds.ablated_routing >= 0).all("choice")
    assert_array_equal(kept, (ds.ablated_routing >= 0).any("choice"))
    effects = ds.direct_effect.transpose("layer", "head", ...).values.reshape(8, -1)
    count = int(0.3 * effects.shape[1])
    top = effects >= np.sort(effects)[:, [-count]]
    for variant in kept:
        assert_array_equal(variant.values.reshape(8, -1), top)
    new = (ds.ablated_routing != ds.routing).where(kept)
    assert float(new.sel(frozen="routing").max()) == 0
    assert float(new.sel(frozen="nothing", choice=ds.choice_layer == 0).max()) == 0
    assert float(new.sel(frozen="nothing").mean()) > 0.01


def test_a_selection_of_tokens_keeps_the_same(stores, tmp_path):
    """Only top tokens are ablated, from one prompt's start to its last of them."""
    ds, model = stores["local"], wrap(families.build("mixtral", exact=True))
    choices = {"prompts": families.random_ids(model.module, 24, 8), "share": 0.3, "layers": "1:"}
    experiment = prepare("routing", Options(model=model, **choices))
    assert {d: experiment.work.sizes[d] for d in ds.sizes} == dict(ds.sizes)
    out = tmp_path / "selected.zarr"
    some = sr.run("routing", model=model, out=out, progress=False, select="top-share", **choices).load()
    for name in ("routing", "ablated_routing"):
        assert_array_equal(some[name], ds[name])
    kept = (ds.ablated_routing >= 0).all("choice")
    assert_array_equal(some.rerouted.notnull(), kept)
    assert_allclose(some.rerouted, ds.rerouted.where(kept))


def test_self_repair_by_rerouting_is_the_difference(stores):
    """What the figure shows, by plain NumPy; and what is re-routed, by layer."""
    ds = stores["local"]
    live, clean = (ds.self_repair.sel(frozen=label) for label in ("nothing", "routing"))
    found = sr.differences(ds, 1.0)
    assert_allclose(found.self_repair.sel(frozen="routing"), (clean - live).mean(("prompt", "position")))
    assert abs(float((live - clean).mean())) > 1e-3
    summary = sr.by_variant(ds, 1.0)
    assert_allclose(
        summary.rerouted, ds.rerouted.mean(("prompt", "position")).transpose(*summary.rerouted.dims)
    )
    assert np.isfinite(summary.rerouted_half_width).all()
    assert figures.suited(ds) == ["routing"]
    [layers, change, moved] = figures.draw("routing", ds, share=1.0).axes
    lines = [line for line in change.lines if len(line.get_xdata()) == 2]
    expected = (live - clean).mean(("prompt", "position", "head"))
    assert any(np.allclose(line.get_ydata(), expected) for line in lines)
    lines = [line.get_ydata() for line in moved.lines]
    expected = ds.rerouted.sel(frozen="nothing").mean(("prompt", "position", "head"))
    assert any(len(y) == 2 and np.allclose(y, expected) for y in lines)
    assert len(figures.draw("routing", [ds, ds], share=1.0).axes) == 6
    assert [text.get_text() for text in layers.get_legend().get_texts()] == ["live routing", "clean routing"]


# ---------------------------------------------------------------- refused


def test_models_without_experts_are_refused(wrapped, tmp_path):
    with pytest.raises(UsageError, match=r"routing needs a mixture of experts, and this model has none"):
        sr.run("routing", model="tiny-neox", out=tmp_path / "x.zarr")
    structure = wrapped("gpt2").structure
    for graph in (
        Graph(sweep([Head(0, 0)]), also="routing"),
        Graph(sweep([Head(0, 0)]), freeze={Routing(0)}),
    ):
        assert graph.misfit(structure) == "routing is that of a mixture of experts, and the model has none"


def test_a_layer_without_experts_is_named():
    structure = wrap(plain("llama4").model).structure
    graph = Graph(sweep([Head(0, 0)]), freeze={Routing(0), Routing(1)})
    assert graph.misfit(structure) == "L0.routing: no mixture of experts is in that layer, but in 1"
    assert Graph(sweep([Head(0, 0)]), freeze={Routing(1)}, also="routing").misfit(structure) is None
    assert Graph(sweep([Head(0, 0)]), freeze={Routing(7)}).beyond(structure) == "L7.routing"


@pytest.mark.parametrize("site", [Layers(0, 1), Swap(0), Parallel(0, 2)])
def test_whole_layers_have_no_routing(site):
    with pytest.raises(UsageError, match="routing is not followed into whole layers"):
        Graph(sweep([site]), "zero", also="routing")


def test_a_mixture_runs_in_float64(tmp_path):
    """What multiplies experts in groups, as transformers chooses, has no float64."""
    save_with_tokenizer("mixtral", tmp_path / "model")
    ids = families.random_ids(plain("mixtral").model)
    choices = {"prompts": ids, "dtype": "float64", "progress": False, "out": tmp_path / "x.zarr", "share": 0.5}
    ds = sr.run("routing", model=str(tmp_path / "model"), **choices)
    assert ds.rerouted.dtype == np.float64
    assert float(ds.rerouted.sel(frozen="nothing").mean()) > 0.01
