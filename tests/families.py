"""Tiny random models of every family, with weights that make their heads matter.

Hugging Face initialises biases to zero, norm gains to one and everything else so small that a head hardly
moves a logit: a test on such a model would not see a forgotten bias. So every parameter is drawn anew.
"""

from collections.abc import Callable
from functools import partial

import further
import numpy as np
import torch
from torch import nn
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SLIDING_WINDOW = 3


def _gpt2() -> PreTrainedModel:
    """Fused q | k | v in a transposed Conv1D, learned positions, tied unembedding, biases everywhere."""
    sizes = {"vocab_size": 61, "n_positions": 24, "n_embd": 30, "n_layer": 3, "n_head": 5, "n_inner": 44}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def _gptj() -> PreTrainedModel:
    """Attention and MLP side by side behind one norm, layers that return a tuple, a bias at the unembedding."""
    sizes = {"vocab_size": 57, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}
    return GPTJForCausalLM(GPTJConfig(**sizes, n_inner=40, bos_token_id=0, eos_token_id=0))


def _neox(parallel: bool) -> PreTrainedModel:
    """Fused [head, (q, k, v)], partial rotary positions, attention and MLP side by side or in turn."""
    sizes = {"vocab_size": 70, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 40, "max_position_embeddings": 24}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, use_parallel_residual=parallel, rope_parameters=rope))


def _llama_like(model: type, config: type, n_heads: int, n_kv: int, hidden: int, **more) -> PreTrainedModel:
    """A model of the Llama kind: RMSNorm, rotary positions, grouped key-value heads, gated MLP."""
    sizes = {
        "vocab_size": 53,
        "num_hidden_layers": 2,
        "intermediate_size": 44,
        "max_position_embeddings": 24,
    } | more
    return model(config(**sizes, hidden_size=hidden, num_attention_heads=n_heads, num_key_value_heads=n_kv))


_llama = partial(_llama_like, LlamaForCausalLM, LlamaConfig)
_mistral = partial(_llama_like, MistralForCausalLM, MistralConfig)


def _opt(**more) -> PreTrainedModel:
    """Learned positions at an offset of two, tied unembedding, an MLP without a module of its own."""
    sizes = {
        "vocab_size": 50,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "ffn_dim": 40,
    }
    more = {"do_layer_norm_before": True, "word_embed_proj_dim": 24} | more
    return OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=24, **more))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": _gpt2,
    "gptj": _gptj,
    "neox-parallel": partial(_neox, True),
    "neox-sequential": partial(_neox, False),
    "llama-gqa": partial(_llama, 6, 2, 48, num_hidden_layers=3),
    "llama-tied": partial(_llama, 4, 4, 24, tie_word_embeddings=True),
    "llama-biases": partial(_llama, 4, 2, 32, attention_bias=True, mlp_bias=True),
    "llama-headdim": partial(_llama, 3, 1, 33, head_dim=8),  # and an odd hidden size, one key-value head
    "mistral": partial(_mistral, 5, 1, 40, sliding_window=None),
    "mistral-sliding": partial(_mistral, 4, 2, 32, sliding_window=SLIDING_WINDOW),
    "qwen2": partial(_llama_like, Qwen2ForCausalLM, Qwen2Config, 4, 2, 24),
    "qwen3": partial(_llama_like, Qwen3ForCausalLM, Qwen3Config, 4, 2, 28, head_dim=12),
    "opt": _opt,
    # As Galactica: only the norms have biases, and the values' constant comes from them.
    "opt-biasless": partial(_opt, enable_bias=False, activation_function="gelu"),
}

# Heads that do not write straight into the stream, or logits that are not linear in the normed stream.
REFUSED: dict[str, Callable[[], PreTrainedModel]] = {
    # The final norm normalises the embeddings too.
    "nanochat": partial(_llama_like, NanoChatForCausalLM, NanoChatConfig, 4, 2, 32),
    # What enters the output projection is a difference of two normed attentions.
    "diffllama": partial(_llama_like, DiffLlamaForCausalLM, DiffLlamaConfig, 4, 2, 32),
    # The stream itself is normed in every layer, and there is no final norm.
    "opt-postnorm": partial(_opt, do_layer_norm_before=False),
    # A matrix at either end of the stream.
    "opt-projected": partial(_opt, word_embed_proj_dim=16),
}


def _is_norm(module: nn.Module) -> bool:
    """LayerNorm, and each family's own RMSNorm class."""
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def _spread(module: nn.Module, name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and standard deviation from which a module's parameter is drawn."""
    if _is_norm(module):
        return (1.0, 0.3) if name == "weight" else (0.0, 0.3)
    if isinstance(module, nn.Embedding):
        return 0.0, 2.0 / module.embedding_dim**0.5
    if name == "bias":
        return 0.0, 0.3
    if len(shape) < 2:  # of an activation, or one for each head
        return 0.3, 0.1
    transposed = not isinstance(module, nn.Linear) and len(shape) == 2
    return 0.0, 1.5 / shape[0 if transposed else -1] ** 0.5


def randomise(model: PreTrainedModel, seed: int = 0) -> None:
    """Draw every parameter anew, in place; a shared one once, as its embedding."""
    generator, seen = torch.Generator().manual_seed(seed), set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                mean, std = _spread(module, name, parameter.shape)
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data = (mean + std * drawn).to(parameter.dtype)


def _exact_norm(self, hidden_states):
    """The norm without Hugging Face's cast to float32."""
    kind = type(self).__name__
    if kind in further.CENTRED:
        hidden_states = hidden_states - hidden_states.mean(-1, keepdim=True)
    epsilon = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
    return (self.weight + (kind in further.ABOUT_ONE)) * (hidden_states * torch.rsqrt(mean_square + epsilon))


def make_norms_exact(model: PreTrainedModel) -> None:
    """Let norms that work like Llama's, Cohere's or Gemma's compute in the model's own dtype; class names stay."""
    for module in model.modules():
        kind = type(module)
        if (_is_norm(module) and hasattr(module, "variance_epsilon")) or kind.__name__ in further.ABOUT_ONE:
            module.__class__ = type(kind.__name__, (kind,), {"forward": _exact_norm})


def build(name: str, seed: int = 0, *, exact: bool = False, attention: str | None = None) -> PreTrainedModel:
    """A tiny model of FAMILIES or REFUSED: float64, in eval mode, every parameter random from `seed`.

    exact: RMSNorms compute in float64 too, so that Llama-like models can be held to 1e-10 and not only 1e-5.
    attention: by default what users get, "sdpa", which keeps float64 throughout (some have only "eager");
    "eager" gives the same to about 1e-6, as the softmax of all but GPT-2 is then float32.
    """
    model = (FAMILIES | REFUSED | further.MODELS | further.HYBRIDS)[name]().double().eval()
    randomise(model, seed)
    if attention is not None:
        model.set_attn_implementation(attention)
    if exact:
        make_norms_exact(model)
    return model


def random_ids(model: PreTrainedModel, prompts: int = 4, length: int = 8, seed: int = 0) -> np.ndarray:
    """Token ids int64 [prompt, T], uniform over the vocabulary: token 0 is a token like any other."""
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, (prompts, length))


def derangement(prompts: int) -> np.ndarray:
    """Resample partners [prompt] without a fixed point, that are not their own inverse (if prompts > 2)."""
    return np.roll(np.arange(prompts), -1)
