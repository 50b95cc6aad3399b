"""What a small edit of the text takes from a head, beside what another text takes: is it repaired alike?"""

from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import HEADS, of_heads, require_counted, restored
from selfrepair_nn.analysis.closure import closure
from selfrepair_nn.analysis.summaries import described_widths
from selfrepair_nn.analysis.task import verdict
from selfrepair_nn.analysis.tokens import HALF_WIDTH, clustering, clusters
from selfrepair_nn.blocks import counted_share, done_cases, together, token_counts
from selfrepair_nn.confidence import Estimate, Tally
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public
from selfrepair_nn.quantities import QUANTITIES

READ = ("direct_effect", "ablated_direct_effect", "logit_change")


@public
def contrast_by_head(ds: xr.Dataset) -> xr.Dataset:
    """Every head under both ablations, over (ablation, layer, head), on the tokens that count.

    These are the tokens from a prompt's first edit on: the earlier ones cannot differ from their counterfactual's.

    With removed = direct_effect - ablated_direct_effect, what the ablation takes from the head's own direct effect:

    - direct_effect, removed, logit_change: means over tokens, in logits;
    - size: root mean square of removed, in logits: how much the ablation takes, whatever its sign; overall_size, over
      (ablation): its mean over heads;
    - repaired: the share of what is removed that comes back, by least squares over tokens: the sum of self_repair
      times removed over the sum of removed squared, no unit; 0 is no repair, 1 is all, below 0 more is lost. NaN where
      nothing is removed. It is a size, and not a test: `by_head` says which heads are repaired;
    - x_half_width of direct_effect, removed, logit_change, repaired, size and overall_size: half the width of the 95%
      interval, infinite where there are too few prompts for one; clustered as in `by_head` (attributes clustered_by,
      clusters);
    - tokens(layer, head): how many tokens; edited_share (attribute): the share of all tokens that this is; `task`
      (attribute): as in `by_head`.

    Memory: one block of prompts.

    Raises:
        UsageError: `ds` is not a store of the contrastive recipe, or of one that says which tokens count.
    """
    ds = restored(ds)
    if "ablation" not in ds.dims or "counterfactual" not in ds:
        raise UsageError("this store has no ablation by a counterfactual beside another: run contrastive")
    require_counted(ds)
    labels = [str(label) for label in ds.ablation.values]
    parts = [_by_head(ds.sel(ablation=label, drop=True)) for label in labels]
    stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    found: Any = {name: (("ablation", *HEADS)[: each.ndim], each) for name, each in stacked.items()}
    found["tokens"] = (HEADS, parts[0]["tokens"])
    found = xr.Dataset(found, {"ablation": labels} | {d: ds[d].variable for d in HEADS})
    names = {
        n: (QUANTITIES[n].units, f"mean {QUANTITIES[n].long_name}") for n in ("direct_effect", "logit_change")
    }
    names |= {
        "removed": ("logit", "mean direct effect removed"),
        "size": ("logit", "root mean square removed"),
        "overall_size": ("logit", "root mean square removed, mean over heads"),
    }
    names |= {
        "repaired": ("1", "share of what is removed that comes back"),
        "tokens": ("1", "number of tokens"),
    }
    for name, (units, text) in names.items():
        found[name].attrs = {"units": units, "long_name": text}
    told = clustering(ds) | closure(ds) | {"edited_share": counted_share(ds)} | verdict(ds)
    return described_widths(found).assign_attrs(ds.attrs | told)


def _by_head(ds: xr.Dataset) -> dict[str, np.ndarray]:
    """One ablation, over (layer, head)."""
    ds = of_heads(ds)
    done = done_cases(ds)
    totals, tokens = np.zeros((5, *done.shape)), token_counts(ds, done)
    for here, (effect, after, change) in together(ds, READ):
        removed = effect - after
        terms = (effect, removed, change, removed**2, (change + removed) * removed)
        totals[:, :, here] = [term.sum(2) for term in terms]
    effect, removed, change, square, back = totals
    ratios = {
        "direct_effect": (effect, tokens),
        "removed": (removed, tokens),
        "logit_change": (change, tokens),
    }
    found: dict[str, np.ndarray] = {}
    for name, (above, below) in (ratios | {"repaired": (back, square)}).items():
        known = Tally.of_prompts(np.asarray(above), np.asarray(below), clusters(ds)).estimate
        found |= {name: known.mean, name + HALF_WIDTH: known.half_width}
    size = _root(Tally.of_prompts(np.asarray(square), tokens, clusters(ds)).estimate)
    found |= {"size": size.mean, f"size{HALF_WIDTH}": size.half_width, "tokens": tokens.sum(1)}
    grid = {name: values.reshape([ds.sizes[d] for d in HEADS]) for name, values in found.items()}
    whole = size.of_groups(np.where(done.any(1), 0, -1), 1)
    return grid | {"overall_size": whole.mean[0], f"overall_size{HALF_WIDTH}": whole.half_width[0]}


def _root(known: Estimate) -> Estimate:
    """The square roots of means, linearised."""
    root = np.sqrt(known.mean)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Estimate(root, known.influence / (2 * root[:, None]), known.shares)
