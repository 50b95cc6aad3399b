"""A unit on its way over a server: whole, or in the parts that it was split into."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfrepair_nn.backends.ndif.hosts import Host
from selfrepair_nn.layout.units import Unit


@dataclass(eq=False)
class Piece:
    """A unit on the way to its result. Once it is split its parts are asked for instead.

    `job` is what the server at `host` has of it; `heard` is when the job's status last changed, or when it was sent or
    taken up; `known` whether the server ever said anything of it, `doubt` what came in place of an answer to its
    request. `failed_at` is where it last failed.
    """

    unit: Unit
    root: "Piece | None" = None
    parts: list["Piece"] = field(default_factory=list)
    result: dict[Any, Any] | None = None
    due: float = 0.0
    job: str = ""
    heard: float = 0.0
    status: str = ""
    known: bool = False
    doubt: str = ""
    host: Host | None = None
    failed_at: Host | None = None

    def split(self, parts: Sequence[Unit]) -> list["Piece"]:
        """The pieces of these parts of its unit, which are asked for instead; none at all if there are none."""
        self.parts = [Piece(part, self.root or self) for part in parts]
        return self.parts

    def leaves(self) -> Iterator["Piece"]:
        """What is asked for in one request each."""
        yield from (leaf for part in self.parts for leaf in part.leaves()) if self.parts else (self,)

    def gathered(self) -> dict[Any, Any] | None:
        """The result, joined from the parts, or None as long as one is missing."""
        if any(leaf.result is None for leaf in self.leaves()):
            return None
        return self._joined()

    def _joined(self) -> Any:
        if not self.parts:
            return self.result
        return self.unit.join(*(part._joined() for part in self.parts), parts=[part.unit for part in self.parts])
