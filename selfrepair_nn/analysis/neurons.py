"""Which neurons of an MLP repair a head: erasure, sparsity, consistency (section 4 and Appendix C).

Everything is exact. What holds every neuron is read a chunk of prompts at a time; what is kept of a single token is
kept for the top share of tokens only.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import HEADS, of_heads, percent, require_top, share_of
from selfrepair_nn.analysis.noise import COUNT, strongest
from selfrepair_nn.analysis.recurrence import recurring
from selfrepair_nn.analysis.summaries import by_head, described_widths
from selfrepair_nn.analysis.tokens import HALF_WIDTH, batches, clusters, entry_tally
from selfrepair_nn.blocks import BLOCK, Top, clean_values, direct_effects, done_cases, entries_of, stored_rows
from selfrepair_nn.confidence import Estimate, Tally
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public
from selfrepair_nn.order_statistics import bootstrap, median_reach
from selfrepair_nn.quantities import recorded

PLACES = 50
PARTS = (0.5, 0.1, 0.05, 0.02, 0.01)
FALLING = ("falling_neuron_direct_effect", "falling_neuron_change")
SHUFFLED = ("shuffled_neuron_direct_effect", "shuffled_neuron_change")
SHARED = ("shared_within", "shared_between", "shared_by_chance")


@public
def erasure_neurons(ds: xr.Dataset, share: float | None = None, count: int = COUNT) -> xr.Dataset:
    """The most repairing neuron on each of the tokens that the MLP repairs most, for a few heads (Figure 7).

    The heads are those of `token_noise`, with their summary of `by_head`, over (rank). The tokens are the top `share`
    by mlp_change of each. Over (rank, entry), in the order of the store, -1 or NaN where a head has fewer:

    - prompt, position: which token it is; neuron: the neuron whose direct effect rises most there;
    - neuron_direct_effect, ablated_neuron_direct_effect: its direct effect before and after, in logits;
    - mlp_direct_effect, mlp_change: the whole MLP's direct effect before, and its change, in logits.

    Over (rank): entries, their number; anti_erasing, the share of them on which the neuron's direct effect is negative
    and rises; mlp_positive, the share of them on which the MLP's direct effect is positive; and half the widths of the
    95% intervals of these shares, as in `by_head`. Their null is the same with every sign turned, as if the target were
    what the model is to avoid: mirror is the share, of the `share` of tokens on which the MLP breaks most, on which the
    neuron whose direct effect falls most has a positive one; excess = anti_erasing - mirror, of the same documents. A
    store that holds no falling neurons, of Graph(also="falling_neuron"), has NaN for both. Another null is a target
    that has nothing to do with the position, of Graph(also="shuffled_target"): shuffled is anti_erasing of the `share`
    of tokens on which the MLP raises that most, by the neuron that raises it most; over_shuffled = anti_erasing -
    shuffled; NaN where the store has none.

    Memory: 8 bytes a token, and some 60 for each entry.

    Raises:
        UsageError: `share` is not in (0, 1], or `ds` is not a store that records neurons.
    """
    ds = of_heads(ds)
    heads, top, rank = _top_tokens(ds, share, count, "mlp_change")
    first = ds[["top_neuron", "top_neuron_change", "top_neuron_direct_effect"]].isel(rank=0)
    clean = entries_of(first.top_neuron_direct_effect, top).astype(float)
    change = entries_of(first.top_neuron_change, top).astype(float)
    mlp = clean_values(ds, "mlp_direct_effect").ravel()[top.token].astype(float)
    prompt, position = np.divmod(top.token, ds.sizes["position"])
    whole = {"prompt": prompt, "position": position, "neuron": entries_of(first.top_neuron, top)}
    logits = {
        "neuron_direct_effect": clean,
        "ablated_neuron_direct_effect": clean + change,
        "mlp_direct_effect": mlp,
        "mlp_change": top.effect,
    }
    shares = {"anti_erasing": (clean < 0) & (change > 0), "mlp_positive": mlp > 0}
    n = heads.sizes["rank"]
    counts = np.bincount(rank, minlength=n)
    found = {name: (("rank", "entry"), _padded(values, rank, n)) for name, values in (whole | logits).items()}
    for name, marks in shares.items():
        known = entry_tally(*_at(ds, rank, prompt, marks, n), clusters(ds)).share
        found |= {name: ("rank", known.mean), name + HALF_WIDTH: ("rank", known.half_width)}
    anti = entry_tally(*_at(ds, rank, prompt, shares["anti_erasing"], n), clusters(ds)).share
    mirror, other = _mirrored(ds, heads, share, count), _shuffled(ds, heads, share, count)
    nulls = {"mirror": mirror, "excess": anti.minus(mirror)}
    nulls |= {"shuffled": other, "over_shuffled": anti.minus(other)}
    for name, known in nulls.items():
        found |= {name: ("rank", known.mean), name + HALF_WIDTH: ("rank", known.half_width)}
    found = heads.assign(found | {"entries": ("rank", counts)})
    units = dict.fromkeys(logits, "logit") | dict.fromkeys((*whole, *shares, *nulls, "entries"), "1")
    return _described(found, units)


def _mirrored(ds: xr.Dataset, heads: xr.Dataset, share: float | None, count: int) -> Estimate:
    """The share of the tokens on which the MLP breaks most whose most breaking neuron wrote for the target."""
    return _of_null(ds, heads, FALLING, lambda: _top_tokens(ds, share, count, "mlp_change", "bottom"), -1)


def _shuffled(ds: xr.Dataset, heads: xr.Dataset, share: float | None, count: int) -> Estimate:
    """The share of the tokens on which the MLP raises a shuffled target most whose most raising neuron erased it."""
    return _of_null(ds, heads, SHUFFLED, lambda: _top_tokens(ds, share, count, "shuffled_mlp_change"), 1)


def _of_null(
    ds: xr.Dataset, heads: xr.Dataset, names: tuple[str, str], chosen: Callable[[], tuple], sign: int
) -> Estimate:
    """The share of chosen tokens on which a neuron, by its direct effect and its change, wrote against its `sign`.

    NaN where the store does not hold these, or not of every token.
    """
    n = heads.sizes["rank"]
    if any(name not in ds for name in names) or ds.attrs.get("kept_share", 1) < 1:
        nothing = np.full((n, 1), np.nan)
        return Estimate(nothing[:, 0], nothing, np.zeros((n, 1)))
    _, top, rank = chosen()
    clean, change = (sign * entries_of(ds[name], top) for name in names)
    prompt = top.token // ds.sizes["position"]
    return entry_tally(*_at(ds, rank, prompt, (clean < 0) & (change > 0), n), clusters(ds)).share


def _at(
    ds: xr.Dataset, rank: np.ndarray, prompt: np.ndarray, marks: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Marks [entry] as `entry_tally` takes them, of `n` ranks."""
    return rank * ds.sizes["prompt"] + prompt, marks, (n, ds.sizes["prompt"])


@public
def neuron_sparsity(ds: xr.Dataset, share: float | None = None, count: int = COUNT) -> xr.Dataset:
    """How often a token's Nth most repairing neuron alone repairs a part of the head's direct effect (Figure 8).

    The heads are those of `token_noise`, with their summary of `by_head`, over (rank).

    - repairs(rank, part, place): the share of the head's top tokens on which the change of the neuron at that place is
      at least that part of the head's direct effect; places are counted from 1, and neurons are placed on every token
      anew. On a token whose direct effect is not positive nothing is repaired. repairs_half_width: half the width of
      its 95% interval, as in `who_repairs`;
    - first_shuffled(rank, part): the same of place 1 for a shuffled target (`erasure_neurons`), on the top share by the
      head's direct effect on that; NaN where the store has none;
    - stored_tokens(rank): how many tokens that is over. Of a finished run it is top_tokens; of an unfinished one it
      can be fewer, for what is stored is the top share of the whole run.

    Errors as in `erasure_neurons`, and for a share beyond the one whose neurons are stored.
    """
    ds = of_heads(ds)
    heads, top, rank = _top_tokens(ds, share, count)
    n, places, joined = heads.sizes["rank"], min(PLACES, ds.sizes["neuron"]), batches(clusters(ds))
    size = int(joined.max()) + 1
    hits, counts = np.zeros((n, size, len(PARTS), places)), np.zeros((n, size))
    for entries, change in stored_rows(ds.neuron_change, top):
        most = -np.sort(-change, axis=1)[:, None, :places]
        change = change * top.sign[entries, None]
        effect = (top.effect * top.sign)[entries][:, None, None]
        at = rank[entries], joined[top.token[entries] // ds.sizes["position"]]
        np.add.at(hits, at, (effect > 0) & (most >= np.array(PARTS)[:, None] * effect))
        np.add.at(counts, at, 1)
    each = np.moveaxis(hits, 1, -1).reshape(-1, size)
    known = Tally(each, np.repeat(counts, len(PARTS) * places, axis=0)).share
    dims, shape = ("rank", "part", "place"), (n, len(PARTS), places)
    found = {"repairs": (dims, known.mean.reshape(shape))}
    found |= {"repairs" + HALF_WIDTH: (dims, known.half_width.reshape(shape))}
    first = _first_shuffled(ds, share, count)
    found |= {"first_shuffled": (dims[:2], first.mean.reshape(shape[:2]))}
    found |= {"first_shuffled" + HALF_WIDTH: (dims[:2], first.half_width.reshape(shape[:2]))}
    found |= {"stored_tokens": ("rank", counts.sum(1).astype(int))}
    found |= {"part": list(PARTS), "place": np.arange(1, places + 1)}
    return _described(heads.assign(found), dict.fromkeys(("repairs", "first_shuffled", "stored_tokens"), "1"))


def _first_shuffled(ds: xr.Dataset, share: float | None, count: int) -> Estimate:
    """How often one neuron alone gives a shuffled target a part of what the head wrote for it: of (rank, part)."""
    heads, _, _ = _top_tokens(ds, share, count)
    n = heads.sizes["rank"]
    if "shuffled_neuron_change" not in ds or ds.attrs.get("kept_share", 1) < 1:
        nothing = np.full((n * len(PARTS), 1), np.nan)
        return Estimate(nothing[:, 0], nothing, np.zeros_like(nothing))
    _, top, rank = _top_tokens(ds, share, count, "shuffled_direct_effect")
    most = entries_of(ds.shuffled_neuron_change, top).astype(float)
    prompt, each = top.token // ds.sizes["position"], []
    for part in PARTS:
        marks = (top.effect > 0) & (most >= part * top.effect)
        each.append(entry_tally(*_at(ds, rank, prompt, marks, n), clusters(ds)))
    sums, counts = (np.stack([getattr(tally, name) for tally in each], 1) for name in ("sums", "counts"))
    return Tally(*(x.reshape(n * len(PARTS), -1) for x in (sums, counts))).share


@public
def neuron_changes(ds: xr.Dataset, share: float | None = None, count: int = COUNT) -> xr.Dataset:
    """What every neuron does on a head's top tokens, the most repairing first (Appendix C, Figures 12 to 15).

    The heads are those of `token_noise`, with their summary of `by_head`, over (rank). Over (rank, place), places
    counted from 1 in the order of mean change:

    - neuron: which neuron it is; change: the mean change of its direct effect, in logits;
    - change_size: the mean absolute change; cumulative_size: that of all neurons up to this place, as a share of all,
      with cumulative_size_half_width of that order of neurons, as in `who_repairs`;
    - median_direct_effect: the median of its direct effect in the clean run, in logits, with
      median_direct_effect_half_width (Woodruff's).

    rising(rank): how many neurons have a mean change above 0, with rising_half_width, by the bootstrap over clusters.
    stored_tokens as in `neuron_sparsity`. Medians are exact: where they are over many tokens, the store is read again
    for every few neurons. Errors as in `neuron_sparsity`.
    """
    ds = of_heads(ds)
    heads, top, rank = _top_tokens(ds, share, count)
    n, neurons = heads.sizes["rank"], ds.sizes["neuron"]
    joined = batches(clusters(ds))
    width = int(joined.max()) + 1
    sums, sizes, counts = *np.zeros((2, n, width, neurons)), np.zeros((n, width), int)
    for entries, change in stored_rows(ds.neuron_change, top):
        change = change * top.sign[entries, None]
        at = rank[entries], joined[top.token[entries] // ds.sizes["position"]]
        for total, values in ((sums, change), (sizes, abs(change)), (counts, 1)):
            np.add.at(total, at, values)
    with np.errstate(invalid="ignore"):
        change, size = (each.sum(1) / counts.sum(1, keepdims=True) for each in (sums, sizes))
    medians = [_medians(ds.neuron_direct_effect, top.of(rank == r), joined) for r in range(n)]
    median, reach = np.moveaxis(np.reshape(medians, (n, 2, neurons)), 1, 0)
    order = np.argsort(-change, axis=1, kind="stable")
    named = {"change": change, "change_size": size, "median_direct_effect": median}
    known = named | {f"median_direct_effect{HALF_WIDTH}": reach}
    ordered = {name: np.take_along_axis(values, order, 1) for name, values in known.items()}
    summed = ordered["change_size"].cumsum(1)
    with np.errstate(invalid="ignore"):
        ordered |= {"neuron": order, "cumulative_size": summed / summed[:, -1:]}
    widths = [_reach_of_sums(one[:, places]) for one, places in zip(sizes, order, strict=True)]
    ordered["cumulative_size" + HALF_WIDTH] = np.reshape(widths, (n, neurons))
    found = heads.assign({name: (("rank", "place"), values) for name, values in ordered.items()})
    found = found.assign(
        rising=("rank", (change > 0).sum(1)),
        rising_half_width=("rank", [_reach_of_rising(*each) for each in zip(sums, counts, strict=True)]),
        stored_tokens=("rank", counts.sum(1)),
        place=np.arange(1, neurons + 1),
    )
    units = dict.fromkeys(named, "logit") | dict.fromkeys(
        ("neuron", "cumulative_size", "rising", "stored_tokens"), "1"
    )
    return _described(found, units)


def _reach_of_rising(changes: np.ndarray, counts: np.ndarray) -> float:
    """Half-width of how many neurons have a mean above 0, of summed changes [cluster, neuron] and tokens [cluster]."""
    return bootstrap(lambda drawn: (drawn @ changes > 0).sum(1), counts > 0)


def _reach_of_sums(sizes: np.ndarray) -> np.ndarray:
    """Half-widths of the shares of all that the first neurons have, of sizes [cluster, place]: [place]."""
    summed = sizes.cumsum(1).T
    return Tally(summed, np.broadcast_to(summed[-1:], summed.shape)).half_width


@public
def neuron_consistency(ds: xr.Dataset, share: float | None = None, count: int = COUNT) -> xr.Dataset:
    """Whether the same neurons repair a head again and again (section 4.2.2).

    The heads are those of `token_noise`, with their summary of `by_head`, over (rank). The tokens are the top `share`
    by self_repair of each head; a token's repairing neurons are the (up to ten) most repairing ones that the store
    names. Over (rank, place), the most frequent neuron first, places counted from 1:

    - neuron: which it is; in_tokens, in_prompts: the shares of these tokens, and of the prompts that have any of them,
      in which it is one of the repairing neurons.

    Over (rank): entries, the number of tokens; shared_within, shared_between: how many repairing neurons two tokens of
    the same prompt, or of different ones, have in common, on average over all pairs. shared_by_chance is what two
    random choices of ten neurons have in common, on average. in_tokens_half_width, shared_within_half_width and
    shared_between_half_width: half the widths of their 95% intervals, as in `who_repairs`.

    Errors as in `erasure_neurons`.
    """
    ds = of_heads(ds)
    heads, top, rank = _top_tokens(ds, share, count, "self_repair")
    n, neurons = heads.sizes["rank"], ds.sizes["neuron"]
    named = np.where(entries_of(ds.top_neuron_change, top) > 0, entries_of(ds.top_neuron, top), -1)
    prompt = top.token // ds.sizes["position"]
    joined = batches(clusters(ds))
    each = [recurring(named[rank == r], prompt[rank == r], neurons, joined) for r in range(n)]
    shared = [name + end for name in ("shared_within", "shared_between") for end in ("", HALF_WIDTH)]
    found: dict[str, Any] = {name: ("rank", [one[name] for one in each]) for name in ("entries", *shared)}
    for name in ("neuron", "in_tokens", "in_tokens" + HALF_WIDTH, "in_prompts"):
        found[name] = (("rank", "place"), np.array([one[name] for one in each]).reshape(n, neurons))
    found |= {"shared_by_chance": ds.sizes["rank"] ** 2 / neurons}
    units: dict[str, str] = dict.fromkeys(("neuron", "entries", "in_tokens", "in_prompts", *SHARED), "1")
    return _described(heads.assign(found | {"place": np.arange(1, neurons + 1)}), units)


def _top_tokens(
    ds: xr.Dataset, share: float | None, count: int, by: str = "direct_effect", tail: str | None = None
) -> tuple[xr.Dataset, Top, np.ndarray]:
    """A few heads over (rank), the top tokens of each by a variable, and the rank that each of these belongs to."""
    ds = of_heads(ds)
    share = share_of(ds, share)
    _check_neurons(ds, share if by == "direct_effect" else 0, named=by in ("mlp_change", "self_repair"))
    if by == "direct_effect":
        require_top(ds, "every neuron")
    heads, done = by_head(ds, share), done_cases(ds)
    cases = strongest(heads, count)
    done[np.setdiff1d(np.arange(len(done)), cases)] = False
    _, top = direct_effects(ds, done, share, by, tail)
    ranks = np.zeros(len(done), int)
    ranks[cases] = np.arange(len(cases))
    return heads.stack(rank=HEADS).isel(rank=cases).reset_index("rank"), top, ranks[top.case]


def _check_neurons(ds: xr.Dataset, share: float, named: bool) -> None:
    if "partners_averaged" in ds.attrs and named and "top_neuron" not in ds:
        raise UsageError(
            "each partner has a most repairing neuron of its own: choose one partner, ds.isel(resample=0)"
        )
    if any(each.name not in ds for each in recorded(("neurons",)) if named or each.kind == "float"):
        raise UsageError(
            "this store records no neurons: run the recipe neurons, or one with Graph(neurons=LAYER)"
        )
    stored = json.loads(ds.attrs.get("settings", "{}")).get("share")
    if stored is not None and share > stored:
        raise UsageError(
            f"this store holds every neuron for the top {percent(stored)} of tokens only: "
            f"a share of {share!r} is more than that; give {stored} or less"
        )


def _padded(values: np.ndarray, rank: np.ndarray, n: int) -> np.ndarray:
    """Values [entry] side by side [rank, entry of that rank], NaN or -1 where a rank has fewer."""
    counts = np.bincount(rank, minlength=n)
    out = np.full((n, counts.max(initial=0)), -1 if np.issubdtype(values.dtype, np.integer) else np.nan)
    out = out.astype(values.dtype)
    for r in range(n):
        out[r, : counts[r]] = values[rank == r]
    return out


def _medians(array: xr.DataArray, top: Top, clusters: np.ndarray) -> np.ndarray:
    """Each neuron's median over the stored entries of `top`, and half its interval: [2, neuron].

    As many neurons at a time as fit in a block; `clusters` names that of each prompt.
    """
    neurons, cluster = array.sizes["neuron"], clusters[top.token // array.sizes["position"]]
    width = max(1, BLOCK // max(1, top.token.size))
    found = np.full((2, neurons), np.nan)
    for start in range(0, neurons, width):
        part = slice(start, start + width)
        values = entries_of(array.isel(neuron=part), top)
        stored = np.isfinite(values).all(1)
        values = (values[stored] * top.sign[stored, None]).astype(float)
        if len(values):
            found[:, part] = np.median(values, axis=0), median_reach(values.T, cluster[stored])
    return found


LONG_NAMES = {
    "prompt": "prompt",
    "position": "position",
    "neuron": "neuron of the recorded MLP",
    "neuron_direct_effect": "direct effect of the most repairing neuron",
    "ablated_neuron_direct_effect": "its direct effect after the ablation",
    "mlp_direct_effect": "direct effect of the MLP",
    "mlp_change": "change of direct effect of the MLP",
    "anti_erasing": "direct effect of the neuron below 0, and rising",
    "mlp_positive": "direct effect of the MLP above 0",
    "mirror": "direct effect of the most breaking neuron above 0, and falling",
    "excess": "anti-erasing, less its mirror",
    "shuffled": "anti-erasing of a shuffled target",
    "over_shuffled": "anti-erasing, less that of a shuffled target",
    "first_shuffled": "share of tokens on which the first neuron repairs this part, shuffled target",
    "entries": "number of tokens",
    "repairs": "share of tokens on which the neuron repairs this part of the direct effect",
    "stored_tokens": "number of tokens",
    "rising": "number of neurons that repair on average",
    "change": "mean change of direct effect of the neuron",
    "change_size": "mean absolute change of direct effect of the neuron",
    "cumulative_size": "share of all absolute change up to this neuron",
    "median_direct_effect": "median direct effect of the neuron",
    "in_tokens": "share of tokens in which the neuron repairs",
    "in_prompts": "share of prompts in which the neuron repairs",
    "shared_within": "repairing neurons shared by two tokens of a prompt",
    "shared_between": "repairing neurons shared by two tokens of different prompts",
    "shared_by_chance": "neurons shared by two random choices",
}


def _described(found: xr.Dataset, units: dict[str, str]) -> xr.Dataset:
    for name, unit in units.items():
        found[name].attrs = {"units": unit, "long_name": LONG_NAMES[name]}
    return described_widths(found).set_coords(HEADS)
