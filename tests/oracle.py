"""The independent oracle: self-repair from the definitions alone, by plain PyTorch hooks.

It imports nothing of the package, reads the weights directly, and makes one full forward pass for every
ablated head, with the model's own logits at the end. It is written to be checked by eye, not to be fast: use
tiny models.

Everything is float64 from the hooks on. A float64 model of the Llama kind still normalises in float32 (its
RMSNorm casts its input), so there the identities hold to 1e-6 or 1e-5 instead of 1e-14;
`families.build(name, exact=True)` takes that cast away. With attention "eager" every family but GPT-2 has a
float32 softmax as well; with "sdpa", the default, none has.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product

import further
import numpy as np
import torch
from torch import Tensor, nn

PER_HEAD = (
    "direct_effect",
    "ablated_direct_effect",
    "logit_change",
    "self_repair",
    "from_heads",
    "from_mlps",
    "from_norm",
    "norm_on_existing",
    "norm_on_change",
    "ablated_norm_scale",
    "closure",
)
OF_SOME_MODELS = ("from_mixers", "from_post_norms", "logit_change_capped")


# ---------------------------------------------------------------- where each family keeps its parts


@dataclass(frozen=True)
class Layer:
    """One layer: the norm before its attention, its output projection, the module whose output the MLP adds.

    W_O [head * head_dim, d_model] and b_O [d_model] (or None) are the output projection;
    W_V [d_model, head, head_dim] and b_V [head, head_dim] (or None) the value projection, one copy for each
    query head; or `constant` [head, head_dim] (or None) what they make of the norm's beta.
    """

    norm: nn.Module
    projection: nn.Module | None
    mlp: nn.Module
    W_O: Tensor | None
    b_O: Tensor | None
    W_V: Tensor | None = None
    b_V: Tensor | None = None
    constant: Tensor | None = None
    post: nn.Module | None = None  # the norm behind the attention
    mixer: nn.Module | None = None  # in a layer without heads, what stands in the attention's place


@dataclass(frozen=True)
class Parts:
    """The parts of one model that the definitions speak of."""

    model: nn.Module
    embed: nn.Module
    pos_embed: nn.Module | None
    layers: list[Layer]
    final_norm: nn.Module
    n_heads: int
    first: nn.Module | None = None  # the layer whose input is the embedding, where no module gives that
    multiplier: float = 1.0  # of what attention and MLP give, before it is written
    logit_multiplier: float = 1.0


def _matrix(linear: nn.Module) -> Tensor:
    """The weight as [in, out], double: GPT-2's Conv1D keeps it so, nn.Linear the other way round."""
    weight = linear.weight.detach().double()
    return weight.T if isinstance(linear, nn.Linear) else weight


def _bias(module: nn.Module) -> Tensor | None:
    """The module's bias as double, None where it has none."""
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach().double()


def _layer(norm, projection, mlp, W_V: Tensor, b_V: Tensor | None) -> Layer:
    """A Layer with the output projection's weights read off."""
    return Layer(norm, projection, mlp, _matrix(projection), _bias(projection), W_V, b_V)


def _gpt2_layer(block: nn.Module, n_heads: int) -> Layer:
    """GPT-2: c_attn is [d, 3d] with columns q | k | v."""
    d = block.attn.c_proj.weight.shape[0]
    W_V = _matrix(block.attn.c_attn)[:, 2 * d :].unflatten(-1, (n_heads, -1))
    b_V = _bias(block.attn.c_attn)[2 * d :].unflatten(-1, (n_heads, -1))
    return _layer(block.ln_1, block.attn.c_proj, block.mlp, W_V, b_V)


def _gptj_layer(block: nn.Module, n_heads: int) -> Layer:
    """GPT-J: one norm before attention and MLP, no bias in the attention."""
    attention = block.attn
    values = _separate_values(attention.v_proj, n_heads, attention.out_proj.in_features // n_heads)
    return _layer(block.ln_1, attention.out_proj, block.mlp, *values)


def _neox_layer(block: nn.Module, n_heads: int) -> Layer:
    """GPT-NeoX: query_key_value's outputs are ordered [head, (q, k, v), head_dim]."""
    fused = block.attention.query_key_value
    W_V = _matrix(fused).unflatten(-1, (n_heads, 3, -1))[:, :, 2]
    b_V = _bias(fused)
    b_V = None if b_V is None else b_V.unflatten(-1, (n_heads, 3, -1))[:, 2]
    return _layer(block.input_layernorm, block.attention.dense, block.mlp, W_V, b_V)


def _separate_values(v_proj: nn.Module, n_heads: int, head_dim: int) -> tuple[Tensor, Tensor | None]:
    """A separate value projection, each key-value head repeated for the query heads that share it."""
    W_V, b_V = _matrix(v_proj).unflatten(-1, (-1, head_dim)), _bias(v_proj)
    times = n_heads // W_V.shape[1]
    b_V = None if b_V is None else b_V.unflatten(-1, (-1, head_dim)).repeat_interleave(times, dim=0)
    return W_V.repeat_interleave(times, dim=1), b_V


def _llama_layer(block: nn.Module, n_heads: int) -> Layer:
    """Llama, Mistral, Qwen2, Qwen3."""
    attention = block.self_attn
    head_dim = attention.o_proj.in_features // n_heads
    values = _separate_values(attention.v_proj, n_heads, head_dim)
    return _layer(block.input_layernorm, attention.o_proj, block.mlp, *values)


def _opt_layer(block: nn.Module, n_heads: int) -> Layer:
    """OPT has no MLP module: what its MLP adds is the output of fc2 (with rows and positions flattened)."""
    attention = block.self_attn
    head_dim = attention.out_proj.in_features // n_heads
    values = _separate_values(attention.v_proj, n_heads, head_dim)
    return _layer(block.self_attn_layer_norm, attention.out_proj, block.fc2, *values)


def find_parts(model: nn.Module) -> Parts:
    """The model's parts, by its family's name; ValueError for a family this oracle does not know."""
    kind, n_heads = model.config.model_type, model.config.num_attention_heads
    if kind == "gpt2":
        body, block = model.transformer, _gpt2_layer
        ends = body.wte, body.wpe, body.h, body.ln_f
    elif kind == "gptj":
        body, block = model.transformer, _gptj_layer
        ends = body.wte, None, body.h, body.ln_f
    elif kind == "gpt_neox":
        body, block = model.gpt_neox, _neox_layer
        ends = body.embed_in, None, body.layers, body.final_layer_norm
    elif kind in ("llama", "mistral", "qwen2", "qwen3"):
        body, block = model.model, _llama_layer
        ends = body.embed_tokens, None, body.layers, body.norm
    elif kind == "opt" and model.config.do_layer_norm_before and model.model.decoder.project_in is None:
        body, block = model.model.decoder, _opt_layer
        ends = body.embed_tokens, body.embed_positions, body.layers, body.final_layer_norm
    elif kind in further.PLACES:
        return _further(model)
    else:
        raise ValueError(f"the oracle has no definition for this {kind!r} model")
    embed, pos_embed, blocks, final_norm = ends
    return Parts(model, embed, pos_embed, [block(b, n_heads) for b in blocks], final_norm, n_heads)


def _further(model: nn.Module) -> Parts:
    """A family of which no more is known than where its parts are: heads' constants are seen, not read off."""
    config, places = model.config, further.places(model)
    blocks = list(model.get_submodule(places.layers))
    mixers = [getattr(block, places.mixer, None) if places.mixer else None for block in blocks]
    projections = [
        block.get_submodule(places.projection) if mixer is None else None
        for block, mixer in zip(blocks, mixers, strict=True)
    ]
    norms = [block.get_submodule(places.norm) if places.norm else None for block in blocks]
    attentions = [
        block.get_submodule(places.projection.rpartition(".")[0]) if norm is None else None
        for block, norm in zip(blocks, norms, strict=True)
    ]
    constants = (
        _seen_constants(model, attentions, norms, projections) if places.constants else [None] * len(blocks)
    )
    multiplier = getattr(config, "residual_multiplier", 1.0)
    layers = [
        Layer(
            norm,
            projection,
            block.get_submodule(places.mlp),
            None if projection is None else _matrix(projection) * multiplier,
            None if projection is None or projection.bias is None else _bias(projection) * multiplier,
            constant=constant,
            post=block.get_submodule(places.post) if places.post else None,
            mixer=mixer,
        )
        for block, norm, projection, constant, mixer in zip(
            blocks, norms, projections, constants, mixers, strict=True
        )
    ]
    logits = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    if config.model_type == "mpt":  # which has the word, and does nothing with it
        logits = 1.0
    return Parts(
        model,
        model.get_input_embeddings(),
        model.get_submodule(places.positions) if places.positions else None,
        layers,
        model.get_submodule(places.final_norm),
        config.num_attention_heads,
        None if places.positions else blocks[0],
        multiplier,
        logits,
    )


def _seen_constants(model, attentions, norms, projections) -> list[Tensor | None]:
    """z of every head where every position reads the norm's output at zero, or zero where the attention has no norm.

    For attention weights add up to 1.
    """
    seen = {}

    def zero(module, args, output):
        return module(torch.zeros_like(args[0])) if args[0].any() else output

    def note(layer):
        return lambda module, args: seen.update({layer: args[0][0, 0].double()})

    def silent(module, args, kwargs):
        return args, kwargs | {"hidden_states": torch.zeros_like(kwargs["hidden_states"])}

    def into(attention):
        return lambda hook: attention.register_forward_pre_hook(hook, with_kwargs=True)

    pairs = [(norm.register_forward_hook, zero) for norm in norms if norm is not None]
    pairs += [(into(a), silent) for a, norm in zip(attentions, norms, strict=True) if norm is None]
    pairs += [(p.register_forward_pre_hook, note(i)) for i, p in enumerate(projections) if p is not None]
    with torch.no_grad(), _hooked(pairs):
        model(torch.arange(4)[None] % model.config.vocab_size, use_cache=False)
    heads = model.config.num_attention_heads
    return [
        seen[i].unflatten(0, (heads, -1)) if i in seen and seen[i].any() else None for i in range(len(norms))
    ]


# ---------------------------------------------------------------- one forward pass, watched and edited


@dataclass
class Pass:
    """What one forward pass showed: z per layer [prompt, T, head, head_dim], the rest [prompt, T, ...]."""

    z: dict[int, Tensor]
    mlp: dict[int, Tensor]
    post: dict[int, Tensor]
    mixer: dict[int, Tensor] = field(default_factory=dict)
    embed: Tensor | None = None
    pos_embed: Tensor | None = None
    final: Tensor | None = None
    logits: Tensor | None = None  # before a soft cap, if there is one
    returned: Tensor | None = None


@contextmanager
def _hooked(pairs: list[tuple[Callable, Callable]]) -> Iterator[None]:
    """Each (register, hook) pair registered for the time of the block."""
    handles = [register(hook) for register, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attention_hook(seen: Pass, layer: int, n_heads: int, set_heads: dict) -> Callable:
    """Before the output projection: replace the heads asked for, note what the projection then gets."""

    def hook(module, args):
        z = args[0].clone().unflatten(-1, (n_heads, -1))
        for (at, head), value in set_heads.items():
            if at == layer:
                z[:, :, head] = value
        seen.z[layer] = z.double()
        return (z.flatten(-2), *args[1:])

    return hook


def _mlp_hook(seen: dict, layer: int, shape: tuple[int, int], set_mlps: dict) -> Callable:
    """After an MLP or mixer: replace its output if asked, note what is then added to the residual stream."""

    def hook(module, args, output):
        first, *others = output if isinstance(output, tuple) else (output,)
        if layer in set_mlps:
            first = set_mlps[layer].reshape(first.shape).to(first.dtype)
        seen[layer] = first.double().reshape(*shape, -1).clone()  # some models go on to change it in place
        return (first, *others) if isinstance(output, tuple) else first

    return hook


def _note_hook(seen: Pass, name: str, shape: tuple[int, int]) -> Callable:
    """After an embedding: note its output for every prompt (GPT-2 looks its positions up once for all)."""

    def hook(module, args, output):
        setattr(seen, name, output.double().expand(*shape, -1))

    return hook


def _stream_hook(seen: Pass) -> Callable:
    """Before the first layer: note the stream that enters it, all of it the embedding."""

    def hook(module, args):
        seen.embed = args[0].double()

    return hook


def _final_hook(seen: Pass, set_scale: Tensor | None) -> Callable:
    """After the final norm: note its input; with set_scale, normalise by that scale instead of its own."""

    def hook(module, args, output):
        seen.final = args[0].double()
        if set_scale is not None:
            normed = gain(module) * centre(module, seen.final) / set_scale[..., None] + offset(module)
            return normed.to(output.dtype)

    return hook


def _post_hook(seen: Pass, layer: int, set_scale: Tensor | None) -> Callable:
    """After the norm behind an attention: note its input; with set_scale, normalise by that scale."""

    def hook(module, args, output):
        seen.post[layer] = args[0].double()
        if set_scale is not None:
            return (gain(module) * seen.post[layer] / set_scale[..., None]).to(output.dtype)

    return hook


def run(
    parts: Parts,
    ids: Tensor,
    *,
    set_heads=None,
    set_mlps=None,
    set_scale=None,
    set_posts=None,
    set_mixers=None,
) -> Pass:
    """One full forward pass of the real model on ids [prompt, T].

    set_heads {(layer, head): z [prompt, T, head_dim]}, set_mlps and set_mixers {layer: output [prompt, T, d_model]},
    set_scale [prompt, T] (of the final norm), set_posts {layer: [prompt, T]} (of the norms behind attention) are
    written in place of what the model computes.
    """
    shape = tuple(ids.shape)
    seen = Pass({}, {}, {})
    pairs = [(parts.embed.register_forward_hook, _note_hook(seen, "embed", shape))]
    if parts.first is not None:
        pairs = [(parts.first.register_forward_pre_hook, _stream_hook(seen))]
    if parts.pos_embed is not None:
        pairs.append((parts.pos_embed.register_forward_hook, _note_hook(seen, "pos_embed", shape)))
    for i, layer in enumerate(parts.layers):
        if layer.mixer is None:
            attention = _attention_hook(seen, i, parts.n_heads, set_heads or {})
            pairs.append((layer.projection.register_forward_pre_hook, attention))
        else:
            mixer = _mlp_hook(seen.mixer, i, shape, set_mixers or {})
            pairs.append((layer.mixer.register_forward_hook, mixer))
        pairs.append((layer.mlp.register_forward_hook, _mlp_hook(seen.mlp, i, shape, set_mlps or {})))
        if layer.post is not None:
            hook = _post_hook(seen, i, (set_posts or {}).get(i))
            pairs.append((layer.post.register_forward_hook, hook))
    pairs.append((parts.final_norm.register_forward_hook, _final_hook(seen, set_scale)))
    if getattr(parts.model.config, "final_logit_softcapping", None):
        pairs.append((parts.model.lm_head.register_forward_hook, _note_hook(seen, "logits", shape)))
    with torch.no_grad(), _hooked(pairs):
        seen.returned = parts.model(ids, use_cache=False).logits.double()
    if seen.logits is None:
        seen.logits = seen.returned
    return seen


# ---------------------------------------------------------------- the definitions


def gain(norm: nn.Module) -> Tensor | float:
    """The norm's gamma."""
    if getattr(norm, "weight", None) is None:
        return 1.0
    return norm.weight.detach().double() + (type(norm).__name__ in further.ABOUT_ONE)


def offset(norm: nn.Module) -> Tensor | float:
    """The norm's beta: 0 for RMSNorm, and for LayerNorm without one."""
    beta = _bias(norm)
    return 0.0 if beta is None else beta


def centre(norm: nn.Module, x: Tensor) -> Tensor:
    """C: mean-centring over d_model for LayerNorm, nothing for RMSNorm."""
    return x - x.mean(-1, keepdim=True) if _is_centred(norm) else x


def _is_centred(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) or type(norm).__name__ in further.CENTRED


def scale(norm: nn.Module, x: Tensor) -> Tensor:
    """S: sqrt(var + eps) for LayerNorm, sqrt(mean square + eps) for RMSNorm."""
    named = (getattr(norm, name, None) for name in ("eps", "variance_epsilon"))
    epsilon = next((value for value in named if value is not None), 1e-5)
    return (centre(norm, x).pow(2).mean(-1) + epsilon).sqrt()


def value_constant(layer: Layer) -> Tensor | None:
    """c_h = W_V beta + b_V of every head [head, head_dim]: None where the model has neither beta nor b_V."""
    if layer.W_V is None:
        return layer.constant
    beta = _bias(layer.norm)
    if beta is None and layer.b_V is None:
        return None
    constant = torch.zeros(layer.W_V.shape[1:], dtype=torch.float64)
    if beta is not None:
        constant = constant + torch.einsum("d,dhk->hk", beta, layer.W_V)
    if layer.b_V is not None:
        constant = constant + layer.b_V
    return constant


@dataclass(frozen=True)
class Write:
    """What one component adds to the residual stream [prompt, T, d_model]."""

    label: str
    kind: str
    x: Tensor


def _attention_writes(
    layer: Layer, index: int, z: Tensor, value_bias: str, post: Tensor | None
) -> list[Write]:
    """Each head's write, and the attention's bias where there is one; `post` is what sets a norm behind it."""
    constant = value_constant(layer) if value_bias == "output" else None
    bias, writes = layer.b_O, []
    for head in range(z.shape[2]):
        W = layer.W_O.unflatten(0, (z.shape[2], -1))[head]
        z_h = z[:, :, head]
        if constant is not None:
            z_h = z_h - constant[head]
            bias = constant[head] @ W + (0.0 if bias is None else bias)
        writes.append(Write(f"L{index}H{head}", "head", z_h @ W))
    if bias is not None:
        writes.append(Write(f"L{index}.attention_bias", "attention_bias", bias.expand_as(writes[0].x)))
    if post is None:
        return writes
    factor = gain(layer.post) / scale(layer.post, post)[..., None]
    return [Write(w.label, w.kind, w.x * factor) for w in writes]


def component_writes(parts: Parts, seen: Pass, value_bias: str, clean: Pass) -> list[Write]:
    """Every component's write, in the order of the labels; of a clean pass they sum to the final residual stream.

    The scales of norms behind attention are those of the clean pass.
    """
    writes = [Write("embed", "embed", seen.embed)]
    if parts.pos_embed is not None:
        writes.append(Write("pos_embed", "pos_embed", seen.pos_embed))
    for i, layer in enumerate(parts.layers):
        if layer.mixer is None:
            writes += _attention_writes(layer, i, seen.z[i], value_bias, clean.post.get(i))
        else:
            writes.append(Write(f"L{i}.mixer", "mixer", seen.mixer[i]))
        writes.append(Write(f"L{i}.mlp", "mlp", parts.multiplier * seen.mlp[i]))
    return writes


def _tokens(tokens, ids: Tensor) -> Tensor:
    """Token ids broadcast to [prompt, position]."""
    return torch.as_tensor(np.asarray(tokens)).expand(ids.shape[0], ids.shape[1] - 1)


def _of_target(table: Tensor, ids: Tensor, target) -> Tensor:
    """Rows of table [vocab, ...] for the target of every position, [prompt, position, ...]."""
    if not isinstance(target, str):
        return table[_tokens(target[0], ids)] - table[_tokens(target[1], ids)]
    rows = table[ids[:, 1:]]
    return rows - table.mean(0) if target == "centred" else rows


def _target_logit(logits: Tensor, ids: Tensor, target) -> Tensor:
    """The target's value in the model's own logits [prompt, T, vocab] -> [prompt, position]."""
    logits = logits[:, :-1]

    def pick(tokens):
        return logits.gather(-1, tokens[..., None])[..., 0]

    if not isinstance(target, str):
        return pick(_tokens(target[0], ids)) - pick(_tokens(target[1], ids))
    chosen = pick(ids[:, 1:])
    return chosen - logits.mean(-1) if target == "centred" else chosen


@dataclass(frozen=True)
class Target:
    """Each target: d_t [prompt, position, d_model] and its constant k_t [prompt, position]."""

    d: Tensor
    k: Tensor


def _target(parts: Parts, ids: Tensor, target) -> Target:
    """d_t = C(gamma u_t) and k_t = <beta, u_t> + b_U[t]."""
    unembed = parts.model.get_output_embeddings()
    u = parts.logit_multiplier * _of_target(unembed.weight.detach().double(), ids, target)
    k = (u * offset(parts.final_norm)).sum(-1)
    if unembed.bias is not None:
        k = k + parts.logit_multiplier * _of_target(unembed.bias.detach().double(), ids, target)
    return Target(centre(parts.final_norm, gain(parts.final_norm) * u), k)


def _direct_effects(writes: list[Write], target: Target, S: Tensor) -> Tensor:
    """<x_c, d_t> / S_t of every component, [prompt, position, component]."""
    return torch.stack([(w.x[:, :-1] * target.d).sum(-1) / S for w in writes], dim=-1)


# ---------------------------------------------------------------- the experiment


@dataclass(frozen=True)
class Setting:
    """What is the same for every head: model, prompts and conventions, as the arguments of `reference`."""

    parts: Parts
    ids: Tensor
    target: object
    value_bias: str
    freeze: str | None

    def logit(self, seen: Pass) -> Tensor:
        """The target's logit, from the model's own output."""
        return _target_logit(seen.logits, self.ids, self.target)

    def writes(self, seen: Pass, clean: Pass) -> list[Write]:
        """Every component's write."""
        return component_writes(self.parts, seen, self.value_bias, clean)

    def from_post_norms(self, seen: Pass, clean: Pass, goal: "Target", S: Tensor) -> Tensor | float:
        """What the norms behind attention add to a head's ablation by their change of scale."""
        total = 0.0
        for i, layer in enumerate(self.parts.layers):
            if layer.post is not None and self.freeze != "all":
                change = 1 / scale(layer.post, seen.post[i]) - 1 / scale(layer.post, clean.post[i])
                extra = change[..., None] * gain(layer.post) * seen.post[i]
                total = total + (extra[:, :-1] * goal.d).sum(-1) / S
        return total

    def scale(self, seen: Pass) -> Tensor:
        """The final norm's scale [prompt, T]."""
        return scale(self.parts.final_norm, seen.final)


@dataclass(frozen=True)
class Clean:
    """The clean run, read out once."""

    seen: Pass
    goal: Target
    S_all: Tensor  # [prompt, T]
    logit: Tensor
    effects: Tensor  # [prompt, position, component]
    labels: list[str]
    kinds: list[str]

    @property
    def S(self) -> Tensor:
        """The clean scale at the positions with a next token."""
        return self.S_all[:, :-1]


def _clean(setting: Setting) -> Clean:
    """The clean run and its direct effects."""
    seen = run(setting.parts, setting.ids)
    S, writes = setting.scale(seen), setting.writes(seen, seen)
    goal = _target(setting.parts, setting.ids, setting.target)
    effects = _direct_effects(writes, goal, S[:, :-1])
    labels, kinds = [w.label for w in writes], [w.kind for w in writes]
    return Clean(seen, goal, S, setting.logit(seen), effects, labels, kinds)


def _new_z(setting: Setting, clean: Clean, ablation: str, partners, means, layer: int, head: int) -> Tensor:
    """What the head's z becomes, [prompt, T, head_dim]."""
    z = clean.seen.z[layer][:, :, head]
    if ablation == "resample":
        return z[torch.as_tensor(np.asarray(partners))]
    if ablation == "mean":
        return means[layer][head].expand_as(z)
    if ablation == "identity":
        return z
    constant = value_constant(setting.parts.layers[layer]) if setting.value_bias == "output" else None
    return torch.zeros_like(z) if constant is None else constant[head].expand_as(z)


def _ablated(setting: Setting, clean: Clean, layer: int, head: int, new_z: Tensor, S: Tensor | None = None) -> Pass:
    """The real forward pass with one head's z replaced, and what `freeze` names held at its clean value.

    S is the scale of the final norm, where that is set.
    """
    parts, set_heads, set_mlps = setting.parts, {(layer, head): new_z}, {}
    if setting.freeze is not None:
        for later in range(layer, len(parts.layers)):
            set_mlps[later] = clean.seen.mlp[later]
        for later in range(layer + 1, len(parts.layers)):
            for other in range(parts.n_heads if later in clean.seen.z else 0):
                set_heads[later, other] = clean.seen.z[later][:, :, other]
    held = {"set_mixers": clean.seen.mixer} if setting.freeze else {}
    held |= {} if S is None else {"set_scale": S}
    if setting.freeze == "all":
        posts = {i: scale(parts.layers[i].post, x) for i, x in clean.seen.post.items()}
        held |= {"set_scale": clean.S_all, "set_posts": posts}
    return run(parts, setting.ids, set_heads=set_heads, set_mlps=set_mlps, **held)


def _measure(setting: Setting, clean: Clean, seen: Pass, own: int) -> dict[str, Tensor]:
    """Equations 1 and 2 for one ablated head, which is component number `own`."""
    effects = _direct_effects(setting.writes(seen, clean.seen), clean.goal, clean.S)
    change = effects - clean.effects
    heads = [i for i, kind in enumerate(clean.kinds) if kind == "head" and i != own]
    mlps = [i for i, kind in enumerate(clean.kinds) if kind == "mlp"]
    S = clean.S
    S_new = S if setting.freeze == "all" else setting.scale(seen)[:, :-1]
    post = setting.from_post_norms(seen, clean.seen, clean.goal, S) + torch.zeros_like(S)
    R, R_new = clean.logit - clean.goal.k, effects.sum(-1) + post
    out = {
        "direct_effect": clean.effects[..., own],
        "ablated_direct_effect": effects[..., own],
        "logit_change": setting.logit(seen) - clean.logit,
        "from_heads": change[..., heads].sum(-1),
        "from_mlps": change[..., mlps].sum(-1),
        "from_mixers": change[..., [i for i, kind in enumerate(clean.kinds) if kind == "mixer"]].sum(-1),
        "from_post_norms": post,
        "from_norm": (S / S_new - 1) * R_new,
        "norm_on_existing": (S / S_new - 1) * R,
        "norm_on_change": (S / S_new - 1) * (R_new - R),
        "ablated_norm_scale": S_new,
        "component_change": change,
    }
    out["self_repair"] = out["logit_change"] - change[..., own]
    parts = ("from_heads", "from_mlps", "from_mixers", "from_post_norms", "from_norm")
    out["closure"] = out["self_repair"] - sum(out[part] for part in parts)
    raw = [_target_logit(p.returned, setting.ids, "raw") for p in (seen, clean.seen)]
    out["logit_change_capped"] = raw[0] - raw[1]
    return out


def _check(ablation: str, partners, target, value_bias: str, freeze) -> None:
    """ValueError for a word the oracle does not know: a misspelt one must not fall through to a default."""
    if ablation not in ("resample", "zero", "mean", "identity"):
        raise ValueError(f"ablation {ablation!r}")
    if ablation == "resample" and partners is None:
        raise ValueError("resample needs partners")
    if isinstance(target, str) and target not in ("raw", "centred"):
        raise ValueError(f"target {target!r}")
    if value_bias not in ("output", "head"):
        raise ValueError(f"value_bias {value_bias!r}")
    if freeze not in (None, "downstream", "all"):
        raise ValueError(f"freeze {freeze!r}")


def _empty(parts: Parts, ids: Tensor, n_components: int) -> dict[str, np.ndarray]:
    """NaN arrays for all heads, of which only those asked for are filled."""
    shape = (len(parts.layers), parts.n_heads, ids.shape[0], ids.shape[1] - 1)
    out = {name: np.full(shape, np.nan) for name in (*PER_HEAD, *OF_SOME_MODELS)}
    out["component_change"] = np.full((*shape, n_components), np.nan)
    return out


def reference(
    model: nn.Module,
    ids,
    *,
    ablation: str = "resample",
    partners: Sequence[int] | None = None,
    target="centred",
    value_bias: str = "output",
    heads: Sequence[tuple[int, int]] | None = None,
    mean_ids=None,
    freeze: str | None = None,
) -> dict[str, np.ndarray | list[str]]:
    """Self-repair of each head, one at a time, on ids int64 [prompt, T].

    ablation    "resample" (z of prompt partners[i]), "zero", "mean" (over all T positions of all rows of
                mean_ids, by default ids[:256]) or "identity", on z_h at all T positions.
    target      "centred", "raw", or a pair (A, B) of token ids or of arrays of them that broadcast to
                [prompt, position]: the logit difference A - B.
    value_bias  "output": a head's constant c_h belongs to the attention's bias, and zero sets z_h = c_h;
                "head": it stays with the head, and zero sets z_h = 0.
    heads       the (layer, head) pairs to ablate, by default all; those left out are NaN.
    freeze      None; "downstream": all later heads' z and the MLPs of this layer and of the later ones are
                held clean, the final norm is live; "all": the final norm's scale is held as well, so that
                ablated_norm_scale is then the clean one and from_norm is 0.

    Returns float64 arrays, in logits but for the two scales, for the positions 0 .. T-2:
    logit, norm_scale and constant (k_t) [prompt, position]; the variables of PER_HEAD and OF_SOME_MODELS [layer, head,
    prompt, position]; component_direct_effect [prompt, position, component]; component_change [layer, head, prompt,
    position, component]; under "components" the list of labels, under "of_this_model" the names of what not every
    model has, under "having" the layers that have heads; of others there are none.
    """
    _check(ablation, partners, target, value_bias, freeze)
    setting = Setting(find_parts(model), torch.as_tensor(np.asarray(ids)), target, value_bias, freeze)
    clean, means = _clean(setting), None
    if ablation == "mean":
        over = setting.ids[:256] if mean_ids is None else torch.as_tensor(np.asarray(mean_ids))
        means = {layer: z.mean(dim=(0, 1)) for layer, z in run(setting.parts, over).z.items()}
    out = _empty(setting.parts, setting.ids, len(clean.labels))
    having = [i for i, layer in enumerate(setting.parts.layers) if layer.mixer is None]
    for layer, head in product(having, range(setting.parts.n_heads)) if heads is None else heads:
        new_z = _new_z(setting, clean, ablation, partners, means, layer, head)
        seen = _ablated(setting, clean, layer, head, new_z)
        for name, value in _measure(setting, clean, seen, clean.labels.index(f"L{layer}H{head}")).items():
            out[name][layer, head] = value.numpy()
    out["logit"], out["norm_scale"] = clean.logit.numpy(), clean.S.numpy()
    out["constant"], out["component_direct_effect"] = clean.goal.k.numpy(), clean.effects.numpy()
    of_this_model = set() if setting.parts.layers[0].post is None else {"from_post_norms"}
    if len(having) < len(setting.parts.layers):
        of_this_model.add("from_mixers")
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        of_this_model.add("logit_change_capped")
    return out | {"components": clean.labels, "of_this_model": of_this_model, "having": having}


# ---------------------------------------------------------------- in nats


def distributions(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """What is told of the next-token distributions [prompt, T, vocab] that a model returns: [prompt, position] each."""
    logits = logits[:, :-1]
    logprobs = logits.log_softmax(-1)
    target = logprobs.gather(-1, ids[:, 1:, None])
    return {
        "logprobs": logprobs,
        "logprob": target[..., 0],
        "logsumexp": logits.exp().sum(-1).log(),
        "entropy": -(logprobs.exp() * logprobs).sum(-1),
        "target_rank": (logprobs > target).sum(-1),
    }


def in_nats(clean: Tensor, live: Tensor, frozen: Tensor, own: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """What an ablation does to the next-token distribution, from the logits that four whole passes return.

    `frozen`: under the clean scale of the final norm; `own`: all else frozen too, so that only the own write changes.
    """
    clean, live, frozen, own = (distributions(each, ids) for each in (clean, live, frozen, own))
    return {
        "logprob_change": live["logprob"] - clean["logprob"],
        "self_repair_logprob": live["logprob"] - own["logprob"],
        "norm_logprob": live["logprob"] - frozen["logprob"],
        "logsumexp_change": live["logsumexp"] - clean["logsumexp"],
        "frozen_norm_logsumexp_change": frozen["logsumexp"] - clean["logsumexp"],
        "entropy_change": live["entropy"] - clean["entropy"],
        "kl": (clean["logprobs"].exp() * (clean["logprobs"] - live["logprobs"])).sum(-1),
        "ablated_target_rank": live["target_rank"],
    }


def outcomes(model: nn.Module, ids, heads, *, partners, freeze: str | None = None) -> dict[str, np.ndarray]:
    """`distributions` of the clean run [prompt, position], `in_nats` of resampled heads [case, prompt, position]."""
    setting = Setting(find_parts(model), torch.as_tensor(np.asarray(ids)), "raw", "output", freeze)
    clean, rows = _clean(setting), []
    for layer, head in heads:
        new_z = _new_z(setting, clean, "resample", partners, None, layer, head)
        passes = [
            clean.seen,
            _ablated(setting, clean, layer, head, new_z),
            _ablated(setting, clean, layer, head, new_z, clean.S_all),
            _ablated(replace(setting, freeze="all"), clean, layer, head, new_z),
        ]
        rows.append(in_nats(*(each.returned for each in passes), setting.ids))
    found = distributions(clean.seen.returned, setting.ids)
    del found["logprobs"]
    found |= {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {name: value.numpy() for name, value in found.items()}


# ---------------------------------------------------------------- in words


def lens(parts: Parts, x: Tensor, S: Tensor) -> Tensor:
    """What a write x [prompt, T, d_model] does to every logit, less their mean: [prompt, position, vocab]."""
    u = parts.logit_multiplier * parts.model.get_output_embeddings().weight.detach().double()
    logits = gain(parts.final_norm) * centre(parts.final_norm, x) / S[..., None] @ u.T
    return (logits - logits.mean(-1, keepdim=True))[:, :-1]


def words(model: nn.Module, ids, head: tuple[int, int], *, partners, freeze: str | None = None) -> dict[str, object]:
    """What a resampled head and what reacts to it does to every logit, less their mean over the vocabulary.

    write, ablated (the head's), change (the whole model's) [prompt, position, vocab]; of every component the change of
    what it writes, and its change of direct effect [prompt, position, component], the head's own 0.
    """
    setting = Setting(find_parts(model), torch.as_tensor(np.asarray(ids)), "centred", "output", freeze)
    clean = _clean(setting)
    seen = _ablated(setting, clean, *head, _new_z(setting, clean, "resample", partners, None, *head))
    before, after = (setting.writes(each, clean.seen) for each in (clean.seen, seen))
    own, parts = clean.labels.index(f"L{head[0]}H{head[1]}"), setting.parts
    whole = (seen.logits - clean.seen.logits)[:, :-1]
    effects = _direct_effects(after, clean.goal, clean.S) - clean.effects
    effects[..., own] = 0
    return {
        "write": lens(parts, before[own].x, clean.S_all),
        "ablated": lens(parts, after[own].x, clean.S_all),
        "change": whole - whole.mean(-1, keepdim=True),
        "changes": [lens(parts, b.x - a.x, clean.S_all) for a, b in zip(before, after, strict=True)],
        "effects": effects,
    }
