"""How large a pass may be: as many tokens as were asked for, until memory shows that it is more or less."""

import torch

from selfrepair_nn.tracing.objects import Bundle

FULL = 0.85
"""How much of a GPU's memory passes may fill, where it is measured what they take: pieces of it lie idle between."""


CLOSE = 1.125
"""So much larger a pass is worth being tried, though it may not fit."""


class Room(Bundle):
    """How many tokens a pass may have.

    `fitted` is the largest pass that was computed, `failed` the smallest that was too large, if any since; `refused`
    says how many were.
    """

    tokens: int
    fitted: int = 0
    failed: int = 0
    refused: int = 0
    measured = True  # nothing is to be found out

    def given(self, work, tokens, device):
        """What `work` gives, a pass of so many tokens."""
        found = work()
        self.fits(tokens)
        return found

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


class Measured(Room):
    """Of a GPU in this process: the first large pass tells how many tokens the next ones have, `most` at most."""

    tokens: int
    most: int
    measured: bool = False

    def given(self, work, tokens, device):
        if self.measured:
            return super().given(work, tokens, device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        found = super().given(work, tokens, device)
        idle = torch.cuda.memory_reserved(device) - before
        free = torch.cuda.mem_get_info(device)[0] + idle
        self.measure(tokens, torch.cuda.max_memory_allocated(device) - before, free)
        return found

    def measure(self, tokens, used, free):
        """A pass of so many tokens took `used` bytes, of `free` that there were: a large one tells it for all."""
        if not self.measured and 2 * tokens > self.tokens:
            wanted = int(FULL * free / max(1, used) * tokens)
            self.tokens, self.measured = max(1, min(self.most, wanted)), True


def out_of_memory(error):
    """Whether an error says that a device's memory, or the machine's, is exhausted."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(said in str(error) for said in ("can't allocate memory", "CUDA out of memory"))
