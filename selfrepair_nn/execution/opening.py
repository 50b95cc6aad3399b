"""The store of a run: made for it or found, held against other writers, never another run's."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from selfrepair_nn import provenance
from selfrepair_nn.components import Mlp
from selfrepair_nn.errors import StoreError
from selfrepair_nn.execution.experiment import Experiment
from selfrepair_nn.models.load import Model
from selfrepair_nn.remote.secrets import hidden
from selfrepair_nn.store import Store, explained, require_store


def open_or_create(experiment: Experiment, command: str) -> Store:
    """The run's store; StoreError if what is there is another run's, or nothing can be written."""
    path = experiment.path
    if path.exists():
        require_store(path)
        store = Store(path)
        _require_same_settings(path, json.loads(store.attributes["settings"]), experiment.settings)
        return store
    if experiment.options.served:
        from selfrepair_nn.execution.remote import server_of

        server_of(experiment.options).greet()
    return Store.create(
        path,
        experiment.coordinates(),
        experiment.data(),
        dims=experiment.dims,
        prompts_per_chunk=experiment.work.block,
        precision=experiment.precision,
        attributes=_attributes(experiment, command),
    )


def _require_same_settings(path: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = [name for name in asked if asked[name] != stored.get(name)]
    differing = [name for name in differing if name != "graph"] or differing
    if differing:
        said = "; ".join(f"{n} is {_short(stored.get(n))} there, {_short(asked[n])} here" for n in differing)
        raise StoreError(
            f"{str(path)!r} holds another run ({said}): choose another --out, or the same settings"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:36] + " …"


def require_same_weights(store: Store, model: Model) -> None:
    """Remember the weights of a store's first run; StoreError if these are others."""
    known = store.attributes.get("weights")
    if known is None:
        store.annotate(weights=model.fingerprint)
    elif known != model.fingerprint:
        raise StoreError(
            f"{str(store.path)!r} was begun with other weights of {model.name!r} (fingerprint {known}, "
            f"now {model.fingerprint}): choose another --out"
        )


def _attributes(experiment: Experiment, command: str) -> dict[str, Any]:
    options, structure = experiment.options, experiment.description.structure
    recorded = (
        {} if experiment.graph.neurons is None else {"recorded_mlp": Mlp(experiment.graph.neurons).label}
    )
    recorded |= {"kept_share": options.share} if experiment.selective else {}
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
        "command": hidden(command),
        "settings": experiment.settings,
        "provenance": {
            "versions": provenance.versions(),
            "git": provenance.git_state(),
            "machine": provenance.machine(),
            "revision": experiment.description.revision,
            "prompts": experiment.prompts.source | {"sha256": experiment.prompts.sha256},
            "seed": options.seed,
            "rows": experiment.work.rows,
        },
    }


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold the store's lock: two runs never write one store."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(
                f"another run is writing {str(path)!r}: wait for it, or choose another --out"
            ) from None
    try:
        yield
    finally:
        lock.release()
