"""What the final norm repairs: how much, as a share of the direct effect, and by which part (section 3)."""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.summaries import HEADS, among, by_head, check_store, share_of
from selfrepair_nn.blocks import Sums, direct_effects, done_cases, ratio_sums, ratios, read, token_counts
from selfrepair_nn.variables import VARIABLES

PARTS = ("norm_on_existing", "norm_on_change")


def norm_by_head(ds: xr.Dataset, share: float | None = None) -> xr.Dataset:
    """The summary of `by_head`, and over (layer, head), x over all counted tokens and top_x over the top share:

    - norm_on_existing, norm_on_change: means of the two parts of from_norm, in logits (Appendix B);
    - norm_ratio: mean of from_norm / direct_effect as it is, not clipped, no unit (Figure 10; 0 for a token of no
      direct effect). A few tokens of hardly any direct effect decide it: the clipped one is `norm_share`.

    A result of this function is returned as it is. Memory and errors as in `by_head`.
    """
    share = share_of(ds, share)
    if "norm_ratio" in ds:
        return by_head(ds, share)
    check_store(ds)
    heads = by_head(ds, share)
    shape = [ds.sizes[d] for d in HEADS]
    found = heads.assign({n: (HEADS, values.reshape(shape)) for n, values in _summed_up(ds, share).items()})
    names = {n: f"mean {VARIABLES[n].long_name}" for n in PARTS} | {
        "norm_ratio": "final norm / direct effect"
    }
    for name, text in names.items():
        units = VARIABLES[name].units if name in PARTS else "1"
        found[name].attrs = {"units": units, "long_name": text}
        found[f"top_{name}"].attrs = {"units": units, "long_name": f"{text}, {among(share)}"}
    return found


def _summed_up(ds: xr.Dataset, share: float) -> dict[str, np.ndarray]:
    """Means over (case)."""
    done = done_cases(ds)
    _, top = direct_effects(ds, done, share)
    counts, top_counts = token_counts(ds, done), np.bincount(top.case, minlength=len(done))
    found = {}
    with np.errstate(invalid="ignore"):
        for name in (*PARTS, "from_norm"):
            sums, chosen = read(ds, name, done, top)
            if name == "from_norm":
                name, sums = "norm_ratio", ratio_sums(ds, "from_norm", "direct_effect", done)
                chosen = ratios(chosen, top.effect)
            found[name] = Sums(sums, counts).mean
            found[f"top_{name}"] = np.bincount(top.case, chosen, len(done)) / top_counts
    return found
