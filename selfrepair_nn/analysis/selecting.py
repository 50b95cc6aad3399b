"""Parts of a store: some of its heads, what is done of them, their top share of tokens."""

from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn import values
from selfrepair_nn.analysis.checks import HEADS, among, of_heads, require, required, restored, share_of
from selfrepair_nn.blocks import direct_effects, done_cases
from selfrepair_nn.components import Head, select_heads
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public
from selfrepair_nn.quantities import SWEEP


def done_share(ds: xr.Dataset) -> xr.DataArray:
    """The share of its prompts that each head is done with, over (layer, head); NaN where it is not selected.

    Raises:
        UsageError: `ds` is not a store of the heads recipe.
    """
    ds = of_heads(ds)
    return (ds.done & ds.selected).mean("prompt").where(ds.selected)


@public
def only(ds: xr.Dataset, layers: Any = None, heads: Any = None) -> xr.Dataset:
    """The store as if no other heads had been run; `layers` and `heads` as in `select_heads` ("8:12", "9.6,10.*").

    Raises:
        UsageError: a specification is misspelt or leaves nothing, or `ds` is not a store of the heads recipe.
    """
    ds = restored(ds)
    require(ds, (*required(ds), *HEADS))
    wanted = select_heads(layers, heads, *(ds.attrs.get(f"n_{d}s", int(ds[d].max()) + 1) for d in HEADS))
    named = [[Head(i, j) in wanted for j in ds["head"].values] for i in ds["layer"].values]
    chosen = ds.selected & xr.DataArray(named, dims=HEADS)
    if not chosen.any():
        named = {"layers": layers, "heads": heads}
        said = " and ".join(f"{name} {values.brief(each)}" for name, each in named.items() if each is not None)
        raise UsageError(f"the store holds no head of {said}: name others")
    return ds.assign(selected=chosen)


def every_token(ds: xr.Dataset) -> bool:
    """Whether a store, or its summary, is of every counted token, and not of each head's top share alone."""
    return ds.attrs.get("kept_share", 1) == 1


@public
def top_share(ds: xr.Dataset, share: float | None = None) -> xr.DataArray:
    """Whether a token is among a head's tokens of highest direct effect over the whole run (section 2.2).

    Boolean over (layer, head, prompt, position), one byte each: for every head exactly max(1, floor(share n))
    of its n counted tokens, the first in the order of the store where direct effects are equal; none if n is 0.

    Raises:
        UsageError: `share` is not in (0, 1], or `ds` is not a store of the heads recipe.
    """
    ds = of_heads(ds)
    share = share_of(ds, share)
    done = done_cases(ds)
    _, top = direct_effects(ds, done, share)
    marks = np.zeros((len(done), ds.sizes["prompt"] * ds.sizes["position"]), bool)
    marks[top.case, top.token] = True
    found = xr.DataArray(marks.reshape([ds.sizes[d] for d in SWEEP]), dims=SWEEP, name="top_share")
    labels = {d: ds[d] for d in SWEEP if d in ds.coords}
    return found.assign_coords(labels).assign_attrs(long_name=f"{among(share, ds)} of the head", units="1")
