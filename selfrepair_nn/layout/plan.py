"""A graph over prompts, cut into units of work; and what they will cost before anything runs."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any, cast

import numpy as np

from selfrepair_nn.components import Component, Head, components
from selfrepair_nn.graph import Graph, writes_attention_bias
from selfrepair_nn.models.architectures import Structure
from selfrepair_nn.quantities import MOVERS, RANKS, Quantity

BLOCK_TOKENS = 512


@dataclass(frozen=True)
class Work:
    """The units of a run: every case of the graph, in every variant, on each block of prompts.

    `variants` are the graphs by label, along `axis` where there are several. `tokens_per_pass` is the number of
    tokens in one forward pass, `block` the number of prompts in a unit. `resamples` is the number of partners of each
    prompt, of which the store keeps `moments` alone, or each. `ablated` are the positions of all prompts that are
    ablated, None for all there are.
    """

    axis: str | None
    variants: Mapping[Any, Graph]
    structure: Structure
    prompts: int
    length: int
    block: int
    tokens_per_pass: int
    resamples: int = 1
    moments: bool = False
    ablated: int | None = None

    @property
    def graphs(self) -> list[Graph]:
        return list(self.variants.values())

    @property
    def labels(self) -> list[Any]:
        return list(self.variants)

    @property
    def graph(self) -> Graph:
        """The first graph: what the variants share."""
        return self.graphs[0]

    @property
    def units(self) -> list[slice]:
        """The prompts of each unit, in order."""
        return [slice(i, min(i + self.block, self.prompts)) for i in range(0, self.prompts, self.block)]

    @property
    def case_tokens(self) -> int:
        """Ablated head x token pairs: what a run's progress is counted in."""
        return sum(map(self.runs, self.graphs)) * len(self.graph.ablate) * self.positions

    @property
    def positions(self) -> int:
        """The positions of all prompts on which a case is ablated: without filler, which only clean passes read."""
        return self.prompts * self.length if self.ablated is None else self.ablated

    def runs(self, graph: Graph) -> int:
        """How often a case of this graph runs on a prompt: with each of its partners, if it reads them."""
        return self.resamples if graph.replaced_by.reads_partner else 1

    @property
    def axes(self) -> tuple[str, ...]:
        """What the store's ablated runs lie along beside their sites."""
        partners = "resample" if self.resamples > 1 and not self.moments else None
        return tuple(filter(None, (self.axis, partners)))

    @cached_property
    def components(self) -> list[Component]:
        """The terms of the model's residual stream, in the order of the store."""
        bias = writes_attention_bias(asdict(self.structure), self.graph.value_bias)
        s = self.structure
        return components(s.n_layers, s.n_heads, s.position_embedding, bias, s.headless)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How long each dimension of the store is; where heads are yet to be found, how long it can be."""
        return self._sites | {
            "prompt": self.prompts,
            "position": self.length - 1,
            "component": len(self.components),
            "neuron": self.structure.d_mlp,
            "rank": min(RANKS, self.structure.d_mlp),
            "word": self.graph.words,
            "changed": min(MOVERS, len(self.components)),
            "vocabulary": self.structure.vocab_size,
            "choice": len(self.structure.routed) * self.structure.n_choices,
            "distance": len(self.graph.attention),
            "resample": self.resamples,
            **({self.axis: len(self.graphs)} if self.axis else {}),
        }

    @property
    def _sites(self) -> dict[str, int]:
        first = self._first
        if not first.heads_only:
            return {"case": len(first.ablate)}
        heads = cast(list[Head], [case[0] for case in self.graph.ablate])
        found = {"layer": len({h.layer for h in heads}), "head": len({h.head for h in heads})}
        return {d: min(size, len(first.ablate)) for d, size in found.items()}

    def dims(self, quantity: Quantity) -> tuple[str, ...]:
        """The dimensions of a quantity in this run's store."""
        return quantity.dims_in(self.graph.heads_only, *self.axes)

    def store_bytes(self, quantities: Iterable[Quantity], precision: str) -> int:
        """What quantities take in a store of this floating-point type, before compression."""
        sizes, count = self.sizes, 0
        for each in quantities:
            dims = each.dims_in("layer" in sizes, *self.axes)
            count += prod(sizes[d] for d in dims) * np.dtype(each.dtype(precision)).itemsize
        return count

    def cost(self) -> dict[str, float]:
        """What the run will take.

        Returns units, passes (ablated), tokens (in clean passes), ablated_tokens (in ablated ones), flops. A token
        costs two operations for each parameter of the layers it runs through; an ablated pass runs through the layers
        from its own on. Where a clean pass has yet to find the heads, this is the cost of the first ones: of others it
        is less.
        """
        s, tokens, ablated = self.structure, self.prompts * self.length, self._first.ablate
        cases = len(ablated)
        starts = Counter(min(site.layer for site in case) for case in ablated)
        per_pass = max(1, self.tokens_per_pass // (self.block * self.length))
        runs = sum(map(self.runs, self.graphs))
        clean_passes = sum(1 + graph.replaced_by.reads_text * self.runs(graph) for graph in self.graphs)
        depth = sum(count * (s.n_layers - layer - s.parallel) for layer, count in starts.items())
        return {
            "units": len(self.units),
            "passes": runs
            * len(self.units)
            * sum(-(-count // per_pass) for count in starts.values()),
            "tokens": clean_passes * tokens,
            "ablated_tokens": runs * cases * self.positions,
            "flops": 2
            * s.layer_parameters
            * (tokens * clean_passes + self.positions * runs * depth / s.n_layers),
        }

    @property
    def _first(self) -> Graph:
        """The graph; where heads are yet to be found, that of the first ones."""
        graph = self.graph
        if not graph.undecided:
            return graph
        first = [case[0] for case in graph.ablate[: graph.strongest]]
        return graph.of(cast(list[Head], first))


def default_block(length: int) -> int:
    """Prompts in a unit: about 512 tokens, enough to fill the matrix products, small enough to lose."""
    return max(1, BLOCK_TOKENS // length)
