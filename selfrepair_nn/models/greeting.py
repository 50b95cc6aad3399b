"""Whose weights answer, wherever they are: what a model made of known vectors, kept as plain data.

`tracing.first_job` makes the sums, and `models.apart` compares them: stores of a server, whose weights cannot be read,
as any others.
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np

PARTS = ("embedding", "mixing", "mlp", "final_norm", "unembedding")
VECTORS = 1
"""Which known vectors; another number, other vectors."""

TOLD = {
    "computes_in": str,
    "weights_in": str | None,
    "attention": str,
    "tensor_parallel": int | None,
}
"""What is told of a model beside its sums, and of which kind that is."""

FUSED = "fused"
"""An attention that gives no weights, of which a process without the model cannot see what it is called."""


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
    name, degree, held = _read(found["told"].tolist())
    told = told or {}
    return {
        "vectors": VECTORS,
        "sums": {part: _digits(found[part].tolist()) for part in PARTS},
        "computes_in": str(found["dtype"].dtype).removeprefix("torch."),
        "weights_in": told.get("weights_in") or (held and held.removeprefix("torch.")),
        "attention": name or ("eager" if found["weights"].item() else FUSED),
        "tensor_parallel": degree or told.get("tensor_parallel"),
    }


def kept(text: Any) -> dict[str, Any] | None:
    """The greeting that a store keeps as JSON; None of what is none: other hands changed it."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
    return found if is_greeting(found) else None


def is_greeting(found: Any) -> bool:
    """Whether something has all that `greeting_of` gives, each of its kind."""
    if not isinstance(found, Mapping) or not {"vectors", "sums", *TOLD} <= found.keys():
        return False
    kinds = all(isinstance(found[name], kind) for name, kind in TOLD.items())
    return kinds and isinstance(found["sums"], Mapping) and all(_are_sums(found["sums"].get(part)) for part in PARTS)


def _are_sums(values: Any) -> bool:
    try:
        found = np.atleast_2d(np.array(values, float))
    except (ValueError, TypeError, OverflowError):
        return False
    return isinstance(values, list) and found.ndim == 2 and found.shape[1] > 1 and bool(np.isfinite(found).all())


def fingerprint_of(greeting: Mapping[str, Any]) -> str:
    """A short hash of the sums, to the last digit: the same for the same weights on the same kind of machine."""
    return sha256(json.dumps(greeting["sums"], sort_keys=True).encode()).hexdigest()[:16]


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


def _read(letters: list[float]) -> tuple[str | None, int | None, str | None]:
    """Attention's name, the degree and the weights' format; of what no model says, for a server may, nothing."""
    try:
        name, degree, held = "".join(chr(int(letter)) for letter in letters).split()
        return (name, int(degree), held) if (name + held).isprintable() else (None, None, None)
    except (ValueError, OverflowError):
        return None, None, None


def _digits(values: Any) -> Any:
    return [_digits(each) for each in values] if isinstance(values, list) else float(f"{values:.9g}")
