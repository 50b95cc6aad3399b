"""What a small edit of the text takes from a head, beside what another text takes: is it repaired alike?"""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.summaries import HEADS, check_store
from selfrepair_nn.blocks import done_cases, together
from selfrepair_nn.errors import UsageError
from selfrepair_nn.variables import SWEEP, VARIABLES

READ = ("direct_effect", "ablated_direct_effect", "logit_change")


def contrast_by_head(ds: xr.Dataset) -> xr.Dataset:
    """Every head under both ablations, over (ablation, layer, head), on the tokens from the first edit of a prompt on.

    With removed = direct_effect - ablated_direct_effect, what the ablation takes from the head's own direct effect:

    - direct_effect, removed, logit_change: means over tokens, in logits;
    - size: root mean square of removed, in logits: how much the ablation takes, whatever its sign;
    - repaired: the share of what is removed that comes back, by least squares over tokens: the sum of self_repair
      times removed over the sum of removed squared, no unit; 0 is no repair, 1 is all, below 0 more is lost. NaN where
      nothing is removed;
    - tokens(layer, head): how many tokens; edited_share (attribute): the share of all tokens that this is.

    Memory: one block of prompts.

    Raises:
        UsageError: `ds` is not a store of the contrastive recipe.
    """
    if "ablation" not in ds.dims or "twin" not in ds:
        raise UsageError("this store has no ablation by a twin beside another: run contrastive")
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
    return found.assign_attrs(ds.attrs | {"edited_share": float(_edited(ds).mean())})


def _edited(ds: xr.Dataset) -> np.ndarray:
    """Which tokens can differ from their twin's run: from the first exchanged one on, bool [prompt, position]."""
    differs = (ds.twin != ds.token).transpose(*SWEEP[2:]).values
    return np.logical_or.accumulate(differs, axis=1)


def _by_head(ds: xr.Dataset) -> dict[str, np.ndarray]:
    """One ablation, over (layer, head)."""
    check_store(ds)
    done, edited = done_cases(ds), _edited(ds)
    totals, tokens = np.zeros((5, len(done))), np.zeros(len(done), int)
    for here, values in together(ds, READ):
        counted = done[:, here, None] & edited[here]
        effect, after, change = (np.where(counted, each, 0) for each in values)
        removed = effect - after
        terms = (effect, removed, change, removed**2, (change + removed) * removed)
        totals += [term.sum((1, 2)) for term in terms]
        tokens += counted.sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        effect, removed, change, square = totals[:4] / tokens
        repaired = np.where(totals[3] > 0, totals[4] / totals[3], np.nan)
    found = {"direct_effect": effect, "removed": removed, "logit_change": change, "size": np.sqrt(square)}
    found |= {"repaired": repaired, "tokens": tokens}
    return {name: values.reshape([ds.sizes[d] for d in HEADS]) for name, values in found.items()}
