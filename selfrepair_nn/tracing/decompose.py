"""What a pass changed, as direct effects: the terms of Equations 1 and 2, from activations and probed directions."""

import torch

from selfrepair_nn.tracing.readouts import (
    along,
    behind_norm,
    capped,
    norm_scale,
    per_head,
    product,
    total,
    widen,
)
from selfrepair_nn.tracing.routing import experts_used, rerouted


def pullback(probed, clean, layer):
    """d_t pulled back through W_O: [prompt, position, heads * d_head], so that z times it is every head's effect."""
    direction = behind_norm(probed["given_direction"], probed, clean, layer)
    through = probed["output_projection"][layer].flatten(0, 1).T
    return product(direction.to(through.device), through)


def neuron_pullback(probed, layer):
    """d_t pulled back through the MLP's output projection: [prompt, position, neurons]."""
    through = probed["down_projection"][layer].T
    return product(probed["direction"].to(through.device), through)


def clean_readout(block):
    """Logits, norm scale and R = logit - k of the clean run [prompt, position], and what else the plan records."""
    plan, clean, probed = block.plan, block.clean, block.probed
    final = widen(clean["input"][plan["model"]["n_layers"]])
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
    if "residual_norm" in plan["gives"]:
        state["residual_norm"] = final.norm(dim=-1)
    if "logit_change_capped" in plan["gives"]:
        state["raw_effects"] = along(final, probed["raw_direction"]) / scale
        state["raw_logit"] = state["raw_effects"] + probed["raw_constant"]
    if "routing" in plan["gives"]:
        state["routing"] = experts_used(each["experts"] for each in clean["routing"].values())
    if plan["neurons"] is not None:
        layer = plan["neurons"]
        neurons = widen(clean["neurons"][layer])
        state["neuron_effects"] = block.home(neurons * probed["neuron_pullback"][layer]) / scale[..., None]
        state["mlp_direct_effect"] = block.home(along(clean["mlp"][layer], probed["given_direction"])) / scale
    return state


def ablated_readout(changes, batch, block, state):
    """The stored quantities of one pass: [row, position] each."""
    plan, probed = block.plan, block.probed
    scale = batch.of(state["norm_scale"])
    changes = _together(changes, scale.device)
    before, after = (batch.in_rows(lambda case, n=n: case.effect(n)) / scale for n in (0, 1))
    effects = _effects(changes, batch, state["norm_scale"]) if _site_by_site(batch, plan) else []
    for (rows, case, _), own in zip(batch.each(), effects, strict=False):
        if any(edit.inserted is not None for edit in case.edits.values()):
            after[rows] = total(pair[1] for pair in own.values())
    final = widen(changes["final"])
    difference = batch.against(torch.sub, final, widen(block.clean["input"][plan["model"]["n_layers"]]))
    ablated_scale = scale if plan["frozen_norm"] else norm_scale(final, plan)
    change = batch.against(torch.mul, difference, probed["direction"]).sum(-1)
    mean_change = along(difference, probed["mean_direction"])
    out = {
        "direct_effect": before,
        "ablated_direct_effect": after,
        "logit_change": rescaled(batch.of(state["effects"]), change / scale, scale, ablated_scale),
        "mean_logit_change": rescaled(
            batch.of(state["mean_effects"]), mean_change / scale, scale, ablated_scale
        ),
        "ablated_norm_scale": ablated_scale,
    }
    if plan["record"] == "total":
        out["from_components"] = change / scale - (after - before)
    else:
        heads = [x.sum(-1) for x in changes["heads"].values()]
        out["from_heads"] = _without_own(_summed(heads, scale), effects, batch, "heads")
        out["from_mlps"] = _without_own(_summed(changes["mlps"].values(), scale), effects, batch, "mlps")
    if "from_mixers" in plan["gives"]:
        out["from_mixers"] = _summed(changes["mixers"].values(), scale)
    if "from_post_norms" in plan["gives"]:
        out["from_post_norms"] = _summed(changes["post_norms"], scale)
    if "logit_change_capped" in plan["gives"]:
        raw_change = batch.against(torch.mul, difference, probed["raw_direction"]).sum(-1) / scale
        raw_change = rescaled(batch.of(state["raw_effects"]), raw_change, scale, ablated_scale)
        raw = batch.of(state["raw_logit"])
        out["logit_change_capped"] = capped(raw + raw_change, plan) - capped(raw, plan)
    if "ablated_residual_norm" in plan["gives"]:
        out["ablated_residual_norm"] = final.norm(dim=-1)
    if "ablated_routing" in plan["gives"]:
        used, share = rerouted(changes["experts"], batch, state["routing"], plan)
        out |= {"ablated_routing": used, "rerouted": share.to(scale)}
    inserted = [
        batch.of(e.inserted, at)
        for case, at in batch.cases
        for e in case.edits.values()
        if e.inserted is not None
    ]
    if inserted:
        out["inserted_direct_effect"] = torch.cat(inserted) / scale
    if plan["record"] == "full":
        out["component_change"] = _component_changes(changes, batch, effects, scale, state, plan)
    if plan["neurons"] is not None:
        out |= _neuron_changes(changes, batch, effects, scale, state, plan)
    return out


def _together(changes, device):
    """What was read in layers that may lie on several devices, on that of the final norm."""
    return {part: _moved(found, device) for part, found in changes.items()}


def _moved(found, device):
    """A tensor, or tensors by layer or in order."""
    if isinstance(found, dict):
        return {layer: x.to(device) for layer, x in found.items()}
    return [x.to(device) for x in found] if isinstance(found, list) else found.to(device)


def rescaled(effects, change, scale, ablated_scale):
    """(R + change) S / S' - R: the change of a logit whose constant does not change, without cancellation."""
    return (scale / ablated_scale - 1) * (effects + change) + change


def _summed(changes, scale):
    """Changes in several layers together, in logits: [row, position]."""
    return torch.stack([*changes]).sum(0) / scale if len(changes) else torch.zeros_like(scale)


def _site_by_site(batch, plan):
    """Whether it matters which of a case's sites has which effect: a pass may show it, or it is recorded."""
    seen = any(edit.seen for case, _ in batch.cases for edit in case.edits.values())
    return seen or plan["record"] == "full" or plan["neurons"] is not None


def _effects(changes, batch, scale):
    """Direct effect of each site of each case before and after, in logits, in the rows of the case.

    Returns [{site: (before, after)}], [row of the case, position] each. A reinforced head is not replaced: its effect
    afterwards is what its pass showed.
    """
    found = []
    for rows, case, prompts in batch.each():
        own = {}
        for site, edit in case.edits.items():
            before, after = (batch.of(x / scale, prompts) for x in edit.effects)
            if edit.inserted is not None:
                change = changes["heads"][site.layer][rows, :, site.head]
                after = before + change / batch.of(scale, prompts)
            own[site] = (before, after)
        found.append(own)
    return found


def _without_own(changes, effects, batch, part):
    """Measured changes of "heads" or "mlps" less what of them belongs to the ablated sites themselves."""
    for (rows, case, _), own in zip(batch.each(), effects, strict=False):
        for site, (before, after) in own.items():
            if site.part == part and case.edits[site].seen:
                changes[rows] -= after - before
    return changes


def _component_changes(changes, batch, effects, scale, state, plan):
    """Every component's change of direct effect: [row, position, component]."""
    index = _component_index(plan)
    out = scale.new_zeros(*scale.shape, len(index))
    for layer, x in changes["heads"].items():
        first = index["head", layer, 0]
        out[..., first : first + x.shape[-1]] = x / scale[..., None]
    for kind in ("mixer", "mlp"):
        for layer, x in changes[f"{kind}s"].items():
            out[..., index[kind, layer]] = x / scale
    for (rows, case, prompts), own in zip(batch.each(), effects, strict=True):
        for site, pair in own.items():
            if not case.edits[site].seen:
                where, change = site.component_changes(index, pair, _clean_of(batch, prompts, state))
                out[rows, :, where] += change
    return out


def _clean_of(batch, prompts, state):
    """A function that gives what is known of the clean run, by name, for a case's rows."""
    return lambda name: batch.of(state[name], prompts)


def _component_index(plan):
    """Where each component stands, in the order of components.components."""
    names = [("embed", None), *([("pos_embed", None)] if plan["model"]["position_embedding"] else [])]
    for layer in range(plan["model"]["n_layers"]):
        if layer in plan["model"]["headless"]:
            names.append(("mixer", layer))
        else:
            names += [("head", layer, head) for head in range(plan["model"]["n_heads"])]
            names += [("attention_bias", layer)] if plan["attention_bias"] else []
        names.append(("mlp", layer))
    return {name: index for index, name in enumerate(names)}


def component_effects(embedded, block, scale):
    """Direct effect of every component, clean: [prompt, position, component]; `embedded` is what `embeddings` gives."""
    plan, clean, probed, direction = block.plan, block.clean, block.probed, block.probed["direction"]
    effects = [along(x, direction) for x in embedded]
    for layer in range(plan["model"]["n_layers"]):
        if layer in plan["model"]["headless"]:
            effects.append(along(clean["mixer"][layer], probed["given_direction"]))
        else:
            effects += _attention_effects(block, layer)
        effects.append(along(clean["mlp"][layer], probed["given_direction"]))
    return torch.stack([block.home(x) for x in effects], -1) / scale[..., None]


def _attention_effects(block, layer):
    """⟨x, d_t⟩ of each head of a layer and, where it is a component, of the attention's output bias."""
    plan, clean, probed = block.plan, block.clean, block.probed
    z = per_head(widen(clean["z"][layer]), plan) - probed["value_constant"][layer]
    through = per_head(probed["pullback"][layer], plan)
    effects = [*(z * through).sum(-1).unbind(-1)]
    if plan["attention_bias"]:
        constant = (probed["value_constant"][layer] * through).sum((-1, -2))
        given = behind_norm(probed["given_direction"], probed, clean, layer)
        effects.append(along(probed["output_bias"][layer], given) + constant)
    return effects


def _neuron_changes(changes, batch, effects, scale, state, plan):
    """What the recorded MLP and its neurons changed; the most repairing neurons of each token by name.

    Where the pass begins above them, only what the case itself ablates of them changed.
    """
    layer, clean = plan["neurons"], batch.of(state["neuron_effects"])
    if layer in changes["mlps"]:
        change, whole = changes["neurons"] / scale[..., None], changes["mlps"][layer] / scale
    else:
        change, whole = _own_neuron_changes(layer, batch, effects, state, clean)
    most, which = change.topk(min(plan["ranks"], change.shape[-1]))
    found = {
        "mlp_change": whole,
        "top_neuron": which,
        "top_neuron_change": most,
        "top_neuron_direct_effect": clean.gather(-1, which),
        "neuron_change": change,
        "neuron_direct_effect": clean,
    }
    if "falling_neuron" in plan["gives"]:
        least, falling = change.min(-1)
        before = clean.gather(-1, falling[..., None])[..., 0]
        found |= {"falling_neuron": falling, "falling_neuron_change": least, "falling_neuron_direct_effect": before}
    return found


def _own_neuron_changes(layer, batch, effects, state, clean):
    """The cases' own changes of a layer's neurons and of its MLP: [row, position, neuron], [row, position]."""
    change, whole = torch.zeros_like(clean), clean.new_zeros(clean.shape[:-1])
    for (rows, _, prompts), own in zip(batch.each(), effects, strict=True):
        for site, pair in own.items():
            found = site.neuron_changes(layer, pair, _clean_of(batch, prompts, state))
            if found is not None:
                which, of_neurons, of_mlp = found
                change[rows, :, which] += of_neurons
                whole[rows] += of_mlp
    return change, whole
