"""What a server and its clients, and the servers of one run, should agree on: versions, and what is computed with."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from selfrepair_nn import provenance
from selfrepair_nn.models.apart import compared

COMPARED = ("python", "nnsight", "transformers", "torch")
"""What a server and its clients should agree on."""

CLOCK_SECONDS = 60.0
"""By more than this no two clocks should differ."""


def place(one: str, other: str) -> int | None:
    """The first place at which two versions differ, counted from 1; None for the same one, however it was built."""
    ours, theirs = (re.split(r"[.]", each.partition("+")[0]) for each in (one, other))
    longest = max(len(ours), len(theirs))
    pairs = zip(*(each + ["0"] * (longest - len(each)) for each in (ours, theirs)), strict=True)
    return next((n for n, (a, b) in enumerate(pairs, start=1) if a != b), None)


def versions_apart(there: Mapping[str, str]) -> Iterator[tuple[str, str, int]]:
    """Of what is compared, and is known there, what is another version here: its name, both, and the place."""
    here = provenance.versions()
    for name in COMPARED:
        if name in there and (found := place(here[name], there[name])):
            yield name, f"{there[name]} there, {here[name]} here", found


def clocks_apart(ahead: float | None) -> str | None:
    """What is to be said of a server's clock, so many seconds ahead of ours; None if it is right, or not known."""
    if ahead is None or abs(ahead) <= CLOCK_SECONDS:
        return None
    return f"{duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} this machine's"


def duration(seconds: float) -> str:
    """So many seconds, in the two units that say most: 75 s is "1 min 15 s"."""
    whole = max(0, round(seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """How two servers differ in what numbers depend on: a phrase for each; of what only one says, nothing.

    Of versions the first two places count. Where both have a greeting, `models.apart` compares them: `other` is there,
    `one` is here.
    """
    found = []
    for name in [name for name in one if name in other and name not in UNCOMPARED]:
        ours, theirs = one[name], other[name]
        if name in COMPARED and (place(str(ours), str(theirs)) or 3) >= 3:
            continue
        if ours != theirs:
            found.append(f"{name.replace('_', ' ')} {theirs}, not {ours}")
    if "greeting" in one and "greeting" in other:
        found += compared(other["greeting"], one["greeting"]).differences
    return found


UNCOMPARED = ("host", "ndif", "apart", "greeting")
"""What is known of a server that numbers do not depend on, and what is compared in its own way."""
