"""What each later norm does to a head's self-repair: frozen one after the other (paper: section 5.2)."""

import selfrepair_nn as sr

FIGURES = ("freeze_norms",)
PARAMETERS = {"count": 4}


def graph(structure, options):
    """Of the last third of the layers the strongest heads, or those chosen, with each later norm frozen."""
    chosen = options.layers or options.heads
    heads = sr.late_heads(structure, options)
    plain = sr.Graph(
        ablate=sr.sweep(heads),
        strongest=None if chosen else options.param["count"],
        replacement=options.ablation,
        target=options.target,
        value_bias=options.value_bias,
        also=options.also,
        words=options.words,
    )
    first = min(head.layer for head in heads)
    norms = [
        sr.Norm(layer, before)
        for layer in range(first, structure.n_layers)
        for before in structure.norms
        if layer > first or (before == "mlp" and not structure.parallel)
    ]
    norms += [sr.PostNorms()] if structure.post_norms else []
    norms.append(sr.FinalNorm())
    graphs = {"none": plain} | {norm.label: plain.freezing((norm,)) for norm in norms}
    return sr.Variants("norm", graphs | {"all": plain.freezing(norms)})
