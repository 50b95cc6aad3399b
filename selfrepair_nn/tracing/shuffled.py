"""What is read of a wrong target, that of another position: nothing of it can be repair of the target."""

import torch

from selfrepair_nn.tracing.decompose import neuron_pullback, pullback
from selfrepair_nn.tracing.readouts import along, norm_scale, total, widen


def _asked(block):
    """The same block, with the direction of another position's target at each: arrays["shuffled_positions"]."""
    return block.once("shuffled", lambda: _shuffled(block))


def _shuffled(block):
    plan, clean, direction = block.plan, block.clean, block.probed["direction"]
    places = block.arrays["shuffled_positions"].to(direction.device)
    direction = direction.gather(1, places[..., None].expand_as(direction))
    probed = block.probed | {"direction": direction, "given_direction": plan["model"]["write_scale"] * direction}
    sites = [site for case in plan["cases"] for site in case]
    neurons = {site.layer for site in sites if site.kept == "neurons"} | {plan["neurons"]} - {None}
    layers = {site.layer for site in sites if site.kept == "z"}
    probed["pullback"] = {layer: pullback(probed, clean, layer) for layer in layers}
    probed["neuron_pullback"] = {layer: neuron_pullback(probed, layer) for layer in neurons}
    return type(block)(**vars(block) | {"probed": probed, "made": {}})


def _clean_effects(block, scale):
    """The sum of all direct effects on the shuffled target [prompt, position]; `scale` is the final norm's."""
    other = _asked(block)
    final = widen(block.clean["input"][block.plan["model"]["n_layers"]])
    found = {"shuffled_effects": along(final, other.probed["direction"]) / scale}
    if (layer := block.plan["neurons"]) is not None:
        effects = block.home(widen(block.clean["neurons"][layer]) * other.probed["neuron_pullback"][layer])
        found["shuffled_neuron_effects"] = effects / scale[..., None]
    return found


def _through_neurons(block, batch, change, changes):
    """While a pass goes through the recorded MLP: what its change [row, position, neuron] is to the target."""
    effects = batch.against(torch.mul, change, _asked(block).probed["neuron_pullback"][block.plan["neurons"]])
    most, which = effects.max(-1)
    changes["shuffled"] = {"mlp": effects.sum(-1), "most": most, "which": which}


def _changes(changes, batch, effects, scale, state, block):
    """Of a pass, [row, position] each, what the store keeps of the shuffled target."""
    other, plan = _asked(block), block.plan
    final = widen(changes["final"])
    difference = batch.against(torch.sub, final, widen(block.clean["input"][plan["model"]["n_layers"]]))
    change = batch.against(torch.mul, difference, other.probed["direction"]).sum(-1) / scale
    ablated_scale = scale if plan["frozen_norm"] else norm_scale(final, plan)
    own = [(_own(case, other), prompts) for _, case, prompts in batch.each()]
    out = {
        "shuffled_direct_effect": torch.cat([batch.of(x, prompts) for x, prompts in own]) / scale,
        "shuffled_from_norm": (scale / ablated_scale - 1) * (batch.of(state["shuffled_effects"]) + change),
    }
    if plan["neurons"] is not None:
        out |= _of_neurons(changes.get("shuffled"), batch, scale, state)
    return out


def _own(case, other):
    """⟨x, d⟩ of a case's sites, clean: [prompt, position]."""
    return other.home(total(site.clean_effects([site], other)[0] for site in case.edits))


def _of_neurons(read, batch, scale, state):
    """Where the pass begins above the recorded MLP nothing of it changed."""
    if read is None:
        read = {name: torch.zeros_like(scale) for name in ("mlp", "most")} | {"which": torch.zeros_like(scale).long()}
    clean = batch.of(state["shuffled_neuron_effects"]).gather(-1, read["which"][..., None])[..., 0]
    return {
        "shuffled_mlp_change": read["mlp"] / scale,
        "shuffled_neuron_change": read["most"] / scale,
        "shuffled_neuron_direct_effect": clean,
    }


class Shuffled:
    """All of it as an object of the plan: its code goes only with a request that asks for it."""

    clean = staticmethod(_clean_effects)
    read = staticmethod(_through_neurons)
    changes = staticmethod(_changes)
