"""Whether there is text enough for a statement about the model, and how much it takes."""

from math import ceil

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import among
from selfrepair_nn.analysis.tokens import HALF_WIDTH
from selfrepair_nn.confidence import CLUSTERS


def known_means(heads: xr.Dataset, name: str) -> tuple[int, int]:
    """Of how many means of a summary an interval is missing, and how many there are."""
    if (widths := heads.get(f"{name}{HALF_WIDTH}")) is None:
        return (0 if heads.attrs.get("clusters", 0) >= CLUSTERS else 1), 1
    shown = widths.where(heads.tokens > 0) if "tokens" in heads else widths
    return int(np.isinf(shown).sum()), int(shown.notnull().sum())


def needed(heads: xr.Dataset, name: str = "top_self_repair") -> str:
    """How much text an interval of this mean takes, at least, in words."""
    kind, share = heads.attrs.get("clustered_by", "prompt"), heads.attrs.get("share", 1)
    share = share if name.startswith("top_") else 1
    tokens = f" with {ceil(CLUSTERS / share):,} tokens, for the {among(share, heads)}" if share < 1 else ""
    return f"at least {CLUSTERS} {kind}s{tokens}"


def too_short(heads: xr.Dataset, name: str = "top_self_repair") -> str | None:
    """A sentence where no mean of a summary has an interval: what is missing, and what it takes; else None."""
    missing, of = known_means(heads, name)
    if not of or missing < of:
        return None
    kind, count = heads.attrs.get("clustered_by", "prompt"), heads.attrs.get("clusters", 0)
    said = f"Too short to say anything of the model: these numbers are of this text alone, {count} {kind}"
    return f"{said}{'s' * (count != 1)}, and none has an interval. That takes {needed(heads, name)}."
