"""How large a pass may be: as many tokens as were asked for, until memory shows that it is more or less."""

import torch

from selfrepair_nn.tracing.objects import Bundle

FULL = 0.85
"""How much of a GPU's memory passes may fill, where it is measured what they take: pieces of it lie idle between."""


CLOSE = 1.125
"""So much larger a pass is worth being tried, though it may not fit."""


class Room(Bundle):
    """How many tokens a pass may have. `most` is what more than that never pays; `measured` whether it is known.

    `fitted` is the largest pass that was computed, `failed` the smallest that was too large, if any since; `refused`
    says how many were.
    """

    tokens: int
    most: int = 0
    fitted: int = 0
    failed: int = 0
    measured: bool = False
    refused: int = 0

    def fits(self, tokens):
        """A pass of so many was computed: after one that was not, half way to that, as long as it is far."""
        self.fitted = max(self.fitted, tokens)
        if self.failed:
            middle = (self.fitted + self.failed) // 2
            self.tokens = middle if middle > CLOSE * self.fitted else self.fitted

    def too_small(self, tokens):
        """A pass of so many did not fit: half way to the largest that did, or half of it."""
        if self.fitted >= tokens:  # something else has taken the memory since
            self.fitted = 0
        self.failed, self.refused = tokens, self.refused + 1
        self.tokens = (self.fitted + tokens) // 2

    @property
    def known(self):
        """How many tokens a pass is known to have room for, or is asked to have."""
        return self.fitted if self.failed and self.fitted else self.tokens

    def measure(self, tokens, used, free):
        """A pass of so many tokens took `used` bytes, of `free` that there were: a large one tells it for all."""
        if self.most and not self.measured and 2 * tokens > self.tokens:
            wanted = int(FULL * free / used * tokens)
            self.tokens, self.measured = max(1, min(self.most, wanted)), True


class Watch:
    """Within, what a GPU's memory holds at most beyond what it held before: `used` bytes, of `free`; else None."""

    def __init__(self, device):
        self.device = device
        self.used = self.free = None

    def __enter__(self):
        if self.device is not None:
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, kind, error, trace):
        if self.device is not None and kind is None:
            self.used = torch.cuda.max_memory_allocated(self.device) - self._before
            idle = torch.cuda.memory_reserved(self.device) - self._before
            self.free = torch.cuda.mem_get_info(self.device)[0] + idle


def out_of_memory(error):
    """Whether an error says that a device's memory, or the machine's, is exhausted."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(said in str(error) for said in ("can't allocate memory", "CUDA out of memory"))
