"""Devices that are not there: tensors that say they lie on one, compute on the processor, and refuse to be mixed.

What a GPU refuses, two tensors of an operation on different devices, is refused within `Pretending`; numbers are real.
"""

from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

KIND = "ipu"
"""A kind of device that torch knows the name of, and asks no driver about."""
CPU = torch.device("cpu")
ITSELF = (torch.Tensor.device.__get__, torch.Tensor.__repr__, torch.Tensor.__hash__, torch.Tensor.is_meta.__get__)
"""What is asked of the tensor that pretends, not of the one that it holds."""
INDEXED = (torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.index_put_)
"""What takes indices, which may lie on the processor."""


_Generator = torch.Generator


class Pretended(torch.Tensor):
    """A tensor on a device that is not there; `inner` is what it holds."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: Any = None, requires_grad: bool = False) -> "Pretended":
        inner, device = (held.inner, held.device) if isinstance(held, Pretended) else (held, device)
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was reached, which the mode should have done")


class Pretending(TorchFunctionMode):
    """Within, tensors may lie there, be made there and be moved there."""

    def __enter__(self) -> "Pretending":
        self._drawing = patch("torch.Generator", lambda device="cpu": _Generator())
        self._drawing.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._drawing.stop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives, on the one device of what it was given, or where it was asked for."""
    if func in ITSELF:
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)
    if func in (torch.Tensor.to, torch.Tensor.cpu):
        return _moved(func, args, kwargs)
    if func is torch.Tensor.requires_grad_:
        return args[0]
    device = _device(func, args, kwargs)
    kwargs = {name: CPU if name == "device" and value is not None else value for name, value in kwargs.items()}
    given = tree_map(lambda x: x.inner if isinstance(x, Pretended) else x, (args, kwargs))
    found = func(*given[0], **given[1])
    if args and isinstance(args[0], Pretended) and found is args[0].inner:
        return args[0]  # it was changed in place
    return _outer(found, device)


def _device(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    """Where a result lies; RuntimeError where what is given lies on several devices."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [_of(x) for x in tensors if isinstance(x, Pretended) or x.dim()]
    if func is torch.Tensor.copy_ or _copies(func, args):
        return here[0]
    allowed = {*here[:1], *([CPU] if func in INDEXED else [])}
    if not {*here} <= allowed:
        found = ", ".join(sorted(map(str, {*here})))
        raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device, but found {found}")
    return here[0] if here else CPU


def _copies(func: Any, args: Any) -> bool:
    """Whether brackets with nothing but slices and numbers in them are given a value: it may come from elsewhere."""
    if func is not torch.Tensor.__setitem__:
        return False
    where = args[1] if isinstance(args[1], tuple) else (args[1],)
    return all(isinstance(each, slice | int | type(...) | None) for each in where)


def _of(x: torch.Tensor) -> torch.device:
    with torch._C.DisableTorchFunction():
        return x.device


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    x = args[0]
    device, dtype, inner = _of(x), None, x.inner if isinstance(x, Pretended) else x
    if func is torch.Tensor.cpu:
        device = CPU
    else:
        for each in (*args[1:], *kwargs.values()):
            if isinstance(each, torch.Tensor):
                device, dtype = _of(each), each.dtype
            elif isinstance(each, torch.dtype):
                dtype = each
            elif isinstance(each, str | torch.device):
                device = torch.device(each)
    if device == _of(x) and dtype in (None, inner.dtype):
        return x
    moved = inner.clone() if device != _of(x) else inner
    return _outer(moved if dtype is None else moved.to(dtype), device)


def _outer(found: Any, device: torch.device) -> Any:
    there = device.type == KIND
    return tree_map(lambda x: Pretended(x, device) if there and type(x) is torch.Tensor else x, found)
