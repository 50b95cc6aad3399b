"""Which tokens sites promote in the mean over tokens, and single neurons by what one unit of activation writes."""

import torch
from nnsight import save

from selfrepair_nn.tracing.clean import no_logits
from selfrepair_nn.tracing.jobs import block_of
from selfrepair_nn.tracing.lens import Words, centred, write_of
from selfrepair_nn.tracing.readouts import norm_scale
from selfrepair_nn.tracing.replacements import Identity
from selfrepair_nn.tracing.vocabulary import final_stream, normed_by, unembedding


def words_job(model, arrays, plan, tick=None, known=None):
    """Words of each case of the plan: {promoted, promoted_effect, demoted, demoted_effect: [case, word]}.

    Of the mean over the tokens [prompt, position] of what its sites write under the clean norm; with plan["unit"], of
    what a neuron of activation 1 writes, the norm's scale left out.
    """
    same = plan | {"replacement": Identity(), "record": "sums", "neurons": None, "attention": None, "words": None}
    block, ends = block_of(model, same, arrays, plan["cases"], known), Words(plan["words"].count, 0)
    scale = norm_scale(final_stream(block), plan)
    vectors = torch.stack([_vector(case, block, scale, plan["unit"]) for case in plan["cases"]])
    with torch.no_grad(), model.trace(arrays["tokens"][:1, :1], use_cache=False, logits_to_keep=no_logits(plan)):
        parts = save([])
        unembed = unembedding(block)
        for x in vectors.split(unembed.at_once):
            parts.append(ends.ends(centred(unembed.change(x)), "promoted", "demoted"))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _vector(case, block, scale, unit):
    """What leaves the final norm of a case's write, in the mean: [d_model]."""
    if unit:
        written = sum(block.home(block.probed["down_projection"][site.layer][site.neuron]) for site in case)
        return normed_by(block, written, torch.ones_like(scale[0, 0]))
    written = sum(block.home(write_of(site, block)) for site in case)
    return normed_by(block, written, scale).mean((0, 1))
