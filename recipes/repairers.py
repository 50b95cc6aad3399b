"""Who repairs whom: what every component does when a head is ablated, on the head's top share of tokens."""

import selfrepair_nn as sr

FIGURES = ("repair_map", "repair_graph")
DEFAULTS = {"components": "top"}


def graph(structure, options):
    """Each selected head is one ablated run that keeps every component's change."""
    heads = sr.chosen_heads(structure, options)
    return sr.Graph(
        ablate=sr.sweep(heads),
        replacement=options.ablation,
        record="full",
        target=options.target,
        value_bias=options.value_bias,
        also=options.also,
        words=options.words,
    ).frozen(options.freeze, structure.n_layers, structure.n_heads)
