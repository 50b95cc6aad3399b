"""As what transformers and nnsight take a model: one that continues text, or one that sees too and is given text."""

from typing import Any

from selfrepair_nn.errors import UnsupportedModel
from selfrepair_nn.models.architectures import structure_of, text_config

TEXT, SIGHT = "text-generation", "image-text-to-text"


def kind_of(config: Any) -> tuple[str, Any]:
    """The task that transformers (and a server) loads a configuration for, and the class that loads it.

    A multimodal model is loaded as its text model where transformers can do that, otherwise whole.

    Raises:
        UnsupportedModel: transformers has no class of it that gives the logits of text.
    """
    import transformers

    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return TEXT, transformers.AutoModelForCausalLM
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return SIGHT, transformers.AutoModelForImageTextToText
    raise UnsupportedModel(
        f"transformers {transformers.__version__} loads no {config.model_type!r} model for text: load it with a class "
        "of its own and hand in the module, or its text part saved as a model by itself (docs/models.md says how)"
    )


def reading(task: str, tokenizer: Any = None) -> dict[str, Any]:
    """What nnsight asks for to read a task's input, though only token ids are ever traced."""
    reader = tokenizer or no_tokenizer()
    return {"task": task, "tokenizer": reader} | ({"processor": reader} if task == SIGHT else {})


def task_of(module: Any) -> str:
    """The task of a module that is loaded already."""
    return TEXT if text_config(module.config) is module.config else SIGHT


def beside_text(config: Any) -> set[str]:
    """The names of the weights of a multimodal model that its text part does not have."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config)
    places = structure_of(whole).places
    text = places["token_embedding"].rpartition(".")[0], places["unembedding"]
    return {name for name in whole.state_dict() if not name.startswith(tuple(f"{part}." for part in text))}


def unheard_of(name: str, model_type: str) -> UnsupportedModel:
    """What is to be said of a model type that the installed transformers does not have."""
    import transformers

    return UnsupportedModel(
        f"transformers {transformers.__version__} has no model type {model_type!r}, which {name!r} is of; a newer one "
        "may (pip install --upgrade transformers), and then `selfrepair check` tells whether it can be decomposed"
    )


def no_tokenizer() -> Any:
    """One without a word."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
