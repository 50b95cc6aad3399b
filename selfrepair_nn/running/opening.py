"""The store of a run: made for it or found, held against other writers, never another run's."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from selfrepair_nn import provenance
from selfrepair_nn.case_sites import read as case_sites
from selfrepair_nn.components import Head, Mlp
from selfrepair_nn.door import require_same
from selfrepair_nn.equations import TOLERANCE
from selfrepair_nn.errors import StoreError
from selfrepair_nn.files import sweep_partial
from selfrepair_nn.integrity import contents_of
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.models.identity import differences, fingerprint
from selfrepair_nn.models.model import Model
from selfrepair_nn.running.mending import require_mendable, restore
from selfrepair_nn.store import Store, explained


def existing(experiment: Experiment) -> Store | None:
    """The run's store, if there is one; StoreError if what is there is another run's. No weight is loaded for it."""
    path = experiment.path
    if not path.exists():
        return None
    found = contents_of(path)
    require_mendable(found)
    require_same(experiment.request, found.attributes, experiment.settings)
    restore(found)
    if experiment.options.part is None:
        sweep_partial(path)
    return Store(path)


def create(experiment: Experiment, command: str, record: dict[str, Any]) -> Store:
    """The run's new store, which says whose numbers it will hold; StoreError if nothing can be written."""
    if experiment.options.served:
        from selfrepair_nn.backends.ndif.served import server_of

        server_of(experiment.options).greet()
    return Store.create(
        experiment.path,
        experiment.coordinates(),
        experiment.data(),
        dims=experiment.work.dims,
        prompts_per_chunk=experiment.work.block,
        precision=experiment.precision,
        attributes=_attributes(experiment, command)
        | {"identity": record, "fingerprint": fingerprint(record)},
    )


def require_same_model(store: Store, model: Model, record: dict[str, Any]) -> None:
    """Raise StoreError, naming what differs, unless this is the model that the store was begun with."""
    path = str(store.path)
    if "identity" not in store.attributes:
        raise StoreError(
            f"{path!r} is of an earlier version, which did not record whose numbers it holds: open it with "
            "selfrepair info or open_store; to compute, choose another --out"
        )
    differing = differences(json.loads(store.attributes["identity"]), record, TOLERANCE.get(model.dtype, 0))
    if differing:
        raise StoreError(
            f"{path!r} holds the numbers of another model than {model.name!r} is now ({'; '.join(differing)}): "
            "choose another --out, or give the model that it was begun with"
        )


def changed_versions(store: Store) -> str | None:
    """What is to be said of packages that are others than when the store was begun; None where all are the same."""
    before = json.loads(store.attributes["provenance"]).get("versions", {})
    changed = {name: v for name, v in provenance.versions().items() if before.get(name, v) != v}
    if not changed:
        return None
    said = ", ".join(f"{name} {before[name]} then, {now} now" for name, now in changed.items())
    return f"{str(store.path)!r} was made with other versions ({said}): numbers may round otherwise"


def _attributes(experiment: Experiment, command: str) -> dict[str, Any]:
    options, structure = experiment.options, experiment.description.structure
    recorded = (
        {} if experiment.graph.neurons is None else {"recorded_mlp": Mlp(experiment.graph.neurons).label}
    )
    recorded |= {"kept_share": experiment.share} if experiment.selective else {}
    return recorded | {
        "title": f"{experiment.recipe.name} of {experiment.description.source.name}",
        "recipe": experiment.recipe.name,
        "model": experiment.description.source.name,
        "model_type": structure.model_type,
        "n_layers": structure.n_layers,
        "n_heads": structure.n_heads,
        "parallel": int(structure.parallel),
        "target": experiment.graph.target,
        "ablation": experiment.ablation,
        "value_bias": options.value_bias,
        "freeze": options.freeze,
        "dtype": experiment.dtype,
        "backend": "remote" if options.served else options.backend,
        "created": provenance.now(),
        "command": command,
        "figures": list(experiment.recipe.figures),
        "options": experiment.request.choices,
        "settings": experiment.settings,
        "provenance": {
            "versions": provenance.versions(),
            "git": provenance.git_state(),
            "machine": provenance.machine(),
            "revision": experiment.description.revision,
            "prompts": experiment.prompts.source | {"sha256": experiment.prompts.sha256},
            "seed": options.seed,
        },
    }


def as_stored(experiment: Experiment, store: Store) -> Experiment:
    """The experiment in the units of its store, with the heads that were found when that was begun."""
    experiment = replace(experiment, work=replace(experiment.work, block=store.prompts_per_chunk))
    if not experiment.undecided:
        return experiment
    return experiment.of(_found_heads(store, experiment))


def _found_heads(store: Store, experiment: Experiment) -> list[Head]:
    """The heads that a clean pass found; where more follows from them they are the first cases, the strongest first."""
    if experiment.graph.then is None:
        layers, heads = store.read("layer"), store.read("head")
        return [Head(int(layers[i]), int(heads[j])) for i, j in np.argwhere(store.read("selected"))]
    labels = store.read("case").tolist()
    held = store.read("case_sites").tolist() if "case_sites" in store.names else [None] * len(labels)
    return [head for (head,) in case_sites(labels, held)[: experiment.graph.strongest] if isinstance(head, Head)]


class Hold:
    """The locks that a run holds. One whose file was removed, with the directory that it lay in, holds off nobody."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: list[tuple[FileLock, os.stat_result]] = []

    def add(self, lock: FileLock) -> None:
        """Know of a lock that was just acquired."""
        self._held.append((lock, os.stat(lock.lock_file)))

    def share(self) -> None:
        """Let other parts of the run begin: they write only what is their own."""
        self._held.pop(0)[0].release()

    def require(self) -> None:
        """Raise StoreError if another run may have begun at the store's path."""
        for lock, known in self._held:
            try:
                same = os.path.samestat(known, os.stat(lock.lock_file))
            except OSError:
                same = False
            if not same:
                raise StoreError(
                    f"{lock.lock_file!r} was removed while this run was writing {str(self._path)!r}: another run may "
                    "have begun there, so nothing more is written. If none has, the same command resumes this one"
                )


@contextmanager
def only_writer(path: Path, part: tuple[int, int] | None) -> Iterator[Hold]:
    """Hold the store's lock: two runs never write one store.

    A part of a run waits for that lock; it can release it once it writes only what is its own, and holds one of its
    own all along, by which others know of it.
    """
    hold = Hold(path)
    if path.exists() and not os.access(path.parent, os.W_OK):
        yield hold  # nobody writes there: a finished store answers all the same, for what is missing there is no room
        return
    with ExitStack() as held:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_name(f".{path.name}.lock"))
            held.enter_context(_acquired(lock, path, wait=part is not None))
            hold.add(lock)
            if part:
                own = FileLock(path.with_name(f".{path.name}.{part[0]}-of-{part[1]}.lock"))
                held.enter_context(_acquired(own, path))
                hold.add(own)
            else:
                _require_no_part(path)
        yield hold


def _require_no_part(path: Path) -> None:
    for each in path.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(path.name)}\.\d+-of-\d+\.lock", each.name):
            with _acquired(FileLock(each), path):
                pass


def _acquired(lock: FileLock, path: Path, wait: bool = False) -> AbstractContextManager:
    try:
        return lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise StoreError(
            f"another run is writing {str(path)!r}: wait for it, or choose another --out"
        ) from None
