"""Paths that a user gives: places on this machine, never an address."""

import os
import re
from pathlib import Path

from selfrepair_nn.errors import UsageError

LONGEST, MOST = 255, 1000
"""Bytes of a name, and names in a path, that file systems take."""

_ADDRESS = re.compile(r"[A-Za-z][\w+.:-]+:/")
"""A scheme of two letters or more; `pathlib` leaves one of the two slashes. One letter is a drive."""


def local(path: str | os.PathLike[str], what: str = "path") -> Path:
    """The path, `~` resolved.

    Raises:
        UsageError: an address such as `s3://bucket/x.zarr`, of which a directory `s3:` would be made here; the home
            of nobody; what is no path at all.
    """
    try:
        given = os.fspath(path)
        found = Path(given).expanduser()
    except (TypeError, RuntimeError) as error:
        raise UsageError(f"{what} {path!r} is no path here: {error}") from error
    if _ADDRESS.match(given):
        other = " (or, to read one, hf://datasets/owner/name/x.zarr)" if what == "store" else ""
        raise UsageError(
            f"{what} {given!r} is an address: stores and files lie on this machine's disks, give a path{other}"
        )
    require_possible(given, what)
    return found


def require_possible(name: str, what: str) -> None:
    """UsageError for what no file can be called."""
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeEncodeError:
        raise UsageError(f"{what} {name!r} is no path: it holds half of a surrogate pair") from None
    if "\0" in name:
        raise UsageError(f"{what} {name!r} is no path: it holds a zero byte")
    if max(map(len, parts)) > LONGEST or len(parts) > MOST:
        raise UsageError(f"{what} {name[:60]!r} … is no path: its name is too long")
