"""Arrays as part of what a graph says: they never change, and say in one line which they are."""

from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np

from selfrepair_nn.errors import UsageError
from selfrepair_nn.values import brief, several, whole


class Fixed:
    """An array that compares, and is written, by its type, shape and content: `values`, read-only."""

    def __init__(self, values: Any) -> None:
        self.values = np.array(values, order="C")
        self.values.setflags(write=False)

    @cached_property
    def sha256(self) -> str:
        """Hash of the shape and the numbers, as little-endian."""
        little = self.values.astype(self.values.dtype.newbyteorder("<"))
        return sha256(repr(little.shape).encode() + little.tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fixed) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"{self.values.dtype.name}{[*self.values.shape]} {self.sha256}"


def rows(name: str, given: Any, wanted: str, width: int | None = None) -> Fixed:
    """Whole numbers of 0 or more in a list for each prompt, of any lengths: int64 [prompt, entry], -1 for none.

    With `width`, an entry is so many of them, [prompt, entry, width].

    Raises:
        UsageError: what is given is no such thing; `wanted` says in words what is.
    """
    found = [_entries(name, row, wanted, width) for row in _listed(name, given, wanted)]
    most = max(map(len, found), default=0)
    blank = -1 if width is None else [-1] * width
    shape = (len(found), most) if width is None else (len(found), most, width)
    return Fixed(np.array([row + [blank] * (most - len(row)) for row in found], np.int64).reshape(shape))


def _entries(name: str, row: Any, wanted: str, width: int | None) -> list[Any]:
    listed = _listed(name, row, wanted)
    if width is None:
        return [whole(name, each, 0) for each in listed]
    found = [[whole(name, one, 0) for one in _listed(name, each, wanted)] for each in listed]
    for each in found:
        if len(each) != width:
            raise UsageError(f"{name} {brief(each)} is not understood: give {wanted}")
    return found


def _listed(name: str, given: Any, wanted: str) -> Sequence[Any]:
    found = several(given)
    if found is None:
        raise UsageError(f"{name} {brief(given)} is not understood: give {wanted}")
    return found
