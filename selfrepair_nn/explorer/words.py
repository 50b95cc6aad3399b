"""The text of a store's prompts as data: which token stands where, told once each, whatever is in it made visible."""

from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.blocks import counted_tokens
from selfrepair_nn.explorer.packing import packed, plain
from selfrepair_nn.quantities import TOKEN
from selfrepair_nn.shown import line

LONGEST = 200
"""Characters of a token; hardly one has more."""


def text(ds: xr.Dataset, prompts: int) -> dict[str, Any]:
    """The tokens of the first prompts, the last one's target after them; what else the logits are of, where it differs.

    `places` are indices of `vocabulary` [prompt, position + 1]; `targets` and `others` [prompt, position].
    """
    read, target = (_texts(ds, name, prompts) for name in ("token", "target"))
    other = _texts(ds, "other", prompts) if "other" in ds.variables else None
    rows = np.concatenate([read, target[:, -1:]], axis=1)
    follows = (target[:, :-1] == read[:, 1:]).all()
    parts = {"places": rows, "targets": None if follows else target, "others": other}
    every = np.concatenate([part.ravel() for part in parts.values() if part is not None])
    vocabulary, index = np.unique(every, return_inverse=True)
    found: dict[str, Any] = {"vocabulary": [legible(each) for each in vocabulary]}
    start = 0
    for name, part in parts.items():
        size = 0 if part is None else part.size
        found[name] = packed(plain(index[start : start + size].astype(np.uint32))) if size else None
        start += size
    counted = counted_tokens(ds)[:prompts]
    found["counted"] = None if counted.all() else packed(counted.astype(np.uint8).tobytes())
    return found | {
        "ends": _ends(ds, prompts),
        "prompts": prompts,
        "positions": ds.sizes["position"],
        "documents": _documents(ds, prompts),
    }


def _texts(ds: xr.Dataset, name: str, prompts: int) -> np.ndarray:
    """Texts [prompt, position]; a token that has none is shown by its number."""
    if f"{name}_text" in ds.variables:
        return ds[f"{name}_text"].isel(prompt=slice(prompts)).transpose(*TOKEN).values.astype(object)
    ids = ds[name].isel(prompt=slice(prompts)).transpose(*TOKEN).values
    return np.vectorize("⟨{}⟩".format, [object])(ids)


def _ends(ds: xr.Dataset, prompts: int) -> list[int] | None:
    """How many tokens of each prompt have a next one, where rows are texts of unequal length."""
    if "text_positions" not in ds:
        return None
    target = ds.target.isel(prompt=slice(prompts)).transpose(*TOKEN).values
    return [int(end) for end in (target >= 0).sum(1)]


def _documents(ds: xr.Dataset, prompts: int) -> list[int] | None:
    return [int(d) for d in ds.document.values[:prompts]] if "document" in ds.variables else None


def legible(token: str) -> str:
    """A token with nothing in it but what is printable, spaces, and the ends of lines."""
    return "\n".join(line(part) for part in token.replace("\r\n", "\n").split("\n"))[:LONGEST]
