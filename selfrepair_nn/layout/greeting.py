"""The first unit of work for a model: the smallest there is, which tells whose weights answer."""

import uuid
from typing import Any

from selfrepair_nn.layout.units import Unit
from selfrepair_nn.tracing.first_job import first_job

VECTORS, OF_A_MIXTURE = 4, 16
"""Known vectors, and how many where each goes to some experts only."""


def first_unit(layout: dict[str, Any]) -> Unit:
    """The smallest unit of work. Its name is new each time, so that an old answer is never taken for it."""
    import torch

    count = OF_A_MIXTURE if layout["routed"] else VECTORS
    tokens = ((2 * torch.arange(count) + 1) * layout["vocab_size"] // (2 * count))[None]
    layers, sums = layout["n_layers"], (count + 1,)
    shapes = dict.fromkeys(("mixing", "mlp"), (layers, *sums))
    shapes |= dict.fromkeys(("embedding", "final_norm"), sums) | {"unembedding": (3,)}
    shapes |= {"dtype": (1,), "weights": (1,), "told": (64,)}
    name = f"first job {uuid.uuid4().hex[:8]}"
    return Unit(name, first_job, slice(0, 1), {"model": layout}, lambda _: {"tokens": tokens}, shapes)
