"""A store read once through, one block of prompts at a time: exact top shares, sums by prompt, extremes.

Blocks are whole chunks as they were written, so nothing is decompressed twice. A case is one ablated head: a
layer and a head, flattened. A token is a prompt and a position, flattened. Only what is marked `done` counts, and
nothing is averaged over holes: a blank in what is done, and a store that lost a chunk, are a StoreError.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from selfrepair_nn.errors import StoreError, UsageError
from selfrepair_nn.integrity import require_source
from selfrepair_nn.variables import SWEEP, TOKEN

BLOCK = 2**22  # values held at once


@dataclass(frozen=True)
class Top:
    """The top tokens of every case, in order of token, with their direct effects (float64).

    Where the tokens are ranked by another variable, `effect` is that.
    """

    case: np.ndarray
    token: np.ndarray
    effect: np.ndarray

    def pick(self, start: int, values: np.ndarray, first_case: int = 0) -> tuple[slice, np.ndarray]:
        """The entries in a block of `values` [case, prompt, position, …] from prompt `start`, and the values."""
        n_cases, n_prompts, n_positions = values.shape[:3]
        first = start * n_positions
        within = slice(*np.searchsorted(self.token, (first, first + n_prompts * n_positions)))
        flat = values.reshape(n_cases, n_prompts * n_positions, *values.shape[3:])
        return within, flat[self.case[within] - first_case, self.token[within] - first]

    def of(self, chosen: np.ndarray) -> "Top":
        """Only the chosen entries: indices, or a bool for each."""
        return Top(self.case[chosen], self.token[chosen], self.effect[chosen])


@dataclass(frozen=True)
class Sums:
    """Sums of a variable and numbers of tokens, both over (case, prompt)."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Mean over tokens, over (case); NaN where there are none."""
        with np.errstate(invalid="ignore"):
            return self.sums.sum(1) / self.counts.sum(1)

    def error(self, done: np.ndarray) -> np.ndarray:
        """Standard error of the mean, over (case): a ratio of two sums over independent prompts, linearised.

        Where prompts have equally many tokens it is the standard error of their means. NaN below two prompts.
        """
        residual = self.sums - self.counts * self.mean[:, None]
        n = done.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.sqrt((residual**2).sum(1) * n / (n - 1)) / self.counts.sum(1)
        return np.where(n > 1, spread, np.nan)


def sites(ds: xr.Dataset) -> tuple[str, ...]:
    """The dimensions along which a store's ablated runs lie."""
    return ("case",) if "case" in ds.dims else SWEEP[:2]


def done_cases(ds: xr.Dataset) -> np.ndarray:
    """What counts: bool [case, prompt]. StoreError if the store that `ds` comes from is not whole."""
    require_source(ds)
    done = (ds.done & ds.selected).load()
    for name in ("noise_floor", "threshold"):
        if name in ds:
            require_known(name, (ds[name].isnull() & done.any("prompt")).any().item())
    return _flat(ds, done)


def require_known(name: str, lost: bool | np.ndarray, start: int = 0) -> None:
    """Raise StoreError where what is done is blank; `lost` is a bool, or one for each prompt from `start` on."""
    if np.any(lost):
        where = "" if np.ndim(lost) == 0 else f" of prompt {start + int(np.flatnonzero(lost)[0])}"
        raise StoreError(
            f"{name}{where} is blank though it is marked done: the store has lost a part of it. "
            "Run the command that made it again: it computes that anew"
        )


def clean_values(ds: xr.Dataset, name: str) -> np.ndarray:
    """A variable of the clean run: [prompt, position]. StoreError if it is blank where something is done."""
    values = ds[name].transpose(*TOKEN).values
    require_known(name, np.isnan(values).any(-1) & _flat(ds, ds.done & ds.selected).any(0))
    return values


def _flat(ds: xr.Dataset, done: xr.DataArray) -> np.ndarray:
    values = done.transpose(*sites(ds), "prompt").values
    return values.reshape(-1, values.shape[-1])


def direct_effects(
    ds: xr.Dataset, done: np.ndarray, share: float, by: str = "direct_effect"
) -> tuple[np.ndarray, Top]:
    """The sums [case, prompt] of the direct effects, and each case's top `share` of tokens, in one reading.

    `by` names another variable to be summed and ranked by.

    The top share is exactly max(1, floor(share n)) of a case's n done tokens, the first of equals, NaN last;
    none if n is 0. A store with thresholds holds direct effects of every token: there it is that share of the whole
    run, as far as it is done.

    Raises:
        UsageError: the store keeps less of each case's tokens.
    """
    require_kept(ds, share)
    if "threshold" not in ds or by != "direct_effect":
        return _ranked(ds, done, done, share, by)
    sums, top = _ranked(ds, done, np.repeat(done.any(1)[:, None], done.shape[1], 1), share, by)
    return np.where(done, sums, 0), top.of(done[top.case, top.token // ds.sizes["position"]])


def require_kept(ds: xr.Dataset, share: float = 1) -> None:
    """Raise UsageError if the store keeps a smaller share of tokens than this; 1 means every token."""
    kept = ds.attrs.get("kept_share", 1)
    if share > kept:
        asked = "every token" if share == 1 else f"share {share:g}"
        raise UsageError(
            f"this store keeps each head's top {kept:g} of tokens, not {asked}: run without --select top-share"
        )


def _ranked(
    ds: xr.Dataset, done: np.ndarray, known: np.ndarray, share: float, by: str
) -> tuple[np.ndarray, Top]:
    """Sums and top shares of what is `known`, be it done or not: bool [case, prompt]."""
    n_positions = ds.sizes["position"]
    wanted = _wanted(known.sum(1) * n_positions, share)
    sums = np.zeros(known.shape)
    best = [NOTHING] * len(known)
    for start, values in _known_blocks(ds, by, done):
        here = slice(start, start + values.shape[1])
        sums[:, here] = _done_sums(values, known[:, here])
        for case in np.flatnonzero(known[:, here].any(1)):
            counted = np.flatnonzero(np.repeat(known[case, here], n_positions))
            fresh = values[case].ravel()[counted].astype(float)
            best[case] = _best(best[case], fresh, counted + start * n_positions, wanted[case])
    return sums, _gather(best)


def read(ds: xr.Dataset, name: str, done: np.ndarray, top: Top) -> tuple[np.ndarray, np.ndarray]:
    """The sums [case, prompt] of a variable, and its values on the entries of `top`, in float64."""
    sums, chosen = np.zeros(done.shape), np.empty(top.token.size)
    for start, values in _known_blocks(ds, name, done):
        here = slice(start, start + values.shape[1])
        sums[:, here] = _done_sums(values, done[:, here])
        within, picked = top.pick(start, values)
        chosen[within] = picked
    require_known(name, np.isnan(chosen).any())
    return sums, chosen


def sums(ds: xr.Dataset, name: str, done: np.ndarray) -> np.ndarray:
    """The sums [case, prompt] of a variable."""
    found = np.zeros(done.shape)
    for start, values in _known_blocks(ds, name, done):
        here = slice(start, start + values.shape[1])
        found[:, here] = _done_sums(values, done[:, here])
    return found


def ratio_sums(ds: xr.Dataset, name: str, other: str, done: np.ndarray) -> np.ndarray:
    """The sums [case, prompt] of one variable divided by another on each token; a division by 0 counts as 0."""
    sums = np.zeros(done.shape)
    for (start, above), (_, below) in zip(
        _known_blocks(ds, name, done), _known_blocks(ds, other, done), strict=True
    ):
        here = slice(start, start + above.shape[1])
        sums[:, here] = _done_sums(ratios(above, below), done[:, here])
    return sums


def ratios(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Elementwise quotient in float64; 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros(above.shape), where=below != 0, dtype=float)


def together(ds: xr.Dataset, names: Sequence[str]) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Several variables side by side, a block of prompts at a time: [case, prompt, position] each, in float64."""
    require_kept(ds)
    done = _flat(ds, ds.done & ds.selected)
    for blocks in zip(*(_known_blocks(ds, name, done) for name in names), strict=True):
        start, first = blocks[0]
        yield slice(start, start + first.shape[1]), [values.astype(float) for _, values in blocks]


def clean_ratios(
    ds: xr.Dataset, clean: str, ablated: str, done: np.ndarray, top: Top
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a variable of the clean run [prompt, position] divided by one of the ablated runs, on each token.

    Returns the sums and the numbers above 1, both [case, prompt], and the quotients on the entries of `top`.
    """
    sums, above, chosen = np.zeros(done.shape), np.zeros(done.shape), np.empty(top.token.size)
    before = clean_values(ds, clean)
    for start, below in _known_blocks(ds, ablated, done):
        here = slice(start, start + below.shape[1])
        found = ratios(np.broadcast_to(before[here], below.shape), below)
        sums[:, here], above[:, here] = _done_sums(found, done[:, here]), _done_sums(found > 1, done[:, here])
        within, picked = top.pick(start, found)
        chosen[within] = picked
    require_known(ablated, np.isnan(chosen).any())
    return sums, above, chosen


def tokens_of(ds: xr.Dataset, name: str, cases: np.ndarray) -> np.ndarray:
    """Every value [case, prompt, position] of a few cases, in float64. UsageError if not every one is kept."""
    require_kept(ds)
    done = _flat(ds, ds.done & ds.selected)
    return np.concatenate(
        [values[cases].astype(float) for _, values in _known_blocks(ds, name, done)], axis=1
    )


def edited_of(ds: xr.Dataset, name: str) -> np.ndarray:
    """A variable at each prompt's edited position: [case, prompt], in float64."""
    where = ds.edited_position.values
    parts = []
    for start, values in _known_blocks(ds, name, _flat(ds, ds.done & ds.selected)):
        here = where[start : start + values.shape[1]]
        parts.append(np.take_along_axis(values, here[None, :, None], 2)[..., 0].astype(float))
    return np.concatenate(parts, axis=1)


def in_top(values: np.ndarray, share: float) -> np.ndarray:
    """Which of one case's `values` [token] are in its top share: bool [token], as in `direct_effects`."""
    marks = np.zeros(values.size, bool)
    _, kept = _best(NOTHING, values, np.arange(values.size), int(_wanted(np.array(values.size), share)))
    marks[kept] = True
    return marks


def component_sums(ds: xr.Dataset, top: Top) -> tuple[np.ndarray, np.ndarray]:
    """Sums [case, component] of the components' changes over the stored entries of `top`, and how many those are."""
    cases = ds.sizes["layer"] * ds.sizes["head"]
    sums, counts = np.zeros((cases, ds.sizes["component"])), np.zeros(cases, int)
    for entries, changes in stored_rows(ds.component_change, top):
        np.add.at(sums, top.case[entries], changes)
        np.add.at(counts, top.case[entries], 1)
    return sums, counts


def stored_rows(array: xr.DataArray, top: Top) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What `rows` gives, in float64, without the entries that were not stored."""
    for entries, values in rows(array, top):
        stored = np.isfinite(values).all(-1)
        yield entries[stored], values[stored].astype(float)


def rows(array: xr.DataArray, top: Top) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Entries of `top` and what a variable of more dimensions than a token's holds for them: [entry], [entry, …].

    Read one layer and one chunk of prompts at a time; what holds no entry is not read.
    """
    array = array.transpose(*SWEEP, ...)
    n_heads, n_positions = array.sizes["head"], array.sizes["position"]
    step = array.encoding.get("preferred_chunks", {}).get("prompt", 1)
    layer, chunk = top.case // n_heads, top.token // n_positions // step
    for at in sorted({*zip(layer.tolist(), chunk.tolist(), strict=True)}):
        entries, start = np.flatnonzero((layer == at[0]) & (chunk == at[1])), at[1] * step
        values = array[at[0], :, start : start + step].values
        yield entries, top.of(entries).pick(start, values, at[0] * n_heads)[1]


def entries_of(array: xr.DataArray, top: Top) -> np.ndarray:
    """What such a variable holds for every entry of `top`, all at once: [entry, …]."""
    found = np.empty((top.token.size, *array.transpose(*SWEEP, ...).shape[len(SWEEP) :]), array.dtype)
    for entries, values in rows(array, top):
        found[entries] = values
    require_known(array.name, bool((found < 0).any() if found.dtype.kind == "i" else np.isnan(found).any()))
    return found


def largest(ds: xr.Dataset, name: str, done: np.ndarray) -> np.ndarray:
    """The largest absolute value of a variable, over (case); NaN where nothing is done."""
    found = np.zeros(len(done))
    for start, values in _known_blocks(ds, name, done):
        by_prompt = np.fmax.reduce(np.abs(values), -1)  # NaN where a top share alone is kept
        found = np.fmax(
            found, np.fmax.reduce(np.where(done[:, start : start + values.shape[1]], by_prompt, 0), 1)
        )
    return np.where(done.any(1), found, np.nan)


def _known_blocks(ds: xr.Dataset, name: str, done: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """What `_blocks` gives; StoreError where it is blank though it is `done`, bool [case, prompt]."""
    full = name == "direct_effect" or "kept_share" not in ds.attrs
    for start, values in _blocks(ds, name):
        if full:
            lost = np.isnan(values.sum(-1)) & done[:, start : start + values.shape[1]]
            require_known(name, lost.any(0), start)
        yield start, values


def _blocks(ds: xr.Dataset, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """A variable's values [case, prompt, position] in blocks of whole chunks, each with its first prompt."""
    array = ds[name].transpose(*sites(ds), *TOKEN)
    n_prompts = array.sizes["prompt"]
    chunk = array.encoding.get("preferred_chunks", {}).get("prompt", 1)
    step = chunk * max(1, BLOCK * n_prompts // max(1, array.size * chunk))
    for start in range(0, n_prompts, step):
        block = array.isel(prompt=slice(start, start + step)).values
        yield start, block.reshape(-1, *block.shape[-2:])


def _done_sums(values: np.ndarray, done: np.ndarray) -> np.ndarray:
    return np.where(done, values.sum(-1, dtype=float), 0)


Ranked = tuple[np.ndarray, np.ndarray]  # values, tokens
NOTHING: Ranked = (np.empty(0), np.empty(0, int))


def _wanted(tokens: np.ndarray, share: float) -> np.ndarray:
    return np.where(tokens, np.maximum(1, (share * tokens).astype(int)), 0)


def _best(best: Ranked, fresh: np.ndarray, tokens: np.ndarray, count: int) -> Ranked:
    """The `count` highest of the best so far and of fresh, later tokens, in order of token."""
    values, kept = np.concatenate([best[0], fresh]), np.concatenate([best[1], tokens])
    if values.size <= count:
        return values, kept
    ranked = np.where(np.isnan(values), -np.inf, values)
    least = np.partition(ranked, -count)[-count]
    chosen = ranked > least
    chosen[np.flatnonzero(ranked == least)[: count - chosen.sum()]] = True
    return values[chosen], kept[chosen]


def _gather(best: list[Ranked]) -> Top:
    case = np.repeat(np.arange(len(best)), [len(tokens) for _, tokens in best])
    effect, token = (np.concatenate(parts) for parts in zip(*best, strict=True))
    order = np.argsort(token, kind="stable")
    return Top(case[order], token[order], effect[order])
