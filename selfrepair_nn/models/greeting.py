"""Whose weights answer, wherever they are: what a model made of known vectors, kept as plain data.

`tracing.first_job` makes the sums, and `models.apart` compares them: stores of a server, whose weights cannot be read,
as any others.
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

PARTS = ("embedding", "mixing", "mlp", "final_norm", "unembedding")
VECTORS = 1
"""Which known vectors; another number, other vectors."""

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
