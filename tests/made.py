"""Stores from numbers written by hand or drawn, of the heads recipe, any axis and any cases; names they all hold."""

import numpy as np
import xarray as xr

from selfrepair_nn.analysis import MEANS
from selfrepair_nn.case_sites import written
from selfrepair_nn.components import Attention, Head, Layers, Mlp, Neuron, Swap
from selfrepair_nn.quantities import QUANTITIES, recorded

SWEEP = ("layer", "head", "prompt", "position")
PARTS = ("norm_on_existing", "norm_on_change")
CLEAN = tuple(q.name for q in recorded(("always",), "clean") if q.dims == SWEEP[2:])
SWEPT = tuple(name for name, q in QUANTITIES.items() if q.dims == SWEEP and q.when == "always")
COMPONENT = tuple(q.name for q in recorded(("components",)))


def hand_made(effects, **others) -> xr.Dataset:
    """A store of one head from lists [prompt][position]; what is not given is 0."""
    effects = np.array(effects, dtype=float)[None, None]
    values = {name: np.zeros_like(effects) for name in (*MEANS, *PARTS, "closure")} | {
        "direct_effect": effects
    }
    values |= {name: np.array(value, dtype=float)[None, None] for name, value in others.items()}
    done = np.ones(effects.shape[:3], bool)
    return xr.Dataset(
        {name: (SWEEP, value) for name, value in values.items()}
        | {"done": (SWEEP[:3], done), "selected": (SWEEP[:2], done.all(2)), "noise_floor": ("layer", [0.01])}
    )


AXES = {
    None: None,
    "ablation": ["resample", "zero"],
    "last mlp": ["live", "kept"],
    "scale": [0.5, 1.0],
    "dose": [0.0, 1.0, 3.0],
    "one": ["alone"],
}
CASES = {
    "heads": [(Head(0, 1),), (Head(1, 0),)],
    "pairs": [(Head(0, 1), Head(1, 0)), (Head(1, 0), Head(1, 1))],
    "neurons": [(Neuron(1, 7),)],
    "layers": [(Layers(0, 1),), (Layers(0, 2),)],
    "swaps": [(Swap(0),)],
    "deleted and swapped": [(Layers(0, 1),), (Layers(1, 2),), (Swap(0),)],
    "mixed": [(Attention(0),), (Mlp(1),), (Head(0, 1), Mlp(1)), (Neuron(0, 3), Neuron(1, 2))],
    "many": [(Head(layer, head),) for layer in range(9) for head in range(8)],
}


def any_store(cases=None, axis=None, *, prompts=3, positions=5, size=1.0, done=True, counted=True, edited=False):
    """A store with these cases (of CASES; None: a grid of 2 × 2 heads) and axis (of AXES), its numbers of this size.

    `done` and `counted` say so for each prompt. `edited`: as if heads read their own write.
    """
    sites = ("layer", "head") if cases is None else ("case",)
    shape = (2, 2) if cases is None else (len(CASES[cases]),)
    along, variants = ((axis,), (len(AXES[axis]),)) if axis else ((), ())
    rng = np.random.default_rng(0)
    full, token = (*shape, prompts, positions), ("prompt", "position")
    one = {name: size * rng.standard_t(3, full) for name in (*MEANS, *PARTS)}
    found = {name: ((*sites, *token), values) for name, values in one.items()}
    for name in [name for name in found if name != "direct_effect"] if axis else ():
        found[name] = ((*along, *sites, *token), size * rng.standard_t(3, (*variants, *full)))
    found["closure"] = ((*along, *sites, *token), np.zeros((*variants, *full)))
    found |= {name: (token, size * rng.normal(size=full[-2:])) for name in ("logit", "target_constant")}
    found["norm_scale"] = (token, np.exp(rng.normal(size=full[-2:])))
    found["ablated_norm_scale"] = ((*along, *sites, *token), np.exp(rng.normal(size=(*variants, *full))))
    ready = np.broadcast_to(done, (*shape, prompts))
    found |= {"done": ((*sites, "prompt"), ready), "selected": (sites, np.ones(shape, bool))}
    found["noise_floor"] = (sites[0], np.full(shape[0], 1e-6))
    labels = {"counted": (token, np.broadcast_to(np.array(counted)[..., None], (prompts, positions)))}
    labels["document"] = ("prompt", np.arange(prompts))
    labels |= {axis: AXES[axis]} if axis else {}
    labels |= {d: [0, 1] for d in sites} if cases is None else _labelled(CASES[cases])
    labels |= {"edited_position": ("prompt", np.arange(prompts) % positions)} if edited else {}
    told = {"model": "made", "ablation": "zero", "n_layers": 9, "n_heads": 5, "dtype": "float64"}
    return xr.Dataset(found, labels, told)


def _labelled(cases):
    labels = ["+".join(site.label for site in case) for case in cases]
    held = ("case", [written(case) for case in cases])
    return {"case": labels, "case_sites": held, "case_layer": ("case", [case[0].layer for case in cases])}
