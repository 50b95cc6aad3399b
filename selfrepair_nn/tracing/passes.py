"""The ablated pass: it begins at its place, and every row of it is one case on one prompt.

Of `ablated_pass` (told here, for the text of a function travels with each request, a module's does not):

All cases begin at the same place: the layers below are skipped, and the pass takes up the clean residual stream with
what the case changes there added; sites further up are replaced on the way. What comes after the longest row's last
wanted token is left out: by causality it changes nothing before.

Args:
    block: a `cases.Block`.
    batch: a `rows.Batch`, its cases prepared.

Returns a dict of changes of ⟨x_c, d_t⟩ (not yet divided by S), over the rows of the pass:
    heads {layer: [row, position, heads]}, mixers and mlps {layer: [row, position]},
    neurons [row, position, neurons],
    post_norms [[row, position]] what the scales of the norms behind the attention change, layer by layer,
    experts {layer: [row, position, choice]}, where they are recorded or kept, final [row, position, d_model],
    watched {(activation, layer): [token, width]} changes of activations themselves, at tokens whose words are kept.
"""

import torch
from nnsight import save

from selfrepair_nn.tracing.changes import compare
from selfrepair_nn.tracing.clean import neurons_of, no_logits, stub, take_up
from selfrepair_nn.tracing.places import like_rows, part, place, skip, written
from selfrepair_nn.tracing.readouts import norm_scale, per_head, widen
from selfrepair_nn.tracing.routing import through_router
from selfrepair_nn.tracing.sites import Head


def ablated_pass(block, batch):
    """One forward pass in which every row is one case on one prompt. What it takes and returns is told at the top."""
    model, plan, (start, inside) = block.model, block.plan, batch.start
    stream = _taken_up(block, batch)
    with torch.no_grad(), model.trace(batch.tokens, use_cache=False, logits_to_keep=no_logits(plan)):
        changes = save({"heads": {}, "mixers": {}, "mlps": {}, "post_norms": [], "experts": {}, "watched": {}})
        if start or not inside:
            take_up(model, plan, start, stream)
        for layer in range(start, plan["model"]["n_layers"]):
            if layer == start and inside:
                _begin_inside(block, start, batch, stream)
            else:
                _freeze_norm(block, layer, "attention", batch)
                through = _through_mixer if layer in plan["model"]["headless"] else _through_heads
                through(block, layer, batch, changes)
            _through_post_norm(block, layer, batch, changes)
            _freeze_norm(block, layer, "mlp", batch)
            through_router(block, layer, batch, changes)
            _through_mlp(block, layer, batch, changes)
        changes["final"] = place(model, plan, "final_norm").input
    return changes


def _taken_up(block, batch):
    """The residual stream that a pass takes up, [row, position, d_model], with what is added to it before its layer."""
    layer, inside = batch.start
    clean = block.clean["input"][layer]
    return batch.of(clean) if inside else _with_written(batch, clean)


def _with_written(batch, clean):
    """What a pass begins with: `clean` [prompt, position, d_model] and what each case adds there, in its dtype."""
    written = batch.in_rows(lambda case: case.written)
    return batch.against(torch.add, written.to(clean.device, clean.dtype), clean)


def _begin_inside(block, layer, batch, stream):
    """Let what the cases make of the layer's attention stand for it."""
    model, plan = block.model, block.plan
    attention = _with_written(batch, block.clean["attention"][layer])
    if "attention_norm" in plan["model"]["places"]:
        part(model, plan, layer, "attention_norm").skip(stub(stream))
    if plan["model"]["residual_inside"]:
        attention = attention + stream.to(attention.device)
    skip(part(model, plan, layer, "attention"), plan, "attention", attention)


def _through_post_norm(block, layer, batch, changes):
    """Freeze the scale of the norm behind the attention, if there is one, or read what its change does."""
    if "post_norm" not in block.plan["model"]["places"]:
        return
    if [layer, "post"] in block.plan["frozen_norms"]:
        _freeze_norm(block, layer, "post", batch)
        return
    if block.plan["record"] == "total":
        return
    given = widen(part(block.model, block.plan, layer, "post_norm").input)
    clean, gain = batch.of(block.clean["post_scale"][layer]), block.probed["post_gain"][layer]
    effect = batch.against(torch.mul, given * gain, block.probed["given_direction"]).sum(-1)
    changes["post_norms"].append((1 / norm_scale(given, block.plan) - 1 / clean) * effect)


def _through_heads(block, layer, batch, changes):
    """Replace heads, or freeze them, and read what changed."""
    plan, compared = block.plan, block.plan["record"] != "total"
    edited, frozen = ("z", layer) in batch.replaced, plan["frozen_heads"].get(layer, ())
    if not (compared or edited or frozen):
        return
    projection, told = part(block.model, plan, layer, "output_projection"), layer in block.probed["pullback"]
    z = projection.input if told or frozen else None
    for rows, case, prompts in batch.each() if frozen else ():
        heads = [h for h in frozen if Head(layer, h) not in case.edits]
        if heads:
            clean = per_head(batch.of(block.clean["z"][layer], prompts), plan)
            per_head(z, plan)[rows, :, heads] = clean[:, :, heads]
    _replace(z, "z", layer, batch, plan)
    if compared:
        x, what = (z, "z") if told else (projection.output, "attention")
        changes["heads"][layer] = compare(x, what, layer, block, batch, changes)


def _through_mixer(block, layer, batch, changes):
    """Freeze what a layer has in place of attention, or read what changed."""
    frozen, compared = layer in block.plan["frozen_mixers"], block.plan["record"] != "total"
    if not (frozen or compared):
        return
    out = written(part(block.model, block.plan, layer, "mixer"))
    if frozen:
        out[:] = batch.of(block.clean["mixer"][layer])
    if compared:
        changes["mixers"][layer] = compare(out, "mixer", layer, block, batch, changes)[..., 0]


def _through_mlp(block, layer, batch, changes):
    """Replace neurons and MLPs, or freeze them, and read what changed."""
    model, plan, clean = block.model, block.plan, block.clean
    edited, frozen = ("neurons", layer) in batch.replaced, layer in plan["frozen_mlps"]
    if edited or plan["neurons"] == layer:
        neurons = neurons_of(model, plan, layer, batch.tokens)
        if frozen:
            neurons[:] = batch.of(clean["neurons"][layer])
        _replace(neurons, "neurons", layer, batch, plan)
        if plan["neurons"] == layer:
            plan["readings"][0].read(block, batch, neurons, changes)
    compared, replaced = plan["record"] != "total", ("mlp", layer) in batch.replaced
    if not (compared or replaced or frozen):
        return
    out = like_rows(written(part(model, plan, layer, "mlp")), batch.tokens)
    if frozen and not edited:
        out[:] = batch.of(clean["mlp"][layer])
    _replace(out, "mlp", layer, batch, plan)
    if compared:
        changes["mlps"][layer] = compare(out, "mlp", layer, block, batch, changes)[..., 0]


def _replace(x, kept, layer, batch, plan):
    """Put what replaces them into an activation [row, position, …], in place."""
    for rows, prompts, site, new in batch.replaced.get((kept, layer), ()):
        site.put(x, rows, batch.of(new, prompts), plan)


def _freeze_norm(block, layer, which, batch):
    """Give a norm's output the clean scale: what it divides by does not react."""
    if [layer, which] not in block.plan["frozen_norms"]:
        return
    norm = part(block.model, block.plan, layer, f"{which}_norm")
    kept = batch.of(block.clean[f"{which}_scale"][layer]).flatten()
    ratio = (norm_scale(norm.input, block.plan).flatten() / kept)[:, None]
    out, bias = norm.output, block.probed["norm_bias"][layer, which]
    flat = widen(out).reshape(-1, out.shape[-1])
    out[:] = ((flat - bias) * ratio + bias).to(out.dtype).reshape(out.shape)
