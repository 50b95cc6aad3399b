"""Which files a store consists of, as far as its description can still be read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from selfrepair_nn.description import (
    COPY,
    FIXED,
    FORMATS,
    LOST,
    NOTES,
    NOTES_GROUP,
    ROOT,
    attributes_of,
    harm,
    listed,
    mistyped,
    right,
    same,
    understood,
)
from selfrepair_nn.files import read_json, unsealed
from selfrepair_nn.quantities import COORDINATES, QUANTITIES


@dataclass(frozen=True)
class Damage:
    """A file of a store, by its name below the store's directory, and what is wrong with it.

    `array` is what it belongs to; `block` the index of the block of prompts it is a part of, None if it is of all.
    """

    file: str
    what: str
    array: str = ""
    block: int | None = None

    def __str__(self) -> str:
        return f"{self.file} is {self.what}"


@dataclass(frozen=True)
class Chunks:
    """How many chunks an array has along each dimension; `along` is that of prompts where it is written by blocks."""

    name: str
    counts: tuple[int, ...]
    along: int | None

    @classmethod
    def of(cls, name: str, metadata: Mapping[str, Any]) -> "Chunks":
        shape, per = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
        dims = metadata.get("dimension_names") or ()
        swept = name in QUANTITIES and name not in COORDINATES and "prompt" in dims
        counts = tuple(ceil(size / each) for size, each in zip(shape, per, strict=True))
        return cls(name, counts, dims.index("prompt") if swept else None)

    def files(self, block: int | None = None) -> list[str]:
        """The names of its files; of one block's where there are blocks."""
        ranges = [[block] if i == self.along else range(n) for i, n in enumerate(self.counts)]
        return ["/".join((self.name, "c", *map(str, index))) for index in product(*ranges)]


@dataclass(frozen=True)
class Contents:
    """A store as its own description has it: `attributes`, and each array's metadata and chunks.

    `damage` is what was found wrong with that description; where it could not be told any more, it is None here.
    """

    path: Path
    attributes: dict[str, Any]
    metadata: dict[str, dict[str, Any]]
    damage: list[Damage] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path) -> "Contents | None":
        """What is at `path`; None if that is no store of this package, or one that cannot be told any more."""
        root, copy = understood(read_json(path / ROOT)), unsealed(path / COPY)
        attributes = attributes_of(root, copy)
        if attributes is None or attributes.get("format") not in FORMATS:
            return None
        found = cls(path, attributes, {})
        found._read_arrays(root)
        if root is None or not same(root["attributes"], copy):
            found.damage.insert(0, Damage(ROOT, harm(root, attributes)))
        elif wrong := mistyped(attributes):
            found.damage.insert(0, Damage(ROOT, f"wrong about {', '.join(wrong)}", LOST))
        if found.format > 1 and copy is None:
            found.damage.append(Damage(COPY, "missing or damaged"))
        if found.format > 1 and read_json(path / NOTES / ROOT) != NOTES_GROUP:
            found.damage.append(Damage(f"{NOTES}/{ROOT}", "missing or damaged"))
        return found if found.metadata else None

    def _read_arrays(self, root: dict[str, Any] | None) -> None:
        repeated = listed(root)
        noted = self.noted() or {}
        names = {name.partition("/")[0] for name in noted if name.endswith(f"/{ROOT}")} | repeated.keys()
        names = names or {each.parent.name for each in self.path.glob(f"*/{ROOT}")} - {NOTES}
        for name in sorted(names):
            own, known = read_json(self.path / name / ROOT), noted.get(f"{name}/{ROOT}")
            whole = [each for each in (repeated.get(name), own) if each is not None and right(each, known)]
            if whole:
                self.metadata[name] = whole[0]
            if not whole or own != whole[0]:
                what = "missing" if not (self.path / name / ROOT).exists() else "damaged"
                self.damage.append(Damage(f"{name}/{ROOT}", what, name))
            if whole and root is not None and repeated.get(name) != whole[0]:
                self.damage.insert(0, Damage(ROOT, f"wrong about {name}"))

    @cached_property
    def group(self) -> zarr.Group | None:
        """What zarr makes of it; None if it cannot."""
        try:
            return zarr.open_group(self.path, mode="r")
        except Exception:  # whatever it makes of damage
            return None

    @property
    def format(self) -> int:
        return self.attributes["format"]

    @cached_property
    def chunks(self) -> dict[str, Chunks]:
        return {name: Chunks.of(name, each) for name, each in self.metadata.items()}

    @cached_property
    def swept(self) -> list[Chunks]:
        """The arrays that are written block by block, without the mark."""
        return [each for each in self.chunks.values() if each.along is not None and each.name != "done"]

    @property
    def fixed(self) -> list[Chunks]:
        """The arrays that are there from the beginning."""
        return [each for each in self.chunks.values() if each.along is None]

    @property
    def blocks(self) -> int:
        done = self.chunks["done"]
        return done.counts[done.along or 0]

    def noted(self, block: int | None = None) -> dict[str, Any] | None:
        """The checksums of a block's files, or of what is there from the beginning; None if they cannot be read."""
        file = FIXED if block is None else notes_of(block)
        return unsealed(self.path / file, self.attributes.get("id", ""))

    def mark(self, block: int) -> str:
        """The file that says what of a block is done."""
        return self.chunks["done"].files(block)[0]

    def block_files(self, block: int) -> Iterator[tuple[str, str]]:
        """Array and file of everything that a block consists of, without the mark."""
        for each in self.swept:
            for file in each.files(block):
                yield each.name, file


class Marks:
    """What is done, block by block, as far as it can be read."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._step = contents.metadata["done"]["chunk_grid"]["configuration"]["chunk_shape"][-1]

    def block(self, index: int) -> np.ndarray | None:
        """bool [layer, head, prompt] or [case, prompt]; None if the mark is damaged."""
        here = (..., self.prompts(index))
        return attempted(self._contents, "done", here) if self._whole is None else self._whole[here]

    def prompts(self, index: int) -> slice:
        """The prompts of a block."""
        return slice(index * self._step, (index + 1) * self._step)

    @cached_property
    def _whole(self) -> np.ndarray | None:
        return attempted(self._contents, "done")


def attempted(contents: Contents, name: str, part: Any = ...) -> np.ndarray | None:
    """What zarr reads of an array; None where it cannot."""
    try:
        group: Any = contents.group
        array = zarr.open_array(contents.path / name, mode="r") if group is None else group[name]
        return np.asarray(array[part])
    except Exception:  # whatever a codec makes of damage
        return None


def notes_of(block: int) -> str:
    """The file that holds a block's checksums."""
    return f"{NOTES}/{block}.json"
