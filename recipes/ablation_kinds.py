"""The same heads under resample, mean and zero ablation: norms and logits (paper: Figures 4, 5, 16-18)."""

import selfrepair_nn as sr

FIGURES = ("norm_scale", "residual_norm", "ablation_kinds")


def graph(structure, options):
    """Each head of the last third of the layers, unless layers or heads are chosen, is ablated in three ways."""
    heads = sr.late_heads(structure, options)
    return sr.Variants(
        "ablation",
        {
            kind: sr.Graph(
                ablate=sr.sweep(heads),
                replacement=kind,
                residual_norm=True,
                target=options.target,
                value_bias=options.value_bias,
                also=options.also,
                words=options.words,
            ).frozen(options.freeze, structure.n_layers, structure.n_heads)
            for kind in ("resample", "mean", "zero")
        },
    )
