"""What a figure needs a dataset to hold: one entry for each kind that a figure names in TAKES, in words and as a test.

A test is of what is there (dimensions, labels, variables), never of a recipe's name: a store of anybody's own recipe
is drawn as far as it goes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import xarray as xr

from selfrepair_nn.analysis import HEADS, every_token
from selfrepair_nn.blocks import counted_tokens
from selfrepair_nn.quantities import QUANTITIES, TOKEN


class Need(NamedTuple):
    """In words, after "it needs"; and whether a dataset fits."""

    words: str
    fits: Callable[[xr.Dataset], bool]


def axis(ds: xr.Dataset) -> str | None:
    """The dimension along which several variants lie, or None: it is the one that no store has by itself."""
    dims = ds.self_repair.dims if "self_repair" in ds else ()
    return next((str(d) for d in dims if d == "ablation" or d not in (*QUANTITIES, "case")), None)


def _grid(ds: xr.Dataset) -> bool:
    """Single heads under one graph: a store of them, or its summary."""
    return {*HEADS} <= {*ds.dims} and axis(ds) is None and "edited_position" not in ds.coords


def _along(ds: xr.Dataset, name: str, *labels: str) -> bool:
    """Single heads in variants along an axis of this name, these labels among them."""
    known = {*map(str, ds[name].values)} if axis(ds) == name and name in ds.coords else None
    return known is not None and {*HEADS} <= {*ds.dims} and {*labels} <= known


def _first(ds: xr.Dataset, name: str) -> bool:
    """Variants that are read against the first, in which nothing is chosen."""
    return _along(ds, name, "none") and str(ds[name].values[0]) == "none"


def _labelled(ds: xr.Dataset, *begins: str) -> bool:
    """Cases whose labels begin like each of these."""
    known = [str(label) for label in ds["case"].values] if "case" in ds.coords and axis(ds) is None else []
    return all(any(label.startswith(begin) for label in known) for begin in begins)


def _joint(ds: xr.Dataset) -> bool:
    return _labelled(ds, "") and any("+" in str(label) for label in ds["case"].values)


def _repeated(ds: xr.Dataset) -> bool:
    """Whether the tokens that count are repeated ones, at the distance that is looked at."""
    if "counted" not in ds or "distance" not in ds.coords:
        return False
    if ds.sizes["distance"] != 2 or int(ds.distance[0]) != 1:
        return False
    period, counted, token = int(ds.distance[1]) + 1, counted_tokens(ds), ds.token.transpose(*TOKEN).values
    repeated = np.zeros(token.shape, bool)
    repeated[:, period:] = token[:, period:] == token[:, :-period]
    return bool(repeated[counted].all())


NEEDS = {
    "summary": Need("single heads, each ablated in one way", _grid),
    "tokens": Need(
        "single heads, each ablated in one way, on every token",
        lambda ds: _grid(ds) and "position" in ds.dims and every_token(ds),
    ),
    "components": Need(
        "every component's change (--components)", lambda ds: _grid(ds) and "component_change" in ds
    ),
    "neurons": Need(
        "single neurons' changes, as `neurons` records", lambda ds: _grid(ds) and "neuron_change" in ds
    ),
    "attention": Need(
        "attention on repeated tokens, as `induction` records",
        lambda ds: _grid(ds) and ("induction" in ds or ("attention" in ds and _repeated(ds))),
    ),
    "movers": Need(
        "heads ablated one by one and together, and a second token, as in `ioi`",
        lambda ds: _joint(ds) and "other" in ds and "component_change" in ds and "counted" in ds,
    ),
    "contrast": Need(
        "resample beside counterfactual ablation, as in `contrastive`",
        lambda ds: (
            _along(ds, "ablation", "resample", "counterfactual")
            and "counterfactual" in ds
            and "counted" in ds
        ),
    ),
    "ablation": Need(
        "single heads under several ablations, on every token",
        lambda ds: _along(ds, "ablation") and every_token(ds),
    ),
    "lengths": Need(
        "the residual stream's length under several ablations, as `ablation_kinds` records",
        lambda ds: (
            _along(ds, "ablation") and every_token(ds) and ("residual_norm" in ds or "residual_ratio" in ds)
        ),
    ),
    "frozen": Need(
        "three degrees of freezing, as in `freeze`",
        lambda ds: _along(ds, "frozen", "nothing", "all but the final norm", "everything"),
    ),
    "norm": Need("norms frozen one by one, as in `freeze_norms`", lambda ds: _first(ds, "norm")),
    "receiver": Need("receivers one by one, as in `path_patching`", lambda ds: _first(ds, "receiver")),
    "scale": Need(
        "heads that read their own write, as in `self_reinforcement`",
        lambda ds: "slope" in ds or ("edited_position" in ds.coords and _along(ds, "scale")),
    ),
    "case": Need(
        "layers deleted and swapped, as in `layer_position`", lambda ds: _labelled(ds, "layer ", "swap ")
    ),
    "cases": Need(
        "cases: sites that are ablated together", lambda ds: "case" in ds.dims and axis(ds) is None
    ),
    "variants": Need(
        "several variants, side by side",
        lambda ds: axis(ds) is not None and "edited_position" not in ds.coords,
    ),
}
