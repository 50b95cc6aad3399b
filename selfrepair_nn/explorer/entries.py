"""Which tokens of each head a page holds numbers of, and these numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr

from selfrepair_nn import blocks
from selfrepair_nn.analysis.partners import BY_PARTNER
from selfrepair_nn.choosing import ranked_by, tail_of
from selfrepair_nn.explorer.packing import FINE, levels, packed, plain, rounded, step_for
from selfrepair_nn.quantities import QUANTITIES, TOKEN, VARIANCE, WIDE

DENSE = 1_600_000
"""Numbers of whole prompts."""
CHOSEN = 3_500_000
"""Numbers of the tokens that are chosen for each head."""
CLEAN = 400_000
"""Numbers of the clean run."""
TEXT = 1_500_000
"""Tokens whose text is shown."""

FIRST = ("direct_effect", "logit_change", "self_repair", "self_repair_logprob")


def fields_of(ds: xr.Dataset) -> list[str]:
    """The variables that have a number for each token of each head or case, those to look at first before others."""
    dims = {*blocks.sites(ds), *TOKEN}
    own = [n for n, found in _numbers(ds) if dims <= found and found.isdisjoint({*WIDE, "rank", "distance"})]
    own = [n for n in own if not n.endswith((VARIANCE, BY_PARTNER))]
    return sorted(own, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def clean_fields_of(ds: xr.Dataset) -> list[str]:
    """The variables that have one number for each token."""
    return [name for name, found in _numbers(ds) if found == {*TOKEN}]


def _numbers(ds: xr.Dataset) -> Iterator[tuple[str, set]]:
    """Variables of numbers and their dimensions, also those that a selection such as ds.sel(layer=6) took."""
    for name, array in ds.data_vars.items():
        own = QUANTITIES[str(name)].dims_in("case" not in ds.dims) if name in QUANTITIES else ()
        if array.dtype.kind == "f":
            yield str(name), {*own, *array.dims}


@dataclass(frozen=True)
class Entries:
    """Tokens of each case of `ds`, one variant of a store.

    All that count in its first prompts, and of the others those of the case's share, the highest direct effects where
    these are too many. `variants` is how many there are in all; `others` are those that have top tokens of their own,
    as revisions of a model do: then tokens that are any one's are here.
    """

    ds: xr.Dataset
    share: float
    variants: int = 1
    others: Sequence[xr.Dataset] = ()

    @cached_property
    def done(self) -> np.ndarray:
        return np.any([blocks.done_cases(ds) for ds in (self.ds, *self.others)], axis=0)

    @cached_property
    def texts(self) -> int:
        """Of how many prompts the text is shown."""
        return min(self.ds.sizes["prompt"], max(1, TEXT // self.ds.sizes["position"]))

    @cached_property
    def fields(self) -> list[str]:
        return fields_of(self.ds)

    @cached_property
    def whole(self) -> int:
        """Of how many prompts, from the first, every counted token is here."""
        counted = np.cumsum(blocks.counted_tokens(self.ds).sum(1))
        return int(np.clip(np.searchsorted(counted, DENSE // self._each, "right"), 1, self.texts))

    @property
    def _each(self) -> int:
        """Numbers of a token."""
        return max(1, int(self.done.any(1).sum()) * self.variants * len(self.fields))

    @cached_property
    def tops(self) -> list[blocks.Top]:
        """The tokens of each case's share that are shown, of each variant that has its own."""
        return [self._top(ds) for ds in (self.ds, *self.others)]

    def _top(self, ds: xr.Dataset) -> blocks.Top:
        _, top = blocks.direct_effects(ds, blocks.done_cases(ds), self.share)
        top = top.of(top.token < self.texts * ds.sizes["position"])
        return _first_of_each(top, CHOSEN // self._each // (1 + len(self.others)), tail_of(ds))

    @cached_property
    def top(self) -> blocks.Top:
        """Those of all variants together."""
        if not self.others:
            return self.tops[0]
        parts = ([getattr(each, name) for each in self.tops] for name in ("case", "token", "effect", "sign"))
        case, token, effect, sign = map(np.concatenate, parts)
        _, first = np.unique(self._key(case, token), return_index=True)
        order = first[np.argsort(token[first], kind="stable")]
        return blocks.Top(case[order], token[order], effect[order], sign[order])

    @cached_property
    def dense(self) -> np.ndarray:
        """The counted tokens of the whole prompts, flattened: [token]."""
        return np.flatnonzero(blocks.counted_tokens(self.ds)[: self.whole])

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Case and token of every entry, in order of token."""
        beyond = self.top.token >= self.whole * self.ds.sizes["position"]
        cases = np.flatnonzero(self.done.any(1))
        dense = np.repeat(self.dense, cases.size), np.tile(cases, self.dense.size)
        token = np.concatenate([dense[0], self.top.token[beyond]])
        case = np.concatenate([dense[1], self.top.case[beyond]])
        return case, token

    def values(self, ds: xr.Dataset) -> dict[str, np.ndarray]:
        """Each field of a variant at every entry: [entry], NaN where the store has none."""
        case, token = self.places
        held = self.done[case, token // ds.sizes["position"]]
        return {n: np.where(held, blocks.values_at(ds, n, case, token), np.nan) for n in self.fields}

    def packed(self, values: dict[str, np.ndarray], steps: dict[str, float], variant: int = 0) -> list[list]:
        """For each case how many entries it has beyond the whole prompts, and all its numbers as text."""
        own = self.tops[variant if self.others else 0]
        case, token = self.places
        order = np.argsort(case, kind="stable")
        bounds = np.searchsorted(case[order], np.arange(len(self.done) + 1))
        columns = {name: rounded(values[name], steps[name]) for name in self.fields}
        in_top = np.isin(self._key(case, token), self._key(own.case, own.token))
        found = []
        for at in map(order.__getitem__, map(slice, bounds[:-1], bounds[1:])):
            extra = token[at][self.dense.size :] if at.size else token[:0]
            head = plain(np.diff(extra, prepend=0).astype(np.uint32)), in_top[at].astype(np.uint8).tobytes()
            found.append([int(extra.size), packed(*head, *(plain(columns[n][at]) for n in self.fields))])
        return found

    def _key(self, case: np.ndarray, token: np.ndarray) -> np.ndarray:
        return case.astype(np.int64) * self.ds.sizes["prompt"] * self.ds.sizes["position"] + token


def steps_of(ds: xr.Dataset, every: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """What each field is rounded to: one step for all of one unit, since they add up to each other."""
    units = {name: str(ds[name].attrs.get("units", name)) for name in every[0]}
    units |= {name: name for name, unit in units.items() if unit == "1"}
    found = {}
    for unit in {*units.values()}:
        names = [name for name in units if units[name] == unit]
        numbers = np.concatenate([values[name] for values in every for name in names])
        step = step_for(numbers, levels(numbers.size) if unit == "logit" else FINE)
        found |= dict.fromkeys(names, step)
    return found


def clean(ds: xr.Dataset, texts: int) -> dict:
    """The numbers of the clean run, of as many prompts as have room, rounded."""
    names, n_positions = clean_fields_of(ds), ds.sizes["position"]
    prompts = min(texts, max(1, CLEAN // max(1, len(names) * n_positions)))
    done = ds.done.transpose("prompt", ...).values.reshape(ds.sizes["prompt"], -1).any(1)[:prompts, None]
    done = done & blocks.counted_tokens(ds)[:prompts]
    values = {n: ds[n].isel(prompt=slice(prompts)).transpose(*TOKEN).values.astype(float) for n in names}
    values = {n: np.where(done, v, np.nan) for n, v in values.items()}
    steps = {n: step_for(v, FINE) for n, v in values.items()}
    columns = (plain(rounded(values[n], steps[n])) for n in names)
    return {"prompts": prompts, "steps": [steps[n] for n in names], "values": packed(*columns)}


def _first_of_each(top: blocks.Top, count: int, tail: str) -> blocks.Top:
    """The `count` first at the tail of each case."""
    order = np.lexsort((-ranked_by(top.effect, tail), top.case))
    start = np.searchsorted(top.case[order], top.case[order])
    return top.of(np.sort(order[np.arange(order.size) - start < max(1, count)]))
