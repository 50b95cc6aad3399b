"""How many tokens go into a pass, how many prompts into a unit, and how many threads compute: what fits a machine."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

from selfrepair_nn.layout.plan import Work
from selfrepair_nn.models.architectures import Structure

TOKENS_PER_PASS = 2304
"""Where products no longer gain from being larger, on a processor."""
SERVED_TOKENS = 16384
"""In a pass on a server, whose memory is not known: a job that finds it too little goes on with smaller passes."""
A_JOB = {"tokens": 2**12, "head-tokens": 2**20, "bytes": 2**24}
"""What one job on a server is at most asked for: minutes of the hour that it has, and an answer that comes at once."""
LEAST = 600
"""Below this, what every pass costs beside its products shows."""
SHARE_OF_MEMORY = {"cpu": 1 / 8, "cuda": 1 / 2}
MOST = {"cpu": TOKENS_PER_PASS, "cuda": 65536}
GAIN = 1.1
"""More threads are taken if they make a product this much faster: they are missing elsewhere."""


def tokens_for(structure: Structure, itemsize: int, length: int, memory: int, kind: str) -> int:
    """Tokens in a pass that fit a share of the free `memory` in bytes, on a device of this kind: "cpu" or "cuda"."""
    wanted = int(memory * SHARE_OF_MEMORY[kind] / bytes_for_token(structure, itemsize, length))
    return max(LEAST, length, min(MOST[kind], wanted))


def bytes_for_token(structure: Structure, itemsize: int, length: int) -> int:
    """Memory that a pass holds at its widest for each of its tokens: one layer, and what is read of all of them.

    Residual streams before and after, norms, queries, keys, values and z; the MLP's hidden layer with its gate and
    activation; attention scores with their softmax; every head's change of every layer, in float32.
    """
    s = structure
    one_layer = 12 * s.d_model + 4 * s.d_mlp + 2 * s.n_heads * length
    return one_layer * itemsize + 4 * s.n_layers * (s.n_heads + 1)


def block_for(work: Work, tokens: int, memory: int, itemsize: int, stored: int) -> int:
    """Prompts in a unit: as many as let the cases that begin in one layer fill a pass of so many `tokens`.

    What is kept of them, clean and measured, takes at most a quarter of the free `memory` in bytes; `stored` are the
    bytes that the store keeps of each token. All units are about as large.
    """
    most = max(Counter(min(site.layer for site in case) for case in work.graph.ablate).values())
    kept = clean_bytes_for_token(work.structure, itemsize) + 2 * stored
    fitting = max(1, min(tokens // most, memory // 4 // kept) // work.length)
    return ceil(work.prompts / ceil(work.prompts / fitting))


def served_block(work: Work, stored: int) -> int:
    """Prompts in a job on a server: as many as a job may be asked for, but no fewer than a unit has elsewhere."""
    cases = max(len(graph.ablate) for graph in work.graphs)
    tokens = min(A_JOB["tokens"], A_JOB["head-tokens"] // cases, A_JOB["bytes"] // max(1, stored))
    return min(work.prompts, max(work.block, tokens // work.length))


def clean_bytes_for_token(structure: Structure, itemsize: int) -> int:
    """Memory that a unit keeps for each of its tokens, of every layer, at most.

    z of the tokens and of their replacement, what the MLP and the attention give and the stream between; and, in
    float32, the target's direction pulled back to z.
    """
    s = structure
    return s.n_layers * (s.n_heads * s.d_head * (2 * itemsize + 4) + 3 * s.d_model * itemsize)


def free_memory(device: str) -> int:
    """Bytes that are free on a device, or in this machine's memory."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def fitting_tokens(model: Any, length: int, processes: int = 1) -> int:
    """Tokens in a pass of a loaded model, for prompts of this length, in each of several processes."""
    import torch

    kind = "cuda" if model.device.startswith("cuda") else "cpu"
    itemsize = getattr(torch, model.dtype).itemsize
    memory = min(map(free_memory, model.devices))
    return tokens_for(model.structure, itemsize, length, memory // processes, kind)


def fitting_block(model: Any, work: Work, stored: int, processes: int = 1) -> int:
    """Prompts in a unit of a loaded model, in each of several processes: on a GPU so many that its passes are full."""
    import torch

    if not model.device.startswith("cuda"):
        return work.block
    memory = min(map(free_memory, model.devices)) // processes
    tokens = fitting_tokens(model, work.length, processes)
    return block_for(work, tokens, memory, getattr(torch, model.dtype).itemsize, stored)


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """Within, torch computes with so many threads; None leaves it as it is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fitting_threads(structure: Structure, most: int) -> int:
    """The fewest threads, up to `most`, with which this model's largest product is nearly as fast as it gets here."""
    import torch

    left, right = torch.randn(LEAST, structure.d_model), torch.randn(structure.d_model, structure.d_mlp)
    seconds = {}
    for count in _candidates(most):
        with computing_with(count):
            seconds[count] = min(_seconds(left, right) for _ in range(5))
    return fewest(seconds)


def fewest(seconds: dict[int, float]) -> int:
    """Of numbers of threads in rising order, the last that gains enough over the one taken before it."""
    taken, *others = seconds
    for count in others:
        if seconds[count] * GAIN <= seconds[taken]:
            taken = count
    return taken


def _candidates(most: int) -> list[int]:
    powers = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
    return sorted({*powers, most})


def _seconds(left: Any, right: Any) -> float:
    began = time.perf_counter()
    _ = left @ right
    return time.perf_counter() - began
