"""The proof, at load, that a model is decomposed exactly: a short random input against the model's own forward pass."""

from dataclasses import dataclass

from selfrepair_nn.components import Head
from selfrepair_nn.errors import UnsupportedModel
from selfrepair_nn.graph import Graph, sweep

TOLERANCE = {"float64": 1e-5, "float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
"""Largest accepted error as a share of the logits' standard deviation."""

PROMPTS, LENGTH, ROWS = 3, 8, 1024


@dataclass(frozen=True)
class Finding:
    """One property, how far the model is from it (a share of the logits' standard deviation), and the limit."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def check(model) -> list[Finding]:
    """Measure, in the first and the middle layer, what must hold for a model to be decomposed exactly.

    - the direct effects of all components and the constant add up to the model's own logit
    - replacing a head by itself changes nothing
    - an ablation that starts at its own layer changes the logit as a whole forward pass does
    - the parts of the self-repair add up
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.structure.vocab_size, (PROMPTS, LENGTH), generator=generator)
    heads = tuple(Head(layer, 0) for layer in sorted({0, model.structure.n_layers // 2}))
    logits = [_whole_passes(model, tokens, head) for head in heads]
    spread = logits[0][0].std().item() or 1.0
    ablated = _ablate(model, tokens, heads, "resample")
    same = _ablate(model, tokens, heads, "identity")
    summed = ablated["component_direct_effect"].sum(-1) + ablated["target_constant"]
    changes = torch.stack([after - before for before, after in logits])
    errors = {
        "components add up to the logit": summed - logits[0][0],
        "replacing a head by itself changes nothing": same["logit_change"],
        "an ablation from its own layer on equals the whole pass": ablated["logit_change"] - changes,
        "the parts of self-repair add up": _closure(ablated),
    }
    limit = TOLERANCE[model.dtype]
    return [Finding(name, _worst(error) / spread, limit) for name, error in errors.items()]


def require(model) -> None:
    """Raise UnsupportedModel, naming what fails, unless every finding of `check` passes."""
    failed = [f for f in check(model) if not f.passed]
    if failed:
        what = "; ".join(
            f"{f.name}: off by {f.error:.2g} of the logits' spread (limit {f.limit:g})" for f in failed
        )
        raise UnsupportedModel(
            f"{model.name!r} is of a supported family but cannot be decomposed exactly: {what}. "
            "See all findings with `selfrepair check`; --skip-check runs it all the same"
        )


def _arrays(tokens):
    return {"tokens": tokens, "partner_tokens": tokens.roll(1, 0)}


def _whole_passes(model, tokens, head):
    """Clean and ablated centred logits of the next token, from the model's own output: [prompt, position] each."""
    from selfrepair_nn.tracing.jobs import logits_job
    from selfrepair_nn.tracing.session import run_session

    plan = {"model": model.layout, "site": [head.layer, head.head]}
    found = run_session(logits_job, model.nn, _arrays(tokens), plan)
    targets = tokens[:, 1:, None]
    both = (found["logits"][:, :-1], found["ablated_logits"][:, :-1])
    return [x.gather(-1, targets)[..., 0] - x.mean(-1) for x in both]


def _ablate(model, tokens, heads, replacement):
    from selfrepair_nn.tracing.jobs import ablation_job
    from selfrepair_nn.tracing.session import run_session

    graph = Graph(ablate=sweep(heads), replacement=replacement, record="full")
    return run_session(ablation_job, model.nn, _arrays(tokens), graph.plan(model.layout) | {"rows": ROWS})


def _closure(found):
    """What the summed changes of all components leave unexplained of the change of the logit."""
    scale, after = found["norm_scale"], found["ablated_norm_scale"]
    effects = found["logit"] - found["target_constant"] + found["component_change"].sum(-1)
    return effects * scale / after - (found["logit"] - found["target_constant"]) - found["logit_change"]


def _worst(error) -> float:
    worst = error.abs().max().item()
    return worst if worst == worst else float("inf")
