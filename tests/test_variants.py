"""Recipes of variants, end to end, against plain hooks in float64, and by their identities."""

from contextlib import contextmanager

import families
import numpy as np
import oracle
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.components import Attention, FinalNorm, Head, Mlp, Norm, site
from selfrepair_nn.errors import UsageError
from selfrepair_nn.options import Options
from selfrepair_nn.recipe import find_recipe

TIGHT = 1e-10
COMPARED = ("logit_change", "self_repair", "from_heads", "from_mlps", "from_norm", "ablated_norm_scale")
RECIPES = (
    "ablation_kinds",
    "freeze",
    "freeze_norms",
    "path_patching",
    "self_reinforcement",
    "layer_position",
)


@pytest.fixture
def stored(wrapped, seeded, tmp_path):
    """stored(recipe, family, **choices): the recipe's store of an exact float64 model on its seeded prompts."""

    def run(recipe, name, **choices):
        choices = {"prompts": seeded(name), "out": tmp_path / f"{recipe}-{name}.zarr"} | choices
        if choices.get("ablation", "resample") == "resample" and recipe not in UNPARTNERED:
            choices["partners"] = families.derangement(len(choices["prompts"]))
        return sr.run(recipe, model=wrapped(name, exact=True), progress=False, **choices).load()

    return run


UNPARTNERED = ("self_reinforcement", "layer_position")


def llama():
    """A model of its own, which a test may change, and its prompts."""
    model = families.build("llama-gqa", exact=True)
    return model, torch.as_tensor(families.random_ids(model))


@contextmanager
def hooked(*handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def centred_logits(model, ids):
    """The next token's logit less the mean logit: [prompt, position]."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.double()[:, :-1]
    return (logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.mean(-1)).numpy()


def without_head(model, layer, head):
    """Write 0 into one head's slice of the output projection's input."""
    projection = model.model.layers[layer].self_attn.o_proj

    def hook(module, args):
        z = args[0].clone().unflatten(-1, (model.config.num_attention_heads, -1))
        z[:, :, head] = 0
        return (z.flatten(-2),)

    return projection.register_forward_pre_hook(hook)


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "llama-gqa"])
def test_three_kinds_of_ablation(stored, seeded, name):
    found = stored("ablation_kinds", name, layers="0,-1")
    assert list(found["ablation"].values) == ["resample", "mean", "zero"]
    model, ids = families.build(name, exact=True), seeded(name)
    heads = [(int(i), int(j)) for i in found["layer"] for j in found["head"]]
    for kind in found["ablation"].values:
        partners = families.derangement(len(ids))
        theirs = oracle.reference(model, ids, ablation=str(kind), partners=partners, heads=heads)
        ours = found.sel(ablation=kind)
        for layer, head in heads:
            for what in COMPARED:
                one = ours[what].sel(layer=layer, head=head)
                assert_allclose(one, theirs[what][layer, head], atol=TIGHT, err_msg=f"{kind} {what}")


def test_length_of_the_residual_stream(stored):
    found = stored("ablation_kinds", "llama-gqa", heads="0.1,2.3")
    model, ids = llama()
    lengths = []
    watch = model.model.norm.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].double().norm(dim=-1)[:, :-1].numpy())
    )
    with hooked(watch):
        centred_logits(model, ids)
        for layer, head in ((0, 1), (2, 3)):
            with hooked(without_head(model, layer, head)):
                centred_logits(model, ids)
    assert_allclose(found.residual_norm, lengths[0], rtol=TIGHT)
    zero = found.ablated_residual_norm.sel(ablation="zero")
    assert_allclose(zero.sel(layer=0, head=1), lengths[1], rtol=TIGHT)
    assert_allclose(zero.sel(layer=2, head=3), lengths[2], rtol=TIGHT)


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "llama-gqa"])
def test_freezing_by_the_oracle_and_by_the_equations(stored, seeded, name):
    found = stored("freeze", name, layers=":2")
    model, ids = families.build(name, exact=True), seeded(name)
    frozen = {"nothing": None, "all but the final norm": "downstream", "everything": "all"}
    for label, freeze in frozen.items():
        partners = families.derangement(len(ids))
        theirs = oracle.reference(model, ids, partners=partners, freeze=freeze)
        for what in COMPARED:
            ours = found[what].sel(frozen=label)
            assert_allclose(ours, theirs[what][:2], atol=TIGHT, err_msg=f"{label} {what}")
    own = found.ablated_direct_effect - found.direct_effect
    assert_allclose(found.logit_change.sel(frozen="everything"), own.sel(frozen="everything"), atol=TIGHT)
    alone = found.sel(frozen="all but the final norm")
    stretch = alone.norm_scale / alone.ablated_norm_scale
    appendix_b = (stretch - 1) * (alone.logit - alone.target_constant) + stretch * (
        alone.ablated_direct_effect - alone.direct_effect
    )
    assert_allclose(alone.logit_change, appendix_b.transpose(*alone.logit_change.dims), atol=TIGHT)
    assert abs(found.self_repair.sel(frozen="nothing") - alone.self_repair).max() > 1e-3


def test_freezing_one_norm_by_hand(stored):
    """The norm before the MLP divides by what it divided by in the clean run."""
    found = stored("freeze_norms", "llama-gqa", heads="1.2", ablation="zero")
    model, ids = llama()
    norm, clean = model.model.layers[2].post_attention_layernorm, []

    def scale(x):
        return (x.double().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()

    with hooked(norm.register_forward_pre_hook(lambda module, args: clean.append(scale(args[0])))):
        before = centred_logits(model, ids)
    keep = norm.register_forward_hook(lambda module, args, output: norm.weight.double() * args[0] / clean[0])
    with hooked(keep, without_head(model, 1, 2)):
        kept = centred_logits(model, ids) - before
    with hooked(without_head(model, 1, 2)):
        free = centred_logits(model, ids) - before
    ours = found.logit_change.sel(layer=1, head=2)
    assert_allclose(ours.sel(norm="L2.mlp_norm"), kept, atol=TIGHT)
    assert_allclose(ours.sel(norm="none"), free, atol=TIGHT)
    assert np.abs(kept - free).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "first"), [("llama-gqa", ["L1.mlp_norm"]), ("neox-parallel", ["L2.attention_norm"])]
)
def test_the_norms_are_those_that_the_ablation_reaches(stored, name, first):
    found = stored("freeze_norms", name, heads="1.0")
    norms = list(found["norm"].values)
    assert norms[:2] == ["none", *first]
    assert norms[-2:] == ["final_norm", "all"]
    assert "L1.attention_norm" not in norms
    changes = sr.differences(found, 1.0).logit_change.sel(layer=1, head=0)
    assert changes.sel(norm="none") == 0
    assert (abs(changes.sel(norm=norms[1:])) > 1e-6).all(), "each norm that is named matters"


def test_a_frozen_final_norm_repairs_nothing(stored):
    found = stored("freeze_norms", "gpt2", heads="1.0")
    assert_allclose(found.from_norm.sel(norm=["final_norm", "all"]), 0, atol=TIGHT)
    assert abs(found.from_norm.sel(norm="none")).max() > 1e-3


def test_the_only_receiver_is_the_plain_ablation(stored):
    """Behind the last layer's attention of a sequential model nothing but its MLP can react."""
    found = stored("path_patching", "llama-gqa", layers="-1")
    assert list(found["receiver"].values) == ["none", "L2.mlp", "all"]
    for what in COMPARED:
        assert_allclose(found[what].sel(receiver="L2.mlp"), found[what].sel(receiver="all"), atol=TIGHT)
    assert_allclose(found.from_mlps.sel(receiver="none"), 0, atol=TIGHT)
    assert abs(found.from_mlps.sel(receiver="all")).max() > 1e-3


def test_a_receiver_alone_reacts(stored):
    found = stored(
        "path_patching", "gpt2", heads="0.1", param={"receivers": ("L1.attention", "L1H2", "L2.mlp")}
    )
    assert list(found["receiver"].values) == ["none", "L1.attention", "L1H2", "L2.mlp", "all"]
    assert_allclose(found.from_mlps.sel(receiver=["none", "L1.attention", "L1H2"]), 0, atol=TIGHT)
    assert_allclose(found.from_heads.sel(receiver=["none", "L2.mlp"]), 0, atol=TIGHT)
    assert (
        abs(found.from_heads.sel(receiver="L1.attention") - found.from_heads.sel(receiver="L1H2")).max()
        > 1e-6
    )
    plain = stored("freeze", "gpt2", heads="0.1")
    assert_array_equal(
        found.self_repair.sel(receiver="none"), plain.self_repair.sel(frozen="all but the final norm")
    )
    assert_array_equal(found.self_repair.sel(receiver="all"), plain.self_repair.sel(frozen="nothing"))


def test_receivers_that_are_none(wrapped, seeded, tmp_path):
    for label, said in (("MLP 3", "names no place"), ("L9.mlp", "L9.mlp cannot receive")):
        with pytest.raises(UsageError, match=said):
            sr.run(
                "path_patching",
                model=wrapped("gpt2"),
                prompts=seeded("gpt2"),
                out=tmp_path / "x.zarr",
                param={"receivers": (label,)},
            )


def test_reinforced_heads_by_hand(stored):
    found = stored("self_reinforcement", "llama-gqa", heads="1.2", param={"scales": (0, 1, 3)})
    model, ids = llama()
    block, n_heads = model.model.layers[1], model.config.num_attention_heads
    W = block.self_attn.o_proj.weight.detach().double().T.unflatten(0, (n_heads, -1))[2]
    seen, final = [], []
    watch = [
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].double().unflatten(-1, (n_heads, -1))[:, :, 2] @ W)
        ),
        model.model.norm.register_forward_pre_hook(lambda module, args: final.append(args[0].double())),
    ]
    where = torch.as_tensor(found.edited_position.values)[:, None] == torch.arange(ids.shape[1])
    with hooked(*watch):
        before = centred_logits(model, ids)
        rows = model.lm_head.weight.detach().double()
        d = (rows[ids[:, 1:]] - rows.mean(0)) * model.model.norm.weight.detach().double()
        S = (final[0].pow(2).mean(-1) + model.model.norm.variance_epsilon).sqrt()[:, :-1]
        for scale in (1, 3):
            added = scale * seen[0] * where[..., None]
            add = block.register_forward_pre_hook(
                lambda module, args, added=added: (args[0] + added, *args[1:])
            )
            with hooked(add):
                after = centred_logits(model, ids)
            effect = (seen[-1][:, :-1] * d).sum(-1) / S
            ours = found.sel(scale=scale, layer=1, head=2)
            assert_allclose(ours.ablated_direct_effect, effect, atol=TIGHT)
            assert_allclose(ours.logit_change, after - before, atol=TIGHT)
            assert np.abs(effect - ours.direct_effect.values).max() > 1e-4
    nothing = found.sel(scale=0)
    assert_array_equal(nothing.logit_change, 0)
    assert_array_equal(nothing.ablated_direct_effect, nothing.direct_effect)
    lines = sr.reinforcement_by_head(found)
    at = found.edited_position.values
    assert_array_equal(
        lines.before[0, 0], [row[i] for row, i in zip(found.direct_effect.values[0, 0], at, strict=True)]
    )
    assert_array_equal(lines.slope.sel(scale=0), 0)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_deleted_by_hand(stored, layer):
    found = stored("layer_position", "llama-gqa")
    model, ids = llama()
    before = centred_logits(model, ids)
    out = model.model.layers[layer].register_forward_hook(lambda module, args, output: args[0])
    with hooked(out):
        after = centred_logits(model, ids)
    one = found.sel(case=f"layer {layer}")
    assert_allclose(one.logit_change, after - before, atol=TIGHT)
    assert_allclose(one.ablated_direct_effect, 0, atol=TIGHT)
    assert int(one.case_layer) == layer


def test_neighbours_swapped_by_hand(stored):
    found = stored("layer_position", "llama-gqa")
    model, ids = llama()
    before = centred_logits(model, ids)
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    assert_allclose(found.logit_change.sel(case="swap 0,1"), centred_logits(model, ids) - before, atol=TIGHT)
    assert list(found["case"].values) == ["layer 0", "layer 1", "layer 2", "swap 0,1", "swap 1,2"]


class Sizes:
    n_layers, n_heads, headless, parallel, norms, post_norms = 6, 2, (), False, ("attention", "mlp"), False


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_what_is_chosen_is_ablated(recipe):
    found = find_recipe(recipe)
    chosen = found.graph(Sizes, found.resolved(Options(heads="3.1", ablation="zero")))
    graphs = chosen.graphs.values() if recipe != "layer_position" else []
    assert all(graph.ablate == ((Head(3, 1),),) for graph in graphs)
    late = found.graph(Sizes, found.resolved(Options()))
    if recipe != "layer_position":
        assert {case[0].layer for graph in late.graphs.values() for case in graph.ablate} == {4, 5}
        few = 4 if recipe in ("freeze_norms", "path_patching") else None
        assert {graph.strongest for graph in late.graphs.values()} == {few}


def test_freezing_adds_to_what_is_frozen():
    graph = sr.Graph(ablate=sr.sweep([Head(0, 0)])).freezing([Mlp(1)]).freezing([FinalNorm(), Norm(1, "mlp")])
    assert graph.freeze == {Mlp(1), FinalNorm(), Norm(1, "mlp")}


@pytest.mark.parametrize("place", [Head(9, 6), Attention(0), Mlp(12)])
def test_a_label_names_its_place(place):
    assert site(place.label) == place


@pytest.mark.parametrize("label", ["L9", "9.6", "L1.norm", "", 7])
def test_a_label_that_names_nothing(label):
    with pytest.raises(UsageError, match="names no place"):
        site(label)


@pytest.mark.parametrize("recipe", representative(RECIPES, "freeze"))
@pytest.mark.parametrize("model", representative(["tiny-neox", "tiny-llama"], "tiny-llama"))
def test_recipes_summarise_and_draw_what_they_store(recipe, model, tmp_path):
    size = {"tokens": 64, "length": 8} | ({} if recipe == "layer_position" else {"heads": "5.0,7.1"})
    found = sr.run(recipe, model=model, out=tmp_path / "x.zarr", progress=False, **size)
    assert model in str(sr.summary(found))
    names = find_recipe(recipe).figures
    assert sorted(p.stem for p in sr.plot(found, tmp_path)) == sorted([*names, *names])
