"""A store read once through, one block of prompts at a time: exact top shares, sums by prompt, extremes.

Blocks are whole chunks as they were written, so nothing is decompressed twice. A case is one ablated head: a
layer and a head, flattened. A token is a prompt and a position, flattened. Only what is marked `done` counts, and of
that only the tokens that are `counted`: what stands at the others is never looked at. Nothing is averaged over holes: a
blank in what counts, and a store that lost a chunk, are a StoreError.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.choosing import along, halves, in_half, ranked_by, splits, tail_of
from selfrepair_nn.description import ranked
from selfrepair_nn.errors import StoreError, UsageError
from selfrepair_nn.integrity import require_source
from selfrepair_nn.padding import within
from selfrepair_nn.quantities import IN_NATS, QUANTITIES, SWEEP, TOKEN, VARIANCE, asked_in

BLOCK = 2**22  # values held at once
Ranked = tuple[np.ndarray, np.ndarray]  # values, tokens
NOTHING: Ranked = (np.empty(0), np.empty(0, int))


@dataclass(frozen=True)
class Top:
    """The top tokens of every case, in order of token, with their direct effects (float64).

    Where the tokens are ranked by another variable, `effect` is that. `sign` is 1, or -1 where an entry counts with the
    other sign (`choosing.along`): `effect` and everything in logits is to be multiplied by it.
    """

    case: np.ndarray
    token: np.ndarray
    effect: np.ndarray
    sign: np.ndarray

    def pick(self, start: int, values: np.ndarray, first_case: int = 0) -> tuple[slice, np.ndarray]:
        """The entries in a block of `values` [case, prompt, position, …] from prompt `start`, and the values."""
        n_cases, n_prompts, n_positions = values.shape[:3]
        first = start * n_positions
        within = slice(*np.searchsorted(self.token, (first, first + n_prompts * n_positions)))
        flat = values.reshape(n_cases, n_prompts * n_positions, *values.shape[3:])
        return within, flat[self.case[within] - first_case, self.token[within] - first]

    def of(self, chosen: np.ndarray) -> "Top":
        """Only the chosen entries: indices, or a bool for each."""
        return Top(self.case[chosen], self.token[chosen], self.effect[chosen], self.sign[chosen])


def sites(ds: xr.Dataset) -> tuple[str, ...]:
    """The dimensions along which a store's ablated runs lie."""
    return ("case",) if "case" in ds.dims else SWEEP[:2]


def counted_tokens(ds: xr.Dataset) -> np.ndarray:
    """Which tokens count: bool [prompt, position]; all of them in a store that does not say."""
    if "counted" in ds:
        return ds.variables["counted"].transpose(*TOKEN).values
    return np.ones([ds.sizes[d] for d in TOKEN], bool)


def text_tokens(ds: xr.Dataset) -> np.ndarray:
    """Which tokens can count: bool [prompt, position]; of texts of unequal length not what stands behind them."""
    if "text_positions" in ds:
        return within(ds.text_positions.values, ds.sizes["position"])
    return np.ones([ds.sizes[d] for d in TOKEN], bool)


def counted_share(ds: xr.Dataset) -> float:
    """The share of the tokens that can count which does."""
    return float(counted_tokens(ds).sum() / text_tokens(ds).sum())


def done_cases(ds: xr.Dataset) -> np.ndarray:
    """What counts: bool [case, prompt]; a prompt without a counted token, or of the other half, does not.

    Raises:
        StoreError: the store that `ds` comes from is not whole.
    """
    require_source(ds)
    done = _done(ds) & in_half(ds)
    for name in ("noise_floor", "threshold") if _ranks(ds) else ("noise_floor",):
        if name in ds:
            begun = _marked(ds).any("prompt")
            require_known(name, bool((ds.variables[name].isnull() & begun).any()))
    return done


def require_known(name: str, lost: bool | np.ndarray, start: int = 0) -> None:
    """Raise StoreError where what is done is blank; `lost` is a bool, or one for each prompt from `start` on."""
    if np.any(lost):
        where = "" if np.ndim(lost) == 0 else f" of prompt {start + int(np.flatnonzero(lost)[0])}"
        raise StoreError(
            f"{name}{where} is blank though it is marked done: the store has lost a part of it. "
            "Run the command that made it again: it computes that anew"
        )


def clean_values(ds: xr.Dataset, name: str) -> np.ndarray:
    """A variable of the clean run: [prompt, position]. StoreError if it is blank where something counts."""
    values = ds.variables[name].transpose(*TOKEN).values
    require_known(name, np.any(np.isnan(values) & counted_tokens(ds), axis=-1) & np.any(_done(ds), axis=0))
    return values


def _marked(ds: xr.Dataset) -> xr.Variable:
    """Which cases of which prompts are chosen and done."""
    return ds.variables["done"] & ds.variables["selected"]


def _done(ds: xr.Dataset) -> np.ndarray:
    done = _marked(ds).transpose(*sites(ds), "prompt").values
    return done.reshape(-1, done.shape[-1]) & counted_tokens(ds).any(1)


def token_counts(ds: xr.Dataset, done: np.ndarray) -> np.ndarray:
    """How many tokens count: int [case, prompt]."""
    return done * counted_tokens(ds).sum(1)


def direct_effects(
    ds: xr.Dataset, done: np.ndarray, share: float, by: str = "direct_effect", tail: str | None = None
) -> tuple[np.ndarray, Top]:
    """The sums [case, prompt] of the direct effects, and each case's share of tokens at its tail, in one reading.

    `by` names another variable to be summed and ranked by, at the top unless a `tail` is named.

    The share is exactly max(1, floor(share n)) of a case's n counted tokens, the first of equals, NaN last; none if n
    is 0. Where the half of a dataset is reported it is what reaches the least that the other half's share holds, or
    else the one that comes nearest. A store that was ranked beforehand (`--select`, `--until-ci`) holds direct effects
    of every counted token: there it is that share of the whole run, as far as it is done; where some prompts
    alone are left of the run, what it did not store does not count.

    Raises:
        UsageError: the store does not keep these tokens.
    """
    tail = tail or (tail_of(ds) if by == "direct_effect" else "top")
    require_kept(ds, share, tail)
    whole_run = _ranks(ds) and by == "direct_effect"
    begun = np.any(done, axis=1)[:, None]
    over = begun & in_half(ds) if whole_run else done
    if splits(ds) and share < 1:
        other = halves(ds)["selecting"]
        known = begun & in_half(other) & (True if whole_run else _done(ds))
        sums, top = _reaching(ds, over, by, tail, _limits(ds, known, share, by, tail))
    else:
        sums, top = _ranked(ds, over, share, by, tail)
    if whole_run:
        counted = done[top.case, top.token // ds.sizes["position"]]
        if "kept_share" in ds.attrs:
            counted &= top.effect >= ds.threshold.transpose(*sites(ds)).values.ravel()[top.case]
        sums, top = np.where(done, sums, 0), top.of(counted)
    elif asked_in(ds) == "logprob" and "kept_share" in ds.attrs:
        top = _stored(ds, top)
    return sums, top


def _ranks(ds: xr.Dataset) -> bool:
    """Whether the direct effects of all tokens were known before anything was ablated, and the thresholds from them."""
    return "threshold" in ds and ranked(ds.attrs)


def _stored(ds: xr.Dataset, top: Top) -> Top:
    """The entries that are kept: of part of a run some of its top tokens lay below the whole run's threshold."""
    kept = np.zeros(top.token.size, bool)
    for start, values in _blocks(ds, "self_repair"):
        within, picked = top.pick(start, values)
        kept[within] = np.isfinite(picked)
    return top.of(kept)


def _limits(ds: xr.Dataset, done: np.ndarray, share: float, by: str, tail: str) -> np.ndarray:
    """What the last of each case's share of what is `done` is ranked by: [case]; infinite where nothing is.

    Raises:
        UsageError: the store does not keep all other tokens that reach it.
    """
    _, top = _ranked(ds, done, share, by, tail)
    limits = np.full(len(done), np.inf)
    np.minimum.at(limits, top.case, ranked_by(top.effect, tail))
    if ds.attrs.get("kept_share", 1) < 1 and (limits < _kept_limits(ds, by)).any():
        remedy = "with --logprob all" if asked_in(ds) == "logprob" else "without --select top-share"
        raise UsageError(
            f"selecting on half of the documents needs tokens beyond the top {ds.attrs['kept_share']:g} that this "
            f"store keeps: give a smaller share, such as {share / 2:g}, or run {remedy}"
        )
    return limits


def _kept_limits(ds: xr.Dataset, by: str) -> np.ndarray:
    """The least direct effect of which a store keeps all that the ablation did: [case]."""
    if _ranks(ds):
        return ds.threshold.transpose(*sites(ds)).values.ravel()
    _, top = _ranked(ds, _done(ds), ds.attrs["kept_share"], by, "top")
    limits = np.full(np.prod([ds.sizes[d] for d in sites(ds)]), np.inf)
    np.minimum.at(limits, top.case, top.effect)
    return limits


def _reaching(
    ds: xr.Dataset, done: np.ndarray, by: str, tail: str, limits: np.ndarray
) -> tuple[np.ndarray, Top]:
    """As `_ranked`, of the tokens that reach each case's limit; of one at least."""
    sums, one = _ranked(ds, done, np.finfo(float).tiny, by, tail)
    n_positions, asked = ds.sizes["position"], counted_tokens(ds)
    found: list[list[Ranked]] = [[] for _ in done]
    for start, values in _blocks(ds, by):
        here = slice(start, start + values.shape[1])
        for case in np.flatnonzero(done[:, here].any(1)):
            counted = np.flatnonzero(done[case, here, None] & asked[here])
            fresh = values[case].ravel()[counted].astype(float)
            reach = ranked_by(fresh, tail) >= limits[case]
            found[case].append((fresh[reach], counted[reach] + start * n_positions))
    best = [_joined(parts) for parts in found]
    for case, token, effect in zip(one.case, one.token, one.effect, strict=True):
        if not best[case][0].size:
            best[case] = np.array([effect]), np.array([token])
    return sums, _gather(best, tail)


def _joined(parts: Sequence[Ranked]) -> Ranked:
    values, tokens = zip(NOTHING, *parts, strict=True)
    return np.concatenate(values), np.concatenate(tokens)


def require_kept(ds: xr.Dataset, share: float = 1, tail: str = "top") -> None:
    """Raise UsageError if the store does not keep so large a share of tokens at this tail; 1 means every token."""
    kept = ds.attrs.get("kept_share", 1)
    if kept < 1 and tail != "top" and asked_in(ds) == "logprob":
        raise UsageError(
            f"this store keeps the log-probability of each head's top {kept:g} of tokens: for the tail {tail!r} run "
            "with --logprob all"
        )
    if kept < 1 and tail != "top":
        raise UsageError(
            f"this store keeps each head's top {kept:g} of tokens, and nothing was ablated on others: for the tail "
            f"{tail!r} run without --select top-share"
        )
    if share > kept:
        asked = "every token" if share == 1 else f"share {share:g}"
        if asked_in(ds) == "logprob":
            raise UsageError(
                f"this store keeps the log-probability of each head's top {kept:g} of tokens, not of {asked}: run with "
                "--logprob all"
            )
        raise UsageError(
            f"this store keeps each head's top {kept:g} of tokens, not {asked}: run without --select top-share"
        )


def _ranked(ds: xr.Dataset, done: np.ndarray, share: float, by: str, tail: str) -> tuple[np.ndarray, Top]:
    n_positions, asked = ds.sizes["position"], counted_tokens(ds)
    wanted = _wanted(token_counts(ds, done).sum(1), share)
    sums = np.zeros(done.shape)
    best = [NOTHING] * len(done)
    for start, values in _blocks(ds, by):
        here = slice(start, start + values.shape[1])
        sums[:, here] = _done_sums(values, done[:, here], asked[here])
        for case in np.flatnonzero(done[:, here].any(1)):
            counted = np.flatnonzero(done[case, here, None] & asked[here])
            fresh = values[case].ravel()[counted].astype(float)
            best[case] = _best(best[case], fresh, counted + start * n_positions, wanted[case], tail)
    return sums, _gather(best, tail)


def read(ds: xr.Dataset, name: str, done: np.ndarray, top: Top) -> tuple[np.ndarray, np.ndarray]:
    """The sums [case, prompt] of a variable, and its values on the entries of `top`, in float64.

    What is a part or a change of the target's logit or log-probability has there the sign with which each entry counts.
    """
    sums, chosen, asked = np.zeros(done.shape), np.empty(top.token.size), counted_tokens(ds)
    for start, values in _blocks(ds, name):
        here = slice(start, start + values.shape[1])
        sums[:, here] = _done_sums(values, done[:, here], asked[here])
        within, picked = top.pick(start, values)
        chosen[within] = picked
    require_known(name, bool(np.isnan(chosen).any()))
    of_target = QUANTITIES[name].units == "logit" or name in IN_NATS.values()
    return sums, chosen * top.sign if of_target else chosen


def values_at(ds: xr.Dataset, name: str, case: np.ndarray, token: np.ndarray) -> np.ndarray:
    """A variable of each case at tokens in ascending order: [entry], in float64; NaN where the store has none."""
    found, n_positions = np.empty(token.size), ds.sizes["position"]
    for start, values in _blocks(ds, name):
        first, last = start * n_positions, (start + values.shape[1]) * n_positions
        here = slice(*np.searchsorted(token, (first, last)))
        flat = values.reshape(len(values), -1)
        found[here] = flat[case[here], token[here] - first]
    return found


def sums(ds: xr.Dataset, name: str, done: np.ndarray) -> np.ndarray:
    """The sums [case, prompt] of a variable."""
    found, asked = np.zeros(done.shape), counted_tokens(ds)
    for start, values in _blocks(ds, name):
        here = slice(start, start + values.shape[1])
        found[:, here] = _done_sums(values, done[:, here], asked[here])
    return found


def ratio_sums(ds: xr.Dataset, name: str, other: str, done: np.ndarray) -> np.ndarray:
    """The sums [case, prompt] of one variable divided by another on each token; a division by 0 counts as 0."""
    sums, asked = np.zeros(done.shape), counted_tokens(ds)
    for (start, above), (_, below) in zip(_blocks(ds, name), _blocks(ds, other), strict=True):
        here = slice(start, start + above.shape[1])
        sums[:, here] = _done_sums(ratios(above, below), done[:, here], asked[here])
    return sums


def ratios(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Elementwise quotient in float64; 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros(above.shape), where=below != 0, dtype=float)


def together(ds: xr.Dataset, names: Sequence[str]) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Several variables side by side, a block of prompts at a time: [case, prompt, position] each, in float64.

    0 where not done or not counted. Raises UsageError if not every token is kept.
    """
    require_kept(ds)
    done, asked = done_cases(ds), counted_tokens(ds)
    for blocks in zip(*(_blocks(ds, name) for name in names), strict=True):
        start, first = blocks[0]
        here = slice(start, start + first.shape[1])
        counted = done[:, here, None] & asked[here]
        yield here, [np.where(counted, values, 0).astype(float) for _, values in blocks]


def clean_ratios(
    ds: xr.Dataset, clean: str, ablated: str, done: np.ndarray, top: Top
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a variable of the clean run [prompt, position] divided by one of the ablated runs, on each token.

    Returns the sums and the numbers above 1, both [case, prompt], and the quotients on the entries of `top`.
    """
    sums, above, chosen = np.zeros(done.shape), np.zeros(done.shape), np.empty(top.token.size)
    asked, before = counted_tokens(ds), clean_values(ds, clean)
    for start, below in _blocks(ds, ablated):
        here = slice(start, start + below.shape[1])
        found = ratios(np.broadcast_to(before[here], below.shape), below)
        sums[:, here] = _done_sums(found, done[:, here], asked[here])
        above[:, here] = _done_sums(found > 1, done[:, here], asked[here])
        within, picked = top.pick(start, found)
        chosen[within] = picked
    require_known(ablated, bool(np.isnan(chosen).any()))
    return sums, above, chosen


def tokens_of(ds: xr.Dataset, name: str, cases: np.ndarray) -> np.ndarray:
    """The values [case, prompt, position] of a few cases, in float64: NaN where not done or not counted.

    Raises:
        UsageError: not every one is kept.
    """
    require_kept(ds)
    values = np.concatenate([block[cases] for _, block in _blocks(ds, name)], axis=1)
    return np.where(done_cases(ds)[cases, :, None] & counted_tokens(ds), values.astype(float), np.nan)


def edited_of(ds: xr.Dataset, name: str) -> np.ndarray:
    """A variable at each prompt's edited position: [case, prompt], in float64; counted or not."""
    where = ds.edited_position.values
    parts = []
    for start, values in _blocks(ds, name):
        here = where[start : start + values.shape[1]]
        parts.append(np.take_along_axis(values, here[None, :, None], 2)[..., 0].astype(float))
    return np.concatenate(parts, axis=1)


def edited_cases(ds: xr.Dataset) -> np.ndarray:
    """What counts at the edited positions: bool [case, prompt]."""
    where = ds.edited_position.values[:, None]
    return done_cases(ds) & np.take_along_axis(counted_tokens(ds), where, 1)[:, 0]


def component_sums(
    ds: xr.Dataset, top: Top, clusters: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each layer of ablated heads with an entry of `top` that is stored: its place, sums of the components' changes
    over these entries [head, component, cluster], and how many entries they are [head, cluster]. Of a store of cases
    for each case, as if it were a layer of one head.

    `clusters` names each prompt's cluster.
    """
    n_heads, shape = ds.sizes.get("head", 1), (ds.sizes["component"], int(clusters.max()) + 1)
    stored = (part for part in stored_rows(ds.component_change, top) if part[0].size)
    for layer, parts in groupby(stored, lambda part: int(top.case[part[0][0]]) // n_heads):
        sums, counts = np.zeros((n_heads, *shape)), np.zeros((n_heads, shape[1]))
        for entries, changes in parts:
            changes = changes * top.sign[entries, None]
            head, cluster = top.case[entries] % n_heads, clusters[top.token[entries] // ds.sizes["position"]]
            at: Any = (head, slice(None), cluster)
            np.add.at(sums, at, changes)
            np.add.at(counts, (head, cluster), 1)
        yield layer, sums, counts


def stored_rows(array: xr.DataArray, top: Top) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What `rows` gives, in float64, without the entries that were not stored."""
    for entries, values in rows(array, top):
        stored = np.isfinite(values).all(-1)
        yield entries[stored], values[stored].astype(float)


def rows(array: xr.DataArray, top: Top) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Entries of `top` and what a variable of more dimensions than a token's holds for them: [entry], [entry, …].

    Read one layer (or case) and one chunk of prompts at a time; what holds no entry is not read.
    """
    dims = ("case", *TOKEN) if "case" in array.dims else SWEEP
    values = array.variable.transpose(*(d for d in dims if d in array.dims), ...)
    n_heads, n_positions = (array.sizes.get(d, 1) for d in ("head", "position"))
    step = array.encoding.get("preferred_chunks", {}).get("prompt", 1)
    layer, chunk = top.case // n_heads, top.token // n_positions // step
    for at in sorted({*zip(layer.tolist(), chunk.tolist(), strict=True)}):
        entries, start = np.flatnonzero((layer == at[0]) & (chunk == at[1])), at[1] * step
        here = {dims[0]: [at[0]], "prompt": slice(start, start + step)}
        block = _whole(values.isel(here, missing_dims="ignore"), dims)
        block = block.reshape(-1, *block.shape[len(dims) - 2 :])
        yield entries, top.of(entries).pick(start, block, at[0] * n_heads)[1]


def entries_of(array: xr.DataArray, top: Top) -> np.ndarray:
    """What such a variable holds for every entry of `top`, all at once: [entry, …]."""
    beyond = [size for d, size in array.sizes.items() if d not in SWEEP]
    found = np.empty((top.token.size, *beyond), array.dtype)
    for entries, values in rows(array, top):
        found[entries] = values
    require_known(str(array.name), bool((found < 0).any() if found.dtype.kind == "i" else np.isnan(found).any()))
    return found


def largest(ds: xr.Dataset, name: str, done: np.ndarray) -> np.ndarray:
    """The largest absolute value of a variable, over (case); NaN where nothing is done."""
    found, asked = np.zeros(len(done)), counted_tokens(ds)
    for start, values in _blocks(ds, name):
        here = slice(start, start + values.shape[1])
        sizes = np.where(asked[here], np.abs(values), 0)
        by_prompt = np.fmax.reduce(sizes, -1)  # NaN where a top share alone is kept
        found = np.fmax(found, np.fmax.reduce(np.where(done[:, here], by_prompt, 0), 1))
    return np.where(done.any(1), found, np.nan)


def _blocks(ds: xr.Dataset, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """A variable's values [case, prompt, position] in blocks of whole chunks, each with its first prompt."""
    dims, done, asked = (*sites(ds), *TOKEN), _done(ds), counted_tokens(ds)
    array, n_prompts = ds.variables[name], ds.sizes["prompt"]
    array = array.transpose(*(d for d in dims if d in array.dims))
    chunk = array.encoding.get("preferred_chunks", {}).get("prompt", 1)
    step = chunk * max(1, BLOCK * n_prompts // max(1, array.size * chunk))
    for start in range(0, n_prompts, step):
        here = slice(start, start + step)
        block = _whole(array.isel(prompt=here, missing_dims="ignore"), dims)
        block = block.reshape(-1, *block.shape[-2:])
        if name == "direct_effect" or not ("kept_share" in ds.attrs or of_top_tokens(ds, name)):
            lost = np.isnan(_done_sums(block, done[:, here], asked[here]))
            require_known(name, np.any(lost, axis=0), start)
        yield start, block


def of_partners(ds: xr.Dataset, name: str) -> Iterator[tuple[slice, np.ndarray, np.ndarray | None]]:
    """A variable that several partners give, by blocks of prompts: which, and [partner, case, prompt, position].

    Of a store of moments their mean alone, with its variances [case, prompt, position], else None.
    """
    if f"{name}{VARIANCE}" in ds:
        for (start, mean), (_, spread) in zip(_blocks(ds, name), _blocks(ds, f"{name}{VARIANCE}"), strict=True):
            yield slice(start, start + mean.shape[1]), mean[None].astype(float), spread.astype(float)
        return
    array, dims = ds.variables[f"{name}_by_partner"], ("resample", *sites(ds), *TOKEN)
    array = array.transpose(*(d for d in dims if d in array.dims))
    chunk = array.encoding.get("preferred_chunks", {}).get("prompt", 1)
    step = chunk * max(1, BLOCK * ds.sizes["prompt"] // max(1, array.size * chunk))
    for start in range(0, ds.sizes["prompt"], step):
        here = slice(start, min(start + step, ds.sizes["prompt"]))
        values = _whole(array.isel(prompt=here, missing_dims="ignore"), dims).astype(float)
        yield here, values.reshape(len(values), -1, *values.shape[-2:]), None


def of_top_tokens(ds: xr.Dataset, name: str) -> bool:
    """Whether a variable is kept for each head's top tokens alone, and blank elsewhere."""
    large = name in QUANTITIES and QUANTITIES[name].large
    return large and json.loads(ds.attrs.get("settings", "{}")).get("logprob") != "all"


def _whole(array: xr.Variable, dims: tuple[str, ...]) -> np.ndarray:
    """The values of an array in order, with all these dimensions and the others."""
    beyond = [size for d, size in array.sizes.items() if d not in dims]
    return array.values.reshape(*(array.sizes.get(d, 1) for d in dims), *beyond)


def _done_sums(values: np.ndarray, done: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Sums [case, prompt] over the `asked` tokens [prompt, position] of what is `done` [case, prompt]."""
    where = True if asked.all() else asked  # NumPy is slower where it must look
    return np.where(done, values.sum(-1, dtype=float, where=where), 0)


def _wanted(tokens: np.ndarray, share: float) -> np.ndarray:
    return np.where(tokens, np.maximum(1, (share * tokens).astype(int)), 0)


def _best(best: Ranked, fresh: np.ndarray, tokens: np.ndarray, count: int, tail: str) -> Ranked:
    """The `count` first at a tail of the best so far and of fresh, later tokens, in order of token."""
    values, kept = np.concatenate([best[0], fresh]), np.concatenate([best[1], tokens])
    if values.size <= count:
        return values, kept
    ranked = np.where(np.isnan(values), -np.inf, ranked_by(values, tail))
    least = np.partition(ranked, -count)[-count]
    chosen = ranked > least
    chosen[np.flatnonzero(ranked == least)[: count - chosen.sum()]] = True
    return values[chosen], kept[chosen]


def _gather(best: list[Ranked], tail: str) -> Top:
    case = np.repeat(np.arange(len(best)), [len(tokens) for _, tokens in best])
    effect, token = (np.concatenate(parts) for parts in zip(*best, strict=True))
    order = np.argsort(token, kind="stable")
    return Top(case[order], token[order], effect[order], along(effect[order], tail))
