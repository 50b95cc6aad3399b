"""Previous-token and induction heads on repeated random tokens: are they repaired? (paper: section 5.3.1)."""

import selfrepair_nn as sr

FIGURES = ("induction",)
PARAMETERS = {"count": 8, "period": 24}


def prompts(structure, tokenizer, options):
    """Random tokens, and the same again."""
    count, period = options.param["count"], options.param["period"]
    return sr.repeated_prompts(tokenizer, structure.vocab_size, count, period, options.seed, options.bos)


def graph(structure, options):
    """Each selected head is one ablated run; recorded is what it attends to: the last token, and the one to copy."""
    heads = sr.chosen_heads(structure, options)
    return sr.Graph(
        ablate=sr.sweep(heads),
        replacement=options.ablation,
        target=options.target,
        value_bias=options.value_bias,
        also=options.also,
        words=options.words,
        attention=(1, options.param["period"] - 1),
    ).frozen(options.freeze, structure.n_layers, structure.n_heads)
