"""What is selected on half of the prompts and reported on the rest, and what selecting on the same ones would add."""

import xarray as xr

from selfrepair_nn.analysis.tokens import Columns, Tokens
from selfrepair_nn.blocks import read
from selfrepair_nn.choosing import halves
from selfrepair_nn.confidence import Estimate

BIASED = ("direct_effect", "self_repair")


def of_halves(ds: xr.Dataset, share: float) -> tuple[Columns, dict[str, int]]:
    """Columns of a summary, and attributes, of a dataset that is selected on one half and reported on the other.

    selecting_direct_effect and selecting_top_self_repair, by which heads are selected, over the half that selects;
    bias_x, for x in BIASED: top_x with the tokens selected among those of the reported half itself, minus top_x as it
    is: how much too large it would look, with half the widths of its interval as of any mean.
    """
    parts = {half: _means(part, share) for half, part in halves(ds).items()}
    tokens, reported = parts["reporting"]
    _, selecting = parts["selecting"]
    _, alone = parts["alone"]
    found: Columns = {}
    for name in ("direct_effect", "top_self_repair"):
        found[f"selecting_{name}"] = (tokens.dims, selecting[name].mean.reshape(tokens.shape))
    for name in BIASED:
        of = f"top_{name}"
        found |= tokens.columns(f"bias_{name}", alone[of].minus(reported[of]))
    counts = {f"prompts_{half}": int(parts[half][0].done.any(0).sum()) for half in ("selecting", "reporting")}
    return found, counts


def _means(ds: xr.Dataset, share: float) -> tuple[Tokens, dict[str, Estimate]]:
    tokens, sums = Tokens.of(ds, share)
    top = tokens.top
    found = tokens.both("direct_effect", sums, top.effect * top.sign)
    found |= tokens.both("self_repair", *read(ds, "self_repair", tokens.done, top))
    return tokens, {name: tally.estimate for name, tally in found.items()}
