"""Every attention layer and every MLP ablated whole: the Hydra effect, who compensates, and in which stage."""

import selfrepair_nn as sr

FIGURES = ("hydra", "stages")
DEFAULTS = {"components": "top"}


def graph(structure, options):
    """Each sublayer of the chosen layers is one ablated run that keeps every component's change."""
    layers = sr.layer_numbers(options.layers, structure.n_layers)
    attention = [sr.Attention(layer) for layer in layers if layer not in structure.headless]
    return sr.Graph(
        ablate=sr.sweep([*attention, *(sr.Mlp(layer) for layer in layers)]),
        replacement=options.ablation,
        record="full",
        target=options.target,
        value_bias=options.value_bias,
        also=options.also,
    ).frozen(options.freeze, structure.n_layers, structure.n_heads)
