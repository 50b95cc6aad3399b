"""The two kinds of forward pass: a clean one that keeps what is needed, and an ablated one that starts at its layer."""

import torch
from nnsight import save

from selfrepair_nn.tracing.places import part, place
from selfrepair_nn.tracing.readouts import along, per_head, product, widen


def clean_pass(model, plan, tokens, first=0, inputs=(), only=None):
    """One forward pass over token ids [prompt, position], nothing changed.

    Args:
        first: layers below it are not read.
        inputs: layers whose input is kept; `n_layers` means the final norm's input, which is always kept.
        only: if given, the layers whose z alone is kept, and nothing else.

    Returns a dict: z {layer: [prompt, position, heads * d_head]} (the input of the output projection),
        attention and mlp {layer: [prompt, position, d_model]}, input {layer: [prompt, position, d_model]}.
    """
    count = plan["model"]["n_layers"]
    nothing = torch.zeros(0, dtype=torch.long)
    with torch.no_grad(), model.trace(tokens, use_cache=False, logits_to_keep=nothing):
        kept = save({"z": {}, "attention": {}, "mlp": {}, "input": {}})
        for layer in only if only is not None else range(first, count):
            if layer in inputs:
                kept["input"][layer] = place(model, plan, "layers")[layer].input
            projection = part(model, plan, layer, "output_projection")
            kept["z"][layer] = projection.input
            if only is None:
                kept["attention"][layer] = projection.output
                kept["mlp"][layer] = _like_rows(part(model, plan, layer, "mlp").output, tokens)
        if only is None:
            kept["input"][count] = place(model, plan, "final_norm").input
    return kept


def embeddings(model, plan, tokens):
    """What the token embedding, and the position embedding where there is one, write: [prompt, position, d_model]."""
    nothing = torch.zeros(0, dtype=torch.long)
    with torch.no_grad(), model.trace(tokens, use_cache=False, logits_to_keep=nothing):
        written = save([place(model, plan, "token_embedding").output])
        if plan["model"]["position_embedding"]:
            written.append(place(model, plan, "position_embedding").output.expand_as(written[0]))
    return written


def ablated_pass(model, plan, tokens, clean, probed, group):
    """One forward pass in which every case of `group` rides as its own copy of the prompts.

    All cases begin in the same layer: the layers below are skipped, and the pass takes up the clean residual stream
    with the change of the ablated heads' writes added.

    Args:
        tokens: ids [prompt, position].
        clean: what `clean_pass` kept of these tokens.
        probed: what `probe` found, with "query" {layer: [prompt, position, heads * d_head]}, the target directions
            pulled back through each output projection.
        group: list of cases; a case is a dict {(layer, head): replacement z [prompt, position, d_head]}.

    Returns a dict of changes of ⟨x_c, d_t⟩ (not yet divided by S), row = case * prompts + prompt:
        heads {layer: [row, position, heads]}, mlps {layer: [row, position]}, final [row, position, d_model].
    """
    cases, count = len(group), plan["model"]["n_layers"]
    start = min(layer for case in group for layer, _ in case)
    resume = start + 1 if plan["model"]["parallel"] else start
    rows = tokens.repeat(cases, 1)
    written = _change_of_writes(clean, probed, group, start, plan)
    if plan.get("shaken"):
        written = written + _rounding_steps(_repeat(clean["input"][resume], cases))
    nothing = torch.zeros(0, dtype=torch.long)
    with torch.no_grad(), model.trace(rows, use_cache=False, logits_to_keep=nothing):
        changes = save({"heads": {}, "mlps": {}})
        taken_up = _repeat(clean["input"][resume], cases)
        if plan["model"]["parallel"]:
            taken_up = taken_up + written
        _take_up(model, plan, resume, taken_up)
        for layer in range(start, count):
            if layer > start:
                projection = part(model, plan, layer, "output_projection")
                z = projection.input
                _edit(per_head(z, plan), clean["z"][layer], layer, group, plan)
                changes["heads"][layer] = _changes_of_heads(
                    z, clean["z"][layer], probed["query"][layer], plan
                )
            elif not plan["model"]["parallel"]:
                attention = _repeat(clean["attention"][start], cases) + written
                part(model, plan, start, "attention_norm").skip(taken_up)
                part(model, plan, start, "attention").skip((attention, None))
            if layer >= resume:
                out = part(model, plan, layer, "mlp").output
                kept = _repeat(clean["mlp"][layer], cases)
                if layer in plan["frozen_mlps"]:
                    out[:] = kept.reshape(out.shape)
                changes["mlps"][layer] = along_target(_like_rows(out, rows) - kept, probed["direction"])
        changes["final"] = place(model, plan, "final_norm").input
    return changes


def along_target(change, direction):
    """Dot product with each prompt's target directions: [case * prompt, position, d] -> [case * prompt, position]."""
    prompts, positions = direction.shape[:2]
    return along(change[:, :positions].unflatten(0, (-1, prompts)), direction).flatten(0, 1)


def _take_up(model, plan, resume, residual):
    """Skip the layers below `resume`; only the last one's output is ever used."""
    layers = place(model, plan, "layers")
    for layer in range(resume - 1):
        layers[layer].skip(residual[:, :1, :1])
    if resume:
        layers[resume - 1].skip(residual)


def _rounding_steps(x):
    """For each entry up to one rounding step, up or down, the same each time."""
    generator = torch.Generator(x.device).manual_seed(0)
    part = 2 * torch.rand(x.shape, generator=generator, device=x.device) - 1
    return (widen(x) * torch.finfo(x.dtype).eps * part).to(x.dtype)


def _change_of_writes(clean, probed, group, start, plan):
    """(z' - z) W_O summed over each case's heads of layer `start`: [row, position, d_model] in the model's dtype."""
    z = per_head(clean["z"][start], plan)
    projection = probed["output_projection"][start]
    written = []
    for case in group:
        changes = [
            product(widen(new) - widen(z[:, :, head]), projection[head])
            for (layer, head), new in case.items()
            if layer == start
        ]
        written.append(sum(changes[1:], changes[0]))
    return torch.cat(written).to(z.dtype)


def _edit(z, clean, layer, group, plan):
    """In place: write frozen heads back, then each case's replacements. z [row, position, heads, d_head]."""
    frozen = plan["frozen_heads"].get(layer, [])
    if frozen:
        z[:, :, frozen] = _repeat(per_head(clean, plan)[:, :, frozen], len(group))
    prompts = clean.shape[0]
    for index, case in enumerate(group):
        for (where, head), new in case.items():
            if where == layer:
                z[index * prompts : (index + 1) * prompts, :, head] = new.to(z.dtype)


def _changes_of_heads(z, clean, query, plan):
    """Every head's change of ⟨x_c, d_t⟩: [row, position, heads]."""
    prompts, positions = query.shape[:2]
    change = (z - _repeat(clean, z.shape[0] // prompts))[:, :positions].unflatten(0, (-1, prompts))
    return per_head(widen(change) * query, plan).sum(-1).flatten(0, 1)


def _repeat(x, times):
    """`times` copies of x one after another along the first dimension."""
    return x.repeat(times, *[1] * (x.dim() - 1))


def _like_rows(out, tokens):
    """Some MLPs work on flattened tokens: give their output the shape [row, position, d_model] again."""
    return out.reshape(*tokens.shape, -1)
