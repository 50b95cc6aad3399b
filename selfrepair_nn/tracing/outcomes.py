"""The next-token distribution, clean and after an ablation, in nats: two products with the vocabulary for each token.

Before a soft cap logits are linear in what leaves the final norm, so the unembedding is called on changes. With
g(x) = gamma * C(x) / S, S the clean scale, x and x' the final residual stream before and after, w the change of what
the ablated sites themselves write, and u = W g(x) + k the clean logits, the logits change by

    W g(w)                                  where only the sites' own write changed, the norm frozen
    W g(x' - x)                             with everything as ablated, but the clean scale
    (S/S' - 1) (u - k) + S/S' W g(x' - x)   with everything as ablated: no further product

and what rounding does to u is the same on both sides of every change. Nothing of the vocabulary's size is kept.
"""

import torch
from nnsight import save

from selfrepair_nn.tracing.clean import no_logits
from selfrepair_nn.tracing.readouts import capped, widen
from selfrepair_nn.tracing.vocabulary import final_stream, joined, normed_by, own_changes, unembedding


def clean_outcomes(block, scale):
    """Of the clean run, `scale` its final norm's: logprob, logsumexp, entropy, target_rank [prompt, position].

    With them `normed` [prompt, position, d_model], g(x).
    """
    normed, tokens = normed_by(block, final_stream(block), scale), block.arrays["tokens"]
    goals, whole = _goals(block).flatten(), (normed + block.probed["norm_bias_final"]).flatten(0, 1)
    with torch.no_grad(), block.model.trace(tokens[:1, :1], use_cache=False, logits_to_keep=no_logits(block.plan)):
        parts = save([])
        unembed = unembedding(block)
        for rows, goal in zip(whole.split(unembed.at_once), goals.split(unembed.at_once), strict=True):
            parts.append(_of_clean_run(capped(unembed.logits(rows), block.plan), goal))
    return {"normed": normed} | {name: x.view(tokens.shape) for name, x in joined(parts, block).items()}


def ablated_outcomes(block, batch, final, ablated_scale, kept, state):
    """Of a pass: what changed for the tokens that are `kept` [row, position], NaN (or -1) for the others.

    Args:
        final: the residual stream at the end of the pass, [row, position, d_model].
        ablated_scale: the final norm's scale in it, [row, position].
        kept: bool; it may have fewer positions.
        state: of the clean run, with what `clean_outcomes` gives.

    Returns {name: [row, position]}.
    """
    row, position = kept.nonzero(as_tuple=True)
    token = batch.prompts.to(row.device)[row] * block.arrays["tokens"].shape[1] + position
    scale = state["norm_scale"].flatten()[token]
    change = widen(block.home(final)[row, position]) - widen(final_stream(block)).flatten(0, 1)[token]
    changes = (normed_by(block, x, scale) for x in (change, own_changes(block, batch, kept)))
    taken, order = (token, scale / ablated_scale[kept], *changes), token.argsort(stable=True)
    found = joined(_compared(block, state, [x[order] for x in taken]), block)
    return {name: _placed(x[order.argsort()], kept) for name, x in found.items()}


def _compared(block, state, taken):
    """The changes of the distributions of some tokens, in parts.

    `taken` are the places of the tokens among all, ascending, S/S', g(x' - x) and g(w), a row for each token.
    """
    beta, normed, goals = block.probed["norm_bias_final"], state["normed"].flatten(0, 1), _goals(block).flatten()
    first = block.arrays["tokens"][:1, :1]
    with torch.no_grad(), block.model.trace(first, use_cache=False, logits_to_keep=no_logits(block.plan)):
        parts = save([])
        unembed = unembedding(block)
        constant = unembed.logits(beta[None])
        for token, stretch, change, own in zip(*(x.split(unembed.at_once) for x in taken), strict=True):
            distinct, which = token.unique(return_inverse=True)
            clean = unembed.logits(normed[distinct] + beta)[which.to(constant.device)]
            frozen, ratio = unembed.change(change), stretch.to(constant.device)[:, None]
            live = (ratio - 1) * (clean - constant) + ratio * frozen
            parts.append(_changes(block.plan, clean, goals[token], live, frozen, unembed.change(own)))
    return parts


def _of_clean_run(logits, goals):
    """What is told of a distribution: [token] each."""
    total, target = logits.logsumexp(-1), _at(logits, goals)
    return {
        "logprob": target - total,
        "logsumexp": total,
        "entropy": torch.special.entr(logits.softmax(-1)).sum(-1),
        "target_rank": (logits > target[:, None]).sum(-1),
    }


def _changes(plan, clean, goals, live, frozen, own):
    """What is told of a change of logits, [token] each; of a live norm, of a frozen one, and of the own write alone."""
    before = capped(clean, plan)
    logprobs, probabilities = before.log_softmax(-1), before.softmax(-1)
    live, frozen, own = (_behind_cap(clean, before, x, plan) for x in (live, frozen, own))
    totals = [(logprobs + x).logsumexp(-1) for x in (live, frozen, own)]
    moved = [_at(x, goals) - total for x, total in zip((live, frozen, own), totals, strict=True)]
    after = logprobs + live - totals[0][:, None]
    entropies = (torch.special.entr(p).sum(-1) for p in (after.exp(), probabilities))
    return {
        "logprob_change": moved[0],
        "self_repair_logprob": moved[0] - moved[2],
        "norm_logprob": moved[0] - moved[1],
        "logsumexp_change": totals[0],
        "frozen_norm_logsumexp_change": totals[1],
        "entropy_change": torch.sub(*entropies),
        "kl": (probabilities * (totals[0][:, None] - live)).sum(-1).clamp_min(0),
        "ablated_target_rank": (after > _at(after, goals)[:, None]).sum(-1),
    }


def _behind_cap(clean, before, change, plan):
    """A change of the logits as the model returns them; `before` are those, `clean` what is capped to them."""
    return change if plan["model"]["logit_cap"] is None else capped(clean + change, plan) - before


def _goals(block):
    """The next token of each [prompt, position]; some token where none follows."""
    tokens = block.home(block.arrays["tokens"])
    return torch.cat([tokens[:, 1:], tokens[:, -1:]], 1)


def _at(x, goals):
    """The entries of x [token, vocabulary] at the targets: [token]."""
    return x.gather(-1, goals.to(x.device)[:, None])[:, 0]


def _placed(x, kept):
    """Values of the kept tokens at their places, NaN (or -1) at the others: [row, position]."""
    out = x.new_full(kept.shape, float("nan") if x.is_floating_point() else -1)
    out[kept] = x
    return out


class Outcomes:
    """Both, as an object of the plan: their code goes only with a request that asks for them."""

    clean = staticmethod(clean_outcomes)
    ablated = staticmethod(ablated_outcomes)
