"""Who moves the name, what is lost without them, and who backs up (section 5.3.1): all at the last position."""

import re

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import MEANS, restored
from selfrepair_nn.analysis.closure import closure
from selfrepair_nn.analysis.summaries import described_widths
from selfrepair_nn.analysis.tokens import HALF_WIDTH, clustering, clusters
from selfrepair_nn.confidence import Estimate, Tally
from selfrepair_nn.errors import UsageError
from selfrepair_nn.variables import VARIABLES

BACKUPS = 6


def name_movers(ds: xr.Dataset) -> xr.Dataset:
    """What each ablation does to the logit difference of the two names, over (case), means over prompts, in logits.

    Variables are those of MEANS, and:

    - kind: "single" for one head, "joint" for several, "moved" for deleted layers;
    - removed = direct_effect - ablated_direct_effect; x_half_width, of each mean: half the width of its 95% interval,
      infinite where there are too few prompts for one; clustered as in `by_head` (attributes clustered_by, clusters);
    - logit_change_se, self_repair_se: standard errors of these means;
    - correct: the share of prompts on which the ablated model still prefers the indirect object, no unit;
    - prompts: how many prompts that is. Attributes logit_difference and correct are those of the clean run.

    Only prompts that are done for every case count.

    Raises:
        UsageError: `ds` is not a store of the ioi recipe, or nothing is done.
    """
    last = _last(ds)
    labels = [str(label) for label in last.case.values]
    clean = last.logit.values.astype(float)
    values = {name: last[name].values.astype(float) for name in MEANS}
    values["removed"] = values["direct_effect"] - values["ablated_direct_effect"]
    found: dict[str, tuple] = {}
    for name, each in values.items():
        known = _known(last, each)
        found |= {name: ("case", known.mean), name + HALF_WIDTH: ("case", known.half_width)}
        if name in ("logit_change", "self_repair"):
            found[f"{name}_se"] = ("case", known.error)
    correct = (clean + last.logit_change.values > 0).mean(1)
    found |= {
        "correct": ("case", correct),
        "kind": ("case", np.array([_kind(label) for label in labels], object)),
    }
    found = xr.Dataset(found, {"case": labels})
    for name in MEANS:
        found[name].attrs = {"units": "logit", "long_name": f"mean {VARIABLES[name].long_name}"}
    found.removed.attrs = {"units": "logit", "long_name": "mean direct effect removed"}
    clean_run = {"logit_difference": clean.mean(), "clean_correct": float((clean > 0).mean())}
    told = clustering(last) | closure(restored(ds)) | {"prompts": clean.size}
    return described_widths(found).assign_attrs(ds.attrs | clean_run | told)


def backups(ds: xr.Dataset, count: int = BACKUPS) -> xr.Dataset:
    """The heads that rise most when the name movers are ablated together, over (rank), the strongest first.

    - component, layer, head: which one it is;
    - direct_effect: in the clean run; joint: after the joint ablation; both means over prompts, in logits;
    - moved: when the layers are deleted that lie between the first name mover and the head, so that it reads what the
      name mover reads; NaN for a head that does not lie behind it;
    - *_half_width: half the widths of the 95% intervals of direct_effect, and of the changes joint - direct_effect and
      moved - direct_effect; infinite where there are too few prompts. *_se: their standard errors.

    The heads are chosen by what was measured: the largest of many are likely to have been measured too large.

    Attributes as in `name_movers`. Errors too.
    """
    last = _last(ds)
    labels = [str(label) for label in last.case.values]
    joint = max(range(len(labels)), key=lambda i: labels[i].count("+"))
    names = np.array([str(name) for name in last.component.values])
    ablated = np.isin(names, labels[joint].split("+"))
    heads = np.flatnonzero((last.component_kind.values == "head") & ~ablated)
    changes = last.component_change.values[:, :, heads].astype(float)
    order = np.argsort(-changes[joint].mean(0), kind="stable")[:count]
    heads, changes = heads[order], changes[:, :, order]
    clean = last.component_direct_effect.values[:, heads].astype(float)
    places = {d: last[f"component_{d}"].values[heads] for d in ("layer", "head")}
    moved = np.full(changes.shape[1:], np.nan)
    for index, label in enumerate(labels):
        if _kind(label) == "moved":
            here = places["layer"] == _stop(label)
            moved[:, here] = changes[index][:, here]
    found = {"direct_effect": clean.mean(0)}
    found |= {
        name: clean.mean(0) + change.mean(0) for name, change in (("joint", changes[joint]), ("moved", moved))
    }
    for name, each in (("direct_effect", clean), ("joint", changes[joint]), ("moved", moved)):
        known = _known(last, each.T)
        found |= {f"{name}_se": known.error, name + HALF_WIDTH: known.half_width}
    found = xr.Dataset(
        {name: ("rank", values) for name, values in found.items()}, attrs=name_movers(ds).attrs
    )
    labels = {"component": names[heads]} | places
    return found.assign_coords({name: ("rank", values) for name, values in labels.items()})


def _last(ds: xr.Dataset) -> xr.Dataset:
    """The last position of the prompts that are done, (case, prompt, …)."""
    ds = restored(ds)
    if "case" not in ds.dims or "other" not in ds or "component_change" not in ds:
        raise UsageError("this store has no name movers, ablated one by one and together: run ioi")
    done = (ds.done & ds.selected).transpose("case", "prompt").values.all(0)
    if not done.any():
        raise UsageError("this store has nothing done yet")
    return ds.isel(position=-1, prompt=np.flatnonzero(done)).transpose("case", "prompt", ...)


def _kind(label: str) -> str:
    if label.startswith("layer"):
        return "moved"
    return "joint" if "+" in label else "single"


def _stop(label: str) -> int:
    """The first layer that is left behind deleted ones: of "layer 3" 4, of "layers 3:6" 6."""
    first, *stop = map(int, re.findall(r"\d+", label))
    return stop[0] if stop else first + 1


def _known(last: xr.Dataset, values: np.ndarray) -> Estimate:
    """What is known of the means of values [case, prompt]."""
    return Tally.of_prompts(values, np.ones(values.shape), clusters(last)).estimate
