"""Multimodal models: what is measured is their text part, in every form in which they come."""

import json
from collections.abc import Callable
from pathlib import Path

import families
import numpy as np
import oracle
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_engine import STOCK, agree
from transformers import PreTrainedModel

import selfrepair_nn as sr
from selfrepair_nn.errors import SelfRepairError, UnsupportedModel
from selfrepair_nn.models.load import describe, load, structure_only, wrap

TEXT = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGHT = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGHT |= {"image_size": 28, "patch_size": 14}
PIXTRAL = {"model_type": "pixtral", "head_dim": 8, **SIGHT}
QWEN = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 20, "out_hidden_size": 32}
IN_THREE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
TOKENS = {"image_token_id": 50, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 49}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 40, "head_dim": 8}
PROJECTED = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}


def _made(name: str, text: dict, sight: dict, **more) -> PreTrainedModel:
    """A model that sees, as transformers makes it of its two configurations."""
    settings = getattr(transformers, f"{name}Config")(text_config=TEXT | text, vision_config=sight, **more)
    return getattr(transformers, f"{name}ForConditionalGeneration")(settings)


MODELS: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    # By what its text part is called alone. Logits from the embedding, vision beside it in the checkpoint.
    "mistral3": (
        "Mistral",
        lambda: _made("Mistral3", {"model_type": "mistral", "head_dim": 8}, PIXTRAL, image_token_index=50),
    ),
    # Loads whole for text, too; norms behind the sublayers, embeddings multiplied.
    "gemma3": (
        "Gemma3",
        lambda: _made("Gemma3", {"head_dim": 8, "sliding_window": 4}, SIGHT, mm_tokens_per_image=4),
    ),
    # No text class of its own: each token has three positions, which are the same in text.
    "qwen2_5_vl": (
        "Qwen2",
        lambda: _made("Qwen2_5_VL", IN_THREE, QWEN | {"fullatt_block_indexes": [0]}, **TOKENS),
    ),
    # Loads as its text model, and the vision's weights stay where they are.
    "llama4": (
        "Llama4",
        lambda: _made("Llama4", EXPERTS, SIGHT | PROJECTED, image_token_index=50),
    ),
}


@pytest.fixture(scope="module")
def whole():
    """whole(name): the multimodal model, float64, every parameter random."""
    made = {}

    def build(name):
        if name not in made:
            made[name] = MODELS[name][1]().double().eval()
            families.randomise(made[name])
        return made[name]

    return build


@pytest.fixture(scope="module")
def saved(whole, tmp_path_factory):
    """saved(name): the directory of its checkpoint, as transformers writes it."""

    def folder(name):
        path = tmp_path_factory.getbasetemp() / f"multimodal-{name}"
        if not path.exists():
            whole(name).save_pretrained(path)
        return path

    return folder


def _text_alone(name: str, model: PreTrainedModel) -> PreTrainedModel:
    """The text model by itself, built from the text configuration, with the same weights."""
    config = model.config.text_config
    kind = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")
    settings = config.to_dict() | {"model_type": kind.config_class.model_type}
    settings["rope_parameters"].pop("mrope_section", None)
    alone = kind(kind.config_class(**settings)).double().eval()
    body = model.get_input_embeddings()
    stream = next(part for part in model.modules() if getattr(part, "embed_tokens", None) is body)
    alone.model.load_state_dict(stream.state_dict())
    alone.lm_head.load_state_dict(model.get_output_embeddings().state_dict())
    return alone


def _runs(model: PreTrainedModel) -> bool:
    """Llama 4 does not in transformers 5.24.0, unless as its text model."""
    try:
        with torch.no_grad():
            model(torch.arange(3)[None], use_cache=False)
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("given", ["module", "directory"])
@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_the_text_model(whole, saved, tmp_path, name, given):
    if given == "module" and not _runs(whole(name)):
        pytest.skip(f"transformers {transformers.__version__} cannot run this model on text itself")
    ids = np.random.default_rng(0).integers(0, 53, (4, 8))
    partners = families.derangement(4)
    found = sr.run(
        model=whole(name) if given == "module" else saved(name),
        prompts=ids,
        partners=partners,
        components="all",
        out=tmp_path / "s.zarr",
        progress=False,
        **({} if given == "module" else {"dtype": "float64"}),
    ).load()
    agree(found, oracle.reference(_text_alone(name, whole(name)), ids, partners=partners), STOCK)
    assert np.abs(found.logit_change).mean() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_client_of_a_server_has_the_structure_that_is_described(saved, name):
    description = describe(str(saved(name)))
    module = structure_only(description, None).module
    places = description.structure.places
    assert all(parameter.is_meta for parameter in module.parameters())
    assert len(module.get_submodule(places["layers"])) == 2
    assert module.get_submodule(places["token_embedding"]) is module.get_input_embeddings()
    assert module.get_submodule(places["unembedding"]) is module.get_output_embeddings()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama4", "language_model.model.layers.7.self_attn.q_proj.weight"),
        ("llama4", "language_model.model.layers.0.self_attn.q_norm.weight"),
        ("llama4", "vision_model.model.layers.9.mlp.fc1.weight"),
        ("mistral3", "language_model.model.layers.7.mlp.up_proj.weight"),
        ("mistral3", "vision_tower.something.weight"),
    ],
)
def test_weights_that_nothing_uses_are_still_refused(saved, tmp_path, name, key):
    for file in saved(name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {key: torch.ones(3, 3)}, path, metadata={"format": "pt"})
    with pytest.raises(SelfRepairError, match="hold 1 weights that its configuration does not use"):
        load(str(tmp_path), dtype="float64", check=False)


def test_one_that_attends_to_later_tokens_is_refused():
    """PaliGemma reads a text without an image as a prefix, all of it at once."""
    sight = SIGHT | {
        "model_type": "siglip_vision_model",
        "projection_dim": 32,
        "projector_hidden_act": "gelu_fast",
    }
    model = _made("PaliGemma", {"model_type": "gemma", "head_dim": 8}, sight, projection_dim=32)
    families.randomise(model)
    with pytest.raises(UnsupportedModel, match="a later token changes nothing before it"):
        sr.run(model=model, prompts=np.ones((2, 4), int), ablation="zero")


def test_one_that_wants_an_image_is_refused_in_words():
    text = {"model_type": "opt", "vocab_size": 53, "hidden_size": 32, "ffn_dim": 44, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "word_embed_proj_dim": 32}
    asked = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "encoder_hidden_size": 16}
    settings = transformers.Blip2Config(text_config=text, vision_config=SIGHT, qformer_config=asked)
    with pytest.raises(UnsupportedModel, match=r"Blip2For.* gives no logits for text alone: .*save the text"):
        wrap(transformers.Blip2ForConditionalGeneration(settings))


def test_an_unsupported_text_part_is_named(tmp_path):
    model = _made("Llava", {"model_type": "xglm"}, {"model_type": "clip_vision_model", **SIGHT})
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["model_type"] == "xglm"
    with pytest.raises(UnsupportedModel, match="'xglm', the text part of this llava model, is not"):
        describe(str(tmp_path))


def test_the_documented_way_to_a_text_model_by_itself(whole, saved, tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    lines = page.split("```python\n")[1].split("```")[0]
    exec(lines.replace("DIRECTORY", str(saved("mistral3"))).replace("TEXT", str(tmp_path / "text")))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        alone = load(str(tmp_path / "text"), dtype="float64").module(ids).logits
        assert torch.allclose(alone, whole("mistral3")(ids).logits, rtol=0, atol=1e-5)


def test_a_family_that_transformers_does_not_have(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(
        UnsupportedModel, match=rf"transformers {transformers.__version__} has no model type 'unheard_of'"
    ):
        describe(str(tmp_path))
