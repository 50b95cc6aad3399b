"""What a pass changed, as direct effects: the terms of Equations 1 and 2, from activations and probed directions."""

import torch

from selfrepair_nn.tracing.readouts import along, norm_scale, per_head, product, widen


def query(probed, layer):
    """d_t pulled back through W_O: [prompt, position, heads * d_head], so that z times it is every head's effect."""
    return product(probed["direction"], probed["output_projection"][layer].flatten(0, 1).T)


def neuron_query(probed, layer):
    """d_t pulled back through the MLP's output projection: [prompt, position, neurons]."""
    return product(probed["direction"], probed["down_projection"][layer].T)


def clean_readout(clean, probed, plan):
    """Logits, norm scale and R = logit - k of the clean run [prompt, position], and what else the plan records."""
    final = widen(clean["input"][plan["model"]["n_layers"]])[:, :-1]
    scale = norm_scale(final, plan)
    effects = along(final, probed["direction"]) / scale
    mean_effects = along(final, probed["mean_direction"]) / scale
    state = {
        "norm_scale": scale,
        "effects": effects,
        "mean_effects": mean_effects,
        "logit": effects + probed["constant"],
        "mean_logit": mean_effects + probed["mean_constant"],
    }
    if plan["residual_norm"]:
        state["residual_norm"] = final.norm(dim=-1)
    if plan["neurons"] is not None:
        layer, positions = plan["neurons"], scale.shape[1]
        hidden = widen(clean["hidden"][layer])[:, :positions]
        state["neuron_effects"] = hidden * probed["neuron_query"][layer] / scale[..., None]
        state["mlp_direct_effect"] = along(clean["mlp"][layer][:, :positions], probed["direction"]) / scale
    return state


def ablated_readout(changes, group, clean, probed, state, plan):
    """The stored quantities of one pass: [case, prompt, position] each."""
    scale, count = state["norm_scale"], len(group)

    def fold(x):
        return x.unflatten(0, (count, -1))

    effects = [_effects(case, changes, index, scale) for index, case in enumerate(group)]
    before = torch.stack([sum(b for b, _ in each.values()) for each in effects])
    after = torch.stack([sum(a for _, a in each.values()) for each in effects])
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
        "from_heads": heads - _own_seen(group, effects, ("head",), scale),
        "from_mlps": mlps - _own_seen(group, effects, ("mlp", "neuron"), scale),
        "ablated_norm_scale": ablated_scale,
    }
    if plan["residual_norm"]:
        out["ablated_residual_norm"] = final.norm(dim=-1)
    if plan["replacement"]["kind"] == "reinforce":
        out["inserted_direct_effect"] = torch.stack([case["inserted"] for case in group]) / scale
    if plan["record"] == "full":
        out["component_change"] = _component_changes(changes, group, effects, state, plan)
    if plan["neurons"] is not None:
        out |= _neuron_changes(changes, group, effects, fold, state, plan)
    return out


def _rescaled(effects, change, scale, ablated_scale):
    """(R + change) S / S' - R: the change of a logit whose constant does not change, without cancellation."""
    return (scale / ablated_scale - 1) * (effects + change) + change


def _effects(case, changes, index, scale):
    """Direct effect of each site of a case before and after, in logits: {site: (before, after)}.

    A reinforced head is not replaced: its effect afterwards is what its pass showed.
    """
    found = {site: (before / scale, after / scale) for site, (before, after) in case["effects"].items()}
    if "inserted" in case:
        (site,) = case["sites"]
        prompts = scale.shape[0]
        change = changes["heads"][site[1]][index * prompts : (index + 1) * prompts, :, site[2]]
        found[site] = (found[site][0], found[site][0] + change / scale)
    return found


def _own_seen(group, effects, kinds, scale):
    """The part of the measured changes of heads or MLPs that belongs to the ablated sites themselves: [case, …]."""
    sums = []
    for case, found in zip(group, effects, strict=True):
        seen = [
            after - before
            for site, (before, after) in found.items()
            if site[0] in kinds and (site in case["new"] or "inserted" in case)
        ]
        sums.append(sum(seen, torch.zeros_like(scale)))
    return torch.stack(sums)


def _component_changes(changes, group, effects, state, plan):
    """Every component's change of direct effect: [case, prompt, position, component]."""
    scale, cases = state["norm_scale"], len(group)
    index = _component_index(plan)
    out = scale.new_zeros(cases, *scale.shape, len(index))
    for layer, x in changes["heads"].items():
        first = index["head", layer, 0]
        out[..., first : first + x.shape[-1]] = x.unflatten(0, (cases, -1)) / scale[..., None]
    for layer, x in changes["mlps"].items():
        out[..., index["mlp", layer]] = x.unflatten(0, (cases, -1)) / scale
    for number, (case, found) in enumerate(zip(group, effects, strict=True)):
        for site, (before, after) in found.items():
            if site[0] == "layers":
                gone = [i for name, i in index.items() if name[1] in range(site[1], site[2])]
                out[number, ..., gone] = -state["component_effects"][..., gone]
            elif site in case["new"] or "inserted" in case:
                continue
            elif site[0] == "neuron":
                out[number, ..., index["mlp", site[1]]] += after - before
            else:
                out[number, ..., index[site]] = after - before
    return out


def _component_index(plan):
    """Where each component stands, in the order of components.components."""
    names = [("embed", None), *([("pos_embed", None)] if plan["model"]["position_embedding"] else [])]
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
        through = per_head(probed["query"][layer], plan)
        effects += (z * through).sum(-1).unbind(-1)
        if plan["attention_bias"]:
            constant = (probed["value_constant"][layer] * through).sum((-1, -2))
            effects.append(along(probed["output_bias"][layer], direction) + constant)
        effects.append(along(clean["mlp"][layer][:, :-1], direction))
    return torch.stack(effects, -1) / scale[..., None]


def _neuron_changes(changes, group, effects, fold, state, plan):
    """What the recorded MLP and its neurons changed; the most repairing neurons of each token by name.

    Where the pass begins above them, only what the case itself ablates of them changed.
    """
    scale, layer, clean = state["norm_scale"], plan["neurons"], state["neuron_effects"]
    if layer in changes["mlps"]:
        change, whole = fold(changes["neurons"]) / scale[..., None], fold(changes["mlps"][layer]) / scale
    else:
        change, whole = clean.new_zeros(len(group), *clean.shape), scale.new_zeros(len(group), *scale.shape)
        for index, found in enumerate(effects):
            for site, (before, after) in found.items():
                if site[:2] == ("neuron", layer):
                    change[index, ..., site[2]] = after - before
                    whole[index] += after - before
                elif site[0] == "layers" and layer in range(site[1], site[2]):
                    change[index], whole[index] = -clean, -state["mlp_direct_effect"]
    most, which = change.topk(min(plan["ranks"], change.shape[-1]))
    return {
        "mlp_change": whole,
        "top_neuron": which,
        "top_neuron_change": most,
        "top_neuron_direct_effect": clean.expand_as(change).gather(-1, which),
        "neuron_change": change,
    }
