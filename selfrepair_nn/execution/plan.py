"""A graph over prompts, cut into units of work; and what they will cost before anything runs."""

from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

from selfrepair_nn.components import Component, components
from selfrepair_nn.graph import Graph, writes_attention_bias
from selfrepair_nn.models.architectures import Structure
from selfrepair_nn.variables import SWEPT

BLOCK_TOKENS = 512


@dataclass(frozen=True)
class Work:
    """The units of a run: every case of the graph on each block of prompts.

    `rows` is the number of tokens in one forward pass, `block` the number of prompts in a unit.
    """

    graph: Graph
    structure: Structure
    prompts: int
    length: int
    block: int
    rows: int

    @property
    def units(self) -> list[slice]:
        """The prompts of each unit, in order."""
        return [slice(i, min(i + self.block, self.prompts)) for i in range(0, self.prompts, self.block)]

    @property
    def case_tokens(self) -> int:
        """Ablated head x token pairs: what a run's progress is counted in."""
        return len(self.graph.ablate) * self.prompts * self.length

    @property
    def components(self) -> list[Component]:
        """The terms of the model's residual stream, in the order of the store."""
        bias = writes_attention_bias(asdict(self.structure), self.graph.value_bias)
        s = self.structure
        return components(s.n_layers, s.n_heads, s.position_embedding, bias)

    def cost(self, precision: str) -> dict[str, float]:
        """What the run will take, for a store of this floating-point type.

        Returns units, passes (ablated), tokens (in clean passes), ablated_tokens (in ablated ones), flops,
        store_bytes (before compression). A token costs two operations for each parameter of the layers it runs
        through; an ablated pass runs through the layers from its own on.
        """
        s, tokens, cases = self.structure, self.prompts * self.length, len(self.graph.ablate)
        starts = Counter(min(case).layer for case in self.graph.ablate)
        per_pass = max(1, self.rows // (self.block * self.length))
        clean_passes = 2 if self.graph.replacement == "resample" else 1
        depth = sum(count * (s.n_layers - layer - s.parallel) for layer, count in starts.items())
        values = len(SWEPT) * cases + (
            len(self.components) * (cases + 1) if self.graph.record == "full" else 0
        )
        return {
            "units": len(self.units),
            "passes": len(self.units) * sum(-(-count // per_pass) for count in starts.values()),
            "tokens": clean_passes * tokens,
            "ablated_tokens": cases * tokens,
            "flops": 2 * s.layer_parameters * tokens * (clean_passes + depth / s.n_layers),
            "store_bytes": values * self.prompts * (self.length - 1) * np.dtype(precision).itemsize,
        }


def default_block(length: int) -> int:
    """Prompts in a unit: about 512 tokens, enough to fill the matrix products, small enough to lose."""
    return max(1, BLOCK_TOKENS // length)
