"""A GPU against its limit: head sweeps of two shapes with default options, beside the model's own forward and naive.

The models have random weights of real shapes: what is measured does not depend on them. `--quick` is a trial anywhere.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import selfrepair_nn as sr
from benchmarks.baselines import naive

SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"num_hidden_layers": 32, "vocab_size": 128256},
    "SmolLM2": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    | {"num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True},
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"num_hidden_layers": 3, "vocab_size": 512}
DTYPES = {"8B": torch.bfloat16, "SmolLM2": torch.float32}
PROMPTS = {"8B": 32, "SmolLM2": 64}
LENGTH, PAIR = 128, (2, 15)
NAIVE_HEADS = 4
PHASES = {
    "identity": ("selfrepair_nn.running.run", "identity"),
    "proof": ("selfrepair_nn.running.run", "_prove"),
    "noise floor": ("selfrepair_nn.running.filling", "noise_floor"),
    "weights": ("selfrepair_nn.tracing.probes", "_probed"),
}


def on_gpu(quick: bool = False) -> dict[str, Any]:
    """Every measure of each shape, by name; nothing where there is no GPU."""
    if not (torch.cuda.is_available() or quick):
        print("left out: no GPU here")
        return {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found: dict[str, Any] = {"device": name, "versions": {"torch": torch.__version__}}
    for shape in SHAPES:
        found[shape] = _of_shape(shape, device, quick)
        print(f"  {shape}: {found[shape]}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _of_shape(shape: str, device: torch.device, quick: bool) -> dict[str, Any]:
    module = built(SMALL if quick else SHAPES[shape], DTYPES[shape], device)
    prompts, length = (4, 16) if quick else (PROMPTS[shape], LENGTH)
    rate = product_rate(module, quick)
    found: dict[str, Any] = {"product TFLOP/s": rate / 1e12}
    with TemporaryDirectory() as folder:
        run = Runs(module, Path(folder))
        found |= {"first pair s": run(*PAIR)[1]}  # with what is loaded and proven at first use
        found |= {"pair s": run(*PAIR)[1]} | {f"once, {name} s": s for name, s in run.phases(*PAIR).items()}
        ds, seconds = run(prompts, length)
        limit = flops(module, prompts * length) / rate
        own = suffixes(module, prompts * length, run.tokens_per_pass(ds))
        found |= {"sweep s": seconds, "share of the limit": limit / seconds, "of its own forward": own / seconds}
        found |= {"own forward, share of the limit": limit / own, "head-tokens/s": head_tokens(ds) / seconds}
        found |= {"tokens in a pass": run.tokens_per_pass(ds), "prompts in a unit": ds.attrs["prompts_per_chunk"]}
        found |= against_naive(module, ds, seconds)
        found |= short_of_memory(run, prompts, length)
    return found


class Runs:
    """Runs of every head of a module over random tokens, each into a store of its own, with default options."""

    def __init__(self, module: Any, folder: Path) -> None:
        self.module, self._folder, self._count = module, folder, 0

    def __call__(self, prompts: int, length: int, **more: Any) -> tuple[Any, float]:
        self._count += 1
        ids = tokens(self.module, prompts, length)
        given = {"prompts": ids, "partners": np.roll(np.arange(prompts), 1), "progress": False}
        out = self._folder / f"{self._count}.zarr"
        return seconds(lambda: sr.run("heads", model=self.module, out=out, **given, **more))

    def phases(self, prompts: int, length: int) -> dict[str, float]:
        """Seconds that a run spends in what is done once."""
        with timed_phases(self.module.device) as spent:
            self(prompts, length)
        return spent

    def tokens_per_pass(self, ds: Any) -> int:
        return int(ds.attrs["tokens_per_pass"])


def built(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Any:
    """A Llama of this shape with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=2048, **shape)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def tokens(module: Any, prompts: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, module.config.vocab_size, (prompts, length))


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and how long that takes until a GPU has finished, too."""
    _wait()
    start = time.perf_counter()
    found = work()
    _wait()
    return found, time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def product_rate(module: Any, quick: bool) -> float:
    """Operations a second in large products of the module's dtype: what nothing here can be faster than."""
    size, device = (256 if quick else 8192), module.device
    left, right = (torch.randn(size, size, dtype=module.dtype, device=device) for _ in range(2))
    for _ in range(3):
        left @ right
    took = min(seconds(lambda: [left @ right for _ in range(5)])[1] / 5 for _ in range(3))
    return 2 * size**3 / took


def flops(module: Any, tokens: int) -> float:
    """Operations in the products of a sweep: of the layers behind each head, its own without the attention."""
    c = module.config
    head = c.hidden_size // c.num_attention_heads
    mlp = 6 * c.hidden_size * c.intermediate_size
    attention = 4 * c.hidden_size * head * (c.num_attention_heads + c.num_key_value_heads)
    layers = c.num_hidden_layers
    behind = sum(mlp + (layers - 1 - layer) * (mlp + attention) for layer in range(layers))
    return float(c.num_attention_heads * tokens * behind)


def head_tokens(ds: Any) -> int:
    return int(ds.selected.sum()) * ds.sizes["prompt"] * (ds.sizes["position"] + 1)


@torch.no_grad()
def suffixes(module: Any, tokens: int, at_once: int) -> float:
    """Seconds that the module's own layers take over the rows of a sweep, a pass of so many tokens, nothing read."""
    c, heads = module.config, module.config.num_attention_heads
    rows = max(1, min(at_once, heads * tokens) // LENGTH)
    x = torch.randn(rows, LENGTH, c.hidden_size, dtype=module.dtype, device=module.device)
    rotary = module.model.rotary_emb(x[:1], position_ids=torch.arange(LENGTH, device=x.device)[None])

    def layers(first: int) -> None:
        stream = x
        for number, layer in enumerate(module.model.layers[first:]):
            if number:
                normed = layer.input_layernorm(stream)
                stream = stream + layer.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
            stream = stream + layer.mlp(layer.post_attention_layernorm(stream))

    layers(0)
    ends = 0, c.num_hidden_layers - 1
    taken = [min(seconds(lambda first=first: layers(first))[1] for _ in range(2)) for first in ends]
    mean = sum(taken) / 2  # a pass is longer by the same time for each layer more
    return mean * c.num_hidden_layers * heads * tokens / (rows * LENGTH)


def against_naive(module: Any, ds: Any, took: float) -> dict[str, float]:
    """A whole pass for each head with plain hooks: how long it takes for all, and how its logit changes differ."""
    prompts, length, layers = ds.sizes["prompt"], ds.sizes["position"] + 1, module.config.num_hidden_layers
    ids = torch.from_numpy(tokens(module, prompts, length)).to(module.device)
    heads = [(layers // 2, head) for head in range(NAIVE_HEADS)]
    partner = torch.arange(prompts, device=ids.device).roll(1)
    naive(module, ids, partner, heads[:1])
    plain, spent = seconds(lambda: naive(module, ids, partner, heads)["logit_change"])
    here = ds.sel(layer=layers // 2).isel(head=slice(NAIVE_HEADS))
    apart = (here.logit_change + here.mean_logit_change).values - plain.float().cpu().numpy()
    all_heads = spent / (NAIVE_HEADS + 1) * int(ds.selected.sum())
    return {
        "naive / ours": all_heads / took,
        "rms apart from naive": float(np.sqrt(np.square(apart).mean())),
        "noise floor": float(ds.noise_floor.sel(layer=layers // 2)),
    }


def short_of_memory(run: Runs, prompts: int, length: int) -> dict[str, float]:
    """The heads of a late layer in passes far too large, which is found out and mended, beside passes that fit."""
    layer = str(run.module.config.num_hidden_layers * 7 // 8)
    fits, once = run(4 * prompts, length, layers=layer, batch_size=4 * prompts)
    large, again = run(4 * prompts, length, layers=layer, batch_size=4 * prompts, tokens_per_pass=2**22)
    return {
        "one layer s": once,
        "the same in passes too large s": again,
        "apart": float(abs(fits.self_repair - large.self_repair).max()),
    }


@contextmanager
def timed_phases(device: torch.device):
    """Within, how long what is done once takes: {phase: seconds}."""
    from importlib import import_module

    spent: dict[str, float] = {}
    with ExitStack() as patched:
        for name, (room, function) in PHASES.items():
            inner = getattr(import_module(room), function)

            def outer(*args: Any, inner: Any = inner, name: str = name, **kwargs: Any) -> Any:
                found, took = seconds(lambda: inner(*args, **kwargs))
                spent[name] = spent.get(name, 0.0) + took
                return found

            patched.enter_context(patch(f"{room}.{function}", outer))
        yield spent


def lines(found: dict[str, Any]) -> list[str]:
    """A line for each measure, a column for each shape."""
    if not found:
        return []
    shapes = [name for name in found if name in SHAPES]
    rows = [f"{found['device']}, torch {found['versions']['torch']}", f"{'':36}" + "".join(f"{s:>14}" for s in shapes)]
    return rows + [f"{name:36}" + "".join(f"{found[s][name]:14,.4g}" for s in shapes) for name in found[shapes[0]]]
