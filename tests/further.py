"""Further families: a tiny model of each, and where the oracle finds its parts. Of the package nothing is imported."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

ABOUT_ONE = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "NemotronLayerNorm1P")
"""Norms whose gain is 1 plus their weight."""

CENTRED = ("OlmoLayerNorm", "CohereLayerNorm", "Cohere2LayerNorm")
"""Norms that subtract the mean, beside torch's."""


@dataclass(frozen=True)
class Places:
    """Module paths: the first group from the model, the second from one layer. `constants`: weights add up to 1."""

    layers: str = "model.layers"
    final_norm: str = "model.norm"
    positions: str | None = None
    norm: str | None = "input_layernorm"
    projection: str = "self_attn.o_proj"
    mlp: str = "mlp"
    constants: bool = True
    post: str | None = None
    mixer: str | None = None


_BLOOM = Places(
    layers="transformer.h",
    final_norm="transformer.ln_f",
    projection="self_attention.dense",
    mlp="mlp.dense_4h_to_h",
)
_BEHIND = Places(mlp="post_feedforward_layernorm", post="post_attention_layernorm")
_LIKE_LLAMA = (
    "gemma phi3 smollm3 ministral3 seed_oss helium arcee nemotron olmo starcoder2 stablelm cohere cohere2 granite "
    "mixtral olmoe qwen2_moe qwen3_moe glm4_moe minimax_m2 phimoe deepseek_v2 deepseek_v3"
)
PLACES = dict.fromkeys(_LIKE_LLAMA.split(), Places()) | {
    "apertus": Places(norm="attention_layernorm"),
    "phi": Places(final_norm="model.final_layernorm", projection="self_attn.dense"),
    "granitemoe": Places(mlp="block_sparse_moe"),
    "llama4_text": Places(mlp="feed_forward"),
    "gpt_oss": Places(constants=False),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), replace(_BEHIND, norm=None)),
    **dict.fromkeys(("gemma2", "gemma3_text"), _BEHIND),
    "lfm2": Places(
        final_norm="model.embedding_norm",
        norm="operator_norm",
        projection="self_attn.out_proj",
        mlp="feed_forward",
        mixer="conv",
    ),
    "jamba": Places(final_norm="model.final_layernorm", mlp="feed_forward", mixer="mamba"),
    "glm4": Places(mlp="post_mlp_layernorm", post="post_self_attn_layernorm"),
    "gpt_neo": Places(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        positions="transformer.wpe",
        norm="ln_1",
        projection="attn.attention.out_proj",
    ),
    "bloom": _BLOOM,
    "falcon": replace(_BLOOM, mlp="mlp"),
    "mpt": Places(
        layers="transformer.blocks",
        final_norm="transformer.norm_f",
        norm="norm_1",
        projection="attn.out_proj",
        mlp="ffn.down_proj",
    ),
}


def places(model: nn.Module) -> Places:
    """Where the oracle finds a model's parts."""
    found = PLACES[model.config.model_type]
    two_norms = hasattr(model.get_submodule(found.layers)[0], "ln_attn")
    return replace(found, norm="ln_attn") if two_norms else found


def _made(name: str, config: str | None = None, **more: Any) -> PreTrainedModel:
    sizes = {
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 24,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    settings = getattr(transformers, f"{config or name}Config")(**sizes | more)
    kind = getattr(transformers, f"{name}ForCausalLM")
    experts = any("expert" in option for option in more)
    return kind._from_config(settings, **({"experts_implementation": "eager"} if experts else {}))


_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_group": 1}
_ROUTED |= {"topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
}
_LATENT |= {"num_key_value_heads": 4}
_MULTIPLIED = {"residual_multiplier": 0.4, "logits_scaling": 2.0, "embedding_multiplier": 3.0}
_MULTIPLIED |= {"attention_multiplier": 0.3}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_CAPS = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 12}
_PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma": partial(_made, "Gemma", head_dim=12),
    "phi3": partial(_made, "Phi3"),
    "smollm3": partial(_made, "SmolLM3"),
    "ministral3": partial(_made, "Ministral3", head_dim=8),
    "seed-oss": partial(_made, "SeedOss", head_dim=8),
    "helium": partial(_made, "Helium", head_dim=8),
    "arcee": partial(_made, "Arcee"),
    "apertus": partial(_made, "Apertus", **_PLAIN_ROPE),
    "nemotron": partial(_made, "Nemotron"),
    "olmo": partial(_made, "Olmo"),
    "starcoder2": partial(_made, "Starcoder2"),
    "stablelm-sequential": partial(_made, "StableLm", use_parallel_residual=False),
    "stablelm-parallel": partial(_made, "StableLm", use_parallel_residual=True, use_qkv_bias=True),
    "phi": partial(_made, "Phi"),
    "cohere": partial(_made, "Cohere", logit_scale=0.25),
    "cohere2": partial(_made, "Cohere2", logit_scale=0.25, head_dim=8),
    "granite": partial(_made, "Granite", **_MULTIPLIED),
    "granite-moe": partial(_made, "GraniteMoe", **_EXPERTS, **_MULTIPLIED),
    "gpt-neo": partial(
        _made,
        "GPTNeo",
        num_layers=3,
        num_heads=4,
        attention_types=[[["global", "local", "global"], 1]],
        window_size=4,
    ),
    "falcon-multi-query": partial(_made, "Falcon", multi_query=True, parallel_attn=True),
    "falcon-two-norms": partial(_made, "Falcon", num_kv_heads=2, new_decoder_architecture=True),
    "falcon-sequential": partial(_made, "Falcon", multi_query=False, parallel_attn=False, alibi=True),
    "bloom": partial(_made, "Bloom", n_layer=3, n_head=4),
    "mpt": partial(_made, "Mpt", d_model=32, n_heads=4, n_layers=3, max_seq_len=24),
    "olmo2": partial(_made, "Olmo2"),
    "olmo2-biased": partial(_made, "Olmo2", attention_bias=True),
    "olmo3": partial(_made, "Olmo3", sliding_window=4, layer_types=_SLIDING),
    "exaone4": partial(_made, "Exaone4", sliding_window=4, layer_types=_SLIDING),
    "gemma2": partial(_made, "Gemma2", head_dim=12, sliding_window=4, **_CAPS),
    "gemma3": partial(
        _made, "Gemma3", config="Gemma3Text", head_dim=12, sliding_window=4, layer_types=_SLIDING
    ),
    "glm4": partial(_made, "Glm4", head_dim=8, attention_bias=True),
    "mixtral": partial(_made, "Mixtral", **_EXPERTS),
    "olmoe": partial(_made, "Olmoe", num_experts=4, num_experts_per_tok=2),
    "qwen2-moe": partial(
        _made,
        "Qwen2Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=20,
    ),
    "qwen3-moe": partial(
        _made, "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, head_dim=8
    ),
    "glm4-moe": partial(_made, "Glm4Moe", **_ROUTED, head_dim=8),
    "minimax-m2": partial(_made, "MiniMaxM2", **_EXPERTS, head_dim=8),
    "phi-moe": partial(_made, "Phimoe", **_EXPERTS),
    "gpt-oss": partial(_made, "GptOss", **_EXPERTS, head_dim=8, sliding_window=4, **_PLAIN_ROPE),
    "deepseek-v2": partial(_made, "DeepseekV2", **_ROUTED, **_LATENT),
    "deepseek-v3": partial(_made, "DeepseekV3", **_ROUTED, **_LATENT),
    "llama4": partial(
        _made,
        "Llama4",
        config="Llama4Text",
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=40,
        interleave_moe_layer_step=2,
        head_dim=8,
    ),
}

HYBRIDS: dict[str, Callable[[], PreTrainedModel]] = {
    "lfm2": partial(_made, "Lfm2", num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2),
    "jamba": partial(
        _made,
        "Jamba",
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
}
"""Models of which some layers have no heads."""
