"""What several figures need of a dataset, in words and as a test; what one figure alone needs stands with it."""

import xarray as xr

from selfrepair_nn.analysis import HEADS, every_token, reinforced
from selfrepair_nn.drawing import Need
from selfrepair_nn.quantities import QUANTITIES, asked_in

OUTCOME = "self_repair_logprob"


def axis(ds: xr.Dataset) -> str | None:
    """The dimension along which several variants lie, or None: it is the one that no store has by itself."""
    dims = ds.self_repair.dims if "self_repair" in ds else ()
    return next((str(d) for d in dims if d == "ablation" or d not in (*QUANTITIES, "case")), None)


def grid(ds: xr.Dataset) -> bool:
    """Single heads under one graph: a store of them, or its summary."""
    return "self_repair" in ds and {*HEADS} <= {*ds.dims} and axis(ds) is None


def along(ds: xr.Dataset, name: str, *labels: str) -> bool:
    """Single heads in variants along an axis of this name, these labels among them."""
    known = {*map(str, ds[name].values)} if axis(ds) == name and name in ds.coords else None
    return known is not None and {*HEADS} <= {*ds.dims} and {*labels} <= known


def first(ds: xr.Dataset, name: str) -> bool:
    """Variants that are read against the first, in which nothing is chosen."""
    return along(ds, name, "none") and str(ds[name].values[0]) == "none"


HEADS_ALONE = Need("single heads, each ablated in one way", grid)
ON_EVERY_TOKEN = Need(
    "single heads, each ablated in one way, on every token",
    lambda ds: grid(ds) and "position" in ds.dims and every_token(ds),
)
OF_THE_NORM = Need(
    ON_EVERY_TOKEN.words,
    lambda ds: ON_EVERY_TOKEN.fits(ds) or (grid(ds) and "position" in ds.dims and asked_in(ds) == "logprob"),
)
OUTCOMES = Need("log-probability (--logprob)", lambda ds: grid(ds) and OUTCOME in ds)
COMPONENTS = Need(
    "every component's change (--components)", lambda ds: grid(ds) and "component_change" in ds
)
NEURONS = Need(
    "single neurons' changes, as `neurons` records", lambda ds: grid(ds) and "neuron_change" in ds
)
NAMED_NEURONS = Need(
    "each token's most repairing neurons, as `neurons` records them with one partner of each prompt",
    lambda ds: NEURONS.fits(ds) and "top_neuron" in ds,
)
ABLATIONS = Need(
    "single heads under several ablations, on every token",
    lambda ds: along(ds, "ablation") and every_token(ds),
)
REINFORCED = Need(
    "heads that read their own write, as in `self_reinforcement`",
    lambda ds: reinforced(ds) and {*HEADS} <= {*ds.dims},
)
