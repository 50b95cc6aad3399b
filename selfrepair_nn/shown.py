"""The one filter for what others wrote, before it is printed, drawn or stored: no keys, and no power over a terminal.

Names, attributes, ledgers, servers' and hubs' messages may hold escape sequences, marks that turn the direction of
writing, or keys. A character that is not printable is written as Python would write it.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import isfinite
from typing import Any

from selfrepair_nn.secrets import hidden

_ENDLESS = re.compile(r"(\S{100})\S{300,}")


def shown(text: object) -> str:
    """Text of several lines: keys hidden, all but line ends and printable characters escaped."""
    return "\n".join(map(_escaped, hidden(str(text)).split("\n")))


def line(text: object, longest: int | None = None) -> str:
    """One line: as `shown`, line ends escaped too; cut to `longest` characters, if that is given."""
    found = _escaped(hidden(str(text)))
    return found if longest is None or len(found) <= longest else f"{found[: longest - 2]} …"


def message(text: object) -> str:
    """As `shown`; a word that nobody reads to its end, such as a number of 5,000 digits, is cut."""
    return _ENDLESS.sub(lambda word: f"{word[1]} … ({len(word[0])} characters)", shown(text))


def as_json(value: Any) -> str:
    """A result for a script, as one line of JSON; what is no finite number is null. Keys are hidden."""
    return hidden(json.dumps(_plain(value), allow_nan=False))


def _plain(value: Any) -> Any:
    """What JSON has a form for."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def decoded(value: Any) -> Any:
    """What a JSON string of an object or a list says; anything else as it is."""
    if not isinstance(value, str) or value[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


LEVELS = ("debug", "info", "warning", "error")
LEVEL = "SELFREPAIR_LOG_LEVEL"
"""The setting that says how much is told, to processes that a run starts too."""
LOG = logging.getLogger("selfrepair_nn")


class _Above(logging.Handler):
    """Writes to stderr, above the progress bar if there is one; nothing if the terminal was closed."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with suppress(OSError):
            tqdm.write(f"selfrepair: {shown(record.getMessage())}", file=sys.stderr)


@contextmanager
def telling(level: str | None) -> Iterator[None]:
    """Within, tell what is at least so important, one of LEVELS; "debug" tells what libraries log too."""
    if level is None:
        yield
        return
    before, setting, libraries = LOG.level, os.environ.get(LEVEL), _Above() if level == "debug" else None
    os.environ[LEVEL] = level
    LOG.setLevel(level.upper())
    if libraries:
        logging.root.addHandler(libraries)
    try:
        yield
    finally:
        LOG.setLevel(before)
        if libraries:
            logging.root.removeHandler(libraries)
        if setting is None:
            del os.environ[LEVEL]
        else:
            os.environ[LEVEL] = setting


def tell(text: object) -> None:
    """A line for the user: what may not be expected."""
    LOG.warning("%s", text)


def _set_up() -> None:
    """As other libraries: a handler of its own, so that what is told is seen without any setting up."""
    LOG.addHandler(_Above())
    LOG.propagate = False
    level = os.environ.get(LEVEL, "warning").lower()
    LOG.setLevel(level.upper() if level in LEVELS else "WARNING")


_set_up()


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
