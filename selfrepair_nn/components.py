"""Names of the places in a model: what can be ablated, frozen or recorded, and how a user writes it."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from selfrepair_nn import values
from selfrepair_nn.errors import UsageError

KINDS = ("embedding", "position_embedding", "head", "attention_bias", "mixer", "mlp")


@dataclass(frozen=True)
class _Site(metaclass=values.Declared):
    """A place in the model; each kind says how it is written. UsageError for a number that is no index."""

    kind: ClassVar[str] = ""

    @property
    def label(self) -> str:
        """How it is written: L9H6."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.type is int:
                name = f"{each.name} of {type(self).__name__}"
                object.__setattr__(self, each.name, values.whole(name, getattr(self, each.name), 0))

    def __str__(self) -> str:
        return self.label

    @property
    def entry(self) -> list[Any]:
        """It as a plain list, as a plan has it: its kind, then its numbers."""
        return [self.kind, *(getattr(self, each.name) for each in fields(self))]

    def parts(self, n_heads: int) -> "tuple[_Site, ...]":
        """The sites that the engine has for it."""
        return (self,)

    def overlaps(self, other: "_Site") -> bool:
        """Whether it is the same place as another, or one is part of the other."""
        return self == other

    def lies_in(self, structure: Any) -> bool:
        """Whether a model of this structure has it."""
        return getattr(self, "layer", 0) in range(structure.n_layers)

    def width(self, structure: Any) -> int | None:
        """How many numbers its value has at a token; None where it has no value of its own."""
        return None


def headless_in(structure: Any) -> Collection[int]:
    """The layers without heads, of which most models have none and need not speak."""
    return getattr(structure, "headless", ())


@dataclass(frozen=True, order=True)
class Head(_Site):
    """Attention head `head` of layer `layer`, both counted from 0."""

    layer: int
    head: int
    kind = "head"

    @property
    def label(self) -> str:
        return f"L{self.layer}H{self.head}"

    def overlaps(self, other: _Site) -> bool:
        return self == other or other == Attention(self.layer)

    def lies_in(self, structure: Any) -> bool:
        has_heads = super().lies_in(structure) and self.layer not in headless_in(structure)
        return has_heads and self.head in range(structure.n_heads)

    def width(self, structure: Any) -> int:
        return structure.d_head


@dataclass(frozen=True, order=True)
class Attention(_Site):
    """All attention heads of layer `layer` together; the attention's output bias stays."""

    layer: int
    kind = "attention"

    @property
    def label(self) -> str:
        return f"L{self.layer}.attention"

    def parts(self, n_heads: int) -> tuple[_Site, ...]:
        return tuple(Head(self.layer, head) for head in range(n_heads))

    def overlaps(self, other: _Site) -> bool:
        return isinstance(other, Attention | Head) and other.layer == self.layer

    def lies_in(self, structure: Any) -> bool:
        return super().lies_in(structure) and self.layer not in headless_in(structure)

    def width(self, structure: Any) -> int:
        return structure.d_head


@dataclass(frozen=True, order=True)
class Mlp(_Site):
    """The MLP of layer `layer`, its output bias included."""

    layer: int
    kind = "mlp"

    @property
    def label(self) -> str:
        return f"L{self.layer}.mlp"

    def overlaps(self, other: _Site) -> bool:
        return isinstance(other, Mlp | Neuron) and other.layer == self.layer

    def width(self, structure: Any) -> int:
        return structure.d_model


@dataclass(frozen=True, order=True)
class Neuron(_Site):
    """Neuron `neuron` of the MLP of layer `layer`: what goes into row `neuron` of its output projection."""

    layer: int
    neuron: int
    kind = "neuron"

    @property
    def label(self) -> str:
        return f"L{self.layer}N{self.neuron}"

    def overlaps(self, other: _Site) -> bool:
        return self == other or other == Mlp(self.layer)

    def lies_in(self, structure: Any) -> bool:
        return super().lies_in(structure) and self.neuron in range(structure.d_mlp)

    def width(self, structure: Any) -> int:
        return 1


@dataclass(frozen=True, order=True)
class Layers(_Site):
    """The layers from `layer` up to, not including, `stop`: everything they write."""

    layer: int
    stop: int
    kind = "layers"

    @property
    def label(self) -> str:
        one = self.stop == self.layer + 1
        return f"layer {self.layer}" if one else f"layers {self.layer}:{self.stop}"

    def lies_in(self, structure: Any) -> bool:
        return self.layer < self.stop <= structure.n_layers


@dataclass(frozen=True, order=True)
class Permuted(_Site):
    """The layers of a block in another order: each of them once, the one that runs first before the others.

    Permuted((5, 3, 4)) runs layer 5, then 3, then 4, between layers 2 and 6.
    """

    order: tuple[int, ...]
    kind = "permuted"

    def __post_init__(self) -> None:
        given: Any = self.order
        given = given.tolist() if hasattr(given, "tolist") else given
        if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping):
            raise UsageError(f"order of Permuted lists layers, such as (5, 3, 4), not {values.brief(given)}")
        order = tuple(values.whole("order of Permuted", each, 0) for each in given)
        if len(order) < 2 or sorted(order) != [*range(min(order), min(order) + len(order))]:
            raise UsageError(
                f"order {values.brief(order)} of Permuted is no block of layers: name two or more that follow on each "
                "other, each once, such as (5, 3, 4)"
            )
        object.__setattr__(self, "order", order)

    @property
    def layer(self) -> int:
        """The first layer of the block, whichever runs first."""
        return min(self.order)

    @property
    def stop(self) -> int:
        """The layer behind the block."""
        return max(self.order) + 1

    @property
    def entry(self) -> list[Any]:
        return [self.kind, [*self.order]]

    @property
    def label(self) -> str:
        if len(self.order) == 2 and self.order[0] > self.order[1]:
            return f"swap {self.layer},{self.layer + 1}"
        return f"order {','.join(map(str, self.order))}"

    def lies_in(self, structure: Any) -> bool:
        return self.stop <= structure.n_layers


def Swap(layer: int) -> Permuted:
    """Layer `layer` and the next one, to change places: Permuted((layer + 1, layer))."""
    first = values.whole("layer of Swap", layer, 0)
    return Permuted((first + 1, first))


@dataclass(frozen=True, order=True)
class Parallel(_Site):
    """The layers from `layer` up to, not including, `stop`, side by side: what they write is summed.

    Each of them reads the stream that enters the first, and none what another of them writes.
    """

    layer: int
    stop: int
    kind = "parallel"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop < self.layer + 2:
            raise UsageError(
                f"{self.label}: side by side stand two layers or more; let stop be {self.layer + 2} or more"
            )

    @property
    def label(self) -> str:
        return f"parallel {self.layer}:{self.stop}"

    def lies_in(self, structure: Any) -> bool:
        return self.stop <= structure.n_layers


@dataclass(frozen=True, order=True)
class Norm(_Site):
    """The scale of the norm before the attention or the MLP (`before`) of layer `layer`."""

    layer: int
    before: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.before not in ("attention", "mlp"):
            raise UsageError(
                f"norm before {values.brief(self.before)} is not known; choose one of attention, mlp, or FinalNorm()"
            )

    @property
    def label(self) -> str:
        return f"L{self.layer}.{self.before}_norm"

    def lies_in(self, structure: Any) -> bool:
        return super().lies_in(structure) and self.before in structure.norms


@dataclass(frozen=True, order=True)
class FinalNorm(_Site):
    """The scale of the norm before the unembedding."""

    @property
    def label(self) -> str:
        return "final_norm"


@dataclass(frozen=True, order=True)
class PostNorms(_Site):
    """The scales of all norms behind attention, in a model that has them (Gemma 2, OLMo 2 and others)."""

    @property
    def label(self) -> str:
        return "post_norms"


@dataclass(frozen=True, order=True)
class Mixers(_Site):
    """All mixers without heads, in a model that has them in some of its layers (LFM2, Jamba)."""

    @property
    def label(self) -> str:
        return "mixers"


@dataclass(frozen=True, order=True)
class Routing(_Site):
    """Which experts of the mixture in layer `layer` each token uses, and their weights."""

    layer: int

    @property
    def label(self) -> str:
        return f"L{self.layer}.routing"


_ENDLESS = re.compile(r"\d{10}")
"""A number of more digits than layers, heads or neurons have."""

Recomposed = Permuted | Parallel
"""Layers that all run, but not one after the other as they did."""
Whole = Layers | Recomposed
Ablatable = Head | Attention | Mlp | Neuron | Whole
Freezable = Head | Attention | Mlp | Routing | Mixers | Norm | PostNorms | FinalNorm


def site(label: str) -> Head | Attention | Mlp:
    """The place that a label names: "L9H6", "L9.attention" or "L9.mlp".

    Raises:
        UsageError: it is none of these.
    """
    match = re.fullmatch(r"L(\d+)(?:H(\d+)|\.(attention|mlp))", str(label))
    if not match or _ENDLESS.search(str(label)):
        raise UsageError(f"{values.brief(label)} names no place: write L9H6, L9.attention or L9.mlp")
    layer, head, part = match.groups()
    if head:
        return Head(int(layer), int(head))
    return Attention(int(layer)) if part == "attention" else Mlp(int(layer))


@dataclass(frozen=True)
class Component:
    """One term of the residual stream's sum; `layer` and `head` are -1 where they do not apply."""

    label: str
    kind: str
    layer: int = -1
    head: int = -1


def components(
    n_layers: int,
    n_heads: int,
    position_embedding: bool,
    attention_bias: bool,
    headless: Collection[int] = (),
) -> list[Component]:
    """Every component of a model, in the order of the `component` dimension: they add up to the residual stream.

    `headless` are the layers that have a mixer without heads in the attention's place.
    """
    found = [Component("embed", "embedding")]
    if position_embedding:
        found.append(Component("pos_embed", "position_embedding"))
    for layer in range(n_layers):
        if layer in headless:
            found.append(Component(f"L{layer}.mixer", "mixer", layer))
        else:
            found += [Component(Head(layer, h).label, "head", layer, h) for h in range(n_heads)]
        if attention_bias and layer not in headless:
            found.append(Component(f"L{layer}.attention_bias", "attention_bias", layer))
        found.append(Component(Mlp(layer).label, "mlp", layer))
    return found


def select_heads(
    layers: Any, heads: Any, n_layers: int, n_heads: int, headless: Collection[int] = ()
) -> tuple[Head, ...]:
    """The heads that two specifications leave, in order of layer and head.

    `layers` is a list of numbers and half-open ranges ("8:12", "0,5,-1"), a number, a range, or several of these;
    `heads` a list of "layer.head", "layer.*" or "L9H6", a Head, a pair (layer, head), or several, and what other tools
    call a head ("a9.h6", "blocks.9.attn.hook_z[6]"). Both None means every head.
    `headless` are the layers that have none, as `structure.headless` says.

    Raises:
        UsageError: a specification is misspelt, names a place the model does not have, or leaves nothing.
    """
    layers = layers if layers is None else values.layers("layers", layers)
    heads = heads if heads is None else values.heads("heads", heads)
    in_layers = set(_layers(layers, n_layers)) if layers is not None else set(range(n_layers))
    wanted = _heads(heads, n_layers, n_heads) if heads is not None else None
    for head in sorted(wanted or ()):
        if head.layer in headless:
            having = ", ".join(str(n) for n in range(n_layers) if n not in headless)
            raise UsageError(f"{head.label}: layer {head.layer} has no attention heads; layers {having} have")
    offered = [Head(layer, head) for layer in sorted(in_layers - {*headless}) for head in range(n_heads)]
    kept = [head for head in offered if wanted is None or head in wanted]
    if not kept:
        raise UsageError(f"no head is both in layers {layers!r} and in heads {heads!r}: widen one of them")
    return tuple(kept)


def layer_numbers(layers: Any, n_layers: int) -> list[int]:
    """The layers that a specification names ("0:4", a range, a list), in ascending order, each once; of None all.

    Raises:
        UsageError: it is misspelt, or names none, or one that the model does not have.
    """
    if layers is None:
        return [*range(n_layers)]
    return sorted({*_layers(values.layers("layers", layers), n_layers)})


def chosen_heads(structure: Any, options: Any) -> tuple[Head, ...]:
    """The heads that `options` choose; all of them where neither layers nor heads are chosen.

    `structure` has n_layers and n_heads and, if some of its layers have no heads, headless, as a model's has. Errors as
    in `select_heads`.
    """
    return _chosen(structure, options.layers, options.heads)


def _chosen(structure: Any, layers: Any, heads: Any) -> tuple[Head, ...]:
    return select_heads(layers, heads, structure.n_layers, structure.n_heads, headless_in(structure))


def late_heads(structure: Any, options: Any) -> tuple[Head, ...]:
    """As `chosen_heads`, but those of the last third of the layers where neither layers nor heads are chosen."""
    layers, heads = options.layers, options.heads
    if layers is None and heads is None:
        layers = f"{2 * structure.n_layers // 3}:"
    return _chosen(structure, layers, heads)


def _layers(spec: str, n_layers: int) -> list[int]:
    found: list[int] = []
    for part in _parts(spec, "layers"):
        if not re.fullmatch(r"-?\d+|(-?\d+)?:(-?\d+)?", part):
            wrong = values.brief(part)
            raise UsageError(f"layers {wrong} is not a number or a range: write for example 8:12 or 0,5,-1")
        start, colon, stop = part.partition(":")
        if colon:
            first = _bound(start, 0, n_layers, spec)
            last = _bound(stop, n_layers, n_layers, spec)
            found += range(first, last)
        else:
            found.append(_index(int(part), n_layers, "layer", part))
    if not found:
        raise UsageError(f"layers {spec!r} selects no layer: the model has layers 0 to {n_layers - 1}")
    return found


def _bound(text: str, default: int, n_layers: int, spec: str) -> int:
    value = int(text) if text else default
    value = value + n_layers if value < 0 else value
    if not 0 <= value <= n_layers:
        raise UsageError(f"layers {spec!r} goes beyond the model: it has layers 0 to {n_layers - 1}")
    return value


def _heads(spec: str, n_layers: int, n_heads: int) -> set[Head]:
    found: set[Head] = set()
    for part in _parts(spec, "heads"):
        match = re.fullmatch(r"L?(\d+)[.H](\d+|\*)", part)
        if not match:
            raise UsageError(
                f"head {values.brief(part)} is not understood: write layer.head (9.6), layer.* (10.*) or L9H6, of "
                f"layers 0 to {n_layers - 1} and heads 0 to {n_heads - 1}"
            )
        layer = _index(int(match[1]), n_layers, "layer", part)
        named = range(n_heads) if match[2] == "*" else [_index(int(match[2]), n_heads, "head", part)]
        found |= {Head(layer, h) for h in named}
    return found


def _parts(spec: str, what: str) -> list[str]:
    parts = [p.strip() for p in spec.split(",") if p.strip()]
    if not parts:
        raise UsageError(f"{what} is empty: leave it out to take all of them")
    if _ENDLESS.search(spec):
        raise UsageError(f"{what} {spec!r} goes beyond any model")
    return parts


def _index(value: int, size: int, what: str, part: str) -> int:
    resolved = value + size if value < 0 else value
    if not 0 <= resolved < size:
        raise UsageError(f"{part!r}: the model has {what}s 0 to {size - 1}")
    return resolved
