"""Forward passes in which nothing is ablated, and what is read of them.

Of `clean_pass(model, plan, tokens, keep)` (told here, for the text of a function travels with each request, a module's
does not), over token ids [prompt, position]:

    keep: {what: layers}, for any of
        input: the residual stream that enters the layer; layer `n_layers` means the final norm's input
        z: the input of the attention's output projection, [prompt, position, heads * d_head]
        attention, mlp: what they give, [prompt, position, d_model]; the attention before a norm behind it
        neurons: the input of the MLP's output projection, [prompt, position, neurons]
        attention_scale, mlp_scale: S of the norm before them, [prompt, position]
        post_scale: S of the norm behind the attention
        mixer: what stands in the attention's place in a layer without heads gives, [prompt, position, d_model]
        routing: which experts the tokens of a mixture use, and their weights, as `routing` gives them

    It returns {what: {layer: tensor}}; of the routing a dict of tensors for each layer.

`no_logits`, as `logits_to_keep`, asks for no position's logits, so for no product with the vocabulary. Where a tensor
says so, nnsight makes no attention mask row by row, and no GPU is waited for to look at it; but it lies on one device,
and the last layer perhaps on another.
"""

import torch
from nnsight import save

from selfrepair_nn.tracing.places import like_rows, part, place, skip, written
from selfrepair_nn.tracing.readouts import norm_scale, total, widen
from selfrepair_nn.tracing.routing import routing


def no_logits(plan):
    return slice(0, 0) if plan["model"]["spread"] else torch.zeros(0, dtype=torch.long)


def clean_pass(model, plan, tokens, keep):
    """One forward pass, nothing changed. What it takes and returns is told at the top."""
    count = plan["model"]["n_layers"]
    with torch.no_grad(), model.trace(tokens, use_cache=False, logits_to_keep=no_logits(plan)):
        kept = save({what: {} for what in keep})
        for layer in range(count):
            for what, read in READS:
                if layer in keep.get(what, ()):
                    kept[what][layer] = read(model, plan, layer, tokens)
        if count in keep.get("input", ()):
            kept["input"][count] = place(model, plan, "final_norm").input
    return kept


def _input(model, plan, layer, tokens):
    return place(model, plan, "layers")[layer].input


def _attention_scale(model, plan, layer, tokens):
    return norm_scale(part(model, plan, layer, "attention_norm").input, plan)


def _z(model, plan, layer, tokens):
    return part(model, plan, layer, "output_projection").input


def _attention(model, plan, layer, tokens):
    return part(model, plan, layer, "output_projection").output


def _mixer(model, plan, layer, tokens):
    return written(part(model, plan, layer, "mixer"))


def _post_scale(model, plan, layer, tokens):
    return norm_scale(part(model, plan, layer, "post_norm").input, plan)


def _mlp_scale(model, plan, layer, tokens):
    return norm_scale(like_rows(part(model, plan, layer, "mlp_norm").input, tokens), plan)


def neurons_of(model, plan, layer, tokens):
    return like_rows(part(model, plan, layer, "down_projection").input, tokens)


def _mlp(model, plan, layer, tokens):
    """A copy where the model goes on to change it in place."""
    found = like_rows(written(part(model, plan, layer, "mlp")), tokens)
    return found.clone() if plan["model"]["mlp_in_place"] else found


READS = (
    ("input", _input),
    ("attention_scale", _attention_scale),
    ("z", _z),
    ("attention", _attention),
    ("mixer", _mixer),
    ("post_scale", _post_scale),
    ("mlp_scale", _mlp_scale),
    ("routing", routing),
    ("neurons", neurons_of),
    ("mlp", _mlp),
)
"""In the order in which a layer runs: nnsight reads only forwards."""


def layer_on(model, plan, tokens, layer, residual):
    """What a layer makes of any residual stream that enters it: [prompt, position, d_model]."""
    with torch.no_grad(), model.trace(tokens, use_cache=False, logits_to_keep=no_logits(plan)):
        take_up(model, plan, layer, residual)
        made = save([written(place(model, plan, "layers")[layer])])
    return made[0]


def layers_on(model, plan, tokens, between, residual):
    """What neighbouring layers write if each reads the same residual stream, summed: [prompt, position, d_model]."""
    with torch.no_grad(), model.trace(tokens, use_cache=False, logits_to_keep=no_logits(plan)):
        take_up(model, plan, between[0], residual)
        made = save([])
        for layer in between:
            reading = place(model, plan, "layers")[layer]
            if layer > between[0]:
                reading.input[:] = residual
            given = widen(written(reading))
            made.append(given - widen(residual).to(given.device))
    return total(made)


def take_up(model, plan, start, residual):
    """Skip the layers below `start`; only the last one's output is ever used."""
    layers = place(model, plan, "layers")
    for layer in range(start - 1):
        skip(layers[layer], plan, "layer", stub(residual))
    if start:
        skip(layers[start - 1], plan, "layer", residual)
    else:
        layers[0].input[:] = residual


def stub(x):
    """What stands for an output that is never used. A copy: a view would take all of x with it through a socket."""
    return x[:, :1, :1].clone()
