"""What a store says of itself, twice: attributes and the arrays' metadata; and which of the two is right."""

import json
from collections.abc import Mapping
from typing import Any

from selfrepair_nn.files import FIRST, digest

FORMATS = (1, 2)
"""1: chunks that hold nothing but blanks are left out, and nothing is checksummed."""

NOTES = "checksums"
ABOUT = "Checksums of the files of each block of prompts, and a copy of the attributes, as they were written."
FIXED, COPY = f"{NOTES}/fixed.json", f"{NOTES}/attributes.json"
ROOT = FIRST
NOTES_GROUP = {"attributes": {"description": ABOUT}, "zarr_format": 3, "node_type": "group"}

NUMBERS = ("prompts_per_chunk", "n_layers", "n_heads", "kept_share", "tokens_per_pass", "rows")
TEXTS = ("recipe", "model", "target", "ablation", "value_bias", "freeze", "dtype", "created", "history", "finished")
NESTED = ("settings", "provenance")
"""What attributes hold that are read again: numbers, texts, and objects as JSON."""

INLINE = {"kind": "inline", "must_understand": False}
"""How zarr says that a group's own file repeats what is said of its members."""

LOST = "attributes"
"""What is damaged where an attribute is, and nothing else says what it was."""


def ranked(attributes: Mapping[str, Any]) -> bool:
    """Whether a store's thresholds were known before anything was ablated, from direct effects of all of its tokens."""
    try:
        settings = json.loads(attributes.get("settings", "{}"))
    except (TypeError, ValueError, RecursionError):
        return False
    return settings.get("select") == "top-share" or settings.get("until_ci") is not None


def described(attributes: dict[str, Any], members: dict[str, Any]) -> dict[str, Any]:
    """What a store's own file says."""
    inner = {"consolidated_metadata": INLINE | {"metadata": members}}
    return {"attributes": attributes, "zarr_format": 3} | inner | {"node_type": "group"}


def understood(root: Any) -> dict[str, Any] | None:
    """A store's own file, if that is what it is."""
    try:
        attributes, members = root["attributes"], root["consolidated_metadata"]["metadata"]
        exact = root == described(attributes, members) and _mentions_notes(members)
        return root if exact or attributes["format"] == 1 else None
    except (TypeError, KeyError, AttributeError):
        return None


def _mentions_notes(members: dict[str, Any]) -> bool:
    inner = {"consolidated_metadata": INLINE | {"metadata": {}}}
    return members.get(NOTES, NOTES_GROUP) in (NOTES_GROUP, NOTES_GROUP | inner)


def listed(root: dict[str, Any] | None) -> dict[str, Any]:
    """The arrays' metadata as the group's own file repeats them."""
    members = root["consolidated_metadata"]["metadata"] if root else {}
    return {name: each for name, each in members.items() if name != NOTES}


def attributes_of(root: dict[str, Any] | None, copy: Any) -> dict[str, Any] | None:
    """The right attributes; None where nothing tells them."""
    if root is not None and (copy is None or same(root["attributes"], copy)):
        return root["attributes"]
    return copy and copy["now"]


def same(attributes: dict[str, Any], copy: Any) -> bool:
    """Whether attributes are those that were written: others may have been added since."""
    return copy is None or any(each and each.items() <= attributes.items() for each in copy.values())


def harm(root: dict[str, Any] | None, attributes: dict[str, Any]) -> str:
    """What is wrong with a store's own file."""
    if root is None:
        return "missing or cut"
    wrong = [name for name, value in attributes.items() if root["attributes"].get(name) != value]
    return f"wrong about {', '.join(wrong)}"


def mistyped(attributes: dict[str, Any]) -> list[str]:
    """Names of the attributes that are not what is written under these names."""
    kinds = dict.fromkeys(NUMBERS, int | float) | dict.fromkeys((*TEXTS, *NESTED), str)
    wrong = [n for n, kind in kinds.items() if n in attributes and not isinstance(attributes[n], kind)]
    return wrong + [n for n in NESTED if isinstance(attributes.get(n), str) and not _object(attributes[n])]


def _object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def right(metadata: Any, known: int | None) -> bool:
    """Whether this is an array's metadata, as far as its checksum is known."""
    if known is not None:
        return digest(metadata) == known
    return isinstance(metadata, dict) and metadata.get("node_type") == "array" and "chunk_grid" in metadata
