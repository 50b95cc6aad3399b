"""The store of a run: made for it or found, never another run's."""

import json
from typing import Any

import numpy as np

from selfrepair_nn import provenance
from selfrepair_nn.backends.local import greeted_here
from selfrepair_nn.case_sites import read as case_sites
from selfrepair_nn.choosing import selecting_half
from selfrepair_nn.components import Head, Mlp
from selfrepair_nn.constants import Constants
from selfrepair_nn.door import require_same
from selfrepair_nn.equations import TOLERANCE
from selfrepair_nn.errors import StoreError
from selfrepair_nn.files import sweep_partial
from selfrepair_nn.integrity import contents_of
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.models.alike import recorded
from selfrepair_nn.models.apart import compared
from selfrepair_nn.models.identity import differences, fingerprint
from selfrepair_nn.models.model import Model
from selfrepair_nn.running.mending import require_mendable, restore
from selfrepair_nn.shown import tell
from selfrepair_nn.store import Store


def existing(experiment: Experiment, alone: bool) -> Store | None:
    """The run's store, if there is one; StoreError if what is there is another run's. No weight is loaded for it.

    What a kill left half written is cleared, if this run is `alone` and nobody is still at it.
    """
    path = experiment.path
    if not path.exists():
        return None
    found = contents_of(path)
    require_mendable(found)
    require_same(experiment.request, found.attributes, experiment.settings)
    restore(found)
    if alone:
        sweep_partial(path)
    return Store(path)


def create(experiment: Experiment, command: str, model: Model, record: dict[str, Any]) -> Store:
    """The run's new store, which says whose numbers it will hold; StoreError if nothing can be written."""
    greeting = {}
    if experiment.options.served:
        from selfrepair_nn.backends.ndif.served import require_answer

        require_answer(experiment.options)
    else:
        greeting = {"greeting": greeted_here(model, experiment.options.backend)}
    return Store.create(
        experiment.path,
        experiment.coordinates(),
        experiment.data(),
        dims=experiment.work.dims,
        prompts_per_chunk=experiment.work.block,
        precision=experiment.precision,
        attributes=_attributes(experiment, command)
        | {"identity": record, "fingerprint": fingerprint(record)}
        | greeting,
    )


def require_same_model(store: Store, model: Model, record: dict[str, Any]) -> None:
    """Raise StoreError, naming what differs, unless this is the model that the store was begun with."""
    path = str(store.path)
    if "identity" not in store.attributes:
        raise StoreError(
            f"{path!r} is of an earlier version, which did not record whose numbers it holds: open it with "
            "selfrepair info or open_store; to compute, choose another --out"
        )
    differing = differences(recorded(store.attributes, "identity"), record, TOLERANCE.get(model.dtype, 0))
    if differing:
        raise StoreError(
            f"{path!r} holds the numbers of another model than {model.name!r} is now ({'; '.join(differing)}): "
            "choose another --out, or give the model that it was begun with"
        )


def note_resumed(store: Store, command: str) -> None:
    """Add to what the store says of its history; what an earlier version made has that of its first command."""
    told = store.attributes
    before = told.get("history", f"{told.get('created', '')} {told.get('command', '')}".strip())
    store.annotate(history=f"{before}\n{provenance.event(command)}")


def require_same_answers(store: Store, model: Model, greeting: dict[str, Any]) -> dict[str, Any]:
    """Raise StoreError, naming what differs, unless the model that answers has the weights that the store began with.

    What only rounds otherwise is told. Returns the greeting that the store is to keep: that of its beginning. Raises
    UsageError if that makes no sense.
    """
    if "greeting" not in store.attributes:
        return greeting
    known = recorded(store.attributes, "greeting")
    found = compared(known, greeting)
    if found.differences:
        raise StoreError(
            f"{str(store.path)!r} holds the numbers of another model than {model.name!r} is now on the server "
            f"({'; '.join(found.differences)}): choose another --out, or a server that has the model it was begun with"
        )
    if found.notes:
        tell(f"{model.name} on the server is not in all as it was: {'; '.join(found.notes)}")
    return known


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
    if experiment.asked[0].found_on == "half" or experiment.learns:
        selecting = experiment.order[selecting_half(experiment.prompts.document)]
        recorded |= {"found_on": "half", "selecting_prompts": selecting.tolist()}
    if (resamples := experiment.work.resamples) > 1:
        recorded |= {"resamples": resamples} | ({"partners_averaged": resamples} if experiment.work.moments else {})
    name, revision = experiment.description.source.name, experiment.description.revision
    return recorded | {
        **provenance.discovery(name if revision is None else f"{name}, revision {revision}", command),
        "title": f"{experiment.recipe.name} of {name}",
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
    """The experiment in the units of its store, with what was found and learned when that was begun."""
    experiment = experiment.in_units_of(store.prompts_per_chunk)
    if experiment.learns and "constants" in store.attributes:
        experiment = experiment.learned(Constants.read(json.loads(store.attributes["constants"])))
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
