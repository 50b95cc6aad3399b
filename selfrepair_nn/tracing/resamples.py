"""The same ablations with one partner of each prompt after the other: what is clean is computed and probed once."""

import torch

from selfrepair_nn.tracing.cases import sources
from selfrepair_nn.tracing.jobs import ablated, block_of


def resamples_job(model, arrays, plan, tick=None, known=None):
    """As `ablation_job`, with "partner_tokens" [resample, prompt, position].

    What `plan["varied"]` names comes with the resamples along a last dimension; all else is the same for each.
    """
    first, *others = arrays["partner_tokens"]
    block = block_of(model, plan, arrays | {"partner_tokens": first}, plan["cases"], known)
    found = [ablated(block, tick)]
    for tokens in others:
        block.arrays["partner_tokens"] = tokens
        block.source = sources(model, plan, block.arrays, block.clean, plan["cases"])
        found.append(ablated(block, tick))
    return found[0] | {name: torch.stack([each[name] for each in found], -1) for name in plan["varied"]}
