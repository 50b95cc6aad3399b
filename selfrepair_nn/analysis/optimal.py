"""What ablations cost in log-probability, the optimal constant among them: where it was learned, and on other text."""

import json

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import HEADS, require, required, restored
from selfrepair_nn.analysis.tokens import HALF_WIDTH, clustering, clusters
from selfrepair_nn.blocks import done_cases, sums, token_counts
from selfrepair_nn.choosing import halves
from selfrepair_nn.confidence import Estimate, Tally
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public

OPTIMAL = "optimal"
TEXTS = {"learned on": "selecting", "held out": "reporting"}
NAMES = {
    "loss": "loss of log-probability",
    "excess": "loss of log-probability beyond that by the optimal constant",
    "self_repair": "self-repair in log-probability",
}


@public
def optimal_by_head(ds: xr.Dataset) -> xr.Dataset:
    """What each ablation costs, of a store of `optimal`, over (text, ablation, layer, head), in nats a token.

    - loss: mean over all tokens that count of minus logprob_change; excess: that less the loss under the optimal
      constant, token by token; self_repair: mean of self_repair_logprob;
    - x_half_width: half the width of the 95% interval, documents (or prompts, where these are few) taken as
      independent; overall_x, overall_x_half_width, over (text, ablation): the mean over heads;
    - tokens, over (text, layer, head).

    `text` is "learned on", the half of the run's text on which the constants were learned, and "held out", the other;
    of constants that a file brought it is "run", all of it. A result of this function is returned as it is.

    Raises:
        UsageError: `ds` holds no ablation "optimal" beside others, or not the log-probability of every token.
    """
    if "excess" in ds and "text" in ds.excess.dims:
        return ds
    ds = restored(ds)
    labels = [str(label) for label in np.atleast_1d(ds["ablation"].values)] if "ablation" in ds.coords else []
    if OPTIMAL not in labels or len(labels) < 2:
        raise UsageError("this store has no optimal ablation beside others: run optimal")
    require(ds, (*required(ds), *HEADS, "logprob_change", "self_repair_logprob"))
    if json.loads(ds.attrs.get("settings", "{}")).get("logprob") != "all":
        raise UsageError("the loss is a mean over every token: run with --logprob all")
    parts = halves(ds)
    texts = {text: parts[half] for text, half in TEXTS.items()} if ds.attrs.get("found_on") == "half" else {"run": ds}
    found = xr.concat([_of_text(one, labels) for one in texts.values()], "text")
    found = found.assign_coords({"text": [*texts], "ablation": labels} | {d: ds[d].variable for d in HEADS})
    return _described(found.assign_attrs(ds.attrs | clustering(texts[[*texts][-1]])))


def _of_text(ds: xr.Dataset, labels: list[str]) -> xr.Dataset:
    done = done_cases(ds)
    counts, where, shape = token_counts(ds, done), clusters(ds), [ds.sizes[d] for d in HEADS]
    every = {
        name: [sums(ds.sel(ablation=label), source, done) for label in labels]
        for name, source in (("loss", "logprob_change"), ("self_repair", "self_repair_logprob"))
    }
    every["loss"] = [-each for each in every["loss"]]
    every["excess"] = [each - every["loss"][labels.index(OPTIMAL)] for each in every["loss"]]
    found = {"tokens": (HEADS, counts.sum(1).reshape(shape))}
    group = np.where(done.any(1), 0, -1)
    for name, values in every.items():
        known = [Tally.of_prompts(each, counts, where).estimate for each in values]
        found |= _columns(name, known, ("ablation", *HEADS), (len(labels), *shape))
        groups = [each.of_groups(group, 1) for each in known]
        found |= _columns(f"overall_{name}", groups, ("ablation",), (len(labels),))
    return xr.Dataset(found)


def _columns(name: str, known: list[Estimate], dims: tuple[str, ...], shape: tuple[int, ...]) -> dict[str, tuple]:
    mean, width = (np.stack([getattr(each, part) for each in known]).reshape(shape) for part in ("mean", "half_width"))
    return {name: (dims, mean), name + HALF_WIDTH: (dims, width)}


def _described(found: xr.Dataset) -> xr.Dataset:
    for name, text in NAMES.items():
        for prefix, of in (("", "mean"), ("overall_", "mean over heads of the mean")):
            found[prefix + name].attrs = {"units": "nat", "long_name": f"{of} {text}"}
            width = f"half-width of the 95% interval of the {of} {text}"
            found[prefix + name + HALF_WIDTH].attrs = {"units": "nat", "long_name": width}
    return found
