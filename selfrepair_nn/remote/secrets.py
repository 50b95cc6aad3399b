"""Keys: where they come from, and how they are kept out of everything that is written or printed."""

import os
import re

VARIABLES = ("NDIF_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
SHORTEST = 4
"""A shorter "key" would blot out ordinary text, and is none."""


def ndif_key() -> str | None:
    """The key for NDIF: NDIF_API_KEY, else what nnsight's own configuration holds."""
    from nnsight.schema.config import CONFIG

    return os.environ.get("NDIF_API_KEY") or CONFIG.API.APIKEY or None


def hidden(text: str) -> str:
    """`text` with every known key, and the signature of every signed address, replaced by `***`.

    Servers repeat a malformed key in their answer, and a result's address is as good as a key for an hour.
    """
    known = [os.environ.get(name, "") for name in VARIABLES] + [ndif_key() or ""]
    for key in sorted({k for k in known if len(k) >= SHORTEST}, key=len, reverse=True):
        text = text.replace(key, "***")
    return re.sub(r"(https?://[^\s'\"?]*)\?[^\s'\"]*", r"\1?***", text)
