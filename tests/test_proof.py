"""The proof of a model at every run: whoever loaded it, in the state it is in, against the logits that it returns."""

import json

import families
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import selfrepair_nn as sr
from selfrepair_nn.errors import SelfRepairError, UnsupportedModel, UsageError
from selfrepair_nn.models.load import check, load


@pytest.fixture
def module():
    return families.build("llama-gqa")


@pytest.fixture
def run(tmp_path):
    def once(model, name="s", **choices):
        given = {"prompts": families.random_ids(families.build("llama-gqa"), 6, 12), "ablation": "zero"}
        return sr.run(model=model, out=tmp_path / f"{name}.zarr", progress=False, **given | choices).load()

    return once


def returning(module, change):
    """The module with something done to its logits behind the unembedding."""

    class Changed(LlamaForCausalLM):
        def forward(self, *args, **more):
            out = super().forward(*args, **more)
            out.logits = change(out.logits)
            return out

    module.__class__ = Changed
    return module


@pytest.mark.parametrize(
    "change",
    [
        lambda x: 0.25 * x,
        lambda x: 5 * torch.tanh(x / 5),
        lambda x: x + 1e-3 * x.roll(1, -1),
        lambda x: x + 1.0,
        lambda x: x.log_softmax(-1),
    ],
    ids=["scale", "cap", "mixture", "shift", "softmax"],
)
def test_what_follows_the_unembedding_is_seen(run, module, change):
    with pytest.raises(UnsupportedModel, match="components add up to the logit"):
        run(returning(module, change))


def test_the_same_under_a_wrapper_and_with_the_check_left_out(run, module):
    changed = returning(module, lambda x: 0.25 * x)
    with pytest.raises(UnsupportedModel):
        run(sr.wrap(changed))
    assert run(sr.wrap(changed), check=False).done.all()


@pytest.mark.parametrize("layer", range(3))
def test_a_hook_left_over_on_any_layer(run, module, layer):
    """On a layer that a pass skips it acts on what stands for its output too."""
    module.model.layers[layer].register_forward_hook(lambda module, args, output: output + 0.01)
    with pytest.raises(UnsupportedModel, match=rf"On the model: hook .* on model\.layers\.{layer}"):
        run(module)


def test_a_hook_on_an_attention_of_the_last_layer_only(run, module):
    module.model.layers[2].self_attn.register_forward_hook(lambda m, a, out: (out[0] * 1.01, *out[1:]))
    with pytest.raises(UnsupportedModel):
        run(module)


def test_it_is_computed_in_evaluation_mode_and_left_as_it_was(run, tmp_path):
    module = families.build("gpt2")
    ids = families.random_ids(module, 6, 12)
    known = run(module, prompts=ids)
    module.train()
    module.transformer.h[1].eval()
    found = run(module, "train", prompts=ids)
    np.testing.assert_array_equal(found.self_repair, known.self_repair)
    assert module.training
    assert module.transformer.h[0].attn.attn_dropout.training
    assert not module.transformer.h[1].training
    assert not module.transformer.h[1].attn.attn_dropout.training


def test_noise_of_its_own_is_seen(run, module):
    """What draws at random whatever the mode cannot be compared with itself."""
    module.model.layers[1].mlp.register_forward_hook(lambda m, a, out: out + 1e-3 * torch.randn_like(out))
    with pytest.raises(UnsupportedModel):
        run(module)


def test_under_autocast_nothing_is_computed(run, module):
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(UsageError, match="autocast to bfloat16"):
        run(module.float())


def test_autocast_within_the_model_is_seen(run, module):
    module = module.float()
    forward = module.model.forward

    def inner(*args, **more):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(*args, **more)

    module.model.forward = inner
    with pytest.raises(UnsupportedModel):
        run(module)


def test_the_run_s_own_prompts_are_tried_too(run, module):
    """Something that only long inputs meet: the proof's own is of eight tokens."""

    def late(m, args, out):
        return out * 1.01 if out.ndim == 3 and out.shape[1] > 8 else out

    module.model.norm.register_forward_hook(late)
    assert all(each.passed for each in check(sr.wrap(module)))
    with pytest.raises(UnsupportedModel, match="a pass gives the logits"):
        run(module)


# ---------------------------------------------------------------- the files of a model


def saved(name, folder):
    families.build(name).save_pretrained(folder)
    return folder


def test_weights_that_the_configuration_does_not_use(tmp_path):
    folder = saved("llama-biases", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    with pytest.raises(SelfRepairError, match=r"8 weights .*layers\.0\.self_attn\.k_proj\.bias") as refused:
        sr.run(model=folder, prompts=np.ones((2, 4), int), ablation="zero", out=tmp_path)
    assert "configuration that belongs to them" in str(refused.value)
    assert not list(tmp_path.glob("*.zarr"))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("score.weight", "score"),
        ("model.layers.3.mlp.up_proj.weight", r"layers\.3"),
        ("model.layers.0.self_attn.q_norm.weight", "q_norm"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("model.layers.0.self_attn.masked_bias", None),
    ],
)
def test_only_what_is_made_anew_is_passed_over(tmp_path, key, said):
    folder = saved("llama-gqa", tmp_path / "m")
    path = folder / "model.safetensors"
    save_file(load_file(path) | {key: torch.ones(3, 3)}, path, metadata={"format": "pt"})
    if said is None:
        assert load(str(folder)).structure.n_layers == 3
    else:
        with pytest.raises(SelfRepairError, match=said):
            load(str(folder))


def test_fewer_layers_than_there_are_weights_for(tmp_path):
    folder = saved("llama-gqa", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "layer_types": None}))
    with pytest.raises(SelfRepairError, match=r"layers\.2"):
        load(str(folder))


def test_an_unembedding_of_its_own_under_a_configuration_that_ties_it(run, tmp_path):
    """transformers then keeps both; what is measured is the model that it makes."""
    folder = saved("llama-tied", tmp_path / "m")
    path = folder / "model.safetensors"
    weights = load_file(path)
    other = torch.randn(
        weights["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(1)
    )
    save_file(weights | {"lm_head.weight": other.double()}, path, metadata={"format": "pt"})
    found = run(folder, dtype="float64")
    module = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.from_numpy(families.random_ids(families.build("llama-gqa"), 6, 12))
    with torch.no_grad():
        logits = module(ids).logits[:, :-1]
    known = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.mean(-1)
    np.testing.assert_allclose(found.logit, known, atol=1e-5)


# ---------------------------------------------------------------- the device that was asked for


def test_nnsight_is_told_to_leave_a_model_where_it_is(module, monkeypatch):
    """It would move it to the first GPU otherwise."""
    import nnsight

    told = {}

    class Told(nnsight.TransformersModel):
        def __init__(self, *args, **more):
            told.update(more)
            super().__init__(*args, **more)

    monkeypatch.setattr("nnsight.TransformersModel", Told)
    model = sr.wrap(module)
    assert told["device"] == torch.device("cpu") == next(model.module.parameters()).device
    assert model.device == "cpu"


def test_a_gpu_beside_does_not_get_the_model(monkeypatch, module):
    """As transformers sees it there is a GPU, and it moves what it is not told to leave."""
    from transformers.pipelines import base

    moved = []
    monkeypatch.setattr(base, "is_torch_cuda_available", lambda: True)
    monkeypatch.setattr(type(module), "to", lambda self, *where: moved.append(where) or self)
    sr.wrap(module)
    assert moved == []


def test_where_a_model_is_asked_to_compute(monkeypatch):
    from selfrepair_nn.models import load as room

    asked = []

    class Module(torch.nn.Module):
        def to(self, device):
            asked.append(device)
            return self

    loading = {"missing_keys": set(), "unexpected_keys": set()}
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *args, **more: (Module(), loading)
    )
    described = room.describe("tiny-neox")
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(1))
    for device in ("cpu", "cuda:1"):
        room._module(described, "float32", room._device(device, "float32"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert room._device("auto", "float32") == "cuda"
    assert room._device("cpu", "float32") == "cpu"
    assert asked == ["cpu", "cuda:1"]


def test_float64_on_a_mac_is_refused_in_words():
    with pytest.raises(UsageError, match="Mac's GPU has no float64"):
        load("tiny-neox", dtype="float64", device="mps")


# ---------------------------------------------------------------- whatever is handed over


def test_models_in_every_form(run, module, tmp_path):
    """A name, a path, a module, a wrapped one, an nnsight model, a compiled one: the same numbers."""
    import nnsight

    known = run(sr.wrap(module), "wrapped")
    module.save_pretrained(tmp_path / "m")
    forms = {
        "module": families.build("llama-gqa"),
        "nnsight": nnsight.NNsight(families.build("llama-gqa")),
        "compiled": torch.compile(families.build("llama-gqa")),
        "again": module,
    }
    for name, form in forms.items():
        np.testing.assert_allclose(run(form, name).self_repair, known.self_repair, atol=1e-12)
    for form in (tmp_path / "m", str(tmp_path / "m")):
        found = run(form, "named", dtype="float64")
        np.testing.assert_allclose(found.self_repair, known.self_repair, atol=1e-6)


def test_an_nnsight_model_with_edits_is_refused(module):
    import nnsight

    model = nnsight.NNsight(module)
    with model.edit(inplace=True):
        model.model.layers[0].mlp.output[:] = 0
    with pytest.raises(UsageError, match="clear_edits"):
        sr.wrap(model)


def test_a_module_brings_the_tokenizer_of_its_name(tmp_path):
    from transformers import AutoModelForCausalLM

    from selfrepair_nn.models.load import find

    where = find("tiny-llama").location
    module = AutoModelForCausalLM.from_pretrained(where)
    found = sr.run(model=module, tokens=256, layers="7", out=tmp_path / "s.zarr", progress=False)
    assert "".join(found.token_text.values[0]).strip()
    assert not found.token_text.values[0][3].isdecimal()


@pytest.mark.parametrize("model", [5, ["tiny-neox"], {"a": 1}, torch.nn.Linear(2, 2), torch.ones(2)])
def test_what_is_no_model(model, tmp_path):
    with pytest.raises(UsageError, match=r"is no model|is no Hugging Face") as refused:
        sr.run(model=model, out=tmp_path)
    assert "\n" not in str(refused.value)
