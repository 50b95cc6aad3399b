"""The explorer: one page on which the heads of a store, its text and every token's numbers are looked at."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib import import_module
from pathlib import Path

import xarray as xr

from selfrepair_nn.analysis import remembering
from selfrepair_nn.errors import UsageError
from selfrepair_nn.explorer.contents import Contents
from selfrepair_nn.explorer.rendering import page
from selfrepair_nn.explorer.serving import Server
from selfrepair_nn.face import public
from selfrepair_nn.figures import beside
from selfrepair_nn.paths import local
from selfrepair_nn.progress import in_notebook
from selfrepair_nn.shown import tell

Datasets = xr.Dataset | Sequence[xr.Dataset] | Mapping[str, xr.Dataset]
HEIGHT = 760
"""Pixels of a page within a notebook."""


@public
def view(
    datasets: Datasets,
    path: str | Path | None = None,
    *,
    share: float | None = None,
    serve: bool = False,
    port: int = 0,
) -> Path:
    """Write the explorer of a store, or of several, two of them side by side, as one HTML file, and return its path.

    It goes to `path`, by default beside the first store, its name ending in -explorer.html. The file needs nothing
    else: no network, no server. Numbers of single tokens are rounded, as the page says. Of a large store it holds every
    head's summary, the text, all numbers of the first prompts, and of the others those of each head's top `share`.
    Where no `path` is given a notebook shows it, too, and then keeps it.

    With `serve` it is also served, on this machine alone, at `port` (0: one that is free) until interrupted.

    Raises:
        UsageError: a dataset is not a store with tokens, nothing of it is done, `share` is not in (0, 1], there is
            none, or the port cannot be had.
    """
    server = server_at(port, serve)
    try:
        written = _write(datasets, path, share)
    except BaseException:
        if server:
            server.close()
        raise
    if server:
        server.run(written, lambda address: tell(f"{written} is at {address} until interrupted"))
    elif path is None and in_notebook():
        _show(written)
    return written


def server_at(port: int, serve: bool) -> Server | None:
    """The server of a page that is to be served, which has its port from here on. UsageError for a port of none."""
    if port and not serve:
        raise UsageError(f"port {port!r} is of a page that is served: give serve too, or leave it out")
    return Server(port) if serve else None


def _show(page: Path) -> None:
    """A page within a notebook's, which it cannot reach, nor be reached by: its scripts see nothing but itself."""
    shell = import_module("IPython.display")
    inside = escape(page.read_text(encoding="utf-8"))
    look = f'title="{escape(page.name)}" style="width: 100%; height: {HEIGHT}px; border: 0"'
    shell.display(shell.HTML(f'<div><iframe sandbox="allow-scripts" {look} srcdoc="{inside}"></iframe></div>'))


def _write(datasets: Datasets, path: str | Path | None, share: float | None) -> Path:
    stores = _named(datasets)
    if not stores:
        raise UsageError("no dataset was given: a page is of one store, or of several")
    found = _beside([ds for _, ds in stores]) if path is None else local(path)
    if found.is_dir():
        raise UsageError(f"{str(found)!r} is a directory: name a file in it, such as explorer.html")
    with remembering():
        text = page([Contents.of(ds, share, name).data() for name, ds in stores])
    found.parent.mkdir(parents=True, exist_ok=True)
    found.write_text(text, encoding="utf-8")
    return found


def _named(datasets: Datasets) -> list[tuple[str | None, xr.Dataset]]:
    """What each store is called: by its key, of several by its file, of one by its title."""
    if isinstance(datasets, xr.Dataset):
        return [(None, datasets)]
    if isinstance(datasets, Mapping):
        return [(str(name), ds) for name, ds in datasets.items()]
    several = len(datasets) > 1
    return [(beside(ds).name if several and ds.encoding.get("source") else None, ds) for ds in datasets]


def _beside(stores: Sequence[xr.Dataset]) -> Path:
    """Where the page of these stores goes."""
    first, *others = map(beside, stores)
    return first.with_name("-".join([first.name, *(each.name for each in others), "explorer.html"]))
