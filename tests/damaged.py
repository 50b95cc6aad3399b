"""What can happen to the files of a store, and stores of the format before checksums."""

import json
import shutil
from pathlib import Path

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BloscCodec

BLOSC = BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle")


def flipped(path: Path, bit: int = 2) -> None:
    """One bit of a file, in its middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << bit
    path.write_bytes(data)


def cut(path: Path, size: int = 9) -> None:
    path.write_bytes(path.read_bytes()[:size])


def emptied(path: Path) -> None:
    cut(path, 0)


def removed(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def swapped(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def attribute(store: Path, name: str, value: object) -> None:
    """Another value of an attribute in the store's own file."""
    root = json.loads((store / "zarr.json").read_text())
    root["attributes"][name] = value
    (store / "zarr.json").write_text(json.dumps(root))


def copied(store: Path, to: Path) -> Path:
    """A copy that may be harmed."""
    shutil.copytree(store, to)
    return to


def chunks(store: Path, name: str) -> list[str]:
    """The files of an array's chunks, in order."""
    return sorted(str(p.relative_to(store)) for p in (store / name / "c").rglob("*") if p.is_file()) or [
        f"{name}/c"
    ]


def old_format(store: Path, to: Path) -> Path:
    """A store as it was written before checksums: the same numbers, no checksums, and blank chunks left out."""
    found = xr.open_zarr(store).load()
    attributes = {k: v for k, v in found.attrs.items() if k != "id"} | {"format": 1}
    per_chunk = int(attributes["prompts_per_chunk"])
    labels = xr.Dataset(coords={name: found[name].variable.copy() for name in found.coords}, attrs=attributes)
    for each in labels.variables.values():
        each.encoding = {}
    labels.to_zarr(to, mode="w-", consolidated=False)
    group = zarr.open_group(to, mode="r+")
    for name, array in found.data_vars.items():
        made = group.create_array(
            name,
            shape=array.shape,
            chunks=tuple(min(per_chunk, n) if d == "prompt" else n for d, n in array.sizes.items()),
            dtype=array.dtype,
            compressors=BLOSC,
            dimension_names=array.dims,
            attributes=array.attrs,
            fill_value={"f": np.nan, "i": -1, "b": False}[array.dtype.kind],
        )
        made[...] = array.values
    zarr.consolidate_metadata(to)
    return to
