"""Blocks of layers deleted, in every other order, and side by side: additive against sequential composition."""

from itertools import permutations

import selfrepair_nn as sr

FIGURES = ("layer_order",)
PARAMETERS = {"block": 3, "step": 1}


def graph(structure, options):
    """Every `step`th block of so many neighbouring layers: deleted, side by side, and in other orders.

    These are all orders of two or three layers; of more the reversed one, and those that move one end to the other.
    """
    size, step = options.param["block"], options.param["step"]
    if not 2 <= size <= structure.n_layers or step < 1:
        raise sr.UsageError(
            f"block={size}, step={step}: give 2 to {structure.n_layers} layers, and a step of 1 or more"
        )
    sites = []
    for first in range(0, structure.n_layers - size + 1, step):
        block = tuple(range(first, first + size))
        sites += [sr.Layers(first, first + size), sr.Parallel(first, first + size)]
        sites += [sr.Permuted(order) for order in orders(block)]
    return sr.Graph(
        ablate=sr.sweep(sites),
        replacement="zero",
        target=options.target,
        value_bias=options.value_bias,
        also=(*options.also, "stream_distance"),
    )


def orders(block):
    """Other orders of a block of layers."""
    some = {block[::-1], (*block[1:], block[0]), (block[-1], *block[:-1])}
    return sorted({*permutations(block)} - {block} if len(block) <= 3 else some)
