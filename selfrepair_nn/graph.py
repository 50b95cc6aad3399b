"""An experiment as data: what is ablated, by what it is replaced, what is frozen, what is recorded."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from types import FunctionType
from typing import Any

from selfrepair_nn.components import (
    Ablatable,
    Attention,
    FinalNorm,
    Freezable,
    Head,
    Mixers,
    Mlp,
    Norm,
    PostNorms,
    Recomposed,
    Routing,
    Whole,
    headless_in,
)
from selfrepair_nn.edges import KnockOut, ZeroValues
from selfrepair_nn.errors import UsageError
from selfrepair_nn.quantities import ASKED, MOVERS, QUANTITIES, RANKS, measured
from selfrepair_nn.replacements import Reinforce, Replacement, replacement_of
from selfrepair_nn.values import Declared, brief, one_of, switch, text, whole

TARGETS = {
    "centred": "the unembedding row of the next token minus the mean row of the vocabulary",
    "raw": "the unembedding row of the next token",
}
"""What a command line can ask for; prompts that name a token to compare with are measured by the difference."""

VALUE_BIASES = {
    "output": "a head's constant part belongs to the attention's output bias, as in the paper",
    "head": "a head's constant part is its own, as a hook sees it",
}
FREEZES = {
    "none": "everything reacts to the ablation",
    "downstream": "every other head, mixer and MLP keeps its clean value; the final norm is live",
    "all": "the scale of the final norm too, and of norms behind attention where a model has them",
}
RECORDS = {
    "total": "all other components as one sum",
    "sums": "heads, MLPs and norm",
    "full": "every component by itself",
}

MOST_WORDS = 100
FOUND_ON = ("all", "half")
"""The prompts on which the strongest heads are found."""
LATER = {"also": (), "found_on": "all", "words": 0}
"""Fields that older versions did not have, with the values that say the same as these did."""


@dataclass(frozen=True)
class Graph(metaclass=Declared):
    """One experiment, or a sweep of them: each entry of `ablate` is one ablated run, its sites replaced together.

    `strongest`, if given, keeps of the swept heads the so many that have the largest mean direct effect over the run's
    prompts: a clean pass finds them before anything is ablated. `found_on="half"` finds them on half of the documents
    (or prompts, where these are few): statistics are then over the other half. `then`, if given too, is a function of
    these heads, the strongest first, that gives further cases.
    `freeze` holds the sites that keep their clean value; a site that a run ablates is never frozen in that run.
    `neurons` is the layer whose MLP is recorded neuron by neuron; `residual_norm` records the length of the residual
    stream; `attention` lists distances: the attention each head pays to the token so far back is recorded. `words` is
    how many tokens are recorded that what is ablated, and the change of what reacts to it, promote and demote most.
    `also` names whatever else is to be recorded, as docs/store.md has it: also=("residual_norm",) says what
    residual_norm=True does.

        Graph(ablate=sweep(heads))                        every head by itself, resample ablated
        Graph(ablate=sweep(heads), strongest=4)             only the four that write most of the targets
        Graph(ablate=((Head(9, 6), Head(9, 9)),))         two heads at once
        Graph(ablate=sweep((Layers(3, 4),)), replacement="zero")    layer 3 deleted
        graph.frozen("downstream", n_layers, n_heads)     nothing but the final norm may react
        graph.path((Mlp(11),), n_layers, n_heads)         only what MLP 11 makes of it may react

    Raises:
        UsageError: an unknown replacement, target, value_bias or record, or sites that do not go with them.
    """

    ablate: tuple[tuple[Ablatable, ...], ...]
    replacement: str | Replacement = "resample"
    freeze: frozenset[Freezable] = frozenset()
    record: str = "sums"
    target: str = "centred"
    value_bias: str = "output"
    neurons: int | None = None
    residual_norm: bool = False
    attention: tuple[int, ...] = ()
    strongest: int | None = None
    then: Callable[[tuple[Head, ...]], Iterable[tuple[Ablatable, ...]]] | None = None
    also: tuple[str, ...] = ()
    found_on: str = "all"
    words: int = 0

    def __post_init__(self) -> None:
        for name, kept in (("ablate", _cases), ("freeze", frozenset), ("attention", tuple), ("also", _words)):
            object.__setattr__(self, name, kept(getattr(self, name)))
        switch("residual_norm", self.residual_norm)
        one_of("target", self.target, TARGETS | {"difference": ""})
        one_of("value_bias", self.value_bias, VALUE_BIASES)
        one_of("record", self.record, RECORDS)
        one_of("found_on", self.found_on, FOUND_ON)
        for each in self.also:
            one_of("also", each, ASKED)
        by = self.replaced_by
        for case in self.ablate:
            _require_sites(case)
            by.require(case)
        if self.strongest is not None and not (self.heads_only and self.strongest >= 1):
            raise UsageError(
                f"strongest={self.strongest!r}: it is a number of heads, of those that are swept one by one"
            )
        _require_freezable(self.freeze)
        _require_recordable(self)
        object.__setattr__(self, "words", whole("words", self.words, 0, MOST_WORDS))
        if self.neurons is not None:
            object.__setattr__(self, "neurons", whole("neurons", self.neurons, 0))
        if self.then is not None and not callable(self.then):
            raise UsageError(f"then is a function of the strongest heads, not {brief(self.then)}")
        if self.found_on != "all" and self.strongest is None:
            raise UsageError('found_on="half" says where the strongest heads are found: say how many, strongest=…')
        if self.then is not None and self.strongest is None:
            raise UsageError("then is a function of the strongest heads: say how many, strongest=…")

    @property
    def ablation(self) -> str:
        """The replacement, as one word."""
        return self.replaced_by.word

    @property
    def replaced_by(self) -> Replacement:
        """The replacement, as an object."""
        return replacement_of(self.replacement)

    @property
    def heads_only(self) -> bool:
        """Whether every run ablates one head by itself: its results then lie on a grid of layers and heads."""
        return all(len(case) == 1 and isinstance(case[0], Head) for case in self.ablate)

    @property
    def labels(self) -> list[str]:
        """How each run is called."""
        return ["+".join(site.label for site in case) for case in self.ablate]

    @property
    def digest(self) -> str:
        """A hash of everything it says: two graphs with the same digest do the same."""
        left_out = {"freeze", *(name for name, usual in LATER.items() if getattr(self, name) == usual)}
        told = [f.name for f in fields(self) if f.name not in left_out]
        others = [_said(getattr(self, name)) for name in told]
        return sha256(repr([sorted(map(repr, self.freeze)), *others]).encode()).hexdigest()[:16]

    @property
    def reinforces(self) -> bool:
        """Whether heads are not ablated but reinforced."""
        return isinstance(self.replacement, Reinforce)

    @property
    def records(self) -> frozenset[str]:
        """The conditions for a quantity to be recorded (quantities.WHEN, ASKED) that it fulfils."""
        fulfilled = {
            "grid": self.heads_only,
            "cases": not self.heads_only,
            "total": self.record == "total",
            "components": self.record == "full",
            "named": self.record == "full" or self.words > 0,
            "neurons": self.neurons is not None,
            "words": self.words > 0,
            "attention": bool(self.attention),
            "reinforced": self.reinforces,
            "residual_norm": self.residual_norm,
            "shuffled_neurons": self.neurons is not None and "shuffled_target" in self.also,
        }
        return frozenset({"always", *self.also, *(name for name, given in fulfilled.items() if given)})

    @property
    def undecided(self) -> bool:
        """Whether a clean pass has yet to find the heads that are ablated."""
        return self.strongest is not None and (self.then is not None or self.strongest < len(self.ablate))

    def of(self, heads: Sequence[Head]) -> "Graph":
        """The graph left with these of its heads, the strongest first, and what follows from them."""
        cases = tuple(case for case in self.ablate if case[0] in heads)
        if self.then is not None:
            cases = sweep(heads) + tuple(self.then(tuple(heads)))
        return replace(self, ablate=cases, strongest=None, then=None, found_on="all")

    def beyond(self, structure: Any) -> str | None:
        """The label of a site that a model of this structure does not have, or None.

        Where all mixers are frozen, the heads that layers with a mixer do not have may be too.
        """
        frozen = sorted(self.freeze, key=str)
        if Mixers() in self.freeze:
            none = headless_in(structure)
            frozen = [s for s in frozen if not (isinstance(s, Head) and s.layer in none)]
        sites = [*(site for case in self.ablate for site in case), *frozen]
        sites += [Mlp(self.neurons)] if self.neurons is not None else []
        sites += self.replaced_by.sites
        return next((site.label for site in sites if not site.lies_in(structure)), None)

    def misfit(self, structure: Any) -> str | None:
        """Why its replacement, or what it records or freezes, does not fit a model of this structure, or None."""
        if self.neurons is not None and not structure.d_mlp:
            return (
                "neurons of this model cannot be recorded: its MLPs are mixtures of experts, or have a norm behind them"
            )
        if self.words and self.words > structure.vocab_size:
            return f"words={self.words}: the model's vocabulary has {structure.vocab_size} tokens"
        if reason := _unrouted(self, structure):
            return reason
        found = (self.replaced_by.misfit(case, structure) for case in self.ablate)
        return next(filter(None, found), None)

    def frozen(self, name: str, n_layers: int, n_heads: int) -> "Graph":
        """This graph with a named set of frozen sites: "none", "downstream" or "all"."""
        return replace(self, freeze=freeze_set(name, n_layers, n_heads))

    def freezing(self, sites: Iterable[Freezable]) -> "Graph":
        """This graph with these sites frozen too."""
        return replace(self, freeze=self.freeze | frozenset(sites))

    def path(self, receivers: Iterable[Head | Attention | Mlp | Mixers], n_layers: int, n_heads: int) -> "Graph":
        """This graph with every head, mixer and MLP frozen but the receivers: path patching. The final norm stays live.

        Raises:
            UsageError: a receiver that is neither a head nor an MLP of the model.
        """
        every = freeze_set("downstream", n_layers, n_heads)
        open_ones = {single for site in receivers for single in site.parts(n_heads)}
        if strange := sorted(map(str, open_ones - every)):
            raise UsageError(
                f"{strange[0]} cannot receive: choose heads, attention layers and MLPs of layers 0 to "
                f"{n_layers - 1} with heads 0 to {n_heads - 1}"
            )
        return replace(self, freeze=every - open_ones)

    def plan(self, structure: dict[str, Any]) -> dict[str, Any]:
        """The graph as the plain dict that travels with a job; `structure` is a Structure as a dict."""
        n_heads = structure["n_heads"]
        frozen = {site for s in self.freeze for site in s.parts(n_heads)}
        frozen_heads: dict[int, list[int]] = {}
        for site in sorted(s for s in frozen if isinstance(s, Head) and s.layer not in structure["headless"]):
            frozen_heads.setdefault(site.layer, []).append(site.head)
        frozen_norms = [[s.layer, s.before] for s in frozen if isinstance(s, Norm)]
        if PostNorms() in frozen and "post_norm" in structure["places"]:
            frozen_norms += [[layer, "post"] for layer in range(structure["n_layers"])]
        given = measured(self.records | of_model(structure, self.record))
        return {
            "model": structure,
            "cases": [[s.entry for site in case for s in site.parts(n_heads)] for case in self.ablate],
            "replacement": self.replaced_by.plan,
            "frozen_heads": frozen_heads,
            "frozen_mixers": list(structure["headless"]) if Mixers() in frozen else [],
            "frozen_mlps": sorted(s.layer for s in frozen if isinstance(s, Mlp)),
            "frozen_norms": sorted(frozen_norms),
            "frozen_norm": FinalNorm() in frozen,
            "frozen_routing": sorted(s.layer for s in frozen if isinstance(s, Routing)),
            "record": self.record,
            "neurons": self.neurons,
            "ranks": RANKS,
            "words": self.words,
            "movers": MOVERS,
            "attention": list(self.attention),
            "gives": [each.name for each in given],
            "large": [each.name for each in given if each.large],
            "target": self.target,
            "value_bias": self.value_bias,
            "attention_bias": writes_attention_bias(structure, self.value_bias),
        }


@dataclass(frozen=True)
class Variants(metaclass=Declared):
    """Graphs that ablate the same sites in different ways, side by side along one labelled axis of the store."""

    axis: str
    graphs: Mapping[Any, Graph]

    def __post_init__(self) -> None:
        text("axis", self.axis)
        first = next(iter(self.graphs.values()), None)
        if first is None:
            raise UsageError(f"variants along {self.axis!r} need at least one graph")
        if self.axis in QUANTITIES and self.axis != "ablation":
            raise UsageError(f"variants along {self.axis!r}: every store uses that name; choose another")
        for label, graph in self.graphs.items():
            for name in (f.name for f in fields(Graph) if f.name not in ("replacement", "freeze")):
                if getattr(graph, name) != getattr(first, name):
                    raise UsageError(f"variants along {self.axis!r} must share {name}: {label!r} does not")
            if graph.reinforces != first.reinforces:
                raise UsageError(
                    f"variants along {self.axis!r} must all reinforce heads or none: {label!r} does not do as the first"
                )


def _cases(ablate: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(tuple(case) if isinstance(case, list) else case for case in ablate)


def _words(names: Iterable[str] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(sorted(set(names), key=str))


def sweep(sites: Iterable[Ablatable]) -> tuple[tuple[Ablatable, ...], ...]:
    """Each site ablated by itself."""
    return tuple((site,) for site in sites)


def freeze_set(name: str, n_layers: int, n_heads: int) -> frozenset[Freezable]:
    """The sites behind "none", "downstream" or "all"."""
    one_of("freeze", name, FREEZES)
    if name == "none":
        return frozenset()
    sites: set[Freezable] = {Head(layer, h) for layer in range(n_layers) for h in range(n_heads)}
    sites |= {Mlp(layer) for layer in range(n_layers)} | {Mixers()}
    return frozenset(sites | {PostNorms(), FinalNorm()} if name == "all" else sites)


def writes_attention_bias(structure: dict[str, Any], value_bias: str) -> bool:
    """Whether the attention's output bias is a component: it has one, or it takes in the heads' constant part."""
    return structure["attention_bias"] or (value_bias == "output" and structure["value_bias"])


def of_model(structure: Mapping[str, Any], record: str) -> frozenset[str]:
    """The conditions for a quantity to be recorded (quantities.WHEN) that a model fulfils; a Structure as a dict."""
    split = record != "total"
    fulfilled = {
        "mixers": split and bool(structure["headless"]),
        "post_norms": split and "post_norm" in structure["places"],
        "capped": structure["logit_cap"] is not None,
    }
    return frozenset(name for name, given in fulfilled.items() if given)


def _require_sites(case: tuple[Ablatable, ...]) -> None:
    """A case is a tuple of sites, none of which lies within another."""
    if not isinstance(case, tuple | list):
        raise UsageError(
            f"ablate: {case} is no tuple of sites; write sweep([...]) to ablate sites one by one"
        )
    for index, site in enumerate(case):
        if not isinstance(site, Ablatable):
            raise UsageError(
                f"{site} cannot be ablated; choose a Head, Attention, Mlp, Neuron, Layers, Permuted or "
                "Parallel"
            )
        for other in case[:index]:
            if site.overlaps(other):
                raise UsageError(
                    f"{other.label} and {site.label} in one case are the same place: name it once"
                )


def _require_freezable(sites: frozenset[Freezable]) -> None:
    for site in sites:
        if not isinstance(site, Freezable):
            raise UsageError(
                f"{site} cannot be frozen; choose a Head, Attention, Mlp, Routing, Mixers, Norm, PostNorms or "
                "FinalNorm"
            )


def _require_recordable(graph: Graph) -> None:
    """Attention is of one head; what takes the place of whole MLPs, or of layers that move, has no parts of its own."""
    if graph.record == "total" and (graph.neurons is not None or graph.reinforces):
        raise UsageError('record "total" reads the final residual stream alone: record "sums" for neurons or Reinforce')
    if graph.reinforces and "logprob" in graph.also:
        raise UsageError("reinforced heads are measured in logits: leave log-probability out")
    if graph.words and (graph.record == "total" or graph.reinforces):
        raise UsageError(
            'words are of an ablation whose parts are told apart: record "sums" or "full", and leave Reinforce out'
        )
    cuts = isinstance(graph.replacement, KnockOut | ZeroValues)
    if "edge_attention" in graph.also and not (cuts and graph.heads_only):
        raise UsageError("edge_attention is that of one head along the edges that a KnockOut or ZeroValues cuts")
    if graph.attention and not graph.heads_only:
        raise UsageError("attention is that of one head: let each entry of ablate be a head, or leave it out")
    if "falling_neuron" in graph.also and graph.neurons is None:
        raise UsageError('also="falling_neuron" is of a recorded MLP: say whose neurons, neurons=LAYER')
    if "shuffled_target" in graph.also and graph.reinforces:
        raise UsageError("a shuffled target is a null of what ablation does: leave it out of reinforced heads")
    if "shuffled_target" in graph.also and graph.neurons is not None:
        sites = (site for case in graph.ablate for site in case)
        if strange := next((site for site in sites if not isinstance(site, Head | Attention)), None):
            raise UsageError(f"{strange.label}: neurons under a shuffled target are recorded of ablated heads alone")
    for distance in graph.attention:
        if not isinstance(distance, int) or distance < 0:
            raise UsageError(
                f"attention to distance {distance!r}: give whole numbers of tokens back, from 0 on"
            )
    for site in (site for case in graph.ablate for site in case):
        moved = range(site.layer, site.stop) if isinstance(site, Recomposed) else ()
        if moved and graph.record == "full":
            raise UsageError(f'{site.label}: components are not followed into layers that move; record "sums"')
        if "stream_distance" in graph.also and not isinstance(site, Whole):
            raise UsageError(f"{site.label}: stream_distance is of whole layers; leave it out, or ablate these")
        if "routing" in graph.also and isinstance(site, Whole):
            raise UsageError(f"{site.label}: routing is not followed into whole layers; ablate parts of them")
        if graph.neurons in moved or (isinstance(site, Mlp) and site.layer == graph.neurons):
            raise UsageError(
                f"{site.label} leaves layer {graph.neurons} no neurons to record: choose another layer's"
            )


def _unrouted(graph: Graph, structure: Any) -> str | None:
    """Why a model of this structure has not the mixtures of experts that a graph looks at, or None."""
    frozen = sorted(site for site in graph.freeze if isinstance(site, Routing))
    if not frozen and "routing" not in graph.also:
        return None
    if not structure.routed:
        return "routing is that of a mixture of experts, and the model has none"
    there = ", ".join(map(str, structure.routed))
    lacking = [site.label for site in frozen if site.layer not in structure.routed]
    return f"{lacking[0]}: no mixture of experts is in that layer, but in {there}" if lacking else None


def _said(value: Any) -> str:
    """A field's value in words that are the same in every process."""
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, FunctionType) else repr(value)
