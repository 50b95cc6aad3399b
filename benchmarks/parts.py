"""Where a Llama or a GPT-NeoX keeps what the baselines run and read; written without the package under test."""

from contextlib import contextmanager
from functools import cached_property

import torch
from torch import nn


class Parts:
    """The modules of one model, and the few formulas that need its weights."""

    def __init__(self, module: nn.Module) -> None:
        llama = module.config.model_type == "llama"
        base = module.model if llama else module.gpt_neox
        self.module, self.layers = module, base.layers
        self.embedding = base.embed_tokens if llama else base.embed_in
        self.rotary = base.rotary_emb
        self.attentions = [layer.self_attn if llama else layer.attention for layer in base.layers]
        self.projections = [a.o_proj if llama else a.dense for a in self.attentions]
        self.final_norm = base.norm if llama else base.final_layer_norm
        self.parallel = not llama and module.config.use_parallel_residual
        self.d_head = self.projections[0].in_features // module.config.num_attention_heads

    def head(self, z, head):
        """One head's slice of the input of an output projection, as a view."""
        return z[..., head * self.d_head : (head + 1) * self.d_head]

    def head_projection(self, layer, head):
        """W_O of one head: [d_head, d_model]."""
        return self.head(self.projections[layer].weight, head).T

    def centre(self, x):
        return x - x.mean(-1, keepdim=True) if isinstance(self.final_norm, nn.LayerNorm) else x

    def scale(self, residual):
        """The final norm's S: [..., d_model] -> [...]."""
        epsilon = getattr(self.final_norm, "variance_epsilon", None) or self.final_norm.eps
        return (self.centre(residual).square().mean(-1) + epsilon).sqrt()

    @cached_property
    def mean_row(self):
        return self.module.get_output_embeddings().weight.mean(0)

    def directions(self, targets):
        """d_t of (target minus mean row), and the same for the mean row: [..., d_model], [d_model]."""
        rows = self.module.get_output_embeddings().weight[targets] - self.mean_row
        gamma = self.final_norm.weight
        return self.centre(rows * gamma), self.centre(self.mean_row * gamma)

    def attend(self, layer, x, rotary):
        """One attention's output on the residual stream x."""
        normed = self.layers[layer].input_layernorm(x)
        return self.attentions[layer](normed, position_embeddings=rotary, attention_mask=None)[0]

    def mlp(self, layer, x):
        """One MLP's output on the residual stream x."""
        return self.layers[layer].mlp(self.layers[layer].post_attention_layernorm(x))

    def rotary_of(self, tokens):
        """Rotary position embeddings for rows as long as those of `tokens`."""
        positions = torch.arange(tokens.shape[1])[None]
        return self.rotary(self.embedding(tokens[:1]), position_ids=positions)


@contextmanager
def hooks(*handles):
    """Remove the hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
