"""One experiment on several checkpoints of a model: a run of each, and the store that holds them along `revision`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from selfrepair_nn.errors import UsageError
from selfrepair_nn.layout.experiment import Experiment, prepare
from selfrepair_nn.models.checkpoints import Checkpoint, checkpoints, family_of
from selfrepair_nn.models.identity import tokenizer_hash
from selfrepair_nn.models.load import describe
from selfrepair_nn.models.model import AS_SERVED
from selfrepair_nn.naming import Request, Sizes
from selfrepair_nn.options import Options
from selfrepair_nn.quantities import Quantity
from selfrepair_nn.recipe import find_recipe

AXIS = "revision"


@dataclass(frozen=True)
class Revisions:
    """The experiment of each checkpoint, by label, in the order in which they were named; `request` is that of all."""

    request: Request
    experiments: Mapping[str, Experiment]

    @property
    def first(self) -> Experiment:
        return next(iter(self.experiments.values()))

    @property
    def path(self) -> Path:
        """Where the store is, or will be."""
        return self.request.path

    @property
    def parts(self) -> Path:
        """Where the run of each checkpoint has its own store, until all are done."""
        return self.path.with_name(f".{self.path.name}.revisions")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides every number in the store; see `Experiment.settings`."""
        commits = [each.settings["revision"] for each in self.experiments.values()]
        own = {"model": self.request.model, "revision": commits, "revisions": [*self.experiments]}
        return self.first.settings | own

    def dims(self, quantity: Quantity) -> tuple[str, ...]:
        """Each checkpoint is another model: what is no label has the axis first, the clean run's numbers too."""
        own = self.first.work.dims(quantity)
        return own if quantity.source == "label" else (AXIS, *own)


def prepare_each(recipe: str | os.PathLike[str], options: Options) -> Revisions:
    """What `prepare` does, for each checkpoint. No weight is loaded, nothing is written.

    Raises:
        UsageError: checkpoints that are not of one model (another structure or tokenizer), or what has no one store of
            several revisions: variants, and heads that a clean pass finds; else as `prepare`.
    """
    model, names = str(options.model), tuple(options.revisions)
    found = checkpoints(model, names)
    whole = _request(recipe, options, found)
    parts = whole.path.with_name(f".{whole.path.name}.revisions")
    experiments: dict[str, Experiment] = {}
    for each in found:
        own = replace(options, model=each.model, revision=each.revision, revisions=None, out=_part(parts, each))
        experiments[each.label] = prepare(recipe, own)
        _require_alike(experiments, each.label)
    _require_one_grid(next(iter(experiments.values())))
    return Revisions(whole, experiments)


def _part(folder: Path, each: Checkpoint) -> str:
    return str(folder / f"{sha256(each.label.encode()).hexdigest()[:12]}.zarr")


def _request(recipe: Any, options: Options, found: Sequence[Checkpoint]) -> Request:
    """What is asked for of all together."""
    structure = describe(found[0].model, found[0].revision).structure
    sizes = Sizes(structure.n_layers, structure.n_heads, structure.max_length)
    known, dtype = find_recipe(recipe), AS_SERVED if options.served else options.dtype
    return Request(known, known.resolved(options), family_of(str(options.model), found), sizes, dtype)


def _require_one_grid(experiment: Experiment) -> None:
    if experiment.work.axis is not None:
        raise UsageError(
            f"recipe {experiment.recipe.name!r} has an axis of its own, {experiment.work.axis}: with --revisions a "
            "store has that one; run it on one revision at a time, or a recipe of one graph"
        )
    if experiment.undecided:
        raise UsageError(
            f"recipe {experiment.recipe.name!r} finds its heads by a clean pass, and each revision would find others: "
            "name them with --heads, or run one revision at a time"
        )


def _require_alike(experiments: Mapping[str, Experiment], label: str) -> None:
    """UsageError where a checkpoint is no checkpoint of the same model as the first."""
    name, first = next(iter(experiments.items()))
    other = experiments[label]
    before, now = vars(first.description.structure), vars(other.description.structure)
    differing = [f"{n} {before[n]} there, {now[n]} here" for n in before if before[n] != now[n]]
    if tokenizer_hash(first.tokenizer) != tokenizer_hash(other.tokenizer):
        differing.append("its tokenizer is another")
    elif first.prompts.sha256 != other.prompts.sha256:
        differing.append("its prompts are others")
    if differing:
        raise UsageError(
            f"revision {label!r} is of another model than {name!r} ({'; '.join(differing)[:300]}): all revisions of "
            "a store are one model's; run it by itself"
        )
