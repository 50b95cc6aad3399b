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
from selfrepair_nn.errors import Incomplete, SelfRepairError, StoreError, UsageError
from selfrepair_nn.execution.backends import Backend, backend
from selfrepair_nn.execution.experiment import Experiment, prepare
from selfrepair_nn.execution.interruption import interruptible
from selfrepair_nn.execution.preliminaries import loudest, means, noise_floor, top_thresholds
from selfrepair_nn.execution.preview import large, preview_of, preview_text
from selfrepair_nn.execution.units import PACKED, Unit, ablation_shapes
from selfrepair_nn.models.load import Model, load_described, structure_only
from selfrepair_nn.options import Options
from selfrepair_nn.remote.ledger import Ledger, ledger_path
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
    model = _loaded(experiment)
    heads = loudest(experiment, model.layout, _first_runner(experiment, model))
    options = experiment.options if experiment.options.served else replace(experiment.options, model=model)
    return replace(experiment.of(heads), options=options)


def _first_runner(experiment: Experiment, model: Model) -> Backend:
    """The backend before there is a store: the same run asks the server for the same jobs again."""
    o = experiment.options
    if not o.served:
        return backend(o.backend, model)
    from selfrepair_nn.execution.remote import departing, server_of

    run = sha256(json.dumps(experiment.settings).encode()).hexdigest()
    return departing(server_of(o), o, model, Ledger(ledger_path(experiment.path), run))


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
    model = _loaded(experiment)
    _require_same_weights(store, model)
    try:
        with interruptible() as stop_if_asked, _bar(store, experiment, progress) as bar:
            for _ in _fill(store, experiment, model, _runner(store, experiment, model), bar):
                stop_if_asked()
    except KeyboardInterrupt:
        raise Incomplete(f"interrupted: {_kept(store, experiment)}; the same command resumes") from None
    except Incomplete as error:
        raise Incomplete(f"{error}\n{_kept(store, experiment)}; the same command resumes") from None
    store.annotate(finished=provenance.now(), **_traffic(store, experiment))


def _runner(store: Store, experiment: Experiment, model: Model) -> Backend:
    if not experiment.options.served:
        return backend(experiment.options.backend, model)
    from selfrepair_nn.execution.remote import connected

    return connected(experiment.options, model, store, _ledger(store))


def _ledger(store: Store) -> Ledger:
    if "run" not in store.attributes:
        store.annotate(run=uuid.uuid4().hex)
    return Ledger(ledger_path(store.path), store.attributes["run"])


def _fill(store: Store, experiment: Experiment, model: Model, runner: Backend, bar: tqdm) -> Iterator[slice]:
    """Everything that is still missing, unit by unit; gives each when it is stored."""
    plans = [graph.plan(model.layout) | {"rows": experiment.work.rows} for graph in experiment.work.graphs]
    constants: dict[str, Any] = {}
    if any(plan["replacement"]["kind"] == "mean" for plan in plans):
        constants["means"] = means(experiment, model.layout, runner)
    if np.isnan(store.read("noise_floor")).any():
        store.write("noise_floor", noise_floor(experiment, model.layout, runner))
    limits = top_thresholds(experiment, plans[0], runner) if experiment.shared else None
    units = [
        _unit(experiment, plan, index, block, constants, limits, bar)
        for block, finished in zip(experiment.work.units, _finished(store, experiment), strict=True)
        for index, plan in enumerate(plans)
        if not finished
    ]
    for block, found in _by_block(runner(units), plans):
        _write(store, experiment, block, [_measured(each, limits) for each in found])
        if experiment.options.served:
            bar.update(experiment.work.case_tokens // experiment.prompts.n * (block.stop - block.start))
        yield block


def _unit(
    experiment: Experiment,
    plan: dict[str, Any],
    variant: int,
    block: slice,
    constants: dict[str, Any],
    limits: np.ndarray | None,
    bar: tqdm,
) -> Unit:
    """One variant on one block of prompts."""
    from selfrepair_nn.tracing.jobs import ablation_job

    tokens, axis = (block.stop - block.start) * experiment.prompts.length, experiment.work.axis
    return Unit(
        name=f"ablation, {axis} {experiment.work.labels[variant]}" if axis else "ablation",
        job=ablation_job,
        prompts=block,
        plan=plan,
        inputs=lambda prompts: experiment.arrays(prompts) | constants,
        shapes=ablation_shapes(
            plan, experiment.prompts.length - 1, len(experiment.work.components), limits is not None
        ),
        thresholds=limits,
        tick=lambda cases: bar.update(cases * tokens),
    )


def _by_block(
    results: Iterator[tuple[Unit, dict[str, Any]]], plans: list[dict[str, Any]]
) -> Iterator[tuple[slice, list[dict[str, Any]]]]:
    """The results of all variants on a block, in the plans' order, as soon as the last of them is there."""
    gathered: dict[int, dict[int, dict[str, Any]]] = {}
    for unit, found in results:
        if flaw := unit.flaw(found):
            raise SelfRepairError(f"{unit.label}: {flaw}: try --dtype float32, or look at those prompts")
        here = gathered.setdefault(unit.prompts.start, {})
        here[id(unit.plan)] = found
        if len(here) == len(plans):
            yield unit.prompts, [here[id(plan)] for plan in plans]
            del gathered[unit.prompts.start]


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
    o = experiment.options
    plan = preview_of(experiment)
    if o.layers is None and o.heads is None and o.tokens is None:
        raise UsageError(
            f"{preview_text(plan)}\n\nnothing was sent: a remote run takes --layers or --heads, or --tokens. "
            "Choose how much of this you want"
        )
    if large(plan) and not o.yes and not (confirm and confirm(preview_text(plan))):
        raise UsageError(
            f"{preview_text(plan)}\n\nnothing was sent: this is a large run. Add --yes to start it, or choose less "
            "with --layers, --heads or --tokens"
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
        "command": command,
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


def _loaded(experiment: Experiment) -> Model:
    o = experiment.options
    if o.served:
        return structure_only(experiment.description, experiment.tokenizer)
    if isinstance(o.model, Model):
        return o.model
    return load_described(experiment.description, experiment.tokenizer, o.dtype, o.device, o.check)


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
