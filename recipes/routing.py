"""How much of self-repair is re-routing: a mixture's experts chosen anew, and chosen as in the clean run."""

import selfrepair_nn as sr

FIGURES = ("routing",)


def graph(structure, options):
    """Each head of the last third of the layers, unless others are chosen, with live and with clean routing."""
    if not structure.routed:
        raise sr.UsageError(
            "routing needs a mixture of experts, and this model has none: choose another model"
        )
    heads = sr.late_heads(structure, options)
    plain = sr.Graph(
        ablate=sr.sweep(heads),
        replacement=options.ablation,
        record=options.record,
        also=("routing", *options.also),
        target=options.target,
        value_bias=options.value_bias,
    )
    clean = plain.freezing(sr.Routing(layer) for layer in structure.routed)
    return sr.Variants("frozen", {"nothing": plain, "routing": clean})
