"""Whose numbers these are: a record of all that decides what a model computes, and how two such records differ.

Weights and buffers are summed as raw 32-bit words, each times a fixed odd key of 64 bits: the same on every device,
one changed bit or two exchanged words always change a sum. The sums are hashed by SHA-256.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from hashlib import sha256
from typing import Any

import numpy as np

from selfrepair_nn.errors import UsageError
from selfrepair_nn.models.plain import own_answers

WORDS = 2**14
"""Words in a block: each block of a tensor has a sum of its own, so that blocks are told apart by their order."""
AT_ONCE = {"cpu": 2**18, "cuda": 2**25}
"""Words summed in one step: what stays in a processor's cache, or fills a GPU."""

FOLLOWING = ("dynamic", "longrope")
"""Kinds of rotary positions whose frequencies a forward pass sets by the length of its input."""

SILENT = (
    *("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "architectures", "auto_map"),
    *("dtype", "torch_dtype", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "tokenizer_class"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "_attn_implementation_autoset"),
)
"""What a configuration holds that no forward pass depends on: paths, dates, what is said of outputs and of tokens."""


def identity(model: Any) -> dict[str, Any]:
    """The record of a model in the state it is in now, as plain data.

    Of a model on a server only what is known here: kind, configuration, tokenizer. Of one in this process also

        weights, buffers   {part of the model: hash}, of every byte
        dtype, products    what parameters are held in, how float32 products are taken
        wrapping           what surrounds the model, and hooks that were left on it
        answers            its own logits on a short fixed input: [prompt * position]
    """
    module = model.module
    found = {
        "kind": type(module).__name__,
        "configuration": _cleaned(module.config.to_dict())
        | {"attn_implementation": getattr(module.config, "_attn_implementation", None)},
        "tokenizer": tokenizer_hash(model.tokenizer),
    }
    if model.served:
        return found
    import torch

    weights = list(module.named_parameters())
    return found | {
        "weights": _hashes(module, weights),
        "buffers": _hashes(module, _settled(module)),
        "dtype": ", ".join(sorted({str(w.dtype).removeprefix("torch.") for _, w in weights})),
        "products": torch.get_float32_matmul_precision(),
        "wrapping": wrapping(model),
        "answers": own_answers(model),
    }


def fingerprint(record: Mapping[str, Any]) -> str:
    """One short hash of a record, but for what rounds otherwise elsewhere."""
    exact = {name: value for name, value in record.items() if name != "answers"}
    return _hashed(json.dumps(exact, sort_keys=True).encode())


def differences(known: Mapping[str, Any], now: Mapping[str, Any], limit: float) -> list[str]:
    """In words, what two records differ in; `limit` is how far answers may lie apart, as a share of their spread."""
    said = []
    for name in dict.fromkeys([*known, *now]):
        before, after = known.get(name), now.get(name)
        if name == "answers" and before and after:
            apart = np.abs(np.subtract(before, after)).max() / (np.std(before) or 1.0)
            said += [] if apart <= limit else [f"its logits on a fixed input by {apart:.2g} of their spread"]
        elif isinstance(before, Mapping) and isinstance(after, Mapping):
            changed = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
            if changed:
                said.append(f"{name}: {_listed(name, changed, before, after)}")
        elif before != after:
            said.append(f"{name}: {_short(before)} there, {_short(after)} here")
    return said


def tokenizer_hash(tokenizer: Any) -> str | None:
    """A hash of how text becomes token ids; None where there is no tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = getattr(tokenizer, "get_vocab", dict)()
        told = {"vocabulary": vocabulary, "class": type(tokenizer).__name__}
    else:
        told = json.loads(backend.to_str())
        told |= {"padding": None, "truncation": None}  # what earlier calls left behind
    special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    return _hashed(json.dumps([told, special], sort_keys=True, default=str).encode())


def wrapping(model: Any) -> list[str]:
    """What surrounds a module or was hung on it: classes, adapters with their settings, hooks by place and name."""
    found, given = [], model.given
    if given is not model.module:
        found.append(type(given).__name__)
    for name, adapter in sorted(getattr(given, "peft_config", {}).items()):
        active = name in _as_list(getattr(given, "active_adapters", [name]))
        settings = json.dumps(_cleaned(adapter.to_dict()), sort_keys=True, default=str)
        found.append(f"adapter {name}{'' if active else ' (idle)'}: {_hashed(settings.encode())}")
    for place, part in model.module.named_modules():
        hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
        found += [f"hook {_called(hook)} on {place or 'the model'}" for hook in hooks]
    return found


def tensor_hash(x: Any) -> str:
    """A hash of a tensor's shape, type and every byte, the same on every device."""
    digest = sha256(f"{tuple(x.shape)} {x.dtype}".encode())
    for sums in _block_sums(x):
        digest.update(sums)
    return digest.hexdigest()[:16]


def _hashes(module: Any, tensors: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """A hash for each part of the model (a layer, or a module outside of them) over its tensors, by name."""
    parts: dict[str, list[str]] = {}
    for name, x in sorted(tensors):
        x = _present(module, name, x)
        parts.setdefault(_part(name), []).append(f"{name} {tensor_hash(x)}")
    return {part: _hashed("\n".join(lines).encode()) for part, lines in parts.items()}


def _part(name: str) -> str:
    """A tensor's layer, or the module that holds it."""
    steps = name.split(".")
    number = next((i for i, step in enumerate(steps) if step.isdecimal()), len(steps) - 2)
    return ".".join(steps[: number + 1]) or name


def _present(module: Any, name: str, x: Any) -> Any:
    """The tensor itself, also where accelerate keeps it elsewhere until it is used."""
    if not x.is_meta:
        return x
    path, _, own = name.rpartition(".")
    hook = getattr(module.get_submodule(path), "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        if getattr(each, "weights_map", None) is not None:
            return each.weights_map[own]
    raise UsageError(f"{name} has no values (it is on the meta device): load the model with its weights")


def _settled(module: Any) -> Iterator[tuple[str, Any]]:
    """The buffers that no forward pass rewrites, as some do with rotary frequencies that follow the length."""
    for name, x in module.named_buffers():
        path, _, own = name.rpartition(".")
        kinds = str(getattr(module.get_submodule(path), "rope_type", ""))
        if own.startswith("original_") or not any(kind in kinds for kind in FOLLOWING):
            yield name, x


def _block_sums(x: Any) -> Iterator[bytes]:
    import torch

    flat = _words_view(x.detach())
    keys = _keys(str(flat.device))
    step = AT_ONCE.get(flat.device.type, WORDS)
    for words in flat.split(step):
        short = -len(words) % WORDS
        padded = torch.nn.functional.pad(words, (0, short)) if short else words
        sums = (padded.view(-1, WORDS).long() * keys).sum(1)
        yield sums.cpu().numpy().astype("<i8").tobytes()


def _words_view(x: Any) -> Any:
    """The raw bytes of a tensor as 32-bit words, the last filled up with zeros: [word]."""
    import torch

    flat = (x.full_tensor() if hasattr(x, "full_tensor") else x).contiguous().flatten()
    size = flat.element_size()
    aligned = flat if flat.storage_offset() * size % 4 == 0 else flat.clone()
    if aligned.numel() * size % 4 == 0:
        return aligned.view(torch.int32)
    raw = aligned.view(torch.uint8)
    return torch.nn.functional.pad(raw, (0, -len(raw) % 4)).view(torch.int32)


@cache
def _keys(device: str) -> Any:
    """WORDS odd keys of 64 bits, always the same."""
    import torch

    drawn = np.random.PCG64(0).random_raw(WORDS) | np.uint64(1)
    return torch.from_numpy(drawn.view(np.int64)).to(device)


def _cleaned(settings: Any) -> Any:
    """A configuration without what does not compute, as JSON takes it."""
    if isinstance(settings, Mapping):
        return {str(k): _cleaned(v) for k, v in sorted(settings.items(), key=str) if k not in SILENT}
    if isinstance(settings, list | tuple | set):
        return [_cleaned(v) for v in (sorted(settings, key=str) if isinstance(settings, set) else settings)]
    return settings if isinstance(settings, str | int | float | bool | None) else str(settings)


def _listed(name: str, changed: list[str], before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if name in ("weights", "buffers"):
        some = ", ".join(changed[:3]) + (" …" if len(changed) > 3 else "")
        return f"{some} ({len(changed)} of {len(before.keys() | after.keys())} parts)"
    return "; ".join(
        f"{key} is {_short(before.get(key))} there, {_short(after.get(key))} here" for key in changed[:3]
    )


def _short(value: Any) -> str:
    text = "none" if value in (None, []) else json.dumps(value, default=str)
    return text if len(text) <= 120 else text[:116] + " …"


def _called(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)


def _as_list(names: Any) -> list[str]:
    found: Any = names() if callable(names) else names
    return [found] if isinstance(found, str) else list(found)


def _hashed(raw: bytes) -> str:
    return sha256(raw).hexdigest()[:16]
