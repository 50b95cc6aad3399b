"""What is left of self-repair, and of the norm's, in log-probability: beside logits, on each head's top tokens."""

import selfrepair_nn as sr

FIGURES = ("outcomes",)
DEFAULTS = {"logprob": "top"}


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
