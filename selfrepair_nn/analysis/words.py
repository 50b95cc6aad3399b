"""What heads and the changes of components promote and demote, in words; and whether these stand in the context."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import among, of_heads, percent, require, require_top, share_of
from selfrepair_nn.analysis.summaries import by_head, described_widths
from selfrepair_nn.analysis.tokens import HALF_WIDTH, Tokens, entry_tally
from selfrepair_nn.blocks import Top, entries_of
from selfrepair_nn.choosing import tail_of
from selfrepair_nn.confidence import RATE, Estimate, Tally, q_values
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public

ENDS = ("promoted", "demoted")
COUNT = 5
AT_ONCE = 2**22
"""Pairs of tokens and prompts that are compared at a time."""


@public
def frequent_words(ds: xr.Dataset, count: int = COUNT, share: float | None = None) -> xr.Dataset:
    """The summary of `by_head`, and the tokens that each head promotes, and demotes, most often on its top share.

    - word(end, layer, head, place): the id of the token, -1 where there are fewer; word_text its text; end is
      "promoted" or "demoted";
    - word_share: the share of the head's top tokens on which it is among the stored words of that end, with
      word_share_half_width, which does not say that it is the most frequent of many; word_effect: the mean effect on
      its logit there, in logits.

    Raises:
        UsageError: the store holds no words (`--words`), or those of a smaller share; else as `by_head`.
    """
    ds, share = _with_words(ds, share)
    tokens, _ = Tokens.of(ds, share)
    shape = (len(ENDS), len(tokens.done), count)
    ids, (shares, effects, widths) = np.full(shape, -1), np.full((3, *shape), np.nan)
    cluster = tokens.clusters[tokens.top.token // ds.sizes["position"]]
    for end, name in enumerate(ENDS):
        words, effect = (entries_of(ds[each], tokens.top) for each in (name, f"{name}_effect"))
        for case in np.unique(tokens.top.case):
            at = tokens.top.case == case
            found, where, often = np.unique(words[at], return_inverse=True, return_counts=True)
            mean = np.bincount(where.ravel(), effect[at].ravel()) / often
            best = np.lexsort((-np.abs(mean), -often))[:count]
            here = (end, case, slice(best.size))
            ids[here], shares[here], effects[here] = found[best], often[best] / at.sum(), mean[best]
            widths[here] = _often(words[at], found[best], cluster[at]).share.half_width
    dims, grid = ("end", *tokens.dims, "place"), (len(ENDS), *tokens.shape, count)
    over = among(share, ds)
    named = {
        "word": (ids, "1", "token id"),
        "word_share": (shares, "1", f"how often it is among the stored words, {over}"),
        "word_share_half_width": (widths, "1", f"half-width of the 95% interval of how often it is, {over}"),
        "word_effect": (effects, "logit", f"mean effect on its logit, {over}"),
    }
    columns = {
        name: (dims, values.reshape(grid), {"units": units, "long_name": text})
        for name, (values, units, text) in named.items()
    }
    texts = np.where(ids < 0, "", word_texts(ds)[ids]).reshape(grid)
    found = by_head(ds, share).assign(columns).assign_coords(end=list(ENDS))
    return found.assign(word_text=(dims, texts, {"units": "1", "long_name": "token"}))


def _often(words: np.ndarray, asked: np.ndarray, clusters: np.ndarray) -> Tally:
    """On how many of the tokens each word asked for is among words [token, place]: of the words asked for."""
    said = (words[None] == asked[:, None, None]).any(2)
    return Tally.of_prompts(said, np.ones(said.shape), clusters)


@public
def words_in_context(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """The summary of `by_head`, and whether the token that a head promotes, or demotes, most stands in the context.

    Over (end, layer, head), end "promoted" (copying) or "demoted" (copy suppression), on each head's top share:

    - in_context: on which share of its tokens the first word of that end is among the tokens read so far;
    - in_context_null: the same for the contexts of all prompts of other documents (or other prompts, where documents
      are few), cut to the same length, token by token: what the frequency of tokens alone makes of it;
    - in_context_excess = in_context - in_context_null, with _half_width, its 95% interval clustered by document,
      excess_q_value (false discovery rate over the heads, of each end) and excess_known: whether that is at most 5%;
    - of the tokens whose first word is in the context, tokens_in_context, the means in logits of word_effect, what the
      head does to that word; word_removed, what the ablation takes of it; word_logit_change, what the whole model does;
      word_repair = word_logit_change + word_removed, and half-widths of each.

    Raises:
        UsageError: as `frequent_words`.
    """
    ds, share = _with_words(ds, share)
    tokens, _ = Tokens.of(ds, share)
    read = _Contexts(ds, tokens.clusters)
    columns = [dict(_of_end(ds, name, tokens, read)) for name in ENDS]
    dims = ("end", *tokens.dims)
    found = {name: (dims, np.stack([each[name] for each in columns])) for name in columns[0]}
    return _described(by_head(ds, share).assign(found).assign_coords(end=list(ENDS)), share)


@public
def changes_in_context(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """The same of what repairs: of the changes of components, over (end, component).

    Of every head's top tokens those are counted on which the component's change of direct effect is the largest of all
    and repairs (it has the sign of the head's direct effect). in_context … excess_known are of the first word that this
    change promotes (a copy that is suppressed less, or made instead), or demotes; tokens(component) is how many they
    are; repair(component) their mean change of direct effect on the target, in logits. A token counts once for each
    head of whose top share it is. The coordinates component_kind, component_layer, component_head name the component.

    Raises:
        UsageError: as `frequent_words`; several partners of each prompt.
    """
    ds, share = _with_words(ds, share)
    if "changed_component" not in ds:
        raise UsageError("each partner has changes of its own: choose one, ds.isel(resample=0)")
    tokens, _ = Tokens.of(ds, share)
    read, size = _Contexts(ds, tokens.clusters), ds.sizes["component"]
    which, effect = (entries_of(ds[each], tokens.top)[:, 0] for each in ("changed_component", "changed_effect"))
    repairs = effect * np.sign(tokens.top.effect) > 0
    entries = tokens.top.of(repairs)
    at = which[repairs] * ds.sizes["prompt"] + entries.token // ds.sizes["position"]

    def tally(values: np.ndarray, some: np.ndarray | slice = slice(None)) -> Tally:
        return entry_tally(at[some], values[some], (size, ds.sizes["prompt"]), tokens.clusters)

    columns = []
    for name in ENDS:
        words = entries_of(ds[f"change_{name}"], tokens.top)[repairs, 0, 0]
        columns.append(_excess(*read.shares(words, entries), tally))
    found: dict[str, tuple] = {}
    found |= {name: (("end", "component"), np.stack([each[name] for each in columns])) for name in columns[0]}
    known = tally(np.abs(effect[repairs])).estimate
    found["tokens"] = (("component",), np.bincount(which[repairs], minlength=size))
    found |= {"repair": (("component",), known.mean), f"repair{HALF_WIDTH}": (("component",), known.half_width)}
    labels = {name: c.variable for name, c in ds.coords.items() if c.dims == ("component",)}
    attributes = by_head(ds, share).attrs
    return _described(xr.Dataset(found, labels, attributes).assign_coords(end=list(ENDS)), share)


def word_texts(ds: xr.Dataset) -> np.ndarray:
    """The text of every token of the vocabulary, in the order of their ids."""
    return ds.vocabulary_text.values.astype(object)


def _with_words(ds: xr.Dataset, share: float | None) -> tuple[xr.Dataset, float]:
    """A store of heads with words, and the share that is asked for. UsageError if it has none, or too few."""
    ds = of_heads(ds)
    share = share_of(ds, share)
    require(ds, ("token",))
    if "promoted" not in ds:
        raise UsageError("this store holds no words: run its recipe with --words 5")
    if tail_of(ds) != "top" and share < 1:
        require_top(ds, "words")
    kept = _kept(ds)
    if share > kept:
        raise UsageError(
            f"this store holds words of the top {percent(kept)} of tokens only: a share of {share!r} is more than "
            f"that; give {kept} or less"
        )
    return ds, share


def _kept(ds: xr.Dataset) -> float:
    stored = json.loads(ds.attrs.get("settings", "{}")).get("share")
    return 1.0 if stored is None else float(stored)


@dataclass(frozen=True)
class _Contexts:
    """The tokens that prompts were read up to each position; `clusters` [prompt] are the documents."""

    ds: xr.Dataset
    clusters: np.ndarray

    @cached_property
    def _tokens(self) -> np.ndarray:
        return self.ds.token.transpose("prompt", "position").values

    def _first(self, ids: np.ndarray) -> np.ndarray:
        """The first position of each of these ascending ids in each prompt: [id, prompt]; beyond all where nowhere."""
        found = np.full((ids.size, len(self._tokens)), self._tokens.shape[1])
        for prompt, row in enumerate(self._tokens):
            there, first = np.unique(row, return_index=True)
            at = np.minimum(np.searchsorted(ids, there), ids.size - 1)
            same = ids[at] == there
            found[at[same], prompt] = first[same]
        return found

    def shares(self, words: np.ndarray, entries: Top) -> tuple[np.ndarray, np.ndarray]:
        """Whether each entry's word was read in its prompt, and in which share of other documents' prompts: [entry].

        Of these only texts that are as long can tell; NaN where none is.
        """
        ids, which = np.unique(words, return_inverse=True)
        first, n_positions = self._first(ids) if ids.size else np.zeros((0, 0)), self._tokens.shape[1]
        prompt, position = np.divmod(entries.token, n_positions)
        own, null = np.zeros(words.size), np.full(words.size, np.nan)
        longest = (self._tokens >= 0).sum(1)  # filler is -1
        step = max(1, AT_ONCE // len(self._tokens))
        for start in range(0, words.size, step):
            here = slice(start, start + step)
            read = first[which[here]] <= position[here, None]
            others = self.clusters != self.clusters[prompt[here], None]
            other = others & (longest > position[here, None])
            own[here] = read[np.arange(len(read)), prompt[here]]
            null[here] = (read & other).sum(1) / np.maximum(other.sum(1), 1)
            null[here][others.any(1) & ~other.any(1)] = np.nan
        return own, null


def _of_end(ds: xr.Dataset, name: str, tokens: Tokens, read: _Contexts) -> Iterator[tuple[str, np.ndarray]]:
    """What is told of one end's first word, [layer, head] each."""
    words, before, after, change = (
        entries_of(ds[each], tokens.top)[:, 0]
        for each in (name, f"{name}_effect", f"ablated_{name}_effect", f"{name}_logit_change")
    )
    own, null = read.shares(words, tokens.top)
    there = own > 0

    def tally(values: np.ndarray, some: np.ndarray | slice = slice(None)) -> Tally:
        return entry_tally(tokens.at[some], values[some], tokens.done.shape, tokens.clusters)

    found = _excess(own, null, tally)
    found["tokens_in_context"] = np.bincount(tokens.top.case[there], minlength=len(tokens.done))
    means = {"effect": before, "removed": before - after, "logit_change": change, "repair": change + before - after}
    for each, values in means.items():
        known = tally(values, there).estimate
        found |= {f"word_{each}": known.mean, f"word_{each}{HALF_WIDTH}": known.half_width}
    yield from ((each, values.reshape(tokens.shape)) for each, values in found.items())


def _excess(own: np.ndarray, null: np.ndarray, tally) -> dict[str, np.ndarray]:
    """How often words are in the context, in others, and the difference with what is known of it: [case] each."""
    told = np.isfinite(null)
    known: Estimate = tally(own - null, told).estimate
    q = q_values(known.p_value)
    return {
        "in_context": tally(own, told).mean,
        "in_context_null": tally(null, told).mean,
        "in_context_excess": known.mean,
        f"in_context_excess{HALF_WIDTH}": known.half_width,
        "excess_q_value": q,
        "excess_known": q <= RATE,
    }


def _described(found: xr.Dataset, share: float) -> xr.Dataset:
    over = f"{among(share, found)}"
    told = {
        "in_context": ("1", f"share of first words that are in the context, {over}"),
        "in_context_null": ("1", f"share of first words that are in others' contexts, {over}"),
        "in_context_excess": ("1", f"in the context more often than in others', {over}"),
        "excess_q_value": ("1", "false discovery rate of the excess"),
        "excess_known": ("1", "differs from the null"),
        "tokens_in_context": ("1", "number of tokens"),
        "tokens": ("1", "number of tokens"),
        "repair": ("logit", "mean change of direct effect where it repairs most"),
        "word_effect": ("logit", "mean effect of the head on its first word, in the context"),
        "word_removed": ("logit", "what the ablation takes of it"),
        "word_logit_change": ("logit", "mean change of that word's logit"),
        "word_repair": ("logit", "mean self-repair of that word's logit"),
    }
    for name, (units, text) in told.items():
        if name in found:
            found[name].attrs = {"units": units, "long_name": text}
    return described_widths(found)

