"""What a GPU would be given to do, counted on the CPU: operations, bytes moved and FLOPs, beside the model's own."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from selfrepair_nn.components import Head
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.models.load import wrap
from selfrepair_nn.tracing.jobs import ablation_job
from selfrepair_nn.tracing.probes import Weights
from selfrepair_nn.tracing.session import run_session

PROMPTS, LENGTH, LAYER, HEADS = 4, 64, 8, 16
SIZES = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": HEADS, "num_key_value_heads": 4}
VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"}
VIEWS |= {"detach", "alias", "split", "unflatten", "as_strided", "chunk", "reshape", "unbind", "lift_fresh", "empty"}
VIEWS |= {"empty_like", "new_empty", "_reshape_alias", "split_with_sizes"}
"""What moves nothing."""


class Counted(TorchDispatchMode):
    """Counts operations, and the bytes of what each reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)]
            self.operations[name] += 1
            self.bytes[name] += sum(x.numel() * x.element_size() for x in tensors)
        return found


def counted(work: Callable[[], Any]) -> dict[str, float]:
    """Operations, bytes and FLOPs of some work."""
    with Counted() as found:
        work()
    with FlopCounterMode(display=False) as flops:
        work()
    return {
        "operations": sum(found.operations.values()),
        "bytes": sum(found.bytes.values()),
        "flops": flops.get_total_flops(),
        "most": found.bytes.most_common(8),
    }


def counts(dtype: torch.dtype = torch.bfloat16) -> dict[str, dict[str, float]]:
    """All heads of one layer of a Llama of 16 layers: the suffix forward that the model itself would make, and ours.

    `pass` is one more ablated pass in a block, `block` a block of prompts in a run whose weights are known, `first` the
    first block, and `total` a pass that reads the final residual stream alone. `sweep` are all heads of all layers.
    """
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2048, num_hidden_layers=16, max_position_embeddings=512, **SIZES)
    module = LlamaForCausalLM(config).to(dtype).eval()
    found = {"suffix": counted(lambda: _suffix(module, HEADS * PROMPTS))}
    for record in ("sums", "total"):
        first, later = _job(module, record), _job(module, record, Weights())
        later()
        once, twice = counted(later), counted(_job(module, record, later.keywords["known"], passes=2))
        one_pass = {name: twice[name] - once[name] for name in ("operations", "bytes", "flops")}
        name = {"sums": "", "total": ", total"}[record]
        found |= {f"pass{name}": one_pass, f"block{name}": once, f"first{name}": counted(first)}
    return found | {"sweep, suffix": counted(partial(_suffixes, module)), "sweep": counted(_sweep(module))}


def _job(module: Any, record: str, known: Weights | None = None, passes: int = 1) -> partial:
    """A block in which every head of the layer is ablated, each in one pass or in several."""
    model, tokens = wrap(module), torch.randint(2048, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
    heads = [Head(LAYER, head) for head in range(HEADS)]
    plan = Graph(ablate=sweep(heads * passes), record=record).plan(model.layout)
    plan |= {"tokens_per_pass": len(heads) * tokens.numel()}
    arrays = {"tokens": tokens, "partner_tokens": tokens.roll(1, 0)}
    return partial(run_session, ablation_job, model.nn, arrays, plan, known=known)


def _sweep(module: Any) -> partial:
    """A block in which every head of every layer is ablated, a layer in a pass."""
    job = _job(module, "sums", Weights())
    model, arrays, plan = job.args[1:]
    heads = [Head(layer, head) for layer in range(len(module.model.layers)) for head in range(HEADS)]
    every = Graph(ablate=sweep(heads)).plan(wrap(module).layout) | {"tokens_per_pass": plan["tokens_per_pass"]}
    return partial(run_session, ablation_job, model, arrays, every, known=Weights())


def _suffixes(module: Any) -> None:
    for layer in range(len(module.model.layers)):
        _suffix(module, HEADS * PROMPTS, layer)


@torch.no_grad()
def _suffix(module: Any, rows: int, first: int = LAYER) -> Any:
    """The layers from the ablated one on, of which the first without its attention, by the model's own modules."""
    stream = torch.randn(rows, LENGTH, module.config.hidden_size, dtype=module.dtype)
    positions = module.model.rotary_emb(stream[:1], position_ids=torch.arange(LENGTH)[None])
    for number, layer in enumerate(module.model.layers[first:]):
        if number:
            normed = layer.input_layernorm(stream)
            stream = stream + layer.self_attn(normed, position_embeddings=positions, attention_mask=None)[0]
        stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
    return stream


def lines(found: dict[str, dict[str, float]]) -> list[str]:
    """A line for each, with its ratio to the model's own forward."""
    rows = [f"{'':14}{'operations':>18}{'MiB moved':>18}{'GFLOP':>18}"]
    for name, each in found.items():
        cells = [(each["operations"], 1), (each["bytes"], 2**20), (each["flops"], 1e9)]
        own = found["sweep, suffix" if name.startswith("sweep") else "suffix"]
        ratios = [each[of] / own[of] for of in ("operations", "bytes", "flops")]
        told = (f"{value / unit:,.0f} ({ratio:.2f})" for (value, unit), ratio in zip(cells, ratios, strict=True))
        rows.append(f"{name:14}" + "".join(f"{cell:>18}" for cell in told))
    return rows
