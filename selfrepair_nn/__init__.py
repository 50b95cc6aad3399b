"""If a part of a language model is ablated: what is lost, who makes up for it, and how.

import selfrepair_nn as sr

dataset = sr.run("heads", model="tiny-neox")       # or any supported Hugging Face model
print(sr.summary(dataset))
sr.plot(dataset, "outputs/figures")
"""

from importlib import import_module
from typing import Any

_PLACES = {
    "run": "running.run:run",
    "preview": "estimating.preview:preview",
    "load": "models.load:load",
    "wrap": "models.model:wrap",
    "check": "models.check:check",
    "open_store": "store:open_store",
    "verify": "integrity:verify",
    "Graph": "graph:Graph",
    "Variants": "graph:Variants",
    "Scale": "graph:Scale",
    "Constant": "graph:Constant",
    "OtherHead": "graph:OtherHead",
    "Reinforce": "graph:Reinforce",
    "sweep": "graph:sweep",
    "Head": "components:Head",
    "Attention": "components:Attention",
    "Mlp": "components:Mlp",
    "Neuron": "components:Neuron",
    "Layers": "components:Layers",
    "Swap": "components:Swap",
    "Norm": "components:Norm",
    "FinalNorm": "components:FinalNorm",
    "site": "components:site",
    "Prompts": "prompts:Prompts",
    "text_prompts": "prompts:text_prompts",
    "ioi_prompts": "tasks:ioi_prompts",
    "repeated_prompts": "tasks:repeated_prompts",
    "edited_prompts": "tasks:edited_prompts",
    "select_heads": "components:select_heads",
    "Options": "options:Options",
    "list_recipes": "recipe:recipes",
    "top_share": "analysis:top_share",
    "by_head": "analysis:by_head",
    "by_layer": "analysis:by_layer",
    "by_case": "analysis:by_case",
    "by_variant": "analysis:by_variant",
    "differences": "analysis:differences",
    "scale_by_head": "analysis:scale_by_head",
    "token_variants": "analysis:token_variants",
    "reinforcement_by_head": "analysis:reinforcement_by_head",
    "strongest_responses": "analysis:strongest_responses",
    "most_repaired": "analysis:most_repaired",
    "only": "analysis:only",
    "token_noise": "analysis:token_noise",
    "erasure_neurons": "analysis:erasure_neurons",
    "neuron_sparsity": "analysis:neuron_sparsity",
    "neuron_changes": "analysis:neuron_changes",
    "neuron_consistency": "analysis:neuron_consistency",
    "norm_by_head": "analysis:norm_by_head",
    "who_repairs": "analysis:who_repairs",
    "strongest_repairs": "analysis:strongest_repairs",
    "induction_by_head": "analysis:induction_by_head",
    "by_kind": "analysis:by_kind",
    "name_movers": "analysis:name_movers",
    "backups": "analysis:backups",
    "contrast_by_head": "analysis:contrast_by_head",
    "does_task": "analysis:does_task",
    "compare_paper": "analysis:compare_paper",
    "summary": "text:summary",
    "plot": "figures:plot",
    "write_report": "report:report",
    "simulate_heads": "simulate:simulate_heads",
    "SelfRepairError": "errors:SelfRepairError",
    "UsageError": "errors:UsageError",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    """Public names load their room when they are first used: importing the package stays fast."""
    if name == "__version__":
        return _version()
    if name not in _PLACES:
        raise AttributeError(f"selfrepair_nn has no {name!r}; it offers {', '.join(__all__)}")
    from selfrepair_nn.face import guarded

    room, _, found = _PLACES[name].partition(":")
    made = getattr(import_module(f"selfrepair_nn.{room}"), found)
    globals()[name] = made if isinstance(made, type) else guarded(made)
    return globals()[name]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("selfrepair_nn")
    except PackageNotFoundError:
        return "0"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
