"""Units of work: one call of a job each, what it must give, and its halves for a server to which it is too much."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from selfrepair_nn.quantities import QUANTITIES

Shape = tuple[str | int, ...]
Shapes = Mapping[Any, "Shape | Shapes"]
Job = Callable[..., dict]


@dataclass(frozen=True, eq=False)
class Unit:
    """One call `job(model, arrays, plan)`, and the shape of every tensor that it gives.

    In a shape, a number is a size, "case" stands for the plan's cases, "prompt" for the unit's prompts and "token" for
    the pairs of case and token that count and whose direct effect reaches `thresholds` [case]. A result without "case"
    is the same for all cases; one without "prompt" is a sum over prompts.

    `inputs` gives the job's arrays for some prompts. `counted` [prompt of the run, position] says which tokens count
    where there are thresholds, None that all do. `wanted` [case, prompt of the run] says how many positions of each
    prompt are wanted for each case, None that all are; what is not wanted may be NaN. `part` is set where the unit is a
    part of another one: (first, stop) of its cases. `run` is the run of a store that asks for it, where it travels.
    `tick` is called as the job goes on, where it runs in this process.
    """

    name: str
    job: Job
    prompts: slice
    plan: dict[str, Any]
    inputs: Callable[[slice], dict[str, Any]]
    shapes: Shapes
    thresholds: np.ndarray | None = None
    counted: np.ndarray | None = None
    wanted: np.ndarray | None = None
    part: tuple[int, int] | None = None
    run: str = ""
    tick: Callable[[int], None] | None = None

    @property
    def label(self) -> str:
        """What a ledger and a message call it."""
        cases = f", cases {self.part[0]} to {self.part[1] - 1}" if self.part else ""
        return f"{self.name}, prompts {self.prompts.start} to {self.prompts.stop - 1}{cases}"

    @property
    def asked(self) -> str:
        """What its result says it is the result of: no other unit of any run says the same."""
        return f"{self.label}, of run {self.run}"

    @property
    def arrays(self) -> dict[str, Any]:
        """What the job takes beside the model and the plan."""
        import torch

        found = self.inputs(self.prompts)
        if self.thresholds is not None:
            found["thresholds"] = torch.from_numpy(self.thresholds)
        if self.counted is not None:
            found["counted"] = torch.from_numpy(self.counted[self.prompts].copy())
        if self.wanted is not None:
            found["wanted"] = torch.from_numpy(self.wanted[:, self.prompts].copy())
            if not found["wanted"].any():  # a half of which nothing is wanted: a job gives something all the same
                found["wanted"][0, 0] = 1
        return found

    def halves(self) -> tuple["Unit", ...]:
        """Two units that together give the same: half of the prompts each, or of one prompt half of the cases each.

        None at all where there is only one prompt and one case.
        """
        start, stop, cases = self.prompts.start, self.prompts.stop, len(self.plan.get("cases", ()))
        if stop - start > 1:
            middle = (start + stop) // 2
            return tuple(replace(self, prompts=slice(*ends)) for ends in ((start, middle), (middle, stop)))
        return self.cut(cases // 2) if cases > 1 else ()

    def cut(self, cases: int) -> tuple["Unit", "Unit"]:
        """Two units that together give the same: on all prompts, the first with so many of the cases."""
        return self.some_cases(0, cases), self.some_cases(cases, len(self.plan["cases"]))

    def some_cases(self, first: int, stop: int) -> "Unit":
        """The part of this unit with some of its cases only."""
        before = self.part[0] if self.part else 0
        some = {
            name: None if getattr(self, name) is None else getattr(self, name)[first:stop]
            for name in ("thresholds", "wanted")
        }
        plan = self.plan | {"cases": self.plan["cases"][first:stop]}
        return replace(self, plan=plan, part=(before + first, before + stop), **some)

    def join(self, *found: dict[Any, Any], parts: Sequence["Unit"] = ()) -> dict[Any, Any]:
        """The result of this unit from those of its halves, or of the two `parts` that it was cut into."""
        parts = parts or self.halves()
        along = "case" if parts[0].prompts == self.prompts else "prompt"
        tokens = []
        if self.thresholds is not None:
            tokens = [unit._top_tokens(half) for unit, half in zip(parts, found, strict=True)]
        halves = zip(*(dict(_leaves(half)).values() for half in found), strict=True)
        shapes = [shape for _, shape in _leaves(self.shapes)]
        return _nested(
            self.shapes,
            iter([_joined(shape, along, pair, tokens) for shape, pair in zip(shapes, halves, strict=True)]),
        )

    def _top_tokens(self, found: dict[Any, Any]) -> list[int]:
        """How many tokens of each case count and reach its threshold."""
        import torch

        top = found["direct_effect"] >= torch.from_numpy(self.thresholds)[:, None, None]
        if self.counted is not None:
            top &= torch.from_numpy(self.counted[self.prompts])
        return top.sum((1, 2)).tolist()

    def flaw(self, found: Any) -> str | None:
        """What is wrong with a result: names, shapes, types or a number that is not finite; None if nothing is."""
        if _names(found) != _names(self.shapes):
            return f"it holds {_names(found)}, not {_names(self.shapes)}"
        sizes = {"prompt": self.prompts.stop - self.prompts.start, "case": len(self.plan.get("cases", ()))}
        for (name, shape), (_, value) in zip(_leaves(self.shapes), _leaves(found), strict=True):
            if "token" in shape:
                sizes["token"] = sum(self._top_tokens(found))
            wanted = tuple(sizes.get(size, size) for size in shape)
            if problem := _problem(name, value, wanted):
                return problem
            if not self._asked_for(value, shape).isfinite().all():
                return f"{name} is not finite"
        return None

    def _asked_for(self, value: Any, shape: Shape) -> Any:
        """The values of a result that must be numbers."""
        import torch

        if self.wanted is None or shape[:2] != ("case", "prompt"):
            return value
        wanted = torch.from_numpy(self.wanted[:, self.prompts].copy())
        return value[torch.arange(value.shape[2]) < wanted[:, :, None]]


def ablation_shapes(plan: dict[str, Any], sizes: Mapping[str, int], packed: bool) -> Shapes:
    """The shapes of what an ablation job gives by this plan: all that the store keeps but what follows from the rest.

    `sizes` are those of the store's dimensions; `packed` where there are thresholds. What varies between several
    partners of a prompt has them along a last dimension.
    """
    several = dict.fromkeys(plan.get("varied", ()), (plan.get("resamples", 1),))
    return {name: (*QUANTITIES[name].shape(sizes, packed), *several.get(name, ())) for name in plan["gives"]}


def _names(found: Any) -> Any:
    """The names of a result, those within others included."""
    if not isinstance(found, Mapping):
        return None
    inner = {name: _names(value) for name, value in found.items()}
    return {n: inner[n] for n in sorted(inner, key=str)} if any(inner.values()) else sorted(map(str, inner))


def _leaves(found: Mapping[Any, Any], outer: str = "") -> list[tuple[str, Any]]:
    """Everything in a result that is no further mapping, in one order whatever order it came in."""
    leaves = []
    for name in sorted(found, key=str):
        label, value = f"{outer}{name}", found[name]
        leaves += _leaves(value, f"{label} ") if isinstance(value, Mapping) else [(label, value)]
    return leaves


def _nested(shapes: Shapes, values: Any) -> dict[Any, Any]:
    """Values in the order of `_leaves`, named and nested as the shapes are."""
    return {
        name: _nested(shape, values) if isinstance(shape, Mapping) else next(values)
        for name, shape in sorted(shapes.items(), key=lambda pair: str(pair[0]))
    }


def _joined(shape: Shape, along: str, pair: tuple[Any, Any], tokens: list[list[int]]) -> Any:
    import torch

    if "token" in shape and along == "prompt":
        by_case = zip(*(half.split(counts) for half, counts in zip(pair, tokens, strict=True)), strict=True)
        return torch.cat([part for case in by_case for part in case])
    if along in shape or "token" in shape:
        return torch.cat(pair, shape.index(along) if along in shape else 0)
    return pair[0] + pair[1] if along == "prompt" else pair[0]


def _problem(name: str, value: Any, wanted: tuple[int, ...]) -> str | None:
    import torch

    whole = name in QUANTITIES and QUANTITIES[name].kind == "int"
    if not isinstance(value, torch.Tensor) or value.is_floating_point() == whole:
        return f"{name} is no tensor of {'whole' if whole else 'floating-point'} numbers"
    if value.layout != torch.strided or value.is_meta or value.is_complex():
        return f"{name} is no tensor of numbers, each in its place"
    if tuple(value.shape) != wanted:
        return f"{name} has shape {tuple(value.shape)}, not {wanted}"
    return None
