"""A figure of a store as one object: its name, what it shows, what it suits, and the function that draws it."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from selfrepair_nn.errors import UsageError
from selfrepair_nn.quantities import asked_in
from selfrepair_nn.values import brief


class Need(NamedTuple):
    """What a figure needs a dataset to hold: in words, after "it needs"; and as a test of the dataset.

    A test is of what is there (dimensions, coordinates, variables), never of a recipe's name: a store of anybody's own
    recipe is drawn as far as it goes.
    """

    words: str
    fits: Callable[[Any], bool]


ANY = Need("a store", lambda ds: "self_repair" in ds)


@dataclass(frozen=True)
class Drawing:
    """One figure. `draw(stores, share=…)` gives the matplotlib figure of stores by the name each has in the legend.

    `every_token`: it needs all tokens of a run, not the top share alone. `of_summary`: of a dataset it reads nothing
    but what `analysis.by_head` gives. `overview`: it draws any store of its kind, and is drawn where nothing says more.
    `nats`: it draws log-probability too, of a store that was asked in it (`analysis.in_nats`).
    """

    name: str
    about: str
    need: Need
    draw: Callable[..., Any]
    every_token: bool = False
    of_summary: bool = False
    overview: bool = False
    nats: bool = False

    def __call__(self, *stores: Any, **more: Any) -> Any:
        return self.draw(*stores, **more)

    def suits(self, ds: Any) -> bool:
        """Whether a dataset holds enough, and is about what it draws. What its test cannot read does not."""
        try:
            return bool(self.need.fits(ds)) and (self.nats or asked_in(ds) == "logit")
        except Exception:
            return False


def figure(
    needs: str = ANY.words,
    fits: Callable[[Any], bool] = ANY.fits,
    *,
    name: str | None = None,
    about: str | None = None,
    every_token: bool = False,
    of_summary: bool = False,
    overview: bool = False,
    nats: bool = False,
) -> Callable[[Callable[..., Any]], Drawing]:
    """Make a function draw(stores, share) a figure, to be named in the FIGURES of a recipe.

        @sr.figure("pairs of heads", lambda ds: "case" in ds.dims)
        def pair_map(stores, share):
            \"\"\"Self-repair of each pair of heads.\"\"\"

    `stores` are datasets by the name that each has in the legend, `share` is the top share of tokens to show; what
    comes back is a matplotlib Figure.

    Args:
        needs: what a store must hold, in words, after "it needs".
        fits: the same as a test of a store's dataset.
        name: what the figure and its files are called; default: the function's name.
        about: what it shows, in one line; default: the first line of the function's documentation.
        every_token: whether it needs all tokens of a run, which `--select top-share` does not keep.
        of_summary: whether it takes the result of `by_head` for a store too.
        overview: whether it is drawn only where no other figure suits a store.
        nats: whether it draws a store that was asked in log-probability (`in_nats`) too; its axes then say so.

    Raises:
        UsageError: the function cannot be called so, or the name cannot be a file's.
    """

    def made(function: Callable[..., Any]) -> Drawing:
        called = _name(name or getattr(function, "__name__", ""))
        _require_drawing(called, function)
        told = (about or inspect.getdoc(function) or called).strip().splitlines()[0]
        return Drawing(called, told, Need(needs, fits), function, every_token, of_summary, overview, nats)

    return made


def _name(given: str) -> str:
    """The last part of a module's name, or a function's name as it is."""
    found = given.rpartition(".")[2]
    if not re.fullmatch(r"\w{1,60}", found):
        raise UsageError(f"a figure cannot be called {brief(given)}: define a function, or give name=…")
    return found


def _require_drawing(name: str, function: Any) -> None:
    try:
        inspect.signature(function).bind({}, share=0.5)
    except (TypeError, ValueError):
        raise UsageError(f"figure {name} is drawn by a function: def {name}(stores, share)") from None


def drawings(given: Any) -> tuple[tuple[str, ...], Mapping[str, Drawing]] | None:
    """Names of figures, and those among them that are a recipe's own, by name; None if `given` is something else.

    A function that is not made a figure yet is one that suits every store.
    """
    listed = given if isinstance(given, list | tuple) else (given,)
    if not all(isinstance(each, str | Drawing) or inspect.isfunction(each) for each in listed):
        return None
    found = [figure()(each) if inspect.isfunction(each) else each for each in listed]
    own = {each.name: each for each in found if isinstance(each, Drawing)}
    return tuple(each if isinstance(each, str) else each.name for each in found), own
