"""Every quantity that a store can hold, one row each: what it is, when it is recorded, and who gives it in what shape.

The store's template, what a job must give, the size that a plan foretells and the table of the documents follow from
these rows.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

TOKEN = ("prompt", "position")
SWEEP = ("layer", "head", "prompt", "position")
WIDE = ("component", "neuron", "choice", "word", "changed")
"""Dimensions of which there are many entries for each token."""
SHARE = 0.02
"""The paper's top share."""
RANKS = 10
"""How many of a token's most repairing neurons are kept by name."""
MOVERS = 3
"""Of how many of a token's components, those whose direct effect changes most, the words are kept."""

WHEN = {
    "always": "always",
    "grid": "where each run ablates one head",
    "cases": "where runs ablate something else",
    "other": "prompts that name another token",
    "mixers": "models with mixers without heads",
    "post_norms": "models with norms behind their sublayers",
    "capped": "models that cap their logits",
    "counterfactual": "prompts with a counterfactual",
    "total": '`record="total"`',
    "components": '`record="full"`',
    "named": '`record="full"` or `words=`',
    "neurons": "`neurons=`",
    "words": "`words=`",
    "attention": "`attention=`",
    "reinforced": "`Reinforce`",
    "estimated": "`--until-ci`",
    "resampled": "`--resamples`",
    "shuffled_neurons": '`also=("shuffled_target",)` with `neurons=`',
    "moments": "`--resamples-as moments`",
}
"""When a quantity is recorded: the conditions that a graph, its prompts and its options fulfil by what they are.

Any other name, which is that of a row, is one that `Graph.also` switches on.
"""

OF_MODELS = ("mixers", "post_norms", "capped")
"""Those that a model fulfils by what it is."""

SOURCES = ("label", "run", "clean", "ablated", "derived")


@dataclass(frozen=True)
class Quantity:
    """One stored array: `kind` is "float" (the store's dtype), "int", "bool" or "string".

    `when` is the condition under which it is recorded, `unless` one under which it is not. `costly` says that a token's takes as long as
    many others'. `source` is who gives it: "label" is known before the run, and
    a coordinate; "run" is kept by the run itself; "clean" and "ablated" come from the ablation job, of the clean pass
    and of each ablated one; "derived" follows from those (equations.complete).
    In a store whose runs ablate more than one head at once, or something else, `case` stands for `layer` and `head`;
    in one with several variants, what is of an ablated run has their axis as its first dimension, and in one with
    several partners of each prompt, `resample` before the others.
    """

    name: str
    source: str
    dims: tuple[str, ...]
    units: str
    long_name: str
    description: str
    kind: str = "float"
    when: str = "always"
    unless: str = ""
    costly: bool = False

    @property
    def attributes(self) -> dict[str, str]:
        return {"units": self.units, "long_name": self.long_name, "description": self.description}

    @property
    def swept(self) -> bool:
        """Whether there is one for each head, or case."""
        return self.dims[:2] == SWEEP[:2]

    @property
    def ablated(self) -> bool:
        """Whether it is of the ablated runs: it differs between variants."""
        return self.source in ("ablated", "derived")

    @property
    def large(self) -> bool:
        """Whether each ablated token takes so much room, or time, that where there are thresholds only top tokens have it."""
        return self.costly or (self.swept and not set(WIDE).isdisjoint(self.dims))

    def dtype(self, precision: str) -> np.dtype | type[str]:
        """The stored type, given the store's floating-point `precision` ("float32" or "float64")."""
        kinds = {
            "float": np.dtype(precision),
            "int": np.dtype("int64"),
            "bool": np.dtype("bool"),
            "string": str,
        }
        return kinds[self.kind]

    def dims_in(self, grid: bool, *axes: str | None) -> tuple[str, ...]:
        """Its dimensions in a store with or without a grid of heads, and with axes that ablated runs lie along."""
        dims = self.dims
        if not grid and self.source != "label" and dims[:1] == ("layer",):
            dims = ("case", *dims[2:])
        return (*filter(None, axes), *dims) if self.ablated else dims

    def shape(self, sizes: Mapping[str, int], packed: bool = False) -> tuple[str | int, ...]:
        """Its shape as a job gives it, "prompt" and "case" by name; `packed` where there are thresholds.

        What is large comes then as [token, …]. `sizes` are those of the store's dimensions.
        """
        named = {"prompt": "prompt", "case": "case"}
        shape = tuple(named.get(d) or sizes[d] for d in self.dims_in(False))
        return ("token", *shape[3:]) if packed and self.large else shape


# One row a quantity: a table reads better than a column of arguments.
# fmt: off
_ALL = (
    # coordinates
    Quantity("layer", "label", ("layer",), "1", "layer", "Index of the decoder layer, from 0.", "int", when="grid"),
    Quantity("head", "label", ("head",), "1", "head", "Index of the attention head within its layer, from 0.", "int", when="grid"),
    Quantity("head_label", "label", ("layer", "head"), "1", "name of the head", "What the head is called: L7H5 is head 5 of layer 7.", "string", when="grid"),
    Quantity("prompt", "label", ("prompt",), "1", "prompt", "Index of the prompt (one row of tokens).", "int"),
    Quantity("position", "label", ("position",), "1", "position", "Index of the token in its prompt, from 0; every position has a next token.", "int"),
    Quantity("token", "label", TOKEN, "1", "token id", "Token the model reads at this position.", "int"),
    Quantity("target", "label", TOKEN, "1", "target token id", "Next token of the text: the one whose logit is measured.", "int"),
    Quantity("token_text", "label", TOKEN, "1", "token", "The token at this position, as text.", "string"),
    Quantity("target_text", "label", TOKEN, "1", "target token", "The target token, as text.", "string"),
    Quantity("counted", "label", TOKEN, "1", "counted", "Whether this token is asked about: every statistic is over these tokens alone.", "bool"),
    Quantity("document", "label", ("prompt",), "1", "document", "Index of the document in which the prompt starts.", "int"),
    Quantity("partner", "label", ("prompt",), "1", "partner prompt", "Prompt whose activations replace this prompt's under resample ablation; -1 where none is used.", "int"),
    Quantity("resample", "label", ("resample",), "1", "resample", "Index of the partners, where every prompt has several one after the other: partner is then over (resample, prompt).", "int", when="resampled"),
    Quantity("ablation", "label", (), "1", "ablation", "What the ablated site's activations were replaced by.", "string"),
    Quantity("case", "label", ("case",), "1", "case", "What is ablated: sites joined by + are replaced together.", "string", when="cases"),
    Quantity("case_sites", "label", ("case",), "1", "sites of the case", "Its sites as JSON: a list of kind and numbers for each, such as [[\"head\", 9, 6]].", "string", when="cases"),
    Quantity("case_layer", "label", ("case",), "1", "layer of the case", "First layer that the case ablates.", "int", when="cases"),
    Quantity("other", "label", TOKEN, "1", "other token id", "Token whose logit is subtracted from the target's.", "int", when="other"),
    Quantity("other_text", "label", TOKEN, "1", "other token", "That token, as text.", "string", when="other"),
    Quantity("shuffled_target", "label", TOKEN, "1", "shuffled target token id", "Target of another position of the prompt, drawn from the seed, and another token: what shuffled quantities are of.", "int", when="shuffled_target"),
    Quantity("counterfactual", "label", TOKEN, "1", "token id of the counterfactual text", "Token at this position of the minimally different text whose activations replace under counterfactual ablation.", "int", when="counterfactual"),
    Quantity("counterfactual_text", "label", TOKEN, "1", "token of the counterfactual", "That token, as text.", "string", when="counterfactual"),
    Quantity("edited_position", "label", ("prompt",), "1", "edited position", "Position at which the head's write is added again.", "int", when="reinforced"),
    Quantity("distance", "label", ("distance",), "1", "distance", "How many tokens back the attention goes.", "int", when="attention"),
    Quantity("rank", "label", ("rank",), "1", "rank", "Place among the token's most repairing neurons, from 0.", "int", when="neurons"),
    Quantity("neuron", "label", ("neuron",), "1", "neuron", "Index of the neuron in the recorded MLP.", "int", when="neurons"),
    Quantity("component", "label", ("component",), "1", "component", "Label of one term of the residual stream's sum.", "string", when="named"),
    Quantity("component_kind", "label", ("component",), "1", "kind of component", "embedding, position_embedding, head, attention_bias, mixer or mlp.", "string", when="named"),
    Quantity("component_layer", "label", ("component",), "1", "layer of the component", "Layer that writes the component; -1 for embeddings.", "int", when="named"),
    Quantity("component_head", "label", ("component",), "1", "head of the component", "Head that writes the component; -1 where it is not a head.", "int", when="named"),
    Quantity("choice", "label", ("choice",), "1", "choice", "Index among the experts that a token uses, in all mixtures together.", "int", when="routing"),
    Quantity("choice_layer", "label", ("choice",), "1", "layer of the choice", "Layer whose mixture the choice is of.", "int", when="routing"),
    Quantity("word", "label", ("word",), "1", "word", "Place among the most promoted, or the most demoted, tokens of the vocabulary, from 0.", "int", when="words"),
    Quantity("changed", "label", ("changed",), "1", "changed component", "Place among the components whose direct effect the ablation changes most, from 0.", "int", when="words"),
    Quantity("vocabulary", "label", ("vocabulary",), "1", "token id", "Id of a token of the vocabulary.", "int", when="words"),
    Quantity("vocabulary_text", "label", ("vocabulary",), "1", "token of the vocabulary", "That token, as text.", "string", when="words"),
    # bookkeeping
    Quantity("selected", "run", ("layer", "head"), "1", "selected", "Whether this head is part of the run.", "bool"),
    Quantity("done", "run", ("layer", "head", "prompt"), "1", "done", "Whether this head's values on this prompt are computed and stored.", "bool"),
    # the clean run
    Quantity("logit", "clean", TOKEN, "logit", "target logit", "Logit of the target in the clean run, under the run's target convention."),
    Quantity("mean_logit", "clean", TOKEN, "logit", "mean logit", "Mean over the vocabulary of the clean run's logits: raw logit = centred logit + mean logit."),
    Quantity("target_constant", "clean", TOKEN, "logit", "constant of the target", "k = <beta, u_t> + b_U[t]: the part of the target's logit that no component writes."),
    Quantity("norm_scale", "clean", TOKEN, "1", "final norm scale", "S: the number the final norm divides the residual stream by, in the clean run."),
    Quantity("direct_effect", "clean", SWEEP, "logit", "direct effect", "DE of the head on the target logit in the clean run, under the clean norm scale."),
    # the ablated runs
    Quantity("ablated_direct_effect", "ablated", SWEEP, "logit", "ablated direct effect", "DE of the head after its own ablation, still under the clean norm scale."),
    Quantity("logit_change", "ablated", SWEEP, "logit", "logit change", "Ablated minus clean logit of the target, whole model."),
    Quantity("mean_logit_change", "ablated", SWEEP, "logit", "mean logit change", "Ablated minus clean mean over the vocabulary of the logits: raw change = centred change + mean change."),
    Quantity("logit_change_capped", "ablated", SWEEP, "logit", "change of the capped logit", "Ablated minus clean logit of the target as the model returns it, behind its soft cap; every other quantity is of the logit before the cap.", when="capped"),
    Quantity("self_repair", "derived", SWEEP, "logit", "self-repair", "logit_change minus the change of the ablated head's own direct effect (Equation 1)."),
    Quantity("from_heads", "ablated", SWEEP, "logit", "self-repair from heads", "Summed change of direct effect of all other attention heads.", unless="total"),
    Quantity("from_mlps", "ablated", SWEEP, "logit", "self-repair from MLPs", "Summed change of direct effect of all MLPs.", unless="total"),
    Quantity("from_components", "ablated", SWEEP, "logit", "self-repair from other components", "Summed change of direct effect of everything but what is ablated and the final norm, read off the final residual stream: what remains there.", when="total"),
    Quantity("from_mixers", "ablated", SWEEP, "logit", "self-repair from mixers", "Summed change of direct effect of all mixers without heads (convolutions, state spaces).", when="mixers"),
    Quantity("from_post_norms", "ablated", SWEEP, "logit", "self-repair from the norms behind attention", "What the change of the scales of the norms behind attention adds to what the heads of their layers write.", when="post_norms"),
    Quantity("from_norm", "derived", SWEEP, "logit", "self-repair from the final norm", "(S/S' - 1) R', with R' the summed ablated direct effects of all components."),
    Quantity("norm_on_existing", "derived", SWEEP, "logit", "final norm on existing logits", "(S/S' - 1)(logit - k): the part of from_norm that rescales what was there (Appendix B)."),
    Quantity("norm_on_change", "derived", SWEEP, "logit", "final norm on the change", "(S/S' - 1)(R' - R): the part of from_norm that rescales what changed (Appendix B)."),
    Quantity("ablated_norm_scale", "ablated", SWEEP, "1", "ablated final norm scale", "S': the final norm's scale in the ablated run."),
    Quantity("closure", "derived", SWEEP, "logit", "closure", "self_repair minus all its parts (from_heads, from_mlps, from_norm and, where they are stored, from_mixers and from_post_norms): zero up to rounding, measured not assumed.", unless="total"),
    Quantity("noise_floor", "run", ("layer",), "logit", "noise floor", "Root mean square of the logit change that rounding alone makes of an ablation in this layer (heads replaced by themselves, their pass shaken by one rounding step): smaller effects are rounding."),
    Quantity("threshold", "run", SWEEP[:2], "logit", "threshold of the top share", "Least direct effect in the head's top share over all counted tokens of the run: the 2% of highest direct effect, all where prompts say which tokens count, or --share where only a top share is ablated; NaN until it is known."),
    # where only as much is ablated as an answer needs
    Quantity("estimate", "run", SWEEP[:2], "logit", "estimated self-repair", "Mean self-repair on the head's top share, from the prompts done when the head was finished.", when="estimated"),
    Quantity("half_width", "run", SWEEP[:2], "logit", "half-width of its interval", "Half the width of the 95% confidence interval of that mean, documents (or prompts, where there are few documents) taken as independent.", when="estimated"),
    Quantity("prompts_used", "run", SWEEP[:2], "1", "prompts used", "Number of prompts that the estimate is from.", "int", when="estimated"),
    Quantity("layer_estimate", "run", ("layer",), "logit", "estimated self-repair of the layer", "Mean of the estimates of the layer's heads.", when="estimated"),
    Quantity("layer_half_width", "run", ("layer",), "logit", "half-width of its interval", "Half the width of the 95% confidence interval of that mean.", when="estimated"),
    # on request
    Quantity("residual_norm", "clean", TOKEN, "1", "norm of the residual stream", "Length of the residual stream before the final norm, in the clean run.", when="residual_norm"),
    Quantity("ablated_residual_norm", "ablated", SWEEP, "1", "ablated norm of the residual stream", "Length of the residual stream before the final norm, in the ablated run.", when="residual_norm"),
    Quantity("stream_distance", "ablated", SWEEP, "1", "distance of the residual stream", "How far the residual stream behind the deleted, permuted or parallel layers lies from the clean one, in lengths of what these layers write in the clean run: 1 where they are deleted, 0 where nothing moved.", when="stream_distance"),
    Quantity("inserted_direct_effect", "ablated", SWEEP, "logit", "direct effect of the insertion", "DE, under the clean norm scale, of what a reinforced head's run adds to the residual stream; not part of its self-repair.", when="reinforced"),
    Quantity("shuffled_direct_effect", "clean", SWEEP, "logit", "direct effect on the shuffled target", "DE of the head on the shuffled target in the clean run, under the clean norm scale.", when="shuffled_target"),
    Quantity("shuffled_from_norm", "ablated", SWEEP, "logit", "final norm's change of the shuffled target", "(S/S' - 1) R', with R' the summed ablated direct effects of all components on the shuffled target.", when="shuffled_target"),
    Quantity("shuffled_mlp_change", "ablated", SWEEP, "logit", "change of direct effect of the MLP on the shuffled target", "DE of the recorded MLP on the shuffled target after the ablation minus before, under the clean norm scale.", when="shuffled_neurons"),
    Quantity("shuffled_neuron_change", "ablated", SWEEP, "logit", "most repairing neuron's change, shuffled target", "Change of DE on the shuffled target of the neuron of the recorded MLP whose DE on it rises most.", when="shuffled_neurons"),
    Quantity("shuffled_neuron_direct_effect", "ablated", SWEEP, "logit", "its direct effect on the shuffled target", "DE of that neuron on the shuffled target in the clean run.", when="shuffled_neurons"),
    Quantity("attention", "clean", (*SWEEP, "distance"), "1", "attention", "Attention the head pays, in the clean run, to the token so far back; 0 where there is none.", when="attention"),
    Quantity("edge_attention", "ablated", SWEEP, "1", "attention along the edges", "Attention that the head pays, in the clean run, along the edges that are cut.", when="edge_attention"),
    Quantity("mlp_direct_effect", "clean", TOKEN, "logit", "direct effect of the MLP", "DE of the recorded MLP in the clean run.", when="neurons"),
    Quantity("mlp_change", "ablated", SWEEP, "logit", "change of direct effect of the MLP", "DE of the recorded MLP after the ablation minus before, under the clean norm scale.", when="neurons"),
    Quantity("top_neuron", "ablated", (*SWEEP, "rank"), "1", "most repairing neurons", "Index of the neuron of the recorded MLP whose DE rises most, second most ...", "int", when="neurons"),
    Quantity("top_neuron_change", "ablated", (*SWEEP, "rank"), "logit", "their changes of direct effect", "DE of that neuron after the ablation minus before, under the clean norm scale.", when="neurons"),
    Quantity("top_neuron_direct_effect", "ablated", (*SWEEP, "rank"), "logit", "their direct effects", "DE of that neuron in the clean run.", when="neurons"),
    Quantity("falling_neuron", "ablated", SWEEP, "1", "most breaking neuron", "Index of the neuron of the recorded MLP whose DE falls most.", "int", when="falling_neuron"),
    Quantity("falling_neuron_change", "ablated", SWEEP, "logit", "its change of direct effect", "DE of that neuron after the ablation minus before, under the clean norm scale.", when="falling_neuron"),
    Quantity("falling_neuron_direct_effect", "ablated", SWEEP, "logit", "its direct effect", "DE of that neuron in the clean run.", when="falling_neuron"),
    Quantity("neuron_direct_effect", "clean", (*SWEEP, "neuron"), "logit", "direct effect of the neuron", "DE of every neuron of the recorded MLP in the clean run, on the top tokens of (layer, head).", when="neurons"),
    Quantity("neuron_change", "ablated", (*SWEEP, "neuron"), "logit", "change of direct effect of the neuron", "DE of every neuron of the recorded MLP after the ablation minus before, on the top tokens of (layer, head); with the bias, which does not change, they add up to mlp_change.", when="neurons"),
    Quantity("routing", "clean", (*TOKEN, "choice"), "1", "routing", "Index of each expert that the token uses in the clean run, those of a mixture in ascending order.", "int", when="routing"),
    Quantity("ablated_routing", "ablated", (*SWEEP, "choice"), "1", "ablated routing", "Index of each expert that the token uses in the ablated run, on the top tokens of (layer, head); of mixtures before the ablation those of the clean run.", "int", when="routing"),
    Quantity("rerouted", "ablated", SWEEP, "1", "share of re-routed choices", "Of the token's choices of experts, in the mixtures that the ablated run goes through, the share that goes to an expert which the token does not use there in the clean run.", when="routing"),
    Quantity("logprob", "clean", TOKEN, "nat", "log-probability of the target", "Log-probability of the next token of the text in the clean run, behind a logit scale and a soft cap, whatever the target's convention.", when="logprob"),
    Quantity("logsumexp", "clean", TOKEN, "nat", "log-normaliser", "log sum exp of the clean run's logits, as the model returns them: logprob = raw logit - logsumexp.", when="logprob"),
    Quantity("entropy", "clean", TOKEN, "nat", "entropy", "Entropy of the clean run's next-token distribution.", when="logprob"),
    Quantity("target_rank", "clean", TOKEN, "1", "rank of the target", "How many tokens of the vocabulary are likelier than the next token of the text in the clean run.", "int", when="logprob"),
    Quantity("logprob_change", "ablated", SWEEP, "nat", "log-probability change", "Ablated minus clean log-probability of the target, whole model.", when="logprob", costly=True),
    Quantity("self_repair_logprob", "ablated", SWEEP, "nat", "self-repair in log-probability", "logprob_change minus the change of log-probability if only the ablated head's own write changed, under the clean norm scale.", when="logprob", costly=True),
    Quantity("norm_logprob", "ablated", SWEEP, "nat", "self-repair in log-probability from the final norm", "logprob_change minus the change of log-probability with everything as ablated, but the clean norm scale.", when="logprob", costly=True),
    Quantity("logsumexp_change", "ablated", SWEEP, "nat", "change of the log-normaliser", "Ablated minus clean logsumexp.", when="logprob", costly=True),
    Quantity("frozen_norm_logsumexp_change", "ablated", SWEEP, "nat", "change of the log-normaliser under the clean norm", "logsumexp with everything as ablated but the clean norm scale, minus the clean logsumexp.", when="logprob", costly=True),
    Quantity("entropy_change", "ablated", SWEEP, "nat", "entropy change", "Ablated minus clean entropy of the next-token distribution.", when="logprob", costly=True),
    Quantity("kl", "ablated", SWEEP, "nat", "KL divergence", "KL(clean || ablated) of the next-token distributions: the expected loss of log-probability under the clean run's own predictions.", when="logprob", costly=True),
    Quantity("ablated_target_rank", "ablated", SWEEP, "1", "ablated rank of the target", "How many tokens of the vocabulary are likelier than the next token of the text in the ablated run; -1 where not kept.", "int", when="logprob", costly=True),
    Quantity("promoted", "clean", (*SWEEP, "word"), "1", "promoted tokens", "Ids of the tokens whose logit what the head writes raises most in the clean run, the first most: each logit less the mean over the vocabulary, before a soft cap.", "int", when="words", costly=True),
    Quantity("promoted_effect", "clean", (*SWEEP, "word"), "logit", "direct effect on the promoted tokens", "DE of the head on each of these tokens, less the mean over the vocabulary, under the clean norm scale: of the target it is direct_effect of the centred target.", when="words", costly=True),
    Quantity("ablated_promoted_effect", "ablated", (*SWEEP, "word"), "logit", "ablated direct effect on the promoted tokens", "DE of the head on the same tokens after its own ablation, still under the clean norm scale.", when="words", costly=True),
    Quantity("promoted_logit_change", "ablated", (*SWEEP, "word"), "logit", "logit change of the promoted tokens", "Ablated minus clean logit of the same tokens, less the mean over the vocabulary, whole model, before a soft cap.", when="words", costly=True),
    Quantity("demoted", "clean", (*SWEEP, "word"), "1", "demoted tokens", "Ids of the tokens whose logit what the head writes lowers most in the clean run, the first most: each logit less the mean over the vocabulary, before a soft cap.", "int", when="words", costly=True),
    Quantity("demoted_effect", "clean", (*SWEEP, "word"), "logit", "direct effect on the demoted tokens", "DE of the head on each of these tokens, less the mean over the vocabulary, under the clean norm scale: of the target it is direct_effect of the centred target.", when="words", costly=True),
    Quantity("ablated_demoted_effect", "ablated", (*SWEEP, "word"), "logit", "ablated direct effect on the demoted tokens", "DE of the head on the same tokens after its own ablation, still under the clean norm scale.", when="words", costly=True),
    Quantity("demoted_logit_change", "ablated", (*SWEEP, "word"), "logit", "logit change of the demoted tokens", "Ablated minus clean logit of the same tokens, less the mean over the vocabulary, whole model, before a soft cap.", when="words", costly=True),
    Quantity("changed_component", "ablated", (*SWEEP, "changed"), "1", "most changed components", "Index along component of the component whose DE on the target changes most, by size, second most ...; what is ablated is left out.", "int", when="words", costly=True),
    Quantity("changed_effect", "ablated", (*SWEEP, "changed"), "logit", "their changes of direct effect", "DE of that component on the target after the ablation minus before, under the clean norm scale.", when="words", costly=True),
    Quantity("change_promoted", "ablated", (*SWEEP, "changed", "word"), "1", "tokens that a component's change promoted", "Ids of the tokens whose logit the change of what that component writes raises most, the first most.", "int", when="words", costly=True),
    Quantity("change_promoted_effect", "ablated", (*SWEEP, "changed", "word"), "logit", "effect of a component's change on the tokens it promoted", "By how much it does, less the mean over the vocabulary, under the clean norm scale.", when="words", costly=True),
    Quantity("change_demoted", "ablated", (*SWEEP, "changed", "word"), "1", "tokens that a component's change demoted", "Ids of the tokens whose logit the change of what that component writes lowers most, the first most.", "int", when="words", costly=True),
    Quantity("change_demoted_effect", "ablated", (*SWEEP, "changed", "word"), "logit", "effect of a component's change on the tokens it demoted", "By how much it does, less the mean over the vocabulary, under the clean norm scale.", when="words", costly=True),
    Quantity("component_direct_effect", "clean", (*TOKEN, "component"), "logit", "direct effect of the component", "DE of every component in the clean run; with target_constant they add up to the logit.", when="components"),
    Quantity("component_change", "ablated", (*SWEEP, "component"), "logit", "change of direct effect of the component", "DE after the ablation of (layer, head) minus DE before, of every component, under the clean norm scale.", when="components"),
)
# fmt: on

VARIANCE = "_variance"


def _variance(q: Quantity) -> Quantity:
    """The variance over partners of a quantity of the ablated runs, in a store that keeps moments alone."""
    units = q.units if q.units == "1" else f"{q.units}²"
    told = f"Variance over the partners of a prompt, by their number less one, of {q.name}, which is then their mean."
    name, long_name = f"{q.name}{VARIANCE}", f"variance over partners of {q.long_name}"
    return replace(q, name=name, units=units, long_name=long_name, description=told, when="moments", unless="")


def varied(q: Quantity) -> bool:
    """Whether it is a number that differs from partner to partner, of which there are a mean and a variance."""
    return q.ablated and q.kind == "float" and q.name != "closure"


QUANTITIES: dict[str, Quantity] = {q.name: q for q in (*_ALL, *(_variance(q) for q in _ALL if varied(q)))}
IN_NATS = {"logit_change": "logprob_change", "self_repair": "self_repair_logprob", "from_norm": "norm_logprob"}
"""What is told of a target's logit, and what of the next token's log-probability."""
OUTCOMES = {"logit": "the logit of the target", "logprob": "the log-probability of the next token"}
COORDINATES = tuple(q.name for q in _ALL if q.source == "label")
ASKED = tuple(dict.fromkeys(q.when for q in _ALL if q.source != "label" and q.when not in WHEN))
"""What `Graph.also` can name."""


def recorded(conditions: Collection[str], *sources: str) -> tuple[Quantity, ...]:
    """What is recorded under these conditions (names of `WHEN` and `ASKED`), in the store's order.

    All of it but the labels, or only what comes from some `sources`.
    """
    asked = (q for q in _ALL if q.when in conditions and q.unless not in conditions)
    return tuple(q for q in asked if q.source in (sources or SOURCES[1:]))


def measured(conditions: Collection[str]) -> tuple[Quantity, ...]:
    """What an ablation job gives under these conditions."""
    return recorded(conditions, "clean", "ablated")


def asked_in(ds: Any) -> str:
    """What a dataset, or a summary, is about: "logit", or "logprob" as `analysis.in_nats` makes it."""
    return ds.attrs.get("outcome", "logit")


def told_of(ds: Any, name: str) -> Quantity:
    """The quantity that stands under a name in a dataset or a summary."""
    return QUANTITIES[IN_NATS.get(name, name) if asked_in(ds) == "logprob" else name]


def table() -> str:
    """All quantities as the table of docs/store.md."""
    lines = ["| variable | dimensions | units | | recorded |", "|---|---|---|---|---|"]
    for q in QUANTITIES.values():
        when = WHEN.get(q.when, f'`also=("{q.when}",)`') + (f", but not with {WHEN[q.unless]}" if q.unless else "")
        lines.append(
            f"| `{q.name}` | {', '.join(q.dims) or '–'} | {q.units} | {q.description} | {when} |"
        )
    return "\n".join(lines)


def usual_share(all_count: bool) -> float:
    """The share of tokens, by direct effect, that is looked at where none is asked for.

    Where every token counts alike it is each head's top 2%, the paper's choice of those on which the head matters. Where
    the prompts say which tokens count that choice is made, and it is all of these.
    """
    return SHARE if all_count else 1.0
