"""How two greetings differ, in words: the same weights but for rounding, in another number format, or others.

Two models of the same weights give the same sums but for rounding; one weight that differs shows in the part that has
it. What is told of the two beside that (formats, attention, tensor parallelism) is compared as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfrepair_nn.models.greeting import FUSED, PARTS, is_greeting

SAME, ROUNDED, OTHER, UNKNOWN = "same", "rounded", "other", "unknown"

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


def compared(known: Mapping[str, Any], now: Mapping[str, Any]) -> Compared:
    """How the greeting `now` differs from the one `known` ("there"), as `models.greeting.greeting_of` gives them."""
    for greeting, where in ((known, "there"), (now, "here")):
        if not is_greeting(greeting):
            return Compared(UNKNOWN, [], [f"what is said of the model {where} makes no sense, and cannot be compared"])
    notes = _noted(known, now)
    if known["vectors"] != now["vectors"]:
        return Compared(UNKNOWN, [], [*notes, "the two were greeted by other versions, and cannot be compared"])
    there, here = _size(known), _size(now)
    if there != here:
        return Compared(OTHER, [f"another model: {there} there, {here} here"], notes)
    if others := [part for part in PARTS if np.shape(known["sums"][part]) != np.shape(now["sums"][part])]:
        return Compared(OTHER, [f"another model: it has other numbers of sums ({', '.join(others)})"], notes)
    apart, formats = _apart(known, now), _formats(known, now)
    changed, worst = _changed(apart, known, now), max(apart.values())
    if not changed and worst > EXACT:
        notes.append(f"sums of known products differ in their last digits (by up to {worst:.1g}), as rounding does")
    if not changed:
        return Compared(ROUNDED if formats else SAME, formats, notes)
    how = _as_rounding(apart, changed, known, now)
    listed = f"{_listed(changed)}, by up to {_percent(max(changed.values()))}"
    if how:
        return Compared(ROUNDED, [*formats, f"{how}: {listed}"], notes)
    return Compared(OTHER, [*formats, f"other weights: {listed}"], notes)


def _size(greeting: Mapping[str, Any]) -> str:
    sums = greeting["sums"]
    return f"{len(sums['mlp'])} layers ({len(sums['embedding']) - 1} vectors)"


def _noted(known: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is otherwise and only rounds otherwise."""
    said = []
    if not _same_attention(known, now):
        said.append(f"attention is {known['attention']} there, {now['attention']} here")
    degrees = known["tensor_parallel"], now["tensor_parallel"]
    if None not in degrees and degrees[0] != degrees[1]:
        said.append(f"tensor parallelism is {degrees[0]} there, {degrees[1]} here")
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
    """The parts that differ by more than rounding: some by much, or else all by a little too much."""
    limit, found = _rounding(known, now), {}
    alike = not _noted(known, now) and known["computes_in"] == now["computes_in"]
    for kind in ("the attention of layer", "the MLP of layer", "the "):
        parts = {name: share for name, share in apart.items() if name.startswith(kind) and name not in found}
        exact = sum(share <= EXACT for share in parts.values()) > len(parts) / 2
        most = limit / FEW if alike and exact and "layer" in kind else WORST * limit
        found |= {name: share if share > most else 0.0 for name, share in parts.items()}
    changed = {name: share for name, share in found.items() if share}
    if not changed and _typical(apart) > TYPICAL * limit:
        return {name: share for name, share in apart.items() if share > limit / WORST}
    return changed


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
    if apart["the final norm"] > WORST * _rounding(known, now):
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
