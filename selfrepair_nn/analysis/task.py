"""Whether the model does what the prompts of a task ask of it at all: without that there is nothing to repair."""

import json

import numpy as np
import xarray as xr
from scipy.stats import binomtest

from selfrepair_nn.blocks import counted_tokens, done_cases
from selfrepair_nn.confidence import LEVEL
from selfrepair_nn.errors import UsageError
from selfrepair_nn.variables import TOKEN

CHANCE = 0.5


def does_task(ds: xr.Dataset) -> xr.Dataset:
    """On how many prompts the clean run does what its prompts ask, beside the half that chance would give.

    The criterion is that of the prompts (`source["criterion"]`): on a prompt, the mean of the logit over the counted
    tokens is above 0; with `back`, above that of the same tokens so many positions earlier, counted or not. A centred
    logit is meant: of a raw target the mean logit is taken off first.

    - right, asked: how many prompts of how many; chance: how many of these by chance;
    - low, high: 95% interval of the share of such prompts (binomial, Clopper and Pearson; prompts independent);
    - does: 1 if the interval lies above chance, 0 if it does not, -1 if there are too few prompts to tell: if all of
      them were right, it would not either.

    Raises:
        UsageError: the prompts have no criterion, or nothing is done.
    """
    criterion = _criterion(ds)
    if criterion is None:
        raise UsageError("the prompts of this store are no task: nothing says what the model should do")
    known = done_cases(ds).any(0)
    if not known.any():
        raise UsageError("this store has nothing done yet")
    right = _margins(ds, criterion.get("back", 0))[known] > 0
    low, high = _interval(right.sum(), right.size)
    best, _ = _interval(right.size, right.size)
    found = {"right": int(right.sum()), "asked": right.size, "chance": CHANCE * right.size}
    found |= {"low": low, "high": high, "does": int(low > CHANCE) if best > CHANCE else -1}
    return xr.Dataset(found, attrs={"says": criterion["says"]})


def verdict(ds: xr.Dataset) -> dict[str, str]:
    """What a summary says of `does_task`, as its attribute `task`; nothing where there is no criterion."""
    if _criterion(ds) is None or not done_cases(ds).any():
        return {}
    found = does_task(ds)
    right, asked = int(found.right), int(found.asked)
    interval = f"95% interval {float(found.low):.0%} to {float(found.high):.0%}"
    ends = {1: "it does this task", 0: "it does not do this task", -1: "too few prompts to tell"}
    return {
        "task": f"the model {found.attrs['says']} in {right} of {asked} prompts "
        f"(chance: {float(found.chance):g}): {ends[int(found.does)]} ({interval})"
    }


def _criterion(ds: xr.Dataset) -> dict | None:
    prompts = json.loads(ds.attrs.get("provenance", "{}")).get("prompts", {})
    found = prompts.get("criterion")
    return found if isinstance(found, dict) and "says" in found else None


def _margins(ds: xr.Dataset, back: int) -> np.ndarray:
    """By how much each prompt does better than it would if the model knew nothing: [prompt]."""
    logit = ds.logit.transpose(*TOKEN).values.astype(float)
    if ds.attrs.get("target") == "raw":
        logit = logit - ds.mean_logit.transpose(*TOKEN).values
    counted = counted_tokens(ds)
    if back:
        logit = logit - np.roll(logit, back, axis=1)
    return logit.sum(1, where=counted)


def _interval(right: int, asked: int) -> tuple[float, float]:
    found = binomtest(int(right), int(asked)).proportion_ci(LEVEL)
    return found.low, found.high
