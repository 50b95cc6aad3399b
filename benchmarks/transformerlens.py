"""What the engine is compared with through TransformerLens: the paper's own algorithm, and a careful user's.

Both take a HookedTransformer, the module that it was made from, tokens [prompt, position], `partner` [prompt] (whose z
replaces a prompt's z) and heads [(layer, head)]. Importing this needs what requirements-transformerlens.txt names.
"""

from functools import partial

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights

from benchmarks.baselines import readout
from benchmarks.parts import Parts

UNPROCESSED = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


def hooked(module, length: int) -> HookedTransformer:
    """The Llama `module` as a HookedTransformer for rows of `length` tokens, its weights as they are."""
    c = module.config
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=length,
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        gated_mlp=True,
        act_fn=c.hidden_act,
        d_vocab=c.vocab_size,
        normalization_type="RMS",
        final_rms=True,
        eps=c.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=c.head_dim,
        rotary_base=c.rope_parameters["rope_theta"],
        device="cpu",
    )
    model = HookedTransformer(config, move_to_device=False)
    weights = convert_llama_weights(module, config)
    model.load_and_process_state_dict(weights, **dict.fromkeys(UNPROCESSED, False))
    return model.eval()


@torch.no_grad()
def published(model, module, tokens, partner, heads, own_results=False):
    """As the paper's code breaks self-repair down: four whole passes for each head, three of them cached in full.

    They are the partners' pass and the ablated pass, once for the cache and once for the logits. Every head's and
    MLP's direct effect is then computed from the ablated cache, under the clean scale. `own_results` lets
    TransformerLens write every head's output in every pass, as the paper does (set_use_attn_result). It then did so
    by a matrix product, as is done here on the cached z without it; today it does so elementwise, which is far slower.

    Returns logit_change (of the raw logit), own_change, from_heads and from_mlps, each [case, prompt, position].
    """
    direction = Parts(module).directions(tokens[:, 1:])[0]
    model.set_use_attn_result(own_results)

    def effects(cache):
        return _direct_effects(model, cache, clean, direction)

    logits, clean = model.run_with_cache(tokens)
    of_heads, of_mlps = effects(clean)
    found = []
    for layer, head in heads:
        cache = _patched(model, tokens, partner, layer, head, model.run_with_cache, return_type=None)[1]
        ablated = _patched(model, tokens, partner, layer, head, model)
        heads_change, mlps_change = (a - b for a, b in zip(effects(cache), (of_heads, of_mlps), strict=True))
        own = heads_change[layer, head]
        change = _correct(ablated, tokens) - _correct(logits, tokens)
        found.append((change, own, heads_change.sum((0, 1)) - own, mlps_change.sum(0)))
    names = ("logit_change", "own_change", "from_heads", "from_mlps")
    return dict(zip(names, map(torch.stack, zip(*found, strict=True)), strict=True))


def _patched(model, tokens, partner, layer, head, run, **how):
    """`run` on the tokens with the head's z from the partners, which are run and cached in full for it."""
    _, other = model.run_with_cache(tokens[partner], return_type=None)

    def replace(z, hook):
        z[:, :, head] = other[hook.name][:, :, head]
        return z

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", replace)]):
        return run(tokens, **how)


def _direct_effects(model, cache, clean, direction):
    """Of every head [layer, head, prompt, position] and of every MLP [layer, prompt, position]."""
    layers = range(model.cfg.n_layers)
    heads = torch.stack([_written(model, cache, layer) for layer in layers]).movedim(3, 1)
    mlps = torch.stack([cache["mlp_out", layer] for layer in layers])
    scaled = (clean.apply_ln_to_stack(stack, layer=-1) for stack in (heads.flatten(0, 1), mlps))
    by_head, by_mlp = (torch.einsum("cptm,ptm->cpt", stack[:, :, :-1], direction) for stack in scaled)
    return by_head.unflatten(0, (len(layers), -1)), by_mlp


def _written(model, cache, layer):
    """What each head of a layer writes: [prompt, position, head, d_model]."""
    if model.cfg.use_attn_result:
        return cache["result", layer]
    return torch.einsum("pthd,hdm->pthm", cache["z", layer], model.blocks[layer].attn.W_O)


def _correct(logits, tokens):
    return logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]


@torch.no_grad()
def careful(model, module, tokens, partner, heads):
    """One hooked pass for each head, from its layer on and without vocabulary; hooks keep only what Equation 2 needs.

    Returns what `suffix` returns.
    """
    parts = Parts(module)
    wanted = (
        "hook_resid_pre",
        "hook_z",
        "hook_attn_out",
        "hook_mlp_out",
        f"{model.cfg.n_layers - 1}.hook_resid_post",
    )
    _, cache = model.run_with_cache(tokens, return_type=None, names_filter=lambda name: name.endswith(wanted))
    direction, mean_direction = parts.directions(tokens[:, 1:])
    clean = {"final": cache["resid_post", -1], "direction": direction, "mean_direction": mean_direction}
    found = [_careful(model, parts, cache, clean, partner, *head) for head in heads]
    return {name: torch.cat([f[name] for f in found]) for name in found[0]}


def _careful(model, parts, cache, clean, partner, layer, head):
    def along(change):
        return (change[:, :-1] * clean["direction"]).sum(-1)

    def replace(z, hook):
        z[:, :, head] = cache[hook.name][partner, :, head]
        return z

    def add(value, hook, where):
        sums[where] += along(value - cache[hook.name])

    def keep(value, hook):
        finals.append(value)

    z = cache["z", layer][:, :, head]
    own = along((z[partner] - z) @ model.blocks[layer].attn.W_O[head])[None]
    sums, finals = torch.zeros(2, *own.shape[1:]), []
    n = model.cfg.n_layers
    edits = [(f"blocks.{layer}.attn.hook_z", replace), (f"blocks.{n - 1}.hook_resid_post", keep)]
    edits += [(f"blocks.{later}.hook_attn_out", partial(add, where=0)) for later in range(layer + 1, n)]
    edits += [(f"blocks.{later}.hook_mlp_out", partial(add, where=1)) for later in range(layer, n)]
    start = cache["resid_pre", layer]
    model.run_with_hooks(start, start_at_layer=layer, return_type=None, fwd_hooks=edits)
    return readout(parts, clean, finals[0], own, *sums[:, None], cases=1)
