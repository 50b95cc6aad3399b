"""Switches in the configurations of supported families: each changes the structure, and none may change exactness."""

import families
import numpy as np
import oracle
import pytest
import transformers
from further import _EXPERTS, _LATENT, _MULTIPLIED, _PLAIN_ROPE, _ROUTED, _made
from test_engine import STOCK, agree
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.errors import UnsupportedModel
from selfrepair_nn.models.load import wrap

BIASED = {"attention_bias": True, "mlp_bias": True}
SCORED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONG |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 8}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 24}
NEW_FALCON = {"num_kv_heads": 2, "new_decoder_architecture": True}
UNSCALED = {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}
MIXED = {
    "interleave_moe_layer_step": 1,
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 4,
    "use_qk_norm": True,
}
DENSE_FIRST = {"first_k_dense_replace": 1, "n_shared_experts": 2, "num_nextn_predict_layers": 1}


def _gpt2(**more):
    sizes = {"vocab_size": 53, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **more))


def _two_layers(name, **more):
    return _made(name, **({"num_hidden_layers": 2} | more))


VARIANTS = {
    "gpt2: other scales of attention, untied": lambda: _gpt2(**UNSCALED, tie_word_embeddings=False),
    "falcon: ALiBi beside the MLP": lambda: _two_layers(
        "Falcon", multi_query=True, parallel_attn=True, alibi=True
    ),
    "falcon: a head of values for each, biases": lambda: _two_layers("Falcon", multi_query=False, bias=True),
    "falcon: grouped, one norm": lambda: _two_layers(
        "Falcon", **NEW_FALCON, num_ln_in_parallel_attn=1, bias=True
    ),
    "falcon: one after the other": lambda: _two_layers(
        "Falcon", multi_query=True, parallel_attn=False, bias=True
    ),
    "bloom: slices that are not used": lambda: _made("Bloom", n_layer=2, n_head=4, pretraining_tp=2),
    "mpt: a scale that is not used": lambda: _made("Mpt", **MPT, logit_scale=0.25),
    "mpt: normed and clipped, no ALiBi": lambda: _made(
        "Mpt", **MPT, attn_config={"qk_ln": True, "clip_qkv": 2.0, "alibi": False, "softmax_scale": 0.5}
    ),
    "stablelm: normed queries": lambda: _two_layers(
        "StableLm", use_parallel_residual=True, qk_layernorm=True
    ),
    "phi: normed queries": lambda: _two_layers("Phi", qk_layernorm=True),
    "phi3: rotary positions that follow the length": lambda: _two_layers(
        "Phi3", rope_parameters=LONG, original_max_position_embeddings=16
    ),
    "olmo: clipped, biased": lambda: _two_layers("Olmo", clip_qkv=1.0, attention_bias=True),
    "nemotron: biased": lambda: _two_layers("Nemotron", **BIASED),
    "starcoder2: no biases, a window": lambda: _two_layers("Starcoder2", use_bias=False, sliding_window=4),
    "cohere: normed queries, biased": lambda: _two_layers("Cohere", use_qk_norm=True, attention_bias=True),
    "granite: biased": lambda: _two_layers("Granite", **BIASED, **_MULTIPLIED),
    "smollm3: layers without positions, biased": lambda: _two_layers(
        "SmolLM3", no_rope_layers=[1, 0], **BIASED
    ),
    "seed_oss: biases on both sides": lambda: _two_layers(
        "SeedOss", head_dim=8, attention_out_bias=True, **BIASED
    ),
    "ministral3: scaled by position": lambda: _two_layers(
        "Ministral3", head_dim=8, rope_parameters=YARN | {"llama_4_scaling_beta": 0.3}
    ),
    "olmoe: clipped": lambda: _two_layers("Olmoe", num_experts=4, num_experts_per_tok=2, clip_qkv=1.0),
    "qwen2_moe: every other layer dense": lambda: _two_layers(
        "Qwen2Moe", **SCORED, shared_expert_intermediate_size=20, decoder_sparse_step=2
    ),
    "qwen3_moe: one layer dense": lambda: _two_layers("Qwen3Moe", **SCORED, head_dim=8, mlp_only_layers=[1]),
    "phimoe: biased throughout": lambda: _two_layers(
        "Phimoe", **_EXPERTS, lm_head_bias=True, attention_bias=True, router_jitter_noise=0.3
    ),
    "gpt_oss: no biases": lambda: _two_layers(
        "GptOss", **_EXPERTS, head_dim=8, sliding_window=4, attention_bias=False, **_PLAIN_ROPE
    ),
    "deepseek_v3: queries uncompressed, experts shared": lambda: _two_layers(
        "DeepseekV3", **(_ROUTED | DENSE_FIRST), **(_LATENT | {"q_lora_rank": None})
    ),
    "llama4: experts in every layer": lambda: _made(
        "Llama4",
        config="Llama4Text",
        **{
            "num_hidden_layers": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size_mlp": 40,
        },
        **(
            MIXED | {"head_dim": 8, "attention_bias": True, "attn_temperature_tuning": True, "floor_scale": 2}
        ),
    ),
}


def _compared(model, tmp_path, value_bias):
    families.randomise(model)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 8))
    choices = {"ablation": "zero", "target": "raw", "value_bias": value_bias}
    found = sr.run(
        model=model, prompts=ids, components="all", out=tmp_path / "s.zarr", progress=False, **choices
    ).load()
    agree(found, oracle.reference(model, ids, **choices), STOCK)
    assert np.abs(found.logit_change).mean() > 1e-3


EVERY_RUN = [
    "falcon: a head of values for each, biases",
    "mpt: normed and clipped, no ALiBi",
    "starcoder2: no biases, a window",
    "seed_oss: biases on both sides",
    "phimoe: biased throughout",
    "gpt_oss: no biases",
    "deepseek_v3: queries uncompressed, experts shared",
]


@pytest.mark.parametrize("name", representative(VARIANTS, *EVERY_RUN))
def test_a_switch_changes_no_exactness(name, tmp_path):
    _compared(VARIANTS[name]().double().eval(), tmp_path, "output")


def test_where_values_pass_a_norm_no_part_of_them_is_constant(tmp_path):
    """DeepSeek's bias of the latent stands before a norm: a head's output has no part that no input changes."""
    routed = _ROUTED | DENSE_FIRST
    model = _two_layers("DeepseekV3", **routed, **_LATENT, attention_bias=True).double().eval()
    _compared(model, tmp_path, "head")
    assert not wrap(model).structure.value_bias


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: families._opt(_remove_final_layer_norm=True), "no final norm"),
        (lambda: _two_layers("Falcon", **NEW_FALCON, parallel_attn=False), "parallel_attn=False"),
        (
            lambda: _two_layers("Bloom", n_layer=2, n_head=4, pretraining_tp=2, slow_but_exact=True),
            "slow_but_exact",
        ),
        (lambda: _gpt2(add_cross_attention=True), "add_cross_attention"),
    ],
)
def test_a_switch_that_breaks_the_sum_is_refused(make, said):
    with pytest.raises(UnsupportedModel, match=said):
        wrap(make())


def test_attention_to_later_tokens_is_refused(tmp_path):
    model = _two_layers("Gemma", head_dim=12, use_bidirectional_attention=True).double().eval()
    with pytest.raises(UnsupportedModel, match="a later token changes nothing before it"):
        _compared(model, tmp_path, "head")
