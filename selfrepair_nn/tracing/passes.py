"""The kinds of forward pass: clean ones that keep what is needed, and an ablated one that starts at its layer."""

import torch
from nnsight import save

from selfrepair_nn.tracing.places import part, place
from selfrepair_nn.tracing.readouts import along, norm_scale, per_head, widen


def no_logits():
    """As `logits_to_keep`: no position's logits, so no product with the vocabulary."""
    return torch.zeros(0, dtype=torch.long)


def clean_pass(model, plan, tokens, keep):
    """One forward pass over token ids [prompt, position], nothing changed.

    Args:
        keep: {what: layers}, for any of
            input: the residual stream that enters the layer; layer `n_layers` means the final norm's input
            z: the input of the attention's output projection, [prompt, position, heads * d_head]
            attention, mlp: what they write, [prompt, position, d_model]
            hidden: the input of the MLP's output projection, [prompt, position, neurons]
            attention_scale, mlp_scale: S of the norm before them, [prompt, position]

    Returns {what: {layer: tensor}}.
    """
    count = plan["model"]["n_layers"]
    with torch.no_grad(), model.trace(tokens, use_cache=False, logits_to_keep=no_logits()):
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


def _mlp_scale(model, plan, layer, tokens):
    return norm_scale(_like_rows(part(model, plan, layer, "mlp_norm").input, tokens), plan)


def _hidden(model, plan, layer, tokens):
    return _like_rows(part(model, plan, layer, "down_projection").input, tokens)


def _mlp(model, plan, layer, tokens):
    return _like_rows(part(model, plan, layer, "mlp").output, tokens)


READS = (
    ("input", _input),
    ("attention_scale", _attention_scale),
    ("z", _z),
    ("attention", _attention),
    ("mlp_scale", _mlp_scale),
    ("hidden", _hidden),
    ("mlp", _mlp),
)
"""In the order in which a layer runs: nnsight reads only forwards."""


def embeddings(model, plan, tokens):
    """What the token embedding, and the position embedding where there is one, write: [prompt, position, d_model]."""
    with torch.no_grad(), model.trace(tokens, use_cache=False, logits_to_keep=no_logits()):
        written = save([place(model, plan, "token_embedding").output])
        if plan["model"]["position_embedding"]:
            written.append(place(model, plan, "position_embedding").output.expand_as(written[0]))
    return written


def layer_on(model, plan, tokens, layer, residual):
    """What a layer makes of any residual stream that enters it: [prompt, position, d_model]."""
    with torch.no_grad(), model.trace(tokens, use_cache=False, logits_to_keep=no_logits()):
        _take_up(model, plan, layer, residual)
        written = save([place(model, plan, "layers")[layer].output])
    return written[0]


def attention_paid(model, plan, tokens, clean, layers, distances):
    """How much attention each head pays to the token `distance` back: {layer: [prompt, position, heads, distance]}.

    No attention weights are read, which not every implementation computes. In a pass whose values are replaced by
    indicators of their positions, z is the attention; then the clean z goes on. As many positions as a head is wide
    are told apart in one pass. Where there is no token so far back it is 0.
    """
    width, count = plan["model"]["d_head"], tokens.shape[1]
    back = torch.arange(count)[:, None] - torch.tensor(distances)
    paid = dict.fromkeys(layers, 0)
    for start in range(0, count, width):
        z = _indicated(model, plan, tokens, clean, layers, start)
        inside = ((back >= start) & (back < start + width)).to(z[layers[0]].device)
        where = (back - start).clamp(0, width - 1).to(z[layers[0]].device)
        for layer in layers:
            heads = widen(per_head(z[layer], plan))
            index = where[None, :, None].expand(*heads.shape[:3], len(distances))
            paid[layer] = paid[layer] + heads.gather(-1, index) * inside[None, :, None]
    return paid


def _indicated(model, plan, tokens, clean, layers, start):
    """z of each layer where the value at position start + i is the unit vector i, and 0 elsewhere."""
    width = plan["model"]["d_head"]
    with torch.no_grad(), model.trace(tokens, use_cache=False, logits_to_keep=no_logits()):
        kept = save({})
        for layer in layers:
            values = _values(part(model, plan, layer, "value").output, plan)
            code = torch.zeros(tokens.shape[1], width, dtype=values.dtype, device=values.device)
            stop = min(start + width, tokens.shape[1])
            code[range(start, stop), range(stop - start)] = 1
            values[:] = code[None, :, None]
            z = part(model, plan, layer, "output_projection").input
            kept[layer] = z.clone()
            z[:] = clean["z"][layer]
    return kept


def _values(out, plan):
    """The values within the value projection's output, as a view: [prompt, position, heads, d_head]."""
    width, layout = plan["model"]["d_head"], plan["model"]["places"]["value_layout"]
    if layout == "interleaved":
        return out.unflatten(-1, (-1, 3, width))[:, :, :, 2]
    if layout == "stacked":
        out = out.chunk(3, -1)[2]
    return out.unflatten(-1, (-1, width))


def ablated_pass(model, plan, tokens, clean, probed, group):
    """One forward pass in which every case of `group` rides as its own copy of the prompts.

    All cases begin at the same place: the layers below are skipped, and the pass takes up the clean residual stream
    with what the case writes there added; sites further up are replaced on the way.

    Args:
        tokens: ids [prompt, position].
        clean: what `clean_pass` kept of these tokens.
        probed: what `probe` found, with "query" {layer: [prompt, position, heads * d_head]}, the target directions
            pulled back through each output projection, and "neuron_query" likewise.
        group: list of cases as `cases.prepare` gives them.

    Returns a dict of changes of ⟨x_c, d_t⟩ (not yet divided by S), row = case * prompts + prompt:
        heads {layer: [row, position, heads]}, mlps {layer: [row, position]}, neurons [row, position, neurons],
        final [row, position, d_model].
    """
    cases, count = len(group), plan["model"]["n_layers"]
    start, inside = group[0]["start"], group[0]["inside"]
    rows = tokens.repeat(cases, 1)
    written = torch.cat([case["written"] for case in group])
    with torch.no_grad(), model.trace(rows, use_cache=False, logits_to_keep=no_logits()):
        changes = save({"heads": {}, "mlps": {}})
        taken_up = _repeat(clean["input"][start], cases)
        if start or not inside:
            _take_up(model, plan, start, taken_up if inside else taken_up + written)
        for layer in range(start, count):
            if layer == start and inside:
                attention = _repeat(clean["attention"][start], cases) + written
                part(model, plan, start, "attention_norm").skip(_stub(taken_up))
                part(model, plan, start, "attention").skip((attention, None))
            else:
                _freeze_norm(model, plan, clean, probed, layer, "attention", cases)
                projection = part(model, plan, layer, "output_projection")
                z = projection.input
                _edit_heads(per_head(z, plan), clean["z"][layer], layer, group, plan)
                changes["heads"][layer] = _changes_of_heads(
                    z, clean["z"][layer], probed["query"][layer], plan
                )
            _freeze_norm(model, plan, clean, probed, layer, "mlp", cases)
            _through_mlp(model, plan, clean, probed, layer, group, rows, changes)
        changes["final"] = place(model, plan, "final_norm").input
    return changes


def _through_mlp(model, plan, clean, probed, layer, group, rows, changes):
    """Replace neurons and MLPs, or freeze them, and read what changed."""
    edited = any(site[:2] == ("neuron", layer) for case in group for site in case["new"])
    frozen = layer in plan["frozen_mlps"]
    if edited or plan["neurons"] == layer:
        hidden = _hidden(model, plan, layer, rows)
        if frozen:
            hidden[:] = _repeat(clean["hidden"][layer], len(group))
        _edit_neurons(hidden, layer, group)
        if plan["neurons"] == layer:
            positions = probed["neuron_query"][layer].shape[1]
            change = (hidden - _repeat(clean["hidden"][layer], len(group)))[:, :positions]
            changes["neurons"] = widen(change) * _repeat(probed["neuron_query"][layer], len(group))
    out = part(model, plan, layer, "mlp").output
    shaped, kept = _like_rows(out, rows), _repeat(clean["mlp"][layer], len(group))
    if frozen and not edited:
        shaped[:] = kept
    _edit_mlps(shaped, layer, group)
    changes["mlps"][layer] = along_target(shaped - kept, probed["direction"])


def along_target(change, direction):
    """Dot product with each prompt's target directions: [case * prompt, position, d] -> [case * prompt, position]."""
    prompts, positions = direction.shape[:2]
    return along(change[:, :positions].unflatten(0, (-1, prompts)), direction).flatten(0, 1)


def _take_up(model, plan, start, residual):
    """Skip the layers below `start`; only the last one's output is ever used."""
    layers = place(model, plan, "layers")
    for layer in range(start - 1):
        layers[layer].skip(_stub(residual))
    if start:
        layers[start - 1].skip(residual)
    else:
        layers[0].input[:] = residual


def _stub(x):
    """What stands for an output that is never used. A copy: a view would take all of x with it through a socket."""
    return x[:, :1, :1].clone()


def _freeze_norm(model, plan, clean, probed, layer, before, cases):
    """Give a norm's output the clean scale: what it divides by does not react."""
    if [layer, before] not in plan["frozen_norms"]:
        return
    norm = part(model, plan, layer, f"{before}_norm")
    kept = _repeat(clean[f"{before}_scale"][layer], cases).flatten()
    ratio = (norm_scale(norm.input, plan).flatten() / kept)[:, None]
    out, bias = norm.output, probed["norm_bias"][layer, before]
    flat = widen(out).reshape(-1, out.shape[-1])
    out[:] = ((flat - bias) * ratio + bias).to(out.dtype).reshape(out.shape)


def _edit_heads(z, clean, layer, group, plan):
    """In place: write frozen heads back, then each case's replacements. z [row, position, heads, d_head]."""
    kept, prompts = per_head(clean, plan), z.shape[0] // len(group)
    for index, case in enumerate(group):
        frozen = [h for h in plan["frozen_heads"].get(layer, ()) if ("head", layer, h) not in case["sites"]]
        if frozen:
            z[index * prompts : (index + 1) * prompts, :, frozen] = kept[:, :, frozen]
    for rows, site, new in _here(group, "head", layer, z.shape[0]):
        z[rows, :, site[2]] = new.to(z.dtype)


def _edit_neurons(hidden, layer, group):
    for rows, site, new in _here(group, "neuron", layer, hidden.shape[0]):
        hidden[rows, :, site[2]] = new.to(hidden.dtype)


def _edit_mlps(out, layer, group):
    for rows, _, new in _here(group, "mlp", layer, out.shape[0]):
        out[rows] = new.to(out.dtype)


def _here(group, kind, layer, rows):
    """The group's replacements of a kind of site in a layer: (rows of the case, site, what replaces it)."""
    prompts = rows // len(group)
    for index, case in enumerate(group):
        for site, new in case["new"].items():
            if site[:2] == (kind, layer):
                yield slice(index * prompts, (index + 1) * prompts), site, new


def _changes_of_heads(z, clean, query, plan):
    """Every head's change of ⟨x_c, d_t⟩: [row, position, heads]."""
    prompts, positions = query.shape[:2]
    change = (z - _repeat(clean, z.shape[0] // prompts))[:, :positions].unflatten(0, (-1, prompts))
    return per_head(widen(change) * query, plan).sum(-1).flatten(0, 1)


def _repeat(x, times):
    """`times` copies of x one after another along the first dimension."""
    return x.repeat(times, *[1] * (x.dim() - 1))


def _like_rows(out, tokens):
    """Some MLPs work on flattened tokens: give their tensors the shape [row, position, …] again, as a view."""
    return out.view(*tokens.shape, -1)
