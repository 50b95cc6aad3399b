"""A store's files: on the disk when a write returns, and checked against what was written when they are read.

Each chunk ends in the CRC-32C of its bytes, which zarr's codec puts there; beside the arrays, notes say which of these
checksums belongs to which file, so that a chunk of another place or time is told from its own.
"""

import errno
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import google_crc32c
from zarr.buffer.cpu import Buffer
from zarr.core.sync import sync
from zarr.storage import LocalStore

PARTIAL = ".partial"
"""How a file's name ends until it is whole."""

TOGETHER = 16
"""How many files are synced at a time."""

FIRST = "zarr.json"
"""The file that makes a directory a store."""

SEAL = 4
"""Bytes of the checksum that ends a chunk."""


class Files(LocalStore):
    """The files of one store. Of every chunk that is read `check(key, data)` is asked; data is None if it is lost."""

    def __init__(
        self,
        root: Path | str,
        *,
        read_only: bool = False,
        check: Callable[[str, bytes | None], None] = lambda key, data: None,
    ) -> None:
        super().__init__(root, read_only=read_only)
        self._check, self._staged = check, None

    def with_read_only(self, read_only: bool = False) -> "Files":
        return type(self)(self.root, read_only=read_only, check=self._check)

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        found = await super().get(key, prototype, byte_range)
        if byte_range is None and not key.endswith(".json"):
            self._check(key, None if found is None else found.to_bytes())
        return found

    async def set(self, key: str, value: Any) -> None:
        if self._staged is None:
            raise RuntimeError("a store's files are written with `put`")
        self._staged[key] = value

    @contextmanager
    def staged(self) -> Iterator[dict[str, Any]]:
        """Within, what is set is put into a dict, key by key, instead of on the disk."""
        self._staged = {}
        try:
            yield self._staged
        finally:
            self._staged = None

    def take_back(self, keys: Iterable[str]) -> None:
        """Remove files again, and the directories that then are empty: the store that they were written for is gone."""
        for key in keys:
            (self.root / key).unlink(missing_ok=True)
        for directory in sorted({*_above(self.root, keys), self.root}, reverse=True):
            with suppress(OSError):
                directory.rmdir()

    def put(self, files: Mapping[str, Any]) -> None:
        """Write buffers or bytes by key: each file is whole or not there at all, and all are on the disk at the end.

        All are written, then synced, then named, then their directories synced: a disk has its slow moment only twice.

        Raises:
            OSError: the disk is full, or the like, or the store was removed meanwhile; nothing half written stays.
        """
        created = {path for path in _above(self.root, files) if not path.exists()}
        drafts = {key: f"{key}.{uuid.uuid4().hex}{PARTIAL}" for key in files}
        there = (self.root / FIRST).exists()
        try:
            sync(self._draft({drafts[key]: value for key, value in files.items()}))
            _sync_all(self.root / draft for draft in drafts.values())
            if there and not (self.root / FIRST).exists():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root))
            for key, draft in drafts.items():
                (self.root / draft).replace(self.root / key)
        finally:
            for draft in drafts.values():
                with suppress(OSError):
                    (self.root / draft).unlink()
        _sync_all({(self.root / key).parent for key in files} | {path.parent for path in created})

    async def _draft(self, files: Mapping[str, Any]) -> None:
        for key, value in files.items():
            _make_room(self.root, key)
            await super().set(key, Buffer.from_bytes(value) if isinstance(value, bytes) else value)


def _make_room(root: Path, key: str) -> None:
    """A file's directories; never the store's own: one that was removed does not come back in pieces."""
    root.stat()
    for directory in sorted(_above(root, [key])):
        directory.mkdir(exist_ok=True)


def _above(root: Path, keys: Iterable[str]) -> set[Path]:
    """The directories between a store's own and these files."""
    return {root / part for key in keys for part in Path(key).parents if part != Path()}


def seal(data: bytes) -> int:
    """The checksum that ends a chunk."""
    return int.from_bytes(data[-SEAL:], "little")


def flaw(data: bytes | None, noted: Iterable[int] | None) -> str | None:
    """What is wrong with a chunk whose checksum should be one of those noted (None: not known); None if nothing is."""
    if data is None:
        return "missing"
    if len(data) <= SEAL or google_crc32c.value(data[:-SEAL]) != seal(data):
        return f"damaged ({len(data)} bytes)"
    return misplaced(seal(data), noted)


def misplaced(found: int, noted: Iterable[int] | None) -> str | None:
    """As `flaw`, by a chunk's checksum alone."""
    return None if noted is None or found in noted else "not what was written there"


def digest(value: Any) -> int:
    """The CRC-32C of what is said in JSON, however it is laid out."""
    return google_crc32c.value(json.dumps(value, sort_keys=True).encode())


def read_json(path: Path) -> Any:
    """What a JSON file says; None if it is lost or cut."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None


def sealed(noted: Any, store: str = "") -> bytes:
    """Notes as a file's bytes, with their own checksum, that of a store's id in it."""
    return json.dumps({"crc32c": digest([store, noted]), "noted": noted}).encode()


def unsealed(path: Path, store: str = "") -> Any:
    """The notes of a file; None if it is lost or damaged, or another store's."""
    found = read_json(path)
    whole = isinstance(found, dict) and found.get("crc32c") == digest([store, found.get("noted")])
    return found["noted"] if whole else None


def sync_tree(root: Path) -> None:
    """Everything below a directory, and itself, on the disk."""
    _sync_all([*root.rglob("*"), root])


def sweep_partial(root: Path) -> None:
    """Remove what killed processes left half written, where that is allowed. Nobody may be writing."""
    for directory, _, names in os.walk(root):
        for name in names:
            if name.endswith(PARTIAL):
                with suppress(OSError):
                    Path(directory, name).unlink()


def _sync_all(paths: Iterable[Path]) -> None:
    """Side by side: a disk takes together what comes together."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(sync_path, paths))


def sync_path(path: Path) -> None:
    """One file or directory on the disk. Not every system can open a directory: there its own journal must do."""
    try:
        number = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(number)
    finally:
        os.close(number)
