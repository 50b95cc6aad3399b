"""What each head does on average, over all tokens and over the top share, and how well that is known."""

from collections.abc import Iterator, Mapping

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import among, meant, of_cases, of_heads, same_share, share_of
from selfrepair_nn.analysis.closure import closure
from selfrepair_nn.analysis.extent import too_short
from selfrepair_nn.analysis.halves import BIASED, of_halves
from selfrepair_nn.analysis.remembering import held, once
from selfrepair_nn.analysis.task import verdict
from selfrepair_nn.analysis.tokens import HALF_WIDTH, Columns, Groups, Tokens, clustering
from selfrepair_nn.blocks import counted_share, largest, ratios, read, sites
from selfrepair_nn.choosing import splits
from selfrepair_nn.confidence import RATE, Tally, q_values
from selfrepair_nn.face import public
from selfrepair_nn.quantities import QUANTITIES, asked_in, told_of

ESTIMATED = ("half_width", "prompts_used", "layer_half_width")
NORM_SHARES = {
    "norm_share": "repaired by the norm",
    "norm_mirror": "broken by the norm",
    "norm_excess": "repaired by the norm, less what is broken",
}


@public
def by_head(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """Summaries of each head over (layer, head), NaN where nothing is done; in logits unless said.

    - x and top_x, for x in MEANS and from_components, from_mixers, from_post_norms, logit_change_capped, rerouted (a
      share), as far as the store has it: mean over all counted tokens, and over the top share (Equations 1 and 2); so
      also removed = direct_effect - ablated_direct_effect, what the ablation takes away, and distance = (logit_change +
      direct_effect) / sqrt 2, from the line y = -x of Figure 2, and removed_distance = (logit_change + removed) / sqrt
      2, from that line where what was removed is the other axis: self_repair / sqrt 2;
    - share_repaired and top_share_repaired: mean self_repair / mean removed, no unit; NaN unless the interval of
      removed excludes 0;
    - norm_share: mean over the top share of clip(from_norm / direct_effect, 0, 1), no unit (Appendix A); norm_mirror:
      the same of -from_norm, what clipping makes of a norm that repairs as often as it breaks; norm_excess: the one
      minus the other;
    - x_half_width, of each of these: half the width of its 95% interval, infinite where there is none: where fewer
      than 20 clusters hold a token. layer_x_half_width(layer) and overall_x_half_width: of the means over the heads of
      a layer, and over all heads, whose errors go together since they share their tokens;
    - self_repair_se, top_self_repair_se: standard error of the mean, NaN below two clusters;
    - p_value, top_p_value: of a mean self-repair that is 0, two-sided, NaN where there is no interval; q_value,
      top_q_value: the same controlled for the number of heads (Benjamini and Hochberg's false discovery rate);
    - repaired, top_repaired: whether q_value is at most 5%, self_repair has the sign of direct_effect and exceeds the
      noise floor; broken, top_broken: the same with the other sign. Neither is said where there is no interval;
    - between, top_between: whether -1 < logit_change / direct_effect < 0, Figure 2's self-repaired heads: a statement
      about these two means as they were measured, and no more;
    - tokens, top_tokens: how many tokens the means are over; worst_closure: the largest |closure|;
    - selected(layer, head), noise_floor(layer) (NaN where the run did not measure it): from the store; and of a
      run until an interval is narrow half_width, prompts_used(layer, head) and layer_half_width(layer).

    Of what `choose_tokens` gives, top_x is over the tail that is chosen (attribute tail). Where that splits the
    selection everything is over the reported half (attributes prompts_selecting, prompts_reporting), and there is also

    - bias_direct_effect, bias_self_repair: what selecting tokens on the reported half itself would add to top_x;
    - selecting_direct_effect, selecting_top_self_repair: means of the other half, by which heads are selected.

    Clusters are documents, or prompts where there are fewer than 20 documents: attributes clustered_by, clusters and
    documents. worst_closure and closure_limit (attributes) are the largest |closure| of all, and what the dtype allows.
    Of a store of the top share alone, what is over all tokens is NaN. A part of a store, as ds.sel(layer=6), does too.
    `share` is the paper's 2% where it is not given; where the prompts say which tokens count it is then 1, all of
    these. counted_share (attribute) is the share of tokens that count, and `task` says whether the model does the task
    of the prompts, where they are one. `too_short`, where it is there, says that no mean has an interval, and how much
    text that takes.

    A result of this function is returned as it is: what takes a store also takes its summary.
    Memory: one block of prompts, some 60 bytes for each token of each head's top share, and some 200 for each prompt
    of each head.

    Raises:
        UsageError: `share` is not in (0, 1] or not the summary's, or `ds` is not a store of the heads recipe.
    """
    share = share_of(ds, share)
    if "top_self_repair" in ds:
        return same_share(ds, share)
    heads = of_heads(ds)
    return once(("heads", share), heads, lambda: summed_up(heads, share))


@public
def by_case(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """What `by_head` gives, over (case): where several heads are ablated at once, or layers, or MLPs.

    `case_sites` are the sites that each ablates, as in a store, `case_layer` is the first layer of these. Memory and
    errors as in `by_head`.
    """
    share = share_of(ds, share)
    if "top_self_repair" in ds:
        return same_share(ds, share)
    cases = of_cases(ds)
    return once(("cases", share), cases, lambda: summed_up(cases, share))


def summed_up(ds: xr.Dataset, share: float, groups: Mapping[str, Groups] | None = None) -> xr.Dataset:
    """`by_head` of a store that is checked; with GROUP_x_half_width of further `groups` of heads."""
    ds, dims = held(ds), sites(ds)
    found = dict(_read_off(ds, share, groups or {}))
    columns, halves = of_halves(ds, share) if splits(ds) else ({}, {})
    found |= columns
    labels = {name: ds[name].variable for name in (*dims, "case_sites", "case_layer") if name in ds.coords}
    found |= {name: ds[name].variable.load() for name in ("selected", *ESTIMATED) if name in ds}
    heads = xr.Dataset(found | {"noise_floor": _noise_floor(ds)}, labels, ds.attrs)
    heads = heads.assign(_derived(heads, "") | _derived(heads, "top_"))
    sizes = {"prompts": ds.sizes["prompt"], "positions": ds.sizes["position"]}
    done = float(((ds.done & ds.selected).mean("prompt").where(ds.selected)).mean())
    sizes |= halves | {"counted_share": counted_share(ds)} | verdict(ds)
    known = clustering(ds) | closure(ds, heads.worst_closure.values.ravel())
    found = _describe(heads, share).assign_attrs(share=share, done_share=done, **sizes, **known)
    told = too_short(found)
    return found.assign_attrs(too_short=told) if told else found


def _read_off(ds: xr.Dataset, share: float, groups: Mapping[str, Groups]) -> Iterator[tuple[str, tuple]]:
    """What `by_head` reads off the store, variable by variable."""
    tokens, sums = Tokens.of(ds, share, groups)
    effects = chosen = tokens.top.effect * tokens.top.sign
    if asked_in(ds) == "logprob":
        sums, chosen = own_loss(ds, tokens)
        effects = chosen
    plane: dict[str, Tally] = {}
    for name in meant(ds):
        if name != "direct_effect":
            sums, chosen = read(ds, name, tokens.done, tokens.top)
        found = tokens.both(name, sums, chosen)
        for each, tally in found.items():
            yield from tokens.columns(each, tally.estimate).items()
        if name in ("direct_effect", "ablated_direct_effect", "logit_change", "self_repair"):
            plane |= found
        if name == "self_repair":
            for prefix in ("", "top_"):
                yield from _tested(tokens, prefix, found[f"{prefix}{name}"]).items()
        if name == "from_norm":
            for each, tally in _norm_shares(tokens, ratios(chosen, effects)).items():
                yield from tokens.columns(each, tally.estimate).items()
    for prefix in ("", "top_"):
        yield from _in_the_plane(tokens, prefix, plane).items()
        yield from _share_repaired(tokens, prefix, plane).items()
    for name, counts in (("tokens", tokens.counts), ("top_tokens", tokens.top_counts)):
        yield name, (tokens.dims, counts.sum(1).reshape(tokens.shape))
    worst = largest(ds, "closure", tokens.done) if "closure" in ds else np.full(tokens.counts.shape[0], np.nan)
    yield "worst_closure", (tokens.dims, worst.reshape(tokens.shape))


def own_loss(ds: xr.Dataset, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """What the head's own write alone takes from the log-probability, of a store `in_nats`: as `blocks.read` has it."""
    repaired, changed = (read(ds, name, tokens.done, tokens.top) for name in ("self_repair", "logit_change"))
    return repaired[0] - changed[0], repaired[1] - changed[1]


def _tested(tokens: Tokens, prefix: str, self_repair: Tally) -> Columns:
    known = self_repair.estimate
    found = {"self_repair_se": known.error, "p_value": known.p_value, "q_value": q_values(known.p_value)}
    return {prefix + name: (tokens.dims, each.reshape(tokens.shape)) for name, each in found.items()}


def _in_the_plane(tokens: Tokens, prefix: str, of: Mapping[str, Tally]) -> Columns:
    """What the direct effects and the logit change say together: sums over the same tokens."""
    before, change = (of[prefix + name] for name in ("direct_effect", "logit_change"))
    removed = _removed(prefix, of)
    found = tokens.columns(f"{prefix}removed", removed.estimate)
    for name, axis in (("distance", before), ("removed_distance", removed)):
        distance = Tally((change.sums + axis.sums) / np.sqrt(2), before.counts)
        found |= tokens.columns(prefix + name, distance.estimate)
    return found


def _removed(prefix: str, of: Mapping[str, Tally]) -> Tally:
    """What the ablation takes; of log-probability what the head's own write alone takes, which is its effect there."""
    before, after = of[f"{prefix}direct_effect"], of.get(f"{prefix}ablated_direct_effect")
    return before if after is None else Tally(before.sums - after.sums, before.counts)


def _share_repaired(tokens: Tokens, prefix: str, of: Mapping[str, Tally]) -> Columns:
    """A ratio of two means, its half-width that of the linearised ratio; NaN where nothing is surely removed."""
    repair, removed = of[f"{prefix}self_repair"], _removed(prefix, of)
    size, width = removed.mean, removed.half_width
    surely = (abs(size) > np.where(np.isfinite(width), width, 0))[:, None]
    size = np.where(surely, size[:, None], np.nan)
    with np.errstate(invalid="ignore"):
        share = repair.mean[:, None] / size
        known = Tally((repair.sums - share * removed.sums) / size, repair.counts).half_width
    found = {f"{prefix}share_repaired": share[:, 0], f"{prefix}share_repaired{HALF_WIDTH}": known}
    return {name: (tokens.dims, each.reshape(tokens.shape)) for name, each in found.items()}


def _norm_shares(tokens: Tokens, ratio: np.ndarray) -> dict[str, Tally]:
    """Section 3.2 and Appendix A: clipped per token; a token of no direct effect has nothing to repair.

    Its mirror is what the same clipping makes of the other sign, the excess the one minus the other, token by token.
    """
    share, mirror = np.clip(ratio, 0, 1), np.clip(-ratio, 0, 1)
    shares = {"norm_share": share, "norm_mirror": mirror, "norm_excess": share - mirror}
    return {name: tokens.top_tally(values) for name, values in shares.items()}


def _derived(heads: xr.Dataset, prefix: str) -> dict[str, xr.Variable]:
    names = ("direct_effect", "logit_change", "self_repair", "q_value")
    effect, change, repair, q_value = (heads.variables[prefix + name] for name in names)
    surely = (q_value <= RATE) & (abs(repair) > heads.variables["noise_floor"].fillna(0))
    return {
        f"{prefix}between": (change * effect < 0) & (abs(change) < abs(effect)),
        f"{prefix}repaired": surely & (repair * effect > 0),
        f"{prefix}broken": surely & (repair * effect < 0),
    }


def _noise_floor(ds: xr.Dataset) -> xr.Variable:
    along, known = sites(ds)[0], "noise_floor" in ds
    values = ds.noise_floor.values.astype(float) if known else np.full(ds.sizes[along], np.nan)
    return xr.Variable(along, values, QUANTITIES["noise_floor"].attributes)


def _describe(heads: xr.Dataset, share: float) -> xr.Dataset:
    """The summary with units and a name on each variable."""
    units = told_of(heads, "self_repair").units
    told = {n: told_of(heads, n) for n in meant(heads)}
    known = {n: (q.units.replace("logit", units), f"mean {q.long_name}") for n, q in told.items()} | {
        "self_repair_se": (units, "standard error of the mean self-repair"),
        "removed": (units, "mean direct effect removed"),
        "distance": (units, "distance from y = -x"),
        "removed_distance": (units, "distance from y = -x, against what was removed"),
        "share_repaired": ("1", "share of the removed direct effect that is repaired"),
        "between": ("1", "between y = -x and the x-axis"),
        "p_value": ("1", "p-value of a mean self-repair of 0"),
        "q_value": ("1", "false discovery rate of the mean self-repair"),
        "repaired": ("1", "self-repaired"),
        "broken": ("1", "broken"),
        "tokens": ("1", "number of tokens"),
    }
    variables = heads.variables  # an array for each of so many names would take longer than the means
    for name, (units, text) in known.items():
        variables[name].attrs = {"units": units, "long_name": text}
        variables[f"top_{name}"].attrs = {"units": units, "long_name": f"{text}, {among(share, heads)}"}
    for name, text in NORM_SHARES.items():
        variables[name].attrs = {"units": "1", "long_name": f"share of the direct effect {text}"}
    for name in BIASED if "bias_self_repair" in heads else ():
        told = f"mean {QUANTITIES[name].long_name}"
        variables[f"bias_{name}"].attrs = {"units": "logit", "long_name": f"selected where reported, more {told}"}
        for own in (f"selecting_{name}", f"selecting_top_{name}"):
            if own in heads:
                variables[own].attrs = {"units": "logit", "long_name": f"{told}, half that selects"}
    variables["worst_closure"].attrs = {"units": "logit", "long_name": "largest |closure|"}
    return described_widths(heads)


def described_widths(found: xr.Dataset) -> xr.Dataset:
    """With units and a name on each half-width, after those of the mean that it belongs to."""
    variables = found.variables
    for name in [str(name) for name in found.data_vars if str(name).endswith(HALF_WIDTH)]:
        own = name.removesuffix(HALF_WIDTH)
        of = next((each for each in (own, own.partition("_")[2]) if each in found), None)
        if of is not None:
            text = f"half-width of the 95% interval of {variables[of].attrs['long_name']}"
            group = "" if of == own else f", mean over heads ({own.partition('_')[0]})"
            variables[name].attrs = {"units": variables[of].attrs["units"], "long_name": text + group}
    return found
