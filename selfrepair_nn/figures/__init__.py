"""Figures of a store, one per file, all with one signature: draw(datasets, *, share) -> matplotlib Figure.

`draw` draws one by name, `save` writes it, `plot` does both for all of them. Datasets are a store, a summary
by `analysis.by_head`, a list of those, or a mapping from legend to them.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.figure import Figure

from selfrepair_nn.analysis import SHARE
from selfrepair_nn.errors import UsageError
from selfrepair_nn.figures import direct_effect_vs_logit_change, self_repair_by_layer
from selfrepair_nn.figures.style import Datasets, save, summaries

__all__ = ["DESCRIPTIONS", "FIGURES", "draw", "plot", "save"]

_MODULES = {m.__name__.rpartition(".")[2]: m for m in (self_repair_by_layer, direct_effect_vs_logit_change)}
FIGURES: dict[str, Callable[..., Figure]] = {name: module.draw for name, module in _MODULES.items()}
DESCRIPTIONS: dict[str, str] = {name: module.__doc__.splitlines()[0] for name, module in _MODULES.items()}


def draw(name: str, datasets: Datasets, *, share: float = SHARE) -> Figure:
    """Draw the figure of this name from one dataset (a store or a summary of `by_head`) or several.

    Raises:
        UsageError: no figure of this name, or as the figure's own `draw`.
    """
    if name not in FIGURES:
        raise UsageError(f"no figure {name!r}; there are {', '.join(FIGURES)}")
    return FIGURES[name](datasets, share=share)


def plot(
    datasets: Datasets, directory: str | Path, names: Iterable[str] = FIGURES, *, share: float = SHARE
) -> list[Path]:
    """Draw and save figures by name, by default all; returns the files, two for each. Errors as in `draw`."""
    found = summaries(datasets, share)
    return [path for name in names for path in save(draw(name, found, share=share), directory, name)]
