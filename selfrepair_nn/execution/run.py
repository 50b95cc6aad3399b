"""Running an experiment: one unit after the other into the store, resumable wherever it stops."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from filelock import FileLock, Timeout
from tqdm import tqdm

from selfrepair_nn import provenance
from selfrepair_nn.equations import complete
from selfrepair_nn.errors import Incomplete, SelfRepairError, StoreError
from selfrepair_nn.execution.backends import Backend, backend
from selfrepair_nn.execution.experiment import Experiment, prepare
from selfrepair_nn.execution.interruption import interruptible
from selfrepair_nn.execution.preliminaries import means, noise_floor, top_thresholds
from selfrepair_nn.models.load import Model, load_described
from selfrepair_nn.options import Options
from selfrepair_nn.store import Store, explained, open_store, require_store
from selfrepair_nn.variables import SWEEP, VARIABLES

PACKED = {"component_change", "neuron_change", "neuron_direct_effect"}
"""What comes back for the top tokens only, where there is a threshold."""


def run(
    recipe: str = "heads", *, progress: bool | None = None, command: str = "", **choices: Any
) -> xr.Dataset:
    """Run a recipe, or resume it where it stopped, and open its store.

    Args:
        recipe: a recipe's name, or the path of your own.
        progress: True or False; None shows a bar on stderr if that is a terminal.
        command: what the store says made it; default: this call.
        choices: the fields of `Options`: model, prompts, out, tokens, layers, heads, ablation …

    Returns the store's dataset, lazily; `dataset.encoding["source"]` is its path.

    Raises:
        UsageError: a choice that does not exist or does not fit.
        StoreError: the store is another run's, is in use, or cannot be written.
        Incomplete: interrupted; the same call resumes.
    """
    experiment = prepare(recipe, Options(**choices))
    with _only_writer(experiment.path):
        store = _open_or_create(experiment, command or _call(recipe, choices))
        experiment = replace(experiment, work=replace(experiment.work, block=store.prompts_per_chunk))
        if not all(_finished(store, experiment)):
            _run(store, experiment, progress)
    return open_store(experiment.path)


def _run(store: Store, experiment: Experiment, progress: bool | None) -> None:
    model = _loaded(experiment)
    _require_same_weights(store, model)
    runner = backend(experiment.options.backend, model)
    try:
        with interruptible() as stop_if_asked, _bar(store, experiment, progress) as bar:
            for _ in _fill(store, experiment, model, runner, bar):
                stop_if_asked()
    except KeyboardInterrupt:
        finished = _finished(store, experiment)
        kept = f"{sum(finished)} of {len(finished)} units are kept in {str(store.path)!r}"
        raise Incomplete(f"interrupted: {kept}; the same command resumes") from None
    store.annotate(finished=provenance.now())


def _fill(store: Store, experiment: Experiment, model: Model, runner: Backend, bar: tqdm) -> Iterator[slice]:
    """Everything that is still missing, unit by unit; gives each when it is stored."""
    from selfrepair_nn.tracing.jobs import ablation_job

    plans = [graph.plan(model.layout) | {"rows": experiment.work.rows} for graph in experiment.work.graphs]
    constants: dict[str, Any] = {}
    if any(plan["replacement"]["kind"] == "mean" for plan in plans):
        constants["means"] = means(experiment, model.layout, runner)
    if np.isnan(store.read("noise_floor")).any():
        store.write("noise_floor", noise_floor(experiment, model.layout, runner))
    if experiment.shared:
        constants["thresholds"] = top_thresholds(experiment, plans[0], runner)
    for block, finished in zip(experiment.work.units, _finished(store, experiment), strict=True):
        if finished:
            continue
        tokens = (block.stop - block.start) * experiment.prompts.length

        def tick(cases: int, tokens: int = tokens) -> None:
            bar.update(cases * tokens)

        arrays = experiment.arrays(block) | _sent(constants)
        found = [_measured(runner(ablation_job, arrays, plan, tick), constants, block) for plan in plans]
        _write(store, experiment, block, found)
        yield block


def _sent(constants: dict[str, Any]) -> dict[str, Any]:
    """The constants of a run as a job takes them."""
    import torch

    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in constants.items()}


def _measured(found: dict[str, Any], constants: dict[str, Any], block: slice) -> dict[str, np.ndarray]:
    """A job's result as arrays, finite, with everything that follows from it; NaN where only top tokens came back."""
    measured = {name: value.numpy() for name, value in found.items()}
    _require_finite(measured, block)
    if "thresholds" in constants:
        top = measured["direct_effect"] >= constants["thresholds"][:, None, None].astype(
            measured["direct_effect"].dtype
        )
        for name in PACKED & set(measured):
            whole = np.full((*top.shape, measured[name].shape[-1]), np.nan, measured[name].dtype)
            whole[top] = measured[name]
            measured[name] = whole
    return complete(measured)


def _write(store: Store, experiment: Experiment, block: slice, variants: list[dict[str, np.ndarray]]) -> None:
    """One unit into the store: what each variant's job measured and what follows from it, then the mark."""
    values = {}
    for name in store.names & VARIABLES.keys() & variants[0].keys():
        swept = VARIABLES[name].dims[:2] == SWEEP[:2]
        parts = [experiment.on_grid(found[name]) if swept else found[name] for found in variants]
        varies = experiment.work.axis and VARIABLES[name].ablated
        values[name] = np.stack(parts) if varies else parts[0]
    store.write_prompts(block, values, experiment.selected)


def _require_finite(measured: dict[str, np.ndarray], block: slice) -> None:
    for name, values in measured.items():
        if not np.isfinite(values).all():
            raise SelfRepairError(
                f"the model's {name} is not finite on prompts {block.start} to {block.stop - 1}: "
                "try --dtype float32, or look at those prompts"
            )


def _finished(store: Store, experiment: Experiment) -> list[bool]:
    """Whether each unit is stored."""
    done = store.done[experiment.selected]
    return [bool(done[:, block].all()) for block in experiment.work.units]


def _open_or_create(experiment: Experiment, command: str) -> Store:
    path = experiment.path
    if not path.exists():
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
    options, structure = experiment.options, experiment.description.structure
    return {
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
        "backend": options.backend,
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
