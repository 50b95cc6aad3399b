"""Whether the model does what the prompts of a task ask of it at all: without that there is nothing to repair."""

import json

import numpy as np
import xarray as xr
from scipy.stats import binomtest

from selfrepair_nn.blocks import counted_tokens, done_cases
from selfrepair_nn.confidence import LEVEL
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public
from selfrepair_nn.quantities import TOKEN

CHANCE, MOST = 0.5, 0.9
"""A model that knows nothing is right on half of the tokens; one that does a task, on most of them."""


@public
def does_task(ds: xr.Dataset) -> xr.Dataset:
    """On how many tokens the clean run does what its prompts ask, beside the half that chance would give.

    The criterion is that of the prompts (`source["criterion"]`): the logit of a counted token is above 0; with `back`,
    above that of the same token so many positions earlier, counted or not. A centred logit is meant: of a raw target
    the mean logit is taken off first.

    - right, asked: how many tokens of how many; chance: how many of these by chance;
    - low, high: 95% interval of the share of such tokens (binomial, Clopper and Pearson; tokens independent);
    - does: 1 if the interval lies above chance; else 0 if it lies below nine in ten; else -1, too few to tell.

    Attributes: says, what the criterion is in words; unit, "prompts" where one token of each is asked, or "tokens".

    Raises:
        UsageError: the prompts have no criterion, or nothing is done.
    """
    criterion = _criterion(ds)
    if criterion is None:
        raise UsageError("the prompts of this store are no task: nothing says what the model should do")
    counted = counted_tokens(ds) & np.any(done_cases(ds), axis=0)[:, None]
    if not counted.any():
        raise UsageError("this store has nothing done yet")
    right = _margins(ds, criterion.get("back", 0))[counted] > 0
    interval = binomtest(int(right.sum()), right.size).proportion_ci(LEVEL)
    found = {"right": int(right.sum()), "asked": right.size, "chance": CHANCE * right.size}
    found |= {"low": interval.low, "high": interval.high}
    found["does"] = 1 if interval.low > CHANCE else 0 if interval.high < MOST else -1
    unit = "prompts" if counted.sum(1).max() == 1 else "tokens"
    return xr.Dataset(found, attrs={"says": criterion["says"], "unit": unit})


def verdict(ds: xr.Dataset) -> dict[str, str]:
    """What a summary says of `does_task`, as its attribute `task`; nothing where there is no criterion."""
    if _criterion(ds) is None or not done_cases(ds).any():
        return {}
    found = does_task(ds)
    says, unit = found.attrs["says"], found.attrs["unit"]
    ends = {1: "it does this task", 0: "it does not do this task", -1: f"too few {unit} to tell"}
    return {
        "task": f"the model {says} in {int(found.right):,} of {int(found.asked):,} {unit} "
        f"(chance: {float(found.chance):,g}): {ends[int(found.does)]} "
        f"(95% interval {float(found.low):.0%} to {float(found.high):.0%})"
    }


def _criterion(ds: xr.Dataset) -> dict | None:
    prompts = json.loads(ds.attrs.get("provenance", "{}")).get("prompts", {})
    found = prompts.get("criterion")
    return found if isinstance(found, dict) and "says" in found else None


def _margins(ds: xr.Dataset, back: int) -> np.ndarray:
    """By how much the model does better on each token than if it knew nothing: [prompt, position]."""
    logit = ds.logit.transpose(*TOKEN).values.astype(float)
    if ds.attrs.get("target") == "raw":
        logit = logit - ds.mean_logit.transpose(*TOKEN).values
    return logit - np.roll(logit, back, axis=1) if back else logit
