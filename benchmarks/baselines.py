"""What the engine is compared with: two ways to ablate every head in plain PyTorch, without nnsight.

`naive` is what one writes first; `suffix` is what one writes with care, for this one experiment.
Both take tokens [prompt, position], `partner` [prompt] (whose z replaces a prompt's z) and heads [(layer, head)].
"""

import torch

from benchmarks.parts import Parts, hooks


@torch.no_grad()
def naive(module, tokens, partner, heads):
    """One whole forward pass, vocabulary included, for each ablated head; hooks edit and read.

    Returns logit_change (of the raw logit) and ablated_norm_scale, each [case, prompt, position]: no direct
    effect and nothing of Equation 2.
    """
    parts = Parts(module)
    targets, z, scales, changes = tokens[:, 1:, None], {}, [], []

    def logit():
        return module(tokens, use_cache=False).logits[:, :-1].gather(-1, targets)[..., 0]

    def keep(layer):
        return parts.projections[layer].register_forward_pre_hook(lambda _, args: z.update({layer: args[0]}))

    def replace(layer, head):
        def hook(_, args):
            edited = args[0].clone()
            parts.head(edited, head)[:] = parts.head(z[layer], head)[partner]
            return (edited,)

        return parts.projections[layer].register_forward_pre_hook(hook)

    def read(_, args):
        scales.append(parts.scale(args[0][:, :-1]))

    with hooks(*[keep(layer) for layer in range(len(parts.layers))]):
        clean = logit()
    with hooks(parts.final_norm.register_forward_pre_hook(read)):
        for layer, head in heads:
            with hooks(replace(layer, head)):
                changes.append(logit() - clean)
    return {"logit_change": torch.stack(changes), "ablated_norm_scale": torch.stack(scales)}


@torch.no_grad()
def suffix(module, tokens, partner, heads, rows):
    """Passes that start after the ablated layer's attention and carry several heads, at most `rows` tokens.

    Returns logit_change (of the raw logit), ablated_norm_scale, own_change (of the head's direct effect),
    from_heads, from_mlps and from_norm, each [case, prompt, position].
    """
    parts, step = Parts(module), max(1, rows // tokens.numel())
    rotary = parts.rotary_of(tokens)
    clean = _clean(parts, tokens, rotary)
    found = []
    for layer in sorted({layer for layer, _ in heads}):
        own = [head for where, head in heads if where == layer]
        for first in range(0, len(own), step):
            group = own[first : first + step]
            found.append(_ablate(parts, tokens, rotary, clean, partner, layer, group))
    return {name: torch.cat([f[name] for f in found]) for name in found[0]}


def _clean(parts, tokens, rotary):
    """What the ablated passes start from and are compared with; lists by layer, and the final residual stream."""
    kept = {"input": [], "z": [], "attention": [], "mlp": []}
    x = parts.embedding(tokens)
    for layer, projection in enumerate(parts.projections):
        with hooks(projection.register_forward_pre_hook(lambda _, args: kept["z"].append(args[0]))):
            attention = parts.attend(layer, x, rotary)
        mlp = parts.mlp(layer, x if parts.parallel else x + attention)
        for name, value in (("input", x), ("attention", attention), ("mlp", mlp)):
            kept[name].append(value)
        x = x + attention + mlp
    direction, mean_direction = parts.directions(tokens[:, 1:])
    return kept | {"final": x, "direction": direction, "mean_direction": mean_direction}


def _ablate(parts, tokens, rotary, clean, partner, start, group):
    """The heads `group` of layer `start`, each in its own copy of the prompts."""
    cases = len(group)

    def copies(x):
        return x.repeat(cases, 1, 1)

    def along(change, direction):
        """⟨change, d_t⟩ of all but the last position: [case, prompt, position]."""
        return (change.unflatten(0, (cases, -1))[:, :, :-1] * direction).sum(-1)

    direction, z = clean["direction"], clean["z"][start]
    change = z[partner] - z
    written = torch.cat([parts.head(change, h) @ parts.head_projection(start, h) for h in group])
    own = along(written, direction)
    from_heads, from_mlps = torch.zeros_like(own), torch.zeros_like(own)
    x = copies(clean["input"][start])
    for layer in range(start, len(parts.layers)):
        if layer == start:
            attention = copies(clean["attention"][start]) + written
        else:
            attention = parts.attend(layer, x, rotary)
            from_heads += along(attention - copies(clean["attention"][layer]), direction)
        if layer == start and parts.parallel:
            mlp = copies(clean["mlp"][layer])
        else:
            mlp = parts.mlp(layer, x if parts.parallel else x + attention)
            from_mlps += along(mlp - copies(clean["mlp"][layer]), direction)
        x = x + attention + mlp
    return readout(parts, clean, x, own, from_heads, from_mlps, cases)


def readout(parts, clean, x, own, from_heads, from_mlps, cases):
    """From sums of ⟨x_c, d_t⟩ to logits: Equation 2 and the change of the raw logit."""
    final = x.unflatten(0, (cases, -1))[:, :, :-1]
    before, direction, mean = clean["final"][:, :-1], clean["direction"], clean["mean_direction"]
    scale, ablated_scale = parts.scale(before), parts.scale(final)
    stretch = scale / ablated_scale - 1
    effects = (before * (direction + mean)).sum(-1) / scale
    change = ((final - before) * (direction + mean)).sum(-1) / scale
    existing = (before * direction).sum(-1) / scale
    own, from_heads, from_mlps = own / scale, from_heads / scale, from_mlps / scale
    return {
        "logit_change": stretch * (effects + change) + change,
        "ablated_norm_scale": ablated_scale,
        "own_change": own,
        "from_heads": from_heads,
        "from_mlps": from_mlps,
        "from_norm": stretch * (existing + own + from_heads + from_mlps),
    }
