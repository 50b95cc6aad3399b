"""Figures of a store, one per file, all with one signature: draw(datasets, *, share) -> matplotlib Figure.

`draw` draws one by name, `save` writes it, `plot` does both for several. Datasets are a store, a list of stores, or a
mapping from legend to them; a summary by `analysis.by_head` stands for its store where nothing else is needed. Each
file says in TAKES what that is, as `needs` tells it. `variants` and `cases` draw what a recipe of anybody's own made.
`paper_comparison` stands apart: its second dataset ships with the package.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import xarray as xr
from matplotlib.figure import Figure

from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public
from selfrepair_nn.figures import (
    ablation_kinds,
    cases,
    contrast,
    direct_effect_vs_logit_change,
    distance_by_layer,
    erasure_neurons,
    freeze,
    freeze_norms,
    induction,
    ioi,
    layer_position,
    neuron_changes,
    neuron_consistency,
    neuron_sparsity,
    norm_scale,
    norm_share,
    path_patching,
    reinforced_heads,
    repair_graph,
    repair_map,
    residual_norm,
    self_reinforcement,
    self_repair_by_layer,
    token_noise,
    variants,
)
from selfrepair_nn.figures.needs import NEEDS
from selfrepair_nn.figures.style import Datasets, named, save, share_of, summaries
from selfrepair_nn.paths import local
from selfrepair_nn.recipe import find_recipe, recipe_paths
from selfrepair_nn.values import brief, nearest, several

__all__ = [
    "DESCRIPTIONS",
    "FIGURES",
    "beside",
    "draw",
    "drawn",
    "own",
    "plot",
    "require_figures",
    "save",
    "suited",
]

_MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        self_repair_by_layer,
        direct_effect_vs_logit_change,
        distance_by_layer,
        token_noise,
        norm_share,
        repair_map,
        repair_graph,
        erasure_neurons,
        neuron_sparsity,
        neuron_changes,
        neuron_consistency,
        induction,
        ioi,
        contrast,
        norm_scale,
        residual_norm,
        ablation_kinds,
        freeze,
        freeze_norms,
        path_patching,
        self_reinforcement,
        reinforced_heads,
        layer_position,
        variants,
        cases,
    )
}
UNSPECIFIC = ("variants", "cases")


def _sharing(figure: Callable[..., Figure]) -> Callable[..., Figure]:
    """The figure with the share that is usual for what it shows, where none is given."""

    @wraps(figure)
    def drawn(datasets: Datasets, *, share: float | None = None) -> Figure:
        return figure(datasets, share=share_of(datasets, share))

    return drawn


FIGURES: dict[str, Callable[..., Figure]] = {name: _sharing(module.draw) for name, module in _MODULES.items()}
DESCRIPTIONS: dict[str, str] = {name: (module.__doc__ or "").partition("\n")[0] for name, module in _MODULES.items()}


def suited(datasets: Datasets) -> list[str]:
    """The names of the figures for which each of these datasets holds enough; UNSPECIFIC ones where there is no other.

    UsageError if there is no dataset.
    """
    stores = named(datasets).values()
    found = [name for name, module in _MODULES.items() if all(map(NEEDS[module.TAKES].fits, stores))]
    return [name for name in found if name not in UNSPECIFIC] or found


def require_figures(names: Iterable[str]) -> tuple[str, ...]:
    """These names, as a tuple. UsageError unless each is a figure's."""
    many = several(names)
    found: tuple[Any, ...] = (names,) if many is None else tuple(many)
    for name in found:
        if not isinstance(name, str) or name not in FIGURES:
            raise UsageError(
                f"no figure {brief(name)}{nearest(name, FIGURES)}; there are {', '.join(FIGURES)}"
            )
    return found


def own(ds: xr.Dataset) -> tuple[str, ...]:
    """The figures that a store names as its own, as far as it suits them; where there is none, all that it suits.

    An older store names none: it has those of our recipe of that name. Nothing but names is taken from a store: what
    it says of its recipe is neither imported nor run.
    """
    try:
        names = json.loads(ds.attrs["figures"])
        names = names if isinstance(names, list) else []
    except (KeyError, TypeError, ValueError):
        recipe = ds.attrs.get("recipe")
        names = find_recipe(recipe).figures if recipe in recipe_paths() else ()
    found = suited(ds)
    return tuple(name for name in names if name in found) or tuple(found)


def draw(name: str, datasets: Datasets, *, share: float | None = None) -> Figure:
    """Draw the figure of this name from one dataset or several; `share` as in `analysis.by_head`.

    Raises:
        UsageError: no figure of this name; a dataset that does not hold what it needs; or datasets of which some count
            every token and some do not, and no share.
    """
    require_figures([name])
    figure: Any = None
    why: Exception | None = None
    try:
        figure = FIGURES[name](datasets, share=share)
    except Exception as error:
        why = error
    for title, ds in named(datasets).items():
        if (why or "done" in ds) and not NEEDS[_MODULES[name].TAKES].fits(ds):
            raise _unsuited(name, title, ds, why) from why
    if why:
        raise why
    return figure


def _unsuited(name: str, title: str, ds: xr.Dataset, why: Exception | None) -> UsageError:
    told = f" ({why})" if isinstance(why, UsageError) else ""
    return UsageError(
        f"figure {name} does not suit {title!r}: it needs {NEEDS[_MODULES[name].TAKES].words}{told}; "
        f"suited are {', '.join(suited(ds)) or 'none'}"
    )


def drawn(
    datasets: Datasets, names: Iterable[str] | None = None, *, share: float | None = None
) -> Iterator[tuple[str, Figure]]:
    """Names and figures, by default of all that the datasets are `suited` to; stores are summarised once for all.

    Errors as in `draw`.
    """
    stores, share = named(datasets), share_of(datasets, share)
    wanted = suited(stores) if names is None else require_figures(names)
    plain = all(map(NEEDS["summary"].fits, stores.values()))
    by_summary = {name for name in wanted if plain and _MODULES[name].TAKES == "summary"}
    found = summaries(stores, share) if by_summary else {}
    for name in wanted:
        yield name, draw(name, found if name in by_summary else stores, share=share)


@public
def plot(
    datasets: Datasets,
    directory: str | Path | None = None,
    names: Iterable[str] | None = None,
    *,
    share: float | None = None,
) -> list[Path]:
    """Draw and save figures by name, by default all that the datasets are `suited` to.

    They go into `directory`, by default beside the first store, named as it is without .zarr. Returns the files, two
    for each figure. Errors as in `draw`.
    """
    stores = named(datasets)
    folder = local(beside(next(iter(stores.values()))) if directory is None else directory, "directory")
    return [path for name, figure in drawn(stores, names, share=share) for path in save(figure, folder, name)]


def beside(ds: xr.Dataset) -> Path:
    """The directory of a store's figures: its path without .zarr; "figures" for what comes from no store."""
    store = Path(ds.encoding.get("source") or "figures.zarr")
    return store.with_suffix("") if store.suffix == ".zarr" else store.with_name(f"{store.name}-figures")
