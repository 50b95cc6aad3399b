"""Who takes over when a set of heads is gone: each further head ablated alone, and beside the set."""

import selfrepair_nn as sr

FIGURES = ("backups",)
PARAMETERS = {"count": 192, "movers": 3, "found_on": "half", "set": ()}


def prompts(structure, tokenizer, options):
    """Indirect object identification, unless --prompts names a text."""
    if not (isinstance(options.prompts, str) and options.prompts == "sample"):
        return None
    return sr.ioi_prompts(tokenizer, options.param["count"], options.seed, options.bos)


def graph(structure, options):
    """The set are the `movers` heads of largest direct effect, found on half of the prompts, or those named.

    They are named by `--param set=L9H9,L9H6`. Further heads are all others that --layers and --heads leave.
    """
    heads = sr.chosen_heads(structure, options)
    given = ",".join(map(str, options.param["set"]))
    named = (
        sr.select_heads(None, given, structure.n_layers, structure.n_heads, structure.headless)
        if given
        else ()
    )
    every = tuple(dict.fromkeys([*named, *heads]))
    if len(every) <= (len(named) or options.param["movers"]):
        raise sr.UsageError("the set is all there is: leave further heads to take over")

    def beside(movers):
        """The set, and with each further head, which is ablated alone too."""
        further = [head for head in every if head not in movers]
        both = [(*movers, head) for head in further]
        return [*([tuple(movers)] if len(movers) > 1 else []), *sr.sweep(further), *both]

    return sr.Graph(
        ablate=sr.sweep(named) + tuple(beside(named)) if named else sr.sweep(every),
        strongest=None if named else options.param["movers"],
        found_on="all" if named else options.param["found_on"],
        then=None if named else beside,
        replacement=options.ablation,
        target=options.target,
        value_bias=options.value_bias,
        also=options.also,
    ).frozen(options.freeze, structure.n_layers, structure.n_heads)
