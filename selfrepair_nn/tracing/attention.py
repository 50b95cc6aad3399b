"""How much attention heads pay to each token, and what of it they read out if edges are cut.

No attention weights are read, which not every implementation computes. In a pass through one layer whose values are
replaced by indicators of their positions, z is the attention. As many positions as a head is wide are told apart in a
row of the pass.
"""

import torch
from nnsight import save

from selfrepair_nn.tracing.clean import no_logits, stub, take_up
from selfrepair_nn.tracing.objects import Bundle
from selfrepair_nn.tracing.places import part, place, skip
from selfrepair_nn.tracing.readouts import per_head, product, values_in, widen


class AttentionPaid(Bundle):
    """What is recorded of attention, as an object of the plan: its code goes only with a request that asks for it."""

    distances: list
    edges: bool

    def needs(self, cases):
        """What it reads of a clean pass."""
        return entering(cases)

    def found(self, block, cases):
        """Attention of each case's head to tokens so far back: [case, prompt, position, distance], 0 where none is.

        And along the edges that the plan's replacement cuts, [case, prompt, position].
        """
        paid = {}
        for layer in sorted({site.layer for case in cases for site in case}):
            for head, pattern in enumerate(widen(attention(block, layer)[0]).unbind(1)):
                paid[layer, head] = self._of_head(pattern[:, :-1], block)
        each = [paid[site.layer, site.head] for case in cases for site in case]
        return {name: torch.stack([block.home(one[name]) for one in each]) for name in each[0]}

    def _of_head(self, pattern, block):
        """Of what a head pays, [prompt, query, key]."""
        found = {}
        if self.distances:
            key = torch.arange(pattern.shape[1])[:, None] - torch.tensor(self.distances)
            index, there = key.clamp_min(0).to(pattern.device), (key >= 0).to(pattern.device)
            found["attention"] = pattern.gather(-1, index.expand(len(pattern), *key.shape)) * there
        if self.edges:
            cut = block.plan["replacement"].edges_cut(pattern, block.arrays)
            found["edge_attention"] = (pattern * cut).sum(-1)
        return found


def entering(cases):
    """The streams that enter the layers of cases, as `needs` has them."""
    return {"input": {site.layer for case in cases for site in case}}


def attention(block, layer):
    """What each head of a layer pays to each token in the clean run, and the values there.

    Returns the pattern [prompt, head, query, key] and the values [prompt, head, key, d_head], of heads that share
    values too, as the model computes them. What was found last is kept: cases come layer by layer.
    """
    if block.made.get("attention_of") != layer:
        block.made |= {"attention_of": layer, "attention": _attention(block, layer)}
    return block.made["attention"]


def _attention(block, layer):
    model, plan, tokens, last = block.model, block.plan, block.arrays["tokens"], block.plan["model"]["n_layers"] - 1
    n, count, width = *tokens.shape, plan["model"]["d_head"]
    chunks = -(-count // width)
    stream = block.clean["input"][layer].repeat(chunks, 1, 1)
    with torch.no_grad(), model.trace(tokens.repeat(chunks, 1), use_cache=False, logits_to_keep=no_logits(plan)):
        kept = save([])
        take_up(model, plan, layer, stream)
        values = values_in(part(model, plan, layer, "value").output, plan).flatten(0, -4)
        kept.append(values[:n].clone())
        code = torch.eye(count, chunks * width, dtype=values.dtype, device=values.device)
        values[:] = code.unflatten(1, (chunks, width)).movedim(1, 0).repeat_interleave(n, 0)[:, :, None]
        kept.append(part(model, plan, layer, "output_projection").input.clone())
        for above in range(layer + 1, last + 1):
            skip(place(model, plan, "layers")[above], plan, "layer", stream if above == last else stub(stream))
    values, z = kept
    pattern = per_head(z, plan).unflatten(0, (chunks, n)).permute(1, 3, 2, 0, 4).flatten(3)[..., :count]
    return pattern, values.repeat_interleave(pattern.shape[1] // values.shape[2], 2).movedim(2, 1)


def read_out(left, pattern, values, live, sinks):
    """What a head reads out of values [prompt, key, d_head]: [prompt, query, d_head], in at least float32.

    Args:
        left: what is left of its attention, [prompt, query, key], of `pattern`, what it pays.
        live: whether that is divided by its sum, as a softmax without the other edges does.
        sinks: whether attention adds up to less than 1, so that the rest is paid to no token, and stays.
    """
    read = product(left, values)
    if not live:
        return read
    whole = left.sum(-1, keepdim=True)
    if sinks:
        whole = whole + (1 - pattern.sum(-1, keepdim=True)).clamp_min(0)
    return quotient(read, whole)


def share_of(left, pattern):
    """The share of each query's attention that is left: [prompt, query, 1]."""
    return quotient(left.sum(-1, keepdim=True), pattern.sum(-1, keepdim=True))


def quotient(x, by):
    """0 where nothing is left to divide by."""
    return torch.where(by > 0, x / by.where(by > 0, 1), 0)
