"""Who moves the name, what is lost without them, and who backs up (section 5.3.1): all on the tokens that count."""

from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import meant, require_counted, restored
from selfrepair_nn.analysis.closure import closure
from selfrepair_nn.analysis.summaries import described_widths
from selfrepair_nn.analysis.task import verdict
from selfrepair_nn.analysis.tokens import HALF_WIDTH, clustering, clusters
from selfrepair_nn.blocks import (
    clean_values,
    counted_tokens,
    done_cases,
    require_known,
    sums,
    together,
    token_counts,
)
from selfrepair_nn.case_sites import Case, sites_of
from selfrepair_nn.choosing import halves, splits
from selfrepair_nn.components import Head, Layers
from selfrepair_nn.confidence import Estimate, Share, Tally
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public
from selfrepair_nn.quantities import QUANTITIES, TOKEN

BACKUPS = 6
CASES = ("case", "case_sites", "case_layer")


@public
def name_movers(ds: xr.Dataset) -> xr.Dataset:
    """What each ablation does to the logit difference of the two names, over (case), means over tokens, in logits.

    Variables are those that `by_head` has means of, and:

    - kind: "single" for one head, "joint" for several, "moved" for deleted layers;
    - removed = direct_effect - ablated_direct_effect; x_half_width, of each mean: half the width of its 95% interval,
      infinite where there are too few prompts for one; clustered as in `by_head` (attributes clustered_by, clusters);
    - logit_change_se, self_repair_se: standard errors of these means;
    - correct: the share of these tokens on which the ablated model still prefers the indirect object, no unit; with
      correct_half_width.

    Where the recipe found the name movers on half of the prompts, or `choose_tokens` splits the selection, everything
    is of the other half (attributes prompts_selecting, prompts_reporting).

    Attributes: prompts, how many; logit_difference and clean_correct, of the clean run, with half-widths; `task` as in
    `by_head`. Means are over the tokens that count, one of each prompt of the task, of the prompts that are done for
    every case.

    Raises:
        UsageError: `ds` is not a store of the ioi recipe, or of one that says which tokens count, or nothing is done.
    """
    ds, done = _done(ds)
    counts, groups = token_counts(ds, done), clusters(ds)
    cases = sites_of(ds)
    tallies = {name: Tally.of_prompts(sums(ds, name, done), counts, groups) for name in meant(ds)}
    before, after = (tallies[name] for name in ("direct_effect", "ablated_direct_effect"))
    tallies["removed"] = Tally(before.sums - after.sums, before.counts)
    found: Any = {}
    for name, tally in tallies.items():
        known = tally.estimate
        found |= {name: ("case", known.mean), name + HALF_WIDTH: ("case", known.half_width)}
        if name in ("logit_change", "self_repair"):
            found[f"{name}_se"] = ("case", known.error)
    clean, correct = _answers(ds, done, groups)
    found |= {"correct": ("case", correct.mean[1:]), f"correct{HALF_WIDTH}": ("case", correct.half_width[1:])}
    found |= {"kind": ("case", np.array([*map(_kind, cases)], object))}
    found = xr.Dataset(found, {name: ds[name].variable for name in CASES if name in ds.coords})
    for name in meant(ds):
        found[name].attrs = {"units": "logit", "long_name": f"mean {QUANTITIES[name].long_name}"}
    found.removed.attrs = {"units": "logit", "long_name": "mean direct effect removed"}
    found["correct"].attrs = {"units": "1", "long_name": "tokens on which the indirect object is preferred"}
    clean_run = {}
    for name, known in {"logit_difference": clean, "clean_correct": correct}.items():
        clean_run |= {name: float(known.mean[0]), name + HALF_WIDTH: float(known.half_width[0])}
    told = clustering(ds) | closure(ds) | {"prompts": int(done[0].sum())} | verdict(ds)
    if splits(ds):
        selecting = _done(halves(ds)["selecting"])[1]
        told |= {"prompts_selecting": int(selecting[0].sum()), "prompts_reporting": told["prompts"], "share": 1.0}
    return described_widths(found).assign_attrs(ds.attrs | clean_run | told)


@public
def backups(ds: xr.Dataset, count: int = BACKUPS) -> xr.Dataset:
    """The heads that rise most when the name movers are ablated together, over (rank), the strongest first.

    - component, layer, head: which one it is;
    - direct_effect: in the clean run; joint: after the joint ablation; means over the tokens that count, in logits;
    - moved: when the layers are deleted that lie between the first name mover and the head, so that it reads what the
      name mover reads; NaN for a head that does not lie behind it;
    - *_half_width: half the widths of the 95% intervals of direct_effect, and of the changes joint - direct_effect and
      moved - direct_effect; infinite where there are too few prompts. *_se: their standard errors.

    The heads are chosen by what was measured: the largest of many are likely to have been measured too large. Not so
    where the selection is split, as it is where the recipe found the name movers on half of the prompts: then they are
    chosen by that half (their joint - direct_effect there is `selecting_rise`), and all else is of the others.

    Attributes as in `name_movers`. Errors too.
    """
    ds, done = _done(ds)
    cases = sites_of(ds)
    joint = max(range(len(cases)), key=lambda i: len(cases[i]))
    places = zip(ds.component_layer.values, ds.component_head.values, strict=True)
    ablated = np.array([Head(*place) in cases[joint] if min(place) >= 0 else False for place in places])
    heads = np.flatnonzero((ds.component_kind.values == "head") & ~ablated)
    changes = _tallies(ds, "component_change", done[0], heads)
    rises = changes[joint].mean
    if splits(ds):
        other = halves(ds)["selecting"]
        rises = _tallies(other, "component_change", _done(other)[1][0], heads)[joint].mean
    order = np.argsort(-rises, kind="stable")[:count]
    heads, changes = heads[order], [Tally(each.sums[order], each.counts[order]) for each in changes]
    [clean] = _tallies(ds, "component_direct_effect", done[0], heads)
    places = {d: ds[f"component_{d}"].values[heads] for d in ("layer", "head")}
    moved = Tally(np.full(clean.sums.shape, np.nan), clean.counts)
    for index, case in enumerate(cases):
        if _kind(case) == "moved":
            here = places["layer"] == max(site.stop for site in case if isinstance(site, Layers))
            moved.sums[here] = changes[index].sums[here]
    found = {}
    for name, tally in (("direct_effect", clean), ("joint", changes[joint]), ("moved", moved)):
        known = tally.estimate
        found[name] = known.mean if name == "direct_effect" else clean.mean + known.mean
        found |= {f"{name}_se": known.error, name + HALF_WIDTH: known.half_width}
    found |= {"selecting_rise": rises[order]} if splits(ds) else {}
    found = xr.Dataset(
        {name: ("rank", values) for name, values in found.items()}, attrs=name_movers(ds).attrs
    )
    names = np.array([str(name) for name in ds.component.values[heads]])
    labels = {"component": names} | places
    return found.assign_coords({name: ("rank", values) for name, values in labels.items()})


def _done(ds: xr.Dataset) -> tuple[xr.Dataset, np.ndarray]:
    """The store, `restored`, and the prompts that are done for every case: bool [case, prompt]."""
    ds = restored(ds)
    if "case" not in ds.dims or "other" not in ds or "component_change" not in ds:
        raise UsageError("this store has no name movers, ablated one by one and together: run ioi")
    require_counted(ds)
    done = done_cases(ds)
    if not done.all(0).any():
        raise UsageError("this store has nothing done yet")
    return ds, np.broadcast_to(done.all(0), done.shape)


def _answers(ds: xr.Dataset, done: np.ndarray, groups: np.ndarray) -> tuple[Estimate, Share]:
    """On the tokens that count the clean run's logit difference, and how often it is above 0: clean, then by case."""
    counted = counted_tokens(ds) & done[0][:, None]
    clean, right = clean_values(ds, "logit").astype(float), np.zeros((len(done) + 1, done.shape[1]))
    right[0] = ((clean > 0) & counted).sum(1)
    for here, (change,) in together(ds, ("logit_change",)):
        right[1:, here] = ((clean[here] + change > 0) & counted[here]).sum(2)
    counts = np.tile(counted.sum(1), (len(right), 1))
    difference = Tally.of_prompts(np.where(counted, clean, 0).sum(1)[None], counts[:1], groups)
    return difference.estimate, Tally.of_prompts(right, counts, groups).share


def _tallies(ds: xr.Dataset, name: str, done: np.ndarray, heads: np.ndarray) -> list[Tally]:
    """What some heads write on the tokens that count, for each case or for the clean run: [head, cluster]."""
    counted = (counted_tokens(ds) & done[:, None])[..., None]
    array = ds[name].transpose(..., *TOKEN, "component")
    values = array.values.reshape(-1, *array.shape[-3:])[..., heads].astype(float)
    summed = values.sum(2, where=counted).transpose(0, 2, 1)
    require_known(name, bool(np.isnan(summed).any()))
    counts = np.tile(counted.sum((1, 2)), (len(heads), 1))
    return [Tally.of_prompts(each, counts, clusters(ds)) for each in summed]


def _kind(case: Case) -> str:
    if any(isinstance(site, Layers) for site in case):
        return "moved"
    return "joint" if len(case) > 1 else "single"
