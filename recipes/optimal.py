"""Optimal ablation: what is lost by the constant that loses least, beside zero, mean and resample ablation."""

import selfrepair_nn as sr

FIGURES = ("optimal",)
DEFAULTS = {"logprob": "all", "tokens": 5376}
PARAMETERS = {"steps": 12, "constants": ""}


def graph(structure, options):
    """Each head of the last third of the layers, unless layers or heads are chosen, is ablated in four ways.

    The constants are learned on half of the run's documents; with `--param constants=FILE` they are those of a file
    that `sr.Constants.save` wrote, learned elsewhere.
    """
    heads, file = sr.late_heads(structure, options), options.param["constants"]
    optimal = sr.Constants.load(file).of(heads) if file else sr.Optimal(options.param["steps"])
    return sr.Variants(
        "ablation",
        {
            label: sr.Graph(
                ablate=sr.sweep(heads),
                replacement=by,
                record=options.record,
                target=options.target,
                value_bias=options.value_bias,
                also=options.also,
            ).frozen(options.freeze, structure.n_layers, structure.n_heads)
            for label, by in {"zero": "zero", "mean": "mean", "resample": "resample", "optimal": optimal}.items()
        },
    )
