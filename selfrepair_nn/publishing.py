"""A store published as a dataset of the Hugging Face Hub, with a card that says what it is and how it is read."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from selfrepair_nn.card import card, is_card_of
from selfrepair_nn.contents import Contents
from selfrepair_nn.description import NOTES, ROOT
from selfrepair_nn.errors import SelfRepairError, StoreError, UsageError
from selfrepair_nn.files import PARTIAL, read_json
from selfrepair_nn.hub import Address, answered
from selfrepair_nn.integrity import contents_of, identity, require_whole, verify
from selfrepair_nn.paths import local
from selfrepair_nn.secrets import hub_token
from selfrepair_nn.settings import require_hub
from selfrepair_nn.shown import tell

TOGETHER = 500
"""How many files go into one commit: each is there, and is not sent again, whatever happens to the next."""

CARD = "README.md"


def push(
    store: str | os.PathLike[str],
    name: str,
    *,
    private: bool = False,
    path_in_repo: str | None = None,
    license: str | None = None,
    as_it_is: bool = False,
) -> str:
    """Publish a store as a dataset of the Hugging Face Hub, with a card made from what it says of itself.

    It is verified first, every byte. The repository is made where there is none. The file that makes a directory a
    store comes last, so that nobody opens half of one; the same call goes on where one was interrupted.

    Args:
        store: the path of a store.
        name: the repository, "owner/name".
        private: whether a repository that is made is private. One that is there is left as it is.
        path_in_repo: where in the repository; default: the store's own name.
        license: what the card says of it, such as "cc-by-4.0"; default: nothing.
        as_it_is: publish a store that has not finished, or is damaged, too; its card says so.

    Returns its address, hf://datasets/owner/name/x.zarr, which opens wherever a store's path is taken.

    Raises:
        UsageError: what is no name, or no path in a repository.
        StoreError: the store is not whole, or has not finished; or another store is there.
        SelfRepairError: there is no token, or the hub refuses, or does not answer.
    """
    path = local(store, "store")
    address = _address(name, path.name if path_in_repo is None else path_in_repo)
    found = contents_of(path)
    require_hub()
    _require_online()
    token = hub_token()
    if token is None:
        raise SelfRepairError(
            "there is no token for the Hugging Face Hub: set HF_TOKEN, or run `hf auth login`"
        )
    damage = _require_ready(found, as_it_is)
    text = card(path, address, damage, license)
    with answered(f"cannot publish {str(path)!r} as {address.name!r}"):
        _upload(found, address, text, token, private)
    return str(address)


def _require_online() -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise SelfRepairError("nothing is published while HF_HUB_OFFLINE is set: unset it")


def _address(name: str, where: str) -> Address:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if name.count("/") != 1:
            raise HFValidationError(f"{name!r} is not written owner/name")
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"name {name!r} is no repository of the hub ({error}): write owner/name") from error
    parts = where.split("/")
    if not all(parts) or {".", ".."} & {*parts} or not where.isprintable() or parts[0] == CARD:
        raise UsageError(f"path_in_repo {where!r} is no path in a repository: write x.zarr, or folder/x.zarr")
    return Address(name, where)


def _require_ready(found: Contents, as_it_is: bool) -> list[str]:
    """What is to be said of a store that is not what a run leaves; StoreError unless it is to go as it is."""
    damage, finished = verify(found.path), "finished" in found.attributes
    if not as_it_is:
        require_whole(found.path, damage)
        if not finished:
            raise StoreError(
                f"{str(found.path)!r} has not finished: run the command that made it again, which goes on, or publish "
                "it as far as it is with --as-it-is"
            )
    return [f"{len(damage)} of its files are missing or damaged"] * bool(damage) + [
        "its run has not finished"
    ] * (not finished)


def _upload(found: Contents, address: Address, text: str, token: str, private: bool) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    api: Any = HfApi(token=token)
    repo: Any = {"repo_id": address.name, "repo_type": "dataset"}
    api.create_repo(**repo, private=private, exist_ok=True)
    if private and not api.repo_info(**repo).private:
        raise StoreError(
            f"{address.name!r} is there, and public: choose another name, or leave out --private"
        )
    _require_free(api, repo, found, address)
    files = _files(found)
    for first in range(0, len(files), TOGETHER):
        some = files[first : first + TOGETHER]
        added = [CommitOperationAdd(f"{address.path}/{key}", found.path / key) for key in some]
        if ROOT in some:
            added.append(CommitOperationAdd(_place_of_card(api, repo, address), text.encode()))
        done = f"{first + len(some)} of {len(files)} files"
        api.create_commit(**repo, operations=added, commit_message=f"{address.path}: {done}")
        tell(f"{done} are there")


def _files(found: Contents) -> list[str]:
    """The files of a store, the one that makes it one last; what else lies in its directory stays here."""
    return [*_below(found.path, [*sorted(found.metadata), NOTES]), ROOT]


def _below(path: Path, folders: Sequence[str]) -> Iterator[str]:
    for folder in folders:
        for each in sorted((path / folder).rglob("*")):
            if each.is_file() and not each.name.endswith(PARTIAL):
                yield each.relative_to(path).as_posix()


def _require_free(api: Any, repo: dict[str, Any], found: Contents, address: Address) -> None:
    """StoreError if there is another store at the address."""
    there = _fetched(api, repo, f"{address.path}/{ROOT}")
    other = None if there is None else (read_json(there) or {}).get("attributes", {})
    if other is not None and identity(other) != identity(found.attributes):
        raise StoreError(
            f"{str(address)!r} holds another store: choose another --path-in-repo, or another name"
        )


def _place_of_card(api: Any, repo: dict[str, Any], address: Address) -> str:
    """The repository's own card, unless it has one of something else: then one beside the store."""
    there = _fetched(api, repo, CARD)
    if there is None or is_card_of(there.read_text("utf-8", "replace"), address):
        return CARD
    beside = f"{re.sub(r'[.]zarr$', '', address.path)}.md"
    tell(f"{address.name} has a card of its own, which is left as it is: this store's is {beside}")
    return beside


def _fetched(api: Any, repo: dict[str, Any], file: str) -> Path | None:
    """A file of the repository as it is now; None if there is none."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(api.hf_hub_download(**repo, filename=file))
    except EntryNotFoundError:
        return None
