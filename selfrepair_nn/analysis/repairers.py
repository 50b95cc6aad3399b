"""Who repairs whom: what each component does when a head is ablated."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import HEADS, among, of_cases, of_heads, percent, require_top, share_of
from selfrepair_nn.analysis.summaries import by_case, by_head
from selfrepair_nn.analysis.tokens import batches, clusters
from selfrepair_nn.blocks import Top, component_sums, direct_effects, done_cases, sites
from selfrepair_nn.case_sites import sites_of
from selfrepair_nn.components import Attention, Head, Mlp, Neuron
from selfrepair_nn.confidence import RATE, Tally, q_values
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public

COUNT = 24
NORMS = {"top_from_post_norms": "norms behind attention", "top_from_norm": "final norm"}
CANCELS = 8
"""How many times its net a head's changes may add up to for the net to be more than a remainder."""


@public
def who_repairs(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """The summary of `by_head`, and what every component does for each ablated head, on its top share of tokens.

    - repair(layer, head, component): mean change of the component's direct effect, in logits; > 0 repairs, < 0
      breaks. At the ablated head itself it is the head's own change, which is not repair: `own` marks it;
    - repair_half_width: half the width of its 95% interval, infinite where fewer than 20 clusters hold a token (where
      there are more than 100 clusters they are joined to 100: there are very many pairs);
    - repair_q_value: of a change that is 0, controlled for the number of pairs (false discovery rate); NaN where there
      is no interval, for `own`, and for what comes before the head. repair_known: whether it is at most 5%;
    - repair_tokens(layer, head): how many tokens that is over. Of a finished run it is top_tokens; of an unfinished
      one with components="top" it can be fewer, for what is stored is the top share of the whole run.

    For each head, the sum of repair over all components but its own, top_from_norm and, of a model that has it,
    top_from_post_norms, is top_self_repair (Equation 2). A result of this function is returned as it is.

    Raises:
        UsageError: the store holds no component changes, or only those of a smaller share; else as by_head.
    """
    return by_head(ds, share) if "repair" in ds else _summed_up(of_heads(ds), share, by_head)


def repairs_of_cases(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """The same of a store of cases, with the summary of `by_case`, over (case, component): `own` is what is ablated."""
    return _summed_up(of_cases(ds), share, by_case)


def _summed_up(ds: xr.Dataset, share: float | None, by: Callable[..., xr.Dataset]) -> xr.Dataset:
    share = share_of(ds, share)
    check_components(ds, share)
    _, top = direct_effects(ds, done_cases(ds), share)
    found = by(ds, share).assign(_pairs(ds, top))
    found = found.assign_coords({n: c for n, c in ds.coords.items() if c.dims == ("component",)})
    told = f"mean change of direct effect, {among(share, ds)}"
    names = {
        "repair": ("logit", told),
        "repair_half_width": ("logit", f"half-width of the 95% interval of {told}"),
    }
    names |= {
        "repair_q_value": ("1", f"false discovery rate of {told}"),
        "own": ("1", "the ablated head itself"),
    }
    names |= {"repair_known": ("1", "differs from 0"), "repair_tokens": ("1", "number of tokens")}
    for name, (units, text) in names.items():
        found[name].attrs = {"units": units, "long_name": text}
    return found


def _pairs(ds: xr.Dataset, top: Top) -> dict[str, tuple]:
    """What is said of every pair of what is ablated and a component."""
    dims, joined = (*sites(ds), "component"), batches(clusters(ds))
    n_heads, n = ds.sizes.get("head", 1), ds.sizes["component"]
    repair, width, p = np.full((3, ds.sizes[dims[0]], n_heads, n), np.nan)
    tokens = np.zeros(repair.shape[:2], int)
    for layer, sums, counts in component_sums(ds, top, joined):
        known = Tally(sums.reshape(-1, sums.shape[-1]), np.repeat(counts, n, axis=0)).estimate
        for found, values in ((repair, known.mean), (width, known.half_width), (p, known.p_value)):
            found[layer] = values.reshape(n_heads, n)
        tokens[layer] = counts.sum(1)
    own = ablated_itself(ds).reshape(repair.shape)
    unreached = (repair == 0) & (width == 0)  # what comes before the ablated head
    q = q_values(np.where(own | unreached, np.nan, p))
    found = {
        "repair": repair,
        "repair_half_width": width,
        "repair_q_value": q,
        "repair_known": q <= RATE,
        "own": own,
    }
    shape = [ds.sizes[d] for d in dims]
    pairs = {name: (dims, values.reshape(shape)) for name, values in found.items()}
    return pairs | {"repair_tokens": (dims[:-1], tokens.reshape(shape[:-1]))}


@public
def strongest_repairs(ds: xr.Dataset, count: int = COUNT, share: float | None = None) -> xr.Dataset:
    """The `count` largest mean changes that an ablation makes of another component, by size, over (rank).

    - repair: the change, in logits, of either sign, with repair_half_width, repair_q_value and repair_known of
      `who_repairs`, which do not say that these are the largest of many; layer, head: the ablated head;
    - component, component_kind, component_layer, component_head: which component changes.

    `ds` is a store or a result of `who_repairs`. The final norm is no component. Errors as in `who_repairs`.
    """
    pairs = who_repairs(ds, share)
    sizes = abs(pairs.repair).where(~pairs.own, 0).fillna(0).values.ravel()
    order = np.argsort(-sizes, kind="stable")[: min(count, int((sizes > 0).sum()))]
    layer, head, component = np.unravel_index(order, pairs.repair.shape)
    names = ("repair", "repair_half_width", "repair_q_value", "repair_known")
    found = {n: ("rank", pairs[n].values[layer, head, component], pairs[n].attrs) for n in names}
    found = xr.Dataset(found, attrs=pairs.attrs)
    labels = {d: ("rank", pairs[d].values[at]) for d, at in zip(HEADS, (layer, head), strict=True)}
    of_component = [name for name, c in pairs.coords.items() if c.dims == ("component",)]
    return found.assign_coords(labels | {n: ("rank", pairs[n].values[component]) for n in of_component})


def clear_heads(pairs: xr.Dataset, count: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Places (layer, head) of the heads of largest net self-repair, in the order of the model; and of those left out.

    Of a result of `who_repairs`: heads that are surely repaired or broken, where any is, else all. Left out are those
    of which hardly anything is left on balance, where there are others: whose known changes add up, whatever their
    signs, to more than CANCELS times their net; of them the same number, those of the largest changes first.
    """
    done = (pairs.tokens > 0).values & np.isfinite(pairs.top_self_repair.values)
    net, gross = abs(pairs.top_self_repair.values), _gross(pairs)
    cancelled = done & (gross > CANCELS * net)
    choices = (done & _sure(pairs) & ~cancelled, done & ~cancelled, done)
    some = next((each for each in choices if each.any()), done)
    chosen = _largest(np.where(some, net, -1), count)
    return sorted(chosen), _largest(np.where(cancelled & ~some, gross, -1), count)


def all_sure(pairs: xr.Dataset, heads: list[tuple[int, int]]) -> bool:
    """Whether each of these (places) is surely repaired or broken."""
    return bool(heads) and all(_sure(pairs)[place] for place in heads)


def _sure(pairs: xr.Dataset) -> np.ndarray:
    return (pairs.top_repaired | pairs.top_broken).values


def _gross(pairs: xr.Dataset) -> np.ndarray:
    """What the known changes of a head add up to whatever their signs, or all where none is known: [layer, head]."""
    known = pairs.repair_known.values if pairs.repair_known.any() else True
    return np.where(known & ~pairs.own.values, abs(np.nan_to_num(pairs.repair.values)), 0).sum(-1)


def _largest(sizes: np.ndarray, count: int) -> list[tuple[int, int]]:
    order = np.argsort(-sizes, axis=None, kind="stable")[: min(count, int((sizes >= 0).sum()))]
    return [divmod(int(at), sizes.shape[1]) for at in order]


def changes_of(pairs: xr.Dataset, heads: list[tuple[int, int]], count: int = COUNT) -> xr.Dataset:
    """The largest changes that the ablation of these heads (places) makes of components and norms, over (rank).

    As `strongest_repairs`, but only what is known to differ from 0, where any is; each head's largest come first. A
    norm is a component of kind "norm" behind the last layer; it is known where its interval excludes 0.
    """
    rows = [row for place, at in enumerate(heads) for row in _changes(pairs, *at, place)]
    rows = [row for row in rows if row["repair_known"]] or rows
    rows.sort(key=lambda row: -abs(row["repair"]))
    first = list({row["place"]: row for row in reversed(rows)}.values())
    chosen = sorted([*first, *(row for row in rows if row not in first)][:count], key=lambda row: -abs(row["repair"]))
    return xr.Dataset({name: ("rank", [row[name] for row in chosen]) for name in (rows[0] if rows else ())})


def _changes(pairs: xr.Dataset, layer: int, head: int, place: int) -> list[dict]:
    """What changes when the head at this place is ablated, one by one."""
    one, found = pairs.isel(layer=layer, head=head), []
    of_head = {"place": place, "layer": int(one["layer"]), "head": int(one["head"])}
    names = {"component": "component", "component_layer": "component_layer", "component_kind": "component_kind"}
    names |= {"repair": "repair", "half_width": "repair_half_width", "repair_known": "repair_known"}
    columns = [one[name].values.tolist() for name in names.values()]
    for own, *row in zip(one.own.values, *columns, strict=True):
        if not own and row[3]:
            found.append(of_head | dict(zip(names, row, strict=True)))
    last = int(pairs.component_layer.max()) + 1
    for name, label in NORMS.items():
        if name in one:
            value, width = float(one[name]), float(one[f"{name}_half_width"])
            row = (label, last, "norm", value, width, bool(abs(value) > width))
            found.append(of_head | dict(zip(names, row, strict=True)))
    return found


def ablated_itself(ds: xr.Dataset) -> np.ndarray:
    """Which components each ablated head or case is made of: bool [case, component]."""
    layer, head = ds.component_layer.values, ds.component_head.values
    if "case" not in ds.dims:
        at = np.meshgrid(*(ds[d].values for d in HEADS), indexing="ij")
        return (layer == at[0].ravel()[:, None]) & (head == at[1].ravel()[:, None])
    labels, none = ds.component.values.astype(object), np.zeros(layer.size, bool)
    cases = ([_is(site, labels, layer, head) for site in case] for case in sites_of(ds))
    return np.array([np.any([none, *case], axis=0) for case in cases])


def _is(site: Any, labels: np.ndarray, layer: np.ndarray, head: np.ndarray) -> np.ndarray:
    if isinstance(site, Head):
        return (layer == site.layer) & (head == site.head)
    if isinstance(site, Attention):
        return (layer == site.layer) & (head >= 0)
    if hasattr(site, "stop"):
        return (layer >= site.layer) & (layer < site.stop)
    return labels == (Mlp(site.layer) if isinstance(site, Neuron) else site).label


def check_components(ds: xr.Dataset, share: float) -> None:
    """Raise UsageError unless a store has the component changes of so large a share of tokens."""
    if "component_change" not in ds:
        raise UsageError("this store holds no component changes: run its recipe with --components top")
    settings = json.loads(ds.attrs.get("settings", "{}"))
    stored = settings.get("share") if settings.get("components") == "top" else None
    if stored is not None:
        require_top(ds, "component changes")
    if stored is not None and share > stored:
        raise UsageError(
            f"this store holds component changes of the top {percent(stored)} of tokens only: "
            f"a share of {share!r} is more than that; give {stored} or less"
        )
