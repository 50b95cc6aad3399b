"""A vector for each site, given as arrays: what constant ablation puts in its place, learned or measured elsewhere."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from selfrepair_nn.components import Attention, Head, Mlp, Neuron
from selfrepair_nn.errors import UsageError, one_line
from selfrepair_nn.fixed import Fixed
from selfrepair_nn.replacements import OfHeads, Replacement, Run
from selfrepair_nn.values import brief, number, place, whole

Site = Head | Mlp | Neuron
KINDS: dict[str, Any] = {kind.kind: kind for kind in (Head, Mlp, Neuron)}


@dataclass(frozen=True)
class Constants(Replacement):
    """Replacement: a vector of its own for each site, the same at every token of every prompt.

    `vectors` {site: vector}: of a Head its z [d_head], of an Mlp its output [d_model], of a Neuron [1]; of an Attention
    the z of each of its heads, [heads, d_head]. Lists, arrays or tensors. Every site that is ablated must have one.
    `about` says in plain words or numbers where they are from; it decides nothing.

        sr.Constants({sr.Head(9, 6): z, sr.Mlp(3): out})
        constants.save("constants.npz"); sr.Constants.load("constants.npz")
        constants.of([sr.Head(9, 6)])                 only these

    Raises:
        UsageError: no vector of finite numbers, or a place that has no value of its own.
    """

    vectors: Any
    about: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        given = self.vectors
        if not isinstance(given, Mapping):
            given = dict(given)
        found = {site: vector for key, value in given.items() for site, vector in _each(key, value)}
        if not found:
            raise UsageError("Constants has no vector: give {site: vector}")
        order = sorted(found, key=lambda site: site.entry)
        object.__setattr__(self, "vectors", tuple((site, found[site]) for site in order))

    def __getitem__(self, site: Site) -> np.ndarray:
        """The vector of a site. UsageError where there is none."""
        self._require(site)
        return dict(self.vectors)[site].values

    @property
    def word(self) -> str:
        return f"constants_{len(self.vectors)}_{sha256(repr(self.vectors).encode()).hexdigest()[:8]}"

    @property
    def plan(self) -> dict[str, Any]:
        kinds = self._kinds
        return {"kind": "constants", "sites": {kind: [s.entry[1:] for s, _ in rows] for kind, rows in kinds.items()}}

    @property
    def _kinds(self) -> dict[str, list[tuple[Site, Fixed]]]:
        found: dict[str, list[tuple[Site, Fixed]]] = {}
        for site, vector in self.vectors:
            found.setdefault(site.kind, []).append((site, vector))
        return found

    def arrays(self, run: Run, block: Any) -> dict[str, np.ndarray]:
        """Alike for all prompts."""
        return {
            f"{kind}_constants": np.array([vector.values for _, vector in rows], run.precision)
            for kind, rows in self._kinds.items()
        }

    def misfit(self, case: tuple[Any, ...], structure: Any) -> str | None:
        known = dict(self.vectors)
        for site in (part for each in case for part in each.parts(structure.n_heads)):
            if site not in known:
                return f"{site.label} has no constant; there are {self._told}"
            if (width := site.width(structure)) != known[site].values.size:
                return f"{site.label} holds {width} numbers, its constant {known[site].values.size}"
        return None

    def of(self, sites: Iterable[Any]) -> "Constants":
        """Only those of these sites (of an Attention, of its heads). UsageError where one has none."""
        known, wanted = dict(self.vectors), []
        for site in sites:
            inside = [each for each in known if isinstance(site, Attention) and site.overlaps(each)]
            for each in inside or [site]:
                self._require(each)
                wanted.append(each)
        return Constants({site: known[site].values for site in wanted}, self.about)

    @property
    def written(self) -> dict[str, Any]:
        """All of them as plain data."""
        return {"vectors": [[site.entry, v.values.tolist()] for site, v in self.vectors], "about": self.about}

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> "Constants":
        """Those that `written` gives."""
        vectors = {KINDS[kind](*numbers): vector for (kind, *numbers), vector in written["vectors"]}
        return cls(vectors, written["about"])

    def _require(self, site: Any) -> None:
        if site not in dict(self.vectors):
            raise UsageError(f"{getattr(site, 'label', brief(site))} has no constant; there are {self._told}")

    @property
    def _told(self) -> str:
        labels = [site.label for site, _ in self.vectors]
        return ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")

    def save(self, path: str | Path) -> Path:
        """Write them to a NumPy file (.npz): `sites` and `about` as JSON, and a float64 array for each kind of site.

        Returns the path. UsageError where it cannot be written.
        """
        to = Path(place("path", path))
        arrays: dict[str, Any] = {k: np.array([v.values for _, v in rows]) for k, rows in self._kinds.items()}
        said = {kind: [site.entry for site, _ in rows] for kind, rows in self._kinds.items()}
        try:
            with to.open("wb") as file:
                np.savez(file, sites=json.dumps(said), about=json.dumps(self.about), **arrays)
        except OSError as error:
            raise UsageError(f"{str(to)!r} cannot be written: {one_line(error)}") from error
        return to

    @classmethod
    def load(cls, path: str | Path) -> "Constants":
        """Those that `save` wrote. UsageError where the file holds none."""
        at = place("path", path)
        try:
            with np.load(at, allow_pickle=False) as held:
                said, about = json.loads(str(held["sites"])), json.loads(str(held["about"]))
                rows = [(entry, row) for kind in said for entry, row in zip(said[kind], held[kind], strict=True)]
            return cls({KINDS[kind](*numbers): row for (kind, *numbers), row in rows}, about)
        except FileNotFoundError as error:
            raise UsageError(f"file {at!r} does not exist: Constants.save writes one") from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{at!r} holds no constants as Constants.save writes them: {one_line(error)}") from error


@dataclass(frozen=True)
class Optimal(OfHeads):
    """Replacement: the constant with which the model loses least, learned by the run for each head that is ablated.

    As `sr.optimal_constants` does it, with so many `steps` at this `rate`, on half of the run's documents (or prompts,
    where these are few); the store keeps the constants and reports the other half. A run on a server cannot learn: it
    takes `Constants` that were learned elsewhere.

    Raises:
        UsageError: what is no number of steps, or no rate.
    """

    steps: int = 12
    rate: float = 0.3
    learns = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", whole("steps", self.steps, 0))
        object.__setattr__(self, "rate", number("rate", self.rate))

    @property
    def word(self) -> str:
        return self.kind

    def require(self, case: tuple[Any, ...]) -> None:
        super().require(case)
        if len(case) > 1 or any(isinstance(site, Attention) for site in case):
            raise UsageError("Optimal is learned for one head at a time: let each entry of ablate be a head")


def _each(site: Any, given: Any) -> list[tuple[Site, Fixed]]:
    """The sites that a key stands for, each with its vector."""
    name = f"constant of {getattr(site, 'label', brief(site))}"
    if isinstance(given, Fixed):
        given = given.values
    try:
        given = given.detach().cpu().numpy() if hasattr(given, "detach") else given
        values = np.array(given, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"{name} must be a vector of numbers, not {brief(given)}") from None
    if isinstance(site, Attention) and values.ndim == 2:
        return [each for head, row in enumerate(values) for each in _each(Head(site.layer, head), row)]
    if not isinstance(site, Head | Mlp | Neuron):
        raise UsageError(f"{name}: constants are of a Head, an Attention [heads, d_head], an Mlp or a Neuron")
    if values.ndim != 1 or not np.isfinite(values).all():
        raise UsageError(f"{name} must be a vector of finite numbers, not {brief(given)}")
    return [(site, Fixed(values))]
