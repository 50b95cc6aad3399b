"""A case: the sites that one ablated run replaces together, and what must be known before it can run.

Heads are told apart, by the directions that are pulled back through their weights, in the layers of the ablated sites,
and in all layers that are compared where each component is recorded, or a norm stands behind the attention; of the
others what the attention writes is compared as a whole, for which nothing is probed.
"""

import torch

from selfrepair_nn.tracing.attention import AttentionPaid
from selfrepair_nn.tracing.clean import clean_pass
from selfrepair_nn.tracing.lens import Words
from selfrepair_nn.tracing.neurons import NeuronReadings
from selfrepair_nn.tracing.objects import Bundle
from selfrepair_nn.tracing.outcomes import Outcomes
from selfrepair_nn.tracing.readouts import total
from selfrepair_nn.tracing.replacements import replacement_of
from selfrepair_nn.tracing.routing import routing_needs
from selfrepair_nn.tracing.shuffled import Shuffled
from selfrepair_nn.tracing.sites import site_of
from selfrepair_nn.tracing.streams import StreamReadings
from selfrepair_nn.tracing.terms import Terms


class Block(Bundle):
    """A block of prompts, clean.

    `clean` is what `clean_pass` kept of its tokens, `probed` what `probe` found with the pullbacks, `source` the
    activations that replacements are taken from, `made` what was once made of these for all passes.
    """

    model: object
    plan: dict
    arrays: dict
    clean: dict
    probed: dict
    source: dict
    made: dict

    def once(self, name, make):
        """What `make` gives, made once."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def home(self, x):
        """Where the final norm is: a model's layers may lie on several devices, and results come together there."""
        return x.to(self.probed["direction"].device)


class Prepared(Bundle):
    """A case ready for a pass: {site: its Edit}."""

    edits: dict

    @property
    def written(self):
        """What is added where its pass begins, [prompt, position, d_model]."""
        return total(edit.written for edit in self.edits.values() if edit.written is not None)

    def effect(self, which):
        """⟨x, d_t⟩ of its sites together, before (0) or after (1): [prompt, position]."""
        return total(edit.effects[which] for edit in self.edits.values())


def realised(plan):
    """The plan with its sites, its replacement and what else it asks for as objects: no other code travels with it."""
    if "cases" not in plan:
        return plan
    cases, cut = [[site_of(entry) for entry in case] for case in plan["cases"]], "edge_attention" in plan["gives"]
    readings = {"mlp_change": NeuronReadings, "stream_distance": StreamReadings, "shuffled_from_norm": Shuffled}
    asked = {
        "readings": [each() for name, each in readings.items() if name in plan["gives"]],
        "terms": Terms() if plan["record"] == "full" else None,
        "outcomes": Outcomes() if "logprob" in plan["gives"] else None,
        "attention": AttentionPaid(plan["attention"], cut) if plan["attention"] or cut else None,
        "words": Words(plan["words"], plan["movers"]) if plan["words"] else None,
    }
    return plan | {"cases": cases, "replacement": replacement_of(plan["replacement"])} | asked


def begins(case, plan):
    """The place where a case's pass begins. A site before it is not replaced in the pass: its change is added there."""
    return plan["replacement"].begins(case, plan)


def compared(plan, first):
    """The layers that passes from layer `first` on are compared in with the clean run, part by part."""
    start = {"total": plan["model"]["n_layers"], "sums": first, "full": 0}[plan["record"]]
    return set(range(start, plan["model"]["n_layers"]))


def read_out(plan, cases):
    """The layers whose heads are told apart."""
    own = {site.layer for case in cases for site in case}
    apart = plan["terms"] or plan["words"] or "post_norm" in plan["model"]["places"]
    return own | compared(plan, min(own)) if apart else own


def needs(plan, cases):
    """What must be kept of a clean pass to prepare the cases and to compare their passes with: {what: layers}."""
    count, starts = plan["model"]["n_layers"], [begins(case, plan) for case in cases]
    headless, later, told = {*plan["model"]["headless"]}, compared(plan, min(starts)[0]), read_out(plan, cases)
    keep = {"z": later & told - headless, "mixer": later & headless, "mlp": {*later}}
    for what, frozen in (("z", "frozen_heads"), ("mixer", "frozen_mixers"), ("mlp", "frozen_mlps")):
        keep[what] |= {layer for layer in plan[frozen] if layer >= min(starts)[0]}
    keep["input"] = {layer for layer, _ in starts} | {count}
    keep["attention"] = {layer for layer, inside in starts if inside} | later - told - headless
    keep["neurons"], keep["routing"] = set(), routing_needs(plan)
    if plan["neurons"] is not None:
        keep["neurons"].add(plan["neurons"])
        keep["mlp"].add(plan["neurons"])
    readers = [each for each in (plan["replacement"], plan["attention"]) if each]
    for needed in [s.needs() for case in cases for s in case] + [each.needs(cases) for each in readers]:
        for what, layers in needed.items():
            keep[what] |= layers
    for norm in ("attention", "mlp", "post"):
        keep[f"{norm}_scale"] = {layer for layer, which in plan["frozen_norms"] if which == norm}
    if "post_norm" in plan["model"]["places"]:
        keep["post_scale"] |= told
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


def prepare(block, cases, start):
    """Cases that begin at one place, ready for a pass: [Prepared]."""
    by, edits = block.plan["replacement"], {}
    for sites in alike(cases):
        edits |= zip(sites, by.edits(sites, block, start), strict=True)
    return [Prepared({site: edits[site] for site in case}) for case in cases]


def clean_effects(block, cases):
    """⟨x, d_t⟩ of each case's sites in the clean run: [case, prompt, position]."""
    found = {}
    for sites in alike(cases):
        found |= zip(sites, block.home(sites[0].clean_effects(sites, block)), strict=True)
    return torch.stack([total(found[site] for site in case) for case in cases])


def alike(cases):
    """The sites of cases, each once, in groups of one kind and layer: what is computed together."""
    groups = {}
    for site in (site for case in cases for site in case):
        groups.setdefault((type(site), site.layer), {})[site] = None
    return [[*sites] for sites in groups.values()]
