"""Who moves the name, and who backs up: indirect object identification (paper: section 5.3.1)."""

import selfrepair_nn as sr

FIGURES = ("ioi",)
PARAMETERS = {"count": 64, "movers": 3, "found_on": "all"}


def prompts(structure, tokenizer, options):
    """When Mary and John went to the city, John gave a book to ... Mary, not John: the target is the difference."""
    return sr.ioi_prompts(tokenizer, options.param["count"], options.seed, options.bos)


def graph(structure, options):
    """The heads of largest direct effect on the difference are the name movers: each is ablated alone, then all.

    `--param found_on=half` finds them, and their backups, on half of the prompts, and reports the others.
    Then later heads read what the first of them reads, as all layers between are deleted.
    """
    heads = sr.chosen_heads(structure, options)

    def then(movers):
        first = movers[0].layer
        later = range(first + 1, structure.n_layers)
        return [tuple(movers), *((sr.Layers(first, layer),) for layer in later)]

    return sr.Graph(
        ablate=sr.sweep(heads),
        strongest=options.param["movers"],
        found_on=options.param["found_on"],
        then=then,
        replacement=options.ablation,
        record="full",
        value_bias=options.value_bias,
        also=options.also,
        words=options.words,
    )
