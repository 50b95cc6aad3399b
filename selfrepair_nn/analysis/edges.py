"""Attention's own repair: what a live softmax gives back of what edges carried, in the head and in the logit."""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import HEADS, require, required, restored, share_of
from selfrepair_nn.analysis.summaries import by_head, described_widths
from selfrepair_nn.analysis.tokens import HALF_WIDTH, Groups, Tokens, clusters
from selfrepair_nn.blocks import done_cases, read, sums, token_counts
from selfrepair_nn.confidence import Estimate, Tally
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public

CONCENTRATED = 0.5
READ = ("edge_attention", "ablated_direct_effect", "logit_change", "self_repair")
SOFTMAXES = ("frozen", "live")
NAMES = {
    "edge_attention": ("1", "attention along the edges"),
    "carried": ("logit", "direct effect that the edges carried"),
    "redistributed": ("logit", "direct effect that the live softmax gives back"),
    "logit_redistributed": ("logit", "logit that the live softmax gives back"),
    "self_repair": ("logit", "self-repair"),
    "given_back": ("1", "share of the direct effect that the live softmax gives back"),
}


@public
def edges_by_head(ds: xr.Dataset, share: float | None = None, least: float = CONCENTRATED) -> xr.Dataset:
    """What becomes of the effect of edges that are cut, over (layer, head), of a store of `attention_edges`.

    The summary of `by_head` where the softmax is frozen: there self_repair is what the rest of the model makes up for.
    And x, which is a mean over all tokens that count, top_x over the head's top share; DE' is the direct effect after
    the cut, the softmax frozen (f) or live (l):

    - edge_attention: attention that the head pays along the edges;
    - carried = DE - DE'_f: what the edges carried; redistributed = DE'_l - DE'_f: what the live softmax gives back of
      it in the head's own direct effect; given_back: their ratio, of the two means;
    - logit_redistributed = logit_change_l - logit_change_f: what it gives back in the logit, the rest of the model
      reacting to either;
    - concentrated: whether the mean edge_attention is at least `least`: a head that attends to few tokens;
    - x_half_width of each x, as in `by_head`; concentrated_x, concentrated_x_half_width, of self_repair too: the mean
      over the concentrated heads (of given_back the ratio of the means), and its interval.

    A result of this function is returned as it is. UsageError for another store, or a `share` not in (0, 1].
    """
    if "given_back" in ds:
        return ds
    ds = restored(ds)
    softmaxes = np.atleast_1d(ds["softmax"].values) if "softmax" in ds.coords else ()
    if not {*SOFTMAXES} <= {*map(str, softmaxes)}:
        raise UsageError("this store has not both softmaxes, frozen and live: run attention_edges")
    require(ds, (*required(ds), *HEADS, "edge_attention"))
    share = share_of(ds, share)
    paid = _paid(ds)
    concentrated = paid.mean >= least
    groups = {"concentrated": Groups((), np.where(concentrated, 0, -1), 1)}
    tokens, effects = Tokens.of(ds, share, groups)
    found, known = {}, _estimates(ds, tokens, effects)
    for name, each in known.items():
        found |= tokens.columns(name, each) | _of_group(name, each, tokens, known)
    found["concentrated"] = (HEADS, concentrated.reshape(tokens.shape))
    heads = by_head(ds.sel(softmax="frozen").drop_vars("softmax"), share)
    return _described(heads.assign(found).assign_attrs(least=least))


def _paid(ds: xr.Dataset) -> Estimate:
    """Mean attention along the edges: of cases."""
    one, done = ds.sel(softmax="frozen"), done_cases(ds)
    return Tally.of_prompts(sums(one, "edge_attention", done), token_counts(ds, done), clusters(ds)).estimate


def _estimates(ds: xr.Dataset, tokens: Tokens, effects: np.ndarray) -> dict[str, Estimate]:
    """Of each name, and of top_ and that."""
    frozen, live = ({name: read(ds.sel(softmax=s), name, tokens.done, tokens.top) for name in READ} for s in SOFTMAXES)
    before = (effects, tokens.top.effect * tokens.top.sign)
    values = {
        "edge_attention": frozen["edge_attention"],
        "carried": _minus(before, frozen["ablated_direct_effect"]),
        "redistributed": _minus(live["ablated_direct_effect"], frozen["ablated_direct_effect"]),
        "logit_redistributed": _minus(live["logit_change"], frozen["logit_change"]),
        "self_repair": frozen["self_repair"],
    }
    found = {
        each: tally.estimate for name, pair in values.items() for each, tally in tokens.both(name, *pair).items()
    }
    for top in ("", "top_"):
        found[f"{top}given_back"] = found[f"{top}redistributed"].over(found[f"{top}carried"])
    return found


def _minus(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return tuple(a - b for a, b in zip(one, other, strict=True))


def _of_group(name: str, known: Estimate, tokens: Tokens, every: Mapping[str, Estimate]) -> dict[str, tuple]:
    """The mean over the concentrated heads, and half the width of its interval."""
    group = tokens.groups["concentrated"]
    if name.endswith("given_back"):
        parts = (every[name.replace("given_back", part)] for part in ("redistributed", "carried"))
        one, other = (each.of_groups(group.index, group.count) for each in parts)
        known = one.over(other)
    else:
        known = known.of_groups(group.index, group.count)
    return {
        f"concentrated_{name}": ((), known.mean[0]),
        f"concentrated_{name}{HALF_WIDTH}": ((), known.half_width[0]),
    }


def _described(found: xr.Dataset) -> xr.Dataset:
    for name, (units, text) in NAMES.items():
        for each in (name, f"top_{name}", f"concentrated_{name}", f"concentrated_top_{name}"):
            found[each].attrs = {"units": units, "long_name": f"mean {text}" if units == "logit" else text}
    return described_widths(found)
