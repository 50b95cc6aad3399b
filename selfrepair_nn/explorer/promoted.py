"""What heads promote and demote, in words, as data of a page: most often, and on each token that is shown."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn import blocks
from selfrepair_nn.analysis import frequent_words, word_texts
from selfrepair_nn.choosing import tail_of
from selfrepair_nn.errors import UsageError
from selfrepair_nn.explorer.packing import levels, packed, plain, rounded, step_for
from selfrepair_nn.explorer.repairs import shared_out
from selfrepair_nn.explorer.words import legible
from selfrepair_nn.shown import line

SHOWN = 5
"""Words of each end."""
NUMBERS = 1_500_000
"""Of the words of single tokens."""
WORDS = ("promoted", "demoted", "change_promoted", "change_demoted")
EFFECTS = ("promoted_effect", "demoted_effect", "changed_effect")


def promoted(variants: Sequence[xr.Dataset], share: float, top: blocks.Top) -> dict[str, Any] | None:
    """Words of each variant; None where none are stored, or several partners have each their own."""
    first = variants[0]
    named = {*WORDS, *EFFECTS, "changed_component"} <= {*map(str, first.data_vars)}
    if not named or "vocabulary_text" not in first.coords:  # of several partners each changes other words
        return None
    count, changed = min(SHOWN, first.sizes["word"]), first.sizes["changed"]
    each = 4 * count + 2 * changed + 2 * changed * count
    chosen = shared_out(top, NUMBERS // (len(variants) * each), tail_of(first))
    read = [_read(ds, chosen, count) for ds in variants]
    often = [_most_often(ds, share) for ds in variants]
    used = [np.unique(values) for one in read for name, values in one.items() if name in WORDS]
    used += [np.array([word for site in one or () for end in site for word, _ in end], int) for one in often]
    ids = np.unique(np.concatenate(used))
    step = step_for(np.concatenate([one[name].ravel() for one in read for name in EFFECTS]), levels(chosen.token.size))
    texts, sites = word_texts(first), len(blocks.done_cases(first))
    return {
        "vocabulary": [legible(str(texts[i])) if str(texts[i]).strip("\ufffd") else f"⟨{i}⟩" for i in ids],
        "labels": [line(c) for c in first.component.values],
        "count": count,
        "changed": changed,
        "step": step,
        "often": [_named(one, ids) for one in often],
        "tokens": [_packed(one, ids, step, sites) for one in read],
    }


def _read(ds: xr.Dataset, top: blocks.Top, count: int) -> dict[str, np.ndarray]:
    """Of the entries whose words are stored: case, token, words and effects."""
    names = (*WORDS, *EFFECTS, "changed_component")
    found = {"case": top.case, "token": top.token}
    for name in names:
        beyond = [size for d, size in ds[name].sizes.items() if d in ("changed", "word")]
        found[name] = np.full((top.token.size, *beyond), np.nan)
        for entries, values in blocks.rows(ds[name], top):
            found[name][entries] = values
    stored = np.isfinite(found["promoted_effect"]).all(-1)
    found = {name: values[stored] for name, values in found.items()}
    found |= {name: found[name].astype(int)[..., :count] for name in WORDS}
    return found | {name: found[name][..., :count] for name in EFFECTS[:2]}


def _most_often(ds: xr.Dataset, share: float) -> list[list[list[tuple[int, float]]]] | None:
    """Of each head, of either end, the words that are most often among the first: id, and on which share."""
    if "case" in ds.dims:
        return None
    try:
        found = frequent_words(ds, SHOWN, share)
    except UsageError:  # of a smaller share than is looked at
        return None
    ids, shares = (found[name].values.reshape(2, -1, SHOWN) for name in ("word", "word_share"))
    return [
        [[(int(i), float(f"{s:.3g}")) for i, s in zip(*one, strict=True) if i >= 0] for one in zip(*site, strict=True)]
        for site in zip(ids.swapaxes(0, 1), shares.swapaxes(0, 1), strict=True)
    ]


def _named(often: list | None, ids: np.ndarray) -> list | None:
    """The same, each id by its place among those of the page."""
    place = {int(i): at for at, i in enumerate(ids)}
    return often and [[[[place[i], s] for i, s in end] for end in site] for site in often]


def _packed(found: dict[str, np.ndarray], ids: np.ndarray, step: float, sites: int) -> list[list]:
    """For each case how many tokens it has words of, and these as text."""
    by_case = []
    for at in (np.flatnonzero(found["case"] == case) for case in range(sites)):
        at = at[np.argsort(found["token"][at])]
        gaps = plain(np.diff(found["token"][at], prepend=0).astype(np.uint32))
        words = [plain(np.searchsorted(ids, found[name][at]).astype(np.uint32)) for name in WORDS]
        effects = [plain(rounded(found[name][at], step)) for name in EFFECTS]
        components = plain(found["changed_component"][at].astype(np.uint16))
        by_case.append([int(at.size), packed(gaps, *words, *effects, components)])
    return by_case
