"""Plain forward passes of a module as it was handed in, without nnsight: what every shortcut is checked against."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from selfrepair_nn.tracing.places import at

PROMPTS, LENGTH = 2, 7
TOKENS, LOGITS = 2048, 2**25
"""How many tokens a pass may have, and how many logits return: the ablations of so many layers share one."""


def own_logits(model, tokens, last=None):
    """The next tokens' logits as the module that was handed in returns them, in at least float32: [prompt, position].

    With `last`, those of so many positions at the end of a prompt only.
    """
    from selfrepair_nn.tracing.readouts import widen

    kept = 0 if last is None else last + 1
    targets = tokens[:, 1:] if last is None else tokens[:, -last:]
    logits = _returned(model, tokens, logits_to_keep=kept)
    return widen(logits.gather(-1, targets[..., None].to(logits.device))[..., 0]).cpu()


def own_answers(model) -> list[float]:
    """What the model says of a short fixed input: its logits of the next tokens, in a row."""
    return own_logits(model, drawn_tokens(model)).flatten().tolist()


def _returned(model, tokens, **more):
    import torch

    with torch.no_grad():
        out = model.given(tokens.to(model.device), use_cache=False, **more)
    return (out[0] if isinstance(out, tuple) else out.logits)[:, :-1]


def drawn_tokens(model):
    """A few random tokens, always the same for a vocabulary of this size: [prompt, position]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.structure.vocab_size, (PROMPTS, LENGTH), generator=generator)


def whole_passes(model, tokens, heads) -> Iterator[Any]:
    """The next tokens' logits with each head in turn replaced by that of the prompt before: [prompt, position] each."""
    most = min(TOKENS, LOGITS // model.structure.vocab_size)
    count = max(1, most // tokens.numel())
    own = {}
    with ExitStack() as hooks:
        for layer in {head.layer for head in heads}:
            hooks.enter_context(hooked(model, layer, lambda z, layer=layer: own.update({layer: z.clone()})))
        _returned(model, tokens)
    for start in range(0, len(heads), count):
        some = heads[start : start + count]
        with _replaced(model, some, own):
            yield from own_logits(model, tokens.repeat(len(some), 1)).unflatten(0, (len(some), -1))


@contextmanager
def _replaced(model, heads, own) -> Iterator[None]:
    """Each head in its own rows of a pass replaced by what it computes on the prompt before."""
    width = model.structure.d_head
    with ExitStack() as hooks:
        for number, head in enumerate(heads):
            clean = own[head.layer]
            rows = slice(number * len(clean), (number + 1) * len(clean))
            part = slice(head.head * width, (head.head + 1) * width)

            def edit(z, rows=rows, part=part, clean=clean):
                z = z.clone()
                z[rows, :, part] = clean.roll(1, 0)[..., part]
                return z

            hooks.enter_context(hooked(model, head.layer, edit))
        yield


@contextmanager
def hooked(model, layer, edit) -> Iterator[None]:
    """Within, `edit` sees the input of a layer's output projection and may give another in its place."""
    places = model.structure.places
    projection = at(at(model.module, places["layers"])[layer], places["output_projection"])

    def hook(_, args):
        found = edit(args[0])
        return args if found is None else (found, *args[1:])

    handle = projection.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def entering(model, layer, edit) -> Iterator[None]:
    """Within, `edit` sees the residual stream that enters a layer and may give another in its place."""

    def hook(_, args, kwargs):
        found = edit(args[0] if args else kwargs["hidden_states"])
        if found is None:
            return None
        return ((found, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": found})

    module = at(model.module, model.structure.places["layers"])[layer]
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def beginning(model, layer, stream) -> Iterator[None]:
    """Within, passes begin at a layer, with this residual stream: the layers below do nothing."""
    below = list(at(model.module, model.structure.places["layers"]))[:layer]
    others = model.structure.returns.get("layer")

    def nothing(*args, **kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        return x if others is None else (x, *[None] * (others - 1))

    before = [vars(each).get("forward") for each in below]
    for each in below:
        each.forward = nothing
    try:
        with entering(model, layer, lambda _: stream):
            yield
    finally:
        for each, forward in zip(below, before, strict=True):
            if forward is None:
                del each.forward
            else:
                each.forward = forward
