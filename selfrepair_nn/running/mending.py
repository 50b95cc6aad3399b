"""What a store lost is computed again: its description is put right, and what is damaged no longer counts as done."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from selfrepair_nn.contents import Contents, Damage
from selfrepair_nn.description import COPY, FIXED, NOTES, NOTES_GROUP, ROOT, described
from selfrepair_nn.errors import StoreError
from selfrepair_nn.files import Files, sealed
from selfrepair_nn.integrity import named
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.shown import tell
from selfrepair_nn.store import Store, explained, take_notes

DECIDING = ("layer", "head", "case", "case_sites", "selected")
"""What says which heads a clean pass found when the store was begun."""


def require_mendable(contents: Contents) -> None:
    """Raise StoreError if something that a store says of itself is lost in both of its places."""
    for each in contents.damage:
        if each.array and each.array not in contents.metadata:
            raise StoreError(
                f"{str(contents.path / each.file)!r} is {each.what}, and nothing else says what was there: remove "
                "the store and run the command again"
            )


def restore(contents: Contents) -> None:
    """Put right what a store says of itself, from what it says twice."""
    files = {each.file: _description(contents, each) for each in contents.damage}
    if files:
        tell(f"puts right what {str(contents.path)!r} says of itself: {named(contents.damage)}")
    with explained(contents.path):
        Files(contents.path).put(files)


def _description(contents: Contents, each: Damage) -> bytes:
    """What should be in a file that describes the store."""
    if each.file == COPY:
        return sealed({"now": contents.attributes})
    if each.array:
        return _written(contents.metadata[each.array])
    if each.file != ROOT:
        return _written(NOTES_GROUP)
    notes = {NOTES: NOTES_GROUP} if contents.format > 1 else {}
    return _written(described(contents.attributes, contents.metadata | notes))


def _written(metadata: dict[str, Any]) -> bytes:
    return json.dumps(metadata, indent=2).encode()


def undecided(experiment: Experiment, damage: Sequence[Damage]) -> bool:
    """Whether the heads that a clean pass found can no longer be read from the store."""
    return experiment.undecided and any(each.file == FIXED or each.array in DECIDING for each in damage)


def mend(store: Store, experiment: Experiment, damage: Sequence[Damage]) -> None:
    """Mark what is damaged as not done, and write again what is known beforehand: the rest is then computed as ever."""
    if not damage:
        return
    tell(f"computes again what is damaged in {str(store.path)!r}: {named(damage)}")
    store.reopen()
    for block in sorted({each.block for each in damage if each.block is not None}):
        prompts = experiment.work.units[block]
        lost = {each.array for each in damage if each.block == block}
        blank = experiment.ranked and lost & {"", "direct_effect"}
        values = {"direct_effect": store.blank("direct_effect", prompts)} if blank else {}
        store.write_prompts(prompts, values, np.zeros_like(experiment.selected))
    if any(each.block is not None for each in damage) and "threshold" in store.names and not experiment.ranked:
        store.write("threshold", None)  # of numbers that may round otherwise now
    known = experiment.coordinates() | experiment.data()
    if any(each.file == FIXED for each in damage):
        names = store.fixed
    else:
        names = {each.array for each in damage if each.block is None} & store.fixed
    for name in sorted(names):
        store.write(name, known.get(name))
    if any(each.file == FIXED for each in damage):
        take_notes(store.path)
