"""What no server can do, or this machine cannot hold: refused beforehand, with the choice that would work."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from shutil import disk_usage
from typing import Any

from selfrepair_nn.errors import UsageError
from selfrepair_nn.estimating.fitting import Jobs, duration
from selfrepair_nn.layout.experiment import Experiment, prepare
from selfrepair_nn.layout.packing import free_memory
from selfrepair_nn.models.model import AS_SERVED, Model
from selfrepair_nn.options import flag
from selfrepair_nn.recipe import recipe_paths

SHARE_OF_MEMORY = 1 / 2
"""What the results of one prompt may take of the free memory: its parts lie beside the whole."""

COMPRESSED = 1 / 2
"""The least part of its numbers' bytes that a store takes on the disk; blanks take nothing."""

LENGTHS = 64, 32, 16
"""Of shorter prompts that are tried where nothing else helps."""


def require_workable(jobs: Jobs, here: "Here | None" = None) -> None:
    """Refuse what no server with these limits can do, or what does not fit `here`: this machine, if it is not given.

    Raises:
        UsageError: naming what is too much, and the first of the `choices` with which it works.
    """
    here = here or Here.found(jobs.experiment)
    if found := amiss(jobs, here):
        less = remedy(jobs, here) or f"nor does it with less: choose a smaller model, or {found.more}"
        raise UsageError(f"this cannot work: {found.why}; {less}")


@dataclass(frozen=True)
class Here:
    """Bytes that are free on this machine: in memory, and where the store will be."""

    memory: int
    disk: int

    @classmethod
    def found(cls, experiment: Experiment) -> "Here":
        folder = experiment.path.absolute()
        while not folder.exists():
            folder = folder.parent
        return cls(free_memory("cpu"), disk_usage(folder).free)


@dataclass(frozen=True)
class Amiss:
    """Why something cannot work, and where there would be more of what it lacks."""

    why: str
    more: str


def amiss(jobs: Jobs, here: Here) -> Amiss | None:
    """Why even the smallest jobs cannot work, or their results cannot be kept, or None."""
    if jobs.bytes_of_prompt > SHARE_OF_MEMORY * here.memory:
        return Amiss(
            f"results of one prompt take {_size(jobs.bytes_of_prompt)} of memory here, beside a copy, where "
            f"{_size(here.memory)} are free",
            "run this where more memory is free",
        )
    if (stored := COMPRESSED * kept_bytes(jobs.experiment)) > here.disk:
        where = "another --out, where more is free, or fewer prompts (--tokens)"
        return Amiss(f"the store takes {_size(stored)}, where {_size(here.disk)} are free", where)
    cost = jobs.cost(jobs.smallest)
    if (least := jobs.pace.seconds(cost)[0]) <= jobs.limits.seconds:
        return None
    crossed = f" ({cost.crossing / 1e9:,.0f} GB cross into its sandbox)" if jobs.pace.fast.byte else ""
    takes, ended = _told_apart(least, jobs.limits.seconds)
    return Amiss(
        f"a job of one prompt and one ablation takes {takes} at least{crossed}, and the server ends it after {ended}",
        "a server that gives a job longer (--job-seconds says how long)",
    )


def _told_apart(more: float, less: float) -> tuple[str, str]:
    """Two times in words: in as many digits as tell them apart."""
    said = [(duration(more, digits), duration(less, digits)) for digits in range(4)]
    return next((pair for pair in said if pair[0] != pair[1]), (f"hardly more than {said[0][1]}", said[0][1]))


def kept_bytes(experiment: Experiment) -> float:
    """What a store holds that is no blank, before compression: of what is only kept of top tokens their share."""
    few, found = experiment.selective, 0.0
    for each in experiment.quantities:
        size = experiment.work.store_bytes([each], experiment.precision)
        top = (few and each.ablated) or (experiment.shared and each.large)
        found += size * (experiment.share if top else 1)
    return found


def remedy(jobs: Jobs, here: Here) -> str | None:
    """The first of the `choices` with which it works, in words; None if it does with none."""
    experiment = jobs.experiment
    described = Model(experiment.description, None, experiment.tokenizer, AS_SERVED, "server")
    options = replace(experiment.options, model=described, revision=None)
    for changed in choices(experiment):
        try:
            other = prepare(_name(experiment), replace(options, **changed))
        except UsageError:
            continue  # the recipe does not take that choice
        if amiss(replace(jobs, experiment=other), here) is None:
            return "it does with " + " ".join(f"{flag(name)} {value}" for name, value in changed.items())
    return None


def choices(experiment: Experiment) -> Iterator[dict[str, Any]]:
    """Options that ask less of a server and of this machine, from the least that is lost on."""
    o, lighter = experiment.options, dict[str, Any]()
    if o.components == "all":
        yield {"components": "top"}
    if o.components != "none":
        lighter["components"] = "none"
        yield {**lighter}
    if o.split != "total":
        lighter["split"] = "total"
        yield {**lighter}
    if o.selects == "all":
        yield {"select": "top-share"}
    for layers in _fewer(experiment.layers):
        yield from ({**kept, "layers": layers} for kept in ([{}, lighter] if lighter else [{}]))
    yield from ({**lighter, "length": length} for length in LENGTHS if length < experiment.prompts.length)


def _fewer(layers: list[int]) -> Iterator[str]:
    """The later half of the layers, of these again, … the last one."""
    while len(layers) > 1:
        layers = layers[len(layers) // 2 :]
        whole = layers == [*range(layers[0], layers[-1] + 1)]
        yield f"{layers[0]}:{layers[-1] + 1}" if whole else ",".join(map(str, layers))


def _name(experiment: Experiment) -> str:
    path = experiment.recipe.path
    return experiment.recipe.name if path in recipe_paths().values() else str(path)


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
