"""Who moves the name, what is lost without them, and who backs up (section 5.3.1): all at the last position."""

import re

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.summaries import MEANS
from selfrepair_nn.blocks import done_cases, require_known
from selfrepair_nn.errors import UsageError
from selfrepair_nn.variables import VARIABLES

BACKUPS = 6


def name_movers(ds: xr.Dataset) -> xr.Dataset:
    """What each ablation does to the logit difference of the two names, over (case), means over prompts, in logits.

    Variables are those of MEANS, and:

    - kind: "single" for one head, "joint" for several, "moved" for deleted layers;
    - logit_change_se, self_repair_se: standard errors of the means, prompts taken as independent;
    - correct: the share of prompts on which the ablated model still prefers the indirect object, no unit;
    - prompts: how many prompts that is. Attributes logit_difference and correct are those of the clean run.

    Only prompts that are done for every case count.

    Raises:
        UsageError: `ds` is not a store of the ioi recipe, or nothing is done.
    """
    last = _last(ds)
    labels = [str(label) for label in last.case.values]
    clean = last.logit.values.astype(float)
    found = {name: ("case", last[name].values.astype(float).mean(1)) for name in MEANS}
    for name in ("logit_change", "self_repair"):
        found[f"{name}_se"] = ("case", _error(last[name].values.astype(float)))
    correct = (clean + last.logit_change.values > 0).mean(1)
    found |= {
        "correct": ("case", correct),
        "kind": ("case", np.array([_kind(label) for label in labels], object)),
    }
    found = xr.Dataset(found, {"case": labels})
    for name in MEANS:
        found[name].attrs = {"units": "logit", "long_name": f"mean {VARIABLES[name].long_name}"}
    clean_run = {"logit_difference": clean.mean(), "clean_correct": float((clean > 0).mean())}
    return found.assign_attrs(ds.attrs | clean_run | {"prompts": clean.size})


def backups(ds: xr.Dataset, count: int = BACKUPS) -> xr.Dataset:
    """The heads that rise most when the name movers are ablated together, over (rank), the strongest first.

    - component, layer, head: which one it is;
    - direct_effect: in the clean run; joint: after the joint ablation; both means over prompts, in logits;
    - moved: when the layers are deleted that lie between the first name mover and the head, so that it reads what the
      name mover reads; NaN for a head that does not lie behind it;
    - *_se: standard errors of direct_effect, and of the changes joint - direct_effect and moved - direct_effect.

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
    found = {"direct_effect": clean.mean(0), "direct_effect_se": _error(clean.T)}
    for name, change in (("joint", changes[joint]), ("moved", moved)):
        found |= {name: clean.mean(0) + change.mean(0), f"{name}_se": _error(change.T)}
    found = xr.Dataset(
        {name: ("rank", values) for name, values in found.items()}, attrs=name_movers(ds).attrs
    )
    labels = {"component": names[heads]} | places
    return found.assign_coords({name: ("rank", values) for name, values in labels.items()})


def _last(ds: xr.Dataset) -> xr.Dataset:
    """The last position of the prompts that are done, (case, prompt, …)."""
    if "case" not in ds.dims or "other" not in ds or "component_change" not in ds:
        raise UsageError("this store has no name movers, ablated one by one and together: run ioi")
    done = done_cases(ds).all(0)
    if not done.any():
        raise UsageError("this store has nothing done yet")
    last = ds.isel(position=-1, prompt=np.flatnonzero(done)).transpose("case", "prompt", ...)
    for name in (*MEANS, "logit", "component_change", "component_direct_effect"):
        require_known(name, bool(last[name].isnull().any()))
    return last


def _kind(label: str) -> str:
    if label.startswith("layer"):
        return "moved"
    return "joint" if "+" in label else "single"


def _stop(label: str) -> int:
    """The first layer that is left behind deleted ones: of "layer 3" 4, of "layers 3:6" 6."""
    first, *stop = map(int, re.findall(r"\d+", label))
    return stop[0] if stop else first + 1


def _error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the last dimension; NaN of fewer than two."""
    count = values.shape[-1]
    return values.std(-1, ddof=1) / np.sqrt(count) if count > 1 else np.full(values.shape[:-1], np.nan)
