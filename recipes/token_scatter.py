"""Self-repair token by token: direct effect and logit change of single late heads (paper: Figure 3)."""

import selfrepair_nn as sr
from selfrepair_nn.errors import UsageError

FIGURES = ("token_noise",)


def graph(structure, options):
    """Each head of the last third of the layers is one ablated run, unless layers or heads are chosen."""
    if options.selects == "top-share":
        raise UsageError("token_scatter shows every token of a head, not the top share: choose --select all")
    heads = sr.late_heads(structure, options)
    return sr.Graph(
        ablate=sr.sweep(heads),
        replacement=options.ablation,
        record=options.record,
        target=options.target,
        value_bias=options.value_bias,
        also=options.also,
        words=options.words,
    ).frozen(options.freeze, structure.n_layers, structure.n_heads)
