"""Keys: where they come from, and how they are kept out of everything that is written or printed."""

import os
import re
import sys
from base64 import b64encode
from collections.abc import Iterator
from functools import lru_cache
from html import escape
from urllib.parse import unquote, urlsplit

NDIF_VARIABLE, HUB_VARIABLES = "NDIF_API_KEY", ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
ADDRESSES = (*PROXIES, *map(str.lower, PROXIES), "HF_ENDPOINT", "NDIF_HOST")
"""Variables whose addresses may hold a password."""

SHORTEST = 4
"""A shorter "key" would blot out ordinary text, and is none."""

ENCODED = 8
"""Bytes of a key whose encoding is no ordinary word."""

_BETWEEN = (
    r"(?:[\s\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]|\x1b\[[0-9;]*m|\\+[nrt]|=\r?\n)*"
)
"""What wrapping, colouring and quoting put between two characters."""

_UNKNOWN = (
    (re.compile(r"(https?://[^\s'\"?]*)\?[^\s'\"]*"), r"\1?***"),
    (re.compile(r"(\w://)[^\s/'\"@]+@"), r"\1***@"),
    (re.compile(r"\b(bearer|basic)(\s+|%20|\+)(?=\S*\d)[\w.~+/=-]{16,}", re.IGNORECASE), r"\1\2***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "***"),
)
"""Secrets that nobody told us: signatures of addresses, who may log in there, what a header says, keys of the hub."""


def ndif_key() -> str | None:
    """The key for NDIF, without white space around it: NDIF_API_KEY, else what nnsight's own configuration holds."""
    from nnsight.schema.config import CONFIG

    return _stripped(os.environ.get(NDIF_VARIABLE)) or _stripped(CONFIG.API.APIKEY)


def hub_token() -> str | None:
    """The token for the Hugging Face Hub, without white space around it: HF_TOKEN, else what `hf auth login` stored."""
    from huggingface_hub import get_token

    given = (_stripped(os.environ.get(name)) for name in HUB_VARIABLES)
    return next(filter(None, given), None) or _stripped(get_token())


def hidden(text: str) -> str:
    """`text` with every known key, however it is spelt there, and the signature of every signed address, as `***`.

    Servers repeat a malformed key in their answer, libraries quote it, escape it and encode it; and a result's address
    is as good as a key for an hour.
    """
    if pattern := _pattern(frozenset(_known())):
        text = pattern.sub("***", text)
    for unknown, instead in _UNKNOWN:
        text = unknown.sub(instead, text)
    return text


def _known() -> Iterator[str]:
    """Every secret that this process can have read. What a library would have to be loaded for, it has not read."""
    yield from (os.environ.get(name, "") for name in (NDIF_VARIABLE, *HUB_VARIABLES))
    if nnsight := sys.modules.get("nnsight.schema.config"):
        yield nnsight.CONFIG.API.APIKEY or ""
    yield _logged_in() or ""
    for address in filter(None, map(os.environ.get, ADDRESSES)):
        yield from (password := _password(address), unquote(password))


def _logged_in() -> str | None:
    if (hub := sys.modules.get("huggingface_hub.constants")) is None:
        return None
    try:
        with open(hub.HF_TOKEN_PATH, encoding="utf-8") as file:
            return _stripped(file.read())
    except (OSError, ValueError):
        return None


def _password(address: str) -> str:
    try:
        return urlsplit(address if "://" in address else f"http://{address}").password or ""
    except ValueError:
        return ""


def _stripped(key: str | None) -> str | None:
    return (key or "").strip() or None


@lru_cache(maxsize=8)
def _pattern(keys: frozenset[str]) -> re.Pattern | None:
    """All spellings of the keys, the longest first."""
    found = sorted({key.strip() for key in keys if len(key.strip()) >= SHORTEST}, key=len, reverse=True)
    return re.compile("|".join(form for key in found for form in _spellings(key))) if found else None


def _spellings(key: str) -> Iterator[str]:
    """Patterns: character by character, each in any escape; and the encodings of the whole."""
    yield f"(?i:{_BETWEEN.join(_character(c) + '?' * c.isspace() for c in key)})"
    raw = key.encode(errors="surrogatepass")
    if len(raw) >= ENCODED:
        yield f"(?i:{raw.hex()})"
        yield from (_in_base64(raw, before) for before in range(3))


def _character(c: str) -> str:
    """One character as it is, percent-encoded (once or more), escaped as Python, JSON and C do, or as an entity."""
    code, raw = ord(c), c.encode(errors="surrogatepass")
    forms = [re.escape(c), "".join(f"%(?:25)*{byte:02x}" for byte in raw)]
    forms += ["".join(rf"\\+x{byte:02x}" for byte in raw), rf"\\+u{code:04x}", rf"\\+U{code:08x}"]
    forms += [rf"\\+x{code:02x}", rf"\\+0?{code:o}"] if code < 256 else []
    forms += [f"&(?:amp;)*#0*{code};", f"&(?:amp;)*#x0*{code:x};", f"={code:02x}"]
    forms += ["".join(rf"\\+{byte:03o}" for byte in raw)]
    forms += [] if c.isalnum() else [rf"\\+{re.escape(c)}"]
    forms += [] if escape(c) == c else [escape(c).replace("&", "&(?:amp;)*")]
    forms += {" ": [r"\+"], "'": ["'\"'\"'", "&(?:amp;)*apos;"]}.get(c, [])
    return f"(?:{'|'.join(dict.fromkeys(forms))})"


def _in_base64(raw: bytes, before: int) -> str:
    """The characters of base64 that these bytes decide, with so many other bytes before them (modulo 3)."""
    text = b64encode(bytes(before) + raw).decode()
    sure = text[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
    either = {"+": "[+-]", "/": "[/_]"}
    return r"\s*".join(either.get(c, c) for c in sure) + r"[\w+/-]{0,2}={0,2}"
