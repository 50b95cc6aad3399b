"""How much attention heads pay to tokens some way back."""

import torch
from nnsight import save

from selfrepair_nn.tracing.clean import no_logits
from selfrepair_nn.tracing.objects import Bundle
from selfrepair_nn.tracing.places import part
from selfrepair_nn.tracing.readouts import per_head, values_in, widen


class AttentionPaid(Bundle):
    """What is recorded of attention, as an object of the plan: its code goes only with a request that asks for it."""

    distances: list

    def paid(self, block, cases):
        """Attention of each case's head: [case, prompt, position, distance]."""
        heads = [site for case in cases for site in case]
        paid = _paid(block, sorted({head.layer for head in heads}), self.distances)
        return torch.stack([block.home(paid[head.layer][:, :-1, head.head]) for head in heads])


def _paid(block, layers, distances):
    """How much attention each head pays to the token `distance` back: {layer: [prompt, position, heads, distance]}.

    No attention weights are read, which not every implementation computes. In a pass whose values are replaced by
    indicators of their positions, z is the attention; then the clean z goes on. As many positions as a head is wide
    are told apart in one pass. Where there is no token so far back it is 0.
    """
    plan, count = block.plan, block.arrays["tokens"].shape[1]
    width = plan["model"]["d_head"]
    back = torch.arange(count)[:, None] - torch.tensor(distances)
    paid = dict.fromkeys(layers, 0)
    for start in range(0, count, width):
        z = _indicated(block, layers, start)
        inside = (back >= start) & (back < start + width)
        where = (back - start).clamp(0, width - 1)
        for layer in layers:
            heads = widen(per_head(z[layer], plan))
            index = where.to(heads.device)[None, :, None].expand(*heads.shape[:3], len(distances))
            paid[layer] = paid[layer] + heads.gather(-1, index) * inside.to(heads.device)[None, :, None]
    return paid


def _indicated(block, layers, start):
    """z of each layer where the value at position start + i is the unit vector i, and 0 elsewhere."""
    model, plan, tokens, width = block.model, block.plan, block.arrays["tokens"], block.plan["model"]["d_head"]
    with torch.no_grad(), model.trace(tokens, use_cache=False, logits_to_keep=no_logits(plan)):
        kept = save({})
        for layer in layers:
            values = values_in(part(model, plan, layer, "value").output, plan)
            code = torch.zeros(tokens.shape[1], width, dtype=values.dtype, device=values.device)
            stop = min(start + width, tokens.shape[1])
            code[range(start, stop), range(stop - start)] = 1
            values[:] = code[None, :, None]
            z = part(model, plan, layer, "output_projection").input
            kept[layer] = z.clone()
            z[:] = block.clean["z"][layer]
    return kept
