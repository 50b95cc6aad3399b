"""Attention's own repair: heads without their edge to the most attended token, the softmax frozen and live."""

import selfrepair_nn as sr

FIGURES = ("attention_edges",)
DEFAULTS = {"tokens": 8192}
PARAMETERS = {"edges": "most", "count": 1}
EDGES = {
    "most": lambda count: {"most": count},
    "previous": lambda count: {"back": tuple(range(1, count + 1))},
    "first": lambda count: {"keys": tuple(range(count))},
}
"""By what `--param edges=` asks for: the so many most attended tokens, those before, or the first of the text."""


def graph(structure, options):
    """Each selected head, ablated twice: what the edges carried is gone, or paid to other tokens."""
    edges, count = options.param["edges"], options.param["count"]
    if edges not in EDGES or count < 1:
        known = ", ".join(EDGES)
        raise sr.UsageError(f"edges {edges!r}, count {count}: choose edges of {known}, and 1 or more of them")
    heads = sr.chosen_heads(structure, options)
    return sr.Variants(
        "softmax",
        {
            softmax: sr.Graph(
                ablate=sr.sweep(heads),
                replacement=sr.KnockOut(softmax, **EDGES[edges](count)),
                record=options.record,
                also=("edge_attention", *options.also),
                target=options.target,
                value_bias=options.value_bias,
            ).frozen(options.freeze, structure.n_layers, structure.n_heads)
            for softmax in ("frozen", "live")
        },
    )
