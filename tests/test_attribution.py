"""Attribution patching beside the exact effect: against differences, where everything is linear, and what it misses."""

import families
import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import selfrepair_nn as sr
from selfrepair_nn.errors import UsageError
from selfrepair_nn.figures import attribution as figure
from selfrepair_nn.models.load import wrap
from selfrepair_nn.text import missed

PROJECTIONS = {
    "gpt2": "transformer.h.{}.attn.c_proj",
    "neox-sequential": "gpt_neox.layers.{}.attention.dense",
    "llama-gqa": "model.layers.{}.self_attn.o_proj",
    "llama-biases": "model.layers.{}.self_attn.o_proj",
}


def summed_logits(module, tokens, layer=None, change=None):
    """Sum over positions of the centred logit of the next token, [prompt]; `change` is added to a layer's z."""
    hooks = []
    if layer is not None:
        hook = lambda _, args: (args[0] + change,)  # noqa: E731
        hooks.append(module.get_submodule(layer).register_forward_pre_hook(hook))
    with torch.no_grad():
        logits = module(tokens).logits[:, :-1]
    for each in hooks:
        each.remove()
    return (logits.gather(-1, tokens[:, 1:, None])[..., 0] - logits.mean(-1)).sum(1)


def values(module, tokens, layer):
    kept = []
    handle = module.get_submodule(layer).register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    with torch.no_grad():
        module(tokens)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("name", PROJECTIONS)
def test_it_is_the_derivative_along_the_ablation(name, measure, wrapped, seeded):
    """Central differences in float64, with hooks of the test's own: of all positions together, and of one."""
    zero = name == "llama-biases"
    ds = measure(name, components="none", ablation="zero" if zero else "resample", value_bias="head")
    found = sr.attribution(ds, wrapped(name, exact=True))
    module, tokens = wrapped(name, exact=True).module, torch.from_numpy(seeded(name))
    width, step = wrapped(name, exact=True).structure.d_head, 1e-4
    for layer, head in ((0, 1), (1, 0)):
        place = PROJECTIONS[name].format(layer)
        z = values(module, tokens, place)
        change = (0 * z if zero else z[ds.partner.values]) - z
        change[..., : head * width] = change[..., (head + 1) * width :] = 0
        one = change.clone()
        one[:, :2] = one[:, 3:] = 0
        for given, attributed in (
            (change, found.attribution.sel(layer=layer, head=head).sum("position")),
            (one, found.attribution.sel(layer=layer, head=head, position=2)),
        ):
            up, down = (summed_logits(module, tokens, place, sign * step * given) for sign in (1, -1))
            slope = ((up - down) / (2 * step)).numpy()
            assert np.abs(slope).max() > 1e-3
            np.testing.assert_allclose(attributed.values, slope, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def linear():
    """A layer whose attention and MLP stand side by side, norms that divide by a constant: what z does is linear."""
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 20, "max_position_embeddings": 16, "layer_norm_eps": 1e6}
    module = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, use_parallel_residual=True)).double().eval()
    families.randomise(module)
    return wrap(module)


def test_it_is_exact_where_everything_is_linear(linear, tmp_path):
    prompts = np.random.default_rng(0).integers(0, 40, (24, 9))
    ds = sr.run("heads", model=linear, prompts=prompts, out=tmp_path / "x.zarr", progress=False)
    found = sr.attribution(ds, linear)
    exact = ds.logit_change.sum("position")
    attributed = found.attribution.sum("position")
    assert float(abs(exact).min()) > 0
    np.testing.assert_allclose(attributed, exact, rtol=1e-4)
    np.testing.assert_allclose(found.attributed_change, found.logit_change, rtol=1e-4)
    np.testing.assert_allclose(found.correlation, 1, atol=1e-6)
    assert not found.false_negative.any()
    assert found.attrs["rank_correlation"] == pytest.approx(1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("attribution") / "x.zarr"
    choices = {"model": "tiny-neox", "tokens": 768, "length": 24, "layers": "6:", "progress": False}
    return sr.run("heads", out=out, **choices)


@pytest.fixture(scope="module")
def found(store):
    return sr.attribution(store)


def test_what_is_compared_is_the_same_mean(store, found):
    summary = sr.by_head(store)
    for name in ("logit_change", "removed", "self_repair", "from_heads", "from_mlps", "from_norm"):
        np.testing.assert_allclose(found[name], summary[name], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found[f"{name}_half_width"], summary[f"{name}_half_width"], rtol=1e-6, atol=1e-9)
    by_hand = found.attribution.sum("position").mean("prompt") / store.sizes["position"]
    np.testing.assert_allclose(found.attributed_change, by_hand, rtol=1e-6)
    sums = (x.sum("position").values for x in (found.attribution, store.logit_change.astype(float)))
    one, other = (x[1, 4] for x in sums)
    assert found.correlation.values[1, 4] == pytest.approx(np.corrcoef(one, other)[0, 1])
    split = -found.removed + found.from_heads + found.from_mlps + found.from_norm
    np.testing.assert_allclose(split, found.logit_change, atol=1e-6)


def test_a_missed_head_is_one_of_which_something_is_surely_removed(found):
    heads = sr.false_negatives(found)
    assert 0 < heads.sizes["rank"] == int(found.false_negative.sum())
    assert (np.diff(abs(heads.removed)) <= 0).all()
    reach = abs(heads.attributed_change) + heads.attributed_change_half_width
    assert (reach < 0.5 * abs(heads.removed)).all()
    assert (abs(heads.removed) > heads.removed_half_width).all()
    others = found.where(found.matters & ~found.false_negative)
    beyond = abs(others.attributed_change) + others.attributed_change_half_width >= 0.5 * abs(others.removed)
    assert beyond.values[np.isfinite(others.removed.values)].all()


def test_several_partners_have_the_mean_of_their_attributions(tmp_path):
    choices = {"model": "tiny-neox", "tokens": 64, "length": 16, "layers": "7:", "progress": False}
    ds = sr.run("heads", out=tmp_path / "x.zarr", resamples=2, **choices)
    mean = sr.attribution(ds).attribution
    each = [sr.attribution(ds.isel(resample=k)).attribution for k in range(2)]
    assert float(abs(each[0] - each[1]).max()) > 1e-3
    np.testing.assert_allclose(mean, (each[0] + each[1]) / 2, atol=1e-6)


def test_the_model_is_left_as_it_was(store, wrapped):
    model = sr.load("tiny-neox", check=False)
    sr.attribution(store, model)
    assert all(p.grad is None for p in model.module.parameters())
    assert not any(m._forward_pre_hooks for m in model.module.modules())


def test_what_has_no_gradient_says_why(store, found, wrapped):
    refused = {
        "on a server": store.assign_attrs(backend="remote"),
        "frozen: downstream": store.assign_attrs(freeze="downstream"),
        "mean ablation": store.assign_attrs(ablation="mean"),
        "all of its prompts": store.isel(prompt=slice(3)),
        "not a store": sr.by_head(store),
        "number between 0 and 1": store,
    }
    for told, ds in refused.items():
        with pytest.raises(UsageError, match=told):
            sr.attribution(ds, small=2.0 if ds is store else 0.5)
    with pytest.raises(sr.SelfRepairError, match="another model"):
        sr.attribution(store, "tiny-llama")
    with pytest.raises(UsageError, match="attribution"):
        sr.false_negatives(sr.by_head(store))
    with pytest.raises(UsageError, match="attribution"):
        figure.draw(sr.by_head(store))


def test_it_is_told_and_drawn(store, found, tmp_path, capsys, monkeypatch):
    from selfrepair_nn.cli import main

    count = int(found.false_negative.sum())
    monkeypatch.setattr("sys.argv", ["selfrepair", "attribution", store.encoding["source"], "--out", str(tmp_path)])
    main()
    told = capsys.readouterr().out
    assert missed(found) in told
    assert f"the attributed one in {count}" in told.replace("\n", " ")
    assert (tmp_path / "attribution.png").stat().st_size
    titles = [axes.get_title("left") or axes.get_title() for axes in figure.draw(found).axes]
    assert f"{count} heads that attribution misses" in titles
    assert max(map(len, told.splitlines())) <= max(100, len(str(tmp_path)) + 20)
