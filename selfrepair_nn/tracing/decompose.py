"""What a pass changed, as direct effects: the terms of Equations 1 and 2, from activations and probed directions."""

import torch

from selfrepair_nn.tracing.readouts import (
    along,
    behind_norm,
    capped,
    norm_scale,
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
    for each in plan["readings"]:
        state |= each.clean(block, scale)
    if plan["terms"]:
        state["component_effects"] = plan["terms"].effects(block, scale)
    if plan["outcomes"]:
        state |= plan["outcomes"].clean(block, scale)
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
    if plan["terms"]:
        out["component_change"] = plan["terms"].changes(changes, batch, effects, scale, state, plan)
    for each in plan["readings"]:
        out |= each.changes(changes, batch, effects, scale, state, block)
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


def clean_of(batch, prompts, state):
    """A function that gives what is known of the clean run, by name, for a case's rows."""
    return lambda name: batch.of(state[name], prompts)
