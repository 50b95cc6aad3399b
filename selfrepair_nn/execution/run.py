"""Running an experiment: one unit after the other into the store, resumable wherever it stops."""

import json
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from filelock import FileLock, Timeout
from tqdm import tqdm

from selfrepair_nn import provenance
from selfrepair_nn.components import Head, Mlp, select_heads
from selfrepair_nn.equations import complete
from selfrepair_nn.errors import Incomplete, NotAgreed, StoreError
from selfrepair_nn.execution.backends import Backend, backend, loaded
from selfrepair_nn.execution.experiment import Experiment, prepare
from selfrepair_nn.execution.interruption import interruptible
from selfrepair_nn.execution.preliminaries import loudest, means, noise_floor, top_thresholds
from selfrepair_nn.execution.preview import large, preview_of, preview_text
from selfrepair_nn.execution.sweep import Sweep, plans
from selfrepair_nn.execution.units import PACKED
from selfrepair_nn.models.load import Model
from selfrepair_nn.options import Options
from selfrepair_nn.remote.faults import Fault
from selfrepair_nn.remote.ledger import Ledger, ledger_path
from selfrepair_nn.remote.secrets import hidden
from selfrepair_nn.store import Store, explained, open_store, require_store
from selfrepair_nn.variables import SWEEP, VARIABLES


def run(
    recipe: str = "heads",
    *,
    progress: bool | None = None,
    command: str = "",
    confirm: Callable[[str], bool] | None = None,
    **choices: Any,
) -> xr.Dataset:
    """Run a recipe, or resume it where it stopped, and open its store.

    Args:
        recipe: a recipe's name, or the path of your own.
        progress: True or False; None shows a bar on stderr if that is a terminal.
        command: what the store says made it; default: this call.
        confirm: asked, with the plan, before a large remote run that `yes` does not allow; None refuses it.
        choices: the fields of `Options`: model, prompts, out, tokens, layers, heads, ablation …

    Returns the store's dataset, lazily; `dataset.encoding["source"]` is its path.

    Raises:
        UsageError: a choice that does not exist or does not fit.
        NotAgreed: a remote run whose extent was not chosen, or that is large and not agreed to.
        StoreError: the store is another run's, is in use, or cannot be written.
        Incomplete: interrupted, or a server failed for too long; the same call resumes.
        Fault: a server refuses what another attempt would not change.
    """
    experiment = prepare(recipe, Options(**choices))
    if experiment.options.served:
        _require_consent(experiment, confirm)
    with _only_writer(experiment.path):
        if experiment.undecided and not experiment.path.exists():
            experiment = _decided(experiment)
        store = _open_or_create(experiment, command or _call(recipe, choices))
        experiment = _as_stored(experiment, store)
        if not all(_finished(store, experiment)):
            _run(store, experiment, progress)
    return open_store(experiment.path)


def _decided(experiment: Experiment) -> Experiment:
    """The experiment with the heads that a clean pass finds, and with the model that ran it."""
    model = loaded(experiment)
    heads = loudest(experiment, model.layout, _first_runner(experiment, model))
    options = experiment.options if experiment.options.served else replace(experiment.options, model=model)
    return replace(experiment.of(heads), options=options)


def _first_runner(experiment: Experiment, model: Model) -> Backend:
    """The backend before there is a store: the same run asks the server for the same jobs again."""
    o = experiment.options
    if not o.served:
        return backend(o.backend, model)
    from selfrepair_nn.execution.remote import departing

    run = sha256(json.dumps(experiment.settings).encode()).hexdigest()
    return departing(o, model, Ledger(ledger_path(experiment.path), run))


def _as_stored(experiment: Experiment, store: Store) -> Experiment:
    """The experiment in the units of its store, with the heads that were found when that was begun."""
    experiment = replace(experiment, work=replace(experiment.work, block=store.prompts_per_chunk))
    if not experiment.undecided:
        return experiment
    return experiment.of(_found_heads(store, experiment))


def _found_heads(store: Store, experiment: Experiment) -> list[Head]:
    """The heads that a clean pass found; where more follows from them they are the first cases, the loudest first."""
    if experiment.graph.then is None:
        layers, heads = store.read("layer"), store.read("head")
        return [Head(layers[i], heads[j]) for i, j in np.argwhere(store.read("selected"))]
    s, labels = experiment.description.structure, store.read("case")[: experiment.graph.loudest]
    return [select_heads(None, str(label), s.n_layers, s.n_heads)[0] for label in labels]


def _run(store: Store, experiment: Experiment, progress: bool | None) -> None:
    model = loaded(experiment)
    _require_same_weights(store, model)
    try:
        with interruptible() as stop_if_asked, _bar(store, experiment, progress) as bar:
            for _ in _fill(store, experiment, model, _runner(store, experiment, model), bar):
                stop_if_asked()
    except KeyboardInterrupt:
        raise Incomplete(f"interrupted: {_kept(store, experiment)}; the same command resumes") from None
    except (Incomplete, Fault) as error:
        if isinstance(error, Fault) and error.kind != "unreachable":
            raise
        raise Incomplete(f"{error}\n{_kept(store, experiment)}; the same command resumes") from None
    store.annotate(finished=provenance.now(), **_traffic(store, experiment))


def _runner(store: Store, experiment: Experiment, model: Model) -> Backend:
    if not experiment.options.served:
        return backend(experiment.options.backend, model)
    from selfrepair_nn.execution.remote import connected

    flight, facts = connected(experiment.options, model, _ledger(store))
    known = store.attributes["dtype"]
    if known not in (model.dtype, facts["dtype"]):
        raise StoreError(
            f"{str(store.path)!r} was begun on a server that computes in {known}, this one computes in "
            f"{facts['dtype']}: choose another --out"
        )
    store.annotate(**facts)
    return flight


def _ledger(store: Store) -> Ledger:
    if "run" not in store.attributes:
        store.annotate(run=uuid.uuid4().hex)
    return Ledger(ledger_path(store.path), store.attributes["run"])


def _fill(store: Store, experiment: Experiment, model: Model, runner: Backend, bar: tqdm) -> Iterator[slice]:
    """Everything that is still missing, unit by unit; gives each when it is stored."""
    run_plans, constants = plans(experiment, model.layout), {}
    if any(plan["replacement"]["kind"] == "mean" for plan in run_plans):
        constants["means"] = means(experiment, model.layout, runner)
    if np.isnan(store.read("noise_floor")).any():
        store.write("noise_floor", noise_floor(experiment, model.layout, runner))
    limits = top_thresholds(experiment, run_plans[0], runner) if experiment.shared else None
    sweep = Sweep(experiment, run_plans, constants, limits, bar.update)
    missing = [b for b, f in zip(experiment.work.units, _finished(store, experiment), strict=True) if not f]
    for block, found in sweep.by_block(runner(sweep.units(missing))):
        _write(store, experiment, block, [_measured(each, limits) for each in found])
        if experiment.options.served:
            bar.update(experiment.work.case_tokens // experiment.prompts.n * (block.stop - block.start))
        yield block


def _measured(found: dict[str, Any], limits: np.ndarray | None) -> dict[str, np.ndarray]:
    """A job's result as arrays with everything that follows from it; NaN where only top tokens came back."""
    measured = {name: value.numpy() for name, value in found.items()}
    if limits is not None:
        top = measured["direct_effect"] >= limits[:, None, None]
        for name in measured.keys() & set(PACKED):
            whole = np.full((*top.shape, measured[name].shape[-1]), np.nan, measured[name].dtype)
            whole[top] = measured[name]
            measured[name] = whole
    return complete(measured)


def _kept(store: Store, experiment: Experiment) -> str:
    finished = _finished(store, experiment)
    return f"{sum(finished)} of {len(finished)} units are kept in {str(store.path)!r}"


def _traffic(store: Store, experiment: Experiment) -> dict[str, Any]:
    """For the store's attributes: what a remote run sent and got back."""
    if not experiment.options.served:
        return {}
    from selfrepair_nn.execution.remote import traffic

    return {"traffic": traffic(_ledger(store))}


def _require_consent(experiment: Experiment, confirm: Callable[[str], bool] | None) -> None:
    """Nothing goes to a server before its extent was chosen, nor, if it is large, before it was agreed to."""
    o, plan = experiment.options, preview_of(experiment)
    if o.layers is None and o.heads is None and o.tokens is None:
        raise NotAgreed(
            preview_text(plan), "choose how much of this to run remotely, with --layers, --heads or --tokens"
        )
    if large(plan) and not o.yes and not (confirm and confirm(preview_text(plan))):
        raise NotAgreed(
            preview_text(plan),
            "this is a large run: add --yes, or choose less with --layers, --heads or --tokens",
        )


def _write(store: Store, experiment: Experiment, block: slice, variants: list[dict[str, np.ndarray]]) -> None:
    """One unit into the store: what each variant's job measured and what follows from it, then the mark."""
    values = {}
    for name in store.names & VARIABLES.keys() & variants[0].keys():
        swept = VARIABLES[name].dims[:2] == SWEEP[:2]
        parts = [experiment.on_grid(found[name]) if swept else found[name] for found in variants]
        varies = experiment.work.axis and VARIABLES[name].ablated
        values[name] = np.stack(parts) if varies else parts[0]
    store.write_prompts(block, values, experiment.selected)


def _finished(store: Store, experiment: Experiment) -> list[bool]:
    """Whether each unit is stored."""
    done = store.done[experiment.selected]
    return [bool(done[:, block].all()) for block in experiment.work.units]


def _open_or_create(experiment: Experiment, command: str) -> Store:
    path = experiment.path
    if not path.exists():
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
    require_store(path)
    store = Store(path)
    _require_same_settings(path, json.loads(store.attributes["settings"]), experiment.settings)
    return store


def _require_same_settings(path: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = [name for name in asked if asked[name] != stored.get(name)]
    differing = [name for name in differing if name != "graph"] or differing
    if differing:
        said = "; ".join(f"{n} is {_short(stored.get(n))} there, {_short(asked[n])} here" for n in differing)
        raise StoreError(
            f"{str(path)!r} holds another run ({said}): choose another --out, or the same settings"
        )


def _require_same_weights(store: Store, model: Model) -> None:
    known = store.attributes.get("weights")
    if known is None:
        store.annotate(weights=model.fingerprint)
    elif known != model.fingerprint:
        raise StoreError(
            f"{str(store.path)!r} was begun with other weights of {model.name!r} (fingerprint {known}, "
            f"now {model.fingerprint}): choose another --out"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:36] + " …"


def _attributes(experiment: Experiment, command: str) -> dict[str, Any]:
    options, structure, neurons = (
        experiment.options,
        experiment.description.structure,
        experiment.graph.neurons,
    )
    recorded = {} if neurons is None else {"recorded_mlp": Mlp(neurons).label}
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
            "rows": options.rows,
        },
    }


def _call(recipe: str, choices: dict[str, Any]) -> str:
    shown = [
        f"{name}={value if isinstance(value, (str, int, float)) else '…'!r}"
        for name, value in choices.items()
    ]
    return f"selfrepair_nn.run({', '.join([repr(recipe), *shown])})"


def _bar(store: Store, experiment: Experiment, progress: bool | None) -> tqdm:
    """Head x token pairs, with rate and time left; drawn at most twice a second, and only on a terminal."""
    finished = _finished(store, experiment)
    share = sum(b.stop - b.start for b, f in zip(experiment.work.units, finished, strict=True) if f)
    return tqdm(
        desc=experiment.description.source.name,
        total=experiment.work.case_tokens,
        initial=round(experiment.work.case_tokens * share / experiment.prompts.n),
        unit=" head·tokens",
        unit_scale=True,
        mininterval=0.5,
        file=sys.stderr,
        disable=None if progress is None else not progress,
    )


@contextmanager
def _only_writer(path: Path):
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
