"""An experiment as data: what is ablated, by what it is replaced, what is frozen, what is recorded."""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields, replace
from hashlib import sha256
from typing import Any

from selfrepair_nn.components import (
    Ablatable,
    Attention,
    FinalNorm,
    Freezable,
    Head,
    Layers,
    Mlp,
    Neuron,
    Norm,
    Swap,
)
from selfrepair_nn.errors import UsageError
from selfrepair_nn.variables import RANKS

REPLACEMENTS = {
    "resample": "the same site's value at the same position of the prompt's partner",
    "mean": "the site's mean value over all positions of the reference prompts",
    "zero": "zero (the value bias stays where value_bias is 'output')",
    "identity": "what was there: the null control",
}
"""What a command line can ask for; a recipe may also use the prompts' twins, another head, or a number."""

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
    "downstream": "every other head and MLP keeps its clean value; the final norm is live",
    "all": "the final norm's scale too",
}
RECORDS = {"sums": "heads, MLPs and norm", "full": "every component by itself"}


@dataclass(frozen=True)
class Scale:
    """Replacement: the site's own clean value times `factor`."""

    factor: float


@dataclass(frozen=True)
class Constant:
    """Replacement: `value` in every entry."""

    value: float


@dataclass(frozen=True)
class OtherHead:
    """Replacement: what another head of the same prompt reads out at the same position."""

    head: Head


@dataclass(frozen=True)
class Reinforce:
    """Not a replacement: `scale` times the head's own write is added to the stream that its layer reads.

    It is added at one position of each prompt, the store's `edited_position`.
    """

    scale: float


Replacement = str | Scale | Constant | OtherHead | Reinforce


@dataclass(frozen=True)
class Graph:
    """One experiment, or a sweep of them: each entry of `ablate` is one ablated run, its sites replaced together.

    `freeze` holds the sites that keep their clean value; a site that a run ablates is never frozen in that run.
    `neurons` is the layer whose MLP is recorded neuron by neuron; `residual_norm` records the length of the residual
    stream; `attention` lists distances: the attention each head pays to the token so far back is recorded.

        Graph(ablate=sweep(heads))                        every head by itself, resample ablated
        Graph(ablate=((Head(9, 6), Head(9, 9)),))         two heads at once
        Graph(ablate=sweep((Layers(3, 4),)), replacement="zero")    layer 3 deleted
        graph.frozen("downstream")                        nothing but the final norm may react
        graph.path((Mlp(11),))                            only what MLP 11 makes of it may react

    Raises:
        UsageError: an unknown replacement, target, value_bias or record, or sites that do not go with them.
    """

    ablate: tuple[tuple[Ablatable, ...], ...]
    replacement: Replacement = "resample"
    freeze: frozenset[Freezable] = frozenset()
    record: str = "sums"
    target: str = "centred"
    value_bias: str = "output"
    neurons: int | None = None
    residual_norm: bool = False
    attention: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.replacement, str):
            one_of("ablation", self.replacement, REPLACEMENTS | {"twin": ""})
        one_of("target", self.target, TARGETS | {"difference": ""})
        one_of("value_bias", self.value_bias, VALUE_BIASES)
        one_of("record", self.record, RECORDS)
        for case in self.ablate:
            _require_possible(case, self.replacement)

    @property
    def ablation(self) -> str:
        """The replacement, as one word."""
        r = self.replacement
        if isinstance(r, str):
            return r
        return "_".join([type(r).__name__.lower(), *(str(v) for v in vars(r).values())])

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
        others = [repr(getattr(self, f.name)) for f in fields(self) if f.name != "freeze"]
        return sha256(repr([sorted(map(repr, self.freeze)), *others]).encode()).hexdigest()[:16]

    def beyond(self, n_layers: int, n_heads: int) -> str | None:
        """The label of a site that a model of this size does not have, or None."""
        sites = [*(site for case in self.ablate for site in case), *sorted(self.freeze, key=str)]
        sites += [Mlp(self.neurons)] if self.neurons is not None else []
        for site in sites:
            last = (
                site.stop - 1
                if isinstance(site, Layers)
                else getattr(site, "layer", 0) + isinstance(site, Swap)
            )
            inside = 0 <= getattr(site, "layer", 0) <= last < n_layers
            if not inside or getattr(site, "head", 0) not in range(n_heads):
                return site.label
        return None

    def frozen(self, name: str, n_layers: int, n_heads: int) -> "Graph":
        """This graph with a named set of frozen sites: "none", "downstream" or "all"."""
        return replace(self, freeze=freeze_set(name, n_layers, n_heads))

    def freezing(self, sites: Iterable[Freezable]) -> "Graph":
        """This graph with these sites frozen too."""
        return replace(self, freeze=self.freeze | frozenset(sites))

    def path(self, receivers: Iterable[Head | Attention | Mlp], n_layers: int, n_heads: int) -> "Graph":
        """This graph with every head and MLP frozen but the receivers: path patching. The final norm stays live.

        Raises:
            UsageError: a receiver that is no head or MLP of a model of this size.
        """
        live = {part for site in receivers for part in _expanded(site, n_heads)}
        parts = freeze_set("downstream", n_layers, n_heads)
        if beyond := ", ".join(sorted(map(str, live - parts))):
            raise UsageError(
                f"{beyond}: receivers are heads and MLPs of {n_layers} layers of {n_heads} heads"
            )
        return replace(self, freeze=parts - live)

    def plan(self, structure: dict[str, Any]) -> dict[str, Any]:
        """The graph as the plain dict that travels with a job; `structure` is a Structure as a dict."""
        n_heads = structure["n_heads"]
        frozen = {site for s in self.freeze for site in _expanded(s, n_heads)}
        frozen_heads: dict[int, list[int]] = {}
        for site in sorted(s for s in frozen if isinstance(s, Head)):
            frozen_heads.setdefault(site.layer, []).append(site.head)
        return {
            "model": structure,
            "cases": [[_entry(s) for site in case for s in _expanded(site, n_heads)] for case in self.ablate],
            "replacement": _kind(self.replacement),
            "frozen_heads": frozen_heads,
            "frozen_mlps": sorted(s.layer for s in frozen if isinstance(s, Mlp)),
            "frozen_norms": sorted([s.layer, s.before] for s in frozen if isinstance(s, Norm)),
            "frozen_norm": FinalNorm() in frozen,
            "record": self.record,
            "neurons": self.neurons,
            "ranks": RANKS,
            "residual_norm": self.residual_norm,
            "attention": list(self.attention),
            "target": self.target,
            "value_bias": self.value_bias,
            "attention_bias": writes_attention_bias(structure, self.value_bias),
        }


@dataclass(frozen=True)
class Variants:
    """Graphs that ablate the same sites in different ways, side by side along one labelled axis of the store."""

    axis: str
    graphs: Mapping[Any, Graph]

    def __post_init__(self) -> None:
        first = next(iter(self.graphs.values()), None)
        if first is None:
            raise UsageError(f"variants along {self.axis!r} need at least one graph")
        for label, graph in self.graphs.items():
            for name in ("ablate", "record", "neurons", "residual_norm", "attention", "target", "value_bias"):
                if getattr(graph, name) != getattr(first, name):
                    raise UsageError(f"variants along {self.axis!r} must share {name}: {label!r} does not")


def sweep(sites: Iterable[Ablatable]) -> tuple[tuple[Ablatable, ...], ...]:
    """Each site ablated by itself."""
    return tuple((site,) for site in sites)


def freeze_set(name: str, n_layers: int, n_heads: int) -> frozenset[Freezable]:
    """The sites behind "none", "downstream" or "all"."""
    one_of("freeze", name, FREEZES)
    if name == "none":
        return frozenset()
    sites: set[Freezable] = {Head(layer, h) for layer in range(n_layers) for h in range(n_heads)}
    sites |= {Mlp(layer) for layer in range(n_layers)}
    return frozenset(sites | {FinalNorm()} if name == "all" else sites)


def writes_attention_bias(structure: dict[str, Any], value_bias: str) -> bool:
    """Whether the attention's output bias is a component: it has one, or it takes in the heads' constant part."""
    return structure["attention_bias"] or (value_bias == "output" and structure["value_bias"])


def one_of(what: str, value: str, valid: Mapping[str, str]) -> None:
    """Raise UsageError unless `value` is one of the names of `valid`."""
    if value not in valid:
        raise UsageError(f"{what} {value!r} is not known; choose one of {', '.join(valid)}")


def _require_possible(case: tuple[Ablatable, ...], replacement: Replacement) -> None:
    """Whole layers are deleted or swapped, alone; only heads take another head's place or reinforce themselves."""
    for site in case:
        if isinstance(site, Layers | Swap) and (len(case) > 1 or replacement != "zero"):
            raise UsageError(f'{site.label}: whole layers are ablated alone and with replacement "zero"')
        if isinstance(replacement, OtherHead | Reinforce) and not isinstance(site, Head | Attention):
            raise UsageError(f"{site.label}: {type(replacement).__name__} is for heads")
    if isinstance(replacement, Reinforce) and len(case) > 1:
        raise UsageError("Reinforce is for one head at a time")


def _expanded(site: Any, n_heads: int) -> tuple[Any, ...]:
    return tuple(Head(site.layer, h) for h in range(n_heads)) if isinstance(site, Attention) else (site,)


def _entry(site: Ablatable) -> list[Any]:
    """A site as a plain list: its kind, then its numbers."""
    kinds = {Head: "head", Mlp: "mlp", Neuron: "neuron", Layers: "layers", Swap: "swap"}
    return [kinds[type(site)], *astuple(site)]


def _kind(replacement: Replacement) -> dict[str, Any]:
    """A replacement as a plain dict."""
    if isinstance(replacement, str):
        return {"kind": replacement}
    if isinstance(replacement, OtherHead):
        return {"kind": "other_head", "site": _entry(replacement.head)}
    return {"kind": type(replacement).__name__.lower()} | vars(replacement)
