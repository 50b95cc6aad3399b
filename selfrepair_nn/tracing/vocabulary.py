"""Products with the vocabulary, for a few tokens at a time: nothing of its size is kept."""

import torch

from selfrepair_nn.tracing.objects import Bundle
from selfrepair_nn.tracing.places import place
from selfrepair_nn.tracing.probes import UNEMBEDDING_ELEMENTS
from selfrepair_nn.tracing.readouts import centre, widen

ARRAYS = 4
"""How many times fewer tokens come at once than one array of the vocabulary's size would allow."""


class Unembedding(Bundle):
    """The model's unembedding, as a function of what leaves the final norm; `nothing` is what it gives for zeros."""

    module: object
    plan: dict
    dtype: torch.dtype
    nothing: torch.Tensor

    def logits(self, x):
        """Logits before a soft cap, [token, d_model] to [token, vocabulary]."""
        return self.plan["model"]["logit_scale"] * widen(self.module(x.to(self.dtype)))

    def change(self, x):
        """What a change of its input changes, every token's to the same relative precision."""
        size = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(self.dtype).tiny)
        out = self.logits(x / size) - self.plan["model"]["logit_scale"] * self.nothing
        return size.to(out.device) * out

    @property
    def at_once(self):
        """How many tokens."""
        most = UNEMBEDDING_ELEMENTS.get(self.nothing.device.type, UNEMBEDDING_ELEMENTS["cpu"])
        return max(1, most // (ARRAYS * self.nothing.shape[-1]))


def unembedding(block):
    """Only within a trace."""
    module, final = place(block.model, block.plan, "unembedding"), final_stream(block)
    return Unembedding(module, block.plan, final.dtype, widen(module(final.new_zeros(1, final.shape[-1]))))


def final_stream(block):
    """The clean residual stream before the final norm: [prompt, position, d_model]."""
    return block.home(block.clean["input"][block.plan["model"]["n_layers"]])


def normed_by(block, x, scale):
    """g(x): what the final norm makes of x [..., d_model] under this scale [...], less its bias."""
    return block.probed["norm_gain_final"] * centre(widen(x), block.plan) / scale[..., None]


def own_changes(block, batch, kept):
    """What the ablated sites' own writes change, of the kept tokens: [token, d_model]."""
    return of_sites(lambda site, edit: site.own_change(edit, block), block, batch, kept)


def of_sites(found, block, batch, kept):
    """`found(site, edit)`, [prompt, position, d_model], of each case's sites together, of the kept tokens."""
    rows_of = []
    for rows, case, prompts in batch.each():
        own = sum(block.home(found(site, edit)) for site, edit in case.edits.items())
        rows_of.append(widen(batch.of(own, prompts))[:, : kept.shape[1]][kept[rows]])
    return torch.cat(rows_of)


def joined(parts, block):
    """The results of several pieces as one: {name: [token, …]}."""
    return {name: block.home(torch.cat([part[name] for part in parts])) for name in parts[0]}
