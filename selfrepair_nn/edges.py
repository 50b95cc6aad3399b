"""Attention edges as what is taken away: from a query to a key, for a head or for all heads of a layer."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfrepair_nn.errors import UsageError
from selfrepair_nn.fixed import Fixed, rows
from selfrepair_nn.replacements import OfHeads, Run
from selfrepair_nn.values import brief, one_of, several, whole

SOFTMAXES = {
    "live": "what is left of the attention is divided by its sum, as if the edges were masked before the softmax",
    "frozen": "what is left of the attention stays as it is",
}
OF_KEYS = "positions (0 is the first token), or a list of them for each prompt"
OF_EDGES = "pairs (query, key) of positions, or a list of them for each prompt"


@dataclass(frozen=True)
class KnockOut(OfHeads):
    """Replacement: what heads read out without some of their attention edges, from a query to a key.

    The edges of each head that is ablated, of all that is said here together:

        KnockOut(back=1)                              from each token to the one before; back=0 to itself; back=(1, 2)
        KnockOut(keys=0)                              from each token to the first; keys=[[3], [5, 6]] for each prompt
        KnockOut(most=1)                              from each token to the one that the head attends to most there
        KnockOut(edges=[(5, 2), (6, 2)])              from tokens 5 and 6 to 2; [[(5, 2)], [(6, 1)]] for each prompt

    `softmax` says what becomes of the attention that they carried. "live": what is left is divided by its sum, which is
    what masking them before the softmax gives; with an attention sink its share is part of the sum. Where nothing is
    left (a first token that may not attend to itself), nothing is read. "frozen": it is gone. By `value_bias` "output"
    the constant part of what a head reads belongs to the attention's output bias and stays: cutting all edges is zero
    ablation. The pattern is that of the clean run.

    Raises:
        UsageError: no edge, or what is no position; with prompts, a position or a distance that they do not have.
    """

    softmax: str = "live"
    back: Any = ()
    keys: Any = ()
    most: int = 0
    edges: Any = None
    by_prompt: tuple[tuple[str, Fixed], ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        one_of("softmax", self.softmax, SOFTMAXES)
        told = {}
        keys, edges = self.keys, [] if self.edges is None else self.edges
        if _depth(keys) > 1:
            told["keys"], keys = rows("keys", keys, OF_KEYS), ()
        object.__setattr__(self, "back", _numbers("back", self.back, "numbers of tokens back, from 0 on"))
        object.__setattr__(self, "most", whole("most", self.most, 0))
        if self.edges is not None:
            told["edges"] = rows("edges", edges if _depth(edges) > 2 else [edges], OF_EDGES, 2)
            _require_backwards(told["edges"].values)
            object.__setattr__(self, "edges", told["edges"])
        object.__setattr__(self, "keys", told.get("keys") or _numbers("keys", keys, OF_KEYS))
        object.__setattr__(self, "by_prompt", tuple(told.items()))
        if not (self.back or self.keys or self.most or (self.edges and self.edges.values.size)):
            raise UsageError("KnockOut cuts no edge: say which, back=1, keys=0, most=1 or edges=[(5, 2)]")

    @property
    def word(self) -> str:
        found = [self.kind, self.softmax]
        for name, given in (("back", self.back), ("keys", self.keys), ("most", self.most), ("edges", self.edges)):
            if given:
                said = given.sha256[:8] if isinstance(given, Fixed) else given
                found += [name, *(map(str, said) if isinstance(said, tuple) else [str(said)])]
        return "_".join(found)

    @property
    def plan(self) -> dict[str, Any]:
        keys = [] if isinstance(self.keys, Fixed) else list(self.keys)
        return {"kind": "knockout", "softmax": self.softmax, "back": list(self.back), "keys": keys, "most": self.most}

    def arrays(self, run: Run, block: Any) -> dict[str, np.ndarray]:
        every = np.zeros(len(run.order[block]), int)  # one row may be for all
        return {
            name: rows.values[run.order[block] if len(rows.values) > 1 else every] for name, rows in self.by_prompt
        }

    def amiss(self, prompts: Any) -> str | None:
        last = prompts.length - 1
        for name, given in (("back", self.back), ("keys", self.keys)):
            if not isinstance(given, Fixed) and any(each > last for each in given):
                return f"{name} {max(given)}: prompts of {prompts.length} tokens have positions 0 to {last}"
        for name, fixed in self.by_prompt:
            if len(fixed.values) not in (1, prompts.n):
                return f"{name} for {len(fixed.values)} prompts: there are {prompts.n}, in the order of the text"
            if fixed.values.max(initial=-1) > last:
                return f"{name} {fixed.values.max()}: prompts of {prompts.length} tokens have positions 0 to {last}"
        return None


@dataclass(frozen=True)
class ZeroValues(OfHeads):
    """Replacement: what heads read out where the values at some positions are zero, whoever attends to them.

    `positions` are such as 0, the first token, several, or a list of them for each prompt. It is
    `KnockOut("frozen", keys=positions)`. Heads that share values have them each for itself: ablate them together.

    Raises:
        UsageError: as KnockOut.
    """

    positions: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", KnockOut("frozen", keys=self.positions).keys)

    @property
    def cut(self) -> KnockOut:
        """The edges whose values are zero."""
        given = self.positions
        return KnockOut("frozen", keys=_lists(given) if isinstance(given, Fixed) else given)

    @property
    def word(self) -> str:
        return self.cut.word.replace("knockout_frozen_keys", "zerovalues")

    @property
    def plan(self) -> dict[str, Any]:
        return self.cut.plan

    def arrays(self, run: Run, block: Any) -> dict[str, np.ndarray]:
        return self.cut.arrays(run, block)

    def amiss(self, prompts: Any) -> str | None:
        return self.cut.amiss(prompts)


def _lists(fixed: Fixed) -> list[list[int]]:
    return [[each for each in row if each >= 0] for row in fixed.values.tolist()]


def _numbers(name: str, given: Any, wanted: str) -> tuple[int, ...]:
    """A number of 0 or more, or several, in order."""
    found = several(given)
    if found is None and isinstance(given, str):
        raise UsageError(f"{name} {brief(given)} is not understood: give {wanted}")
    return tuple(sorted({whole(name, each, 0) for each in ([given] if found is None else found)}))


def _depth(given: Any) -> int:
    """How many lists lie in each other."""
    found = several(given)
    return 0 if found is None else 1 + max(map(_depth, found), default=0)


def _require_backwards(edges: np.ndarray) -> None:
    """UsageError for an edge to a later token: there is none."""
    ahead = edges[edges[..., 1] > edges[..., 0]]
    if len(ahead):
        query, key = ahead[0].tolist()
        raise UsageError(f"edge ({query}, {key}): a token attends to itself and to earlier ones, (query, key)")
