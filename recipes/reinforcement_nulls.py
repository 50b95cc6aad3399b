"""Heads that answer to their own write, beside nulls: reversed, of another prompt, at random (section 5.3)."""

import selfrepair_nn as sr

FIGURES = ("reinforcement_nulls",)
PARAMETERS = {"scale": 5}


def graph(structure, options):
    """Each head of the last third of the layers, unless layers or heads are chosen, reads each write at one scale."""
    scale = options.param["scale"]
    writes = {
        "own": sr.Reinforce(scale),
        "reversed": sr.Reinforce(-scale),
        "partner": sr.ReinforcePartner(scale),
        "random": sr.ReinforceRandom(scale),
    }
    heads = sr.late_heads(structure, options)
    return sr.Variants(
        "write",
        {
            label: sr.Graph(
                ablate=sr.sweep(heads),
                replacement=write,
                target=options.target,
                value_bias=options.value_bias,
            )
            for label, write in writes.items()
        },
    )
