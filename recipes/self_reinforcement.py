"""Heads that answer to their own write, added to what they read (paper: Figures 9, 19)."""

import selfrepair_nn as sr

FIGURES = ("self_reinforcement", "reinforced_heads")
PARAMETERS = {"scales": (1, 3, 5)}


def graph(structure, options):
    """Each head of the last third of the layers, unless layers or heads are chosen, is reinforced at each scale."""
    heads = sr.late_heads(structure, options)
    return sr.Variants(
        "scale",
        {
            scale: sr.Graph(
                ablate=sr.sweep(heads),
                replacement=sr.Reinforce(scale),
                target=options.target,
                value_bias=options.value_bias,
            )
            for scale in options.param["scales"]
        },
    )
