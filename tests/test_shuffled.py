"""A shuffled target: what is stored of it against hooks in float64, and what share arises without the target."""

import families
import numpy as np
import pytest
import torch

import selfrepair_nn as sr
from selfrepair_nn.errors import UsageError
from selfrepair_nn.layout.experiment import prepare
from selfrepair_nn.options import Options
from selfrepair_nn.prompts import shuffled_targets

ALSO = 'also=("shuffled_target",)'
MODULES = {
    "gpt2": ("transformer.ln_f", "transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    "neox-parallel": tuple(
        f"gpt_neox.{each}" for each in ("final_layer_norm", "layers.{}.attention.dense", "layers.{}.mlp.dense_4h_to_h")
    ),
    "llama-gqa": ("model.norm", "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
}


def recipe(folder, body):
    path = folder / "own.py"
    lines = ['"""Mine."""', "import selfrepair_nn as sr", "def graph(s, options):", f"    return {body}"]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_no_position_has_its_own_token_and_all_are_had_once():
    rng = np.random.default_rng(0)
    for size in (2, 5, 40):
        for prompt in range(20):
            targets = rng.permutation(np.arange(size) // 2 if size > 4 else np.arange(size))
            order = shuffled_targets(targets, 3, prompt)
            assert (np.sort(order) == np.arange(size)).all()
            assert (targets[order] != targets).all()
    assert (shuffled_targets(np.arange(40), 3, 1) == shuffled_targets(np.arange(40), 3, 1)).all()
    assert (shuffled_targets(np.arange(40), 3, 1) != shuffled_targets(np.arange(40), 3, 2)).any()
    assert (shuffled_targets(np.arange(40), 3, 1) != shuffled_targets(np.arange(40), 4, 1)).any()
    assert sorted(shuffled_targets(np.array([7, 7, 7, 1]), 0, 0)) == [0, 1, 2, 3]


def hooked(module, tokens, wanted, place=None, z=None):
    """What enters these modules in a pass in which `z`, if given, takes the input's place at `place`; plain hooks."""
    kept, handles = {}, []
    for name in wanted:
        take = lambda _, args, name=name: kept.update({name: args[0].clone()})  # noqa: E731
        handles.append(module.get_submodule(name).register_forward_pre_hook(take))
    if place:
        handles.append(module.get_submodule(place).register_forward_pre_hook(lambda _, args: (z,)))
    with torch.no_grad():
        module(tokens)
    for handle in handles:
        handle.remove()
    return kept


def rows_of(weight, transposed):
    return weight if transposed else weight.T


@pytest.mark.parametrize("name", MODULES)
def test_everything_of_a_shuffled_target_is_what_hooks_find(name, wrapped, seeded, tmp_path):
    """DE of the head, the norm's part, and of every neuron its change and clean DE, for d of the shuffled target."""
    norm_name, head_name, mlp_name = MODULES[name]
    model, prompts = wrapped(name, exact=True), seeded(name)
    module, tokens = model.module, torch.from_numpy(prompts)
    last, layer, head, width = model.structure.n_layers - 1, 0, 1, model.structure.d_head
    body = f"sr.Graph(ablate=sr.sweep([sr.Head({layer}, {head})]), neurons={last}, {ALSO}, value_bias='head')"
    partners = families.derangement(4)
    choices = {"partners": partners, "share": 1.0, "progress": False}
    ds = sr.run(recipe(tmp_path, body), model=model, prompts=prompts, out=tmp_path / "x.zarr", **choices).load()

    places = [norm_name, head_name.format(layer), mlp_name.format(last)]
    clean = hooked(module, tokens, places)
    own = slice(head * width, (head + 1) * width)
    z = clean[places[1]].clone()
    z[..., own] = clean[places[1]][partners][..., own]
    after = hooked(module, tokens, places, places[1], z)

    norm, unembedding = module.get_submodule(norm_name), module.get_output_embeddings().weight
    centred = name != "llama-gqa"
    centre = (lambda x: x - x.mean(-1, keepdim=True)) if centred else (lambda x: x)
    epsilon = getattr(norm, "eps", None) or norm.variance_epsilon
    scale, ablated = ((centre(x[norm_name]) ** 2).mean(-1).add(epsilon).sqrt()[:, :-1] for x in (clean, after))
    target = torch.from_numpy(ds.shuffled_target.values)
    direction = centre(norm.weight * (unembedding[target] - unembedding.mean(0)))
    effects = {
        key: (x[norm_name][:, :-1] * direction).sum(-1) / scale for key, x in (("before", clean), ("after", after))
    }
    weights = [rows_of(module.get_submodule(place).weight, name == "gpt2") for place in places[1:]]
    writes = clean[places[1]][:, :-1, own] @ weights[0][own]
    one = ds.squeeze(["layer", "head"])
    close = {"rtol": 1e-9, "atol": 1e-10}
    np.testing.assert_allclose(one.shuffled_direct_effect, ((writes * direction).sum(-1) / scale).detach(), **close)
    np.testing.assert_allclose(one.shuffled_from_norm, ((scale / ablated - 1) * effects["after"]).detach(), **close)
    before, later = (x[places[2]][:, :-1] * (direction @ weights[1].T) / scale[..., None] for x in (clean, after))
    most, which = (later - before).max(-1)
    np.testing.assert_allclose(one.shuffled_neuron_change, most.detach(), **close)
    expected = before.gather(-1, which[..., None])[..., 0].detach()
    np.testing.assert_allclose(one.shuffled_neuron_direct_effect, expected, **close)
    np.testing.assert_allclose(one.shuffled_mlp_change, (later - before).sum(-1).detach(), **close)
    assert float(abs(one.shuffled_from_norm - one.from_norm).max()) > 1e-3


def test_the_shuffled_target_is_stored_and_does_not_depend_on_units(tmp_path):
    choices = {"model": "tiny-neox", "tokens": 96, "length": 16, "heads": "6.1,7.0", "progress": False}
    one = sr.run("norm_share", out=tmp_path / "one.zarr", **choices).load()
    two = sr.run("norm_share", out=tmp_path / "two.zarr", batch_size=1, **choices).load()
    other = sr.run("norm_share", out=tmp_path / "other.zarr", seed=4, partners=one.partner.values, **choices).load()
    np.testing.assert_array_equal(one.shuffled_target, two.shuffled_target)
    np.testing.assert_allclose(one.shuffled_from_norm, two.shuffled_from_norm, atol=2e-5)
    assert (other.shuffled_target != one.shuffled_target).any()
    assert not (one.shuffled_target == one.target).any()
    for row, given in zip(one.target.values, one.shuffled_target.values, strict=True):
        assert sorted(row) == sorted(given)
    alone = sr.run("heads", out=tmp_path / "h.zarr", **choices)
    np.testing.assert_array_equal(one.from_norm, alone.from_norm)


def test_it_is_asked_for_only_where_it_can_be():
    refused = {
        "reinforced": "sr.Graph(ablate=sr.sweep([sr.Head(1, 0)]), replacement=sr.Reinforce(2), ALSO)",
        "of ablated heads": "sr.Graph(ablate=sr.sweep([sr.Mlp(1)]), neurons=2, ALSO)",
    }
    for told, body in refused.items():
        with pytest.raises(UsageError, match=told):
            eval(body.replace("ALSO", ALSO), {"sr": sr})


def test_nothing_of_it_goes_with_a_request_that_does_not_ask(tmp_path):
    experiment = prepare("heads", Options(model="tiny-neox", tokens=64, length=16))
    from selfrepair_nn.tracing.cases import realised

    plan = experiment.graph.plan({**vars(experiment.description.structure), "spread": True})
    assert realised(plan)["readings"] == []
    assert "shuffled_positions" not in experiment.arrays(slice(0, 2))


def made(seed, linked):
    """A store whose norm gives back 30% of the target's effect, or as much to any target."""
    ds, rng = sr.simulate_heads(2, 10, 40, 10, seed=seed), np.random.default_rng(seed)
    wrong = ds.direct_effect.copy(data=rng.permuted(ds.direct_effect.values, axis=3))
    gain = 0.3 if linked else 0.3 * rng.random(ds.direct_effect.shape)
    other = 0.3 * rng.random(ds.direct_effect.shape) * (not linked)
    names = {"shuffled_direct_effect": wrong, "from_norm": gain * ds.direct_effect, "shuffled_from_norm": other * wrong}
    return ds.assign(names).assign_coords(document=("prompt", np.arange(40)))


def test_the_norms_share_beyond_a_shuffled_target():
    linked = sr.norm_by_head(made(0, linked=True), 0.1)
    np.testing.assert_allclose(linked.norm_share, 0.3, rtol=1e-5)
    np.testing.assert_allclose(linked.norm_shuffled, 0, atol=1e-12)
    np.testing.assert_allclose(linked.norm_over_shuffled, 0.3, rtol=1e-5)
    inside = []
    for seed in range(6):
        found = sr.norm_by_head(made(seed, linked=False), 0.1)
        inside.append(abs(found.norm_over_shuffled) <= found.norm_over_shuffled_half_width)
    assert 0.88 <= float(np.mean(inside)) <= 0.995


def test_the_share_of_a_shuffled_target_by_hand():
    """Its own two tokens of largest effect: ratios 1/2 and 3 there."""
    ds = made(0, linked=True).isel(layer=[0], head=[0], prompt=[0, 1], position=[0, 1])
    given = {"shuffled_direct_effect": [[4, 1], [0.5, 2]], "shuffled_from_norm": [[2, 9], [9, 6]]}
    given |= {"direct_effect": [[1, 4], [2, 0.5]], "from_norm": [[9, -4], [1, 9]]}
    ds = ds.assign({n: (ds.self_repair.dims, np.array(v, float)[None, None]) for n, v in given.items()})
    found = sr.norm_by_head(ds, 0.5).squeeze()
    assert float(found.norm_shuffled) == 0.75
    assert float(found.norm_share) == 0.25
    assert float(found.norm_over_shuffled) == -0.5
    assert float(found.top_shuffled_from_norm) == 9


@pytest.fixture(scope="module")
def neurons(tmp_path_factory):
    out = tmp_path_factory.mktemp("shuffled") / "x.zarr"
    choices = {"model": "tiny-neox", "tokens": 768, "length": 24, "progress": False}
    return sr.run("neurons", out=out, **choices).load()


def test_erasure_of_a_shuffled_target_is_counted_on_its_own_tokens(neurons):
    found = sr.erasure_neurons(neurons, 0.05)
    repairs = sr.neuron_sparsity(neurons, 0.02)
    for rank in range(found.sizes["rank"]):
        one = neurons.sel(layer=int(found.layer[rank]), head=int(found["head"][rank]))
        flat = {n: one[n].values.ravel().astype(float) for n in one.data_vars if n.startswith("shuffled_")}
        best = np.argsort(-flat["shuffled_mlp_change"])[: int(0.05 * flat["shuffled_mlp_change"].size)]
        erased = (flat["shuffled_neuron_direct_effect"] < 0) & (flat["shuffled_neuron_change"] > 0)
        assert float(found.shuffled[rank]) == pytest.approx(erased[best].mean())
        assert float(found.over_shuffled[rank]) == pytest.approx(float(found.anti_erasing[rank]) - erased[best].mean())
        effect = flat["shuffled_direct_effect"]
        top = np.argsort(-effect)[: int(0.02 * effect.size)]
        for index, part in enumerate(repairs.part.values):
            share = (flat["shuffled_neuron_change"][top] >= part * effect[top]).mean()
            assert float(repairs.first_shuffled[rank, index]) == pytest.approx(share)


def test_the_null_is_in_the_figures(neurons, tmp_path):
    from selfrepair_nn import figures

    text = " ".join(t.get_text() for axes in figures.draw("erasure_neurons", neurons).axes for t in (axes.texts))
    inset = [t.get_text() for a in figures.draw("erasure_neurons", neurons).axes for c in a.child_axes for t in c.texts]
    assert any("shuffled target" in each for each in [text, *inset])
    labels = figures.draw("norm_share", made(0, linked=True).assign_attrs(recipe="norm_share"), share=0.1).axes[3]
    assert "clipped, of a shuffled target" in [t.get_text() for t in labels.get_legend().get_texts()]
