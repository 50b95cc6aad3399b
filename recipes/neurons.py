"""Which neurons of the last MLP repair late heads, how few, how regularly (paper: Figures 7, 8, 12-15)."""

import selfrepair_nn as sr

FIGURES = ("erasure_neurons", "neuron_sparsity", "neuron_changes", "neuron_consistency")
PARAMETERS = {"count": 4}


def graph(structure, options):
    """Of the heads before the last MLP, those of largest mean direct effect are ablated; --heads names others."""
    last = structure.n_layers - 1
    late = f"{structure.n_layers // 2}:{last if structure.parallel else structure.n_layers}"
    layers = options.layers if options.layers or options.heads else late
    heads = sr.select_heads(layers, options.heads, structure.n_layers, structure.n_heads, structure.headless)
    return sr.Graph(
        ablate=sr.sweep(heads),
        strongest=None if options.heads else options.param["count"],
        replacement=options.ablation,
        neurons=last,
        also=("falling_neuron", "shuffled_target", *options.also),
        target=options.target,
        value_bias=options.value_bias,
    ).frozen(options.freeze, structure.n_layers, structure.n_heads)
