"""Figures of a store, one per file, all with one signature: draw(datasets, *, share) -> matplotlib Figure.

`draw` draws one by name, `save` writes it, `plot` does both for several. Datasets are a store, a list of stores, or a
mapping from legend to them; a summary by `analysis.by_head` stands for its store where nothing else is needed. Each
file says in TAKES what that is: a "summary", a store's single "tokens", or its "components" or "neurons" too, all of
a store of one graph over heads; or the dimension along which a store's variants or cases lie.
`paper_comparison` stands apart: its second dataset ships with the package.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path

from matplotlib.figure import Figure

from selfrepair_nn.analysis import every_token
from selfrepair_nn.errors import UsageError
from selfrepair_nn.figures import (
    ablation_kinds,
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
)
from selfrepair_nn.figures.style import Datasets, named, save, share_of, summaries
from selfrepair_nn.paths import local

__all__ = ["DESCRIPTIONS", "FIGURES", "draw", "drawn", "plot", "save", "suited"]

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
    )
}
_AXES = ("ablation", "frozen", "norm", "receiver", "scale", "case")
_HAVE = {
    "summary": lambda ds: not {*_AXES} & {*ds.dims},
    "tokens": lambda ds: "position" in ds.dims and every_token(ds) and not {*_AXES} & {*ds.dims},
    "components": lambda ds: "component_change" in ds and not {*_AXES} & {*ds.dims},
    "neurons": lambda ds: "neuron_change" in ds,
    "attention": lambda ds: "attention" in ds or "induction" in ds,
    "movers": lambda ds: "case" in ds.dims and "other" in ds,
    "contrast": lambda ds: "ablation" in ds.dims and "twin" in ds,
} | {axis: lambda ds, axis=axis: axis in ds.dims for axis in _AXES}


def _sharing(figure: Callable[..., Figure]) -> Callable[..., Figure]:
    """The figure with the share that is usual for what it shows, where none is given."""

    @wraps(figure)
    def drawn(datasets: Datasets, *, share: float | None = None) -> Figure:
        return figure(datasets, share=share_of(datasets, share))

    return drawn


FIGURES: dict[str, Callable[..., Figure]] = {name: _sharing(module.draw) for name, module in _MODULES.items()}
DESCRIPTIONS: dict[str, str] = {name: module.__doc__.splitlines()[0] for name, module in _MODULES.items()}


def suited(datasets: Datasets) -> list[str]:
    """The names of the figures for which each of these datasets holds enough. UsageError if there is no dataset."""
    stores = named(datasets).values()
    return [name for name, module in _MODULES.items() if all(map(_HAVE[module.TAKES], stores))]


def draw(name: str, datasets: Datasets, *, share: float | None = None) -> Figure:
    """Draw the figure of this name from one dataset or several; `share` as in `analysis.by_head`.

    Raises:
        UsageError: no figure of this name, or datasets of which some count every token and some do not, and no share;
            or as the figure's own `draw`.
    """
    if name not in FIGURES:
        raise UsageError(f"no figure {name!r}; there are {', '.join(FIGURES)}")
    return FIGURES[name](datasets, share=share)


def drawn(
    datasets: Datasets, names: Iterable[str] | None = None, *, share: float | None = None
) -> Iterator[tuple[str, Figure]]:
    """Names and figures, by default of all that the datasets are `suited` to; stores are summarised once for all.

    Errors as in `draw`.
    """
    stores, share = named(datasets), share_of(datasets, share)
    wanted = suited(stores) if names is None else list(names)
    by_summary = {name for name in wanted if name in FIGURES and _MODULES[name].TAKES == "summary"}
    found = summaries(stores, share) if by_summary else {}
    for name in wanted:
        yield name, draw(name, found if name in by_summary else stores, share=share)


def plot(
    datasets: Datasets,
    directory: str | Path,
    names: Iterable[str] | None = None,
    *,
    share: float | None = None,
) -> list[Path]:
    """Draw and save figures by name, by default all that the datasets are `suited` to.

    Returns the files, two for each figure. Errors as in `draw`.
    """
    directory, figures = local(directory, "directory"), drawn(datasets, names, share=share)
    return [path for name, figure in figures for path in save(figure, directory, name)]
