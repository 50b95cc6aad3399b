"""Finding and loading recipes: ours by name, a user's own by path."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from selfrepair_nn.errors import SelfRepairError, UsageError, one_line
from selfrepair_nn.graph import Graph
from selfrepair_nn.options import Options

PACKAGE = Path(__file__).parent
FOLDERS = (PACKAGE / "_recipes", PACKAGE.parent / "recipes")
"""Where an installed wheel and a checkout keep the recipes."""

SIGNATURE = "graph(structure, options)"


@dataclass(frozen=True)
class Recipe:
    """One experiment: `build(structure, options)` says what is done, `figures` names what is drawn from its store.

    `defaults` are options that the recipe takes where they are left at the default of every recipe.
    """

    path: Path
    summary: str
    build: Callable[[Any, Any], Any]
    figures: tuple[str, ...]
    defaults: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.stem

    def options(self, given: Options) -> Options:
        """The options given, with the recipe's defaults.

        Raises:
            UsageError: a default that is no option, or a value that it cannot have.
        """
        usual = {each.name: each.default for each in fields(Options)}
        if unknown := ", ".join(self.defaults.keys() - usual):
            raise UsageError(f"recipe {str(self.path)!r}: DEFAULTS names {unknown}, which is no option of a run")
        return replace(given, **{n: v for n, v in self.defaults.items() if getattr(given, n) == usual[n]})

    def graph(self, structure: Any, options: Any) -> Graph:
        """What the recipe does with a model of this structure, given these options.

        Raises:
            UsageError: its function fails, or what it gives is no Graph that fits the model.
        """
        try:
            found = self.build(structure, options)
        except SelfRepairError:
            raise
        except Exception as error:
            raise UsageError(f"recipe {str(self.path)!r}: {SIGNATURE} fails: {one_line(error)}") from error
        if not isinstance(found, Graph):
            raise UsageError(f"recipe {str(self.path)!r}: {SIGNATURE} gives {found!r}, not a Graph")
        if not found.ablate or not all(found.ablate):
            raise UsageError(
                f"recipe {str(self.path)!r} ablates nothing: each entry of ablate names a site or more"
            )
        if beyond := found.beyond(structure.n_layers, structure.n_heads):
            raise UsageError(
                f"recipe {str(self.path)!r} names {beyond}: the model has layers 0 to {structure.n_layers - 1} "
                f"of heads 0 to {structure.n_heads - 1}"
            )
        return found


def recipe_paths() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {
        p.stem: p for folder in FOLDERS for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")
    }


def find_recipe(name: str) -> Recipe:
    """A recipe by name, or from a path ending in .py.

    Raises:
        UsageError: no such recipe; a file that cannot be read as one.
    """
    path = Path(name) if name.endswith(".py") else recipe_paths().get(name)
    if path is None or not path.is_file():
        raise UsageError(
            f"no recipe {name!r}; there are {', '.join(recipe_paths())}, or give the path of your own .py"
        )
    return _load(path)


def recipes() -> list[Recipe]:
    """Every recipe that comes with the package."""
    return [_load(path) for path in recipe_paths().values()]


def _load(path: Path) -> Recipe:
    spec = importlib.util.spec_from_file_location(f"selfrepair_nn_recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"recipe {str(path)!r} does not load: {one_line(error)}") from error
    if not callable(getattr(module, "graph", None)):
        raise UsageError(f"recipe {str(path)!r} defines no function {SIGNATURE}")
    summary = (module.__doc__ or "").strip().split("\n")[0]
    figures, defaults = getattr(module, "FIGURES", ()), getattr(module, "DEFAULTS", {})
    return Recipe(path, summary, module.graph, tuple(figures), dict(defaults))
