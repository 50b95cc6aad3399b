"""What an answer over HTTP holds: JSON, a result, or what came in its place, a web page or a store's refusal."""

import io
import json
import re
from base64 import b64decode
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from html import unescape
from pickle import Unpickler, UnpicklingError
from pickletools import genops
from typing import Any
from zipfile import ZipFile

import httpx

from selfrepair_nn.backends.ndif.faults import Fault
from selfrepair_nn.shown import line

LONGEST_SAID, LONGEST_TITLE = 300, 80
LOOKED_AT = 20_000
"""Bytes of a page in which its title is looked for."""

LARGEST = 2.0**63
"""No count and no time that a server tells is larger."""

ADDRESSES = "http://", "https://", "/"
AS_IN_ADDRESSES = str.maketrans("-_", "+/")
"""Base64 has two alphabets: this turns that of addresses into the other."""

DEEPEST = 8
"""No result is nested deeper."""

AT_A_NUMBER = {"PUT", "BINPUT", "LONG_BINPUT"}
"""Opcodes of a pickle that keep a value under any number: memory is taken for all numbers below."""

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
    if (found := said(answer)) is None:
        return line(_text(answer).strip(), LONGEST_SAID) or answer.reason_phrase
    return str(found.get("detail", found))


def said(answer: httpx.Response) -> dict[str, Any] | None:
    """What an answer says in JSON, by name, without what no file can hold; None for one that names nothing."""
    try:
        found = json.loads(_text(answer))
        return _writable(found) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return None


def replicas_in(found: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What a server says of each replica, by what is READ; None if that is no server's."""
    every = found.get("deployments") or {}
    if not isinstance(every, dict) or not all(isinstance(each, dict) for each in every.values()):
        return None
    return [{n: each[n] for n, read in READ.items() if read(each.get(n)) is not None} for each in every.values()]


def versions_in(found: dict[str, Any]) -> dict[str, str] | None:
    """Versions of python, and of every package by its import name; None if they are no server's."""
    python, packages = text(found.get("python_version")), found.get("packages")
    if not python or not python.strip() or not isinstance(packages, dict):
        return None
    return {"python": python.split()[0]} | {name: v for name, v in packages.items() if text(v)}


def carried(answer: httpx.Response) -> dict[str, Any] | None:
    """What an answer says that carries a result with it; None of any other.

    It is what torch.save makes of the same names that JSON has (nnsight.schema.response.ResponseModel.pickle, 0.8), as
    servers send it over a socket: a pickle of plain values in an archive. Nothing else is ever unpickled.
    """
    try:
        with ZipFile(io.BytesIO(answer.content)) as archive:
            (pickled,) = [each for each in archive.infolist() if each.filename.endswith("/data.pkl")]
            whole = pickled.file_size <= len(answer.content)  # it is not compressed
            content = archive.read(pickled) if whole else b""
        if any(code.name in AT_A_NUMBER and int(place or 0) > len(content) for code, place, _ in genops(content)):
            return None
        found = _Plain(io.BytesIO(content)).load()
    except Exception:
        return None
    return found if isinstance(found, dict) else None


class _Plain(Unpickler):
    """Reads plain values alone, and a Status as the word that it is."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("nnsight.schema.response", "Status"):
            return _word
        raise UnpicklingError(f"{module}.{name} is no plain value")


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise UnpicklingError(f"a status is a word, not of type {type(value).__name__}")
    return value


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


def text(value: Any) -> str | None:
    """A text; None for anything else."""
    return value if isinstance(value, str) else None


def number(value: Any) -> float | None:
    """A number of a size that numbers have; None for anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and abs(value) < LARGEST else None


def amount(value: Any) -> float | None:
    """A number above 0; None for anything else."""
    return value if (number(value) or 0) > 0 else None


AMOUNTS = ("n_params", "gpus", "execution_timeout_seconds")
NAMES = ("model_key", "repo_id", "revision", "application_state", "deployment_level", "dtype", "actor_class", "config")
READ = dict.fromkeys(AMOUNTS, amount) | dict.fromkeys(NAMES, text)
"""What is read of what a server says of a replica; what it says in another form is not said."""


def _writable(value: Any) -> Any:
    """The same without halves of surrogate pairs, which JSON can spell and no file holds."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {_writable(name): _writable(each) for name, each in value.items()}
    return [_writable(each) for each in value] if isinstance(value, list) else value


def _text(answer: httpx.Response) -> str:
    """In UTF-8, as a server writes, whatever the answer calls it."""
    return answer.content.decode(errors="replace")


def of_store(answer: httpx.Response) -> str:
    """Why a store of results refuses: its code, such as ExpiredToken; "" where it gives none."""
    return _between("Code", answer)


def _between(name: str, answer: httpx.Response) -> str:
    text = answer.content[:LOOKED_AT].decode(errors="replace")
    found = re.search(rf"<Error>.*<{name}>(.*?)</{name}>", text, re.DOTALL)
    return unescape(found[1]) if found else ""


def pause_of(answer: httpx.Response) -> float:
    """After how many seconds, or when by its clock, an answer says to ask again: in seconds, 0 if it does not."""
    wanted = answer.headers.get("retry-after", "").strip()
    if wanted.isascii() and wanted.isdigit():
        return float(wanted[:9])
    try:
        until = _seconds(wanted)
    except (TypeError, ValueError):
        return 0.0
    return max(0.0, until - (clock_of(answer) or now()))


def clock_of(answer: httpx.Response) -> float | None:
    """The time at which an answer was given by its sender's clock, in seconds; None if it does not say, or is kept."""
    if "age" in answer.headers:
        return None
    try:
        return _seconds(answer.headers["date"])
    except (KeyError, TypeError, ValueError):
        return None


def _seconds(date: str) -> float:
    found = parsedate_to_datetime(date)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def now() -> float:
    """The same by our clock."""
    return datetime.now(UTC).timestamp()


def loaded(content: bytes) -> dict[str, Any]:
    """The saved values of a result. Only tensors, numbers, text and their containers are ever unpickled.

    Raises Fault "result" for what is none, is cut, or is nested as no result is.
    """
    import torch
    import zstandard

    try:
        unpacked = zstandard.ZstdDecompressor().decompress(content)
        found = torch.load(io.BytesIO(unpacked), map_location="cpu", weights_only=True)
    except Exception as error:
        raise Fault("result", f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise Fault("result", f"a {type(found).__name__}, which names nothing")
    if not _is_tree(found):
        raise Fault("result", f"nested more than {DEEPEST} deep, or within itself")
    return found


def _is_tree(found: Any) -> bool:
    """Whether each container lies in one other, a few deep: whoever walks through them comes to an end."""
    level, seen = [found], set[int]()
    for _ in range(DEEPEST):
        held = [each for each in level if isinstance(each, dict | list | tuple | set) and each]
        if not held:
            return True
        places = {id(each) for each in held}
        if len(places) < len(held) or places & seen:
            return False
        seen |= places
        level = [inner for each in held for inner in (*each, *(each.values() if isinstance(each, dict) else ()))]
    return False
