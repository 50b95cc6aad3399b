"""Which tokens a mean is over, and the mean as variables of a summary: with its interval, of heads and of groups."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from selfrepair_nn.blocks import Top, counted_tokens, direct_effects, done_cases, sites, token_counts
from selfrepair_nn.choosing import in_half
from selfrepair_nn.confidence import CLUSTERS, Estimate, Tally, clusters_of

HALF_WIDTH, BATCHES = "_half_width", 100
Columns = dict[str, tuple[tuple[str, ...], np.ndarray]]


@dataclass(frozen=True)
class Groups:
    """Groups of cases whose means are wanted: `index` [case] from 0, -1 for none; of `count` along `dims`."""

    dims: tuple[str, ...]
    index: np.ndarray
    count: int


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a store a mean is over: all that are done and counted, and each case's top share of these.

    `counts` and `top_counts` are numbers of tokens [case, prompt]; `done` is bool [case, prompt]; `at` is where each
    entry of `top` belongs in such an array, flattened; `clusters` names each prompt's cluster.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    done: np.ndarray
    counts: np.ndarray
    top: Top
    at: np.ndarray
    clusters: np.ndarray
    groups: Mapping[str, Groups]

    @classmethod
    def of(
        cls, ds: xr.Dataset, share: float, groups: Mapping[str, Groups] | None = None
    ) -> tuple["Tokens", np.ndarray]:
        """The tokens of a store, and the sums [case, prompt] of the direct effects, which this reads.

        All cases are summed up too, of a grid of heads each layer's, and further `groups`. Errors as `direct_effects`.
        """
        done, dims = done_cases(ds), sites(ds)
        sums, top = direct_effects(ds, done, share)
        at = top.case * done.shape[1] + top.token // ds.sizes["position"]
        shape = tuple(ds.sizes[d] for d in dims)
        every = _usual(shape, np.any(done, axis=1)) | dict(groups or {})
        return cls(dims, shape, done, token_counts(ds, done), top, at, clusters(ds), every), sums

    @property
    def top_counts(self) -> np.ndarray:
        return np.bincount(self.at, minlength=self.done.size).reshape(self.done.shape)

    def tally(self, sums: np.ndarray) -> Tally:
        """Of sums [case, prompt] over all counted tokens."""
        return Tally.of_prompts(sums, self.counts, self.clusters)

    def top_tally(self, chosen: np.ndarray) -> Tally:
        """Of values on the entries of the top share."""
        return entry_tally(self.at, chosen, self.done.shape, self.clusters)

    def both(self, name: str, sums: np.ndarray, chosen: np.ndarray) -> dict[str, Tally]:
        """Over all counted tokens under its name, and over the top share under top_ and its name."""
        return {name: self.tally(sums), f"top_{name}": self.top_tally(chosen)}

    def columns(self, name: str, known: Estimate) -> Columns:
        """The mean and its half-width of each case, and the half-widths of the groups' means of means.

        `name` and `name`_half_width, over the sites; for each of the groups GROUP_`name`_half_width.
        """
        found = {name: (self.dims, known.mean.reshape(self.shape))}
        found[name + HALF_WIDTH] = (self.dims, known.half_width.reshape(self.shape))
        for label, group in self.groups.items():
            width = known.of_groups(group.index, group.count).half_width
            found[f"{label}_{name}{HALF_WIDTH}"] = (group.dims, width if group.dims else width[0])
        return found


def entry_tally(at: np.ndarray, values: np.ndarray, shape: tuple[int, int], clusters: np.ndarray) -> Tally:
    """Of values [entry]; `at` is where each belongs in an array [case, prompt] of this shape, flattened."""
    sums, counts = (
        np.bincount(at, weights, shape[0] * shape[1]).reshape(shape) for weights in (values, None)
    )
    return Tally.of_prompts(sums, counts, clusters)


def batches(clusters: np.ndarray) -> np.ndarray:
    """Whole clusters joined, neighbours first, to at most BATCHES, where very many means are wanted: [prompt]."""
    count = int(clusters.max()) + 1
    return clusters * BATCHES // count if count > BATCHES else clusters


def clusters(ds: xr.Dataset) -> np.ndarray:
    """Index of the cluster of each prompt of a store: its document, or itself: [prompt]."""
    if "document" in ds.variables:
        return clusters_of(ds.document.values, np.any(counted_tokens(ds), axis=1) & in_half(ds))
    return np.arange(ds.sizes["prompt"])


def clustering(ds: xr.Dataset) -> dict[str, str | int]:
    """Attributes of a summary: what its intervals take as independent ("document" or "prompt"), and how many.

    documents is the number of documents, 0 where the store does not tell. Prompts without a counted token are none of
    them, nor are those of the half that selects.
    """
    asked = counted_tokens(ds).any(1) & in_half(ds)
    documents = np.unique(ds.document.values[asked]).size if "document" in ds.variables else 0
    kind = "document" if documents >= CLUSTERS else "prompt"
    count = np.unique(clusters(ds)[asked]).size
    return {"clustered_by": kind, "clusters": int(count), "documents": int(documents)}


def _usual(shape: tuple[int, ...], known: np.ndarray) -> dict[str, Groups]:
    overall = {"overall": Groups((), np.where(known, 0, -1), 1)}
    if len(shape) == 1:
        return overall
    layer = np.repeat(np.arange(shape[0]), shape[1])
    return {"layer": Groups(("layer",), np.where(known, layer, -1), shape[0])} | overall
