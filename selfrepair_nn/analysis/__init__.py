"""From a store to numbers: pure functions of a dataset, alike for a finished run and for a partly done one.

Only what is marked `done` counts. All means are taken in float64. A store may be larger than memory.
"""

from selfrepair_nn.analysis.checks import HEADS, MEANS, among, percent, restored, throughout
from selfrepair_nn.analysis.components import variance_components
from selfrepair_nn.analysis.composition import composition
from selfrepair_nn.analysis.contrast import contrast_by_head
from selfrepair_nn.analysis.edges import CONCENTRATED, SOFTMAXES, edges_by_head
from selfrepair_nn.analysis.hydra import hydra
from selfrepair_nn.analysis.induction import KINDS, LEAST, by_kind, induction_by_head
from selfrepair_nn.analysis.interactions import clamped, interactions
from selfrepair_nn.analysis.ioi import backups, name_movers
from selfrepair_nn.analysis.layers import by_layer, most_repaired
from selfrepair_nn.analysis.masking import AMPLIFIED, MASKED, PLAIN, SMALL, UNKNOWN, masking
from selfrepair_nn.analysis.neurons import (
    erasure_neurons,
    neuron_changes,
    neuron_consistency,
    neuron_sparsity,
)
from selfrepair_nn.analysis.noise import FATES, token_noise
from selfrepair_nn.analysis.norm import norm_by_head
from selfrepair_nn.analysis.optimal import OPTIMAL, optimal_by_head
from selfrepair_nn.analysis.outcomes import in_nats, outcomes_by_head
from selfrepair_nn.analysis.reference import QUANTITIES, compare_paper, references
from selfrepair_nn.analysis.reinforcement import (
    CONFIDENCE,
    reinforced,
    reinforcement_by_head,
    strongest_responses,
)
from selfrepair_nn.analysis.reinforcement_nulls import OWN, has_nulls, reinforcement_nulls
from selfrepair_nn.analysis.remembering import held, remembering
from selfrepair_nn.analysis.repairers import strongest_repairs, who_repairs
from selfrepair_nn.analysis.scales import scale_by_head, token_variants
from selfrepair_nn.analysis.selecting import done_share, every_token, only, top_share
from selfrepair_nn.analysis.stages import STAGES, by_stage, stages_of
from selfrepair_nn.analysis.summaries import by_case, by_head
from selfrepair_nn.analysis.taking_over import KNOWN_BACKUPS, backup_roc, conditional_effects
from selfrepair_nn.analysis.task import does_task
from selfrepair_nn.analysis.tokens import HALF_WIDTH
from selfrepair_nn.analysis.variants import axis_of, by_variant, differences
from selfrepair_nn.analysis.words import changes_in_context, frequent_words, word_texts, words_in_context
from selfrepair_nn.quantities import SHARE

__all__ = [
    "AMPLIFIED",
    "CONCENTRATED",
    "CONFIDENCE",
    "FATES",
    "HALF_WIDTH",
    "HEADS",
    "KINDS",
    "KNOWN_BACKUPS",
    "LEAST",
    "MASKED",
    "MEANS",
    "OPTIMAL",
    "OWN",
    "PLAIN",
    "QUANTITIES",
    "SHARE",
    "SMALL",
    "SOFTMAXES",
    "STAGES",
    "UNKNOWN",
    "among",
    "axis_of",
    "backup_roc",
    "backups",
    "by_case",
    "by_head",
    "by_kind",
    "by_layer",
    "by_stage",
    "by_variant",
    "changes_in_context",
    "clamped",
    "compare_paper",
    "composition",
    "conditional_effects",
    "contrast_by_head",
    "differences",
    "does_task",
    "done_share",
    "edges_by_head",
    "erasure_neurons",
    "every_token",
    "frequent_words",
    "has_nulls",
    "held",
    "hydra",
    "in_nats",
    "induction_by_head",
    "interactions",
    "masking",
    "most_repaired",
    "name_movers",
    "neuron_changes",
    "neuron_consistency",
    "neuron_sparsity",
    "norm_by_head",
    "only",
    "optimal_by_head",
    "outcomes_by_head",
    "percent",
    "references",
    "reinforced",
    "reinforcement_by_head",
    "reinforcement_nulls",
    "remembering",
    "restored",
    "scale_by_head",
    "stages_of",
    "strongest_repairs",
    "strongest_responses",
    "throughout",
    "token_noise",
    "token_variants",
    "top_share",
    "variance_components",
    "who_repairs",
    "word_texts",
    "words_in_context",
]
