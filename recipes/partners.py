"""How much of a token's self-repair is its partner's: the same ablation with several partners of each prompt."""

import selfrepair_nn as sr

FIGURES = ("variance_components", "direct_effect_vs_logit_change", "token_noise")
DEFAULTS = {"resamples": 4, "tokens": 4096}


def graph(structure, options):
    """Each head of the last third of the layers, unless layers or heads are chosen, is one ablated run."""
    heads = sr.late_heads(structure, options)
    return sr.Graph(
        ablate=sr.sweep(heads),
        replacement=options.ablation,
        record=options.record,
        target=options.target,
        value_bias=options.value_bias,
        also=options.also,
    ).frozen(options.freeze, structure.n_layers, structure.n_heads)
