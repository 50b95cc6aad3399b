"""Ablation by a minimally different text, one token exchanged for another, beside plain resample ablation."""

import selfrepair_nn as sr

FIGURES = ("contrast",)
DEFAULTS = {"tokens": 1024}
PARAMETERS = {"old": ",", "new": ";"}


def prompts(structure, tokenizer, options):
    """The texts that have the token `old`, each with a counterfactual that has `new` in its place."""
    texts = sr.text_prompts(structure, tokenizer, options)
    return sr.edited_prompts(texts, tokenizer, options.param["old"], options.param["new"])


def graph(structure, options):
    """Each head of the last third of the layers, unless layers or heads are chosen, is ablated in both ways."""
    heads = sr.late_heads(structure, options)
    return sr.Variants(
        "ablation",
        {
            kind: sr.Graph(
                ablate=sr.sweep(heads),
                replacement=kind,
                target=options.target,
                value_bias=options.value_bias,
                also=options.also,
                words=options.words,
            ).frozen(options.freeze, structure.n_layers, structure.n_heads)
            for kind in ("resample", "counterfactual")
        },
    )
