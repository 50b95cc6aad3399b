"""The independent oracle of attention edges: eager attention in float64 whose softmax leaves them out, or forgets them.

It imports nothing of the package. While the real model runs, `softmax` is replaced by one that keeps float64, and that
in one layer puts -inf before it, or 0 behind it, for the edges of some heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from oracle import find_parts
from oracle_edits import Edited, Edits
from torch import Tensor, nn

ATTENTION = ("self_attn", "self_attention", "attention", "attn")


def attention_of(model: nn.Module) -> dict[int, nn.Module]:
    """The attention of each layer that has one: what holds its output projection."""
    names, found = {id(module): name for name, module in model.named_modules()}, {}
    for index, layer in enumerate(find_parts(model).layers):
        if layer.mixer is None:
            path = names[id(layer.projection)].split(".")
            last = max(i for i, part in enumerate(path) if part in ATTENTION)
            found[index] = model.get_submodule(".".join(path[: last + 1]))
    return found


@contextmanager
def cutting(model: nn.Module, layer: int | None = None, edges: dict[int, Tensor] | None = None, live: bool = True):
    """Within, heads of a layer pay nothing along `edges` {head: bool [prompt, query, key]}.

    `live`: as if they were masked. Gives the attention that was paid in each layer, [prompt, head, query, key].
    """
    modules, paid, inside = attention_of(model), {}, []
    plain, method = (nn.functional.softmax, torch.softmax), Tensor.softmax

    def softmax(x, dim=-1, dtype=None, **more):
        if not inside:
            return method(x, dim, dtype=dtype)
        shape, here = x.shape, inside[-1]
        heads = x.reshape(-1, x.shape[-3], *x.shape[-2:]) if x.ndim == 4 else x.unflatten(0, (here[1], -1))
        heads = heads.double().clone()
        for head, cut in (edges or {}).items() if here[0] == layer and live else ():
            heads[:, head, :, : cut.shape[-1]].masked_fill_(cut, float("-inf"))
        found = method(heads, -1)
        for head, cut in (edges or {}).items() if here[0] == layer and not live else ():
            found[:, head, :, : cut.shape[-1]].masked_fill_(cut, 0)
        paid[here[0]] = found
        return found.reshape(shape)

    handles = []
    for index, module in modules.items():

        def enter(_, args, kwargs, index=index):
            first = args[0] if args else kwargs["hidden_states"]
            inside.append((index, first.shape[0]))

        def leave(*_):
            inside.pop()

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    nn.functional.softmax, torch.softmax, Tensor.softmax = softmax, softmax, softmax
    try:
        yield paid
    finally:
        nn.functional.softmax, torch.softmax, Tensor.softmax = *plain, method
        for handle in handles:
            handle.remove()


def without(edited: Edited, cases: dict[int, dict[int, Tensor]], live: bool) -> Iterator[tuple[tuple, Tensor]]:
    """(("head", layer, head), z [prompt, T, head_dim]) of heads without edges {layer: {head: edges}}, layer by layer.

    `edited` is of an eager model.
    """
    for layer, edges in cases.items():
        with cutting(edited.parts.model, layer, edges, live):
            z = edited.run(edited.ids, Edits()).z[layer]
        yield from ((("head", layer, head), z[:, :, head]) for head in edges)
