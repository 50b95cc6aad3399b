"""One run on disk: a zarr directory that bare xarray opens, written in whole chunks, each marked when complete."""

import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from selfrepair_nn.contents import Contents, notes_of
from selfrepair_nn.description import ABOUT, COPY, FIXED, FORMATS, NOTES, ROOT, listed
from selfrepair_nn.errors import StoreError
from selfrepair_nn.files import Files, digest, read_json, seal, sealed, sync_path, sync_tree, unsealed
from selfrepair_nn.hub import at_hand, is_address
from selfrepair_nn.integrity import Checks, contents_of, count, require_whole
from selfrepair_nn.quantities import QUANTITIES, WIDE, Quantity
from selfrepair_nn.secrets import hidden

COMPRESSORS = (BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec())
"""The checksum comes last, so that a chunk's file ends in it."""

REMOVAL = 5
"""Seconds that the removal of a directory may take, once a file in it is gone."""


class Store:
    """A run's directory. `open_store` gives its dataset; this class creates it, fills it and knows what is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        contents = contents_of(path)
        self._sealed = contents.format > 1
        self._id: Any = contents.attributes.get("id")
        self._written: set[str] = set()
        self._files = Files(path, check=Checks(contents))
        self._group: Any = zarr.open_group(self._files, mode="r+")
        self._arrays: dict[str, Any] = {}

    @classmethod
    def create(
        cls,
        path: Path,
        coordinates: Mapping[str, Any],
        data: Mapping[str, np.ndarray | None],
        *,
        dims: Callable[[Quantity], tuple[str, ...]] = attrgetter("dims"),
        prompts_per_chunk: int,
        precision: str,
        attributes: Mapping[str, Any],
    ) -> "Store":
        """Write the whole template (labels, empty arrays, attributes) and only then give it its name.

        The caller holds the store's lock: what an earlier, killed creation left behind is cleared away.

        Args:
            coordinates: name -> values, of quantities.COORDINATES, or the labels of an axis of variants.
            data: names of the arrays to hold; values where they are known already, else None.
            dims: the dimensions that a quantity has in this store.
            prompts_per_chunk: length of a chunk along `prompt`: the block that is written at once.
            precision: "float32" or "float64".
            attributes: JSON-able; nested ones are stored as one JSON string.

        Raises:
            StoreError: the directory cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_drafts(path)
        draft = _draft(path)
        with explained(path):
            try:
                labels = xr.Dataset(
                    coords={name: _labelled(name, values) for name, values in coordinates.items()}
                )
                own = {"format": FORMATS[-1], "id": uuid.uuid4().hex, "prompts_per_chunk": prompts_per_chunk}
                labels.attrs = _plain(attributes) | own
                encoding = {name: {"compressors": COMPRESSORS} for name in labels.variables}
                labels.to_zarr(
                    draft, mode="w-", consolidated=False, encoding=encoding, write_empty_chunks=True
                )
                group = zarr.open_group(draft, mode="r+")
                for name, values in data.items():
                    sizes = {d: labels.sizes[d] for d in dims(QUANTITIES[name])}
                    _add_array(group, name, values, sizes, prompts_per_chunk, precision)
                group.create_group(NOTES, attributes={"description": ABOUT})
                _mark_nothing(draft)
                _consolidate(draft)
                take_notes(draft)
                sync_tree(draft)
                draft.rename(path)
                sync_path(path.parent)
                sync_path(path.parent.parent)  # which may be new, too
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return cls(path)

    @property
    def attributes(self) -> dict[str, Any]:
        return dict(self._group.attrs)

    def annotate(self, **attributes: Any) -> None:
        """Add or replace attributes."""
        self._describe(lambda now: now | _plain(attributes))

    def reopen(self) -> None:
        """Take back that the run has finished: something of it is to be computed again."""
        self._describe(lambda now: {k: v for k, v in now.items() if k != "finished"})

    def discard_empty(self) -> None:
        """Remove the store, if no block of it was written. Raises StoreError if it is not the one that was opened."""
        self._require_same()
        if not any((self.path / NOTES).glob("[0-9]*.json")):
            with suppress(OSError):
                shutil.rmtree(self.path.rename(_draft(self.path)))

    @property
    def prompts_per_chunk(self) -> int:
        return int(self._group.attrs["prompts_per_chunk"])

    @property
    def names(self) -> set[str]:
        """Names of the arrays it holds, coordinates included."""
        return set(self._group.array_keys())

    @property
    def fixed(self) -> set[str]:
        """Names of those that are there from the beginning, and not written block by block."""
        return {each.name for each in contents_of(self.path).fixed}

    @property
    def done(self) -> np.ndarray:
        """bool [layer, head, prompt] or [case, prompt]: what is computed and stored."""
        return self._array("done")[:]

    def read(self, name: str, block: slice | None = None) -> np.ndarray:
        """A whole small array; or, of one along prompts, some prompts' part."""
        if block is None:
            return self._array(name)[:]
        return self._array(name)[tuple(block if d == "prompt" else slice(None) for d in self._dims(name))]

    def blank(self, name: str, block: slice) -> np.ndarray:
        """What the part of an array along prompts holds before it is computed."""
        array = self._array(name)
        sizes = zip(self._dims(name), array.shape, strict=True)
        shape = [block.stop - block.start if d == "prompt" else size for d, size in sizes]
        return np.full(shape, array.fill_value, array.dtype)

    def write(self, name: str, values: Any) -> None:
        """Replace a whole small array; None: by what it holds before it is computed."""
        with explained(self.path):
            self._require_same()
            array = self._array(name)
            with self._files.staged() as files:
                array[...] = array.fill_value if values is None else values
            self._put(self._notes(FIXED, {}, files))
            self._put(files)

    def write_prompts(
        self, block: slice, values: Mapping[str, np.ndarray], done: np.ndarray | None = None
    ) -> None:
        """Write every array's part for the prompts of one chunk, then mark what is `done`: in this order.

        What was written is on the disk before the mark is.

        Args:
            values: name -> the array's part for these prompts.
            done: bool [layer, head] or [case]; None marks nothing.

        Raises:
            ValueError: a value of the wrong shape; nothing is written.
            StoreError: the disk is full, or the like; the block is then not marked done. Or the store is not there
                any more.
        """
        size = block.stop - block.start
        for name, part in values.items():
            self._require_shape(name, part.shape, size)
        with explained(self.path):
            self._require_same()
            with self._files.staged() as files:
                for name, part in values.items():
                    where = tuple(block if d == "prompt" else slice(None) for d in self._dims(name))
                    self._array(name)[where] = part
            with self._files.staged() as mark:
                if done is not None:
                    self._array("done")[..., block] = np.repeat(done[..., None], size, axis=-1)
            notes = self._notes(notes_of(block.start // self.prompts_per_chunk), files, mark)
            self._put(notes | files)
            self._put(mark)

    def _array(self, name: str) -> Any:
        """An array whose chunks are written even where they are blank: what is lost is told from what is empty.

        It is asked for again and again, and never changes; zarr takes as long to give it as to write a chunk.
        """
        if name not in self._arrays:
            self._arrays[name] = self._group[name].with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def _notes(self, where: str, fresh: Mapping[str, Any], replaced: Mapping[str, Any]) -> dict[str, bytes]:
        """Notes of the checksums of files that are about to be written; what is replaced may be read as it was, too."""
        if not self._sealed:
            return {}
        noted = unsealed(self.path / where, self._id) or {}
        noted |= {key: [seal(data.to_bytes())] for key, data in fresh.items()}
        for key, data in replaced.items():
            old = self.path / key
            noted[key] = [*([seal(old.read_bytes())] if old.exists() else []), seal(data.to_bytes())]
        return {where: sealed(noted, self._id)}

    def _describe(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Change the attributes; their copy first, which holds the old ones too, so that one of both always tells."""
        with explained(self.path):
            root = self._require_same()
            before, root["attributes"] = root["attributes"], change(root["attributes"])
            if self._sealed:
                self._put({COPY: sealed({"now": root["attributes"], "before": before})})
            self._put({ROOT: json.dumps(root, indent=2).encode()})
            self._group: Any = zarr.open_group(self._files, mode="r+")

    def _put(self, files: Mapping[str, Any]) -> None:
        self._written |= files.keys()
        try:
            self._files.put(files)
        except FileNotFoundError:
            self._removed()
            self._require_same()
            raise
        self._require_same()

    def _require_same(self) -> dict[str, Any]:
        """What the store's own file says; StoreError if it is not the store any more that was opened.

        What was written into a store while it was removed is taken back: it would block the path.
        """
        root = read_json(self.path / ROOT)
        if not isinstance(root, dict):
            if self._removed():
                self._files.take_back(self._written)
            raise StoreError(
                f"{str(self.path)!r} was removed, moved or damaged while this run was writing it: nothing more is "
                "written. Put it back and run the same command to resume, or run that to begin anew"
            )
        if root["attributes"].get("id") != self._id:
            raise StoreError(
                f"{str(self.path)!r} was replaced by another store while this run was writing it: nothing more is "
                "written. Choose another --out for this run"
            )
        return root

    def _removed(self) -> bool:
        """Whether all of the store goes, and not a file alone; whoever is at it may end first."""
        end = monotonic() + REMOVAL
        while any((self.path / name / ROOT).exists() for name in ("", "done")):
            if monotonic() >= end:
                return False
            sleep(0.02)
        return True

    def _dims(self, name: str) -> tuple[str, ...]:
        return self._array(name).metadata.dimension_names

    def _require_shape(self, name: str, shape: tuple[int, ...], prompts: int) -> None:
        dims = self._dims(name)
        expected = tuple(
            prompts if d == "prompt" else n for d, n in zip(dims, self._array(name).shape, strict=True)
        )
        if shape != expected:
            raise ValueError(f"{name} should have shape {expected} over {dims}, got {shape}")


def open_store(path: str | Path) -> xr.Dataset:
    """The dataset of a run, lazily: what `xarray.open_zarr(path)` gives, but of a whole store only.

    `path` may be the address of a store on the Hugging Face Hub, hf://datasets/owner/name/x.zarr, or of one of its
    revisions, hf://datasets/owner/name@v1/x.zarr: what is not in the hub's cache yet is fetched, all of it.
    Its files are counted at once, by the checksums they end in; what is read later is checked as it is read, which
    raises StoreError too.

    Raises:
        UsageError: an address such as s3://bucket/x.zarr.
        StoreError: there is nothing, or something else, at `path`, or a store that lost something.
        SelfRepairError: the hub does not give it.
    """
    found, source = at_hand(path), os.fspath(path)
    require_whole(found, count(found))
    files = Files(found, read_only=True, check=Checks(contents_of(found)))
    whole = xr.open_zarr(files, chunks=None)
    ordered = whole[[name for name in QUANTITIES if name in whole.data_vars]]
    ordered = ordered.assign_coords({name: c for name, c in whole.coords.items() if name not in ordered.coords})
    ordered.encoding = {"source": source if is_address(source) else str(found), "checked": True}
    return ordered


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, and text without keys; what is nested as JSON. Settings are compared, and hold no free text."""
    flat = {k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in attributes.items()}
    return {k: hidden(v) if isinstance(v, str) and k != "settings" else v for k, v in flat.items()}


def _draft(path: Path) -> Path:
    """A name beside a store's, of what is none yet or no more."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def _sweep_drafts(path: Path) -> None:
    for old in path.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}", old.name):
            shutil.rmtree(old, ignore_errors=True)


def _labelled(name: str, values: Any) -> xr.Variable:
    """A coordinate with its description; text as variable-length strings."""
    spec = QUANTITIES.get(name)
    if name == "partner" and np.ndim(values) == 2:
        spec = replace(QUANTITIES[name], dims=("resample", "prompt"))
    if spec is None or len(spec.dims) != np.ndim(values):
        spec = _axis(name, values)
    array = np.asarray(values, dtype=object if spec.kind == "string" else spec.dtype("float64"))
    return xr.Variable(
        spec.dims, array.astype(np.dtypes.StringDType()) if spec.kind == "string" else array, spec.attributes
    )


def _axis(name: str, values: Any) -> Quantity:
    """A coordinate of the axis along which the variants of a run lie: numbers, or text."""
    kind = "float" if all(isinstance(v, int | float) for v in values) else "string"
    return Quantity(name, "label", (name,), "1", name, "What distinguishes the variants of this run.", kind)


def _add_array(
    group: zarr.Group,
    name: str,
    values: np.ndarray | None,
    sizes: Mapping[str, int],
    per_chunk: int,
    precision: str,
) -> None:
    spec = QUANTITIES[name]
    array = group.create_array(
        name,
        shape=tuple(sizes.values()),
        chunks=tuple(_chunk(tuple(sizes), d, size, per_chunk) for d, size in sizes.items()),
        dtype=spec.dtype(precision),
        compressors=COMPRESSORS,
        dimension_names=tuple(sizes),
        attributes={**spec.attributes},
        fill_value={"float": np.nan, "int": -1, "bool": False}[spec.kind],
        config={"write_empty_chunks": True},
    )
    if values is not None or "prompt" not in sizes:
        array[...] = array.fill_value if values is None else values


def _mark_nothing(path: Path) -> None:
    """The marks of all blocks, so that a lost one is told from one that is not set; there may be many."""
    files = Files(path)
    group: Any = zarr.open_group(files, mode="r+")
    done = group["done"].with_config({"write_empty_chunks": True})
    with files.staged() as marks:
        done[...] = False
    for key, mark in marks.items():
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(mark.to_bytes())


def take_notes(path: Path) -> None:
    """Note what a whole store says of itself and holds from the beginning."""
    root = read_json(path / ROOT)
    contents = Contents(path, root["attributes"], listed(root))
    noted: dict[str, Any] = {f"{name}/{ROOT}": digest(each) for name, each in contents.metadata.items()}
    for each in contents.fixed:
        noted |= {file: [seal((path / file).read_bytes())] for file in each.files()}
    Files(path).put(
        {FIXED: sealed(noted, contents.attributes["id"]), COPY: sealed({"now": contents.attributes})}
    )


def _consolidate(path: Path) -> None:
    """One metadata file, so that bare xarray opens the store at once. Arrays are never added or reshaped after this."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(path)


def _chunk(dims: tuple[str, ...], dim: str, size: int, per_chunk: int) -> int:
    """One chunk per written block of prompts and everything else; where much is kept of a token, one per layer."""
    if dim == "prompt":
        return min(per_chunk, size)
    return 1 if dim in ("resample", "layer", "case") and set(WIDE) & set(dims) else size


@contextmanager
def explained(path: Path, doing: str = "write"):
    """Turn the operating system's refusals into one line with a remedy; what is stored stays stored."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(
            f"cannot {doing} {str(path)!r}: {reason}. What is stored is kept: mend it and run the same command to "
            "resume"
        ) from error
