"""What rounding alone makes of an ablation: the least of a change that means anything.

Of `noise_job` (told here, for the text of a function travels with each request, a module's does not): nothing is
replaced. Where a case's pass would begin, the residual stream is the clean one, each entry moved by up to one rounding
step of its dtype; where it begins behind a layer's attention, what that gives is clean.
"""

import torch
from nnsight import save

from selfrepair_nn.tracing.cases import Block, begins
from selfrepair_nn.tracing.clean import clean_pass, no_logits, take_up
from selfrepair_nn.tracing.decompose import clean_readout, rescaled
from selfrepair_nn.tracing.places import part, place
from selfrepair_nn.tracing.probes import measured_tokens, probe
from selfrepair_nn.tracing.readouts import along, norm_scale, widen

AT_ONCE = 8
"""Cases in a pass, which begins where the lowest of them does: fewer passes, a little longer than each case needs."""


def noise_job(model, arrays, plan, tick=None, known=None):
    """The change of the logit where cases' passes begin a rounding step off: {"logit_change": [case, prompt, …]}."""
    starts, last = [begins(case, plan) for case in plan["cases"]], plan["model"]["n_layers"]
    keep = {"input": {layer for layer, _ in starts} | {last}, "z": {layer for layer, inside in starts if inside}}
    clean = clean_pass(model, plan, arrays["tokens"], keep)
    probed = probe(model, plan, [], *measured_tokens(plan, arrays), known=known)
    block = Block(model, plan, arrays, clean, probed, clean, {})
    state, count = clean_readout(block), max(1, min(AT_ONCE, plan["tokens_per_pass"] // arrays["tokens"].numel()))
    finals = torch.cat([_shaken_pass(block, starts[i : i + count]) for i in range(0, len(starts), count)])
    final, scale = widen(finals), state["norm_scale"]
    change = along(final - widen(clean["input"][last]), block.probed["direction"]) / scale
    return {"logit_change": rescaled(state["effects"], change, scale, norm_scale(final, plan))[:, :, :-1]}


def _shaken_pass(block, starts):
    """The final residual stream of a pass in which each of `starts` has rows: [start, prompt, position, d_model]."""
    model, plan, tokens, clean = block.model, block.plan, block.arrays["tokens"], block.clean
    last, size = plan["model"]["n_layers"], len(tokens)
    rows = [(place_, slice(i * size, (i + 1) * size)) for i, place_ in enumerate(starts)]
    lowest = min(layer for layer, _ in starts)
    with torch.no_grad(), model.trace(tokens.repeat(len(starts), 1), use_cache=False, logits_to_keep=no_logits(plan)):
        take_up(model, plan, lowest, clean["input"][lowest].repeat(len(starts), 1, 1))
        for layer in range(lowest, last):
            here = [(inside, where) for (start, inside), where in rows if start == layer]
            for _, where in here:
                place(model, plan, "layers")[layer].input[where] = _moved(clean["input"][layer])
            for inside, where in here:
                if inside:
                    part(model, plan, layer, "output_projection").input[where] = clean["z"][layer]
        final = place(model, plan, "final_norm").input
        for (start, _), where in rows:
            if start == last:
                final[where] = _moved(clean["input"][last])
        found = save([final])
    return found[0].unflatten(0, (len(starts), size))


def _moved(x):
    """For each entry up to one rounding step, up or down, the same each time."""
    generator = torch.Generator(x.device).manual_seed(0)
    part_ = 2 * torch.rand(x.shape, generator=generator, device=x.device) - 1
    return x + (widen(x) * torch.finfo(x.dtype).eps * part_).to(x.dtype)
