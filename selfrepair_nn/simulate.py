"""A made-up store of the `heads` recipe, in memory: to test, document and try the figures without a model.

Every identity between the variables holds exactly (Equations 1 and 2, Appendix B); the shapes are those seen
in real models: heavy-tailed direct effects, repair in late layers, breakage in early ones.
"""

import json
from collections.abc import Iterable

import numpy as np
import xarray as xr

from selfrepair_nn.components import Head
from selfrepair_nn.components import components as every_component
from selfrepair_nn.equations import complete
from selfrepair_nn.errors import UsageError
from selfrepair_nn.provenance import discovery
from selfrepair_nn.quantities import COORDINATES, QUANTITIES, SHARE, SWEEP
from selfrepair_nn.replacements import REPLACEMENTS
from selfrepair_nn.values import one_of

Arrays = dict[str, np.ndarray]
Random = np.random.Generator

WORDS = [" the", " of", " and", " to", " in", " a", " is", ",", ".", " that", " head", " norm"]
MEASURED = (
    "logit",
    "target_constant",
    "norm_scale",
    "direct_effect",
    "ablated_direct_effect",
    "logit_change",
    "from_heads",
    "from_mlps",
    "ablated_norm_scale",
)
SPIKE_RATE, SPIKE_SIZE = 0.03, 4.0  # how often a head matters, and how much, in units of its usual size


def simulate_heads(
    n_layers: int = 12,
    n_heads: int = 12,
    n_prompts: int = 32,
    n_positions: int = 63,
    *,
    seed: int = 0,
    ablation: str = "resample",
    model: str = "simulated",
    components: bool = False,
    dtype: str = "float32",
    noise: float = 2e-6,
    resamples: int = 1,
) -> xr.Dataset:
    """A complete store of the `heads` recipe over (layer, head, prompt, position), reproducible.

    `noise` (logits) is the declared noise floor of the first layer, and the size of every change under
    identity ablation. `components` adds the component dimension, whose changes add up to the stored sums. With
    several `resamples` what is of an ablated run has a dimension resample, the first as with one.

    Raises:
        UsageError: an unknown ablation, a size below 1, a resample ablation with no second prompt, or several resamples
            of another ablation, or with components.
    """
    arguments = locals().copy()
    one_of("ablation", ablation, REPLACEMENTS)
    one_of("dtype", dtype, ("float32", "float64"))
    sizes = {"layer": n_layers, "head": n_heads, "prompt": n_prompts, "position": n_positions}
    _check(sizes, ablation)
    if resamples != 1 and (resamples < 1 or ablation != "resample" or components):
        raise UsageError(f"resamples is {resamples}: several are of resample ablation, without components")
    rng = np.random.default_rng(seed)
    values = _coordinates(rng, sizes, ablation)
    values |= _clean(rng, sizes)
    each = []
    for _ in range(resamples):
        made = values | _ablated(rng, values, ablation, noise)
        each.append(made | complete({name: made[name].astype(dtype) for name in MEASURED}))
    values = each[0]
    if resamples > 1:
        values |= _several(each)
    values |= {
        "selected": np.ones((n_layers, n_heads), bool),
        "done": np.ones((n_layers, n_heads, n_prompts), bool),
        "noise_floor": noise * np.linspace(1, 0.4, n_layers),
    }
    values["threshold"] = _thresholds(values["direct_effect"])
    if components:
        values |= _components(rng, values, n_layers, n_heads)
    ds = _dataset(values, dtype)
    return ds.assign_attrs(_provenance(arguments))


def unfinished(ds: xr.Dataset, selected: Iterable[Head] | None = None, done=None) -> xr.Dataset:
    """The store `ds` as it looks before its end: NaN wherever a head is not `selected` or not `done`; no thresholds.

    `selected` lists the heads of the run (None: all of them); `done` is a boolean array that broadcasts to
    (layer, head, prompt) (None: as in `ds`).
    """
    chosen = ds.selected
    if selected is not None:
        wanted = {(head.layer, head.head) for head in selected}
        chosen = chosen.copy(data=[[(i, j) in wanted for j in ds["head"].values] for i in ds["layer"].values])
    computed = ds.done if done is None else ds.done.copy(data=np.broadcast_to(done, ds.done.shape).copy())
    computed = (computed & chosen).assign_attrs(ds.done.attrs)
    swept = [name for name, each in ds.data_vars.items() if each.dims[:4] == SWEEP]
    blanked = {name: ds[name].where(computed).assign_attrs(ds[name].attrs) for name in swept}
    if "threshold" in ds:
        whole = (computed | ~chosen).all()
        blanked["threshold"] = ds.threshold.where(chosen & whole).assign_attrs(ds.threshold.attrs)
    return ds.assign({"selected": chosen, "done": computed} | blanked)


def _several(each: list[Arrays]) -> Arrays:
    """What differs between partners, along a first dimension; a prompt's are those so many places before it."""
    own = [name for name in each[0] if name in QUANTITIES and QUANTITIES[name].ablated]
    found = {name: np.stack([one[name] for one in each]) for name in own}
    partner = each[0]["partner"]
    shifts = [partner]
    while len(shifts) < len(each):
        shifts.append(partner[shifts[-1]])
    return found | {"partner": np.stack(shifts), "resample": np.arange(len(each))}


def _check(sizes: dict[str, int], ablation: str) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"n_{name}s is {size}: a store needs at least one {name}")
    if ablation == "resample" and sizes["prompt"] < 2:
        raise UsageError("resample ablation takes from another prompt: n_prompts should be 2 or more")


def _coordinates(rng: Random, sizes: dict[str, int], ablation: str) -> Arrays:
    n_prompts, n_positions = sizes["prompt"], sizes["position"]
    ids = np.minimum(rng.zipf(1.5, (n_prompts, n_positions + 1)), len(WORDS)) - 1
    text = np.array(WORDS, dtype=object)[ids]
    order = rng.permutation(n_prompts)
    partner = np.full(n_prompts, -1)
    if ablation == "resample":
        partner[order] = np.roll(order, 1)
    labels = [[Head(layer, head).label for head in range(sizes["head"])] for layer in range(sizes["layer"])]
    return {d: np.arange(n) for d, n in sizes.items()} | {
        "head_label": np.array(labels, dtype=object),
        "token": ids[:, :-1],
        "target": ids[:, 1:],
        "token_text": text[:, :-1],
        "target_text": text[:, 1:],
        "counted": np.ones((n_prompts, n_positions), bool),
        "document": np.cumsum(rng.random(n_prompts) < 0.6),
        "partner": partner,
        "ablation": np.array(ablation, dtype=object),
    }


def _clean(rng: Random, sizes: dict[str, int]) -> Arrays:
    """The clean run: what every component writes (names with a leading _ are not stored) and the sum."""
    n_layers, n_heads, *token = sizes.values()
    depth = np.linspace(0, 1, n_layers)[:, None]
    usual = np.exp(rng.normal(np.log(0.03 + 0.09 * depth), 0.6, (n_layers, n_heads)))
    lean = rng.normal(0.1, 0.25, (n_layers, n_heads))
    shape = (n_layers, n_heads, *token)
    spikes = (rng.random(shape) < SPIKE_RATE) * rng.exponential(SPIKE_SIZE, shape)
    effects = _per_head(usual) * (_per_head(lean) + 0.5 * rng.standard_t(4, shape) + spikes)
    found = {
        "direct_effect": effects,
        "_mlp": rng.normal(6 / n_layers, 6 / n_layers, (n_layers, *token)),
        "_bias": rng.normal(0, 0.05, (n_layers, *token)),
        "_embedding": rng.normal(0, 1, (2, *token)),
        "target_constant": rng.normal(0, 0.3, token),
        "mean_logit": rng.normal(-5, 1.5, token),
        "norm_scale": np.exp(rng.normal(3, 0.15, token)),
    }
    summed = effects.sum((0, 1)) + sum(found[part].sum(0) for part in ("_mlp", "_bias", "_embedding"))
    return found | {"logit": summed + found["target_constant"]}


def _ablated(rng: Random, clean: Arrays, ablation: str, noise: float) -> Arrays:
    """What an ablated run would measure: draws what each part does; the logit's change follows."""
    effect = clean["direct_effect"]
    new = _replaced(rng, effect, ablation, noise)
    from_heads, from_mlps, gain = _reactions(rng, effect, ablation, noise)
    change = new - effect + from_heads + from_mlps
    from_norm = gain * (clean["logit"] - clean["target_constant"] + change)
    return {
        "ablated_direct_effect": new,
        "logit_change": change + from_norm,
        "mean_logit_change": -0.1 * change,
        "from_heads": from_heads,
        "from_mlps": from_mlps,
        "ablated_norm_scale": clean["norm_scale"] / (1 + gain),
    }


def _replaced(rng: Random, effect: np.ndarray, ablation: str, noise: float) -> np.ndarray:
    """The head's direct effect after its own ablation."""
    if ablation == "identity":
        return effect + 0.1 * noise * rng.normal(size=effect.shape)
    if ablation == "zero":
        return np.zeros_like(effect)
    typical = 0.3 * effect.mean((2, 3), keepdims=True)
    spread = {"mean": 0.1, "resample": 0.4}[ablation] * effect.std((2, 3), keepdims=True)
    return typical + spread * rng.standard_t(4, effect.shape)


def _reactions(rng: Random, effect: np.ndarray, ablation: str, noise: float) -> tuple[np.ndarray, ...]:
    """What later heads and MLPs add (logits), and the gain S/S' - 1 of the final norm."""
    if ablation == "identity":
        from_heads, from_mlps, gain = noise * rng.normal(0, 0.5, (3, *effect.shape))
        from_heads[-1] = 0
        return from_heads, from_mlps, gain / 10
    n_layers, n_heads = effect.shape[:2]
    depth = np.linspace(0, 1, n_layers)[:, None]
    share = _per_head(rng.normal(-0.25 + 0.6 * depth, 0.2, (n_layers, n_heads)))
    harm = _per_head(0.06 * (1 - depth) ** 2 * np.exp(rng.normal(0, 0.7, (n_layers, n_heads))))
    by_heads = _per_head(rng.beta(2, 3, (n_layers, n_heads)) * (np.arange(n_layers) < n_layers - 1)[:, None])
    usual = effect.std((2, 3), keepdims=True)
    repair = share * effect * rng.gamma(2, 0.5, effect.shape) + 0.3 * usual * rng.standard_t(4, effect.shape)
    broken = harm * rng.exponential(1, effect.shape)
    amplified = _per_head(rng.normal(0.3 * depth, 0.1, (n_layers, n_heads)))
    if ablation == "zero":
        amplified = 1.5 * amplified
    gain = amplified * effect * rng.gamma(2, 0.5, effect.shape) / 10 + rng.normal(0, 0.003, effect.shape)
    return by_heads * repair, (1 - by_heads) * repair - broken, np.clip(gain, -0.3, 0.3)


def _components(rng: Random, values: Arrays, n_layers: int, n_heads: int) -> dict:
    """Share each stored sum out over the later components, a few of them taking most of it."""
    named = every_component(n_layers, n_heads, position_embedding=True, attention_bias=True)
    kind, at, head = (np.array([getattr(c, field) for c in named]) for field in ("kind", "layer", "head"))
    effects = np.empty((*values["token"].shape, len(named)))
    effects[..., :2] = np.moveaxis(values["_embedding"], 0, -1)
    for name, part in (("mlp", "_mlp"), ("attention_bias", "_bias")):
        effects[..., kind == name] = np.moveaxis(values[part], 0, -1)
    effects[..., kind == "head"] = np.moveaxis(values["direct_effect"].reshape(-1, *effects.shape[:2]), 0, -1)
    change = np.zeros((n_layers, n_heads, *effects.shape))
    for layer in range(n_layers):
        later_heads, later_mlps = (kind == "head") & (at > layer), (kind == "mlp") & (at >= layer)
        for total, receivers in (("from_heads", later_heads), ("from_mlps", later_mlps)):
            weight = rng.exponential(1, (n_heads, 1, 1, receivers.sum())) ** 3
            weight /= weight.sum(-1, keepdims=True)
            change[layer][..., receivers] = values[total][layer][..., None] * weight
    own = values["ablated_direct_effect"] - values["direct_effect"]
    for i, c in enumerate(named):
        if c.kind == "head":
            change[c.layer, c.head, ..., i] = own[c.layer, c.head]
    return {
        "component": np.array([c.label for c in named], dtype=object),
        "component_kind": kind.astype(object),
        "component_layer": at,
        "component_head": head,
        "component_direct_effect": effects,
        "component_change": change,
    }


def _thresholds(effects: np.ndarray) -> np.ndarray:
    """The least of each head's top share: [layer, head]."""
    ranked = np.sort(effects.reshape(*effects.shape[:2], -1), axis=-1)
    return ranked[..., -max(1, int(SHARE * ranked.shape[-1]))]


def _per_head(values: np.ndarray) -> np.ndarray:
    return values[:, :, None, None]


def _dataset(values: Arrays, dtype: str) -> xr.Dataset:
    arrays = {}
    for name, q in QUANTITIES.items():
        if name in values:
            stored = values[name] if q.kind == "string" else values[name].astype(q.dtype(dtype))
            dims = ("resample", *q.dims) if stored.ndim > len(q.dims) else q.dims
            arrays[name] = xr.Variable(dims, stored, q.attributes)
    coordinates = {name: arrays.pop(name) for name in COORDINATES if name in arrays}
    return xr.Dataset(arrays, coordinates)


def _provenance(arguments: dict) -> dict[str, str | int]:
    versions = {"numpy": np.__version__, "xarray": xr.__version__}
    nested = {"simulated": True, "seed": arguments["seed"], "versions": versions}
    created, command = "2024-02-23T00:00:00+00:00", ", ".join(f"{k}={v!r}" for k, v in arguments.items())
    told = discovery("drawn at random, of no model", f"simulate_heads({command})")
    return told | {
        "title": "a made-up store of the recipe heads",
        "history": f"{created} simulate_heads({command})",
        "recipe": "heads",
        "model": arguments["model"],
        "n_layers": arguments["n_layers"],
        "n_heads": arguments["n_heads"],
        "target": "centred",
        "ablation": arguments["ablation"],
        "value_bias": "output",
        "freeze": "none",
        "dtype": arguments["dtype"],
        "backend": "simulated",
        "created": created,
        "command": f"simulate_heads({command})",
        "provenance": json.dumps(nested),
    }
