"""What an answer over HTTP holds: JSON, a result, or what came in its place, a web page or a store's refusal."""

import io
import re
from base64 import b64decode
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from html import unescape
from pickle import Unpickler, UnpicklingError
from typing import Any
from zipfile import ZipFile

import httpx

from selfrepair_nn.backends.ndif.faults import Fault
from selfrepair_nn.shown import line

LONGEST_SAID, LONGEST_TITLE = 300, 80
LOOKED_AT = 20_000
"""Bytes of a page in which its title is looked for."""

ADDRESSES = "http://", "https://", "/"
AS_IN_ADDRESSES = str.maketrans("-_", "+/")
"""Base64 has two alphabets: this turns that of addresses into the other."""

_HOW = re.IGNORECASE | re.DOTALL
_PAGE = re.compile(r"\W*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", _HOW)
_TITLE = re.compile(r"<title[^>]*>(.*?)</title", _HOW)
_UNSEEN = re.compile(r"<(script|style|head)\b.*?(</\1\s*>|\Z)|<!--.*?(-->|\Z)|<[^>]*>", _HOW)


def page(answer: httpx.Response) -> str | None:
    """What a web page calls itself, or else how it begins; None for an answer that is no web page."""
    if not answer.headers.get("content-type", "text/html").startswith(("text/", "application/xhtml")):
        return None
    text = answer.content[:LOOKED_AT].decode(errors="replace")
    if not _PAGE.match(text):
        return None
    title = _TITLE.search(text)
    said = unescape(title[1] if title else "") or unescape(_UNSEEN.sub(" ", text))
    return f"a web page, {line(' '.join(said.split()), LONGEST_TITLE)!r}"


def detail(answer: httpx.Response) -> str:
    """The words of an answer that is no success, in one line."""
    if found := page(answer):
        return found
    if code := of_store(answer):
        return line(f"{code}: {_between('Message', answer)}", LONGEST_SAID)
    try:
        found = answer.json()
    except ValueError:
        return line(answer.text.strip(), LONGEST_SAID) or answer.reason_phrase
    return str(found.get("detail", found) if isinstance(found, dict) else found)


def is_json(answer: httpx.Response) -> bool:
    """Whether an answer can be the server's own: JSON, whatever it says."""
    try:
        answer.json()
    except ValueError:
        return False
    return True


def carried(answer: httpx.Response) -> dict[str, Any] | None:
    """What an answer says that carries a result with it; None of any other.

    It is what torch.save makes of the same names that JSON has (nnsight.schema.response.ResponseModel.pickle, 0.8), as
    servers send it over a socket: a pickle of plain values in an archive. Nothing else is ever unpickled.
    """
    try:
        with ZipFile(io.BytesIO(answer.content)) as archive:
            (pickled,) = [each for each in archive.infolist() if each.filename.endswith("/data.pkl")]
            whole = pickled.file_size <= len(answer.content)  # it is not compressed
            found = _Plain(io.BytesIO(archive.read(pickled))).load() if whole else None
    except Exception:
        return None
    return found if isinstance(found, dict) else None


class _Plain(Unpickler):
    """Reads plain values alone, and a Status as the word that it is."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("nnsight.schema.response", "Status"):
            return str
        raise UnpicklingError(f"{module}.{name} is no plain value")


def result_in(data: Any) -> bytes | str:
    """The result that an answer holds, or else its address: "" if it has neither.

    In JSON, bytes can only be base64.
    """
    if not isinstance(data, str) or not data or data.startswith(ADDRESSES):
        return data if isinstance(data, str | bytes) else ""
    try:
        return b64decode(data.translate(AS_IN_ADDRESSES), validate=True)
    except ValueError:
        return data


def parsed(answer: httpx.Response) -> dict[str, Any]:
    """What an answer says. Raises Fault "not ndif" for one that names nothing."""
    found = answer.json() if is_json(answer) else carried(answer)
    if not isinstance(found, dict):
        raise Fault("not ndif", f"HTTP {answer.status_code}: {line(answer.text, LONGEST_SAID)}")
    return found


def named(found: dict[str, Any], *names: str) -> list[Any]:
    """Parts of an answer that an NDIF server always gives. Raises Fault "not ndif" if one is missing."""
    if missing := [name for name in names if name not in found]:
        raise Fault("not ndif", f"an answer without {', '.join(missing)}")
    return [found[name] for name in names]


def of_store(answer: httpx.Response) -> str:
    """Why a store of results refuses: its code, such as ExpiredToken; "" where it gives none."""
    return _between("Code", answer)


def _between(name: str, answer: httpx.Response) -> str:
    text = answer.content[:LOOKED_AT].decode(errors="replace")
    found = re.search(rf"<Error>.*<{name}>(.*?)</{name}>", text, re.DOTALL)
    return unescape(found[1]) if found else ""


def clock_of(answer: httpx.Response) -> float | None:
    """The time at which an answer was given by its sender's clock, in seconds; None if it does not say, or is kept."""
    if "age" in answer.headers:
        return None
    try:
        found = parsedate_to_datetime(answer.headers["date"])
    except (KeyError, TypeError, ValueError):
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def now() -> float:
    """The same by our clock."""
    return datetime.now(UTC).timestamp()


def loaded(content: bytes) -> dict[str, Any]:
    """The saved values of a result. Only tensors, numbers, text and their containers are ever unpickled.

    Raises Fault "result" for what is none, or is cut.
    """
    import torch
    import zstandard

    try:
        unpacked = zstandard.ZstdDecompressor().decompress(content)
        found = torch.load(io.BytesIO(unpacked), map_location="cpu", weights_only=True)
    except Exception as error:
        raise Fault("result", f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise Fault("result", f"it is no set of named values, but of type {type(found).__name__}")
    return found
