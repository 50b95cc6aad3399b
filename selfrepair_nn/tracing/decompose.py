"""What a pass changed, as direct effects: the terms of Equations 1 and 2, from activations and probed directions."""

import torch

from selfrepair_nn.tracing.readouts import along, norm_scale, per_head, product, widen


def direct_effect(z, site, probed, scale, plan):
    """DE of one head whose z is [prompt, position, d_head], in logits under the clean scale: [prompt, position]."""
    layer, head = site
    own = widen(z)[:, : scale.shape[1]] - probed["value_constant"][layer][head]
    return along(own, per_head(probed["query"][layer], plan)[:, :, head]) / scale


def query(probed, layer):
    """d_t pulled back through W_O: [prompt, position, heads * d_head], so that z times it is every head's effect."""
    return product(probed["direction"], probed["output_projection"][layer].flatten(0, 1).T)


def clean_readout(clean, probed, plan):
    """Logits and norm scale of the clean run, and R = logit - k: [prompt, position]."""
    final = widen(clean["input"][plan["model"]["n_layers"]])[:, :-1]
    scale = norm_scale(final, plan)
    effects = along(final, probed["direction"]) / scale
    mean_effects = along(final, probed["mean_direction"]) / scale
    return {
        "norm_scale": scale,
        "effects": effects,
        "mean_effects": mean_effects,
        "logit": effects + probed["constant"],
        "mean_logit": mean_effects + probed["mean_constant"],
    }


def ablated_readout(changes, group, replaced, clean, probed, state, plan):
    """The stored quantities of one pass: [case, prompt, position] each."""
    scale, count = state["norm_scale"], len(group)

    def fold(x):
        return x.unflatten(0, (count, -1))

    own = [_own_effects(case, clean, probed, scale, plan) for case in replaced]
    before = torch.stack([sum(b for b, _ in effects.values()) for effects in own])
    after = torch.stack([sum(a for _, a in effects.values()) for effects in own])
    later_own = torch.stack([_own_changes_seen(effects, changes["heads"], scale) for effects in own])
    heads = sum((fold(x.sum(-1)) / scale for x in changes["heads"].values()), torch.zeros_like(before))
    mlps = sum((fold(x) / scale for x in changes["mlps"].values()), torch.zeros_like(before))
    final = fold(widen(changes["final"]))[:, :, :-1]
    difference = final - widen(clean["input"][plan["model"]["n_layers"]])[:, :-1]
    ablated_scale = scale.expand_as(before) if plan["frozen_norm"] else norm_scale(final, plan)
    out = {
        "direct_effect": before,
        "ablated_direct_effect": after,
        "logit_change": _rescaled(
            state["effects"], along(difference, probed["direction"]) / scale, scale, ablated_scale
        ),
        "mean_logit_change": _rescaled(
            state["mean_effects"], along(difference, probed["mean_direction"]) / scale, scale, ablated_scale
        ),
        "from_heads": heads - later_own,
        "from_mlps": mlps,
        "ablated_norm_scale": ablated_scale,
    }
    if plan["record"] == "full":
        out["component_change"] = _component_changes(changes, own, scale, plan)
    return out


def _rescaled(effects, change, scale, ablated_scale):
    """(R + change) S / S' - R: the change of a logit whose constant does not change, without cancellation."""
    return (scale / ablated_scale - 1) * (effects + change) + change


def _own_effects(case, clean, probed, scale, plan):
    """Direct effect of each head of a case before and after its replacement: {(layer, head): (before, after)}."""
    return {
        (layer, head): tuple(
            direct_effect(z, (layer, head), probed, scale, plan)
            for z in (per_head(clean["z"][layer], plan)[:, :, head], new)
        )
        for (layer, head), new in case.items()
    }


def _own_changes_seen(effects, heads, scale):
    """The part of the measured changes of heads that belongs to the ablated heads of later layers themselves."""
    seen = [after - before for (layer, _), (before, after) in effects.items() if layer in heads]
    return sum(seen, torch.zeros_like(scale))


def _component_changes(changes, own, scale, plan):
    """Every component's change of direct effect: [case, prompt, position, component]."""
    index, cases = _component_index(plan), len(own)
    out = scale.new_zeros(cases, *scale.shape, len(index))
    for layer, x in changes["heads"].items():
        first = index["head", layer, 0]
        out[..., first : first + x.shape[-1]] = x.unflatten(0, (cases, -1)) / scale[..., None]
    for layer, x in changes["mlps"].items():
        out[..., index["mlp", layer]] = x.unflatten(0, (cases, -1)) / scale
    for case, effects in enumerate(own):
        for (layer, head), (before, after) in effects.items():
            out[case, ..., index["head", layer, head]] = after - before
    return out


def _component_index(plan):
    """Where each component stands, in the order of components.components."""
    names = ["embed", *(["pos_embed"] if plan["model"]["position_embedding"] else [])]
    for layer in range(plan["model"]["n_layers"]):
        names += [("head", layer, head) for head in range(plan["model"]["n_heads"])]
        names += [("attention_bias", layer)] if plan["attention_bias"] else []
        names.append(("mlp", layer))
    return {name: index for index, name in enumerate(names)}


def component_effects(embedded, clean, probed, state, plan):
    """Direct effect of every component, clean: [prompt, position, component]; `embedded` is what `embeddings` gives."""
    direction, scale = probed["direction"], state["norm_scale"]
    effects = [along(x[:, :-1], direction) for x in embedded]
    for layer in range(plan["model"]["n_layers"]):
        z = per_head(widen(clean["z"][layer])[:, :-1], plan) - probed["value_constant"][layer]
        query = per_head(probed["query"][layer], plan)
        effects += (z * query).sum(-1).unbind(-1)
        if plan["attention_bias"]:
            constant = (probed["value_constant"][layer] * query).sum((-1, -2))
            effects.append(along(probed["output_bias"][layer], direction) + constant)
        effects.append(along(clean["mlp"][layer][:, :-1], direction))
    return torch.stack(effects, -1) / scale[..., None]
