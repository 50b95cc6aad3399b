"""Checkpoints of a model into one store: each is run as any model is, into a store of its own, and these are joined.

So each is proven, resumed and compared with the model that it was begun with as ever, and one is loaded at a time.
Their stores are gone once all are done; where the joined one is damaged later it is taken apart again, and what is lost
run anew.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from selfrepair_nn import provenance
from selfrepair_nn.backends.local import collect_memory, loaded, with_enough_memory
from selfrepair_nn.door import require_same
from selfrepair_nn.equations import TOLERANCE
from selfrepair_nn.errors import Incomplete, StoreError
from selfrepair_nn.integrity import contents_of, verify
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.layout.revisions import AXIS, Revisions
from selfrepair_nn.models.identity import differences, identity
from selfrepair_nn.quantities import QUANTITIES
from selfrepair_nn.running.holding import only_writer
from selfrepair_nn.shown import tell
from selfrepair_nn.store import Store

OWN = ("id", "format", "coordinates", "prompts_per_chunk", "finished", "identity", "fingerprint", "greeting", "run")
"""What attributes say of the store of one checkpoint alone."""
ANEW = ("id", "format", "coordinates", "prompts_per_chunk", "finished")
"""What a store says of itself when it is made."""


def run_each(every: Revisions, into_store: Callable[[Experiment], None], command: str) -> None:
    """Run what is missing of each checkpoint by `into_store`, and join it.

    Raises:
        StoreError: the store is another run's, or holds the numbers of another model under a revision's name.
        Incomplete: interrupted; what is done is in the store, and the same call resumes.
    """
    with only_writer(every.path, None) as hold:
        damage = _existing(every)
        if damage == [] and "finished" in contents_of(every.path).attributes:
            _require_same_models(every)
            return
        hold.require()
        if damage is not None:
            _take_apart(every, {each.block for each in damage})
        try:
            for number, (label, experiment) in enumerate(every.experiments.items(), start=1):
                tell(f"revision {label}, {number} of {len(every.experiments)}")
                into_store(_in_equal_blocks(every, experiment))
                collect_memory()
        except Incomplete:
            _join(every, command)
            raise
        _join(every, command)
        shutil.rmtree(every.parts)


def _existing(every: Revisions) -> list[Any] | None:
    """What is damaged of the store; None where there is none. StoreError if it is another run's."""
    if not every.path.exists():
        return None
    require_same(every.request, contents_of(every.path).attributes, every.settings)
    return verify(every.path)


def _require_same_models(every: Revisions) -> None:
    """StoreError, naming what differs, where a revision is another model now than the store's."""
    kept = _parts_of(Store(every.path))
    for label, experiment in every.experiments.items():
        with with_enough_memory("looking at the model"):
            model = loaded(experiment)
            record = identity(model)
        known = json.loads(kept[label]["identity"])
        if differing := differences(known, record, TOLERANCE.get(model.dtype, 0)):
            raise StoreError(
                f"{str(every.path)!r} holds the numbers of another model under revision {label!r} than it is now "
                f"({'; '.join(differing)}): choose another --out"
            )
        del model
        collect_memory()


def _in_equal_blocks(every: Revisions, experiment: Experiment) -> Experiment:
    """As many prompts in a unit as the first that was begun has: blocks are joined as they are."""
    begun = next((Store(each.path) for each in every.experiments.values() if each.path.exists()), None)
    if begun is None or experiment.path.exists():
        return experiment
    size = begun.prompts_per_chunk
    return replace(experiment, options=replace(experiment.options, batch_size=size)).in_units_of(size)


def _join(every: Revisions, command: str) -> None:
    """The store of all checkpoints, made anew from those of each; what was not begun is not done there."""
    parts = {n: Store(each.path) for n, each in every.experiments.items() if each.path.exists()}
    if not parts:
        return
    some = next(iter(parts.values()))
    known = every.first.coordinates() | {AXIS: [*every.experiments]}
    data = dict.fromkeys(every.first.data())
    draft = every.path.with_name(f".{every.path.name}.joined.zarr")
    shutil.rmtree(draft, ignore_errors=True)
    joined = Store.create(
        draft,
        known,
        data,
        dims=every.dims,
        prompts_per_chunk=some.prompts_per_chunk,
        precision=every.first.precision,
        attributes=_attributes(every, parts, command),
    )
    blocks = _blocks(every, some)
    for name in data:
        if "prompt" not in QUANTITIES[name].dims:
            joined.write(name, np.stack([_read(parts.get(n), some, name) for n in every.experiments]))
    for block in blocks:
        values = {
            name: np.stack([_read(parts.get(n), some, name, block) for n in every.experiments])
            for name in data
            if "prompt" in QUANTITIES[name].dims and name != "done"
        }
        done = np.stack([_read(parts.get(n), some, "done", block).all(-1) for n in every.experiments])
        joined.write_prompts(block, values, done)
    if all("finished" in each.attributes for each in parts.values()) and len(parts) == len(every.experiments):
        joined.annotate(finished=provenance.now())
    shutil.rmtree(every.path, ignore_errors=True)
    draft.rename(every.path)


def _blocks(every: Revisions, some: Store) -> list[slice]:
    return every.first.in_units_of(some.prompts_per_chunk).work.units


def _read(part: Store | None, some: Store, name: str, block: slice | None = None) -> np.ndarray:
    """A checkpoint's array, or some prompts' part of it; as before anything is done where it was not begun."""
    if part is not None:
        return part.read(name, block)
    if name == "selected":
        return some.read(name)
    return some.blank(name, slice(0, 0) if block is None else block)


def _attributes(every: Revisions, parts: dict[str, Store], command: str) -> dict[str, Any]:
    """Those that all have in common, and what each says of itself."""
    shared = {k: v for k, v in next(iter(parts.values())).attributes.items() if k not in OWN}
    source = json.loads(shared["provenance"]) | {"revision": every.settings["revision"]}
    return shared | {
        "title": f"{every.first.recipe.name} of {every.request.model}, {len(every.experiments)} revisions",
        "model": every.request.model,
        "command": command,
        "figures": ["training"],
        "options": every.request.choices,
        "settings": every.settings,
        "provenance": source,
        "revisions": {name: each.attributes for name, each in parts.items()},
    }


def _parts_of(joined: Store) -> dict[str, dict[str, Any]]:
    return json.loads(joined.attributes["revisions"])


def _take_apart(every: Revisions, damaged: set[int | None]) -> None:
    """A store for each checkpoint that has none, with what was done of it, but for the blocks that are damaged."""
    if None in damaged or all(each.path.exists() for each in every.experiments.values()):
        return
    joined = Store(every.path)
    for index, (label, attributes) in enumerate(_parts_of(joined).items()):
        experiment = every.experiments[label].in_units_of(joined.prompts_per_chunk)
        if experiment.path.exists():
            continue
        known = {name: value for name, value in attributes.items() if name not in ANEW}
        part = Store.create(
            experiment.path,
            experiment.coordinates(),
            experiment.data(),
            dims=experiment.work.dims,
            prompts_per_chunk=joined.prompts_per_chunk,
            precision=experiment.precision,
            attributes=known,
        )
        for name, values in _of_one(joined, experiment, index, None):
            part.write(name, values)
        for number, block in enumerate(experiment.work.units):
            if number not in damaged:
                values = dict(_of_one(joined, experiment, index, block))
                part.write_prompts(block, values, values.pop("done").all(-1))


def _of_one(joined: Store, experiment: Experiment, index: int, block: slice | None) -> Iterator[tuple[str, Any]]:
    """A checkpoint's arrays in the joined store: those along prompts, some prompts' part; or all the others."""
    for name in experiment.data():
        if ("prompt" in QUANTITIES[name].dims) == (block is not None):
            yield name, joined.read(name, block)[index]
