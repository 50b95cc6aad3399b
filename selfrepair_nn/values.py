"""What a caller may write for one value, and the one form in which it is kept: every spelling ends here.

Each function takes the name of what is given and the value, and raises UsageError in one line for what it cannot be.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from inspect import Signature, signature
from math import log10
from operator import index
from reprlib import Repr
from typing import TYPE_CHECKING, Any

import numpy as np

from selfrepair_nn.errors import UsageError, one_line
from selfrepair_nn.head_names import plain
from selfrepair_nn.paths import require_possible

MOST = 10**12
"""No run can mean more of anything."""

_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 2, 60, 30, 60


def brief(value: Any) -> str:
    """A value in an error: one short line, whatever it is."""
    try:
        return " ".join(_SHORT.repr(value).split())[:120]
    except Exception:
        return f"a {type(value).__name__}"


def nearest(name: object, valid: Iterable[str]) -> str:
    """ " (did you mean …?)" where one of the valid names is nearly this one, else nothing."""
    found = get_close_matches(str(name), list(valid), n=2)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def one_of(what: str, value: Any, valid: Collection[str]) -> str:
    """One of the names of `valid`, as it is written there."""
    if not isinstance(value, str) or value not in valid:
        raise UsageError(f"{what} {brief(value)} is not known; choose one of {', '.join(valid)}")
    return value


def whole(name: str, value: Any, least: int = 1, most: int = MOST) -> int:
    """An integer from `least` to `most`: Python's, NumPy's, a tensor of one, or a float without a fraction."""
    found = _integer(value)
    if found is None or found < least:
        asked = {0: " (0 or more)", -MOST: ""}.get(least, f" of at least {least}")
        raise UsageError(f"{name} must be a whole number{asked}, not {brief(value)}")
    require_sane(name, found, most)
    return found


def require_sane(name: str, value: Any, most: int) -> None:
    """UsageError for a whole number that no run can mean: it would be computed until memory or patience ends."""
    if isinstance(value, int) and abs(value) > most:
        digits = round(value.bit_length() * log10(2))
        size = f"{value:,}" if digits < 30 else f"a number of about {digits} digits"
        raise UsageError(f"{name} must be at most {most:,}, not {size}")


def _integer(value: Any) -> int | None:
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return index(value)
    except TypeError:
        return int(value) if isinstance(value, float | np.floating) and value.is_integer() else None


def number(name: str, value: Any) -> float:
    """A real number: Python's, NumPy's, or a tensor of one. True is none."""
    if isinstance(value, str | bytes | bool | np.bool_) or not hasattr(value, "__float__"):
        raise UsageError(f"{name} must be a number, not {brief(value)}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise UsageError(f"{name} must be a number, not {brief(value)}") from None


def switch(name: str, value: Any) -> bool:
    """True or False, and nothing that merely counts as one of them."""
    if not isinstance(value, bool | np.bool_):
        raise UsageError(f"{name} must be True or False, not {brief(value)}")
    return bool(value)


def text(name: str, value: Any) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{name} must be a text that is not empty, not {brief(value)}")
    return value


def place(name: str, value: Any) -> str:
    """A path, as text: a string, or a `Path`."""
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(found, str) or not found.strip():
        raise UsageError(f"{name} must be a path, not {brief(value)}")
    require_possible(found, name)
    return found


def source(name: str, value: Any) -> Any:
    """A place or a name as text; any other object as it is, for who loads it to judge."""
    return place(name, value) if isinstance(value, str | os.PathLike) else value


def named(name: str, value: Any) -> str:
    """A torch or NumPy type, or a device, as its name: torch.float64 is "float64"."""
    found = getattr(value, "__name__", None) if isinstance(value, type) else None
    return text(name, found or (value if isinstance(value, str) else str(value).removeprefix("torch.")))


def revisions(name: str, value: Any) -> tuple[str, ...]:
    """Names of checkpoints, in a list or with commas between them."""
    given = value.split(",") if isinstance(value, str) else several(value)
    found = tuple(os.fspath(each).strip() if isinstance(each, str | os.PathLike) else "" for each in given or ())
    if not found or not all(found):
        raise UsageError(f"{name} {brief(value)}: write names with commas between them, such as step1000,step4000")
    return found


def part(name: str, value: Any) -> str:
    """ "3/8" or (3, 8): one of so many."""
    pair = value.split("/") if isinstance(value, str) else value
    if isinstance(pair, list | tuple) and len(pair) == 2:
        first, last = (_integer(int(v)) if str(v).isdecimal() and len(str(v)) < 9 else None for v in pair)
        if first and last and first <= last:
            return f"{first}/{last}"
    raise UsageError(f"{name} {brief(value)} is not one of N: write 1/8 to 8/8")


def layers(name: str, value: Any) -> str:
    """Layers as "8:12" or "0,5,-1": from such a text, a number, a range, a slice, or several of these."""
    if isinstance(value, str):
        return value
    if isinstance(value, slice) and value.step in (None, 1):
        return ":".join(
            "" if end is None else str(whole(name, end, -MOST)) for end in (value.start, value.stop)
        )
    if _integer(value) is not None:
        return str(whole(name, value, -MOST))
    if (found := several(value)) is None:
        raise UsageError(
            f"{name} {brief(value)} is not understood: write for example 8:12, [0, 5, -1] or range(8, 12)"
        )
    return ",".join(layers(name, each) for each in found)


PAIR = {"layer", "head"}
"""What names a head in a record."""


def heads(name: str, value: Any) -> str:
    """Heads as "9.6,10.*": from such a text, other tools' names, a Head, a pair (layer, head), or several of these.

    A mapping has the heads of each layer, {9: [6, 9]}, or is one head, {"layer": 9, "head": 6}; an array of truth
    values, [layer, head], marks them. A text may be JSON of any of these.
    """
    value = _marked(_in_json(value))
    if isinstance(value, Mapping):
        of_layers = [(layer, head) for layer, held in value.items() for head in several(held) or [held]]
        value = [value] if value.keys() >= PAIR else of_layers
    one = _head(value) if isinstance(value, str | tuple) or hasattr(value, "head") else None
    listed = several(value)
    if listed == []:
        return ""
    found = [one] if one is not None else [_head(each) for each in listed or [None]]
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        raise UsageError(
            f"{name} {brief(value)} is not understood: write a head as 9.6, L9H6, (9, 6) or Head(9, 6), and several as "
            "a list of these"
        )
    return ",".join(known)


def _in_json(value: Any) -> Any:
    """What a text of JSON holds, if it is one of heads by layer or of several; "[9, 6]" is one head."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    pair = isinstance(found, list) and found and all(isinstance(each, int) for each in found)
    return value if pair else found


def _marked(value: Any) -> Any:
    """The pairs that an array of truth values marks."""
    if str(getattr(value, "dtype", "")) not in ("bool", "torch.bool") or len(value.shape) != 2:
        return value
    return np.argwhere(value.tolist()).tolist()


def _head(value: Any) -> str | None:
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        value = [value[name] for name in ("layer", "head") if name in value]
    pair = [value.layer, value.head] if hasattr(value, "head") and hasattr(value, "layer") else several(value)
    known = [_index_of(each) for each in pair or ()]
    if len(known) != 2 or None in known or known[0] == "*":
        return None
    return f"{known[0]}.{known[1]}"


def _index_of(value: Any) -> str | None:
    """A layer or a head by its number, which a JSON's names hold as text; all heads are "*"."""
    if isinstance(value, str):
        return value.strip() if re.fullmatch(r"\s*(\d{1,9}|\*)\s*", value, re.ASCII) else None
    found = _integer(value)
    return None if found is None or abs(found) > MOST else str(found)


def prompts(name: str, value: Any) -> Any:
    """A path or a dataset's name as text, texts as a tuple, rows of token ids as an array; `Prompts` as they are."""
    if isinstance(value, str | os.PathLike):
        return place(name, value)
    if hasattr(value, "tokens") and hasattr(value, "document"):
        return value
    value = _listed(value)
    if isinstance(value, list | tuple) and value and all(isinstance(each, str) for each in value):
        return tuple(value)
    if isinstance(value, list | tuple) and ragged(value):
        rows = (ids(f"row {number} of {name}", row, "token ids") for number, row in enumerate(value))
        return tuple(tuple(row.tolist()) for row in rows)
    return ids(name, value, "a path, a dataset's name, a list of texts, rows of token ids, or Prompts")


def _listed(value: Any) -> Any:
    """What gives one thing after the other, and what holds texts in a row, such as a table's column, as a list."""
    if isinstance(value, Iterator):
        return list(value)
    in_a_row = isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1
    if isinstance(value, list | tuple | bytes) or not in_a_row:
        return value
    return [*map(str, value)] if len(value) and all(isinstance(each, str) for each in value) else value


def ragged(rows: Any) -> bool:
    """Whether these are rows of unequal length in a list."""
    if not isinstance(rows, list | tuple) or any(isinstance(row, str) or not hasattr(row, "__len__") for row in rows):
        return False
    return len({len(row) for row in rows}) > 1


def partners(name: str, value: Any) -> Any:
    """A path as text, or the entries as an array."""
    if isinstance(value, str | os.PathLike):
        return place(name, value)
    return ids(name, value, "a path, or the index of a prompt for each prompt")


def ids(name: str, value: Any, wanted: str) -> np.ndarray:
    """Whole numbers in a list, rows of them, an array or a tensor, as an array."""
    value = value.detach().cpu() if hasattr(value, "detach") else value
    if isinstance(value, list | tuple):
        require_one_length(name, value)
    if getattr(value, "ndim", 1) and hasattr(value, "__len__") and not len(value):
        raise UsageError(f"{name} is empty: give {wanted}")
    try:
        found = np.asarray(value)
    except Exception:
        found = np.empty(0, object)
    if (found.dtype.kind in "OSUV" and found.dtype != getattr(value, "dtype", None)) or not found.ndim:
        raise UsageError(f"{name} {brief(value)} is not understood: give {wanted}")
    return found


def require_one_length(name: str, rows: list[Any] | tuple[Any, ...]) -> None:
    """UsageError for rows of unequal length."""
    lengths = [len(row) if hasattr(row, "__len__") and not isinstance(row, str) else -1 for row in rows]
    if odd := [i for i, length in enumerate(lengths) if length != lengths[0] and length >= 0 <= lengths[0]]:
        raise UsageError(
            f"{name} has rows of {lengths[0]} and of {lengths[odd[0]]} tokens (prompts 0 and {odd[0]}): all have one "
            "length, there is no padding but with rows_are='texts'; give that, or cut them, "
            f"[row[:{min(lengths)}] for row in prompts]"
        )


def parameters(name: str, value: Any) -> Any:
    """A recipe's parameters: a mapping, or "NAME=VALUE" once or several times as a tuple."""
    if isinstance(value, Mapping):
        return {text(f"a name of {name}", key): _plain(each) for key, each in value.items()}
    found = [value] if isinstance(value, str) else several(value)
    if found is None or not all(isinstance(each, str) for each in found):
        raise UsageError(f"{name} {brief(value)} is not understood: write NAME=VALUE, or {{'NAME': value}}")
    return tuple(found)


def _plain(value: Any) -> Any:
    """Of NumPy's or torch's numbers, Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


def several(value: Any) -> list[Any] | None:
    """What a list, a range, a set or an array holds, in order; None for what is no such thing."""
    if isinstance(value, Mapping | str | bytes):
        return None
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if hasattr(value, "tolist"):
        value = value.tolist()
    try:
        return list(value)
    except TypeError:
        return None


class Declared(type):
    """A class whose instances say something (a place, a graph, prompts): what they cannot say is a UsageError."""

    if not TYPE_CHECKING:  # checkers read what each class says of itself

        def __call__(cls, *args, **kwargs):
            try:
                return super().__call__(*args, **kwargs)
            except (TypeError, AttributeError, ValueError) as error:
                raise UsageError(f"{cls.__name__}{cls.__signature__}: {one_line(error)}") from error

    @property
    def __signature__(cls) -> Signature:
        made = signature(cls.__init__)
        return made.replace(parameters=[*made.parameters.values()][1:], return_annotation=Signature.empty)
