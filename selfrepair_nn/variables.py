"""Every variable and coordinate a store can hold: name, dimensions, units and one sentence, each written once, here."""

from dataclasses import dataclass, replace

import numpy as np

TOKEN = ("prompt", "position")
SWEEP = ("layer", "head", "prompt", "position")
SHARE = 0.02
"""The paper's top share."""


@dataclass(frozen=True)
class Variable:
    """One stored array: `kind` is "float" (the store's dtype), "int", "bool" or "string".

    In a store whose runs ablate more than one head at once, or something else, `case` stands for `layer` and `head`;
    in one with several variants, what is `ablated` has their axis as its first dimension.
    """

    name: str
    dims: tuple[str, ...]
    units: str
    long_name: str
    description: str
    kind: str = "float"
    ablated: bool = False

    @property
    def attributes(self) -> dict[str, str]:
        return {"units": self.units, "long_name": self.long_name, "description": self.description}

    def dtype(self, precision: str) -> np.dtype | type[str]:
        """The stored type, given the store's floating-point `precision` ("float32" or "float64")."""
        kinds = {
            "float": np.dtype(precision),
            "int": np.dtype("int64"),
            "bool": np.dtype("bool"),
            "string": str,
        }
        return kinds[self.kind]

    def dims_in(self, grid: bool, axis: str | None) -> tuple[str, ...]:
        """Its dimensions in a store with or without a grid of heads, and with an axis of variants or none."""
        dims = self.dims
        if not grid and dims[:2] == SWEEP[:2]:
            dims = ("case", *dims[2:])
        elif not grid and self.name == "noise_floor":
            dims = ("case",)
        return (axis, *dims) if axis and self.ablated else dims


# One row a variable: a table reads better than a column of arguments.
# fmt: off
_ALL = (
    # coordinates
    Variable("layer", ("layer",), "1", "layer", "Index of the decoder layer, from 0.", "int"),
    Variable("head", ("head",), "1", "head", "Index of the attention head within its layer, from 0.", "int"),
    Variable("prompt", ("prompt",), "1", "prompt", "Index of the prompt (one row of tokens).", "int"),
    Variable("position", ("position",), "1", "position", "Index of the token in its prompt, from 0; every position has a next token.", "int"),
    Variable("token", TOKEN, "1", "token id", "Token the model reads at this position.", "int"),
    Variable("target", TOKEN, "1", "target token id", "Next token of the text: the one whose logit is measured.", "int"),
    Variable("token_text", TOKEN, "1", "token", "The token at this position, as text.", "string"),
    Variable("target_text", TOKEN, "1", "target token", "The target token, as text.", "string"),
    Variable("counted", TOKEN, "1", "counted", "Whether this token is asked about: every statistic is over these tokens alone.", "bool"),
    Variable("document", ("prompt",), "1", "document", "Index of the document in which the prompt starts.", "int"),
    Variable("partner", ("prompt",), "1", "partner prompt", "Prompt whose activations replace this prompt's under resample ablation; -1 where none is used.", "int"),
    Variable("ablation", (), "1", "ablation", "What the ablated site's activations were replaced by.", "string"),
    Variable("case", ("case",), "1", "case", "What is ablated: sites joined by + are replaced together.", "string"),
    Variable("case_sites", ("case",), "1", "sites of the case", "Its sites as JSON: a list of kind and numbers for each, such as [[\"head\", 9, 6]].", "string"),
    Variable("case_layer", ("case",), "1", "layer of the case", "First layer that the case ablates.", "int"),
    Variable("other", TOKEN, "1", "other token id", "Token whose logit is subtracted from the target's.", "int"),
    Variable("other_text", TOKEN, "1", "other token", "That token, as text.", "string"),
    Variable("counterfactual", TOKEN, "1", "token id of the counterfactual text", "Token at this position of the minimally different text whose activations replace under counterfactual ablation.", "int"),
    Variable("counterfactual_text", TOKEN, "1", "token of the counterfactual", "That token, as text.", "string"),
    Variable("edited_position", ("prompt",), "1", "edited position", "Position at which the head's write is added again.", "int"),
    Variable("distance", ("distance",), "1", "distance", "How many tokens back the attention goes.", "int"),
    Variable("rank", ("rank",), "1", "rank", "Place among the token's most repairing neurons, from 0.", "int"),
    Variable("neuron", ("neuron",), "1", "neuron", "Index of the neuron in the recorded MLP.", "int"),
    Variable("component", ("component",), "1", "component", "Label of one term of the residual stream's sum.", "string"),
    Variable("component_kind", ("component",), "1", "kind of component", "embedding, position_embedding, head, attention_bias or mlp.", "string"),
    Variable("component_layer", ("component",), "1", "layer of the component", "Layer that writes the component; -1 for embeddings.", "int"),
    Variable("component_head", ("component",), "1", "head of the component", "Head that writes the component; -1 where it is not a head.", "int"),
    # bookkeeping
    Variable("selected", ("layer", "head"), "1", "selected", "Whether this head is part of the run.", "bool"),
    Variable("done", ("layer", "head", "prompt"), "1", "done", "Whether this head's values on this prompt are computed and stored.", "bool"),
    # the clean run
    Variable("logit", TOKEN, "logit", "target logit", "Logit of the target in the clean run, under the run's target convention."),
    Variable("mean_logit", TOKEN, "logit", "mean logit", "Mean over the vocabulary of the clean run's logits: raw logit = centred logit + mean logit."),
    Variable("target_constant", TOKEN, "logit", "constant of the target", "k = <beta, u_t> + b_U[t]: the part of the target's logit that no component writes."),
    Variable("norm_scale", TOKEN, "1", "final norm scale", "S: the number the final norm divides the residual stream by, in the clean run."),
    Variable("direct_effect", SWEEP, "logit", "direct effect", "DE of the head on the target logit in the clean run, under the clean norm scale."),
    # the ablated runs
    Variable("ablated_direct_effect", SWEEP, "logit", "ablated direct effect", "DE of the head after its own ablation, still under the clean norm scale."),
    Variable("logit_change", SWEEP, "logit", "logit change", "Ablated minus clean logit of the target, whole model."),
    Variable("mean_logit_change", SWEEP, "logit", "mean logit change", "Ablated minus clean mean over the vocabulary of the logits: raw change = centred change + mean change."),
    Variable("self_repair", SWEEP, "logit", "self-repair", "logit_change minus the change of the ablated head's own direct effect (Equation 1)."),
    Variable("from_heads", SWEEP, "logit", "self-repair from heads", "Summed change of direct effect of all other attention heads."),
    Variable("from_mlps", SWEEP, "logit", "self-repair from MLPs", "Summed change of direct effect of all MLPs."),
    Variable("from_norm", SWEEP, "logit", "self-repair from the final norm", "(S/S' - 1) R', with R' the summed ablated direct effects of all components."),
    Variable("norm_on_existing", SWEEP, "logit", "final norm on existing logits", "(S/S' - 1)(logit - k): the part of from_norm that rescales what was there (Appendix B)."),
    Variable("norm_on_change", SWEEP, "logit", "final norm on the change", "(S/S' - 1)(R' - R): the part of from_norm that rescales what changed (Appendix B)."),
    Variable("ablated_norm_scale", SWEEP, "1", "ablated final norm scale", "S': the final norm's scale in the ablated run."),
    Variable("closure", SWEEP, "logit", "closure", "self_repair - (from_heads + from_mlps + from_norm): zero up to rounding, measured not assumed."),
    Variable("noise_floor", ("layer",), "logit", "noise floor", "Root mean square of the logit change that rounding alone makes of an ablation in this layer (heads replaced by themselves, their pass shaken by one rounding step): smaller effects are rounding."),
    # where only the top share is ablated, or only as much as an answer needs
    Variable("threshold", SWEEP[:2], "logit", "threshold", "Least direct effect in the head's top share over all counted tokens of the run, of which direct_effect then holds every one."),
    Variable("estimate", SWEEP[:2], "logit", "estimated self-repair", "Mean self-repair on the head's top share, from the prompts done when the head was finished."),
    Variable("half_width", SWEEP[:2], "logit", "half-width of its interval", "Half the width of the 95% confidence interval of that mean, documents (or prompts, where there are few documents) taken as independent."),
    Variable("prompts_used", SWEEP[:2], "1", "prompts used", "Number of prompts that the estimate is from.", "int"),
    Variable("layer_estimate", ("layer",), "logit", "estimated self-repair of the layer", "Mean of the estimates of the layer's heads."),
    Variable("layer_half_width", ("layer",), "logit", "half-width of its interval", "Half the width of the 95% confidence interval of that mean."),
    # on request
    Variable("residual_norm", TOKEN, "1", "norm of the residual stream", "Length of the residual stream before the final norm, in the clean run."),
    Variable("ablated_residual_norm", SWEEP, "1", "ablated norm of the residual stream", "Length of the residual stream before the final norm, in the ablated run."),
    Variable("inserted_direct_effect", SWEEP, "logit", "direct effect of the insertion", "DE, under the clean norm scale, of what a reinforced head's run adds to the residual stream; not part of its self-repair."),
    Variable("attention", (*SWEEP, "distance"), "1", "attention", "Attention the head pays, in the clean run, to the token so far back; 0 where there is none."),
    Variable("mlp_direct_effect", TOKEN, "logit", "direct effect of the MLP", "DE of the recorded MLP in the clean run."),
    Variable("mlp_change", SWEEP, "logit", "change of direct effect of the MLP", "DE of the recorded MLP after the ablation minus before, under the clean norm scale."),
    Variable("top_neuron", (*SWEEP, "rank"), "1", "most repairing neurons", "Index of the neuron of the recorded MLP whose DE rises most, second most ...", "int"),
    Variable("top_neuron_change", (*SWEEP, "rank"), "logit", "their changes of direct effect", "DE of that neuron after the ablation minus before, under the clean norm scale."),
    Variable("top_neuron_direct_effect", (*SWEEP, "rank"), "logit", "their direct effects", "DE of that neuron in the clean run."),
    Variable("neuron_direct_effect", (*SWEEP, "neuron"), "logit", "direct effect of the neuron", "DE of every neuron of the recorded MLP in the clean run, on the top tokens of (layer, head)."),
    Variable("neuron_change", (*SWEEP, "neuron"), "logit", "change of direct effect of the neuron", "DE of every neuron of the recorded MLP after the ablation minus before, on the top tokens of (layer, head); with the bias, which does not change, they add up to mlp_change."),
    Variable("component_direct_effect", (*TOKEN, "component"), "logit", "direct effect of the component", "DE of every component in the clean run; with target_constant they add up to the logit."),
    Variable("component_change", (*SWEEP, "component"), "logit", "change of direct effect of the component", "DE after the ablation of (layer, head) minus DE before, of every component, under the clean norm scale."),
)
# fmt: on

_CLEAN = ("direct_effect", "attention", "neuron_direct_effect")
"""What belongs to an ablated head, but to its clean run."""

VARIABLES: dict[str, Variable] = {
    v.name: replace(v, ablated=v.dims[:4] == SWEEP and v.name not in _CLEAN) for v in _ALL
}

COORDINATES = tuple(v.name for v in _ALL[: [v.name for v in _ALL].index("selected")])
CLEAN = ("logit", "mean_logit", "target_constant", "norm_scale")
_REQUESTED = ("ablated_residual_norm", "inserted_direct_effect", "mlp_change")
SWEPT = tuple(v.name for v in _ALL if v.dims == SWEEP and v.name not in _REQUESTED)
RANKS = 10
"""How many of a token's most repairing neurons are kept by name."""

ESTIMATE = ("estimate", "half_width", "prompts_used")
LAYER_ESTIMATE = ("layer_estimate", "layer_half_width")
COMPONENT = ("component_direct_effect", "component_change")
NEURON = (
    "mlp_direct_effect",
    "mlp_change",
    "top_neuron",
    "top_neuron_change",
    "top_neuron_direct_effect",
    "neuron_direct_effect",
    "neuron_change",
)


def usual_share(all_count: bool) -> float:
    """The share of tokens, by direct effect, that is looked at where none is asked for.

    Where every token counts alike it is each head's top 2%, the paper's choice of those on which the head matters. Where
    the prompts say which tokens count that choice is made, and it is all of these.
    """
    return SHARE if all_count else 1.0


def variable(name: str) -> Variable:
    """The definition of a stored variable. Raises KeyError, with the list of names, if there is none."""
    if name not in VARIABLES:
        raise KeyError(f"no variable {name!r}; a store can hold {', '.join(VARIABLES)}")
    return VARIABLES[name]
