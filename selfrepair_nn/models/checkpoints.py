"""The checkpoints of one model, along its training: which model each of the named revisions is."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfrepair_nn.errors import UsageError
from selfrepair_nn.models.load import find, here


@dataclass(frozen=True)
class Checkpoint:
    """One of them: what it is called along the axis, and what loads it."""

    label: str
    model: str
    revision: str | None


def checkpoints(model: str, revisions: Sequence[str]) -> tuple[Checkpoint, ...]:
    """Each revision as a model: a directory below `model`'s, any other directory, or a revision of a hub model.

    Raises:
        UsageError: one that is neither, a directory without a model, or one that is named twice.
    """
    for name, times in Counter(revisions).items():
        if times > 1:
            raise UsageError(f"revision {name!r} is named {times} times: name each once")
    places = {name: _directory(model, name) for name in revisions}
    short = {name: Path(place).name if place else name for name, place in places.items()}
    labels = short if len({*short.values()}) == len(short) else {name: name for name in revisions}
    found = tuple(_checkpoint(model, name, places[name], labels[name]) for name in revisions)
    for each in found:
        find(each.model, each.revision)
    return found


def family_of(model: str, found: Sequence[Checkpoint]) -> str:
    """What the checkpoints together are called: the model, or the directory that holds all of them."""
    folders = {str(Path(each.model).expanduser().absolute().parent) for each in found if each.revision is None}
    return folders.pop() if len(folders) == 1 and all(each.revision is None for each in found) else model


def _checkpoint(model: str, name: str, place: str | None, label: str) -> Checkpoint:
    if place:
        return Checkpoint(label, place, None)
    if Path(model).expanduser().is_dir() or here(model):
        raise UsageError(
            f"revision {name!r} is no directory, and {model!r} is no model of the hub, which has revisions: give "
            "directories of checkpoints, in --model or by their paths"
        )
    return Checkpoint(label, model, name)


def _directory(model: str, name: str) -> str | None:
    """The directory of a checkpoint; None where a revision of the hub is meant."""
    inside = Path(model).expanduser() / name
    if Path(model).expanduser().is_dir() and inside.is_dir():
        return str(inside)
    path = Path(name).expanduser()
    written = os.sep in name or name.startswith((".", "~"))
    if path.is_dir() and (written or here(model)):
        return str(path)
    if written and (path.is_absolute() or name.startswith((".", "~"))):
        raise UsageError(f"revision {name!r}: there is no such directory")
    return None
