"""Stores on the Hugging Face Hub: what an address is of, its files fetched once, and what the hub's refusals mean."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from urllib.parse import unquote

from selfrepair_nn.errors import SelfRepairError, StoreError, UsageError, one_line
from selfrepair_nn.paths import local
from selfrepair_nn.secrets import hub_token
from selfrepair_nn.settings import require_hub
from selfrepair_nn.shown import tell

SCHEME, FORM = "hf://", "hf://datasets/owner/name/x.zarr"
_ADDRESS = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<path>.+?)/*")
_TRY = "set HF_TOKEN to a token that may, or run `hf auth login`"
REFUSED = {
    401: f"it does not know who asks, or there is no such repository: {_TRY}",
    403: f"the token may not do that: {_TRY}",
    404: f"there is no such repository or revision, or it is private: check its name, or {_TRY}",
    429: "it was asked too often: wait some minutes; the same command goes on where it stopped",
}
"""What a status of the hub's means, and what to do."""


@dataclass(frozen=True)
class Address:
    """A store in a dataset repository; `revision` is a branch, tag or commit, None the newest."""

    name: str
    path: str
    revision: str | None = None

    @classmethod
    def of(cls, text: str) -> "Address":
        """Raises UsageError for what is the address of no store."""
        found = _ADDRESS.fullmatch(text)
        if found is None or ".." in found["path"].split("/"):
            raise UsageError(f"store {text!r} is an address of no store: one is written {FORM}")
        return cls(found["name"], found["path"], found["revision"] and unquote(found["revision"]))

    def __str__(self) -> str:
        at = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        return f"hf://datasets/{self.name}{at}/{self.path}"


def is_address(store: str | os.PathLike[str]) -> bool:
    """Whether a store is said to be on the hub."""
    return isinstance(store, str) and store.startswith(SCHEME)


def at_hand(store: str | os.PathLike[str]) -> Path:
    """The directory of a store: its path, or, of an address on the hub, the hub's cache, where it is fetched first.

    Raises:
        UsageError: an address of no store, or elsewhere than on the hub.
        SelfRepairError: the hub does not give it.
    """
    return fetched(Address.of(str(store))) if is_address(store) else local(store, "store")


def fetched(address: Address) -> Path:
    """Where a store of the hub is in the hub's cache; what is not there yet is fetched."""
    from huggingface_hub import snapshot_download

    require_hub()
    tell(f"reads {address}: what is not in the hub's cache yet is fetched")
    with answered(f"cannot read {str(address)!r}"):
        folder = snapshot_download(
            address.name,
            repo_type="dataset",
            revision=address.revision,
            allow_patterns=f"{escape(address.path)}/*",
            token=hub_token(),
        )
    found = Path(folder, address.path)
    if not found.exists():
        raise StoreError(f"there is no store at {str(address)!r}: its repository has no such path")
    return found


@contextmanager
def answered(what: str) -> Iterator[None]:
    """Within, what the hub's client raises is one line of words. Its bars are shown on terminals alone."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as library

    before, quiet = library.get_verbosity(), are_progress_bars_disabled() or sys.stderr.isatty()
    library.set_verbosity_error()
    if not quiet:
        disable_progress_bars()
    try:
        yield
    except Exception as error:
        if isinstance(error, SelfRepairError) or not _is_theirs(error):
            raise
        raise SelfRepairError(f"{what}: {_why(error)}") from error
    finally:
        library.set_verbosity(before)
        if not quiet:
            enable_progress_bars()


def _is_theirs(error: BaseException) -> bool:
    """Whether an error is of the system, the connection or the hub: the client's library for HTTP is its own affair."""
    room = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | RuntimeError | ValueError) or room in ("huggingface_hub", "httpx", "httpx2")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _why(error: BaseException) -> str:
    """What the hub meant, and what to do."""
    for each in _causes(error):
        status = getattr(getattr(each, "response", None), "status_code", None)
        if status in REFUSED:
            return f"the hub refuses ({status}): {REFUSED[status]}"
        if status and status >= 500:
            return f"the hub fails ({status}): wait; the same command goes on where it stopped"
        if "TransportError" in (kind.__name__ for kind in type(each).__mro__):
            return (
                f"the hub does not answer ({one_line(each)}): check the connection and HF_ENDPOINT; the same command "
                "goes on where it stopped"
            )
    return one_line(error)
