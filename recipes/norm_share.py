"""What the final norm repairs of every head, and by which part (paper: Figures 6, 10, 11, Appendix B)."""

import selfrepair_nn as sr

FIGURES = ("norm_share",)


def graph(structure, options):
    """Each selected head is one ablated run."""
    heads = sr.chosen_heads(structure, options)
    return sr.Graph(
        ablate=sr.sweep(heads),
        replacement=options.ablation,
        record=options.record,
        target=options.target,
        value_bias=options.value_bias,
        also=("shuffled_target", *options.also),
        words=options.words,
    ).frozen(options.freeze, structure.n_layers, structure.n_heads)
