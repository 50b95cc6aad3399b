"""Finding, describing, loading and checking models."""

import dataclasses

import families
import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from selfrepair_nn.errors import UnsupportedModel, UsageError
from selfrepair_nn.models.architectures import SUPPORTED, architecture_of, structure_of
from selfrepair_nn.models.check import require
from selfrepair_nn.models.load import EMBEDDED, check, describe, find, load, wrap
from selfrepair_nn.models.refused import REASONS


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_passes_the_check(name):
    findings = check(wrap(families.build(name)))
    assert len(findings) == 6
    assert all(each.passed for each in findings), findings


@pytest.mark.parametrize("name", families.REFUSED)
def test_what_cannot_be_decomposed_is_refused_with_the_reason(name):
    with pytest.raises(UnsupportedModel, match=r"supported are|head by head: it") as refused:
        wrap(families.REFUSED[name]())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("model_type", [*(t for t in REASONS if t in CONFIG_MAPPING), "t5"])
def test_a_family_that_does_not_add_up_is_refused_for_what_it_does(model_type):
    with pytest.raises(UnsupportedModel) as refused:
        architecture_of(CONFIG_MAPPING[model_type]())
    assert f"this {model_type} model cannot be decomposed" in str(refused.value)
    assert REASONS.get(model_type, "an encoder reads the text") in str(refused.value)


def test_of_a_multimodal_model_the_text_part_is_named():
    with pytest.raises(UnsupportedModel, match="this gemma3n_text model, the text part of this gemma3n model, cannot"):
        architecture_of(CONFIG_MAPPING["gemma3n"]())


def test_an_unknown_family_lists_the_supported():
    with pytest.raises(UnsupportedModel) as refused:
        wrap(families.REFUSED["diffllama"]())
    assert all(name in str(refused.value) for name in SUPPORTED)


def test_a_family_in_name_only_fails_the_check():
    """A Llama whose layers do one thing more than the sum: supported by name, refused by measurement."""
    module = families.build("llama-gqa")
    layer = module.model.layers[0]
    layer.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(UnsupportedModel, match="cannot be decomposed exactly"):
        require(wrap(module))


@pytest.mark.parametrize("what", ["final norm", "unembedding"])
def test_a_bent_last_step_fails_the_check(what):
    module = families.build("llama-gqa")
    bent = module.model.norm if what == "final norm" else module.lm_head
    bent.register_forward_hook(lambda module, args, output: torch.tanh(output / 3) * 3)
    with pytest.raises(UnsupportedModel, match="add up to the logit"):
        require(wrap(module))


def test_a_layer_that_says_it_returns_one_tensor_is_believed():
    """GPT-J's layers returned a tuple until transformers 5.24."""
    module = families.build("gptj")

    class Newer(type(module.transformer.h[0])):
        def forward(self, hidden_states) -> torch.Tensor:
            return hidden_states

    module.transformer.h[0].__class__ = Newer
    assert "layer" not in structure_of(module).returns


def test_structure_needs_no_weights():
    module = families.build("llama-headdim")
    with torch.device("meta"):
        bare = type(module)(module.config)
    assert structure_of(bare) == structure_of(module)
    assert structure_of(bare).d_head != module.config.hidden_size // module.config.num_attention_heads


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_are_described_and_loaded(name):
    model = load(name)
    assert model.structure == describe(name).structure
    assert (model.structure.n_layers, model.structure.n_heads) == (8, 8)
    assert model.tokenizer is not None
    assert model.tokenizer.name_or_path == name


def test_embedded_models_predict_text():
    """Trained, not random: far below the log of the vocabulary on text they were not trained on."""
    from selfrepair_nn.prompts import load_prompts

    for name in EMBEDDED:
        model = load(name)
        prompts = load_prompts("sample", model.tokenizer, tokens=2048, length=128)
        rows = torch.from_numpy(prompts.tokens)
        with torch.no_grad():
            loss = model.nn._module(rows, labels=rows, use_cache=False).loss.item()
        assert loss < 4.3, (name, loss)


def test_saved_directory_without_tokenizer(tmp_path):
    families.build("opt").save_pretrained(tmp_path / "opt")
    model = load(str(tmp_path / "opt"), dtype="float64")
    assert model.tokenizer is None
    assert model.dtype == "float64"
    assert model.structure.model_type == "opt"


@pytest.mark.parametrize(
    ("name", "said", "unsaid"),
    [
        (
            "gpt2",
            "LayerNorm before attention, another before the MLP|learned positions|output has a bias",
            "window|experts",
        ),
        (
            "llama-gqa",
            "RMSNorm before|3 heads share keys|value-bias changes nothing",
            "LayerNorm|bias$|capped",
        ),
        ("gptj", "one LayerNorm for attention and MLP|side by side", "reads the heads"),
        ("mistral-sliding", "reaches back 3 tokens", "experts"),
        ("mistral", "RMSNorm before", "reaches back"),
        (
            "granite-moe",
            "multiplied by 0.4|logits are multiplied by 0.5|mixture of 4 experts|neurons are not",
            "side by side",
        ),
        ("gemma2", "RMSNorm behind attention and MLP|capped at 2|reaches back 4", "mixture"),
        ("olmo3", "RMSNorm behind attention and MLP|reaches back 4", "RMSNorm before|one RMSNorm"),
        ("gpt-neo", "reaches back 4 tokens", "mixture"),
        ("llama4", "mixture of 4 experts", "side by side"),
    ],
)
def test_a_structure_says_what_is_special(name, said, unsaid):
    told = "; ".join(structure_of(families.build(name)).traits)
    assert not [each for each in said.split("|") if each not in told], told
    assert not [each for each in unsaid.split("|") if each in told], told


def test_layout_is_plain_data():
    layout = wrap(families.build("gpt2")).layout
    assert layout == dataclasses.asdict(structure_of(families.build("gpt2"))) | {"spread": False}
    assert all(isinstance(v, (str, int, float, bool, tuple, dict, type(None))) for v in layout.values())


@pytest.mark.parametrize(
    ("name", "said"),
    [("./nowhere", "does not exist"), ("/nowhere", "does not exist"), ("x.gguf", "does not exist")],
)
def test_paths_that_are_not_there(name, said):
    with pytest.raises(UsageError, match=said):
        find(name)


def test_directory_that_is_no_model(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        find(str(tmp_path))


def test_hub_names_are_left_to_the_hub():
    assert find("EleutherAI/pythia-160m", "step1000").arguments == {"revision": "step1000"}


@pytest.mark.parametrize(
    ("choice", "said"), [({"dtype": "float8"}, "float64"), ({"device": "abacus"}, "cpu")]
)
def test_bad_dtype_and_device_list_what_there_is(choice, said):
    with pytest.raises(UsageError, match=said):
        load("tiny-neox", **choice)
