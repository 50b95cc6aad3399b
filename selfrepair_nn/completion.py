"""What a shell offers on the tab key: recipes, figures, embedded models, and the layers of the model that was named."""

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from selfrepair_nn.errors import SelfRepairError


def completing(
    values: Callable[[click.Context], Iterable[str]], files: bool = False, several: bool = False
) -> Callable[..., list[CompletionItem]]:
    """For `shell_complete`: of some values those that begin so, and files too.

    With `several`, values are parted by commas, and the last of them is completed.
    """

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",") if several else ("", "", incomplete)
        try:
            found = [CompletionItem(before + comma + v) for v in values(ctx) if v.startswith(last)]
        except SelfRepairError:
            found = []
        return found + ([CompletionItem(incomplete, type="file")] if files else [])

    return complete


def recipes(ctx: click.Context) -> Iterable[str]:
    from selfrepair_nn.recipe import recipe_paths

    return recipe_paths()


def figures(ctx: click.Context) -> Iterable[str]:
    from selfrepair_nn.figures import known

    return known()


def models(ctx: click.Context) -> Iterable[str]:
    from selfrepair_nn.models.load import EMBEDDED

    return EMBEDDED


def layers(ctx: click.Context) -> Iterable[str]:
    """The layers of the model that stands on the line already, or of the store."""
    return map(str, range(_sizes(ctx)[0]))


def heads(ctx: click.Context) -> Iterable[str]:
    n_layers, n_heads = _sizes(ctx)
    return (f"{layer}.{head}" for layer in range(n_layers) for head in (*range(n_heads), "*"))


def _sizes(ctx: click.Context) -> tuple[int, int]:
    """How many layers and heads; none where neither a configuration nor a store tells."""
    given = ctx.params.get("store"), *(ctx.params.get("stores") or ())
    for store in filter(None, given):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            told = json.loads((Path(store) / "zarr.json").read_text())["attributes"]
            return int(told["n_layers"]), int(told["n_heads"])
    from selfrepair_nn.door import sizes
    from selfrepair_nn.models.load import find

    found = sizes(find(ctx.params.get("model") or "tiny-neox"))
    return (found.n_layers, found.n_heads) if found else (0, 0)


COMPLETED: dict[str, Any] = {
    "recipe": completing(recipes, files=True),
    "names": completing(figures),
    "model": completing(models, files=True),
    "layers": completing(layers, several=True),
    "heads": completing(heads, several=True),
}
"""By the name of an argument or an option."""
