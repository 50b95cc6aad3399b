"""A store as the data of its page: summaries of heads, text, and numbers of single tokens, rounded and packed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn import blocks, wording
from selfrepair_nn.analysis import (
    HALF_WIDTH,
    among,
    by_case,
    by_head,
    by_variant,
    every_token,
    held,
    outcomes_by_head,
    restored,
    throughout,
)
from selfrepair_nn.analysis.partners import AXIS, averaged
from selfrepair_nn.choosing import splits, tail_of
from selfrepair_nn.confidence import LEVEL
from selfrepair_nn.equations import PARTS
from selfrepair_nn.errors import UsageError
from selfrepair_nn.explorer import promoted, repairs, words
from selfrepair_nn.explorer.entries import Entries, clean, clean_fields_of, steps_of
from selfrepair_nn.explorer.packing import significant
from selfrepair_nn.quantities import QUANTITIES, TOKEN, WIDE
from selfrepair_nn.shown import line

LOOKED_AT = (
    "top_self_repair",
    "top_direct_effect",
    "norm_share",
    "top_share_repaired",
    "top_self_repair_logprob",
    "top_logit_change",
)
"""What is offered first of a head."""

SUMMED = (*PARTS, "from_norm")
PLACES = (*TOKEN, *WIDE, "rank", "distance")
ALL = "all"
"""In the place of one partner: the mean over all."""


@dataclass(frozen=True)
class Contents:
    """What the page of a store is made of. `name` is what the page calls it, by default its title.

    Raises:
        UsageError: `ds` is not a store of heads or cases, or nothing of it is done.
    """

    ds: xr.Dataset
    share: float | None = None
    name: str | None = None

    @classmethod
    def of(cls, given: xr.Dataset, share: float | None = None, name: str | None = None) -> "Contents":
        """Of a store, or a part of one, as it comes; several partners are looked at one by one, and averaged."""
        found = wording.legible(held(restored(given, average=False)))
        if not has_tokens(found):
            raise UsageError("there are no tokens to look at here: give a store, not a summary of one")
        return cls(found, share, name)

    @cached_property
    def axes(self) -> list[str]:
        """The dimensions along which its variants lie."""
        known = {*blocks.sites(self.ds), *PLACES}
        return [str(d) for d in self.ds.self_repair.dims if d not in known]

    @cached_property
    def variants(self) -> list[xr.Dataset]:
        """Every variant as a store of its own, the last axis fastest; of several partners first the mean over them."""
        if not self.axes:
            return [self.ds]
        places = product(*((*([ALL] if d == AXIS else []), *range(self.ds.sizes[d])) for d in self.axes))
        return [self._variant(dict(zip(self.axes, at, strict=True))) for at in places]

    def _variant(self, at: dict[str, Any]) -> xr.Dataset:
        chosen = averaged(self.ds) if at.get(AXIS) == ALL else self.ds
        places = {d: i for d, i in at.items() if i != ALL}
        return chosen.isel(places).drop_vars(self.axes, errors="ignore")

    @cached_property
    def summaries(self) -> list[xr.Dataset]:
        one = by_case if "case" in self.ds.dims else outcomes_by_head if self._in_nats else by_head
        if len(self.axes) == 1 and self.axes != [AXIS]:
            [axis] = self.axes
            both = by_variant(self.ds, self.share, one)
            found = [both.isel({axis: i}) for i in range(self.ds.sizes[axis])]
        else:
            found = [one(ds, self.share) for ds in self.variants]
        if not (found[0].tokens > 0).any():
            raise UsageError(f"{wording.title(found[0])!r} has nothing done yet: there is nothing to look at")
        return found

    @property
    def _in_nats(self) -> bool:
        """Whether log-probability is held of the tokens that are looked at."""
        usual = tail_of(self.ds) == "top" and not splits(self.ds)
        return "self_repair_logprob" in self.ds and (usual or not blocks.of_top_tokens(self.ds, "self_repair_logprob"))

    @cached_property
    def entries(self) -> Entries:
        own = {*self.axes} & {*self.ds.direct_effect.dims}  # other models, with top tokens of their own
        first, *others = self.variants
        return Entries(first, self.summaries[0].attrs["share"], len(self.variants), others if own else ())

    def data(self) -> dict[str, Any]:
        """All of it as plain data, for JSON; the page's scripts say what they read."""
        first = self.summaries[0]
        every = [self.entries.values(ds) for ds in self.variants]
        steps = steps_of(self.ds, every)
        return {
            "name": line(self.name or wording.title(self.ds), wording.WIDTH),
            "basis": wording.basis(first),
            "over": among(first.attrs["share"], first),
            "tail": tail_of(first),
            "notes": self._notes(),
            "level": LEVEL,
            "axes": [{"name": line(d), "labels": [line(v) for v in self._labels(d)]} for d in self.axes],
            "sites": self._sites(),
            "summary": {"fields": self._summed_fields(), "variants": [*map(self._summed, self.summaries)]},
            "parts": [name for name in SUMMED if name in self.entries.fields],
            "text": words.text(self.ds, self.entries.texts),
            "tokens": {
                "whole": self.entries.whole,
                "kept": every_token(self.ds),
                "fields": self._fields(self.entries.fields, steps),
                "variants": [self.entries.packed(values, steps, i) for i, values in enumerate(every)],
                "clean": {"fields": self._fields(clean_fields_of(self.ds), {})}
                | clean(self.ds, self.entries.texts),
            },
            "repairs": repairs.repairs(self.variants, self.summaries, self.entries.top),
            "promoted": promoted.promoted(self.variants, first.attrs["share"], self.entries.top),
        }

    def _notes(self) -> list[dict[str, Any]]:
        first = self.summaries[0]
        loud = [told for each in self.summaries for told in wording.warnings(each)]
        quiet = [f"Not finished: {told}." for told in wording.unfinished(first)]
        quiet += [f"{told[:1].upper()}{told[1:]}." for told in wording.task(first)]
        quiet += wording.shortness(first)
        return [{"text": t, "loud": True} for t in dict.fromkeys(loud)] + [
            {"text": line(t), "loud": False} for t in quiet
        ]

    def _labels(self, axis: str) -> list[Any]:
        own = self.ds[axis].values.tolist() if axis in self.ds.coords else [*range(self.ds.sizes[axis])]
        return [f"mean over {len(own)} partners", *(f"partner {each}" for each in own)] if axis == AXIS else own

    def _sites(self) -> dict[str, Any]:
        """The grid's layers and heads, or the cases' labels and layers."""
        if "case" not in self.ds.dims:
            return {d: [int(v) for v in self.ds[d].values] for d in blocks.sites(self.ds)}
        layers = (
            self.ds["case_layer"].values
            if "case_layer" in self.ds.coords
            else np.zeros(self.ds.sizes["case"])
        )
        return {"case": [*map(line, self._labels("case"))], "layer": [int(v) for v in layers]}

    def _summed_fields(self) -> list[dict[str, str]]:
        """What there is to say of each head, with its interval."""
        first = self.summaries[0]
        share, everywhere = among(first.attrs["share"], first), throughout(first)
        found = []
        for name in self._means:
            own = name.removeprefix("top_")
            text = str(first[own].attrs.get("long_name", own)).removeprefix("mean ")
            over = share if name != own or name == "norm_share" else everywhere
            found.append({"name": name, "label": text, "over": over, "units": first[name].attrs["units"]})
        return found

    @cached_property
    def _means(self) -> list[str]:
        first, dims = self.summaries[0], blocks.sites(self.ds)
        every = [str(n) for n, a in first.data_vars.items() if f"{n}{HALF_WIDTH}" in first and a.dims == dims]
        known = [name for name in every if np.isfinite(first[name].values).any()]
        chosen = [name for name in LOOKED_AT if name in known]
        rest = sorted((n for n in known if n not in chosen), key=lambda name: not name.startswith("top_"))
        return [*chosen, *rest]

    def _summed(self, summary: xr.Dataset) -> dict[str, Any]:
        found: dict[str, Any] = {"means": [significant(summary[name].values) for name in self._means]}
        found["reach"] = [significant(summary[name + HALF_WIDTH].values) for name in self._means]
        flags = summary.top_repaired.values.astype(int) - summary.top_broken.values
        found |= {"verdict": flags.ravel().tolist(), "q": significant(summary.top_q_value.values)}
        return found | {"tokens": summary.top_tokens.values.ravel().tolist()}

    def _fields(self, names: Sequence[str], steps: dict[str, float]) -> list[dict[str, Any]]:
        return [described(self.ds[name], steps.get(name)) for name in names]


def described(array: xr.DataArray, step: float | None = None) -> dict[str, Any]:
    """What a page says of a variable."""
    known = QUANTITIES.get(str(array.name))
    units, label, about = (
        line(array.attrs.get(each, "")) or getattr(known, each, "")
        for each in ("units", "long_name", "description")
    )
    name = line(array.name)
    return {"name": name, "label": label or name, "units": units, "about": about, "step": step}


def has_tokens(ds: xr.Dataset) -> bool:
    """Whether a dataset is a store with its tokens, and not a summary of one."""
    named = all({name, f"{name}_text"} & {*ds.variables} for name in ("token", "target"))
    return "self_repair" in ds and "position" in ds.dims and named
