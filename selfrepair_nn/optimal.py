"""Optimal ablation: the constant for each head with which the model loses least, learned outside of any trace.

Li and Janson (2024), Optimal ablation for interpretability, replace a component by the constant that minimises the
expected loss of the ablated model. Here the loss is minus the log-probability of the next token, of the tokens that
count, and the constant takes the place of z at all positions. It is learned in plain torch, by hooks on the model as it
was loaded: a server has no gradients. What comes of it is ablated by the engine as any other vector, here or there.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfrepair_nn.choosing import selecting_half
from selfrepair_nn.components import Head
from selfrepair_nn.constants import Constants
from selfrepair_nn.errors import UsageError
from selfrepair_nn.models.model import Model, evaluating
from selfrepair_nn.models.model import wrap as wrapped
from selfrepair_nn.models.plain import beginning, entering, hooked
from selfrepair_nn.shown import tell
from selfrepair_nn.values import brief, ids, number, whole

STEPS, RATE, TOKENS = 30, 0.3, 2048
"""Steps of Adam, its rate in standard deviations of z, and tokens in a pass: the usual ones."""
BETAS, EPSILON = (0.9, 0.95), 1e-8


def optimal_constants(
    model: Any,
    heads: Iterable[Head],
    prompts: Any,
    *,
    steps: int = STEPS,
    rate: float = RATE,
    counted: np.ndarray | None = None,
    tokens_per_pass: int = TOKENS,
    told: Callable[[int, float], None] | None = None,
) -> Constants:
    """The constant of each head with which the model loses least on these prompts: `Constants`, to ablate with or save.

    Each head by itself, the others as they are. Adam (Kingma and Ba, 2015; betas 0.9 and 0.95) on all prompts at once,
    so nothing is drawn, from the mean of z over all positions; the rate is in units of z's standard deviation, entry by
    entry, and falls to 0 along a half cosine. Kept is, of all constants on the way, the mean among them, the one with
    the least loss: on these prompts no head loses more than by its mean. What it loses on others is measured there.

        constants = sr.optimal_constants("tiny-neox", [sr.Head(7, 0)], tokens)
        constants.save("optimal.npz")

    Args:
        model: a name, a Hugging Face module, `sr.load(…)` or `sr.wrap(…)`; its weights are here. Nothing of it changes.
        heads: Heads, each learned by itself, many in a pass.
        prompts: token ids [prompt, position], or `sr.Prompts`, whose tokens that count are meant: those to learn on.
        steps: of the optimiser; 0 gives the means.
        rate: its first rate.
        counted: bool [prompt, position - 1], which tokens are meant; by default all.
        tokens_per_pass: how many tokens a pass has: memory; no number depends on it beyond rounding.
        told: is called with each step, and with the mean loss over heads that is added to the model's own.

    Returns Constants whose `about` has the loss of the model, and of each head's ablation by mean and by optimum, in
    nats a token (`model_loss`, `mean_loss`, `optimal_loss`), and what was done.

    Raises:
        UsageError: a head or a token that the model does not have, no prompt, or a model without weights here.
    """
    found = _model(model)
    wanted = _heads(found, heads)
    tokens, counts = _tokens(found, prompts, counted)
    steps, tokens_per_pass = whole("steps", steps, 0), whole("tokens_per_pass", tokens_per_pass)
    if (rate := number("rate", rate)) <= 0:
        raise UsageError(f"rate must be above 0, not {rate:g}")
    with evaluating(found), _held(found):
        return _Learning(found, wanted, tokens, counts, tokens_per_pass)(steps, rate, told)


def learned(model: Model, experiment: Any) -> Constants:
    """The constants that a run learns of its heads, on the half of its prompts that it does not report."""
    half = selecting_half(experiment.prompts.document)
    by = next(graph.replaced_by for graph in experiment.work.graphs if graph.replaced_by.learns)
    if not experiment.counted[half].any():
        raise UsageError("no token counts on the half of the prompts that constants are learned on: use more of them")
    tell(f"learning constants of {len(experiment.heads)} heads on {int(half.sum())} prompts, {by.steps} steps")
    return optimal_constants(
        model,
        experiment.heads,
        experiment.prompts.tokens[half],
        steps=by.steps,
        rate=by.rate,
        counted=experiment.counted[half],
    )


def _model(given: Any) -> Model:
    if isinstance(given, str):
        from selfrepair_nn.models.load import load

        given = load(given)
    found = given if isinstance(given, Model) else wrapped(given)
    if found.served:
        raise UsageError(
            f"{found.name!r} is on a server, which has no gradients: learn where its weights are, save the constants "
            "and ablate by those"
        )
    return found


def _heads(model: Model, given: Iterable[Head]) -> list[Head]:
    found = [*given]
    for head in found:
        if not isinstance(head, Head):
            raise UsageError(f"heads are such as Head(9, 6), not {brief(head)}")
        if not head.lies_in(model.structure):
            s = model.structure
            raise UsageError(f"{head.label}: {model.name!r} has layers 0 to {s.n_layers - 1} of {s.n_heads} heads")
    if not found:
        raise UsageError("heads is empty: name at least one")
    return sorted(set(found))


def _tokens(model: Model, given: Any, counted: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    rows = given.tokens if hasattr(given, "tokens") else ids("prompts", given, "token ids [prompt, position]")
    if rows.ndim != 2 or rows.shape[1] < 2 or rows.dtype.kind not in "iu":
        raise UsageError(f"prompts have shape {rows.shape}: give whole numbers [prompt, position], two or more of each")
    if rows.min() < 0 or rows.max() >= model.structure.vocab_size:
        most = model.structure.vocab_size - 1
        raise UsageError(f"prompts have ids {rows.min()} to {rows.max()}: the model's are 0 to {most}")
    asked = getattr(given, "counts", None) if counted is None else np.asarray(counted)
    counts = np.ones((len(rows), rows.shape[1] - 1), bool) if asked is None else asked
    if counts.shape != (len(rows), rows.shape[1] - 1) or counts.dtype != bool or not counts.any():
        raise UsageError(f"counted has shape {counts.shape}: give a bool for each token with a next one, some True")
    return rows.astype(np.int64), counts


@contextmanager
def _held(model: Model) -> Iterator[None]:
    """Within, no parameter of the model wants a gradient."""
    wanting = [x for x in model.given.parameters() if x.requires_grad]
    for x in wanting:
        x.requires_grad_(False)
    try:
        yield
    finally:
        for x in wanting:
            x.requires_grad_(True)


@dataclass
class _Learning:
    """Heads' constants on some prompts. Rows of a pass are heads times prompts; each row has one head replaced.

    A pass begins at the first layer that has one, from the clean `streams` {layer: [prompt, position, d_model]}.
    """

    model: Model
    heads: Sequence[Head]
    tokens: np.ndarray
    counts: np.ndarray
    tokens_per_pass: int
    streams: dict[int, Any] = field(default_factory=dict)

    def __call__(self, steps: int, rate: float, told: Callable[[int, float], None] | None) -> Constants:
        import torch

        own, mean, spread = self._clean()
        shift = torch.zeros_like(mean, requires_grad=True)
        adam = torch.optim.Adam([shift], rate, BETAS, EPSILON)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps))
        best, least, first = mean.clone(), None, None
        for step in range(steps + 1):
            adam.zero_grad()
            with torch.no_grad():
                now = mean + spread * shift
            losses = self._losses(mean, spread, shift, step < steps)
            first = losses if first is None else first
            better = torch.ones_like(losses, dtype=torch.bool) if least is None else losses < least
            best[better], least = now[better], losses if least is None else torch.minimum(losses, least)
            if told is not None:
                told(step, float((least - own).mean()))
            if step < steps:
                adam.step()
                slower.step()
        return self._kept(best, {"steps": steps, "rate": rate}, own, first, least)

    def _kept(self, best: Any, about: dict[str, Any], own: float, first: Any, least: Any) -> Constants:
        labels = [head.label for head in self.heads]
        about |= {"optimiser": f"Adam, betas {BETAS}", "loss": "mean negative log-probability of the next token, nats"}
        about |= {"model": self.model.name, "prompts": len(self.tokens), "tokens": int(self.counts.sum())}
        about |= {"model_loss": own, "mean_loss": dict(zip(labels, first.tolist(), strict=True))}
        about["optimal_loss"] = dict(zip(labels, least.tolist(), strict=True))
        return Constants(dict(zip(self.heads, best.double().cpu().numpy(), strict=True)), about)

    def _clean(self) -> tuple[float, Any, Any]:
        """The model's own loss; mean and standard deviation of each head's z, [head, d_head] each."""
        import torch

        total, sums, squares = 0.0, torch.zeros(()), torch.zeros(())
        seen: dict[int, Any] = {}
        layers = {head.layer for head in self.heads}
        entered: dict[int, list[Any]] = {layer: [] for layer in layers}
        with torch.no_grad(), ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(hooked(self.model, layer, lambda z, at=layer: seen.update({at: z.double()})))
                hooks.enter_context(entering(self.model, layer, lambda x, at=layer: entered[at].append(x.clone())))
            for rows in self._blocks(len(self.tokens)):
                total += float(self._loss(rows).sum())
                z = torch.stack([self._part(seen[head.layer], head) for head in self.heads]).flatten(1, 2)
                sums, squares = z.sum(1) + sums.to(z), z.square().sum(1) + squares.to(z)
        self.streams = {layer: torch.cat(found) for layer, found in entered.items()}
        mean = sums / self.tokens.size
        spread = (squares / self.tokens.size - mean.square()).clamp_min(0).sqrt()
        kind = next(self.model.module.parameters()).dtype
        kind = torch.promote_types(kind, torch.float32)
        return total / int(self.counts.sum()), mean.to(kind), spread.to(kind)

    def _losses(self, mean: Any, spread: Any, shift: Any, learns: bool) -> Any:
        """The mean loss of each head's ablation, [head]; where it `learns` its gradients are added to `shift`."""
        import torch

        n, found = len(self.tokens), torch.zeros(len(self.heads), dtype=torch.float64, device=mean.device)
        order = sorted(range(len(self.heads)), key=lambda i: self.heads[i].layer)
        for some in self._blocks(len(order) * n):
            rows = np.arange(some.start, min(some.stop, len(order) * n))
            which, prompts = np.array(order)[rows // n], rows % n
            start = min(self.heads[i].layer for i in which)
            with (
                torch.set_grad_enabled(learns),
                beginning(self.model, start, self.streams[start][prompts]),
                self._replaced(which, mean + spread * shift),
            ):
                losses = self._loss(prompts)
                if learns:
                    (losses.sum() / self.counts.sum()).backward()
            found.index_add_(0, torch.as_tensor(which, device=found.device), losses.detach().double())
        return found / self.counts.sum()

    @contextmanager
    def _replaced(self, which: np.ndarray, constants: Any) -> Iterator[None]:
        """Within, row i of a pass has the constant of head `which[i]` in its place."""
        import torch

        with ExitStack() as hooks:
            for layer in {self.heads[i].layer for i in which}:
                rows = [(row, i) for row, i in enumerate(which) if self.heads[i].layer == layer]
                at, index = (torch.tensor(each, device=constants.device) for each in zip(*rows, strict=True))
                head = torch.tensor([self.heads[i].head for _, i in rows], device=constants.device)

                def edit(z, at=at, index=index, head=head):
                    split = z.clone().unflatten(-1, (self.model.structure.n_heads, -1))
                    split[at, :, head] = constants[index].to(split)[:, None].expand(-1, split.shape[1], -1)
                    return split.flatten(-2)

                hooks.enter_context(hooked(self.model, layer, edit))
            yield

    def _loss(self, rows: Any) -> Any:
        """Minus the summed log-probability of the tokens that count, of prompts `rows`: [row]."""
        import torch

        tokens = torch.as_tensor(self.tokens[rows], device=self.model.device)
        out = self.model.given(tokens, use_cache=False)
        logits = (out[0] if isinstance(out, tuple) else out.logits)[:, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        asked = torch.as_tensor(self.counts[rows], device=logits.device)
        found = logits.logsumexp(-1) - logits.gather(-1, tokens[:, 1:, None].to(logits.device))[..., 0]
        return (found * asked).sum(1)

    def _part(self, z: Any, head: Head) -> Any:
        return z.unflatten(-1, (self.model.structure.n_heads, -1))[:, :, head.head]

    def _blocks(self, count: int) -> list[slice]:
        size = max(1, self.tokens_per_pass // self.tokens.shape[1])
        return [slice(i, i + size) for i in range(0, count, size)]
