"""A page, or several figures, of one store: what has been summed up is not read again."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import xarray as xr

Kept = dict[tuple[int, Hashable], tuple[xr.Dataset, xr.Dataset]]

_KEPT: ContextVar[Kept | None] = ContextVar("kept", default=None)


FLAGS = ("done", "selected", "counted", "document")
"""What every statistic looks at, some bytes for each prompt of each head."""


def held(ds: xr.Dataset) -> xr.Dataset:
    """The same with its flags in memory, so that they are not read from the store again and again."""
    flags = {name: ds[name].variable.compute() for name in FLAGS if name in ds.variables}
    labels = {name: flags.pop(name) for name in [*flags] if name in ds.coords}
    return ds.assign_coords(labels).assign(flags)


@contextmanager
def remembering() -> Iterator[None]:
    """While this lasts every summary of a dataset is computed once; nothing writes to its store meanwhile."""
    token = _KEPT.set({} if _KEPT.get() is None else _KEPT.get())
    try:
        yield
    finally:
        _KEPT.reset(token)


def once(what: Hashable, ds: xr.Dataset, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
    """What `compute` finds of this very dataset, or what it found before. `what` tells which summary it is."""
    kept = _KEPT.get()
    if kept is None:
        return compute()
    if (id(ds), what) not in kept:
        kept[id(ds), what] = ds, compute()
    return kept[id(ds), what][1].copy()
