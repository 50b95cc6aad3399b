"""Stores of several partners of each prompt: each token's mean over them, read as it is asked for."""

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from selfrepair_nn.quantities import IN_NATS, QUANTITIES, varied

AXIS, BY_PARTNER = "resample", "_by_partner"
KEPT = ("self_repair", IN_NATS["self_repair"])
"""Of what the numbers of each partner stay, for `variance_components`."""


def several(ds: xr.Dataset) -> bool:
    """Whether a store holds what each of several partners of a prompt gives."""
    return "self_repair" in ds and AXIS in ds.self_repair.dims


def averaged(ds: xr.Dataset) -> xr.Dataset:
    """The same store with the mean over partners of each token in the place of what each partner gives.

    Of closure that is the largest of either sign. Nothing is read before it is asked for. Indices (of neurons, ranks
    and experts) have no mean and are left out. The attribute partners_averaged is the number of partners, and what each
    gave of KEPT stays, as x_by_partner. A store without several partners is returned as it is.
    """
    if not several(ds):
        return ds
    found, gone = {f"{name}{BY_PARTNER}": _named(ds[name].variable, name) for name in KEPT if name in ds}, []
    for name in [str(name) for name, each in ds.data_vars.items() if AXIS in each.dims]:
        known = QUANTITIES.get(name)
        if name == "closure" or (varied(known) if known else ds[name].dtype.kind == "f"):
            found[name] = _joined(ds[name].variable, largest=name == "closure")
        else:
            gone.append(name)
    return ds.drop_vars(gone).assign(found).assign_attrs(partners_averaged=ds.sizes[AXIS])


def _named(variable: xr.Variable, name: str) -> xr.Variable:
    """The same, read as lazily, under a description of its own."""
    same = variable.copy(deep=False)
    same.attrs = variable.attrs | {"description": f"{name} with each partner, of which that is the mean."}
    return same


def larger(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of each pair what is larger in size; NaN where either is."""
    return np.where(np.isnan(other) | (abs(other) > abs(one)), other, one)


def _joined(variable: xr.Variable, largest: bool) -> xr.Variable:
    dims = tuple(d for d in variable.dims if d != AXIS)
    encoding = {k: v for k, v in variable.encoding.items() if k == "preferred_chunks"}
    array = indexing.LazilyIndexedArray(_OverPartners(variable, largest))
    return xr.Variable(dims, array, variable.attrs, encoding)


class _OverPartners(BackendArray):
    """The mean of a variable over its partners, or the largest, in float64; one partner at a time is in memory."""

    def __init__(self, variable: xr.Variable, largest: bool) -> None:
        self._variable, self._largest = variable, largest
        self.shape = tuple(size for d, size in variable.sizes.items() if d != AXIS)
        self.dtype = np.dtype(float)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple) -> np.ndarray:
        dims, count = [d for d in self._variable.dims if d != AXIS], self._variable.sizes[AXIS]
        part = self._variable.isel(dict(zip(dims, key, strict=True)))
        first, *others = (part.isel({AXIS: i}).values.astype(float) for i in range(count))
        for each in others:
            first = larger(first, each) if self._largest else first + each
        return first if self._largest else first / count
