"""Is a store whole? Counted when it is opened, by its files' names and checksums; verified by reading every byte."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.contents import Contents, Damage, Marks, attempted, notes_of
from selfrepair_nn.description import FIXED
from selfrepair_nn.description import ranked as is_ranked
from selfrepair_nn.errors import StoreError
from selfrepair_nn.files import SEAL, flaw, misplaced
from selfrepair_nn.hub import at_hand
from selfrepair_nn.unchecked import unreadable

SHOWN = 3
"""How many damaged files an error names."""

Look = Callable[[Path, Any], str | None]
Required = tuple[str, int | None, str, Any]
"""Array, block, file, and the checksums that it may end in, None if not known; or no array, and notes themselves."""


def verify(path: str | Path) -> list[Damage]:
    """Every file of a store that is missing or damaged, by reading all of them; empty if it is whole.

    What is not done yet is not damage. A store of format 1 has no checksums: its chunks are decoded, and searched for
    blanks where it says that something is done.

    Raises:
        UsageError: an address such as s3://bucket/x.zarr.
        StoreError: there is nothing, or something else, at `path`.
    """
    return inspected(contents_of(at_hand(path)), _read)


def count(path: Path) -> list[Damage]:
    """What `verify` lists, as far as small files tell it, and large ones by being there and by what they end in."""
    return inspected(contents_of(path), _glance)


def contents_of(path: Path) -> Contents:
    """What is at `path`; StoreError unless that is a store of this package."""
    if not path.exists():
        raise StoreError(f"there is no store at {str(path)!r}")
    found = Contents.of(path)
    if found is None:
        cut = " (or its zarr.json is damaged)" if (path / "zarr.json").exists() else ""
        raise StoreError(f"{str(path)!r} is not a store of selfrepair_nn{cut}: choose another path")
    return found


def require_whole(path: Path, damage: Iterable[Damage]) -> None:
    """Raise StoreError, naming what is damaged and the remedy, if anything is."""
    damage = list(damage)
    if damage:
        raise StoreError(
            f"{str(path)!r} is not whole: {named(damage)}. Run the command that made it again: it computes that "
            f"anew; `selfrepair verify {path}` lists all that is damaged"
        )


def named(damage: Sequence[Damage]) -> str:
    """What is damaged, in words: the first few files and how many more."""
    more = f" and {len(damage) - SHOWN} more" if len(damage) > SHOWN else ""
    return "; ".join(map(str, damage[:SHOWN])) + more


def require_source(ds: xr.Dataset) -> None:
    """Raise StoreError if the store that `ds` was read from, in whatever way, is not whole.

    What `open_store` opened was counted then, and is checked as it is read; of anything else every file is read here.
    Where `ds` comes from no store, or another one is there by now, nothing is known.
    """
    source, known = ds.encoding.get("source"), identity(ds.attrs)
    if source is None or known is None or ds.encoding.get("checked"):
        return
    found = Contents.of(Path(source))
    if found is not None and identity(found.attributes) == known:
        require_whole(Path(source), inspected(found, _read))


def identity(attributes: Mapping[str, Any]) -> Any:
    """What tells a store from any other."""
    return attributes.get("id", attributes.get("created"))


def inspected(contents: Contents, look: Look) -> list[Damage]:
    """What is wrong with the description of a store, and with every file there must be."""
    found = list(contents.damage)
    if "done" not in contents.metadata:
        return found
    if contents.format == 1:
        return found + [*unreadable(contents, deep=look is _read), *_undone(contents)]
    for array, block, file, noted in _required(contents):
        path, near = contents.path / file, _read if block is None else look
        what = near(path, noted) if array else _lost(path, noted)
        if what and array:  # it may have been written since its notes were read
            what = near(path, _accepted(contents.noted(block), file))
        if what:
            found.append(Damage(file, what, array, block))
    lost = {each.file for each in found}
    return found + [each for each in _undone(contents) if each.file not in lost]


class Checks:
    """Is asked of every chunk that is read of a store; raises StoreError for what is not as it was written."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._expected = {  # tuples of numbers: there may be many, and the garbage collector need not follow them
            file: (block, None if noted is None else tuple(noted))
            for array, block, file, noted in (_required(contents) if contents.format > 1 else ())
            if array
        }

    def __call__(self, key: str, data: bytes | None) -> None:
        if self._contents.format == 1 or (data is None and key not in self._expected):
            return
        where, noted = self._expected.get(key, (None, None))
        found = flaw(data, noted)
        if found and noted is not None:  # it may have been written since
            found = flaw(data, _accepted(self._contents.noted(where), key))
        if found:
            require_whole(self._contents.path, [Damage(key, found)])


def _required(contents: Contents) -> Iterator[Required]:
    """All that there must be."""
    noted = contents.noted()
    yield "", None, FIXED, noted
    for each in contents.fixed:
        for file in each.files():
            yield each.name, None, file, _accepted(noted, file)
    ranked, marks = _ranked(contents), Marks(contents)
    early = {"direct_effect"} if is_ranked(contents.attributes) else set()
    for block in range(contents.blocks):
        mark = contents.mark(block)
        marked = marks.block(block) if (contents.path / mark).exists() else None
        own = contents.noted(block)  # after the mark, which is written after its notes
        begun = marked is not None and marked.any()
        if begun or ranked:
            yield "", block, notes_of(block), own
        yield "done", block, mark, (own or {}).get(mark)
        for name, file in contents.block_files(block):
            known = begun or (ranked and name == "direct_effect")
            if known or ((marked is None or name in early) and (contents.path / file).exists()):
                yield name, block, file, _accepted(own, file)


def _accepted(noted: dict[str, list[int]] | None, file: str) -> Any:
    return None if noted is None else noted.get(file, ())


def _ranked(contents: Contents) -> bool:
    """Whether the direct effects of all prompts must be there: the top shares are known from them."""
    if not is_ranked(contents.attributes):
        return False
    limits, selected = attempted(contents, "threshold"), attempted(contents, "selected")
    known = [] if limits is None or selected is None else limits[selected]
    return len(known) > 0 and not np.isnan(known).any()


def _undone(contents: Contents) -> Iterator[Damage]:
    """Marks that a finished run has and this one has not."""
    selected = attempted(contents, "selected")
    if not _finished_whole(contents.attributes) or selected is None:
        return
    marks = Marks(contents)
    for block in range(contents.blocks):
        marked = marks.block(block)
        if marked is not None and not marked[selected].all():
            yield Damage(contents.mark(block), "not done in a finished run", "done", block)


def _finished_whole(attributes: dict[str, Any]) -> bool:
    """Whether a run has ended that ends when everything is done."""
    try:
        return "finished" in attributes and json.loads(attributes["settings"])["until_ci"] is None
    except (KeyError, TypeError, ValueError):
        return False


def _glance(path: Path, noted: Iterable[int] | None) -> str | None:
    """What is wrong with a file, by its last bytes."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - SEAL))
            return misplaced(int.from_bytes(file.read(), "little"), noted) if size > SEAL else "cut short"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return "missing"


def _read(path: Path, noted: Iterable[int] | None) -> str | None:
    """What is wrong with a file, by all of its bytes."""
    try:
        return flaw(path.read_bytes(), noted)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return "missing"


def _lost(path: Path, noted: Any) -> str | None:
    """What is wrong with notes."""
    return None if noted is not None else "damaged" if path.exists() else "missing"
