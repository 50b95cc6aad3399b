"""The kinds of forward pass: clean ones that keep what is needed, and an ablated one that starts at its layer."""

import torch
from nnsight import save

from selfrepair_nn.tracing.places import part, place
from selfrepair_nn.tracing.readouts import norm_scale, per_head, widen


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


def ablated_pass(model, plan, tokens, clean, probed, batch):
    """One forward pass in which every row is one case on one prompt.

    All cases begin at the same place: the layers below are skipped, and the pass takes up the clean residual stream
    with what the case writes there added; sites further up are replaced on the way. What comes after the longest
    row's last wanted token is left out: by causality it changes nothing before.

    Args:
        tokens: ids [prompt, position].
        clean: what `clean_pass` kept of these tokens.
        probed: what `probe` found, with "query" {layer: [prompt, position, heads * d_head]}, the target directions
            pulled back through each output projection, and "neuron_query" likewise.
        batch: what `rows.passes` gives, with its cases as `cases.prepare` gives them.

    Returns a dict of changes of ⟨x_c, d_t⟩ (not yet divided by S), over the rows of the pass:
        heads {layer: [row, position, heads]}, mlps {layer: [row, position]}, neurons [row, position, neurons],
        final [row, position, d_model].
    """
    count = plan["model"]["n_layers"]
    start, inside = batch["start"], batch["inside"]
    rows = batch["tokens"]
    written = torch.cat([of_rows(case["written"], at, batch) for case, at in batch["cases"]])
    with torch.no_grad(), model.trace(rows, use_cache=False, logits_to_keep=no_logits()):
        changes = save({"heads": {}, "mlps": {}})
        taken_up = of_rows(clean["input"][start], batch["prompts"], batch)
        if start or not inside:
            _take_up(model, plan, start, taken_up if inside else taken_up + written)
        for layer in range(start, count):
            if layer == start and inside:
                attention = against(torch.add, written, clean["attention"][start], batch)
                part(model, plan, start, "attention_norm").skip(_stub(taken_up))
                part(model, plan, start, "attention").skip((attention, None))
            else:
                _freeze_norm(model, plan, clean, probed, layer, "attention", batch)
                _through_heads(model, plan, clean, probed, layer, batch, changes)
            _freeze_norm(model, plan, clean, probed, layer, "mlp", batch)
            _through_mlp(model, plan, clean, probed, layer, batch, changes)
        changes["final"] = place(model, plan, "final_norm").input
    return changes


def of_rows(x, prompts, batch):
    """What belongs to each row, from x [prompt, position, …]."""
    return x[:, : batch["length"]].index_select(0, prompts.to(x.device))


def against(operation, x, kept, batch):
    """operation(x, what belongs to each row of `kept`) for x [row, position, …] and kept [prompt, position, …].

    The same as with `of_rows`, without its copy where every case rides on every prompt.
    """
    if batch["whole"]:
        return operation(x.unflatten(0, (-1, len(kept))), kept[:, : batch["length"]]).flatten(0, 1)
    return operation(x, of_rows(kept, batch["prompts"], batch))


def _through_heads(model, plan, clean, probed, layer, batch, changes):
    """Replace heads, or freeze them, and read what changed."""
    z = part(model, plan, layer, "output_projection").input
    split, first = per_head(z, plan), 0
    for case, prompts in batch["cases"]:
        rows = slice(first, first + len(prompts))
        first = rows.stop
        frozen = [h for h in plan["frozen_heads"].get(layer, ()) if ("head", layer, h) not in case["sites"]]
        if frozen:
            split[rows, :, frozen] = per_head(of_rows(clean["z"][layer], prompts, batch), plan)[:, :, frozen]
    for rows, site, new in _here(batch, "head", layer):
        split[rows, :, site[2]] = new.to(z.dtype)
    change = widen(against(torch.sub, z, clean["z"][layer], batch))
    effects = against(torch.mul, change, probed["query"][layer], batch)
    changes["heads"][layer] = per_head(effects, plan).sum(-1)


def _through_mlp(model, plan, clean, probed, layer, batch, changes):
    """Replace neurons and MLPs, or freeze them, and read what changed."""
    rows, prompts = batch["tokens"], batch["prompts"]
    edited = any(site[:2] == ("neuron", layer) for case, _ in batch["cases"] for site in case["new"])
    frozen = layer in plan["frozen_mlps"]
    if edited or plan["neurons"] == layer:
        hidden = _hidden(model, plan, layer, rows)
        if frozen:
            hidden[:] = of_rows(clean["hidden"][layer], prompts, batch)
        for at, site, new in _here(batch, "neuron", layer):
            hidden[at, :, site[2]] = new.to(hidden.dtype)
        if plan["neurons"] == layer:
            change = widen(against(torch.sub, hidden, clean["hidden"][layer], batch))
            changes["neurons"] = against(torch.mul, change, probed["neuron_query"][layer], batch)
    out = part(model, plan, layer, "mlp").output
    shaped = _like_rows(out, rows)
    if frozen and not edited:
        shaped[:] = of_rows(clean["mlp"][layer], prompts, batch)
    for at, _, new in _here(batch, "mlp", layer):
        shaped[at] = new.to(out.dtype)
    change = widen(against(torch.sub, shaped, clean["mlp"][layer], batch))
    changes["mlps"][layer] = against(torch.mul, change, probed["direction"], batch).sum(-1)


def _here(batch, kind, layer):
    """The replacements of a kind of site in a layer: (rows of the case, site, what replaces it in each row)."""
    first = 0
    for case, prompts in batch["cases"]:
        for site, new in case["new"].items():
            if site[:2] == (kind, layer):
                yield slice(first, first + len(prompts)), site, of_rows(new, prompts, batch)
        first += len(prompts)


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


def _freeze_norm(model, plan, clean, probed, layer, before, batch):
    """Give a norm's output the clean scale: what it divides by does not react."""
    if [layer, before] not in plan["frozen_norms"]:
        return
    norm = part(model, plan, layer, f"{before}_norm")
    kept = of_rows(clean[f"{before}_scale"][layer], batch["prompts"], batch).flatten()
    ratio = (norm_scale(norm.input, plan).flatten() / kept)[:, None]
    out, bias = norm.output, probed["norm_bias"][layer, before]
    flat = widen(out).reshape(-1, out.shape[-1])
    out[:] = ((flat - bias) * ratio + bias).to(out.dtype).reshape(out.shape)


def _like_rows(out, tokens):
    """Some MLPs work on flattened tokens: give their tensors the shape [row, position, …] again, as a view."""
    return out.view(*tokens.shape, -1)
