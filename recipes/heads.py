"""Self-repair of every head: each ablated by itself, over all tokens (paper: Figures 1, 2, 20-22)."""

import selfrepair_nn as sr

FIGURES = ("self_repair_by_layer", "direct_effect_vs_logit_change")


def graph(structure, options):
    """Each selected head is one ablated run."""
    heads = sr.chosen_heads(structure, options)
    return sr.Graph(
        ablate=sr.sweep(heads),
        replacement=options.ablation,
        record=options.record,
        target=options.target,
        value_bias=options.value_bias,
        also=options.also,
        words=options.words,
    ).frozen(options.freeze, structure.n_layers, structure.n_heads)
