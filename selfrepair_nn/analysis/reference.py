"""A store beside the per-layer means that the paper's authors published."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import percent
from selfrepair_nn.analysis.layers import by_layer
from selfrepair_nn.analysis.summaries import by_head
from selfrepair_nn.analysis.tokens import HALF_WIDTH
from selfrepair_nn.choosing import tail_of
from selfrepair_nn.errors import UsageError
from selfrepair_nn.face import public
from selfrepair_nn.quantities import SHARE

PUBLISHED = Path(__file__).parents[1] / "paper" / "layer_means.json"
QUANTITIES = (
    "direct_effect",
    "ablated_direct_effect",
    "logit_change",
    "self_repair",
    "from_heads",
    "from_mlps",
    "from_norm",
    "norm_share",
)
PAPER_TOKENS = "about 20,000 of 1 million"
"""As section 2.2 says of these models."""
SETTINGS = {"ablation": "resample", "target": "centred", "value_bias": "output", "freeze": "none"}
"""How the published numbers were measured."""


@public
def compare_paper(ds: xr.Dataset, reference: str | None = None) -> xr.Dataset:
    """A store's means of each layer beside the published ones, over (source, layer), source "store" and "paper".

    Variables are those of QUANTITIES, the same for both: means over a layer's heads of the means over each head's
    top 2% of tokens by direct effect, in logits; norm_share: of clip(from_norm / direct_effect, 0, 1), no unit.
    x_half_width(layer), of each: half the width of the 95% interval of the store's mean; nothing was published of how
    well the paper's are known. x_outside(layer): whether the published mean lies outside the store's interval.
    Attribute `top_tokens`: how many tokens of how many a top share is, on either side, in words.
    `reference_layer(layer)` is the layer of the reference that each is put beside: the same layer, or the one at the
    same depth where the models have different numbers of layers.

    Args:
        ds: a store or its summary.
        reference: a name of `references()`; default: the one that has the name of the store's model.

    The attributes are those of the summary, with `reference` and, where the store was not measured as the published
    numbers were, `differs`: one sentence.

    Raises:
        UsageError: no such reference, or none of the model's name; else as by_head.
    """
    heads = by_head(ds, SHARE)
    if tail_of(heads) != "top":
        raise UsageError(f"the published means are of each head's top share, not its {tail_of(heads)}: choose the top")
    layers = by_layer(heads, SHARE)
    name = reference or _same_model(layers)
    if name not in references():
        raise UsageError(
            f"no reference {name!r}; the paper's per-layer means are of {', '.join(references())}"
        )
    published = references()[name]
    beside = _beside(layers, published["layers"])
    found = {}
    for quantity in QUANTITIES:
        name_here = quantity if quantity == "norm_share" else f"top_{quantity}"
        own = layers[name_here]
        values = np.stack([own.values, np.array(published[quantity])[beside]])
        found[quantity] = xr.Variable(("source", "layer"), values, own.attrs)
        width = layers[name_here + HALF_WIDTH]
        found[quantity + HALF_WIDTH] = width.variable
        outside = abs(values[0] - values[1]) > width.values
        told = {"units": "1", "long_name": f"published outside the interval of the {own.attrs['long_name']}"}
        found[f"{quantity}_outside"] = xr.Variable("layer", outside, told)
    labels = {"source": ["store", "paper"], "layer": layers["layer"], "reference_layer": ("layer", beside)}
    sizes = {"reference_n_layers": published["layers"], "n_layers": _n_layers(layers)}
    told = {"reference": name, "top_tokens": _top_tokens(heads)}
    found = xr.Dataset(found, labels, layers.attrs | sizes | told)
    return found.assign_attrs(differs=_differs(layers)) if _differs(layers) else found


@cache
def references() -> dict[str, dict[str, Any]]:
    """The published per-layer means: model -> {"layers": number of layers, quantity -> list over layers}."""
    return json.loads(PUBLISHED.read_text())["models"]


def reference_of(ds: xr.Dataset) -> str | None:
    """The name of the published model that a store's model is, or None."""
    name = str(ds.attrs.get("model", "")).rstrip("/").rpartition("/")[2].lower()
    return next((key for key, one in references().items() if name in one["names"]), None)


def _top_tokens(heads: xr.Dataset) -> str:
    """How large the top share is on either side."""
    here, of = (heads[name].max() for name in ("top_tokens", "tokens"))
    return f"top {percent(SHARE)}: {int(here):,} of {int(of):,} tokens a head here, {PAPER_TOKENS} there"


def _same_model(ds: xr.Dataset) -> str:
    found = reference_of(ds)
    if found is None:
        raise UsageError(
            f"the paper's per-layer means are of {', '.join(references())}, none of them {ds.attrs.get('model')!r}: "
            "name one of them as the reference (--reference)"
        )
    return found


def _n_layers(layers: xr.Dataset) -> int:
    return int(layers.attrs.get("n_layers", layers["layer"].max() + 1))


def _beside(layers: xr.Dataset, n_layers: int) -> np.ndarray:
    """The reference's layer at the same depth, over (layer)."""
    deepest = max(_n_layers(layers) - 1, 1)
    return np.rint(layers["layer"].values * (n_layers - 1) / deepest).astype(int)


def _differs(layers: xr.Dataset) -> str:
    unlike = {k: layers.attrs[k] for k, v in SETTINGS.items() if layers.attrs.get(k, v) != v}
    said = [f"{k} is {v} here, {SETTINGS[k]} there" for k, v in unlike.items()]
    if layers.attrs["counted_share"] < 1:
        said.append(f"{percent(layers.attrs['counted_share'])} of tokens count here, all there")
    return f"Not measured as in the paper: {'; '.join(said)}." if said else ""
