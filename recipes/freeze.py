"""Self-repair with nothing, all but the final norm, and everything frozen downstream (paper: section 3)."""

import selfrepair_nn as sr

FIGURES = ("freeze",)


def graph(structure, options):
    """Each head of the last third of the layers, unless layers or heads are chosen, is ablated three times."""
    heads = sr.late_heads(structure, options)
    plain = sr.Graph(
        ablate=sr.sweep(heads),
        replacement=options.ablation,
        target=options.target,
        value_bias=options.value_bias,
        also=options.also,
        words=options.words,
    )
    sizes = structure.n_layers, structure.n_heads
    return sr.Variants(
        "frozen",
        {
            "nothing": plain,
            "all but the final norm": plain.frozen("downstream", *sizes),
            "everything": plain.frozen("all", *sizes),
        },
    )
