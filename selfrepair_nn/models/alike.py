"""Whether two stores hold the numbers of the same model, wherever each was made."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import xarray as xr

from selfrepair_nn.equations import TOLERANCE
from selfrepair_nn.errors import UsageError
from selfrepair_nn.models.apart import compared
from selfrepair_nn.models.greeting import is_greeting
from selfrepair_nn.models.identity import differences

ANYWHERE = ("kind", "configuration", "tokenizer")
"""What is known of a model on a server, too."""

BY_OTHERS = "it was changed by other hands; take a copy of before, or make the store anew"


def model_differences(known: xr.Dataset, now: xr.Dataset) -> list[str]:
    """What the models of two stores differ in, in words ("there" is the first's); empty where they are the same.

    Of two that were made where the weights are, every byte is compared. Where one was made on a server, it is what each
    model made of known vectors: the same weights give the same sums but for rounding.

    Raises:
        UsageError: a store does not say whose numbers it holds: it is of several revisions, or of an earlier version,
            or what it says makes no sense.
    """
    there, here = (recorded(ds.attrs, "identity") for ds in (known, now))
    greetings = None
    if "weights" not in there or "weights" not in here:
        greetings = recorded(known.attrs, "greeting"), recorded(now.attrs, "greeting")
    return records_differ(there, here, greetings, str(now.attrs.get("dtype", "")))


def records_differ(
    known: Mapping[str, Any],
    now: Mapping[str, Any],
    greetings: tuple[Mapping[str, Any], Mapping[str, Any]] | None,
    dtype: str,
) -> list[str]:
    """What two records of `identity` differ in, in words; by their greetings where one is of a model on a server."""
    if greetings is None:
        return differences(known, now, TOLERANCE.get(dtype, 0))
    return differences(_anywhere(known), _anywhere(now), 0) + compared(*greetings).differences


def mixed(datasets: Sequence[xr.Dataset]) -> Iterator[str]:
    """A sentence for each store that is of another model than the one before it, though of the same name."""
    for before, after in pairwise(datasets):
        name = after.attrs.get("model")
        if before.attrs.get("model") != name:
            continue
        with suppress(UsageError):
            if found := model_differences(before, after):
                paths = " and ".join(str(ds.encoding.get("source", "a store")) for ds in (before, after))
                yield f"{paths} are not of the same {name}: {'; '.join(found)}"


def recorded(attributes: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a store's attributes say of its model: its "identity", or its "greeting".

    Raises:
        UsageError: it does not say that, or what it says makes no sense.
    """
    if name not in attributes:
        raise UsageError(
            "a store does not say whose numbers it holds: it is of several revisions, or of an earlier version, or its "
            "server has not answered yet"
        )
    try:
        found = json.loads(attributes[name])
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"what a store says of its model ({name}) is no JSON: {BY_OTHERS}") from error
    if not (is_greeting(found) if name == "greeting" else isinstance(found, dict)):
        raise UsageError(f"what a store says of its model ({name}) makes no sense: {BY_OTHERS}")
    return found


def _anywhere(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that needs no weights; of attention the greeting knows more."""
    found = {name: record[name] for name in ANYWHERE if name in record}
    settings = found.get("configuration", {})
    if not isinstance(settings, Mapping):
        return found
    return found | {"configuration": {k: v for k, v in settings.items() if k != "attn_implementation"}}
