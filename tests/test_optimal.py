"""Optimal ablation: learned apart, never worse than the mean where it was learned, reported on other text."""

import json

import families
import numpy as np
import pytest
import torch
import xarray as xr
from numpy.testing import assert_allclose

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.choosing import selecting_half
from selfrepair_nn.components import Attention, Head, Mlp
from selfrepair_nn.constants import Constants, Optimal
from selfrepair_nn.errors import UsageError
from selfrepair_nn.graph import Graph

FAMILIES = ["gpt2", "neox-parallel", "llama-gqa", "gemma2", "gpt-oss", "mixtral"]
HEADS = [Head(0, 1), Head(2, 0), Head(1, 1), Head(2, 1)]


def loss_of(module, tokens, projection, width, head, constant):
    """Mean loss with a constant in a head's place, by a plain hook: a number that has a gradient."""

    def put(_, args):
        z = args[0].clone()
        z[..., head * width : (head + 1) * width] = constant
        return (z, *args[1:])

    handle = projection.register_forward_pre_hook(put)
    logits = module(tokens, use_cache=False).logits[:, :-1]
    handle.remove()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("name", FAMILIES)
def test_it_loses_less_than_the_mean_and_what_it_says_is_so(wrapped, seeded, name):
    """Each head by itself, though they share passes: as whole passes with plain hooks have it."""
    model, ids = wrapped(name, exact=True), seeded(name)
    s, module, tokens = model.structure, model.module, torch.as_tensor(ids)
    found = sr.optimal_constants(model, HEADS, ids, steps=6, tokens_per_pass=50)
    about, seen = found.about, {}
    for head in HEADS:
        layer = module.get_submodule(s.places["layers"])[head.layer]
        projection = layer.get_submodule(s.places["output_projection"])
        handle = projection.register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
        with torch.no_grad():
            own = torch.nn.functional.cross_entropy(
                module(tokens, use_cache=False).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            )
            handle.remove()
            mean = seen["z"].unflatten(-1, (s.n_heads, -1))[:, :, head.head].mean((0, 1))
            theirs = {"mean": mean, "optimal": torch.tensor(found[head])}
            losses = {k: loss_of(module, tokens, projection, s.d_head, head.head, x) for k, x in theirs.items()}
        assert_allclose(about["model_loss"], own, rtol=1e-6)
        for kind, loss in losses.items():
            assert_allclose(about[f"{kind}_loss"][head.label], loss, rtol=1e-6)
        assert losses["optimal"] < losses["mean"]


def test_it_finds_what_another_optimiser_finds(wrapped, seeded):
    """Against L-BFGS on one head, from the mean: nearly all that there is to gain."""
    name, head = "llama-gqa", Head(2, 1)
    model, ids = wrapped(name, exact=True), seeded(name)
    s, module, tokens = model.structure, families.build(name, exact=True).requires_grad_(False), torch.as_tensor(ids)
    projection = module.get_submodule(f"{s.places['layers']}.2.{s.places['output_projection']}")
    found = sr.optimal_constants(model, [head], ids, steps=300, rate=0.5)
    start = sr.optimal_constants(model, [head], ids, steps=0)[head]
    constant = torch.tensor(start, requires_grad=True)
    bfgs = torch.optim.LBFGS([constant], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        bfgs.zero_grad()
        loss = loss_of(module, tokens, projection, s.d_head, 1, constant)
        loss.backward()
        return loss

    bfgs.step(closure)
    best, first, ours = closure().item(), found.about["mean_loss"][head.label], found.about["optimal_loss"][head.label]
    assert first - best > 0.05
    assert ours <= best + 0.05 * (first - best)


def test_heads_together_are_heads_alone(wrapped, seeded):
    """And passes of any size, and with what counts alone."""
    model, ids = wrapped("gpt2", exact=True), seeded("gpt2")
    together = sr.optimal_constants(model, HEADS, ids, steps=4)
    for head in HEADS:
        alone = sr.optimal_constants(model, [head], ids, steps=4, tokens_per_pass=1)
        assert_allclose(alone[head], together[head], rtol=0, atol=1e-7)
    half = np.zeros((4, 7), bool)
    half[:2] = True
    some = sr.optimal_constants(model, HEADS, ids, steps=0, counted=half).about["model_loss"]
    assert_allclose(some, sr.optimal_constants(model, HEADS, ids[:2], steps=0).about["model_loss"], rtol=1e-6)


def test_the_model_is_as_it_was(seeded):
    """No gradient is left on it, none of its layers is changed, nor whether it trains."""
    model = sr.wrap(families.build("llama-gqa").train())
    module = model.module
    module.lm_head.requires_grad_(False)
    wanting = [x.requires_grad for x in module.parameters()]
    held = [{**vars(part)} for part in module.modules()]
    sr.optimal_constants(model, [Head(2, 0)], seeded("llama-gqa"), steps=2)
    assert [x.requires_grad for x in module.parameters()] == wanting
    assert all(x.grad is None for x in module.parameters())
    assert all(part.training for part in module.modules())
    assert [part.keys() for part in held] == [vars(part).keys() for part in module.modules()]
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_what_cannot_be_learned(wrapped, seeded):
    model, ids = wrapped("gpt2"), seeded("gpt2")
    for wrong, told in (
        ({"heads": [Head(9, 0)]}, "L9H0: .* has layers 0 to 2 of 5 heads"),
        ({"heads": []}, "heads is empty"),
        ({"heads": [Mlp(0)]}, "heads are such as Head"),
        ({"prompts": ids[0]}, r"prompts have shape \(8,\)"),
        ({"prompts": ids + 60}, "the model's are 0 to 60"),
        ({"steps": -1}, "steps must be a whole number"),
        ({"rate": 0}, "rate must be above 0"),
        ({"counted": np.ones((4, 8), bool)}, r"counted has shape \(4, 8\)"),
    ):
        with pytest.raises(UsageError, match=told):
            sr.optimal_constants(**{"model": model, "heads": HEADS, "prompts": ids, "steps": 1} | wrong)
    for case in ((Head(0, 0), Head(0, 1)), (Attention(1),)):
        with pytest.raises(UsageError, match="Optimal is learned for one head at a time"):
            Graph(ablate=(case,), replacement=Optimal())


# ---------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def stored(wrapped, tmp_path_factory):
    """stored(name, …): a store of the recipe, of a model whose prompts say more than two tokens each."""
    folder = tmp_path_factory.mktemp("optimal")

    def run(name="x", **choices):
        ids = families.random_ids(families.build("llama-gqa"), 44, 8)
        choices = {"prompts": ids, "layers": "1:3", "param": {"steps": 4}} | choices
        out = folder / f"{name}.zarr"
        return sr.run("optimal", model=wrapped("llama-gqa", exact=True), out=out, progress=False, **choices)

    return run


@pytest.fixture(scope="module")
def store(stored):
    return stored()


def test_the_optimum_loses_no_more_than_the_mean_where_it_was_learned(store):
    """Measured by the engine, of every head; and on the other half as it is."""
    found = sr.optimal_by_head(store)
    learned, held_out = (found.loss.sel(text=text) for text in ("learned on", "held out"))
    heads = learned.sel(ablation="optimal").notnull()
    assert int(heads.sum()) == 12
    losses, own = json.loads(store.constants)["about"], None
    half = selecting_half(store.document.values)
    for layer, head in np.argwhere(heads.values):
        label = Head(int(store.layer[layer]), int(head)).label
        own = losses["model_loss"]
        assert_allclose(learned.sel(ablation="optimal")[layer, head], losses["optimal_loss"][label] - own, atol=1e-9)
    assert bool((learned.sel(ablation="optimal") < learned.sel(ablation="mean").where(heads)).where(heads, True).all())
    change = store.logprob_change.sel(ablation="optimal").isel(layer=0, head=0).values
    assert_allclose(learned.sel(ablation="optimal")[0, 0], -change[half].mean(), atol=1e-12)
    assert_allclose(held_out.sel(ablation="optimal")[0, 0], -change[~half].mean(), atol=1e-12)
    assert_allclose(store.prompt.values[half], json.loads(store.selecting_prompts))
    excess = found.excess.sel(text="held out", ablation="zero")
    assert_allclose(excess, held_out.sel(ablation="zero") - held_out.sel(ablation="optimal"))
    assert np.isfinite(found.overall_excess_half_width).all()
    assert "reported on 22 others" in str(sr.summary(store))
    assert sr.optimal_by_head(found).identical(found)


def test_constants_from_a_file_are_the_same_ablation(stored, store, tmp_path):
    """Here and as it travels; a run that learned is resumed without learning again."""
    path = Constants.read(json.loads(store.constants)).save(tmp_path / "x.npz")
    param = {"constants": str(path)}
    for more in ({}, {"backend": "simulated", "batch_size": 20}):
        other = stored(f"file{len(more)}", param=param, **more)
        assert "found_on" not in other.attrs
        for part in ("logit_change", "self_repair", "logprob_change"):
            assert_allclose(other[part], store[part], rtol=0, atol=1e-9)
        assert sr.optimal_by_head(other)["text"].values.tolist() == ["run"]
    assert stored().identical(store)
    with pytest.raises(UsageError, match="does not exist"):
        stored("none", param={"constants": "none.npz"})


def test_in_shards_the_constants_are_learned_once(stored, store, monkeypatch):
    stored("parts", shard="1/2", batch_size=11)
    monkeypatch.setattr("selfrepair_nn.optimal.optimal_constants", None)
    whole = stored("parts", shard="2/2", batch_size=11)
    assert_allclose(whole.logit_change, store.logit_change, rtol=0, atol=1e-9)


def test_a_server_cannot_learn():
    with pytest.raises(UsageError, match="a server has no gradients: learn where the weights are"):
        sr.run("optimal", model="tiny-neox", host="http://127.0.0.1:9", tokens=256, length=32)


def test_other_stores_have_no_optimum(store):
    for ds, told in (
        (store.sel(ablation=["zero", "mean"]), "no optimal ablation beside others"),
        (store.sel(ablation=["optimal"]), "no optimal ablation beside others"),
        (store.assign_attrs(settings="{}"), "run with --logprob all"),
    ):
        with pytest.raises(UsageError, match=told):
            sr.optimal_by_head(ds)


def test_the_figure(store):
    alone = figures.draw("optimal", store)
    titles = [axes.get_title(loc="left") for axes in alone.axes[:3]]
    assert titles == ["heads", "what the ablation costs", "self-repair"]
    found = sr.optimal_by_head(store)
    dots = alone.axes[0].collections[-1].get_offsets()
    known = found.tokens.isel(text=-1).values > 0
    assert_allclose(dots[:, 1], found.loss.sel(text="held out", ablation="mean").values[known])
    assert len(figures.draw("optimal", {"a": store, "b": store}).axes) == 2 * len(alone.axes)
    assert isinstance(found, xr.Dataset)
