"""An experiment as data: what is ablated, by what it is replaced, what is frozen, what is recorded."""

from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Any

from selfrepair_nn.components import FinalNorm, Head, Mlp, Site
from selfrepair_nn.errors import UsageError

REPLACEMENTS = {
    "resample": "the same head's z at the same position of the prompt's partner",
    "mean": "the head's mean z over all positions of the reference prompts",
    "zero": "zero (the value bias stays where value_bias is 'output')",
    "identity": "what was there: the null control",
}
TARGETS = {
    "centred": "the unembedding row of the next token minus the mean row of the vocabulary",
    "raw": "the unembedding row of the next token",
}
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
class Graph:
    """One experiment, or a sweep of them: each entry of `ablate` is one ablated run, its sites replaced together.

    `freeze` holds the sites that keep their clean value; a site that a run ablates is never frozen in that run.

        Graph(ablate=sweep(heads))                        every head by itself, resample ablated
        Graph(ablate=((Head(9, 6), Head(9, 9)),))         two heads at once
        graph.frozen("downstream")                        nothing but the final norm may react

    Raises:
        UsageError: an unknown replacement, target, value_bias or record.
    """

    ablate: tuple[tuple[Head, ...], ...]
    replacement: str = "resample"
    freeze: frozenset[Site] = frozenset()
    record: str = "sums"
    target: str = "centred"
    value_bias: str = "output"

    def __post_init__(self) -> None:
        one_of("ablation", self.replacement, REPLACEMENTS)
        one_of("target", self.target, TARGETS)
        one_of("value_bias", self.value_bias, VALUE_BIASES)
        one_of("record", self.record, RECORDS)

    @property
    def digest(self) -> str:
        """A hash of everything it says: two graphs with the same digest do the same."""
        others = [repr(getattr(self, f.name)) for f in fields(self) if f.name != "freeze"]
        return sha256(repr([sorted(map(repr, self.freeze)), *others]).encode()).hexdigest()[:16]

    def beyond(self, n_layers: int, n_heads: int) -> str | None:
        """The label of a site that a model of this size does not have, or None."""
        sites = [*(site for case in self.ablate for site in case), *sorted(self.freeze, key=str)]
        for site in sites:
            if getattr(site, "layer", 0) not in range(n_layers) or getattr(site, "head", 0) not in range(
                n_heads
            ):
                return site.label
        return None

    def frozen(self, name: str, n_layers: int, n_heads: int) -> "Graph":
        """This graph with a named set of frozen sites: "none", "downstream" or "all"."""
        return replace(self, freeze=freeze_set(name, n_layers, n_heads))

    def plan(self, structure: dict[str, Any]) -> dict[str, Any]:
        """The graph as the plain dict that travels with a job; `structure` is a Structure as a dict."""
        frozen_heads: dict[int, list[int]] = {}
        for site in sorted(s for s in self.freeze if isinstance(s, Head)):
            frozen_heads.setdefault(site.layer, []).append(site.head)
        return {
            "model": structure,
            "cases": [[[h.layer, h.head] for h in case] for case in self.ablate],
            "replacement": self.replacement,
            "frozen_heads": frozen_heads,
            "frozen_mlps": sorted(s.layer for s in self.freeze if isinstance(s, Mlp)),
            "frozen_norm": FinalNorm() in self.freeze,
            "record": self.record,
            "target": self.target,
            "value_bias": self.value_bias,
            "attention_bias": writes_attention_bias(structure, self.value_bias),
        }


def sweep(heads: tuple[Head, ...]) -> tuple[tuple[Head, ...], ...]:
    """Each head ablated by itself."""
    return tuple((head,) for head in heads)


def freeze_set(name: str, n_layers: int, n_heads: int) -> frozenset[Site]:
    """The sites behind "none", "downstream" or "all"."""
    one_of("freeze", name, FREEZES)
    if name == "none":
        return frozenset()
    sites: set[Site] = {Head(layer, h) for layer in range(n_layers) for h in range(n_heads)}
    sites |= {Mlp(layer) for layer in range(n_layers)}
    return frozenset(sites | {FinalNorm()} if name == "all" else sites)


def writes_attention_bias(structure: dict[str, Any], value_bias: str) -> bool:
    """Whether the attention's output bias is a component: it has one, or it takes in the heads' constant part."""
    return structure["attention_bias"] or (value_bias == "output" and structure["value_bias"])


def one_of(what: str, value: str, valid: dict[str, str]) -> None:
    """Raise UsageError unless `value` is one of the names of `valid`."""
    if value not in valid:
        raise UsageError(f"{what} {value!r} is not known; choose one of {', '.join(valid)}")
