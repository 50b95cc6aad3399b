"""Directories of models that no machine here could load: configurations of large Llamas, without weights."""

from pathlib import Path

import numpy as np
from transformers import LlamaConfig

SHAPES = {
    "Llama-3.1-8B": (32, 32, 4096, 14336),
    "Llama-3.1-70B": (80, 64, 8192, 28672),
    "Llama-3.1-405B": (126, 128, 16384, 53248),
}
"""Layers, heads, width and neurons; eight heads of keys and values each."""

VOCABULARY = 128256


def save_shape(name: str, path: Path) -> str:
    """The configuration of a shape, as a model's directory has it."""
    layers, heads, width, neurons = SHAPES[name]
    LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        hidden_size=width,
        intermediate_size=neurons,
        vocab_size=VOCABULARY,
        max_position_embeddings=131072,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)
    return str(path)


def save_ids(path: Path, prompts: int, length: int = 128) -> str:
    """Prompts for them: token ids, drawn."""
    np.save(path, np.random.default_rng(0).integers(0, VOCABULARY, (prompts, length)))
    return str(path)
