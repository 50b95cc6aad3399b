"""What heads and what repairs them promote and demote, in words; copying and its suppression, against a null."""

import selfrepair_nn as sr

FIGURES = ("words",)
DEFAULTS = {"words": 5}


def graph(structure, options):
    """Each selected head is one ablated run that keeps words of its top tokens."""
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
