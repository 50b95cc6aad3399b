"""What a run would do and cost, before any weight is loaded or anything is written."""

from typing import Any

from selfrepair_nn.execution.experiment import Experiment, prepare
from selfrepair_nn.options import Options

LARGE = {"flops": 1e17, "units": 1000, "store_bytes": 10 * 2**30}
"""Beyond any of these a remote run is large: about ten minutes of one accelerator, a thousand jobs, 10 GiB."""


def preview(recipe: str = "heads", **choices: Any) -> dict[str, Any]:
    """The plan of a run: store, model, prompts, ablated heads, units, passes, tokens, flops and store_bytes.

    Takes what `run` takes and raises what it raises, but loads no weights and writes nothing.
    """
    return preview_of(prepare(recipe, Options(**choices)))


def preview_of(experiment: Experiment) -> dict[str, Any]:
    """The plan of an experiment that is prepared already; see `preview`."""
    structure, prompts = experiment.description.structure, experiment.prompts
    return {
        "store": str(experiment.path),
        "model": f"{experiment.description.source.name} ({structure.n_layers} layers x {structure.n_heads} heads)",
        "prompts": f"{prompts.n} of {prompts.length} tokens from {prompts.source['name']}",
        "heads": f"{_count(experiment)}, {experiment.options.ablation} ablation",
        "block": experiment.work.block,
    } | experiment.work.cost(experiment.precision)


def large(found: dict[str, Any]) -> bool:
    """Whether a plan is one that a server's owner would want to be asked about."""
    return any(found[name] > limit for name, limit in LARGE.items())


def _count(experiment: Experiment) -> str:
    number = len(experiment.heads)
    return f"the {experiment.graph.loudest} loudest of {number}" if experiment.undecided else str(number)


def preview_text(found: dict[str, Any]) -> str:
    """The same for a person, one line each."""
    lines = {
        "store": found["store"],
        "model": found["model"],
        "prompts": found["prompts"],
        "heads": found["heads"],
        "units": f"{found['units']} of {found['block']} prompts",
        "ablated passes": f"{found['passes']:,}",
        "tokens": f"{found['tokens']:,} clean, {found['ablated_tokens']:,} ablated",
        "arithmetic": f"{found['flops'] / 1e12:,.3g} TFLOP",
        "store size": f"{found['store_bytes'] / 2**20:,.1f} MiB before compression",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
