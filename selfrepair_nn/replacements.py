"""What takes the place of a site's value: each kind says what it reads, of which sites it can be, and what it brings.

What each does inside the model is in tracing.replacements, under the same word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, ClassVar, Protocol

import numpy as np

from selfrepair_nn.components import Attention, Head, Whole
from selfrepair_nn.errors import UsageError
from selfrepair_nn.values import Declared, brief, number


class Run(Protocol):
    """A run, as a replacement sees it: its prompts, their partners ([prompt], or [resample, prompt] where each has
    several) and places in the text [prompt].

    `random_directions` are vectors of length 1 as wide as the residual stream, [prompt, d_model], and `noise_seeds`
    whole numbers, int64 [prompt], from the run's seed and each prompt's place. `precision` is the store's type.
    """

    @property
    def precision(self) -> str: ...

    @property
    def prompts(self) -> Any: ...
    @property
    def partners(self) -> Any: ...
    @property
    def order(self) -> Any: ...
    @property
    def edited_position(self) -> Any: ...
    def random_directions(self, block: Any) -> np.ndarray: ...
    def noise_seeds(self, block: Any) -> np.ndarray: ...


@dataclass(frozen=True)
class Replacement(metaclass=Declared):
    """What takes the place of a site's value.

    `reads_text` says that values come from another text, so that each block of prompts needs a clean pass more;
    `reads_partner` that this is the text of the prompt's partner.
    `reads_means` says that mean values are found before the first block.
    `takes_away` says that nothing is left of what was there: beside such a one, whole layers may be deleted or moved.
    `draws` says that it is drawn from the run's seed, `learns` that what takes the site's place is learned first.
    """

    reads_text: ClassVar[bool] = False
    reads_partner: ClassVar[bool] = False
    takes_away: ClassVar[bool] = False
    reads_means: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    learns: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        """The word that a plan has for it."""
        return type(self).__name__.lower()

    @property
    def word(self) -> str:
        """What a store calls it: the kind, and its numbers."""
        return "_".join([self.kind, *(str(getattr(self, f.name)) for f in fields(self))])

    @property
    def plan(self) -> dict[str, Any]:
        """It as the plain dict that travels with a job."""
        return {"kind": self.kind} | {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def sites(self) -> tuple[Head, ...]:
        """Further sites that it reads."""
        return ()

    def require(self, case: tuple[Any, ...]) -> None:
        """UsageError if it cannot take the place of these sites, which are ablated together."""
        for site in case:
            if isinstance(site, Whole) and (len(case) > 1 or not self.takes_away):
                kinds = ", ".join(word for word, each in NAMED.items() if each.takes_away)
                raise UsageError(
                    f"{site.label}: whole layers are ablated alone, beside a replacement of {kinds}"
                )

    def misfit(self, case: tuple[Any, ...], structure: Any) -> str | None:
        """Why it does not fit these sites of a model of this structure, or None."""
        return None

    def amiss(self, prompts: Any) -> str | None:
        """Why it does not go with these prompts, or None."""
        return None

    def arrays(self, run: Run, block: Any) -> dict[str, np.ndarray]:
        """What varies by prompt and travels with the block's tokens: {name: array [prompt, …]}."""
        return {}


class OfHeads(Replacement):
    """A replacement of heads only."""

    def require(self, case: tuple[Any, ...]) -> None:
        super().require(case)
        for site in case:
            if not isinstance(site, Head | Attention):
                raise UsageError(f"{site.label}: {type(self).__name__} is for heads; ablate heads with it")


@dataclass(frozen=True)
class Resample(Replacement):
    """The same site's value at the same position of the prompt's partner."""

    reads_text = reads_partner = takes_away = True

    def arrays(self, run: Run, block: Any) -> dict[str, np.ndarray]:
        return {"partner_tokens": run.prompts.tokens[run.partners[..., block]]}


@dataclass(frozen=True)
class Mean(Replacement):
    """The site's mean value over all positions of the reference prompts."""

    takes_away = reads_means = True


@dataclass(frozen=True)
class Zero(Replacement):
    """Zero; the value bias stays where value_bias is "output"."""

    takes_away = True


@dataclass(frozen=True)
class Identity(Replacement):
    """What was there: the null control."""


@dataclass(frozen=True)
class Counterfactual(Replacement):
    """The same site's value on the prompt's minimally different text."""

    reads_text = takes_away = True

    def amiss(self, prompts: Any) -> str | None:
        if prompts.counterfactual is None:
            return "it needs prompts with a counterfactual: define prompts() in the recipe"
        return None

    def arrays(self, run: Run, block: Any) -> dict[str, np.ndarray]:
        return {"counterfactual_tokens": run.prompts.counterfactual[block]}


@dataclass(frozen=True)
class Scale(Replacement):
    """Replacement: the site's own clean value times `factor`."""

    factor: float

    def __post_init__(self) -> None:
        _keep_number(self, "factor")


@dataclass(frozen=True)
class Constant(Replacement):
    """Replacement: `value` in every entry, or a vector of them, as wide as the site's value."""

    value: float | Sequence[float]

    def __post_init__(self) -> None:
        given: Any = self.value
        given = given.tolist() if hasattr(given, "tolist") else given
        if isinstance(given, list | tuple):
            value = tuple(_finite("value of Constant", each) for each in given)
            object.__setattr__(self, "value", value)
        else:
            _keep_number(self, "value")

    @property
    def word(self) -> str:
        return f"constant_{len(self.value)}_numbers" if isinstance(self.value, tuple) else super().word

    def misfit(self, case: tuple[Any, ...], structure: Any) -> str | None:
        if isinstance(self.value, tuple):
            for site in case:
                if (width := site.width(structure)) != len(self.value):
                    return f"{site.label} holds {width} numbers, the Constant {len(self.value)}"
        return None


@dataclass(frozen=True)
class Noise(Replacement):
    """Replacement: the site's own value and Gaussian noise, independent for each entry, token, prompt and site.

    Its standard deviation is `scale` times the root mean square of the value's entries at that token (of a head less
    its constant part, where that belongs to the output bias): with a scale of 1 the noise is as long as the value. It
    is drawn from the run's seed, the prompt's place in the text and the site: whatever else runs, and wherever.
    """

    scale: float
    draws = True

    def __post_init__(self) -> None:
        _keep_number(self, "scale")

    def arrays(self, run: Run, block: Any) -> dict[str, np.ndarray]:
        return {"noise_seed": run.noise_seeds(block)}


@dataclass(frozen=True)
class OtherHead(OfHeads):
    """Replacement: what another head of the same prompt reads out at the same position."""

    head: Head

    def __post_init__(self) -> None:
        if not isinstance(self.head, Head):
            raise UsageError(f"head of OtherHead must be a Head, such as Head(9, 6), not {brief(self.head)}")

    @property
    def plan(self) -> dict[str, Any]:
        return {"kind": self.kind, "head": self.head.entry}

    @property
    def sites(self) -> tuple[Head, ...]:
        return (self.head,)


@dataclass(frozen=True)
class Reinforce(OfHeads):
    """Not a replacement: `scale` times the head's own write is added to the stream that its layer reads.

    It is added at one position of each prompt, the store's `edited_position`.
    """

    scale: float
    draws = True

    def __post_init__(self) -> None:
        _keep_number(self, "scale")

    def require(self, case: tuple[Any, ...]) -> None:
        super().require(case)
        if len(case) > 1 or any(isinstance(site, Attention) for site in case):
            raise UsageError("Reinforce is for one head at a time: let each entry of ablate be a head")

    def arrays(self, run: Run, block: Any) -> dict[str, np.ndarray]:
        return {"edited_position": run.edited_position[block]}


@dataclass(frozen=True)
class ReinforcePartner(Reinforce):
    """A null of Reinforce: what the same head writes at that position of the prompt's partner is added instead."""

    reads_text = reads_partner = True

    def arrays(self, run: Run, block: Any) -> dict[str, np.ndarray]:
        return super().arrays(run, block) | {"partner_tokens": run.prompts.tokens[run.partners[..., block]]}


@dataclass(frozen=True)
class ReinforceRandom(Reinforce):
    """A null of Reinforce: a random direction is added instead, as long as the head's own write is there."""

    def arrays(self, run: Run, block: Any) -> dict[str, np.ndarray]:
        return super().arrays(run, block) | {"random_direction": run.random_directions(block)}


def _keep_number(replacement: Replacement, name: str) -> None:
    """Make a replacement's number Python's own. UsageError for what is no finite number."""
    value = _finite(f"{name} of {type(replacement).__name__}", getattr(replacement, name))
    object.__setattr__(replacement, name, value)


def _finite(what: str, given: Any) -> float:
    value = given.item() if hasattr(given, "item") else given
    if not isfinite(number(what, value)):
        raise UsageError(f"{what} must be finite, not {value}")
    return value


def _sentence(replacement: Replacement) -> str:
    said = (replacement.__doc__ or "").splitlines()[0].rstrip(".")
    return said[:1].lower() + said[1:]


NAMED: dict[str, Replacement] = {
    each.kind: each for each in (Resample(), Mean(), Zero(), Identity(), Counterfactual())
}
"""Those without numbers, by the word for them."""

REPLACEMENTS: Mapping[str, str] = {
    word: _sentence(each) for word, each in NAMED.items() if not isinstance(each, Counterfactual)
}
"""What a command line can ask for; a recipe may also use counterfactuals, another head, edges, numbers …"""


def replacement_of(given: Any) -> Replacement:
    """The replacement that a word or an object stands for.

    Raises:
        UsageError: it is none.
    """
    if isinstance(given, Replacement):
        return given
    if isinstance(given, str) and given in NAMED:
        return NAMED[given]
    raise UsageError(
        f"ablation {brief(given)} is not known; choose one of {', '.join(NAMED)}, or a Scale, Constant, Constants, "
        "Optimal, Noise, OtherHead, KnockOut, ZeroValues or Reinforce with what it says"
    )
