"""What heads read out, and the gradient of something told of the logits with respect to it: plain passes and hooks."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from selfrepair_nn.models.plain import hooked
from selfrepair_nn.tracing.places import part
from selfrepair_nn.tracing.readouts import values_in, widen


def read_out(model: Any, tokens: Any, layers: Sequence[int]) -> dict[int, Any]:
    """z of every head of these layers: {layer: [prompt, position, heads * d_head]}."""
    import torch

    found: dict[int, Any] = {}
    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hooks.enter_context(hooked(model, layer, lambda z, layer=layer: found.update({layer: z.clone()})))
        model.given(tokens.to(model.device), use_cache=False)
    return found


def with_gradients(model: Any, tokens: Any, layers: Sequence[int], metric: Callable[[Any], Any]) -> dict[int, tuple]:
    """z of these layers, and the gradient of `metric(logits)`, a number, with respect to it: {layer: (z, gradient)}.

    It is through everything that comes after, the norms, the attention and the MLPs of all positions: one pass
    forwards, one backwards. `logits` are what the model returns, [prompt, position, vocabulary]. Nothing of the model
    is changed.
    """
    import torch

    found: dict[int, Any] = {}

    def watch(z: Any, layer: int) -> Any:
        found[layer] = z if z.requires_grad else z.detach().requires_grad_()
        return found[layer]

    with ExitStack() as hooks, torch.enable_grad():
        for layer in layers:
            hooks.enter_context(hooked(model, layer, lambda z, layer=layer: watch(z, layer)))
        out = model.given(tokens.to(model.device), use_cache=False)
        told = metric(out[0] if isinstance(out, tuple) else out.logits)
        gradients = torch.autograd.grad(told, [found[layer] for layer in layers])
    return {layer: (found[layer].detach(), each) for layer, each in zip(layers, gradients, strict=True)}


def constants(model: Any, layer: int, value_bias: str) -> Any:
    """The part of a layer's z that no input changes, which zero ablation leaves: [heads * d_head], or 0."""
    import torch

    structure, plan = model.structure, {"model": model.layout}
    if value_bias == "head" or not structure.value_bias:
        return 0
    like = next(model.module.parameters())
    nothing = torch.zeros(1, structure.d_model, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        if "attention_norm" in structure.places:
            nothing = part(model.module, plan, layer, "attention_norm")(nothing)
        own = values_in(widen(part(model.module, plan, layer, "value")(nothing))[0], plan)
    return own.repeat_interleave(structure.n_heads // own.shape[0], 0).flatten()
