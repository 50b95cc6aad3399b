"""What a case replaces, by what, and where its pass begins."""

import torch

from selfrepair_nn.tracing.passes import clean_pass, layer_on
from selfrepair_nn.tracing.readouts import along, per_head, product, widen

KEPT = {"head": "z", "mlp": "mlp", "neuron": "hidden"}
"""What a clean pass keeps of a kind of site."""


def cases_of(plan):
    """The plan's cases: lists of sites, a site a tuple of its kind and its numbers."""
    return [[tuple(site) for site in case] for case in plan["cases"]]


def entrance(case, plan):
    """Where a case's pass begins: the layer, and whether that is after its attention.

    It is the first place that the case's first site can change. A site there is not replaced in the pass: the
    change of what it writes is added to the residual stream that the pass takes up.
    """
    kind, first = min(case, key=lambda site: site[1])[:2]
    if kind == "layers":
        return case[0][2], False
    if kind == "swap":
        return first + 2, False
    if plan["replacement"]["kind"] == "reinforce":
        return first, False
    heads = any(site[:2] == ("head", first) for site in case)
    if heads and not plan["model"]["parallel"]:
        return first, True
    return first + 1, False


def enters(site, start, inside):
    """Whether a site lies before the place where its case's pass begins."""
    return site[1] < start or (inside and site[1] == start and site[0] == "head")


def needs(plan, cases):
    """What must be kept of a clean pass to prepare the cases and to compare their passes with: {what: layers}."""
    count, entrances = plan["model"]["n_layers"], [entrance(case, plan) for case in cases]
    first = 0 if plan["record"] == "full" else min(start for start, _ in entrances)
    keep = {what: set(range(first, count)) for what in ("z", "mlp")}
    keep["input"] = {start for start, _ in entrances} | {count}
    keep["attention"] = {start for start, inside in entrances if inside}
    keep["hidden"] = set()
    if plan["neurons"] is not None:
        keep["hidden"].add(plan["neurons"])
        keep["mlp"].add(plan["neurons"])
    for case in cases:
        for site in case:
            if site[0] in KEPT:
                keep[KEPT[site[0]]].add(site[1])
            else:
                keep["input"].add(site[1])
    if plan["attention"]:
        keep["z"] |= {site[1] for case in cases for site in case if site[0] == "head"}
    if plan["replacement"]["kind"] == "other_head":
        keep["z"].add(plan["replacement"]["site"][1])
    for norm in ("attention", "mlp"):
        keep[f"{norm}_scale"] = {layer for layer, before in plan["frozen_norms"] if before == norm}
    return keep


def sources(model, plan, arrays, clean, cases):
    """The activations that replacements are taken from: {what: {layer: tensor}}."""
    tokens = {"resample": "partner_tokens", "counterfactual": "counterfactual_tokens"}.get(
        plan["replacement"]["kind"]
    )
    if tokens is None:
        return clean
    keep = {}
    for site in (site for case in cases for site in case if site[0] in KEPT):
        keep.setdefault(KEPT[site[0]], set()).add(site[1])
    return clean_pass(model, plan, arrays[tokens], keep)


def prepare(model, plan, arrays, clean, source, probed, case):
    """A case ready to ride in a pass.

    Returns a dict: sites, start, inside; new {site: what replaces it} for the sites that the pass replaces on its
    way; written [prompt, position, d_model], what is added where it begins; effects {site: (before, after)}, each
    ⟨x, d_t⟩ [prompt, position] of the site itself; and for a reinforced head also inserted, ⟨written, d_t⟩.
    """
    start, inside = entrance(case, plan)
    residual = clean["input"][start]
    ready = {"sites": case, "start": start, "inside": inside, "new": {}, "effects": {}}
    written = []
    for site in case:
        before = _value(site, clean, plan)
        if plan["replacement"]["kind"] == "reinforce":
            written.append(_reinforcement(site, before, plan, arrays, probed))
            effect = _effect(site, before, probed, plan)
            ready["effects"][site] = (effect, effect)
            continue
        if site[0] in ("layers", "swap"):
            new = _rebuilt(model, plan, arrays["tokens"], clean, site)
            written.append(widen(new) - widen(residual))
            ready["effects"][site] = _block_effects(site, new, clean, probed)
            continue
        new = _replacement(site, before, arrays, source, probed, plan)
        ready["effects"][site] = tuple(_effect(site, value, probed, plan) for value in (before, new))
        if enters(site, start, inside):
            written.append(_write(site, widen(new) - widen(before), probed))
        else:
            ready["new"][site] = new
    ready["written"] = sum(written[1:], written[0]).to(residual.dtype)
    if plan["replacement"]["kind"] == "reinforce":
        ready["inserted"] = _along(written[0], probed)
    if plan.get("shaken"):
        ready["written"] = ready["written"] + _rounding_steps(residual)
    return ready


def _value(site, kept, plan):
    """A site's activation: a head's z, an MLP's output, a neuron's activation; None for whole layers."""
    if site[0] not in KEPT:
        return None
    found = kept[KEPT[site[0]]][site[1]]
    if site[0] == "head":
        return per_head(found, plan)[:, :, site[2]]
    return found[:, :, site[2]] if site[0] == "neuron" else found


def _replacement(site, before, arrays, source, probed, plan):
    """What takes the place of a site's activation, in its shape."""
    by = plan["replacement"]
    constant = _constant(site, probed).to(before.dtype)
    if by["kind"] == "zero":
        return constant.expand_as(before)
    if by["kind"] == "scale":
        return constant + by["factor"] * (before - constant)
    if by["kind"] == "constant":
        return torch.full_like(before, by["value"])
    if by["kind"] == "mean":
        mean = arrays["means"][KEPT[site[0]]][site[1]][None, None].to(before.device, before.dtype)
        return _value(site, {KEPT[site[0]]: {site[1]: mean}}, plan).expand_as(before)
    if by["kind"] == "other_head":
        return _value(tuple(by["site"]), source, plan)
    return _value(site, source, plan)


def _constant(site, probed):
    """The part of a head's z that no input changes; of other sites nothing is constant."""
    if site[0] == "head":
        return probed["value_constant"][site[1]][site[2]]
    return probed["direction"].new_zeros(())


def _write(site, change, probed):
    """What a change of a site's activation changes of the residual stream: [prompt, position, d_model]."""
    if site[0] == "head":
        return product(change, probed["output_projection"][site[1]][site[2]])
    if site[0] == "neuron":
        return change[..., None] * probed["down_projection"][site[1]][site[2]]
    return change


def _effect(site, value, probed, plan):
    """⟨x, d_t⟩ of a site whose activation is `value`: [prompt, position]."""
    value = widen(value)
    if site[0] == "head":
        query = per_head(probed["query"][site[1]], plan)[:, :, site[2]]
        return ((value - probed["value_constant"][site[1]][site[2]]) * query).sum(-1)
    if site[0] == "neuron":
        return value * probed["neuron_query"][site[1]][:, :, site[2]]
    return _along(value, probed)


def _along(x, probed):
    return along(x, probed["direction"])


def _rebuilt(model, plan, tokens, clean, site):
    """The residual stream behind layers that are deleted or swapped: [prompt, position, d_model]."""
    entering = clean["input"][site[1]]
    if site[0] == "layers":
        return entering
    second = layer_on(model, plan, tokens, site[1] + 1, entering)
    return layer_on(model, plan, tokens, site[1], second)


def _block_effects(site, new, clean, probed):
    """⟨x, d_t⟩ of all that deleted or swapped layers write, before and after."""
    stop = site[2] if site[0] == "layers" else site[1] + 2
    entering = widen(clean["input"][site[1]])
    return _along(widen(clean["input"][stop]) - entering, probed), _along(widen(new) - entering, probed)


def _reinforcement(site, z, plan, arrays, probed):
    """The head's own write times the scale, at the edited position of each prompt: [prompt, position, d_model]."""
    own = _write(site, widen(z) - probed["value_constant"][site[1]][site[2]], probed)
    where = arrays["edited_position"].to(own.device)[:, None] == torch.arange(own.shape[1], device=own.device)
    return plan["replacement"]["scale"] * own * where[..., None]


def _rounding_steps(x):
    """For each entry up to one rounding step, up or down, the same each time."""
    generator = torch.Generator(x.device).manual_seed(0)
    part = 2 * torch.rand(x.shape, generator=generator, device=x.device) - 1
    return (widen(x) * torch.finfo(x.dtype).eps * part).to(x.dtype)
