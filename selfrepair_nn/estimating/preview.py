"""What a run would do and cost, before any weight is loaded or anything is written."""

import os
from typing import Any, Unpack

from selfrepair_nn.given import Given
from selfrepair_nn.layout.experiment import Experiment, prepare
from selfrepair_nn.layout.revisions import Revisions, prepare_each
from selfrepair_nn.options import Options, require_known

LARGE = {"flops": 1e17, "units": 1000, "store_bytes": 10 * 2**30}
"""Beyond any of these a remote run is large: about ten minutes of one accelerator, a thousand jobs, 10 GiB."""


SUMMED = (
    *("units", "passes", "tokens", "ablated_tokens", "flops", "store_bytes"),
    *("request_bytes", "result_bytes", "crossing_bytes", "total_crossing_bytes"),
)
"""What several revisions take so many times."""


def preview(
    recipe: str | os.PathLike[str] = "heads", *, calibrate: bool = False, **choices: Unpack[Given]
) -> dict[str, Any]:
    """The plan of a run: store, model, prompts, ablated, units, passes, tokens, flops and store_bytes.

    `less` says that this is the most it can be: with `select` or `until_ci` the run will find out how much it needs.

    A remote one also has request_bytes, result_bytes, crossing_bytes (if it is sandboxed) and total_crossing_bytes (the
    same with split="total"). `calibrate` runs two small jobs where the run would and adds the estimated hours; only for
    that are weights loaded or anything sent.

    Takes what `run` takes and raises what it raises, and writes nothing.
    """
    require_known(choices, ("recipe", "calibrate"))
    options = Options(**choices)
    every = prepare_each(recipe, options) if options.revisions else None
    experiment = every.first if every else prepare(recipe, options)
    if every and not calibrate:
        return of_each(every)
    if not calibrate:
        return preview_of(experiment)
    from selfrepair_nn.estimating.calibration import hours, trial

    times = len(every.experiments) if every else 1
    with trial(experiment) as runner:
        return (of_each(every) if every else preview_of(experiment)) | {"hours": times * hours(experiment, runner)}


def of_each(every: Revisions) -> dict[str, Any]:
    """The plan of a run of several revisions: what each takes, so many times."""
    one, times = preview_of(every.first), len(every.experiments)
    summed = {name: times * one[name] for name in SUMMED if name in one}
    model = f"{every.request.model} ({one['model'].rpartition(' (')[2]}"
    return one | summed | {"store": str(every.path), "model": model, "revisions": [*every.experiments]}


def preview_of(experiment: Experiment) -> dict[str, Any]:
    """The plan of an experiment that is prepared already; see `preview`."""
    structure, prompts = experiment.description.structure, experiment.prompts
    cost = experiment.work.cost()
    cost["flops"] += 2 * structure.d_model * structure.vocab_size * experiment.unembedded
    moved: dict[str, int] = {}
    if experiment.options.served:
        from selfrepair_nn.estimating.traffic import traffic

        moved = traffic(experiment)
    return {
        "store": str(experiment.path),
        "model": f"{experiment.description.source.name} ({structure.n_layers} layers x {structure.n_heads} heads)",
        "prompts": f"{prompts.described} from {prompts.source['name']}",
        "ablated": f"{_count(experiment)}, {experiment.ablation} ablation",
        "block": experiment.work.block,
        "less": experiment.ranked,
        **cost,
        "store_bytes": experiment.work.store_bytes(experiment.quantities, experiment.precision),
        **moved,
    }


def large(found: dict[str, Any]) -> bool:
    """Whether a plan is one that a server's owner would want to be asked about."""
    return any(found[name] > limit for name, limit in LARGE.items())


def _count(experiment: Experiment) -> str:
    number = len(experiment.graph.ablate)
    return f"the {experiment.graph.strongest} strongest of {number}" if experiment.undecided else str(number)


def preview_text(found: dict[str, Any]) -> str:
    """The same for a person, one line each."""
    most = "at most " if found["less"] else ""
    lines = {
        "store": found["store"],
        "model": found["model"],
        **({"revisions": ", ".join(found["revisions"])} if "revisions" in found else {}),
        "prompts": found["prompts"],
        "ablated": found["ablated"],
        "units": f"{found['units']} of {found['block']} prompts",
        "ablated passes": f"{most}{found['passes']:,}",
        "tokens": f"{found['tokens']:,} clean, {most}{found['ablated_tokens']:,} ablated",
        "arithmetic": f"{most}{found['flops'] / 1e12:,.3g} TFLOP",
        "store size": f"{_size(found['store_bytes'])} before compression",
    }
    if "request_bytes" in found:
        lines["requests"] = f"{_size(found['request_bytes'])} go to the server"
        lines["results"] = f"{_size(found['result_bytes'])} come back, before compression"
        lines["crossings"] = (
            f"about {_size(found['crossing_bytes'])} within the server, if it is a shared one"
        )
        if "total_crossing_bytes" in found:
            less = _size(found["total_crossing_bytes"])
            lines["crossings"] += f"; {less} with --split total, which is enough for layer trends"
    if "hours" in found:
        lines["time"] = f"about {_time(found['hours'])}, as measured on two small jobs"
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _size(count: float) -> str:
    unit = "MiB" if count < 2**30 else "GiB"
    return f"{count / (2**20 if unit == 'MiB' else 2**30):,.1f} {unit}"


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.0f} minutes" if hours >= 1 / 60 else f"{hours * 3600:.0f} seconds"
