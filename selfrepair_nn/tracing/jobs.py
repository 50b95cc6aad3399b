"""One pure function per unit of work: tensors and a plan in, the tensors that the store keeps out."""

import torch
from nnsight import save

from selfrepair_nn.tracing.decompose import (
    ablated_readout,
    clean_readout,
    component_effects,
    direct_effect,
    query,
)
from selfrepair_nn.tracing.passes import ablated_pass, clean_pass, embeddings
from selfrepair_nn.tracing.places import part, place
from selfrepair_nn.tracing.probes import probe
from selfrepair_nn.tracing.readouts import norm_scale, per_head, widen


def ablation_job(model, arrays, plan, tick=None):
    """Ablate every case of the plan on one block of prompts.

    Args:
        arrays: "tokens" [prompt, position]; for resample "partner_tokens" of the same shape; for mean "mean_z"
            {layer: [heads * d_head]}.
        plan: "cases" (list of lists of [layer, head]), "replacement", "frozen_heads" {layer: [head]}, "frozen_mlps"
            [layer], "frozen_norm", "target", "value_bias", "record" ("sums" or "full"), "rows" (tokens in a pass).
        tick: called with the number of cases after each pass (only where the job runs in the caller's process).

    Returns a dict of float tensors; positions are those with a next token:
        logit, mean_logit, target_constant, norm_scale [prompt, position]
        direct_effect, ablated_direct_effect, logit_change, mean_logit_change, from_heads, from_mlps,
        ablated_norm_scale [case, prompt, position]
        with "full": component_direct_effect [prompt, position, component],
        component_change [case, prompt, position, component]
    """
    tokens, count = arrays["tokens"], plan["model"]["n_layers"]
    cases = [[(layer, head) for layer, head in case] for case in plan["cases"]]
    starts = sorted({min(case)[0] for case in cases})
    first = 0 if plan["record"] == "full" else starts[0]
    parallel = plan["model"]["parallel"]
    clean = clean_pass(model, plan, tokens, first, inputs=[s + 1 if parallel else s for s in starts])
    probed = probe(model, plan, range(first, count), tokens[:, 1:])
    probed["query"] = {layer: query(probed, layer) for layer in range(first, count)}
    state = clean_readout(clean, probed, plan)
    replace = _replacements(model, arrays, plan, clean, probed, cases)
    results = []
    for group in _groups(cases, tokens.numel(), plan["rows"]):
        replaced = [{site: replace(site) for site in case} for case in group]
        changes = ablated_pass(model, plan, tokens, clean, probed, replaced)
        results.append(ablated_readout(changes, group, replaced, clean, probed, state, plan))
        if tick is not None:
            tick(len(group))
    out = {name: torch.cat([r[name] for r in results]) for name in results[0]}
    out |= {name: state[name] for name in ("logit", "mean_logit", "norm_scale")}
    out["target_constant"] = probed["constant"]
    if plan["record"] == "full":
        out["component_direct_effect"] = component_effects(
            embeddings(model, plan, tokens), clean, probed, state, plan
        )
    return {name: value.cpu() for name, value in out.items()}


def effects_job(model, arrays, plan, tick=None):
    """Direct effect of every case's heads, nothing ablated: {"direct_effect": [case, prompt, position]}."""
    tokens, count = arrays["tokens"], plan["model"]["n_layers"]
    layers = sorted({layer for case in plan["cases"] for layer, _ in case})
    clean = clean_pass(model, plan, tokens, layers[0])
    probed = probe(model, plan, layers, tokens[:, 1:])
    scale = norm_scale(clean["input"][count], plan)[:, :-1]
    probed["query"] = {layer: query(probed, layer) for layer in layers}
    effects = []
    for case in plan["cases"]:
        terms = [direct_effect(_of(clean["z"], site, plan), site, probed, scale, plan) for site in case]
        effects.append(sum(terms[1:], terms[0]))
    return {"direct_effect": torch.stack(effects).cpu()}


def mean_job(model, arrays, plan, tick=None):
    """Sum of z over a block's prompts and positions, in float64: {layer: [heads * d_head]} for `plan["layers"]`."""
    kept = clean_pass(model, plan, arrays["tokens"], only=plan["layers"])
    return {layer: z.double().sum((0, 1)).cpu() for layer, z in kept["z"].items()}


def logits_job(model, arrays, plan, tick=None):
    """The model's own logits, by whole forward passes: what every shortcut is checked against.

    Clean, and with the one head `plan["site"]` replaced at the input of its output projection by its partner's z.

    Returns a dict: logits, ablated_logits [prompt, position, vocabulary].
    """
    tokens, (layer, head) = arrays["tokens"], plan["site"]
    partner = clean_pass(model, plan, arrays["partner_tokens"], only=[layer])["z"][layer]
    with torch.no_grad(), model.trace(tokens, use_cache=False):
        clean = save(place(model, plan, "unembedding").output)
    with torch.no_grad(), model.trace(tokens, use_cache=False):
        z = per_head(part(model, plan, layer, "output_projection").input, plan)
        z[:, :, head] = per_head(partner, plan)[:, :, head]
        ablated = save(place(model, plan, "unembedding").output)
    return {"logits": widen(clean).cpu(), "ablated_logits": widen(ablated).cpu()}


def _replacements(model, arrays, plan, clean, probed, cases):
    """A function from (layer, head) to the z that replaces it: [prompt, position, d_head]."""
    kind = plan["replacement"]
    if kind == "resample":
        layers = sorted({layer for case in cases for layer, _ in case})
        source = clean_pass(model, plan, arrays["partner_tokens"], only=layers)["z"]
    else:
        source = clean["z"]

    def replace(site):
        layer, head = site
        z = _of(source, site, plan)
        if kind == "zero":
            return probed["value_constant"][layer][head].to(z.dtype).expand_as(z)
        if kind == "mean":
            mean = per_head(arrays["mean_z"][layer], plan)[head]
            return mean.to(z.device, z.dtype).expand_as(z)
        return z

    return replace


def _groups(cases, tokens, rows):
    """Split the cases, in order, into passes: one first layer each, at most `rows` tokens (but at least one case)."""
    size = max(1, rows // tokens)
    groups = []
    for case in cases:
        last = groups[-1] if groups else None
        if last and len(last) < size and min(last[0])[0] == min(case)[0]:
            last.append(case)
        else:
            groups.append([case])
    return groups


def _of(kept, site, plan):
    """One head's z, from z kept by layer."""
    return per_head(kept[site[0]], plan)[:, :, site[1]]
