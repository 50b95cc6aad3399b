"""Finding and loading recipes: ours by name, a user's own by path."""

import ast
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import Any

from selfrepair_nn.drawing import Drawing, drawings
from selfrepair_nn.errors import SelfRepairError, UsageError, one_line
from selfrepair_nn.graph import Graph, Variants
from selfrepair_nn.options import Options, current
from selfrepair_nn.prompts import Prompts, require_readable
from selfrepair_nn.values import brief, nearest, place, require_sane

PACKAGE = Path(__file__).parent
FOLDERS = (PACKAGE / "_recipes", PACKAGE.parent / "recipes")
"""Where an installed wheel and a checkout keep the recipes."""

RENAMED = {"noise": "token_scatter"}
"""Former names of our recipes, which still work and are in stores."""

LARGEST_PARAMETER = 10**9
SIGNATURE = "graph(structure, options)"
OF_PROMPTS = ("prompts", "tokens", "length", "rows_are", "bos", "dataset_split", "column", "prompts_revision")
OF_GRAPHS = ("layers", "heads", "ablation", "target", "value_bias", "freeze", "components", "logprob", "words", "split")
PROMPTS = "prompts(structure, tokenizer, options)"


@dataclass(frozen=True)
class Recipe:
    """One experiment: `build(structure, options)` says what is done, `figures` names what is drawn from its store.

    `drawings` are those of its figures that its own file draws, by name.
    `make_prompts(structure, tokenizer, options)`, if there is one, makes the prompts. `parameters` are choices of the
    recipe's own with their defaults (`options.param`); `defaults` are options that it takes where they are left at
    the default of every recipe.
    """

    path: Path
    summary: str
    build: Callable[[Any, Any], Any]
    make_prompts: Callable[[Any, Any, Any], Any] | None
    parameters: Mapping[str, Any]
    defaults: Mapping[str, Any]
    figures: tuple[str, ...]
    drawings: Mapping[str, Drawing]

    @property
    def name(self) -> str:
        return self.path.stem

    def resolved(self, options: Options) -> Options:
        """The options, with the recipe's defaults and every parameter of its own: as given, or its default.

        Raises:
            UsageError: a default that is no option; a parameter that the recipe does not have, or a value of another
                kind than its default.
        """
        usual = {each.name: each.default for each in fields(Options)}
        if unknown := ", ".join(sorted(map(str, self.defaults.keys() - usual))):
            raise UsageError(
                f"recipe {str(self.path)!r}: DEFAULTS names {unknown}, which is no option of a run"
            )
        own = {n: v for n, v in self.defaults.items() if getattr(options, n) == usual[n]}
        return replace(options, **own, param={**self.parameters, **self._given(options.param)})

    def _given(self, param: Any) -> dict[str, Any]:
        pairs = param.items() if isinstance(param, Mapping) else (_pair(text) for text in param)
        found = {}
        for name, value in pairs:
            if name not in self.parameters:
                valid, near = ", ".join(self.parameters) or "none", nearest(name, self.parameters)
                raise UsageError(
                    f"recipe {self.name!r} has no parameter {brief(name)}{near}; it has: {valid}"
                )
            found[name] = _like(name, value, self.parameters[name])
        return found

    def prompts(self, structure: Any, tokenizer: Any, options: Any) -> Prompts | None:
        """The recipe's own prompts, or None where it takes those of the options.

        Raises:
            UsageError: its function fails, gives no Prompts or such as the model does not read, or leaves unread what
                was chosen for them.
        """
        if self.make_prompts is None:
            return None
        watched, read = _watched(options)
        found = self._called(self.make_prompts, PROMPTS, structure, tokenizer, watched)
        if not isinstance(found, Prompts | None):
            raise UsageError(f"recipe {str(self.path)!r}: {PROMPTS} gives {found!r}, not Prompts")
        if found is not None:
            self._require_read(options, read)
            require_readable(found, structure.vocab_size, structure.max_length)
        return found

    def _require_read(self, options: Options, read: set[str]) -> None:
        for name in self._unread(options, read, OF_PROMPTS):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"recipe {self.name!r} makes prompts of its own and takes no {flag}: leave it out"
            )

    def _unread(self, options: Options, read: set[str], names: Iterable[str]) -> list[str]:
        """Which of these choices were made, and not looked at."""
        usual = {each.name: each.default for each in fields(Options)} | dict(self.defaults)
        usual |= {"ablation": "mean"} if options.alone else {}
        usual |= {"split": "total"} if options.of_trends and options.split == "total" else {}
        chosen = {name: getattr(options, name) for name in names if name not in read}
        return [n for n, v in chosen.items() if type(v) is not type(usual[n]) or v != usual[n]]

    def graph(self, structure: Any, options: Any) -> Graph | Variants:
        """What the recipe does with a model of this structure, given these options.

        Raises:
            UsageError: its function fails, or what it gives is no Graph that fits the model.
        """
        found = self._called(self.build, SIGNATURE, structure, options)
        if not isinstance(found, Graph | Variants):
            raise UsageError(
                f"recipe {str(self.path)!r}: {SIGNATURE} gives {found!r}, not a Graph or Variants"
            )
        for graph in found.graphs.values() if isinstance(found, Variants) else [found]:
            self._require_fit(graph, structure)
        return found

    def require_taken(self, structure: Any, options: Any, drawn: Graph | Variants) -> None:
        """UsageError for a choice that was made for what a recipe of ours has drawn, and that it does not look at."""
        if self.path not in recipe_paths().values():
            return
        watched, read = _watched(options)
        self.build(structure, watched)
        graph = next(iter(drawn.graphs.values())) if isinstance(drawn, Variants) else drawn
        wide = graph.record == "full" or graph.neurons is not None
        for name in self._unread(options, read, [n for n in OF_GRAPHS if n != "components" or not wide]):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"recipe {self.name!r} decides by itself and takes no {flag}: leave it out")

    def _called(self, function: Callable, called: str, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except SelfRepairError:
            raise
        except Exception as error:
            raise UsageError(f"recipe {str(self.path)!r}: {called} fails: {one_line(error)}") from error

    def _require_fit(self, graph: Graph, structure: Any) -> None:
        if not graph.ablate or not all(graph.ablate):
            raise UsageError(
                f"recipe {str(self.path)!r} ablates nothing: each entry of ablate names a site or more"
            )
        if beyond := graph.beyond(structure):
            raise UsageError(
                f"recipe {str(self.path)!r} names {beyond}: the model has {_said(structure)}"
            )
        if misfit := graph.misfit(structure):
            raise UsageError(f"recipe {str(self.path)!r}: {misfit}")


def _said(structure: Any) -> str:
    """What can be named in a model."""
    neurons = f"neurons 0 to {structure.d_mlp - 1}" if structure.d_mlp else "MLPs not split into neurons"
    found = [f"layers 0 to {structure.n_layers - 1} of heads 0 to {structure.n_heads - 1} and {neurons}"]
    if structure.headless:
        found.append(f"no heads in layers {', '.join(map(str, structure.headless))}")
    if structure.norms:
        found.append(f"in each a norm before {' and before '.join(structure.norms)}")
    return ", and ".join(found)


def _watched(options: Options) -> tuple[Options, set[str]]:
    """The same options, and the names of those that were read so far."""
    read: set[str] = set()

    class Watched(type(options)):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    watched = copy(options)
    object.__setattr__(watched, "__class__", Watched)
    return watched, read


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"parameter {brief(text)}: write NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, value


def _like(name: str, value: Any, default: Any) -> Any:
    """A value of the kind that the default is; one number or word alone is a list of one."""
    if isinstance(default, tuple):
        value = tuple(value) if isinstance(value, tuple | list) else (value,)
    for number in value if isinstance(value, tuple) else (value,):
        require_sane(f"parameter {name}", number, LARGEST_PARAMETER)
        if isinstance(number, float) and not isfinite(number):
            raise UsageError(f"parameter {name}: {number!r} is not finite")
    kinds = (int, float) if isinstance(default, float) else () if default is None else type(default)
    like = (
        isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool) if kinds else True
    )
    if not like or not _alike(value, default):
        raise UsageError(f"parameter {name}: {brief(value)} is not like its default, {default!r}")
    return value


def _alike(value: Any, default: Any) -> bool:
    """Whether a list's entries are numbers where the default's are, or words where those are."""
    if not isinstance(default, tuple) or not default:
        return True
    kinds = (int, float) if isinstance(default[0], int | float) else type(default[0])
    return all(isinstance(each, kinds) for each in value)


def recipe_paths() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {
        p.stem: p for folder in FOLDERS for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")
    }


def find_recipe(name: Any) -> Recipe:
    """A recipe by name, or from a path ending in .py.

    Raises:
        UsageError: no such recipe; a file that cannot be read as one.
    """
    name = place("recipe", name)
    name = RENAMED.get(name, name)
    path = Path(name).expanduser() if name.endswith(".py") else recipe_paths().get(name)
    if path is None or not path.is_file():
        raise UsageError(
            f"no recipe {brief(name)}{nearest(name, recipe_paths())}; there are {', '.join(recipe_paths())}, "
            "or give the path of your own .py"
        )
    return _load(path)


def present_name(name: Any) -> Any:
    """What the recipe of this name, in a store perhaps, is called now."""
    return RENAMED.get(name, name) if isinstance(name, str) else name


def renamed(name: Any) -> str | None:
    """What is to be said of a recipe that was asked for by a former name, which still works."""
    now = present_name(name)
    return None if now == name else f"the recipe {name} is called {now} now"


def recipes() -> list[Recipe]:
    """Every recipe that comes with the package."""
    return [_load(path) for path in recipe_paths().values()]


def _load(path: Path) -> Recipe:
    try:
        return _loaded(path, path.read_bytes())
    except OSError as error:
        raise UsageError(f"recipe {str(path)!r} cannot be read: {one_line(error)}") from error


@lru_cache(maxsize=64)
def _loaded(path: Path, content: bytes) -> Recipe:
    """The recipe in a file of this content: it is executed once, however often it is asked for."""
    module = ModuleType(f"selfrepair_nn_recipe_{path.stem}")
    module.__file__ = str(path)
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UsageError(f"recipe {str(path)!r} does not load: {one_line(error)}") from error
    if not callable(getattr(module, "graph", None)):
        raise UsageError(f"recipe {str(path)!r} defines no function {SIGNATURE}")
    summary = (module.__doc__ or "").strip().split("\n")[0]
    parameters, defaults = (_mapping(module, path, name) for name in ("PARAMETERS", "DEFAULTS"))
    prompts = getattr(module, "prompts", None)
    return Recipe(path, summary, module.graph, prompts, parameters, current(defaults), *_figures(module, path))


def _mapping(module: Any, path: Path, name: str) -> dict[str, Any]:
    found = getattr(module, name, {})
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise UsageError(f"recipe {str(path)!r}: {name} is a dict of names and values, not {brief(found)}")
    return dict(found)


def _figures(module: Any, path: Path) -> tuple[tuple[str, ...], Mapping[str, Drawing]]:
    given = getattr(module, "FIGURES", ())
    found = drawings(given)
    if found is None:
        raise UsageError(
            f"recipe {str(path)!r}: FIGURES is a tuple of names of figures and of functions that draw one, "
            f"not {brief(given)}"
        )
    return found
