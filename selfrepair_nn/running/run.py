"""Running an experiment: one unit after the other into the store, resumable wherever it stops."""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Unpack

import xarray as xr

from selfrepair_nn import provenance
from selfrepair_nn.backends.local import Backend, backend, loaded, with_enough_memory
from selfrepair_nn.backends.ndif.faults import KINDS, Fault
from selfrepair_nn.backends.ndif.ledger import Ledger, ledger_path
from selfrepair_nn.errors import Incomplete, NotAgreed, StoreError
from selfrepair_nn.estimating.fitting import Cutting, fitted, jobs_of
from selfrepair_nn.estimating.preview import large, of_each, preview_of, preview_text
from selfrepair_nn.estimating.workable import require_workable
from selfrepair_nn.given import Given
from selfrepair_nn.integrity import verify
from selfrepair_nn.layout.experiment import Experiment, prepare
from selfrepair_nn.layout.packing import computing_with, fitting_block, fitting_tokens
from selfrepair_nn.layout.revisions import prepare_each
from selfrepair_nn.models.check import require
from selfrepair_nn.models.identity import fingerprint, identity
from selfrepair_nn.models.model import Model, evaluating
from selfrepair_nn.options import Options, current, require_known
from selfrepair_nn.progress import Bar
from selfrepair_nn.recipe import recipe_paths, renamed
from selfrepair_nn.running.filling import finished, learn, rank
from selfrepair_nn.running.holding import Hold, only_writer
from selfrepair_nn.running.interruption import interruptible
from selfrepair_nn.running.mending import mend, undecided
from selfrepair_nn.running.opening import (
    as_stored,
    changed_versions,
    create,
    existing,
    note_resumed,
    require_same_answers,
    require_same_model,
)
from selfrepair_nn.running.preliminaries import strongest
from selfrepair_nn.running.revisions import run_each
from selfrepair_nn.running.rounds import rounds
from selfrepair_nn.running.sharing import Sharing, sharing
from selfrepair_nn.shown import LOG, line, tell
from selfrepair_nn.store import Store, open_store

ALONE = (
    "one text has no other to lend it activations: its heads are replaced by their mean over it (ablation mean); give "
    "more texts, or choose zero"
)

OF_TRENDS = (
    "the means of layers are all that is asked of the server: self-repair is not split (--split total), and little "
    "crosses there; --split sums tells heads, MLPs and norm apart"
)


def run(
    recipe: str | os.PathLike[str] = "heads",
    *,
    progress: bool | None = None,
    command: str = "",
    confirm: Callable[[str], bool] | None = None,
    executor: Executor | None = None,
    **choices: Unpack[Given],
) -> xr.Dataset:
    """Run a recipe, or resume it where it stopped, and open its store.

    Args:
        recipe: a recipe's name, or the path of your own.
        progress: True or False; None shows what is done on stderr if that is a terminal, and in a notebook.
        command: what the store says made it; default: this call.
        confirm: asked, with the plan, before a large remote run that `yes` does not allow; None refuses it.
        executor: shares the work out: any `concurrent.futures.Executor`, such as a ProcessPoolExecutor, or
            `client.get_executor()` of Dask. Its workers load the model themselves, and see the store's directory. It
            stays open.
        choices: the options of a run: model, prompts, out, tokens, layers, heads, ablation …

    Returns the store's dataset, lazily; `dataset.encoding["source"]` is its path.

    Raises:
        UsageError: a choice that does not exist or does not fit.
        NotAgreed: a remote run whose extent was not chosen, or that is large and not agreed to.
        StoreError: the store is another run's, is in use, or cannot be written.
        Incomplete: interrupted, or a server failed for too long; the same call resumes.
        Fault: a server refuses what another attempt would not change.
    """
    require_known(choices, ("recipe", "progress", "command", "confirm", "executor"))
    options = Options(**choices)
    with sharing(options, executor) as shared, Bar(_name_of(options.model), progress) as bar:
        if options.revisions:
            return open_store(_run_revisions(recipe, options, shared, command, bar, confirm))
        bar.stage("reading prompts")
        experiment = prepare(recipe, options)
        _told(recipe, experiment)
        if options.alone and choices.get("ablation") is None and experiment.ablation == options.ablation:
            tell(ALONE)
        if options.of_trends and choices.get("split") is None and experiment.graph.record == "total":
            tell(OF_TRENDS)
        if experiment.options.served:
            _require_consent(experiment, confirm)
        _into_store(experiment, shared, command or _call(recipe, options), bar)
    return open_store(experiment.path)


def _name_of(model: Any) -> str:
    """What a model is called before it is looked at."""
    return str(model) if isinstance(model, str | os.PathLike) else type(model).__name__


def _run_revisions(
    recipe: str | os.PathLike[str],
    options: Options,
    shared: Sharing,
    command: str,
    bar: Bar,
    confirm: Callable[[str], bool] | None,
) -> Path:
    """Run each revision, and join them; gives the path of their store."""
    every, command = prepare_each(recipe, options), command or _call(recipe, options)
    _told(recipe, every.first)
    if options.served:
        _require_consent(every.first, confirm, of_each(every))
    run_each(every, lambda experiment: _into_store(experiment, shared, command, bar), command)
    return every.path


def _told(recipe: str | os.PathLike[str], experiment: Experiment) -> None:
    """Tell what a user may not expect of the choices."""
    for said in experiment.told:
        tell(said)
    if experiment.idle:
        tell(f"{' and '.join(experiment.idle)}: chosen, but nothing in this run depends on it")
    for told in (renamed(recipe), *_undrawable(experiment)):
        if told:
            tell(told)


def _into_store(experiment: Experiment, shared: Sharing, command: str, bar: Bar) -> None:
    """Open the store, or make it, and compute what is missing in it."""
    experiment = fitted(experiment)
    with only_writer(experiment.path, experiment.options.part) as hold:
        store = existing(experiment, hold.alone)
        bar.name = line(experiment.description.source.name, 60)
        bar.stage(f"loading the {'tokenizer' if experiment.options.served else 'model'}")
        with with_enough_memory("loading the model"):
            model = loaded(experiment)
        bar.stage("looking at the weights")
        with evaluating(model):
            record = _looked_at(model, store)
            damage = verify(experiment.path) if store is not None else []
            if store is None or damage or "finished" not in store.attributes:
                bar.stage("proving the decomposition")
                _prove(model, experiment, record)
                if undecided(experiment, damage) or (store is None and experiment.undecided):
                    bar.stage("finding the strongest heads")
                    experiment = _decided(experiment, model)
                hold.require()
                new = store is None
                if new:
                    experiment = _sized(experiment, model, shared.on_one_device)
                store = store or create(experiment, command, model, record)
                if not new:
                    note_resumed(store, command)
                experiment = as_stored(experiment, store)
                mend(store, experiment, damage)
                with _gone_if_empty(store, hold) if new else nullcontext():
                    _run(store, experiment, model, shared, bar, hold)


def _undrawable(experiment: Experiment) -> list[str]:
    """What is to be said of figures that could not be drawn afterwards; those of our recipes can, of every token."""
    if not experiment.selective and experiment.recipe.path in recipe_paths().values():
        return []
    from selfrepair_nn.figures import require_own

    return require_own(experiment.recipe, experiment.options)


@contextmanager
def _gone_if_empty(store: Store, hold: Hold) -> Iterator[None]:
    """Within, what fails before anything was kept leaves no store: it would refuse the choices that mend the failure.

    One that was interrupted stays; so does one that others may be filling, or whose jobs a server may still have.
    """
    try:
        yield
    except Incomplete:
        raise
    except Exception:
        if hold.alone and "run" not in store.attributes:
            with suppress(StoreError):
                hold.require()
                store.discard_empty()
        raise


def _looked_at(model: Model, store: Store | None) -> dict[str, Any]:
    """The record of the model as it is now. Raises StoreError if the store's is another one's."""
    with with_enough_memory("looking at the model"):
        record = identity(model)
    if store is not None:
        require_same_model(store, model, record)
        if told := changed_versions(store):
            tell(told)
    return record


def _prove(model: Model, experiment: Experiment, record: dict[str, Any]) -> None:
    """Prove, in the state it is in, a model that is here: whoever loaded it, and whatever was done to it since."""
    if experiment.options.check and not model.served:
        state = json.dumps([fingerprint(record), record["answers"]])
        with with_enough_memory("proving the model"):
            require(model, experiment.arrays(slice(0, 1))["tokens"], state)


def _decided(experiment: Experiment, model: Model) -> Experiment:
    """The experiment with the heads that a clean pass finds."""
    heads = strongest(experiment, model.layout, _first_runner(experiment, model))
    return experiment.of(heads)


def _first_runner(experiment: Experiment, model: Model) -> Backend:
    """The backend before there is a store: the same run asks the server for the same jobs again."""
    o = experiment.options
    if not o.served:
        return backend(o.backend, model, experiment.vocabulary)
    from selfrepair_nn.backends.ndif.served import jobs_in_flight

    run = sha256(json.dumps(experiment.settings).encode()).hexdigest()
    return jobs_in_flight(o, model, Ledger(ledger_path(experiment.path), run))


def _run(
    store: Store, experiment: Experiment, model: Model, shared: Sharing, bar: Bar, hold: Hold
) -> None:
    try:
        with interruptible() as stop_if_asked:
            for _ in _fill(store, experiment, model, shared, bar, hold.share):
                stop_if_asked()
                hold.require()
            whole = experiment.options.until_ci is not None or all(finished(store, experiment))
            if whole:
                bar.stage("ranking each head's tokens")
                rank(store, experiment)
    except KeyboardInterrupt:
        raise Incomplete(f"interrupted: {_kept(store, experiment)}; the same command resumes") from None
    except (Incomplete, Fault) as error:
        if isinstance(error, Fault) and not KINDS[error.kind].passes:
            raise
        raise Incomplete(f"{error}\n{_kept(store, experiment)}; the same command resumes") from None
    if whole:
        store.annotate(finished=provenance.now(), **_traffic(store, experiment))


def _fill(
    store: Store,
    experiment: Experiment,
    model: Model,
    shared: Sharing,
    bar: Bar,
    let_others: Callable[[], None],
) -> Iterator[slice]:
    """Everything that is still missing, block by block; gives each when it is stored.

    A part of a run calls `let_others` once all that the parts have in common is known, so that others can begin.
    """
    o = experiment.options
    experiment = _packed(store, _learned(store, experiment, model), model, shared.on_one_device)
    runner = _runner(store, experiment, model, bar)
    bar.stage("measuring the noise floor, and what all units share")
    known = learn(store, experiment, model.layout, runner)
    _begin(bar, store, experiment)
    if o.part:
        let_others()
    with ExitStack() as working:
        working.enter_context(computing_with(o.threads))
        fill = working.enter_context(shared.filling(store, experiment, known, model, runner, bar))
        for blocks, open_ in rounds(store, experiment, shared.blocks(experiment.work.units)):
            for block in fill(blocks, open_) if blocks else ():
                if o.served:
                    bar.update(
                        experiment.work.case_tokens // experiment.prompts.n * (block.stop - block.start)
                    )
                LOG.info("prompts %d to %d are stored", block.start, block.stop - 1)
                yield block


def _learned(store: Store, experiment: Experiment, model: Model) -> Experiment:
    """With the constants that are learned on half of the prompts, which the store keeps."""
    if not experiment.learns:
        return experiment
    from selfrepair_nn.optimal import learned

    with with_enough_memory("learning constants"):
        found = learned(model, experiment)
    store.annotate(constants=found.written)
    return experiment.learned(found)


def _sized(experiment: Experiment, model: Model, processes: int) -> Experiment:
    """With as many prompts in a unit as the device is best given, unless that was chosen."""
    o, work = experiment.options, experiment.work
    if o.served or o.batch_size:
        return experiment
    block = fitting_block(model, work, experiment.bytes_of_token, processes)
    return experiment.in_units_of(min(work.prompts, max(work.block, block)))


def _packed(store: Store, experiment: Experiment, model: Model, processes: int) -> Experiment:
    """With as many tokens in a pass as fit; as many as before where the run goes on: numbers round alike."""
    o = experiment.options
    if o.served or o.tokens_per_pass:
        return experiment
    tokens = current(store.attributes).get("tokens_per_pass")
    if not tokens:
        tokens = fitting_tokens(model, experiment.prompts.length, processes)
        store.annotate(tokens_per_pass=tokens)
    return replace(experiment, work=replace(experiment.work, tokens_per_pass=int(tokens)))


def _runner(store: Store, experiment: Experiment, model: Model, bar: Bar) -> Backend:
    if not experiment.options.served:
        return backend(experiment.options.backend, model, experiment.vocabulary, _measuring(store, experiment))
    from selfrepair_nn.backends.ndif.served import connected, limits_there

    jobs, facts = connected(experiment.options, model, _ledger(store), bar.note)
    known = store.attributes["dtype"]
    if known not in (model.dtype, facts["dtype"]):
        raise StoreError(
            f"{str(store.path)!r} was begun on a server that computes in {known}, this one computes in "
            f"{facts['dtype']}: choose another --out"
        )
    _tell_changed(store, facts)
    store.annotate(**facts | {"greeting": require_same_answers(store, model, facts["greeting"])})
    planned = jobs_of(experiment, limits_there(jobs, experiment.options, facts["dtype"]))
    require_workable(planned)
    jobs.cutter = Cutting(planned, tell)
    return jobs


def _tell_changed(store: Store, facts: dict[str, Any]) -> None:
    """Tell of versions on the server that are others than when the run was last there; all are kept."""
    before = json.loads(store.attributes.get("server", "{}"))
    changed = [
        f"{name} {before[name]} then, {now} now"
        for name, now in facts["server"].items()
        if name not in ("host", "apart") and before.get(name, now) != now
    ]
    if changed:
        said = f"the server is not as when {str(store.path)!r} was last filled ({', '.join(changed)})"
        tell(f"{said}: numbers may round otherwise")
        earlier = json.loads(store.attributes.get("earlier_servers", "[]"))
        store.annotate(earlier_servers=[*earlier, before])


def _measuring(store: Store, experiment: Experiment) -> Callable[[int], None] | None:
    """What keeps how many tokens a pass was found to have; None where that is known, chosen or several share."""
    o = experiment.options
    if o.tokens_per_pass or o.part or o.workers > 1 or "tokens_measured" in store.attributes:
        return None
    return lambda tokens: store.annotate(tokens_per_pass=tokens, tokens_measured=1)


def _ledger(store: Store) -> Ledger:
    if "run" not in store.attributes:
        store.annotate(run=uuid.uuid4().hex)
    return Ledger(ledger_path(store.path), store.attributes["run"]).compact()


def _kept(store: Store, experiment: Experiment) -> str:
    stored = finished(store, experiment)
    return f"{sum(stored)} of {len(stored)} units are kept in {str(store.path)!r}"


def _traffic(store: Store, experiment: Experiment) -> dict[str, Any]:
    """For the store's attributes: what a remote run sent and got back."""
    if not experiment.options.served:
        return {}
    from selfrepair_nn.backends.ndif.served import traffic

    return {"traffic": traffic(_ledger(store))}


def _require_consent(
    experiment: Experiment, confirm: Callable[[str], bool] | None, plan: dict[str, Any] | None = None
) -> None:
    """Nothing goes to a server before its extent was chosen, nor, if it is large, before it was agreed to."""
    o, plan = experiment.options, plan or preview_of(experiment)
    if o.layers is None and o.heads is None and o.tokens is None:
        raise NotAgreed(
            preview_text(plan), "choose how much of this to run remotely, with --layers, --heads or --tokens"
        )
    if large(plan) and not o.yes and not (confirm and confirm(preview_text(plan))):
        raise NotAgreed(
            preview_text(plan),
            "this is a large run: add --yes, or choose less with --layers, --heads or --tokens",
        )


def _call(recipe: Any, options: Options) -> str:
    """The call that made a store, each choice in the form in which it is kept."""
    shown = [repr(str(recipe))]
    for each in fields(options):
        value = getattr(options, each.name)
        plain = isinstance(value, str | int | float | tuple | dict | None)
        if not plain or value != each.default:
            shown.append(f"{each.name}={value if plain else '…'!r}")
    return f"selfrepair_nn.run({', '.join(shown)})"


def _begin(bar: Bar, store: Store, experiment: Experiment) -> None:
    """Count head x token pairs. How many there will be is not known where only the top share is ablated."""
    blocks = zip(experiment.work.units, finished(store, experiment), strict=True)
    share = sum(b.stop - b.start for b, stored in blocks if stored) / experiment.prompts.n
    total = None if experiment.ranked else experiment.work.case_tokens
    bar.begin(total, round((total or 0) * share))
