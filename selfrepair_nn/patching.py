"""Attribution patching of every head beside the exact effect of its ablation, and the heads that it misses."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xarray as xr

from selfrepair_nn.analysis.checks import HEADS, of_heads
from selfrepair_nn.analysis.summaries import described_widths
from selfrepair_nn.analysis.tokens import HALF_WIDTH, Tokens, clustering
from selfrepair_nn.blocks import counted_tokens, require_kept, sums
from selfrepair_nn.confidence import RATE, Tally, q_values
from selfrepair_nn.equations import PARTS
from selfrepair_nn.errors import StoreError, UsageError
from selfrepair_nn.face import public
from selfrepair_nn.order_statistics import bootstrap
from selfrepair_nn.quantities import QUANTITIES, SWEEP, TOKEN
from selfrepair_nn.values import number

AT_ONCE = 512
"""Tokens in a pass: what goes backwards keeps every activation."""
SMALL = 0.5
"""A head whose total effect is surely less than this part of what was removed is called missed."""
READS = ("resample", "zero")


@public
def attribution(ds: xr.Dataset, model: Any = None, *, small: float = SMALL) -> xr.Dataset:
    """Attribution patching of every head of a store, beside what its ablation really does, over (layer, head).

    Attribution patching (Nanda 2023, Attribution patching; Syed, Rager and Conmy 2023, Attribution patching outperforms
    automated circuit discovery) takes the model as linear around the clean run: with z what a head reads out, z' what
    takes its place, and m a number told of the logits, the ablation's effect is about <dm/dz, z' - z>. One pass
    forwards and one backwards on the clean text, and one forwards on the partner's, give every head at once, where the
    exact effects take a pass for each. It is for the same prompts, partners (the mean over several) and target as the
    store's.

    m is the sum of the target's logit over the counted tokens of a prompt, so what is compared is a prompt's sum. The
    gradient of that sum tells for each position s how far the change of z there moves all later tokens of the prompt
    together, and not how far a token t is moved by all changes before it, which the store has of each token: the two
    agree only once they are summed over the prompt. (For each t by itself a pass backwards were needed.)

    - attribution(layer, head, prompt, position): <dm/dz, z' - z> of the change at this position, in logits;
    - attributed_change: its sum over a prompt, mean over the counted tokens; logit_change: that of the exact change;
      removed = direct_effect - ablated_direct_effect, and self_repair with its parts, as in `by_head`; x_half_width of
      each, layer_ and overall_ ones as there;
    - correlation: Pearson's over prompts, of the attributed and the exact sums; NaN below three prompts;
    - matters: whether removed surely is not 0 (false discovery rate 5% over the heads); cancelled: whether it matters,
      and the exact change with its interval lies within `small` times removed: self-repair takes the rest;
      false_negative: the same of the attributed change. Neither is said where there is no interval.

    Attributes rank_correlation and linear_correlation: over the heads, of the two mean changes (Spearman's, Pearson's),
    with x_half_width of both, for these heads on other text: by the bootstrap over clusters.

    Args:
        ds: a store of single heads under resample or zero ablation, with nothing frozen, on every token.
        model: what it was made with, loaded or by name; default: the name that the store has.

    Raises:
        UsageError: a store of something else, of a part of its prompts, or of a server's model without one here: the
            gradient goes through every weight of the model, so that has to be in this process.
        StoreError: another model than the store's.
    """
    ds = of_heads(ds)
    _require_attributable(ds)
    if not 0 < number("small", small) < 1:
        raise UsageError(f"small {small!r} is a part of what was removed: give a number between 0 and 1")
    found = _attributed(ds, _model_of(ds, model))
    made = xr.Dataset({"attribution": (SWEEP, found.reshape([ds.sizes[d] for d in SWEEP]))}, attrs=ds.attrs)
    labels = {name: ds[name].variable for name in (*SWEEP, *TOKEN, "token_text", "document") if name in ds.coords}
    columns, over_heads = _compared(ds, found, small)
    made = made.assign_coords(labels).assign(columns)
    return _described(made.assign_attrs(clustering(ds) | over_heads), small)


@public
def false_negatives(found: xr.Dataset) -> xr.Dataset:
    """The heads that attribution patching misses, of what `attribution` gives, over (rank): most removed first.

    Raises:
        UsageError: `found` is something else.
    """
    if "false_negative" not in found:
        raise UsageError("false negatives are those of attribution patching: give what sr.attribution(store) gives")
    heads = found.drop_dims("prompt").stack(rank=HEADS)
    heads = heads.isel(rank=np.flatnonzero(heads.false_negative.values))
    order = np.argsort(-abs(heads.removed.values), kind="stable")
    return heads.isel(rank=order).reset_index("rank")


def _require_attributable(ds: xr.Dataset) -> None:
    kind, frozen = str(ds.attrs.get("ablation")), ds.attrs.get("freeze", "none")
    if kind not in READS or frozen != "none":
        raise UsageError(
            f"attribution patching is set against resample or zero ablation with nothing frozen, and this store is of "
            f"{kind} ablation, frozen: {frozen}"
        )
    if "token" not in ds or "position" not in ds.dims:
        raise UsageError("attribution patching runs the text of a store: give that, not its summary")
    require_kept(ds)
    if kind == "resample" and not np.isin(ds.partner.values, ds.prompt.values).all():
        raise UsageError("this is a part of a store, in which some prompts' partners are not: give all of its prompts")


def _model_of(ds: xr.Dataset, given: Any) -> Any:
    """The store's model, in this process."""
    from selfrepair_nn.models.load import accepted, load

    if given is None and ds.attrs.get("backend") == "remote":
        raise UsageError(
            "attribution patching takes a gradient through every weight of the model, and this store's is on a server: "
            "give one in this process, attribution(store, model)"
        )
    given = accepted(ds.attrs.get("model", "") if given is None else given)
    dtype = str(ds.attrs.get("dtype", "float32"))
    model = load(given, dtype=dtype, check=False) if isinstance(given, str) else given
    if differing := _differences(ds, model):
        said = "; ".join(differing)
        raise StoreError(f"this store holds the numbers of another model than {model.name!r} is now ({said})")
    return model


def _differences(ds: xr.Dataset, model: Any) -> list[str]:
    """What the store's model and this one differ in, in words; one on a server by what it made of known vectors."""
    from selfrepair_nn.backends.local import greeted_here
    from selfrepair_nn.models.alike import recorded, records_differ
    from selfrepair_nn.models.identity import identity

    if "identity" not in ds.attrs:
        return []
    there, here = recorded(ds.attrs, "identity"), identity(model)
    greetings = None
    if "weights" not in there and "greeting" in ds.attrs:
        greetings = recorded(ds.attrs, "greeting"), greeted_here(model)
    return records_differ(there, here, greetings, model.dtype)


def _attributed(ds: xr.Dataset, model: Any) -> np.ndarray:
    """<dm/dz, z' - z>: [case, prompt, position]."""
    from selfrepair_nn.models.model import evaluating

    tokens = np.concatenate([ds.token.values, ds.target.values[:, -1:]], 1).clip(0)  # -1 is filler, which nothing reads
    found = np.zeros((ds.sizes["layer"], ds.sizes["head"], *ds.token.shape))
    step = max(1, AT_ONCE // tokens.shape[1])
    with evaluating(model):
        for start in range(0, len(tokens), step):
            here = slice(start, start + step)
            for row, each in enumerate(_of_block(ds, model, tokens, here)):
                found[row][:, here] = each[ds["head"].values]
    return found.reshape(-1, *ds.token.shape)


def _of_block(ds: xr.Dataset, model: Any, tokens: np.ndarray, here: slice) -> Iterator[np.ndarray]:
    """That of every head of each layer, of a block of prompts: [head, prompt, position]."""
    import torch

    from selfrepair_nn.models.gradients import constants, read_out, with_gradients
    from selfrepair_nn.tracing.readouts import widen

    layers, kind = [int(layer) for layer in ds["layer"].values], str(ds.attrs["ablation"])
    taken = with_gradients(model, torch.from_numpy(tokens[here]), layers, _metric(ds, model, here))
    lent = {layer: constants(model, layer, ds.attrs.get("value_bias", "output")) for layer in layers}
    if kind == "resample":
        rows = np.atleast_2d(np.searchsorted(ds.prompt.values, ds.partner.values))[:, here]
        every = [read_out(model, torch.from_numpy(tokens[row]), layers) for row in rows]
        lent = {layer: sum(widen(each[layer]) for each in every) / len(every) for layer in layers}
    for layer in layers:
        z, gradient = taken[layer]
        effects = widen(gradient) * (lent[layer] - widen(z))
        effects = effects.unflatten(-1, (model.structure.n_heads, -1)).sum(-1)[:, :-1]
        yield np.moveaxis(effects.double().cpu().numpy(), -1, 0)


def _metric(ds: xr.Dataset, model: Any, here: slice) -> Any:
    """What tells the sum of the target's logits over counted tokens, of a block's logits as the model returns them."""
    import torch

    from selfrepair_nn.tracing.readouts import widen

    counted, target = torch.from_numpy(counted_tokens(ds)[here]), torch.from_numpy(ds.target.values[here].clip(0))
    other = torch.from_numpy(ds.other.values[here].clip(0)) if ds.attrs.get("target") == "difference" else None

    def told(logits: Any) -> Any:
        logits, cap = widen(logits[:, :-1]), model.structure.logit_cap
        logits = logits if cap is None else cap * torch.atanh(logits / cap)

        def at(ids: Any) -> Any:
            return logits.gather(-1, ids[..., None].to(logits.device))[..., 0]

        found = at(target)
        if other is not None:
            found = found - at(other)
        elif ds.attrs.get("target") != "raw":
            found = found - logits.mean(-1)
        return (found * counted.to(found.device)).sum()

    return told


def _compared(ds: xr.Dataset, found: np.ndarray, small: float) -> tuple[dict[str, Any], dict[str, float]]:
    """The columns over (layer, head): means over tokens with their intervals, and what is said of each head.

    And what is said of all heads together.
    """
    tokens, effects = Tokens.of(ds, 1.0)
    attributed = np.where(tokens.done, found.sum(-1), 0)
    each = {"attributed_change": attributed, "logit_change": sums(ds, "logit_change", tokens.done)}
    each["removed"] = effects - sums(ds, "ablated_direct_effect", tokens.done)
    for name in ("self_repair", *PARTS, "from_norm"):
        if name in ds:
            each[name] = sums(ds, name, tokens.done)
    tallies = {name: tokens.tally(values) for name, values in each.items()}
    known = {name: tally.estimate for name, tally in tallies.items()}
    columns: dict[str, Any] = {}
    for name, estimate in known.items():
        columns |= tokens.columns(name, estimate)
    rows = zip(attributed, each["logit_change"], tokens.done, strict=True)
    columns["correlation"] = (tokens.dims, np.array([_correlation(*row) for row in rows]).reshape(tokens.shape))
    removed = known["removed"]
    matters = q_values(removed.p_value) <= RATE
    said = {"matters": matters}
    for name, of in (("cancelled", "logit_change"), ("false_negative", "attributed_change")):
        with np.errstate(invalid="ignore"):
            said[name] = matters & (abs(known[of].mean) + known[of].half_width < small * abs(removed.mean))
    columns |= {name: (tokens.dims, marks.reshape(tokens.shape)) for name, marks in said.items()}
    return columns, _over_heads(tallies["attributed_change"], tallies["logit_change"])


def _over_heads(*tallies: Tally) -> dict[str, float]:
    """Correlations over the heads of two means over the same tokens, with half the widths of their intervals."""
    counts = tallies[0].counts
    some, found = counts.any(1), {}
    sums = [tally.sums[some].T for tally in tallies]

    def means(drawn: np.ndarray) -> list[np.ndarray]:
        with np.errstate(invalid="ignore"):
            return [drawn @ each / (drawn @ counts[some].T) for each in sums]

    once = np.ones((1, counts.shape[1]))
    for name, of in {"rank_correlation": _ranks, "linear_correlation": np.asarray}.items():

        def correlation(drawn: np.ndarray, of: Callable = of) -> np.ndarray:
            return _correlations(*map(of, means(drawn)))

        enough = some.sum() > 2
        found[name] = float(correlation(once)[0]) if enough else np.nan
        found[name + HALF_WIDTH] = bootstrap(correlation, counts.sum(0) > 0) if enough else np.inf
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(values, axis=1)


def _correlations(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Pearson's, of rows [row, head]: [row]; NaN where either never varies."""
    one, other = (each - each.mean(1, keepdims=True) for each in (one, other))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1))


def _correlation(one: np.ndarray, other: np.ndarray, done: np.ndarray) -> float:
    one, other = one[done], other[done]
    if one.size < 3 or not np.ptp(one) or not np.ptp(other):
        return np.nan
    return float(np.corrcoef(one, other)[0, 1])


def _described(found: xr.Dataset, small: float) -> xr.Dataset:
    told = {
        "attribution": ("logit", "attribution of the change at this position to the prompt's summed logit"),
        "attributed_change": ("logit", "mean attributed logit change"),
        "removed": ("logit", "mean direct effect removed"),
        "correlation": ("1", "correlation over prompts of attributed and exact change"),
        "matters": ("1", "direct effect surely removed"),
        "cancelled": ("1", f"exact logit change surely below {small:g} of what was removed"),
        "false_negative": ("1", f"attributed logit change surely below {small:g} of what was removed"),
    }
    told |= {n: ("logit", f"mean {QUANTITIES[n].long_name}") for n in map(str, found) if n in QUANTITIES}
    for name, (units, text) in told.items():
        found[name].attrs = {"units": units, "long_name": text}
    return described_widths(found).assign_attrs(small=small)
