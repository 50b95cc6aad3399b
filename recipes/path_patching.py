"""Which later part repairs a head by the direct path, each alone: path patching (paper: section 5.2)."""

import selfrepair_nn as sr

FIGURES = ("path_patching",)
PARAMETERS = {"count": 4, "receivers": ()}


def graph(structure, options):
    """Senders: the strongest heads of the last third, or those chosen. Receivers: all later parts, or those named.

    A receiver reads the sender's change; all else, the other receivers too, keeps its clean value.
    """
    chosen = options.layers or options.heads
    senders = sr.late_heads(structure, options)
    plain = sr.Graph(
        ablate=sr.sweep(senders),
        strongest=None if chosen else options.param["count"],
        replacement=options.ablation,
        target=options.target,
        value_bias=options.value_bias,
        also=options.also,
        words=options.words,
    )
    first = min(head.layer for head in senders)
    later = range(first + structure.parallel, structure.n_layers)
    parts = [
        site
        for layer in later
        for site in (sr.Attention(layer), sr.Mlp(layer))
        if site != sr.Attention(first)
    ]
    receivers = [sr.site(label) for label in options.param["receivers"]] or parts
    graphs = {"none": plain.path((), structure.n_layers, structure.n_heads)}
    for site in receivers:
        graphs[site.label] = plain.path((site,), structure.n_layers, structure.n_heads)
    return sr.Variants("receiver", graphs | {"all": plain})
