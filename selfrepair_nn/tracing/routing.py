"""Mixtures of experts: which experts each token uses, clean and ablated, and the clean choice kept."""

import torch

from selfrepair_nn.tracing.places import like_rows, part


def routing(model, plan, layer, tokens):
    """What a layer's router says of each token, as views: {"experts", "weights"}, [row, position, …] each.

    A router returns its logits, then weights and indices of the experts chosen. Llama 4's returns a weight for every
    expert, 0 for those not chosen, and then its logits: there the choice is the largest of these.
    """
    given = part(model, plan, layer, "router").output
    weights, last = given[-2], given[-1]
    chosen = last.topk(plan["model"]["n_choices"])[1] if last.is_floating_point() else last
    return {"experts": like_rows(chosen, tokens), "weights": like_rows(weights, tokens)}


def routing_needs(plan):
    """The layers whose clean routing is recorded or kept."""
    recorded = plan["model"]["routed"] if "routing" in plan["gives"] else ()
    return {*recorded, *plan["frozen_routing"]}


def through_router(block, layer, batch, changes):
    """Keep the clean routing of a layer where it is frozen, and read which experts its tokens use."""
    if layer not in block.clean["routing"]:
        return
    found = routing(block.model, block.plan, layer, batch.tokens)
    if layer in block.plan["frozen_routing"]:
        for name, kept in block.clean["routing"][layer].items():
            found[name][:] = batch.of(kept)
    changes["experts"][layer] = found["experts"]


def experts_used(found):
    """The experts of all mixtures side by side, those of each in ascending order: [row, position, choice]."""
    return torch.cat([each.sort(-1)[0] for each in found], -1)


def rerouted(changes, batch, clean, plan):
    """What a pass changed of which experts are used.

    Args:
        changes: {layer: [row, position, choice of the layer]} of the layers that the pass ran through.
        clean: the experts of the clean run, [prompt, position, choice].

    Returns the experts that are used, [row, position, choice], and of the choices in the layers that the pass ran
    through the share that went to an expert which the token does not use there in the clean run, [row, position].
    """
    size = plan["model"]["n_choices"]
    before = dict(zip(plan["model"]["routed"], batch.of(clean).split(size, -1), strict=True))
    used = before | changes
    new = [(used[layer][..., None] != before[layer][..., None, :]).all(-1) for layer in changes]
    share = torch.cat(new, -1).double().mean(-1) if new else torch.zeros(batch.tokens.shape)
    return experts_used(used.values()), share
