"""What a run computes, into its store: block after block of prompts, each marked when it is whole."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from selfrepair_nn.backends.local import Backend, tell
from selfrepair_nn.equations import complete
from selfrepair_nn.layout.experiment import Experiment
from selfrepair_nn.layout.sweep import Sweep, plans
from selfrepair_nn.quantities import QUANTITIES, VARIANCE, usual_share, varied
from selfrepair_nn.running.preliminaries import (
    direct_effects,
    follows_length,
    means,
    noise_floor,
    top_thresholds,
)
from selfrepair_nn.store import Store


@dataclass(frozen=True, eq=False)
class Known:
    """What must be known of the whole run before its first unit.

    `constants` are arrays that every job takes. `limits` [case] are the least direct effects of each top share, None
    where every token counts alike; `wanted` [case, prompt] how many positions of a prompt must be ablated for that.
    """

    constants: dict[str, Any]
    limits: np.ndarray | None
    wanted: np.ndarray | None

    @property
    def everywhere(self) -> "Known":
        """Without what is known of single prompts."""
        return replace(self, wanted=None)

    def asked(self, experiment: Experiment, open_: np.ndarray) -> np.ndarray | None:
        """How many positions of each prompt are ablated, [case, prompt], for the open cases; None: all of all."""
        if self.wanted is None and open_.all():
            return None
        whole = np.full((len(open_), experiment.prompts.n), experiment.prompts.length)
        asked = np.where(open_[:, None], whole if self.wanted is None else self.wanted, 0)
        idle = [block.start for block in experiment.work.units if not asked[:, block].any()]
        asked[np.flatnonzero(open_)[:1, None], idle] = 1  # a job without any row would give nothing at all
        return asked


def learn(store: Store, experiment: Experiment, layout: dict[str, Any], runner: Backend) -> Known:
    """Find out what must be known, and keep in the store what belongs there."""
    run_plans, constants = plans(experiment, layout), {}
    if experiment.reads_means:
        constants["means"] = means(experiment, layout, runner)
    if np.isnan(store.read("noise_floor")).any():
        store.write("noise_floor", noise_floor(experiment, layout, runner))
    limits = None
    if experiment.ranked:
        limits = _ranked(store, experiment, run_plans[0], runner)
    elif experiment.shared:
        found = direct_effects(experiment, run_plans[0], runner)
        limits = top_thresholds(experiment, found, experiment.share)
    if limits is None or not experiment.selective:
        return Known(constants, limits, None)
    wanted = _wanted(store, experiment, limits)
    if _whole_lengths(store, experiment, layout, runner):
        wanted = np.where(wanted > 0, experiment.prompts.length, 0)
    return Known(constants, limits, wanted)


def _whole_lengths(store: Store, experiment: Experiment, layout: dict[str, Any], runner: Backend) -> bool:
    """Whether prompts must not be cut after the last token that is wanted; found out once, and said in the store."""
    if "pass_lengths" not in store.attributes:
        whole = follows_length(experiment, layout, store.attributes["dtype"], runner)
        store.annotate(pass_lengths="whole" if whole else "to the last token wanted")
        if whole:
            tell(
                f"{experiment.description.source.name} depends on the length of a pass: prompts are not cut short"
            )
    return store.attributes["pass_lengths"] == "whole"


def _ranked(store: Store, experiment: Experiment, plan: dict[str, Any], runner: Backend) -> np.ndarray:
    """The thresholds; from the store, or from a clean pass over all prompts, whose direct effects it then keeps."""
    kept = _stored_effects(store, experiment)
    missing = [block for block, effects in kept if np.isnan(effects).any()]
    for block, effects in direct_effects(experiment, plan, runner, missing):
        store.write_prompts(block, {"direct_effect": experiment.on_grid(effects)})
    rank(store, experiment)
    return store.read("threshold")[experiment.selected]


def rank(store: Store, experiment: Experiment) -> None:
    """Keep each case's threshold, once all direct effects are in the store; one of before has no place for it."""
    if "threshold" in store.names and np.isnan(store.read("threshold")[experiment.selected]).any():
        share = experiment.share if experiment.ranked else usual_share(bool(experiment.counted.all()))
        limits = top_thresholds(experiment, _stored_effects(store, experiment), share)
        store.write("threshold", experiment.on_grid(limits))


def _stored_effects(store: Store, experiment: Experiment) -> Iterator[tuple[slice, np.ndarray]]:
    """Every block's prompts, and the direct effects [case, prompt, position] that the store has of them."""
    for block in experiment.work.units:
        yield block, store.read("direct_effect", block)[experiment.selected]


def _wanted(store: Store, experiment: Experiment, limits: np.ndarray) -> np.ndarray:
    """How many positions of each prompt there are up to its last top token: [case, prompt]; 0 where it has none."""
    positions = np.arange(1, experiment.prompts.length)
    counts = [
        (
            experiment.top(store.read("direct_effect", block)[experiment.selected], limits, block) * positions
        ).max(-1)
        for block in experiment.work.units
    ]
    return np.concatenate(counts, axis=1)


class Filling:
    """Computes blocks of a run's prompts, and stores them. `tick` is called with ablated tokens as they are done."""

    def __init__(
        self,
        store: Store,
        experiment: Experiment,
        known: Known,
        layout: dict[str, Any],
        runner: Backend,
        tick: Callable[[int], Any] = lambda tokens: None,
    ) -> None:
        self._store, self._experiment, self._known, self._runner = store, experiment, known, runner
        self._plans, self._tick = plans(experiment, layout), tick

    def __call__(self, blocks: Iterable[slice], open_: np.ndarray) -> Iterator[slice]:
        """Compute these blocks for the cases that are open, bool [case]; gives each block when it is stored."""
        return self.fill(blocks, open_, self._known.asked(self._experiment, open_))

    def fill(self, blocks: Iterable[slice], open_: np.ndarray, asked: np.ndarray | None) -> Iterator[slice]:
        """The same, where it is known already what is `asked` of these blocks, [case, prompt]."""
        limits = self._known.limits if self._experiment.shared else None
        sweep = Sweep(self._experiment, self._plans, self._known.constants, limits, asked, self._tick)
        for block, found in sweep.by_block(self._runner(sweep.units(blocks))):
            runs = (self._runs(block, plan, each) for plan, each in zip(self._plans, found, strict=True))
            self._write(block, [*runs], open_)
            yield block

    def _runs(self, block: slice, plan: dict[str, Any], found: dict[str, Any]) -> list[dict[str, np.ndarray]]:
        """A job's result with everything that follows from it, for each partner; or the moments of these."""
        work, several = self._experiment.work, plan.get("resamples", 1)
        each = (self._measured(block, _of_partner(found, plan, index)) for index in range(several))
        if work.moments:
            return [moments(each)]
        return [*each] if several > 1 else [*each] * (work.resamples if "resample" in work.axes else 1)

    def _measured(self, block: slice, found: dict[str, Any]) -> dict[str, np.ndarray]:
        """A job's result as arrays with everything that follows from it; NaN where only top tokens are kept."""
        experiment, limits = self._experiment, cast(np.ndarray, self._known.limits)  # where any are asked for
        measured = {name: value.numpy() for name, value in found.items()}
        if experiment.shared:
            _unpack(measured, experiment.top(measured["direct_effect"], limits, block))
        measured = complete(measured)
        if experiment.ranked:
            del measured["direct_effect"]
        if experiment.selective:
            effects = self._store.read("direct_effect", block)[experiment.selected]
            _keep(measured, experiment.top(effects, limits, block))
        return measured

    def _write(self, block: slice, variants: list[list[dict[str, np.ndarray]]], open_: np.ndarray) -> None:
        """One block into the store: what each variant's job measured and what follows from it, then the mark.

        `variants` are lists of what each partner gives.
        """
        store, experiment = self._store, self._experiment
        values = {}
        for name in store.names & QUANTITIES.keys() & variants[0][0].keys():
            each = QUANTITIES[name]
            chosen = variants if each.ablated else [variants[0][:1]]
            parts = [[experiment.on_grid(run[name]) if each.swept else run[name] for run in runs] for runs in chosen]
            values[name] = self._stacked(parts) if each.ablated else parts[0][0]
        done = experiment.selected.copy()
        done[done] = open_
        store.write_prompts(block, values, done)


    def _stacked(self, parts: list[list[np.ndarray]]) -> np.ndarray:
        """What each variant's runs with each partner gave, along the axes that the store has."""
        found, work = np.array(parts), self._experiment.work
        found = found if "resample" in work.axes else found[:, 0]
        return found if work.axis else found[0]


def _of_partner(found: dict[str, Any], plan: dict[str, Any], index: int) -> dict[str, Any]:
    """A job's result as one of the partners alone would have it."""
    varied = plan.get("varied", ())
    return {name: value[..., index] if name in varied else value for name, value in found.items()}


def moments(runs: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Mean and variance (by the number less one) of what differs between runs, whatever their number, in float64.

    One run after the other is taken in and let go: Welford (1962), Note on a method for calculating corrected sums of
    squares and products. Of closure it is the largest; what does not differ is that of the first.
    """
    found, count, means, squares = {}, 0, {}, {}
    for run in runs:
        found, count = (found or run) | _worse(found, run), count + 1
        for name in [name for name in run if varied(QUANTITIES[name])]:
            value = np.asarray(run[name], float)
            away = value - means.get(name, 0)
            means[name] = means.get(name, 0) + away / count
            squares[name] = squares.get(name, 0) + away * (value - means[name])
    return found | means | {f"{n}{VARIANCE}": value / max(1, count - 1) for n, value in squares.items()}


def _worse(found: dict[str, np.ndarray], run: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The closure that is larger in size, where there is one."""
    if "closure" not in found:
        return {}
    one, other = found["closure"], run["closure"]
    return {"closure": np.where(np.isnan(other) | (abs(other) > abs(one)), other, one)}


def _unpack(measured: dict[str, np.ndarray], top: np.ndarray) -> None:
    """Give what came back for top tokens [case, prompt, position] only its place among all tokens, NaN elsewhere."""
    for name in [name for name in measured if QUANTITIES[name].large]:
        values = measured[name]
        whole = np.full((*top.shape, *values.shape[1:]), _blank(values), values.dtype)
        whole[top] = values
        measured[name] = whole


def _keep(measured: dict[str, np.ndarray], top: np.ndarray) -> None:
    """Leave out, of what belongs to an ablated head, all but the top tokens [case, prompt, position]."""
    for name, values in measured.items():
        if QUANTITIES[name].ablated:
            measured[name] = np.where(top.reshape(top.shape + (1,) * (values.ndim - 3)), values, _blank(values))


def _blank(values: np.ndarray) -> float:
    """What stands where nothing is kept."""
    return np.nan if np.issubdtype(values.dtype, np.floating) else -1


def finished(store: Store, experiment: Experiment) -> list[bool]:
    """Whether each block is stored, as far as it was asked for."""
    done = store.done[experiment.selected]
    return [bool(done[:, block].any()) for block in experiment.work.units]
