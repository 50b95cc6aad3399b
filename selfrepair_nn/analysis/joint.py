"""What several ablated runs of a store do on the same tokens, added up token by token."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import of_cases, share_of
from selfrepair_nn.analysis.closure import closure
from selfrepair_nn.analysis.task import verdict
from selfrepair_nn.analysis.tokens import clustering, clusters, entry_tally
from selfrepair_nn.blocks import (
    Top,
    direct_effects,
    done_cases,
    require_kept,
    require_known,
    rows,
    sites,
    values_at,
)
from selfrepair_nn.case_sites import Case, sites_of
from selfrepair_nn.choosing import halves, splits
from selfrepair_nn.components import Ablatable, Head
from selfrepair_nn.confidence import Tally
from selfrepair_nn.errors import UsageError
from selfrepair_nn.quantities import QUANTITIES

Terms = Sequence[tuple[int, int]]
"""(sign, index of a case): what is added up."""


@dataclass(frozen=True)
class Joint:
    """A store of cases on the prompts that all of them are done with, and the top share of each.

    `cases` are the sites of each, `done` is bool [case, prompt], `noise` the noise floor of each case [case].
    """

    ds: xr.Dataset
    cases: list[Case]
    done: np.ndarray
    top: Top
    clusters: np.ndarray
    share: float
    noise: np.ndarray

    @classmethod
    def of(cls, ds: xr.Dataset, share: float | None) -> "Joint":
        """Raises UsageError as `of_cases`, or if nothing is done yet."""
        share, ds = share_of(ds, share), of_cases(ds)
        require_kept(ds)
        done = done_cases(ds)
        if not done.all(0).any():
            raise UsageError("no prompt of this store is done for every case yet: let the run go on")
        done = np.broadcast_to(done.all(0), done.shape)
        _, top = direct_effects(ds, done, share)
        noise = ds.noise_floor.values.astype(float) if "noise_floor" in ds else np.zeros(len(done))
        return cls(ds, sites_of(ds), done, top, clusters(ds), share, noise)

    def find(self, *heads: Ablatable) -> int | None:
        """The case that ablates just these sites, in whatever order; None where there is none."""
        wanted = set(heads)
        return next(
            (i for i, case in enumerate(self.cases) if {*case} == wanted and len(case) == len(heads)), None
        )

    @property
    def singles(self) -> dict[Head, int]:
        """The heads that are ablated alone, and the case of each, in the order of the store."""
        return {
            case[0]: i for i, case in enumerate(self.cases) if len(case) == 1 and isinstance(case[0], Head)
        }

    def combined(self, name: str, on: Sequence[int], terms: Sequence[Terms]) -> Tally:
        """Of rows: a variable, added up over each row's cases, token by token on the top share of its case in `on`."""
        entries, row = self._entries(on)
        found = np.zeros(entries.size)
        for place in range(max(map(len, terms))):
            padded = [each[place] if place < len(each) else (0, each[0][1]) for each in terms]
            sign, case = (np.array(column)[row] for column in zip(*padded, strict=True))
            values = values_at(self.ds, name, case, self.top.token[entries])
            require_known(name, bool(np.isnan(values).any()))
            found += sign * values
        signed = QUANTITIES[name].units == "logit"
        return self._tally(entries, row, found * self.top.sign[entries] if signed else found, len(on))

    def responses(self, on: Sequence[int], ablated: Sequence[int], heads: Sequence[Head]) -> Tally:
        """Of rows: the change of direct effect of a head of `heads` in the run of a case of `ablated`, on those tokens.

        Raises:
            UsageError: component changes are those of each case's own top share alone.
        """
        if json.loads(self.ds.attrs.get("settings", "{}")).get("components") == "top":
            raise UsageError(
                "this store holds component changes of top tokens alone: run without --components top"
            )
        entries, row = self._entries(on)
        component, case = np.array([self.component(head) for head in heads])[row], np.array(ablated)[row]
        asked, found = Top(case, self.top.token[entries], case, case), np.zeros(entries.size)
        for some, changes in rows(self.ds.component_change, asked):
            found[some] = changes[np.arange(some.size), component[some]]
        require_known("component_change", bool(np.isnan(found).any()))
        return self._tally(entries, row, found * self.top.sign[entries], len(on))

    def component(self, head: Head) -> int:
        """Where a head stands among the components."""
        here = (self.ds.component_layer.values == head.layer) & (self.ds.component_head.values == head.head)
        return int(np.flatnonzero(here)[0])

    def _entries(self, on: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The entries of the top share that rows are over, in order of token, and the row of each."""
        found = [np.flatnonzero(self.top.case == case) for case in on]
        entries, row = np.concatenate(found), np.repeat(np.arange(len(on)), [len(each) for each in found])
        order = np.argsort(self.top.token[entries], kind="stable")
        return entries[order], row[order]

    def _tally(self, entries: np.ndarray, row: np.ndarray, values: np.ndarray, count: int) -> Tally:
        prompt = self.top.token[entries] // self.ds.sizes["position"]
        shape = (count, self.done.shape[1])
        return entry_tally(row * shape[1] + prompt, values, shape, self.clusters)

    def told(self) -> dict:
        """Attributes of a summary: those of the store, what its means are over and how well they are known."""
        tokens = int((self.top.case == 0).sum())
        found = {"share": self.share, "prompts": int(self.done[0].sum()), "tokens_each": tokens}
        if splits(self.ds):
            selecting = done_cases(halves(self.ds)["selecting"]).all(0).sum()
            found |= {"prompts_selecting": int(selecting), "prompts_reporting": found["prompts"]}
        known = clustering(self.ds) | closure(self.ds) | verdict(self.ds)
        return self.ds.attrs | found | known


def require_joint(ds: xr.Dataset, recipe: str, *names: str) -> xr.Dataset:
    """UsageError unless a dataset is a store of cases with these variables, as this recipe makes it."""
    if "case" not in ds.coords or sites(ds) != ("case",) or any(name not in ds for name in names):
        raise UsageError(
            f"this store has no heads that are ablated alone and together as this needs it: run {recipe}"
        )
    return ds
