"""From a store to numbers: pure functions of a dataset, alike for a finished run and for a partly done one.

Only what is marked `done` counts. All means are taken in float64. A store may be larger than memory.
"""

from selfrepair_nn.analysis.contrast import contrast_by_head
from selfrepair_nn.analysis.induction import KINDS, LEAST, by_kind, induction_by_head
from selfrepair_nn.analysis.ioi import backups, name_movers
from selfrepair_nn.analysis.neurons import (
    erasure_neurons,
    neuron_changes,
    neuron_consistency,
    neuron_sparsity,
)
from selfrepair_nn.analysis.noise import FATES, token_noise
from selfrepair_nn.analysis.norm import norm_by_head
from selfrepair_nn.analysis.reference import QUANTITIES, compare_paper, references
from selfrepair_nn.analysis.repairers import strongest_repairs, who_repairs
from selfrepair_nn.analysis.summaries import (
    HEADS,
    MEANS,
    SHARE,
    by_head,
    by_layer,
    done_share,
    most_repaired,
    only,
    percent,
    top_share,
)

__all__ = [
    "FATES",
    "HEADS",
    "KINDS",
    "LEAST",
    "MEANS",
    "QUANTITIES",
    "SHARE",
    "backups",
    "by_head",
    "by_kind",
    "by_layer",
    "compare_paper",
    "contrast_by_head",
    "done_share",
    "erasure_neurons",
    "induction_by_head",
    "most_repaired",
    "name_movers",
    "neuron_changes",
    "neuron_consistency",
    "neuron_sparsity",
    "norm_by_head",
    "only",
    "percent",
    "references",
    "strongest_repairs",
    "token_noise",
    "top_share",
    "who_repairs",
]
