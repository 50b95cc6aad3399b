"""A store as large as the paper's runs, without a model: simulated, block by block, through the package's own Store."""

from pathlib import Path

from selfrepair_nn.layout.plan import default_block
from selfrepair_nn.simulate import simulate_heads
from selfrepair_nn.store import Store

LAYERS, HEADS = 3, 4
PROMPTS, POSITIONS = 8192, 127
TOKENS = PROMPTS * POSITIONS
BLOCK = 256


def write_large_store(path: Path) -> None:
    """Write a complete store of TOKENS tokens and LAYERS x HEADS heads to `path`."""
    labels = simulate_heads(1, 1, PROMPTS, POSITIONS)
    some = simulate_heads(LAYERS, HEADS, 2, POSITIONS)
    axes = {name: some[name].values for name in ("layer", "head", "head_label")}
    store = Store.create(
        path,
        {name: values.values for name, values in labels.coords.items()} | axes,
        {name: None if "prompt" in values.dims else values.values for name, values in some.items()},
        prompts_per_chunk=default_block(POSITIONS + 1),
        precision="float32",
        attributes=some.attrs,
    )
    for start in range(0, PROMPTS, BLOCK):
        part = simulate_heads(LAYERS, HEADS, BLOCK, POSITIONS, seed=start)
        parts = {name: v.values for name, v in part.items() if "prompt" in v.dims and name != "done"}
        store.write_prompts(slice(start, start + BLOCK), parts, part.selected.values)
