"""Where each family of causal language models keeps its parts. A new family is one more entry here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from typing import Any

from selfrepair_nn.errors import UnsupportedModel
from selfrepair_nn.models.refused import reason
from selfrepair_nn.tracing.places import at

Config = Any


@dataclass(frozen=True)
class Architecture:
    """Module paths of one family: the first group from the model, the second from one decoder layer.

    `value_layout` says how the value projection's output holds the heads: "last" (values alone, or behind queries and
    keys) or "interleaved" (per key-value head: its queries, its key, its value); `kv_heads(config)` counts
    these heads where the projection's width does not.
    `attention_norm` is None where the attention reads the stream as it is, `mlp_norm` where the MLP does, or where one
    norm serves both. `post_norm` is the norm behind the attention, if there is one; then `mlp` is the norm behind the
    MLP, for what the MLP writes is what leaves that. `mixer` is what stands in the attention's place in layers without
    heads: a convolution or a state space, one component. `router` is what chooses experts in layers that have a mixture
    of them, of which a token uses `n_choices(config)`; tracing.routing says what it may return. `returns` says of the
    modules ("layer", "attention", "mlp") that return a tuple how many it holds; what they write is the first.
    `centred_norm` tells LayerNorm from RMSNorm. `parallel(config)` is true where the MLP does not see the heads of
    its own layer.
    `sinks` is where a softmax has what it pays to no token, if it does: weights add up to less than 1, and no part of z
    is constant. `residual_inside` says that what the attention returns has the stream that enters the layer in it;
    `mlp_in_place` that the layer changes what its MLP gave.
    `write_scale(config)` multiplies what attention and MLP give before it is written, `logit_scale(config)` the
    logits; `logit_cap(config)` is the c of logits that are returned as c tanh(logit / c), or None. `fits(config)`
    chooses among entries of one model type. `refuse(config)` gives the reason why this configuration cannot be
    decomposed, or None.
    """

    model_types: tuple[str, ...]
    layers: str
    token_embedding: str
    position_embedding: str | None
    final_norm: str
    attention: str
    attention_norm: str | None
    value: str
    value_layout: str
    output_projection: str
    mlp_norm: str | None
    mlp: str
    down_projection: str | None
    post_norm: str | None = None
    mixer: str | None = None
    router: str | None = None
    centred_norm: bool = True
    returns: Mapping[str, int] = field(default_factory=lambda: {"attention": 2})
    parallel: Callable[[Config], bool] = lambda config: False
    sinks: str | None = None
    residual_inside: bool = False
    mlp_in_place: bool = False
    kv_heads: Callable[[Config], int] | None = None
    write_scale: Callable[[Config], float] = lambda config: 1.0
    logit_scale: Callable[[Config], float] = lambda config: 1.0
    logit_cap: Callable[[Config], float | None] = lambda config: None
    n_choices: Callable[[Config], int] = lambda config: config.num_experts_per_tok
    fits: Callable[[Config], bool] = lambda config: True
    refuse: Callable[[Config], str | None] = lambda config: None


def _refuse_opt(config: Config) -> str | None:
    if not config.do_layer_norm_before:
        return "its norms come after the residual sum, so no component's write is its own (do_layer_norm_before=False)"
    if config.word_embed_proj_dim != config.hidden_size:
        return "it projects the residual stream between embedding and layers (word_embed_proj_dim)"
    if config._remove_final_layer_norm:
        return "it has no final norm (_remove_final_layer_norm)"
    return None


def _refuse_gpt2(config: Config) -> str | None:
    return "it attends to an encoder (add_cross_attention)" if config.add_cross_attention else None


def _refuse_bloom(config: Config) -> str | None:
    if config.apply_residual_connection_post_layernorm:
        return "its residual connections start behind the norms (apply_residual_connection_post_layernorm)"
    if config.pretraining_tp > 1 and config.slow_but_exact:
        return "it multiplies slices of its weights instead of calling its modules (slow_but_exact)"
    return None


def _refuse_falcon(config: Config) -> str | None:
    if config.new_decoder_architecture and not config.parallel_attn:
        return "its new form has attention and MLP side by side, and this is neither (parallel_attn=False)"
    return None


def _two_norms(config: Config) -> bool:
    return config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)


def _residual_multiplier(config: Config) -> float:
    return config.residual_multiplier


def _granite_logits(config: Config) -> float:
    return 1 / config.logits_scaling


def _refuse_gemma3(config: Config) -> str | None:
    if getattr(config, "use_bidirectional_attention", False):
        return "its tokens see later ones, so it predicts no next token (use_bidirectional_attention)"
    return None


def _final_cap(config: Config) -> float | None:
    return config.final_logit_softcapping


UNNAMED_EPSILON = 1e-5
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configurations call the number of experts."""
NEAR = ("sliding_attention", "chunked_attention", "local")
"""What they call layers that do not see all tokens before."""

MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "glm4_moe", "minimax_m2", "qwen3_vl_moe_text")
"""Whose MLP is a mixture of experts: one component, shared experts included, without neurons of its own."""

LLAMA = Architecture(
    model_types=(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "smollm3",
        "ministral3",
        "seed_oss",
        "helium",
        "arcee",
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen3_vl_text",
    ),
    layers="model.layers",
    token_embedding="model.embed_tokens",
    position_embedding=None,
    final_norm="model.norm",
    attention="self_attn",
    attention_norm="input_layernorm",
    value="self_attn.v_proj",
    value_layout="last",
    output_projection="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
    down_projection="mlp.down_proj",
    centred_norm=False,
)

GPT2 = Architecture(
    model_types=("gpt2",),
    layers="transformer.h",
    token_embedding="transformer.wte",
    position_embedding="transformer.wpe",
    final_norm="transformer.ln_f",
    attention="attn",
    attention_norm="ln_1",
    value="attn.c_attn",
    value_layout="last",
    output_projection="attn.c_proj",
    mlp_norm="ln_2",
    mlp="mlp",
    down_projection="mlp.c_proj",
    refuse=_refuse_gpt2,
)

BLOOM = Architecture(
    model_types=("bloom",),
    layers="transformer.h",
    token_embedding="transformer.word_embeddings",
    position_embedding=None,
    final_norm="transformer.ln_f",
    attention="self_attention",
    attention_norm="input_layernorm",
    value="self_attention.query_key_value",
    value_layout="interleaved",
    output_projection="self_attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp="mlp.dense_4h_to_h",
    down_projection="mlp.dense_4h_to_h",
    returns={"layer": 2, "attention": 2},
    residual_inside=True,
    refuse=_refuse_bloom,
)

FALCON = replace(
    BLOOM,
    model_types=("falcon",),
    residual_inside=False,
    mlp="mlp",
    mlp_norm=None,
    mlp_in_place=True,
    parallel=lambda config: True,
    fits=lambda config: config.parallel_attn and not _two_norms(config),
    refuse=lambda config: None,
)

NORMED_BEHIND = replace(
    LLAMA,
    model_types=("olmo2", "olmo3", "exaone4"),
    attention_norm=None,
    mlp_norm=None,
    post_norm="post_attention_layernorm",
    mlp="post_feedforward_layernorm",
    down_projection=None,
)
"""Named as Llama, with norms behind attention and MLP and none before."""

GEMMA2 = replace(
    NORMED_BEHIND,
    model_types=("gemma2",),
    attention_norm="input_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    logit_cap=_final_cap,
)

SIDE_BY_SIDE = replace(LLAMA, mlp_norm=None, centred_norm=True, parallel=lambda config: True)
"""Named as Llama, with one LayerNorm before attention and MLP, which do not see each other."""

ARCHITECTURES = (
    GPT2,
    Architecture(
        model_types=("gpt_neox",),
        layers="gpt_neox.layers",
        token_embedding="gpt_neox.embed_in",
        position_embedding=None,
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        attention_norm="input_layernorm",
        value="attention.query_key_value",
        value_layout="interleaved",
        output_projection="attention.dense",
        mlp_norm="post_attention_layernorm",
        mlp="mlp",
        down_projection="mlp.dense_4h_to_h",
        parallel=lambda config: config.use_parallel_residual,
    ),
    Architecture(
        model_types=("gptj",),
        layers="transformer.h",
        token_embedding="transformer.wte",
        position_embedding=None,
        final_norm="transformer.ln_f",
        attention="attn",
        attention_norm="ln_1",
        value="attn.v_proj",
        value_layout="last",
        output_projection="attn.out_proj",
        mlp_norm=None,
        mlp="mlp",
        down_projection="mlp.fc_out",
        returns={"layer": 2, "attention": 2},
        parallel=lambda config: True,
    ),
    LLAMA,
    replace(LLAMA, model_types=("granite",), write_scale=_residual_multiplier, logit_scale=_granite_logits),
    replace(LLAMA, model_types=("phi3",), value="self_attn.qkv_proj"),
    NORMED_BEHIND,
    GEMMA2,
    replace(GEMMA2, model_types=("gemma3_text",), refuse=_refuse_gemma3),
    replace(
        NORMED_BEHIND,
        model_types=("glm4",),
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        post_norm="post_self_attn_layernorm",
        mlp="post_mlp_layernorm",
    ),
    replace(
        LLAMA,
        model_types=("apertus",),
        attention_norm="attention_layernorm",
        mlp_norm="feedforward_layernorm",
    ),
    replace(
        LLAMA,
        model_types=("lfm2",),
        final_norm="model.embedding_norm",
        attention_norm="operator_norm",
        output_projection="self_attn.out_proj",
        mixer="conv",
        mlp_norm="ffn_norm",
        mlp="feed_forward",
        down_projection="feed_forward.w2",
    ),
    replace(
        LLAMA,
        model_types=("jamba",),
        final_norm="model.final_layernorm",
        mixer="mamba",
        mlp_norm="pre_ff_layernorm",
        mlp="feed_forward",
        down_projection=None,
        router="feed_forward.router",
    ),
    replace(LLAMA, model_types=("nemotron", "olmo"), centred_norm=True),
    replace(LLAMA, model_types=("starcoder2",), centred_norm=True, down_projection="mlp.c_proj"),
    replace(LLAMA, model_types=("stablelm",), centred_norm=True, fits=lambda c: not c.use_parallel_residual),
    replace(SIDE_BY_SIDE, model_types=("stablelm",), fits=lambda config: config.use_parallel_residual),
    replace(SIDE_BY_SIDE, model_types=("cohere", "cohere2"), logit_scale=lambda config: config.logit_scale),
    replace(
        SIDE_BY_SIDE,
        model_types=("phi",),
        final_norm="model.final_layernorm",
        output_projection="self_attn.dense",
        down_projection="mlp.fc2",
    ),
    replace(LLAMA, model_types=MIXTURES, down_projection=None, router="mlp.gate"),
    replace(
        LLAMA,
        model_types=("phimoe",),
        down_projection=None,
        router="mlp.router",
        n_choices=lambda config: 2,
        centred_norm=True,
    ),
    replace(
        LLAMA,
        model_types=("granitemoe",),
        mlp="block_sparse_moe",
        down_projection=None,
        router="block_sparse_moe.router",
        write_scale=_residual_multiplier,
        logit_scale=_granite_logits,
    ),
    replace(
        LLAMA,
        model_types=("llama4_text",),
        mlp="feed_forward",
        down_projection=None,
        router="feed_forward.router",
    ),
    replace(
        LLAMA,
        model_types=("deepseek_v2", "deepseek_v3"),
        value="self_attn.kv_b_proj",
        value_layout="interleaved",
        down_projection=None,
        router="mlp.gate",
        kv_heads=lambda config: config.num_attention_heads,
    ),
    replace(
        GPT2,
        model_types=("gpt_neo",),
        attention="attn",
        value="attn.attention.v_proj",
        output_projection="attn.attention.out_proj",
        returns={"layer": 2, "attention": 2},
        refuse=lambda config: None,
    ),
    replace(
        LLAMA,
        model_types=("gpt_oss",),
        down_projection=None,
        router="mlp.router",
        returns={"attention": 2, "mlp": 2},
        sinks="self_attn.sinks",
    ),
    replace(
        BLOOM,
        model_types=("falcon",),
        token_embedding="transformer.word_embeddings",
        residual_inside=False,
        mlp="mlp",
        fits=lambda config: not config.parallel_attn and not config.new_decoder_architecture,
        refuse=lambda config: None,
    ),
    FALCON,
    replace(FALCON, attention_norm="ln_attn", mlp_norm="ln_mlp", fits=lambda config: True, refuse=_refuse_falcon),
    BLOOM,
    Architecture(
        model_types=("mpt",),
        layers="transformer.blocks",
        token_embedding="transformer.wte",
        position_embedding=None,
        final_norm="transformer.norm_f",
        attention="attn",
        attention_norm="norm_1",
        value="attn.Wqkv",
        value_layout="last",
        output_projection="attn.out_proj",
        mlp_norm="norm_2",
        mlp="ffn.down_proj",
        down_projection="ffn.down_proj",
        returns={"layer": 2, "attention": 2},
    ),
    Architecture(
        model_types=("opt",),
        layers="model.decoder.layers",
        token_embedding="model.decoder.embed_tokens",
        position_embedding="model.decoder.embed_positions",
        final_norm="model.decoder.final_layer_norm",
        attention="self_attn",
        attention_norm="self_attn_layer_norm",
        value="self_attn.v_proj",
        value_layout="last",
        output_projection="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        mlp="fc2",
        down_projection="fc2",
        refuse=_refuse_opt,
    ),
)

HYBRIDS = frozenset(t for a in ARCHITECTURES if a.mixer for t in a.model_types)
"""Model types of which some layers have no heads."""

SUPPORTED = tuple(dict.fromkeys(t for a in ARCHITECTURES for t in a.model_types))


@dataclass(frozen=True)
class Structure:
    """The sizes and places of one model, read from its configuration and its (possibly weightless) modules.

    `routed` are the layers that have a mixture of `experts`, of which a token uses `n_choices`.
    """

    model_type: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    vocab_size: int
    layer_parameters: int
    max_length: int | None
    parallel: bool
    norm_epsilon: float
    centred_norm: bool
    position_embedding: bool
    attention_bias: bool
    value_bias: bool
    headless: tuple[int, ...]
    residual_inside: bool
    mlp_in_place: bool
    write_scale: float
    logit_scale: float
    logit_cap: float | None
    routed: tuple[int, ...]
    n_choices: int
    returns: dict[str, int]
    places: dict[str, Any]
    experts: int
    window: int | None

    @property
    def norms(self) -> tuple[str, ...]:
        """The parts of a layer that have a norm of their own before them."""
        return tuple(part for part in ("attention", "mlp") if f"{part}_norm" in self.places)

    @property
    def post_norms(self) -> bool:
        """Whether norms come behind attention and MLP."""
        return "post_norm" in self.places

    @property
    def traits(self) -> list[str]:
        """What is special about this model, a phrase each: what `selfrepair check` prints."""
        kind = "LayerNorm" if self.centred_norm else "RMSNorm"
        shared = self.n_heads // self.n_kv_heads
        norms = {2: f"{kind} before attention, another before the MLP", 1: f"one {kind} for attention and MLP"}
        said = {
            f"{self.n_layers} layers of {self.n_heads} heads, each {self.d_head} wide": True,
            f"{shared} heads share keys and values": shared > 1,
            norms.get(len(self.norms), ""): bool(self.norms),
            f"{kind} behind attention and MLP, whose reaction is a term of its own": self.post_norms,
            "attention and MLP side by side": self.parallel,
            "the MLP reads the heads of its own layer": not self.parallel,
            "learned positions, a component of their own": self.position_embedding,
            "the attention's output has a bias": self.attention_bias,
            "a part of each head is constant: --value-bias says whose it is": self.value_bias,
            "no part of a head is constant: --value-bias changes nothing": not self.value_bias,
            f"attention in some layers reaches back {self.window} tokens": self.window is not None,
            f"the MLP of some layers is a mixture of {self.experts} experts: one component": self.experts > 1,
            f"{len(self.headless)} layers have a mixer without heads, one component": bool(self.headless),
            "neurons are not told apart": not self.d_mlp,
            f"what attention and MLP give is multiplied by {self.write_scale:g}": self.write_scale != 1,
            f"logits are multiplied by {self.logit_scale:g}": self.logit_scale != 1,
            f"logits are capped at {self.logit_cap or 0:g}: measured is before the cap": self.logit_cap is not None,
        }
        return [sentence for sentence, holds in said.items() if holds]


def text_config(config: Config) -> Config:
    """The configuration of what writes text: a part of a multimodal model's, otherwise the whole."""
    return getattr(config, "text_config", None) or config


def architecture_of(config: Config) -> Architecture:
    """The entry for a Hugging Face configuration, or for its text part.

    Raises:
        UnsupportedModel: with the reason, and the supported list.
    """
    text = text_config(config)
    whose = "" if text is config else f", the text part of this {config.model_type} model,"
    found = next((a for a in ARCHITECTURES if text.model_type in a.model_types and a.fits(text)), None)
    if why := found.refuse(text) if found else reason(text):
        raise UnsupportedModel(
            f"this {text.model_type} model{whose} cannot be decomposed head by head: {why}"
        )
    if found is None:
        raise UnsupportedModel(
            f"model type {text.model_type!r}{whose} is not supported; supported are {', '.join(SUPPORTED)}"
        )
    return found


def structure_of(module: Any) -> Structure:
    """Sizes and places of a Hugging Face causal language model, or of the text part of a multimodal one.

    No weight is read: a meta model will do.
    """
    config = text_config(module.config)
    architecture = architecture_of(config)
    embedding, unembedding = _ends(module)
    architecture = _inside(module, architecture, embedding)
    layers = at(module, architecture.layers)
    headless = _headless(architecture, layers)
    layer = next(layer for index, layer in enumerate(layers) if index not in headless)
    projection = at(layer, architecture.output_projection)
    norm = at(module, architecture.final_norm)
    width, d_model = _widths(projection)
    input_norm = architecture.attention_norm and at(layer, architecture.attention_norm)
    input_norm_bias = getattr(input_norm, "bias", None) is not None
    routed = tuple(i for i, each in enumerate(layers) if _has(each, architecture.router))
    return Structure(
        model_type=config.model_type,
        n_layers=len(layers),
        n_heads=config.num_attention_heads,
        n_kv_heads=_kv_heads(architecture, config, at(layer, architecture.value), width),
        d_head=width // config.num_attention_heads,
        d_model=d_model,
        d_mlp=_widths(at(layer, architecture.down_projection))[0] if architecture.down_projection else 0,
        vocab_size=at(module, unembedding).weight.shape[0],
        layer_parameters=sum(p.numel() for p in layers.parameters()),
        max_length=getattr(config, "max_position_embeddings", None),
        parallel=bool(architecture.parallel(config)),
        norm_epsilon=_epsilon(norm),
        centred_norm=architecture.centred_norm,
        position_embedding=architecture.position_embedding is not None,
        attention_bias=projection.bias is not None,
        value_bias=not architecture.sinks
        and (input_norm_bias or at(layer, architecture.value).bias is not None),
        headless=headless,
        residual_inside=architecture.residual_inside,
        mlp_in_place=architecture.mlp_in_place,
        write_scale=float(architecture.write_scale(config)),
        logit_scale=float(architecture.logit_scale(config)),
        logit_cap=architecture.logit_cap(config),
        routed=routed,
        n_choices=architecture.n_choices(config) if routed else 0,
        returns=_returns(architecture, layer),
        places=_places(architecture) | {"unembedding": unembedding},
        experts=next((n for name in EXPERTS if (n := getattr(config, name, None))), 0),
        window=_window(config),
    )


def _headless(architecture: Architecture, layers: Any) -> tuple[int, ...]:
    """The layers that have a mixer without heads in the attention's place. Raises UnsupportedModel if all have."""
    if architecture.mixer is None:
        return ()
    found = tuple(i for i, layer in enumerate(layers) if hasattr(layer, architecture.mixer))
    if len(found) == len(layers):
        raise UnsupportedModel("no layer of this model has attention heads")
    return found


def _window(config: Config) -> int | None:
    """How many tokens the layers see that do not see all; None where all do."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or NEAR
    widths = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size"))
    return next((width for width in widths if width), None) if set(kinds) & set(NEAR) else None


def _ends(module: Any) -> tuple[str, str]:
    """Where a model's token embedding and its unembedding are, whatever it calls them."""
    names = {id(part): name for name, part in module.named_modules()}
    try:
        if getattr(module, "main_input_name", "input_ids") != "input_ids":
            raise NotImplementedError
        return names[id(module.get_input_embeddings())], names[id(module.get_output_embeddings())]
    except (KeyError, NotImplementedError, AttributeError) as error:
        raise UnsupportedModel(
            f"{type(module).__name__} gives no logits for text alone: load the class that does, or save the text part "
            "of a multimodal model as a model of its own (docs/models.md says how)"
        ) from error


def _inside(module: Any, architecture: Architecture, embedding: str) -> Architecture:
    """The family's entry with the paths that its parts have in a multimodal model."""
    if text_config(module.config) is module.config:
        return architecture
    alone, body = (path.rpartition(".")[0] for path in (architecture.token_embedding, embedding))
    moved = {
        name: body + path.removeprefix(alone)
        for name in ("layers", "token_embedding", "position_embedding", "final_norm")
        if (path := getattr(architecture, name)) is not None
    }
    return replace(architecture, **moved)


def _returns(architecture: Architecture, layer: Any) -> dict[str, int]:
    """How many tensors modules return; newer versions of a family's layer may say that they return one."""
    said = signature(type(layer).forward).return_annotation
    single = getattr(said, "__name__", said) in ("Tensor", "torch.Tensor")
    return {part: count for part, count in architecture.returns.items() if part != "layer" or not single}


def _has(layer: Any, path: str | None) -> bool:
    """Whether a layer has a module at this path."""
    return path is not None and any(name == path for name, _ in layer.named_modules())


def _kv_heads(architecture: Architecture, config: Config, value: Any, width: int) -> int:
    """How many heads have values of their own, by the width of what gives them: maybe queries and keys too."""
    if architecture.kv_heads is not None:
        return architecture.kv_heads(config)
    heads = config.num_attention_heads
    count = _widths(value)[1] * heads // width
    return count if count <= heads else (count - heads) // 2


def _epsilon(norm: Any) -> float:
    """What a norm adds before the root; OLMo's says it nowhere but in its code."""
    named = (getattr(norm, name, None) for name in ("eps", "variance_epsilon"))
    return float(next((value for value in named if value is not None), UNNAMED_EPSILON))


def _places(architecture: Architecture) -> dict[str, str]:
    named = {each.name: getattr(architecture, each.name) for each in fields(architecture)}
    return {name: value for name, value in named.items() if isinstance(value, str)}


def _widths(projection: Any) -> tuple[int, int]:
    """Input and output width of a Linear or a (transposed) Conv1D."""
    if hasattr(projection, "in_features"):
        return projection.in_features, projection.out_features
    return tuple(projection.weight.shape)
