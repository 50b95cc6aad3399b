"""The public names and where each is. `__init__.py` reads this file: a name that is imported here is public."""

from selfrepair_nn import analysis as analysis
from selfrepair_nn.analysis import (
    backups,
    by_case,
    by_head,
    by_kind,
    by_layer,
    by_variant,
    changes_in_context,
    compare_paper,
    contrast_by_head,
    differences,
    does_task,
    erasure_neurons,
    frequent_words,
    in_nats,
    induction_by_head,
    most_repaired,
    name_movers,
    neuron_changes,
    neuron_consistency,
    neuron_sparsity,
    norm_by_head,
    only,
    outcomes_by_head,
    reinforcement_by_head,
    reinforcement_nulls,
    scale_by_head,
    strongest_repairs,
    strongest_responses,
    token_noise,
    token_variants,
    top_share,
    who_repairs,
    words_in_context,
)
from selfrepair_nn.case_sites import sites_of
from selfrepair_nn.choosing import choose_tokens
from selfrepair_nn.components import (
    Attention,
    FinalNorm,
    Head,
    Layers,
    Mixers,
    Mlp,
    Neuron,
    Norm,
    PostNorms,
    Routing,
    Swap,
    chosen_heads,
    late_heads,
    select_heads,
    site,
)
from selfrepair_nn.drawing import figure
from selfrepair_nn.errors import SelfRepairError, UsageError
from selfrepair_nn.estimating.preview import preview
from selfrepair_nn.explorer import view
from selfrepair_nn.figures import plot
from selfrepair_nn.graph import Graph, Variants, sweep
from selfrepair_nn.integrity import verify
from selfrepair_nn.models.load import check, load
from selfrepair_nn.models.model import wrap
from selfrepair_nn.models.words import write_words
from selfrepair_nn.options import Options
from selfrepair_nn.prompts import Prompts, text_prompts
from selfrepair_nn.recipe import recipes as list_recipes
from selfrepair_nn.replacements import (
    Constant,
    OtherHead,
    Reinforce,
    ReinforcePartner,
    ReinforceRandom,
    Scale,
)
from selfrepair_nn.report import report as write_report
from selfrepair_nn.running.run import run
from selfrepair_nn.simulate import simulate_heads
from selfrepair_nn.store import open_store
from selfrepair_nn.tasks import (
    edited_prompts,
    ioi_prompts,
    repeated_prompts,
)
from selfrepair_nn.text import summary

__version__: str

__all__ = [
    "Attention",
    "Constant",
    "FinalNorm",
    "Graph",
    "Head",
    "Layers",
    "Mixers",
    "Mlp",
    "Neuron",
    "Norm",
    "Options",
    "OtherHead",
    "PostNorms",
    "Prompts",
    "Reinforce",
    "ReinforcePartner",
    "ReinforceRandom",
    "Routing",
    "Scale",
    "SelfRepairError",
    "Swap",
    "UsageError",
    "Variants",
    "backups",
    "by_case",
    "by_head",
    "by_kind",
    "by_layer",
    "by_variant",
    "changes_in_context",
    "check",
    "choose_tokens",
    "chosen_heads",
    "compare_paper",
    "contrast_by_head",
    "differences",
    "does_task",
    "edited_prompts",
    "erasure_neurons",
    "figure",
    "frequent_words",
    "in_nats",
    "induction_by_head",
    "ioi_prompts",
    "late_heads",
    "list_recipes",
    "load",
    "most_repaired",
    "name_movers",
    "neuron_changes",
    "neuron_consistency",
    "neuron_sparsity",
    "norm_by_head",
    "only",
    "open_store",
    "outcomes_by_head",
    "plot",
    "preview",
    "reinforcement_by_head",
    "reinforcement_nulls",
    "repeated_prompts",
    "run",
    "scale_by_head",
    "select_heads",
    "simulate_heads",
    "site",
    "sites_of",
    "strongest_repairs",
    "strongest_responses",
    "summary",
    "sweep",
    "text_prompts",
    "token_noise",
    "token_variants",
    "top_share",
    "verify",
    "view",
    "who_repairs",
    "words_in_context",
    "wrap",
    "write_report",
    "write_words",
]
