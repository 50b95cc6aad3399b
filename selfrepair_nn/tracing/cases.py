"""A case: the sites that one ablated run replaces together, and what must be known before it can run."""

import torch

from selfrepair_nn.tracing.clean import clean_pass
from selfrepair_nn.tracing.objects import Bundle
from selfrepair_nn.tracing.readouts import widen
from selfrepair_nn.tracing.replacements import replacement_of
from selfrepair_nn.tracing.routing import routing_needs
from selfrepair_nn.tracing.sites import site_of


class Block(Bundle):
    """A block of prompts, clean.

    `clean` is what `clean_pass` kept of its tokens, `probed` what `probe` found with the pullbacks, `source` the
    activations that replacements are taken from.
    """

    model: object
    plan: dict
    arrays: dict
    clean: dict
    probed: dict
    source: dict

    def home(self, x):
        """Where the final norm is: a model's layers may lie on several devices, and results come together there."""
        return x.to(self.probed["direction"].device)


class Prepared(Bundle):
    """A case ready for a pass: {site: its Edit}, and what it begins with, [prompt, position, d_model] each.

    `stream` is the residual stream that is taken up, `attention` what the attention gives where that is inside a layer.
    """

    edits: dict
    stream: torch.Tensor
    attention: object = None


def realised(plan):
    """The plan with its sites and its replacement as objects, before it travels: no class goes with it but theirs."""
    if "cases" not in plan:
        return plan
    cases = [[site_of(entry) for entry in case] for case in plan["cases"]]
    return plan | {"cases": cases, "replacement": replacement_of(plan["replacement"])}


def begins(case, plan):
    """The place where a case's pass begins. A site before it is not replaced in the pass: its change is added there."""
    return plan["replacement"].begins(case, plan)


def compared(plan, first):
    """The layers that passes from layer `first` on are compared in with the clean run, part by part."""
    start = {"total": plan["model"]["n_layers"], "sums": first, "full": 0}[plan["record"]]
    return set(range(start, plan["model"]["n_layers"]))


def read_out(plan, cases):
    """The layers whose heads' direct effects are read: those of the sites, and those that are compared."""
    own = {site.layer for case in cases for site in case}
    return own | compared(plan, min(own))


def needs(plan, cases):
    """What must be kept of a clean pass to prepare the cases and to compare their passes with: {what: layers}."""
    count, starts = plan["model"]["n_layers"], [begins(case, plan) for case in cases]
    headless, later = {*plan["model"]["headless"]}, compared(plan, min(starts)[0])
    keep = {"z": later - headless, "mixer": later & headless, "mlp": set(later)}
    for what, frozen in (("z", "frozen_heads"), ("mixer", "frozen_mixers"), ("mlp", "frozen_mlps")):
        keep[what] |= {layer for layer in plan[frozen] if layer >= min(starts)[0]}
    keep["input"] = {layer for layer, _ in starts} | {count}
    keep["attention"] = {layer for layer, inside in starts if inside}
    keep["neurons"], keep["routing"] = set(), routing_needs(plan)
    if plan["neurons"] is not None:
        keep["neurons"].add(plan["neurons"])
        keep["mlp"].add(plan["neurons"])
    for needed in [site.needs() for case in cases for site in case] + [plan["replacement"].needs()]:
        for what, layers in needed.items():
            keep[what] |= layers
    for norm in ("attention", "mlp", "post"):
        keep[f"{norm}_scale"] = {layer for layer, which in plan["frozen_norms"] if which == norm}
    if "post_norm" in plan["model"]["places"]:
        keep["post_scale"] |= read_out(plan, cases)
    return keep


def sources(model, plan, arrays, clean, cases):
    """The activations that replacements are taken from: {what: {layer: tensor}}."""
    text = plan["replacement"].text
    if text is None:
        return clean
    keep = {}
    for site in (site for case in cases for site in case if site.kept):
        keep.setdefault(site.kept, set()).add(site.layer)
    return clean_pass(model, plan, arrays[text], keep)


def prepare(block, case):
    """A case ready for a pass."""
    by = block.plan["replacement"]
    start = by.begins(case, block.plan)
    edits = {site: by.edit(site, block, start) for site in case}
    layer, inside = start
    stream = block.clean["input"][layer]
    begun = block.clean["attention"][layer] if inside else stream
    written = [edit.written.to(begun.device) for edit in edits.values() if edit.written is not None]
    written = sum(written[1:], written[0]).to(stream.dtype)
    if block.plan.get("shaken"):
        stream = stream + _rounding_steps(stream)
    if inside:
        return Prepared(edits, stream, begun + written)
    return Prepared(edits, stream + written)


def _rounding_steps(x):
    """For each entry up to one rounding step, up or down, the same each time."""
    generator = torch.Generator(x.device).manual_seed(0)
    part = 2 * torch.rand(x.shape, generator=generator, device=x.device) - 1
    return (widen(x) * torch.finfo(x.dtype).eps * part).to(x.dtype)
