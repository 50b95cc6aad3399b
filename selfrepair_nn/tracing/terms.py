"""The residual stream term by term: what every component writes to the logit, and what a pass changes of it."""

import torch
from nnsight import save

from selfrepair_nn.tracing.clean import no_logits
from selfrepair_nn.tracing.decompose import clean_of
from selfrepair_nn.tracing.places import place
from selfrepair_nn.tracing.readouts import along, behind_norm, per_head, widen


def component_index(plan):
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


def component_effects(block, scale):
    """Direct effect of every component, clean: [prompt, position, component]; `scale` is the final norm's."""
    plan, clean, probed, direction = block.plan, block.clean, block.probed, block.probed["direction"]
    effects = [along(x, direction) for x in _embeddings(block.model, plan, block.arrays["tokens"])]
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


def _embeddings(model, plan, tokens):
    """What the token embedding, and the position embedding where there is one, write: [prompt, position, d_model].

    Without one the stream that enters the first layer is the token embedding, multiplied or normed as the model does.
    """
    with torch.no_grad(), model.trace(tokens, use_cache=False, logits_to_keep=no_logits(plan)):
        found = save([])
        if plan["model"]["position_embedding"]:
            found.append(place(model, plan, "token_embedding").output)
            found.append(place(model, plan, "position_embedding").output.expand_as(found[0]))
        else:
            found.append(place(model, plan, "layers")[0].input)
    return found


def component_changes(changes, batch, effects, scale, state, plan):
    """Every component's change of direct effect: [row, position, component]."""
    index = component_index(plan)
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
                where, change = site.component_changes(index, pair, clean_of(batch, prompts, state))
                out[rows, :, where] += change
    return out


class Terms:
    """Both, as an object of the plan: their code goes only with a request that asks for them."""

    effects = staticmethod(component_effects)
    changes = staticmethod(component_changes)
