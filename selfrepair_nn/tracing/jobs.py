"""One pure function per unit of work: tensors and a plan in, the tensors that the store keeps out.

Of `ablation_job` (told here, for the text of a function travels with each request, a module's does not):

Args:
    arrays: "tokens" [prompt, position]; for resample "partner_tokens", for counterfactual "counterfactual_tokens",
        of the same shape;
        for mean "means" {what: {layer: tensor}} as `mean_job` sums them; for reinforce "edited_position"
        [prompt]; for a shuffled target "shuffled_positions" [prompt, position], whose target it is;
        for the difference target "other" [prompt, position], the tokens whose logit is subtracted;
        "thresholds" [case], if given: see below; with them "counted" [prompt, position], if given: which tokens
        count, else all do; "wanted" [case, prompt], if given: how many positions of each
        prompt are wanted for each case, the rest being NaN.
    plan: what graph.Graph.plan gives, `realised`, and "tokens_per_pass".
    tick: called with the number of rows, a case on a prompt each, after each pass.
    known: the `probes.Weights` that earlier jobs found; as `tick`, only in the caller's process.

Returns a dict of tensors, those that `plan["gives"]` names: [prompt, position, …] of the clean run, [case, prompt,
position, …] of the ablated ones and of each case's own in the clean run; positions are those with a next token.
What `plan["large"]` names comes as [token, …] where thresholds are given: only counted tokens whose direct effect
reaches their case's, in order.
"""

import torch

from selfrepair_nn.tracing.cases import Block, clean_effects, needs, prepare, read_out, sources
from selfrepair_nn.tracing.clean import clean_pass
from selfrepair_nn.tracing.decompose import (
    ablated_readout,
    clean_readout,
    neuron_pullback,
    pullback,
)
from selfrepair_nn.tracing.memory import Room, out_of_memory
from selfrepair_nn.tracing.passes import ablated_pass
from selfrepair_nn.tracing.probes import measured_tokens, probe
from selfrepair_nn.tracing.readouts import norm_scale, sent, widen
from selfrepair_nn.tracing.replacements import Identity
from selfrepair_nn.tracing.rows import batches, gathered


def ablation_job(model, arrays, plan, tick=None, known=None):
    """Ablate every case of the plan on one block of prompts. What it takes and returns is told at the top."""
    return ablated(block_of(model, plan, arrays, plan["cases"], known), tick)


def ablated(block, tick):
    """All that a job gives of a block."""
    arrays, plan, state = block.arrays, block.plan, block.once("state", lambda: clean_readout(block))
    tokens, cases, room = arrays["tokens"], plan["cases"], plan.get("room") or Room(plan["tokens_per_pass"])
    found, start, ready = [], None, {}
    for batch in batches(cases, plan, tokens, room, state["norm_scale"].device, arrays.get("wanted")):
        if start != batch.start:
            start, ready = batch.start, {}
        results = _tried(block, batch, state, ready, room)
        if results is not None:
            found.append((batch, *_split(results, batch, arrays, plan)))
            if tick is not None:
                tick(len(batch.prompts))
    out = _with_next(_of_clean_run(state, block.probed, plan), tokens)
    out |= gathered(found, len(tokens), tokens.shape[1] - 1, len(cases))
    if plan["attention"]:
        out |= plan["attention"].found(block, cases)
    return out


def _tried(block, batch, state, ready, room):
    """What a pass gives; None where there is not enough memory for it, but may be for a smaller one.

    `ready` {index: Prepared} has the cases that begin there and are prepared already; others are added to it.
    """
    size = batch.tokens.numel()
    try:
        return room.given(lambda: _results(block, batch, state, ready), size, state["norm_scale"].device)
    except Exception as error:
        if not out_of_memory(error) or len(batch.prompts) == 1:
            raise
    room.too_small(size)
    ready.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _results(block, batch, state, ready):
    """The results of one pass: {name: [row, position, …]}."""
    new = [index for index, _ in batch.cases if index not in ready]
    ready |= zip(new, prepare(block, [block.plan["cases"][index] for index in new], batch.start), strict=True)
    prepared, words = batch.prepared(ready), block.plan["words"]
    if words:
        prepared.kept = words.kept(prepared, lambda effect: _top(effect, batch, block.arrays), state)
    changes = ablated_pass(block, prepared)
    results = _with_next(ablated_readout(changes, prepared, block, state), block.arrays["tokens"])
    if outcomes := block.plan["outcomes"]:
        top = _top(results["direct_effect"], batch, block.arrays)
        results |= outcomes.ablated(block, prepared, changes["final"], results["ablated_norm_scale"], top, state)
    if words:
        results |= words.of_pass(block, prepared, changes, results, state)
    return results


def block_of(model, plan, arrays, cases, known):
    """A block of prompts, with what its cases need of the clean run and of the weights."""
    clean = clean_pass(model, plan, arrays["tokens"], needs(plan, cases))
    probed = _probed(model, plan, arrays, cases, clean, known)
    return Block(model, plan, arrays, clean, probed, sources(model, plan, arrays, clean, cases), {})


def _with_next(found, tokens):
    """Results [prompt or row, position, …] without the prompts' last token, which no other follows."""
    return {name: value[:, : tokens.shape[1] - 1] for name, value in found.items()}


def _of_clean_run(state, probed, plan):
    """What the store keeps of the clean run: [prompt, position, …]."""
    found = state | {
        "target_constant": probed["constant"],
        "component_direct_effect": state.get("component_effects"),
    }
    return {name: found[name] for name in plan["gives"] if name in found}


def effects_job(model, arrays, plan, tick=None, known=None):
    """Direct effect of every case's sites, nothing ablated: {"direct_effect": [case, prompt, position]}."""
    same = plan | {"replacement": Identity(), "record": "total", "neurons": None, "attention": None, "words": None}
    cases = plan["cases"]
    block = block_of(model, same, arrays, cases, known)
    scale = norm_scale(block.clean["input"][plan["model"]["n_layers"]], plan)
    return {"direct_effect": (clean_effects(block, cases) / scale)[:, :, :-1].contiguous()}


def lengths_job(model, arrays, plan, tick=None, known=None):
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
    return {"apart": torch.stack(found, 1)}


def mean_job(model, arrays, plan, tick=None, known=None):
    """Sums over a block's prompts and positions, in float64: {what: {layer: [width]}} for `plan["keep"]`.

    Over those of `arrays["own"]` alone, bool [prompt, position], where that is given.
    """
    kept = clean_pass(model, plan, arrays["tokens"], plan["keep"])

    def own(x):
        return x[arrays["own"].to(x.device)][:, None] if "own" in arrays else x

    return {
        what: {layer: own(x).double().sum((0, 1)) for layer, x in layers.items()}
        for what, layers in kept.items()
    }


def _probed(model, plan, arrays, cases, clean, known):
    """What the probe finds, with the target directions pulled back through every projection that is read."""
    sites = [site for case in cases for site in case]
    layers = sorted(read_out(plan, cases) - {*plan["model"]["headless"]})
    neurons = {site.layer for site in sites if site.kept == "neurons"}
    neurons |= set() if plan["neurons"] is None else {plan["neurons"]}
    targets, others = measured_tokens(plan, arrays)
    where = {layer: x.device for what in ("mlp", "z") for layer, x in clean[what].items()}
    probed = probe(model, plan, layers, targets, others, sorted(neurons), where, known)
    probed["pullback"] = {layer: pullback(probed, clean, layer) for layer in layers}
    probed["neuron_pullback"] = {layer: neuron_pullback(probed, layer) for layer in neurons}
    return probed


def _top(effect, batch, arrays):
    """Which tokens of a pass count and reach their case's threshold: bool [row, position]; all where there are none."""
    if "thresholds" not in arrays:
        return torch.ones_like(effect, dtype=torch.bool)
    top = effect >= sent(arrays["thresholds"], effect.device)[batch.numbers, None]
    if "counted" in arrays:
        top &= sent(arrays["counted"], top.device)[batch.prompts, : top.shape[1]]
    return top


def _split(results, batch, arrays, plan):
    """The results of a pass; and, where thresholds are given, of the large ones only the top tokens.

    Returns ({name: [row, position, …]}, {name: [token, …]}, the tokens' places in [case, prompt, position]).
    """
    if "thresholds" not in arrays:
        return results, {}, None
    tokens, top = arrays["tokens"], _top(results["direct_effect"], batch, arrays)
    row, position = top.nonzero(as_tuple=True)
    rows = batch.numbers * tokens.shape[0] + batch.prompts
    few = {name: results.pop(name)[top] for name in plan["large"] if name in results}
    return results, few, rows[row] * tokens.shape[1] + position
