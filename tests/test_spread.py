"""A model spread over several devices by accelerate: each number is that of one device, bit for bit.

The devices are pretended (`pretended.py`): they compute on the processor and refuse to be mixed, as GPUs do.
"""

import accelerate
import families
import numpy as np
import pytest
import torch
import xarray as xr
from pretended import KIND, Pretended, Pretending
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.errors import UsageError
from selfrepair_nn.models import load as loading
from selfrepair_nn.models.load import load


def spread(module):
    """The module with half of its layers, and what comes before, on one device, and all else on another."""
    layers = next(name for name, part in module.named_modules() if isinstance(part, torch.nn.ModuleList))
    count = len(module.get_submodule(layers))
    where = {f"{layers}.{i}": f"{KIND}:{int(i >= count // 2)}" for i in range(count)}
    behind = False
    for name, part in module.named_modules():
        behind |= name == layers
        leaf = next(part.children(), None) is None
        if leaf and not name.startswith(f"{layers}.") and name != layers:
            where[name] = f"{KIND}:{int(behind and 'rotary' not in name)}"
    if module.config.tie_word_embeddings:  # accelerate keeps together what is one
        where["lm_head"] = f"{KIND}:0"
    return accelerate.dispatch_model(module, where, main_device=f"{KIND}:0", force_hooks=True)


def pair(family, tmp_path, **choices):
    """The stores of a run on one device and on two."""
    ids = families.random_ids(families.build(family), 6, 8)
    given = {"prompts": ids, "tokens_per_pass": 64, "batch_size": 3, "progress": False, "check": False} | choices
    sr.run(model=families.build(family).eval(), out=tmp_path / "one.zarr", **given)
    with Pretending():
        sr.run(model=spread(families.build(family).eval()), out=tmp_path / "two.zarr", **given)
    return [xr.open_zarr(tmp_path / name, chunks=None).load() for name in ("one.zarr", "two.zarr")]


def assert_equal(one, two):
    assert one.data_vars.keys() == two.data_vars.keys()
    for name, values in one.data_vars.items():
        np.testing.assert_array_equal(values.values, two[name].values, err_msg=name)


def test_devices_that_are_not_there_refuse_to_be_mixed():
    with Pretending():
        one, other = (torch.ones(3, device=f"{KIND}:{i}") for i in range(2))
        assert isinstance(one, Pretended)
        here = torch.ones(3)
        for mixed in (lambda: one + other, lambda: one * here, lambda: torch.cat([one, other]), lambda: one @ other):
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                mixed()
        assert (one + other.to(one.device)).device == one.device
        assert (one + one).cpu().tolist() == [2.0, 2.0, 2.0]


RUNS = {
    "gpt2": ("gpt2", {"check": True}),
    "neox": ("neox-parallel", {"check": True}),
    "llama": ("llama-gqa", {"check": True}),
    "gemma2, all components": ("gemma2", {"check": True, "components": "all"}),
    "lfm2": ("lfm2", {"check": True}),
    "totals": ("llama-gqa", {"split": "total"}),
    "zero, all components": ("llama-gqa", {"ablation": "zero", "components": "all", "value_bias": "head"}),
    "mean, top components": ("gpt2", {"ablation": "mean", "components": "top", "share": 0.2}),
    "top share, frozen": ("gpt2", {"select": "top-share", "share": 0.2, "freeze": "all", "target": "raw"}),
}


@pytest.mark.parametrize("run", representative(RUNS, "gemma2, all components", "neox"))
def test_a_spread_model_gives_the_numbers_of_one_device(run, tmp_path):
    family, choices = RUNS[run]
    assert_equal(*pair(family, tmp_path, **choices))


RECIPES = (
    "ablation_kinds",
    "freeze_norms",
    "induction",
    "layer_position",
    "layer_order",
    "neurons",
    "path_patching",
    "self_reinforcement",
)


@pytest.mark.parametrize("recipe", representative(RECIPES, "neurons"))
def test_recipes_on_a_spread_model(recipe, tmp_path):
    """What replaces whole layers, norms, neurons; what reads attention; what adds a head's own write."""
    choices = {"prompts": None, "param": {"count": 6, "period": 3}} if recipe == "induction" else {}
    assert_equal(*pair("gpt2", tmp_path, recipe=recipe, **choices))


# ---------------------------------------------------------------- device="balanced"


@pytest.fixture
def asked(monkeypatch):
    """What the loader of transformers is asked for."""
    from transformers import AutoModelForCausalLM

    found, load_it = {}, AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *given, **more: found.update(more) or load_it(*given, **more)
    )
    return found


def test_balanced_is_passed_on(asked, monkeypatch):
    """Accelerate shares the layers out; nothing moves the model afterwards."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda *_: pytest.fail("the model was moved"))
    model = load("tiny-neox", device="balanced", check=False)
    assert asked["device_map"] == "balanced"
    assert model.device == "cpu"  # all that there is here


def test_other_devices_are_not_spread(asked):
    load("tiny-neox", device="cpu", check=False)
    assert "device_map" not in asked


def test_balanced_on_the_command_line(tmp_path, asked):
    from terminal import selfrepair

    given = ["--layers", "7", "--tokens", 64, "--length", 16, "--device", "balanced", "--out", tmp_path / "s.zarr"]
    ended = selfrepair("run", "heads", *given)
    assert ended.code == 0, ended.err
    assert asked["device_map"] == "balanced"


def test_balanced_without_accelerate(monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"'balanced' needs accelerate: pip install 'selfrepair_nn\[balanced\]'"):
        load("tiny-neox", device="balanced")


def test_the_least_memory_of_all_devices_counts(monkeypatch):
    from selfrepair_nn.layout import packing
    from selfrepair_nn.models.load import wrap

    with Pretending():
        model = wrap(spread(families.build("gpt2").eval()))
        assert model.devices == [f"{KIND}:0", f"{KIND}:1"]
        asked = []
        monkeypatch.setattr(packing, "free_memory", lambda device: asked.append(device) or 2**30)
        packing.fitting_tokens(model, 8)
    assert asked == [f"{KIND}:0", f"{KIND}:1"]
