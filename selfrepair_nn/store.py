"""One run on disk: a zarr directory that bare xarray opens, written in whole chunks, each marked when complete."""

import json
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BloscCodec

from selfrepair_nn.errors import StoreError
from selfrepair_nn.paths import local
from selfrepair_nn.remote.secrets import hidden
from selfrepair_nn.variables import VARIABLES, Variable

FORMAT = 1
COMPRESSOR = BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle")


class Store:
    """A run's directory. `open_store` gives its dataset; this class creates it, fills it and knows what is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._group = zarr.open_group(path, mode="r+")

    @classmethod
    def create(
        cls,
        path: Path,
        coordinates: Mapping[str, Any],
        data: Mapping[str, np.ndarray | None],
        *,
        dims: Callable[[Variable], tuple[str, ...]] = attrgetter("dims"),
        prompts_per_chunk: int,
        precision: str,
        attributes: Mapping[str, Any],
    ) -> "Store":
        """Write the whole template (labels, empty arrays, attributes) and only then give it its name.

        The caller holds the store's lock: what an earlier, killed creation left behind is cleared away.

        Args:
            coordinates: name -> values, of variables.COORDINATES, or the labels of an axis of variants.
            data: names of the arrays to hold; values where they are known already, else None.
            dims: the dimensions that a variable has in this store.
            prompts_per_chunk: length of a chunk along `prompt`: the block that is written at once.
            precision: "float32" or "float64".
            attributes: JSON-able; nested ones are stored as one JSON string.

        Raises:
            StoreError: the directory cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_drafts(path)
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        with explained(path):
            try:
                labels = xr.Dataset(
                    coords={name: _labelled(name, values) for name, values in coordinates.items()}
                )
                labels.attrs = _plain(attributes)
                labels.attrs |= {"format": FORMAT, "prompts_per_chunk": prompts_per_chunk}
                labels.to_zarr(draft, mode="w-", consolidated=False)
                group = zarr.open_group(draft, mode="r+")
                for name, values in data.items():
                    sizes = {d: labels.sizes[d] for d in dims(VARIABLES[name])}
                    _add_array(group, name, values, sizes, prompts_per_chunk, precision)
                _consolidate(draft)
                draft.rename(path)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return cls(path)

    @property
    def attributes(self) -> dict[str, Any]:
        return dict(self._group.attrs)

    def annotate(self, **attributes: Any) -> None:
        """Add or replace attributes."""
        with explained(self.path):
            self._group.attrs.update(_plain(attributes))

    @property
    def prompts_per_chunk(self) -> int:
        return int(self._group.attrs["prompts_per_chunk"])

    @property
    def names(self) -> set[str]:
        """Names of the arrays it holds, coordinates included."""
        return set(self._group.array_keys())

    @property
    def done(self) -> np.ndarray:
        """bool [layer, head, prompt] or [case, prompt]: what is computed and stored."""
        return self._group["done"][:]

    def read(self, name: str, block: slice | None = None) -> np.ndarray:
        """A whole small array; or, of one along prompts, some prompts' part."""
        if block is None:
            return self._group[name][:]
        return self._group[name][tuple(block if d == "prompt" else slice(None) for d in self._dims(name))]

    def write(self, name: str, values: np.ndarray) -> None:
        """Replace a whole small array."""
        with explained(self.path):
            self._group[name][...] = values

    def write_prompts(
        self, block: slice, values: Mapping[str, np.ndarray], done: np.ndarray | None = None
    ) -> None:
        """Write every array's part for the prompts of one chunk, then mark what is `done`: in this order.

        Args:
            values: name -> the array's part for these prompts.
            done: bool [layer, head] or [case]; None marks nothing.

        Raises:
            ValueError: a value of the wrong shape; nothing is written.
            StoreError: the disk is full, or the like; the block is then not marked done.
        """
        size = block.stop - block.start
        for name, part in values.items():
            self._require_shape(name, part.shape, size)
        with explained(self.path):
            for name, part in values.items():
                where = tuple(block if d == "prompt" else slice(None) for d in self._dims(name))
                self._group[name][where] = part
            if done is not None:
                self._group["done"][..., block] = np.repeat(done[..., None], size, axis=-1)

    def _dims(self, name: str) -> tuple[str, ...]:
        return self._group[name].metadata.dimension_names

    def _require_shape(self, name: str, shape: tuple[int, ...], prompts: int) -> None:
        dims = self._dims(name)
        expected = tuple(
            prompts if d == "prompt" else n for d, n in zip(dims, self._group[name].shape, strict=True)
        )
        if shape != expected:
            raise ValueError(f"{name} should have shape {expected} over {dims}, got {shape}")


def open_store(path: str | Path) -> xr.Dataset:
    """The dataset of a run, lazily: what `xarray.open_zarr(path)` gives.

    Raises:
        UsageError: an address such as s3://bucket/x.zarr.
        StoreError: there is nothing, or something else, at `path`.
    """
    path = local(path, "store")
    require_store(path)
    found = xr.open_zarr(path, chunks=None)
    ordered = found[[name for name in VARIABLES if name in found.data_vars]]
    ordered.encoding["source"] = str(path)
    return ordered


def require_store(path: Path) -> None:
    """Raise StoreError unless `path` is a store of this package."""
    if not path.exists():
        raise StoreError(f"there is no store at {str(path)!r}")
    if not is_store(path):
        raise StoreError(f"{str(path)!r} is not a store of selfrepair_nn: choose another path")


def is_store(path: Path) -> bool:
    try:
        return zarr.open_group(path, mode="r").attrs.get("format") == FORMAT
    except (FileNotFoundError, ValueError, OSError, KeyError):
        return False


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, and text without keys; what is nested as JSON. Settings are compared, and hold no free text."""
    flat = {k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in attributes.items()}
    return {k: hidden(v) if isinstance(v, str) and k != "settings" else v for k, v in flat.items()}


def _sweep_drafts(path: Path) -> None:
    for old in path.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}", old.name):
            shutil.rmtree(old, ignore_errors=True)


def _labelled(name: str, values: Any) -> xr.Variable:
    """A coordinate with its description; text as variable-length strings."""
    spec = VARIABLES.get(name)
    if spec is None or len(spec.dims) != np.ndim(values):
        spec = _axis(name, values)
    array = np.asarray(values, dtype=object if spec.kind == "string" else spec.dtype("float64"))
    return xr.Variable(
        spec.dims, array.astype(np.dtypes.StringDType()) if spec.kind == "string" else array, spec.attributes
    )


def _axis(name: str, values: Any) -> Variable:
    """A coordinate of the axis along which the variants of a run lie: numbers, or text."""
    kind = "float" if all(isinstance(v, int | float) for v in values) else "string"
    return Variable(name, (name,), "1", name, "What distinguishes the variants of this run.", kind)


def _add_array(
    group: zarr.Group,
    name: str,
    values: np.ndarray | None,
    sizes: Mapping[str, int],
    per_chunk: int,
    precision: str,
) -> None:
    spec = VARIABLES[name]
    array = group.create_array(
        name,
        shape=tuple(sizes.values()),
        chunks=tuple(_chunk(tuple(sizes), d, size, per_chunk) for d, size in sizes.items()),
        dtype=spec.dtype(precision),
        compressors=COMPRESSOR,
        dimension_names=tuple(sizes),
        attributes=spec.attributes,
        fill_value={"float": np.nan, "int": -1, "bool": False}[spec.kind],
    )
    if values is not None:
        array[...] = values


def _consolidate(path: Path) -> None:
    """One metadata file, so that bare xarray opens the store at once. Arrays are never added or reshaped after this."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(path)


def _chunk(dims: tuple[str, ...], dim: str, size: int, per_chunk: int) -> int:
    """One chunk per written block of prompts and everything else; where much is kept of a token, one per layer."""
    if dim == "prompt":
        return min(per_chunk, size)
    return 1 if dim in ("layer", "case") and {"component", "neuron"} & set(dims) else size


@contextmanager
def explained(path: Path):
    """Turn the operating system's refusals into one line with a remedy; what is stored stays stored."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(
            f"cannot write {str(path)!r}: {reason}. What is stored is kept: mend it and run the same command to resume"
        ) from error
