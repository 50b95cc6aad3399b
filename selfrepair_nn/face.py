"""The public face: what a caller gives to a public function is taken in any plain form, or refused in one line.

A store's path stands for its dataset. What an annotation says is what is checked, so that a function says it once.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, get_args, get_origin, overload

from selfrepair_nn import options, values
from selfrepair_nn.errors import UsageError, one_line
from selfrepair_nn.given import Given

if TYPE_CHECKING:
    import xarray as xr

    Stored = xr.Dataset | str | os.PathLike[str]
    """What a caller may give for a dataset."""
    Several = xr.Dataset | Sequence[xr.Dataset] | Mapping[str, xr.Dataset]
    StoredSeveral = Stored | Sequence[Stored] | Mapping[str, Stored]

P = ParamSpec("P")
R = TypeVar("R")

GUARDED = "_guarded"
MISREAD = (AttributeError, KeyError, IndexError, TypeError, ValueError)
"""What a dataset that is no store, or lacks what a function reads, ends in."""


@overload
def public(
    function: "Callable[Concatenate[Several, P], R]",
) -> "Callable[Concatenate[StoredSeveral, P], R]": ...
@overload
def public(function: "Callable[Concatenate[xr.Dataset, P], R]") -> "Callable[Concatenate[Stored, P], R]": ...
def public(function: Any) -> Any:
    """A public function of a dataset, or of several: `guarded`, and for checkers it takes a store's path too."""
    return guarded(function)


def guarded(function: Callable) -> Callable:
    """The function, which opens stores by path, takes any spelling of a number, and raises UsageError for the rest."""
    if hasattr(function, GUARDED):
        return function
    signature = inspect.signature(function)
    kinds = [each.annotation for each in signature.parameters.values()]
    open_ended = inspect.Parameter.empty in kinds or (Any in kinds and not _has_keywords(signature))

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"{function.__name__}: {error}; write {function.__name__}{signature}") from error
        for name, given in bound.arguments.items():
            bound.arguments[name] = _taken(name, given, signature.parameters[name])
        try:
            return function(*bound.args, **bound.kwargs)
        except MISREAD as error:
            if any(map(_is_dataset, bound.arguments.values())):
                raise UsageError(
                    f"{function.__name__} cannot read this dataset ({one_line(error)}): give a store, or a summary, of "
                    "a recipe that records what it needs"
                ) from error
            if open_ended:
                raise UsageError(
                    f"{function.__name__} cannot use what it was given ({one_line(error)}); see its documentation"
                ) from error
            raise

    setattr(called, GUARDED, True)
    if _takes_options(signature):
        vars(called)["__signature__"] = _with_options(signature)
        called.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{options.described()}\n"
    return called


def _takes_options(signature: inspect.Signature) -> bool:
    """Whether a function takes all options of a run."""
    return any(get_args(each.annotation) == (Given,) for each in signature.parameters.values())


def _with_options(signature: inspect.Signature) -> inspect.Signature:
    """What people read of a function that takes options: each by its name."""
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    return signature.replace(parameters=[*own, *options.parameters()])


def _has_keywords(signature: inspect.Signature) -> bool:
    """Whether a function takes options, which say themselves what they cannot be."""
    return any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())


def _taken(name: str, given: Any, parameter: inspect.Parameter) -> Any:
    """An argument in the form that its annotation asks for."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or given is parameter.default:
        return given
    kinds = get_args(parameter.annotation) if _is_union(parameter.annotation) else (parameter.annotation,)
    if any(getattr(kind, "__name__", "") == "Dataset" for kind in kinds):
        return _datasets(name, given, several=len(kinds) > 1)
    if given is None and NoneType in kinds:
        return None
    for kind, check in _CHECKS.items():
        if kind in kinds:
            return check(name, given)
    for kind in kinds:
        _require_kind(name, given, kind)
    return given


def _is_union(annotation: Any) -> bool:
    return isinstance(annotation, UnionType) or str(get_origin(annotation)) == "typing.Union"


def _require_kind(name: str, given: Any, kind: Any) -> None:
    origin = get_origin(kind) or kind
    ours = isinstance(origin, type) and origin.__module__.startswith("selfrepair_nn")
    if (ours or origin in (Callable, Iterable, Mapping)) and not isinstance(given, origin):
        raise UsageError(f"{name} must be a {origin.__name__}, not {values.brief(given)}")


def _path(name: str, given: Any) -> Any:
    values.place(name, given)
    return given


def _text(name: str, given: Any) -> str:
    found = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(found, str):
        raise UsageError(f"{name} must be a text, not {values.brief(given)}")
    return found


_CHECKS: dict[Any, Callable[[str, Any], Any]] = {
    Path: _path,
    str: _text,
    bool: values.switch,
    int: lambda name, given: values.whole(name, given, -values.MOST),
    float: values.number,
}


def _is_dataset(given: Any) -> bool:
    if type(given).__name__ == "Dataset":  # which is a mapping too, of its variables
        return True
    held = (
        given.values()
        if isinstance(given, Mapping)
        else given
        if isinstance(given, list | tuple)
        else [given]
    )
    return any(type(each).__name__ == "Dataset" for each in held)


def _datasets(name: str, given: Any, several: bool) -> Any:
    """A dataset, or several; a path is opened."""
    if several and isinstance(given, Mapping) and not _is_dataset([given]):
        return {key: _dataset(name, each) for key, each in given.items()}
    if several and isinstance(given, list | tuple):
        return [_dataset(name, each) for each in given]
    return _dataset(name, given)


def _dataset(name: str, given: Any) -> Any:
    import xarray as xr

    if isinstance(given, xr.Dataset):
        return given
    if isinstance(given, str | os.PathLike):
        from selfrepair_nn.store import open_store

        return open_store(os.fspath(given))
    raise UsageError(f"{name} must be a dataset or the path of a store, not {values.brief(given)}")
