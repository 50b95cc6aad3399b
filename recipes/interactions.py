"""Are heads redundant or synergetic: each alone, every pair, all but one of them, and all, ablated together."""

from itertools import combinations

import selfrepair_nn as sr

FIGURES = ("interactions", "clamping")
PARAMETERS = {"count": 4, "found_on": "half"}


def graph(structure, options):
    """The `count` heads of largest direct effect, found on half of the documents, or those of `--heads`."""
    heads = sr.chosen_heads(structure, options)
    count = len(heads) if options.heads else min(options.param["count"], len(heads))
    if count < 2:
        raise sr.UsageError(f"{count} head has nobody to interact with: choose two or more")
    singles = sr.sweep(heads)
    return sr.Graph(
        ablate=singles + tuple(together(heads)) if options.heads else singles,
        strongest=None if options.heads else count,
        found_on="all" if options.heads else options.param["found_on"],
        then=None if options.heads else together,
        replacement=options.ablation,
        record="full",
        target=options.target,
        value_bias=options.value_bias,
        also=options.also,
    ).frozen(options.freeze, structure.n_layers, structure.n_heads)


def together(heads):
    """Every pair, all but each, and all."""
    rest = [tuple(other for other in heads if other != one) for one in heads]
    cases = [*combinations(heads, 2), *rest, tuple(heads)]
    return dict.fromkeys(case for case in cases if len(case) > 1)
