"""The neurons of a recorded MLP: what they write to the logit, and what a pass changes of it."""

import torch

from selfrepair_nn.tracing.decompose import clean_of
from selfrepair_nn.tracing.readouts import along, widen


def _clean_effects(block, scale):
    """Direct effects of the recorded MLP [prompt, position] and of its neurons [prompt, position, neuron]."""
    layer, clean, probed = block.plan["neurons"], block.clean, block.probed
    neurons = block.home(widen(clean["neurons"][layer]) * probed["neuron_pullback"][layer])
    whole = block.home(along(clean["mlp"][layer], probed["given_direction"]))
    return {"neuron_effects": neurons / scale[..., None], "mlp_direct_effect": whole / scale}


def _read(block, batch, neurons, changes):
    """Of a pass, while it goes through the recorded MLP, [row, position, neuron]: what changed of ⟨x, d_t⟩."""
    plan, layer = block.plan, block.plan["neurons"]
    change = batch.against(torch.sub, neurons, block.clean["neurons"][layer])
    changes["neurons"] = batch.against(torch.mul, change, block.probed["neuron_pullback"][layer])
    for each in plan["readings"][1:]:
        each.read(block, batch, change, changes)


def _changes(changes, batch, effects, scale, state, block):
    """What the recorded MLP and its neurons changed; the most repairing neurons of each token by name.

    Where the pass begins above them, only what the case itself ablates of them changed.
    """
    plan, clean = block.plan, batch.of(state["neuron_effects"])
    layer = plan["neurons"]
    if layer in changes["mlps"]:
        change, whole = changes["neurons"] / scale[..., None], changes["mlps"][layer] / scale
    else:
        change, whole = _own_changes(layer, batch, effects, state, clean)
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


def _own_changes(layer, batch, effects, state, clean):
    """The cases' own changes of a layer's neurons and of its MLP: [row, position, neuron], [row, position]."""
    change, whole = torch.zeros_like(clean), clean.new_zeros(clean.shape[:-1])
    for (rows, _, prompts), own in zip(batch.each(), effects, strict=True):
        for site, pair in own.items():
            found = site.neuron_changes(layer, pair, clean_of(batch, prompts, state))
            if found is not None:
                which, of_neurons, of_mlp = found
                change[rows, :, which] += of_neurons
                whole[rows] += of_mlp
    return change, whole


class NeuronReadings:
    """All of it as an object of the plan: its code goes only with a request that asks for it."""

    clean = staticmethod(_clean_effects)
    read = staticmethod(_read)
    changes = staticmethod(_changes)
