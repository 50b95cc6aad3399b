"""Whole layers deleted, and neighbours swapped: what is lost and what is made up for, by depth."""

import selfrepair_nn as sr

FIGURES = ("layer_position",)


def graph(structure, options):
    """Each layer is deleted, each pair of neighbours swapped."""
    layers = range(structure.n_layers)
    deleted = [sr.Layers(layer, layer + 1) for layer in layers]
    swapped = [sr.Swap(layer) for layer in layers[:-1]]
    return sr.Graph(
        ablate=sr.sweep(deleted + swapped),
        replacement="zero",
        target=options.target,
        value_bias=options.value_bias,
        also=options.also,
        words=options.words,
    )
