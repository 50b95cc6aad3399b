"""The one filter for what others wrote, before it is printed, drawn or stored: no keys, and no power over a terminal.

Names, attributes, ledgers, servers' and hubs' messages may hold escape sequences, marks that turn the direction of
writing, or keys. A character that is not printable is written as Python would write it.
"""

import re
import sys
from contextlib import suppress

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


def tell(text: object) -> None:
    """A line for the user, on stderr, above the progress bar if there is one; none if the terminal was closed."""
    from tqdm import tqdm

    with suppress(OSError):
        tqdm.write(f"selfrepair: {shown(text)}", file=sys.stderr)


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
