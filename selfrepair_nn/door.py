"""What can be refused before anything is loaded: it takes a fraction of a second, torch and transformers take several.

A recipe or an option that there is not, layers that the model does not have, and a store that holds another run are
told from the files that say so: the recipe's, the model's configuration, the store's attributes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from selfrepair_nn.errors import StoreError
from selfrepair_nn.graph import Graph, Variants
from selfrepair_nn.models.architectures import HYBRIDS
from selfrepair_nn.models.checkpoints import checkpoints
from selfrepair_nn.models.load import find
from selfrepair_nn.models.model import AS_SERVED
from selfrepair_nn.naming import Request, Sizes
from selfrepair_nn.options import Options, current
from selfrepair_nn.prompts import Prompts
from selfrepair_nn.recipe import Recipe, find_recipe, present_name, recipe_paths

CERTAIN = ("freeze", "components", "select", "until_ci", "ci_of", "dtype", "remote")
"""Choices that decide numbers by themselves: where one differs, the runs do, whatever a recipe makes of it."""

TOLD = {
    "prompts": "the prompts' token ids are others",
    "partners": "the partners are others",
    "heads": "other places are ablated",
    "graph": "something else is done to them",
}
"""Settings that are hashes, or long."""

SIZES = {
    "n_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "n_heads": ("num_attention_heads", "n_head", "num_heads"),
    "max_length": ("max_position_embeddings", "n_positions"),
}


def requested(recipe: Any, options: Options) -> tuple[Recipe, Options]:
    """The recipe, and the options as it resolves them.

    Raises:
        UsageError: a recipe, a parameter, a model's directory, a layer or a head that there is not.
        StoreError: the store is certainly another run's; what is not certain is told later, from what is run.
    """
    found = find_recipe(recipe)
    options = found.resolved(options)
    if options.revisions:
        checkpoints(str(options.model), options.revisions)
        return found, options
    if isinstance(options.model, str):
        source = find(options.model, options.revision)
        if (told := sizes(source)) is not None:
            dtype = AS_SERVED if options.served else options.dtype
            _require_possible(Request(found, options, source.name, told, dtype))
    return found, options


def _require_possible(request: Request) -> None:
    drawn = _drawn(request)
    if request.sizes.max_length is None:  # a prompt's length, and so the store's name, may be another
        return
    attributes = attributes_of(request.path)
    if "options" in attributes and _certain(request, current(json.loads(attributes["options"])), attributes):
        raise request.refusal(request.differences(attributes))
    if drawn is not None:
        require_same_graphs(request, drawn)


def _drawn(request: Request) -> Graph | Variants | None:
    """What a recipe of ours does, where that asks no more of the model than its sizes; else None."""
    if request.recipe.path not in recipe_paths().values():
        return None
    sizes = SimpleNamespace(**asdict(request.sizes), headless=())
    try:
        found = request.recipe.build(sizes, request.options)
    except AttributeError:
        return None
    request.recipe.require_taken(sizes, request.options, found)
    return found


def require_same(request: Request, attributes: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """StoreError, in words, if a store with these attributes has other settings than these, so far as known."""
    try:
        stored = dict(json.loads(attributes["settings"]))
    except (KeyError, TypeError, ValueError, RecursionError):
        path = str(request.path)
        raise StoreError(f"{path!r} does not say how it was made: choose another --out") from None
    stored["recipe"] = present_name(stored.get("recipe"))
    differing = [name for name in settings if settings[name] != stored.get(name)]
    if differing:
        chosen = request.differences(attributes) if "options" in attributes else []
        raise request.refusal(chosen or [_in_words(n, stored.get(n), settings[n]) for n in differing])


def require_same_graphs(request: Request, drawn: Graph | Variants) -> None:
    """The same of what is done to the model, which is known before any text is read. Prompts may change the target."""
    attributes = attributes_of(request.path)
    if (
        attributes
        and request.recipe.make_prompts is None
        and not isinstance(request.options.prompts, Prompts)
    ):
        axis, graphs = (
            (drawn.axis, [*drawn.graphs.values()]) if isinstance(drawn, Variants) else (None, [drawn])
        )
        known = {"heads": graphs[0].labels, "graph": [axis, *(graph.digest for graph in graphs)]}
        require_same(request, attributes, known)


def _in_words(name: str, there: Any, here: Any) -> str:
    """A setting that differs: what no option says, or of a store that does not hold its options."""
    if name in TOLD:
        return TOLD[name]
    return f"{name} {json.dumps(there)[:40]} there, {json.dumps(here)[:40]} here"


def _certain(request: Request, there: Mapping[str, Any], attributes: Mapping[str, Any]) -> bool:
    """Whether the runs differ for sure, and not only in how they were asked for."""
    if (present_name(attributes.get("recipe")), attributes.get("model")) != (request.recipe.name, request.model):
        return True
    here, own = request.choices, request.recipe.make_prompts is not None
    rows = {_rows(there), _rows(here)}
    return (not own and None not in rows and len(rows) > 1) or any(there.get(n) != here[n] for n in CERTAIN)


def _rows(chosen: Mapping[str, Any]) -> tuple[int, int] | None:
    """How many prompts of how many tokens these are, of a text that is long enough; None where that is open."""
    if chosen.get("rows_are") == "texts":
        return None
    tokens, length = chosen.get("tokens"), chosen.get("length")
    if type(tokens) is int and type(length) is int and length > 0:
        return tokens // length, length
    return None


def attributes_of(path: Path) -> dict[str, Any]:
    """A store's attributes, without zarr; empty where there is no store that says how it was made."""
    try:
        found = json.loads((path / "zarr.json").read_text())["attributes"]
        nested = [json.loads(found.get(name, "{}")) for name in ("settings", "options")]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return found if "settings" in found and all(type(each) is dict for each in nested) else {}


def sizes(source: Any) -> Sizes | None:
    """A model's sizes as its configuration tells; None where it does not, or not which layers have heads."""
    try:
        config = json.loads((Path(source.location) / "config.json").read_text())
        found = {name: next((config[k] for k in keys if k in config), None) for name, keys in SIZES.items()}
        if config.get("model_type") in HYBRIDS:
            return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    found = {name: size if type(size) is int and size > 0 else None for name, size in found.items()}
    return Sizes(**found) if found["n_layers"] and found["n_heads"] else None
