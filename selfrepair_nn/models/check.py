"""The proof that a model is decomposed exactly: short inputs, against the logits that the model itself returns.

What it is compared with is computed by plain hooks on the module as it was handed in: without nnsight, by whole
forward passes, behind everything that follows the unembedding.
"""

from dataclasses import dataclass

from selfrepair_nn.components import Head
from selfrepair_nn.errors import UnsupportedModel
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.models.identity import wrapping
from selfrepair_nn.models.model import evaluating
from selfrepair_nn.models.plain import LOGITS, drawn_tokens, own_logits, whole_passes

TOLERANCE = {"float64": 1e-5, "float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
"""Largest accepted error as a share of the logits' standard deviation."""

ROWS = 1024


@dataclass(frozen=True)
class Finding:
    """One property, how far the model is from it (a share of the logits' standard deviation), and the limit."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def check(model, tokens=None) -> list[Finding]:
    """Measure what must hold for a model to be decomposed exactly, in the state it is in.

    - the direct effects of all components and the constant add up to the logit that the model returns
    - replacing a head by itself changes nothing
    - an ablation that starts at its own layer changes that logit as a whole forward pass does, for a head of each layer
    - the parts of the self-repair add up
    - and, of `tokens` [prompt, position], a run's own: their logits are those that the model returns
    """
    with evaluating(model):
        errors, spread = _errors(model, tokens)
    limit = TOLERANCE[model.dtype]
    return [Finding(name, _worst(error) / spread, limit) for name, error in errors.items()]


def _errors(model, tokens):
    """What each property leaves over, and the spread of the logits."""
    import torch

    drawn = drawn_tokens(model)
    n_layers, n_heads = model.structure.n_layers, model.structure.n_heads
    heads = tuple(Head(layer, layer % n_heads) for layer in range(n_layers))
    logits = own_logits(model, drawn)
    spread = _spread(logits)
    ablated = _ablate(model, drawn, heads, "resample")
    same = _ablate(model, drawn, (heads[0], heads[n_layers // 2], heads[-1]), "identity")
    changes = torch.stack(list(whole_passes(model, drawn, heads))) - logits
    summed = ablated["component_direct_effect"].sum(-1) + ablated["target_constant"] + ablated["mean_logit"]
    errors = {
        "components add up to the logit": summed - logits,
        "replacing a head by itself changes nothing": same["logit_change"],
        "an ablation from its own layer on equals the whole pass": ablated["logit_change"]
        + ablated["mean_logit_change"]
        - changes,
        "the parts of self-repair add up": _closure(ablated),
    }
    if tokens is not None:
        last = min(tokens.shape[1] - 1, max(1, LOGITS // (len(tokens) * model.structure.vocab_size)))
        ours = _ablate(model, tokens, heads[-1:], "identity", record="sums")
        errors["the run's own logits"] = (ours["logit"] + ours["mean_logit"])[:, -last:] - own_logits(
            model, tokens, last
        )
    return errors, spread


def require(model, tokens=None) -> None:
    """Raise UnsupportedModel, naming what fails, unless every finding of `check` passes."""
    failed = [f for f in check(model, tokens) if not f.passed]
    if failed:
        what = "; ".join(
            f"{f.name}: off by {f.error:.2g} of the logits' spread (limit {f.limit:g})" for f in failed
        )
        raise UnsupportedModel(
            f"{model.name!r} is of a supported family but cannot be decomposed exactly: {what}.{_suspects(model)} "
            "See all findings with `selfrepair check`; --skip-check runs it all the same"
        )


def _spread(logits) -> float:
    spread = logits.std().item()
    return spread if spread > 0 else 1.0


def _arrays(tokens):
    return {"tokens": tokens, "partner_tokens": tokens.roll(1, 0)}


def _ablate(model, tokens, heads, replacement, record="full"):
    from selfrepair_nn.tracing.jobs import ablation_job
    from selfrepair_nn.tracing.session import run_session

    graph = Graph(ablate=sweep(heads), replacement=replacement, record=record)
    return run_session(ablation_job, model.nn, _arrays(tokens), graph.plan(model.layout) | {"rows": ROWS})


def _closure(found):
    """What the summed changes of all components leave unexplained of the change of the logit."""
    scale, after = found["norm_scale"], found["ablated_norm_scale"]
    effects = found["logit"] - found["target_constant"] + found["component_change"].sum(-1)
    return effects * scale / after - (found["logit"] - found["target_constant"]) - found["logit_change"]


def _suspects(model) -> str:
    """What was found on the model that may be the reason."""
    found = wrapping(model)
    return f" On the model: {', '.join(found[:4])}." if found else ""


def _worst(error) -> float:
    worst = error.abs().max().item()
    return worst if worst == worst else float("inf")
