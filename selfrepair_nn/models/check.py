"""The proof that a model is decomposed exactly: short inputs, against the logits that the model itself returns.

What it is compared with is computed by plain hooks on the module as it was handed in: without nnsight, by whole
forward passes, behind everything that follows the unembedding.
"""

import json
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from selfrepair_nn.components import Head
from selfrepair_nn.equations import TOLERANCE
from selfrepair_nn.errors import UnsupportedModel
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.models.identity import wrapping
from selfrepair_nn.models.model import Model, evaluating
from selfrepair_nn.models.plain import LOGITS, drawn_tokens, own_logits, whole_passes

ROWS = 1024
MOST = 0.9
_proven: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
"""What was found on random tokens of each model of this process where all passed, by the state that it was in."""

BY_TWO_WAYS = "an ablation from its own layer on equals the whole pass"


@dataclass(frozen=True)
class Finding:
    """One property, how far the model is from it (a share of the logits' standard deviation), and the limit."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def findings(model: Model, tokens=None, state: str | None = None) -> list[Finding]:
    """What `models.load.check` tells, of a model that is here; what was proven of it in the same `state` is known."""
    state = None if state is None else json.dumps([state, model.layout, model.dtype, model.device])
    with evaluating(model):
        known = _proven.setdefault(model.given, {})
        on_random = known.get(state or "") or _on_random_tokens(model)
        on_prompts = _on_whole_prompts(model, drawn_tokens(model) if tokens is None else tokens)
    found = _compared(model, *on_random)
    if state is not None and all(each.passed for each in found):
        known[state] = on_random
    return found + _compared(model, on_random[0], on_prompts)


def _compared(model, logits, errors) -> list[Finding]:
    spread, limit, parts = _spread(logits), TOLERANCE[model.dtype], {BY_TWO_WAYS: _part(model)}
    return [
        Finding(name, _worst(error, parts.get(name, 1.0)) / spread, limit) for name, error in errors.items()
    ]


def _part(model) -> float:
    """How many of the numbers that two passes of other shapes give must agree: of a mixture in 16 bits not all.

    There rounding, by which the two differ, sends some tokens to other experts.
    """
    return MOST if model.structure.experts and model.dtype in ("bfloat16", "float16") else 1.0


def _on_random_tokens(model):
    """The model's logits of a few random tokens, and what each property leaves over there."""
    import torch

    tokens = drawn_tokens(model)
    heads = [Head(layer, layer % model.structure.n_heads) for layer in _with_heads(model)]
    logits = own_logits(model, tokens)
    found = _ablate(model, tokens, heads, "resample", "full")
    changes = torch.stack(list(whole_passes(model, tokens, heads))) - logits
    summed = found["component_direct_effect"].sum(-1) + found["target_constant"] + found["mean_logit"]
    summed = _returned(summed, model)
    other = tokens.clone()
    other[:, -1] = (tokens[:, -1] + 1) % model.structure.vocab_size
    return logits, {
        "components add up to the logit": summed - logits,
        BY_TWO_WAYS: _returned_change(found, model) - changes,
        "the parts of self-repair add up": _closure(found),
        "a later token changes nothing before it": (own_logits(model, other) - logits)[:, :-1],
    }


def _on_whole_prompts(model, tokens):
    """What is left over where heads of the first, the middle and the last layer are replaced by themselves."""
    last = min(tokens.shape[1] - 1, max(1, LOGITS // (len(tokens) * model.structure.vocab_size)))
    having = _with_heads(model)
    layers = sorted({having[0], having[len(having) // 2], having[-1]})
    found = _ablate(model, tokens, [Head(layer, 0) for layer in layers], "identity", "sums")
    logits = _returned(found["logit"] + found["mean_logit"], model)[:, -last:]
    return {
        "a pass gives the logits that the model returns": logits - own_logits(model, tokens, last),
        "replacing a head by itself changes nothing": _returned_change(found, model),
    }


def _with_heads(model) -> list[int]:
    return [n for n in range(model.structure.n_layers) if n not in model.structure.headless]


def require(model, tokens=None, state: str | None = None) -> None:
    """Raise UnsupportedModel, naming what fails, unless every finding passes.

    Args:
        tokens: prompts of the run [prompt, position], on which passes of full length are tried.
        state: what says that all of the model is as it was when it was last asked about; None: it is not known.
    """
    failed = [f for f in findings(model, tokens, state) if not f.passed]
    if not failed:
        return
    finite = [f for f in failed if f.error < float("inf")]
    what = "; ".join(f"{f.name}: {_off(f.error)} (limit {f.limit:g})" for f in finite or failed[:1])
    raise UnsupportedModel(
        f"{model.name!r} is of a supported family but cannot be decomposed exactly: {what}.{_suspects(model)} "
        "See all findings with `selfrepair check`; --skip-check runs it all the same"
    )


def _off(error: float) -> str:
    return f"off by {error:.2g} of the logits' spread" if error < float("inf") else "logits are not finite"


def _returned(logits, model):
    """The target's own logits as the model returns them."""
    from selfrepair_nn.tracing.readouts import capped

    return capped(logits, {"model": model.layout})


def _returned_change(found, model):
    """Change of the logits as they are returned, of which the target's may be a difference from the mean."""
    if "logit_change_capped" in found:
        return found["logit_change_capped"]
    return found["logit_change"] + found["mean_logit_change"]


def _spread(logits) -> float:
    spread = logits.std().item()
    return spread if spread > 0 else 1.0


def _arrays(tokens):
    return {"tokens": tokens, "partner_tokens": tokens.roll(1, 0)}


def _ablate(model, tokens, heads, replacement, record) -> dict[str, Any]:
    from selfrepair_nn.tracing.jobs import ablation_job
    from selfrepair_nn.tracing.session import run_session

    graph = Graph(ablate=sweep(heads), replacement=replacement, record=record)
    return run_session(ablation_job, model.nn, _arrays(tokens), graph.plan(model.layout) | {"tokens_per_pass": ROWS})


def _closure(found):
    """What the summed changes of all components leave unexplained of the change of the logit."""
    scale, after = found["norm_scale"], found["ablated_norm_scale"]
    effects = found["logit"] - found["target_constant"] + found["component_change"].sum(-1)
    effects = effects + found.get("from_post_norms", 0)
    return effects * scale / after - (found["logit"] - found["target_constant"]) - found["logit_change"]


def _suspects(model) -> str:
    """What was found on the model that may be the reason."""
    found = wrapping(model)
    return f" On the model: {', '.join(found[:4])}." if found else ""


def _worst(error, part: float) -> float:
    """The largest error, or that of so large a part of the numbers."""
    worst = error.abs().flatten().quantile(part).item()
    return worst if worst == worst else float("inf")
