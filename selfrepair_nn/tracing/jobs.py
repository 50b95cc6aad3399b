"""One pure function per unit of work: tensors and a plan in, the tensors that the store keeps out."""

import torch

from selfrepair_nn.tracing.cases import cases_of, needs, prepare, sources
from selfrepair_nn.tracing.decompose import (
    ablated_readout,
    clean_readout,
    component_effects,
    neuron_query,
    query,
)
from selfrepair_nn.tracing.passes import ablated_pass, attention_paid, clean_pass, embeddings
from selfrepair_nn.tracing.probes import probe
from selfrepair_nn.tracing.readouts import norm_scale, to_cpu, widen
from selfrepair_nn.tracing.rows import gathered, passes

LARGE = ("component_change", "neuron_change", "neuron_direct_effect")
"""Many numbers for each token: where thresholds are given, only those of the top tokens come back."""


def ablation_job(model, arrays, plan, tick=None):
    """Ablate every case of the plan on one block of prompts.

    Args:
        arrays: "tokens" [prompt, position]; for resample "partner_tokens", for counterfactual "counterfactual_tokens",
            of the same shape;
            for mean "means" {what: {layer: tensor}} as `mean_job` sums them; for reinforce "edited_position"
            [prompt]; for the difference target "other" [prompt, position], the tokens whose logit is subtracted;
            "thresholds" [case], if given: see below; with them "counted" [prompt, position], if given: which tokens
            count, else all do; "wanted" [case, prompt], if given: how many positions of each
            prompt are wanted for each case, the rest being NaN.
        plan: what graph.Graph.plan gives, and "tokens_per_pass".
        tick: called with the number of rows, a case on a prompt each, after each pass (only in
            the caller's process).

    Returns a dict of tensors; positions are those with a next token:
        logit, mean_logit, target_constant, norm_scale [prompt, position]
        direct_effect, ablated_direct_effect, logit_change, mean_logit_change, from_heads, from_mlps,
        ablated_norm_scale [case, prompt, position]
        with "full": component_direct_effect [prompt, position, component], component_change
        with "neurons": mlp_direct_effect [prompt, position], mlp_change [case, prompt, position], top_neuron,
        top_neuron_change, top_neuron_direct_effect [case, prompt, position, rank], neuron_change,
        neuron_direct_effect
        with "residual_norm": residual_norm [prompt, position], ablated_residual_norm [case, prompt, position]
        with "reinforce": inserted_direct_effect [case, prompt, position]
        with "attention": attention [case, prompt, position, distance]
    component_change [case, prompt, position, component], and neuron_change and neuron_direct_effect likewise, come as
    [token, …] where thresholds are given: only counted tokens whose direct effect reaches their case's, in order.
    """
    tokens, cases = arrays["tokens"], cases_of(plan)
    clean = clean_pass(model, plan, tokens, needs(plan, cases))
    probed = _probed(model, plan, arrays, cases)
    state = clean_readout(clean, probed, plan)
    if plan["record"] == "full":
        embedded = embeddings(model, plan, tokens)
        state["component_effects"] = component_effects(embedded, clean, probed, state, plan)
    source = sources(model, plan, arrays, clean, cases)
    found, where, ready = [], None, {}
    for batch in passes(cases, plan, tokens, arrays.get("wanted")):
        if where != (batch["start"], batch["inside"]):
            where, ready = (batch["start"], batch["inside"]), {}
        for index, _ in batch["cases"]:
            if index not in ready:
                ready[index] = prepare(model, plan, arrays, clean, source, probed, cases[index])
        prepared = batch | {"cases": [(ready[index], prompts) for index, prompts in batch["cases"]]}
        changes = ablated_pass(model, plan, tokens, clean, probed, prepared)
        results = _with_next(ablated_readout(changes, prepared, clean, probed, state, plan), tokens)
        found.append((batch, *_split(results, batch, arrays, tokens)))
        if tick is not None:
            tick(len(batch["prompts"]))
    out = _with_next(_of_clean_run(state, probed), tokens)
    out |= gathered(found, len(tokens), tokens.shape[1] - 1, len(cases))
    if plan["attention"]:
        out["attention"] = _attention(model, plan, tokens, clean, cases)
    return to_cpu(out)


def _with_next(found, tokens):
    """Results [prompt or row, position, …] without the prompts' last token, which no other follows."""
    return {name: value[:, : tokens.shape[1] - 1] for name, value in found.items()}


def _of_clean_run(state, probed):
    """What the store keeps of the clean run: [prompt, position, …]."""
    kept = {"target_constant": probed["constant"]}
    kept |= {name: state[name] for name in ("logit", "mean_logit", "norm_scale")}
    kept |= {name: state[name] for name in ("residual_norm", "mlp_direct_effect") if name in state}
    if "component_effects" in state:
        kept["component_direct_effect"] = state["component_effects"]
    return kept


def effects_job(model, arrays, plan, tick=None):
    """Direct effect of every case's sites, nothing ablated: {"direct_effect": [case, prompt, position]}."""
    same = plan | {"replacement": {"kind": "identity"}, "record": "sums", "neurons": None, "attention": []}
    cases, tokens = cases_of(plan), arrays["tokens"]
    clean = clean_pass(model, same, tokens, needs(same, cases))
    probed = _probed(model, same, arrays, cases)
    scale = norm_scale(clean["input"][plan["model"]["n_layers"]], plan)
    effects = []
    for case in cases:
        ready = prepare(model, same, arrays, clean, clean, probed, case)
        effects.append(sum(before / scale for before, _ in ready["effects"].values())[:, :-1])
    return {"direct_effect": torch.stack(effects).cpu()}


def lengths_job(model, arrays, plan, tick=None):
    """Whether a pass depends on its own length: {"apart": [prompt, length]}, for each of `plan["lengths"]`.

    How far the final residual stream of prompts that are cut short lies from that of the same positions of the whole
    prompts, as a share of its norm, where that is most.
    """
    tokens, last = arrays["tokens"], plan["model"]["n_layers"]
    whole = widen(clean_pass(model, plan, tokens, {"input": [last]})["input"][last])
    found = []
    for length in plan["lengths"]:
        cut = clean_pass(model, plan, tokens[:, :length], {"input": [last]})["input"][last]
        same = whole[:, :length]
        found.append(((widen(cut) - same).norm(dim=-1) / same.norm(dim=-1)).amax(1))
    return {"apart": torch.stack(found, 1).cpu()}


def mean_job(model, arrays, plan, tick=None):
    """Sums over a block's prompts and positions, in float64: {what: {layer: [width]}} for `plan["keep"]`."""
    kept = clean_pass(model, plan, arrays["tokens"], plan["keep"])
    return {
        what: {layer: x.double().sum((0, 1)).cpu() for layer, x in layers.items()}
        for what, layers in kept.items()
    }


def _probed(model, plan, arrays, cases):
    """What the probe finds, with the target directions pulled back through every projection that is read."""
    sites = [site for case in cases for site in case]
    first = 0 if plan["record"] == "full" else min(site[1] for site in sites)
    layers = range(first, plan["model"]["n_layers"])
    neurons = {site[1] for site in sites if site[0] == "neuron"}
    neurons |= set() if plan["neurons"] is None else {plan["neurons"]}
    others = _to_the_end(arrays["other"]) if plan["target"] == "difference" else None
    probed = probe(model, plan, layers, _to_the_end(arrays["tokens"][:, 1:]), others, sorted(neurons))
    probed["query"] = {layer: query(probed, layer) for layer in layers}
    probed["neuron_query"] = {layer: neuron_query(probed, layer) for layer in neurons}
    return probed


def _to_the_end(targets):
    """Targets [prompt, position] of a prompt's last token too: some, for what they give is left out."""
    return torch.cat([targets, targets[:, -1:]], 1)


def _split(results, batch, arrays, tokens):
    """The results of a pass; and, where thresholds are given, of the large ones only counted tokens that reach them.

    Returns ({name: [row, position, …]}, {name: [token, …]}, the tokens' places in [case, prompt, position]).
    """
    if "thresholds" not in arrays:
        return results, {}, None
    cases = torch.cat([torch.full((len(p),), i) for i, p in batch["cases"]])
    effect = results["direct_effect"]
    top = effect >= arrays["thresholds"][cases, None].to(effect.device)
    if "counted" in arrays:
        top &= arrays["counted"].to(top.device)[batch["prompts"].to(top.device), : top.shape[1]]
    row, position = top.nonzero(as_tuple=True)
    rows = (cases * tokens.shape[0] + batch["prompts"]).to(row.device)
    few = {name: results.pop(name)[top] for name in LARGE if name in results}
    return results, few, rows[row] * tokens.shape[1] + position


def _attention(model, plan, tokens, clean, cases):
    """Attention of each case's head: [case, prompt, position, distance]."""
    heads = [site for case in cases for site in case if site[0] == "head"]
    layers = sorted({site[1] for site in heads})
    paid = attention_paid(model, plan, tokens, clean, layers, plan["attention"])
    return torch.stack([paid[site[1]][:, :-1, site[2]] for site in heads])
