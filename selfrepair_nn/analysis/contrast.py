"""What a small edit of the text takes from a head, beside what another text takes: is it repaired alike?"""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.summaries import HEADS, check_store, require_counted
from selfrepair_nn.analysis.task import verdict
from selfrepair_nn.blocks import counted_tokens, done_cases, together, token_counts
from selfrepair_nn.errors import UsageError
from selfrepair_nn.variables import VARIABLES

READ = ("direct_effect", "ablated_direct_effect", "logit_change")


def contrast_by_head(ds: xr.Dataset) -> xr.Dataset:
    """Every head under both ablations, over (ablation, layer, head), on the tokens that count.

    These are the tokens from a prompt's first edit on: the earlier ones cannot differ from their twin's.

    With removed = direct_effect - ablated_direct_effect, what the ablation takes from the head's own direct effect:

    - direct_effect, removed, logit_change: means over tokens, in logits;
    - size: root mean square of removed, in logits: how much the ablation takes, whatever its sign;
    - repaired: the share of what is removed that comes back, by least squares over tokens: the sum of self_repair
      times removed over the sum of removed squared, no unit; 0 is no repair, 1 is all, below 0 more is lost. NaN where
      nothing is removed;
    - tokens(layer, head): how many tokens; edited_share (attribute): the share of all tokens that this is; `task`
      (attribute): as in `by_head`.

    Memory: one block of prompts.

    Raises:
        UsageError: `ds` is not a store of the contrastive recipe, or of one that says which tokens count.
    """
    if "ablation" not in ds.dims or "twin" not in ds:
        raise UsageError("this store has no ablation by a twin beside another: run contrastive")
    require_counted(ds)
    labels = [str(label) for label in ds.ablation.values]
    parts = [_by_head(ds.sel(ablation=label, drop=True)) for label in labels]
    found = {name: (("ablation", *HEADS), np.stack([part[name] for part in parts])) for name in parts[0]}
    found["tokens"] = (HEADS, parts[0]["tokens"])
    found = xr.Dataset(found, {"ablation": labels} | {d: ds[d].variable for d in HEADS})
    names = {
        n: (VARIABLES[n].units, f"mean {VARIABLES[n].long_name}") for n in ("direct_effect", "logit_change")
    }
    names |= {
        "removed": ("logit", "mean direct effect removed"),
        "size": ("logit", "root mean square removed"),
    }
    names |= {
        "repaired": ("1", "share of what is removed that comes back"),
        "tokens": ("1", "number of tokens"),
    }
    for name, (units, text) in names.items():
        found[name].attrs = {"units": units, "long_name": text}
    return found.assign_attrs(ds.attrs | {"edited_share": float(counted_tokens(ds).mean())} | verdict(ds))


def _by_head(ds: xr.Dataset) -> dict[str, np.ndarray]:
    """One ablation, over (layer, head)."""
    check_store(ds)
    done = done_cases(ds)
    totals, tokens = np.zeros((5, len(done))), token_counts(ds, done).sum(1)
    for _, (effect, after, change) in together(ds, READ):
        removed = effect - after
        terms = (effect, removed, change, removed**2, (change + removed) * removed)
        totals += [term.sum((1, 2)) for term in terms]
    with np.errstate(invalid="ignore", divide="ignore"):
        effect, removed, change, square = totals[:4] / tokens
        repaired = np.where(totals[3] > 0, totals[4] / totals[3], np.nan)
    found = {"direct_effect": effect, "removed": removed, "logit_change": change, "size": np.sqrt(square)}
    found |= {"repaired": repaired, "tokens": tokens}
    return {name: values.reshape([ds.sizes[d] for d in HEADS]) for name, values in found.items()}
