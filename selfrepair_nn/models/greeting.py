"""Whose weights answer, wherever they are: what a model made of known vectors, kept as data, and how two such differ.

`tracing.first_job` makes the sums. Two models of the same weights give the same ones but for rounding; one weight that
differs shows in the part that has it. So stores of a server, whose weights cannot be read, are compared as others are.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

SAME, ROUNDED, OTHER, UNKNOWN = "same", "rounded", "other", "unknown"
PARTS = ("embedding", "mixing", "mlp", "final_norm", "unembedding")
VECTORS = 1
"""Which known vectors; another number, other vectors."""

ROUNDING = {"float64": 2**-20, "float32": 2**-20, "float16": 2**-10, "bfloat16": 2**-7}
"""What rounding makes of a part's sums, as a share of their usual size: some families' norms are float32 in float64."""

WORST, TYPICAL = 2.5, 1.25
"""How many times that one part may be off, and how many times all in the root mean square."""

EXACT = 1e-8
"""Sums are kept to nine digits: what is not further apart is equal to the last."""

FEW = 16
"""Where most layers are equal to the last digit one machine made both, on which all would be: others may lie only so
many times less apart. In 16 bits another machine, too, rounds only few sums otherwise, each by less than this."""

COARSE = 2**-11
"""In a coarser format rounding sends some tokens of a mixture to other experts: a fifth of them is left out."""

QUANTISED = 0.05
"""So much do 8 bits change, and a little less; four bits change more, and are only believed of a model that says so."""

EVEN = 20.0
"""A quantisation changes no layer so many times as much as another."""

FUSED = "fused"
"""An attention that gives no weights, of which a process without the model cannot see what it is called."""


@dataclass(frozen=True)
class Compared:
    """How two greetings differ, in words.

    `kind` is "same" (to rounding), "rounded" (the same weights in another number format, or a quantisation), "other" or
    "unknown" (they cannot be compared). `differences` are those that make other numbers, none where there are none;
    `notes` those that only round otherwise.
    """

    kind: str
    differences: list[str]
    notes: list[str]


def greeting_of(found: Mapping[str, Any], told: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The record of what `first_job` gave, as plain data.

        sums             {part: [number, …] or [layer][number, …]}, the last of each list their usual size
        computes_in      the number format of activations
        weights_in       that of weights, or the name of a quantisation; None if nobody says
        attention        what the implementation is called, or "fused": it gives no weights, and its name is hidden
        tensor_parallel  among how many processes each layer is split; None if nobody says

    `told` is what somebody else says of the last three: a server of its deployment. A quantisation has no name inside
    the model, so of the weights that is believed first.
    """
    known = "".join(chr(int(letter)) for letter in found["told"].tolist()).split()
    name, degree, held = known or (None, None, None)
    told = told or {}
    return {
        "vectors": VECTORS,
        "sums": {part: _digits(found[part].tolist()) for part in PARTS},
        "computes_in": str(found["dtype"].dtype).removeprefix("torch."),
        "weights_in": told.get("weights_in") or (held and held.removeprefix("torch.")),
        "attention": name or ("eager" if found["weights"].item() else FUSED),
        "tensor_parallel": int(degree) if degree else told.get("tensor_parallel"),
    }


def fingerprint_of(greeting: Mapping[str, Any]) -> str:
    """A short hash of the sums, to the last digit: the same for the same weights on the same kind of machine."""
    return sha256(json.dumps(greeting["sums"], sort_keys=True).encode()).hexdigest()[:16]


def compared(known: Mapping[str, Any], now: Mapping[str, Any]) -> Compared:
    """How the greeting `now` differs from the one `known`.

    """
    notes = _noted(known, now)
    if known["vectors"] != now["vectors"]:
        return Compared(UNKNOWN, [], [*notes, "the two were greeted by other versions, and cannot be compared"])
    if (sizes := [_sizes(each) for each in (known, now)]) and sizes[0] != sizes[1]:
        return Compared(OTHER, [f"another model: {_size_said(sizes[0])} there, {_size_said(sizes[1])} here"], notes)
    apart = _apart(known, now)
    formats = _formats(known, now)
    changed = _changed(apart, known, now)
    if not changed:
        worst = max(apart.values())
        last = [f"sums of known products differ in their last digits (by up to {worst:.1g}), as rounding does"]
        return Compared(ROUNDED if formats else SAME, formats, notes + (last if worst > EXACT else []))
    how = _as_rounding(apart, changed, known, now)
    listed = f"{_listed(changed)}, by up to {_percent(max(changed.values()))}"
    if how:
        return Compared(ROUNDED, [*formats, f"{how}: {listed}"], notes)
    return Compared(OTHER, [*formats, f"other weights: {listed}"], notes)


def described(greeting: Mapping[str, Any]) -> str:
    """What a greeting says of a model, in a line."""
    return (
        f"weights {weights_said(greeting)}, computes in {greeting['computes_in']}, attention "
        f"{attention_said(greeting)}, {split_said(greeting)}, fingerprint of sums {fingerprint_of(greeting)}"
    )


def weights_said(greeting: Mapping[str, Any]) -> str:
    """What weights are held in."""
    return f"in {greeting['weights_in'] or 'a format that is not told'}"


def attention_said(greeting: Mapping[str, Any]) -> str:
    """What attention is called, or what is known of it."""
    return greeting["attention"] if greeting["attention"] != FUSED else "fused (sdpa or flash: it gives no weights)"


def split_said(greeting: Mapping[str, Any]) -> str:
    """Among how many processes each layer is split."""
    degree = greeting["tensor_parallel"]
    said = {None: "whether layers are split among processes is not told", 1: "layers are not split (tensor parallel 1)"}
    return said.get(degree) or f"each layer is split among {degree} processes (tensor parallel {degree})"


def _digits(values: Any) -> Any:
    return [_digits(each) for each in values] if isinstance(values, list) else float(f"{values:.9g}")


def _sizes(greeting: Mapping[str, Any]) -> tuple[int, int]:
    return len(greeting["sums"]["mlp"]), len(greeting["sums"]["embedding"]) - 1


def _size_said(sizes: tuple[int, int]) -> str:
    return f"{sizes[0]} layers ({sizes[1]} vectors)"


def _noted(known: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is otherwise and only rounds otherwise."""
    said = []
    if not _same_attention(known, now):
        said.append(f"attention is {known['attention']} there, {now['attention']} here")
    degrees = known["tensor_parallel"], now["tensor_parallel"]
    if None not in degrees and degrees[0] != degrees[1]:
        said.append(f"layers are split among {degrees[0]} processes there, {degrees[1]} here")
    return said


def _same_attention(known: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether attention may be the same: of some it is only known that it gives no weights."""
    names = {known["attention"], now["attention"]}
    return len(names) == 1 or (FUSED in names and "eager" not in names)


def _formats(known: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    said = {"computes_in": "it computes in {}", "weights_in": "weights are in {}"}
    return [
        f"{text.format(known[name])} there, {now[name]} here"
        for name, text in said.items()
        if known[name] != now[name] and None not in (known[name], now[name])
    ]


def _apart(known: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
    """How far each part's sums lie apart, as a share of their usual size: {what it is called: share}."""
    tolerant = "mlp" if _rounding(known, now) > COARSE else None
    found = {}
    for part in PARTS:
        before, after = (np.atleast_2d(np.array(each["sums"][part], float)) for each in (known, now))
        size = np.maximum(before[:, -1], after[:, -1])
        off = np.sort(np.square(before - after)[:, :-1], axis=1)
        kept = off[:, : -(-off.shape[1] * 4 // 5)] if part == tolerant else off
        for layer, share in enumerate(np.sqrt(kept.mean(1)) / np.where(size > 0, size, 1)):
            found[_called(part, layer)] = float(share)
    return found


def _called(part: str, layer: int) -> str:
    names = {"mixing": f"the attention of layer {layer}", "mlp": f"the MLP of layer {layer}"}
    return names.get(part, f"the {part.replace('_', ' ')}")


def _rounding(known: Mapping[str, Any], now: Mapping[str, Any]) -> float:
    """That of the coarsest format that is not the same before and after, or that is computed in."""
    formats = {known["computes_in"], now["computes_in"]} | ({known["weights_in"]} ^ {now["weights_in"]})
    return max(ROUNDING.get(each, 0.0) for each in formats)


def _changed(apart: Mapping[str, float], known: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
    """The parts that differ by more than rounding."""
    limit = _rounding(known, now)
    if _typical(apart) > TYPICAL * limit:
        return {name: share for name, share in apart.items() if share > limit / WORST}
    alike = not _noted(known, now) and known["computes_in"] == now["computes_in"]
    found = {}
    for group in ("the attention of layer", "the MLP of layer", ""):
        parts = {name: share for name, share in apart.items() if name.startswith(group) and name not in found}
        exact = sum(share <= EXACT for share in parts.values()) > len(parts) / 2
        most = limit / FEW if alike and exact and group else WORST * limit
        found |= {name: share if share > most else 0.0 for name, share in parts.items()}
    return {name: share for name, share in found.items() if share}


def _as_rounding(
    apart: Mapping[str, float], changed: Mapping[str, float], known: Mapping[str, Any], now: Mapping[str, Any]
) -> str | None:
    """What kind of rounding of the same weights makes such differences; None if none does."""
    layers = [share for name, share in apart.items() if " of layer " in name]
    ends = [name for name in apart if " of layer " not in name]
    if not layers or min(layers) <= _rounding(known, now) / WORST or max(layers) > EVEN * min(layers):
        return None
    typical, worst = _typical(apart), max(apart.values())
    for name in ("float16", "bfloat16"):
        if {*ends} <= changed.keys() and typical <= ROUNDING[name] and worst <= WORST * ROUNDING[name]:
            return f"the same weights, rounded to {name} as it seems"
    if apart["the final norm"] > EXACT:
        return None
    if typical <= ROUNDING["float16"]:
        return "the same weights, in coarser products (TF32) as it seems"
    quantised = any(each["weights_in"] not in (None, *ROUNDING) for each in (known, now))
    if typical <= QUANTISED or quantised:
        return "the same weights, quantised as it seems (an adapter in every layer may look alike)"
    return None


def _typical(apart: Mapping[str, float]) -> float:
    return float(np.sqrt(np.mean(np.square([*apart.values()]))))


def _listed(changed: Mapping[str, float]) -> str:
    some = sorted(changed, key=lambda name: -changed[name])[:3]
    return ", ".join(some) + (f" and {len(changed) - 3} more parts" if len(changed) > 3 else "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share > 0.1 else f"{100 * share:.2g} %"
