"""What only a GPU does, with the GPU left out: products in its way, results on their way, room that is measured."""

from dataclasses import replace

import families
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import selfrepair_nn as sr
from selfrepair_nn.backends import local
from selfrepair_nn.components import Head
from selfrepair_nn.errors import UnsupportedModel
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.layout import packing
from selfrepair_nn.layout.packing import block_for
from selfrepair_nn.layout.plan import Work
from selfrepair_nn.layout.units import Unit
from selfrepair_nn.models import check
from selfrepair_nn.models.check import require
from selfrepair_nn.models.load import wrap
from selfrepair_nn.tracing import changes
from selfrepair_nn.tracing.changes import dots, in_parts
from selfrepair_nn.tracing.jobs import ablation_job
from selfrepair_nn.tracing.memory import Measured, Room
from selfrepair_nn.tracing.session import run_session

# ---------------------------------------------------------------- products


def test_a_direction_in_parts_loses_nothing_that_float32_holds():
    direction = torch.randn(50, 64)
    parts = in_parts(direction, torch.bfloat16)
    assert parts.shape == (50, 3, 64)
    assert parts.dtype == torch.bfloat16
    assert_allclose(parts.double().sum(1), direction, rtol=2**-23)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_dots_against_float64(dtype, error):
    x, direction = torch.randn(3, 50, 64).to(dtype), torch.randn(50, 64)
    exact = (x.double() * direction.double()).sum(-1)
    assert_allclose(dots(x, in_parts(direction, dtype)), exact, atol=error * exact.std().item() * 10)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "glm4", "lfm2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jobs_by_dots_measure_the_same(monkeypatch, name, dtype):
    """Up to what the difference of two numbers of the model's dtype is rounded to where it is taken first."""
    model = wrap(families.build(name).to(dtype))
    tokens = torch.as_tensor(families.random_ids(model.module, 3, 9))
    having = [n for n in range(model.structure.n_layers) if n not in model.structure.headless]
    heads = [Head(layer, head) for layer in having for head in range(model.structure.n_heads)]
    plan = Graph(ablate=sweep(heads), record="full").plan(model.layout) | {"tokens_per_pass": 4 * tokens.numel()}
    arrays = {"tokens": tokens, "partner_tokens": tokens.roll(1, 0)}
    plain = run_session(ablation_job, model.nn, arrays, plan)
    counted = []
    monkeypatch.setattr(changes, "dots_pay", lambda x: counted.append(1) or True)
    found = run_session(ablation_job, model.nn, arrays, plan)
    assert counted
    spread = plain["logit"].std().item()
    limit = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    for each in plain:
        assert_allclose(found[each], plain[each], atol=limit * spread, err_msg=each)
    before, now = (_closure(x).square().mean().sqrt() for x in (plain, found))
    assert now <= 1.05 * before + 1e-7 * spread  # they are at least as exact


def _closure(found):
    repair = found["logit_change"] - (found["ablated_direct_effect"] - found["direct_effect"])
    ratio = (found["norm_scale"] / found["ablated_norm_scale"]) - 1
    after = found["logit"] - found["target_constant"] + found["component_change"].sum(-1)
    after = after + found.get("from_post_norms", 0)
    parts = sum(found[name] for name in ("from_heads", "from_mlps", "from_mixers", "from_post_norms") if name in found)
    return repair - parts - ratio * after


# ---------------------------------------------------------------- results on their way


class Slow(local.Coming):
    """A result that a GPU would still be computing."""

    under_way = True


def test_a_result_is_given_once_the_next_unit_is_begun(monkeypatch):
    order = _ordered(monkeypatch, Slow)
    assert order == ["begin 0", "begin 1", "home 0", "begin 2", "home 1", "home 2"]


def test_without_a_gpu_each_result_is_given_at_once(monkeypatch):
    assert _ordered(monkeypatch, local.Coming) == ["begin 0", "home 0", "begin 1", "home 1", "begin 2", "home 2"]


def test_what_fails_loses_nothing_that_was_computed_before(monkeypatch):
    order = []
    with pytest.raises(RuntimeError, match="unit 2"):
        _ordered(monkeypatch, Slow, order, fails=2)
    assert order == ["begin 0", "begin 1", "home 0", "begin 2", "home 1"]


def _ordered(monkeypatch, coming, order=None, fails=None):
    order = [] if order is None else order

    def result(self, unit):
        order.append(f"begin {unit}")
        if unit == fails:
            raise RuntimeError(f"unit {unit}")
        return {"x": torch.tensor(unit)}

    monkeypatch.setattr(local, "Coming", coming)
    monkeypatch.setattr(local._Local, "_result", result)
    runner = local._Local(None, False, None, lambda tokens: None)
    for unit, found in runner.run(range(3)):
        assert found["x"] == unit
        order.append(f"home {unit}")
    return order


def test_a_store_filled_with_results_on_their_way_is_the_same(monkeypatch, tmp_path):
    module = families.build("llama-gqa")
    given = {"prompts": families.random_ids(module, 6), "batch_size": 2, "progress": False}
    one = sr.run(model=module, out=tmp_path / "a.zarr", **given).load()
    monkeypatch.setattr(local, "Coming", Slow)
    other = sr.run(model=module, out=tmp_path / "b.zarr", **given).load()
    for name in one.data_vars:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# ---------------------------------------------------------------- room


def test_room_is_found_between_what_fitted_and_what_did_not():
    room = Room(1000)
    room.fits(300)
    tried, limit = [], 420
    while room.fitted < 301 or room.tokens not in tried:
        size = room.tokens
        tried.append(size)
        room.fits(size) if size <= limit else room.too_small(size)
    assert tried == [1000, 650, 475, 387]
    room.too_small(200)  # something else took the memory
    assert room.tokens == 100


def test_room_goes_up_again_to_what_may_fit():
    """One pass that was far too large does not make all later ones small."""
    room, limit, tried = Room(1000), 900, []
    for _ in range(6):
        tried.append(room.tokens)
        room.fits(tried[-1]) if tried[-1] <= limit else room.too_small(tried[-1])
    assert tried == [1000, 500, 750, 875, 875, 875]
    assert (room.known, room.refused) == (875, 1)


def test_room_follows_from_what_a_large_pass_takes():
    room = Measured(1000, 5000)
    room.measure(100, used=10, free=1000)
    assert room.tokens == 1000  # too small to tell
    room.measure(900, used=9000, free=20_000)
    assert room.tokens == 1700
    room.measure(900, used=9, free=20_000)
    assert room.tokens == 1700  # once is enough: passes of a run stay alike


def test_a_pass_that_does_not_fit_keeps_the_clean_work(monkeypatch):
    """And the cases come back in order, none of them twice."""
    model = wrap(families.build("llama-gqa"))
    tokens = torch.as_tensor(families.random_ids(model.module, 4))
    arrays = {"tokens": tokens, "partner_tokens": tokens.roll(1, 0)}
    heads = [Head(layer, head) for layer in (1, 2) for head in range(model.structure.n_heads)]
    plan = Graph(ablate=sweep(heads)).plan(model.layout)
    whole = run_session(ablation_job, model.nn, arrays, plan | {"tokens_per_pass": 10**6})
    limit, passes, clean, layers = 3 * tokens.numel() // 2, [], [], model.module.model.layers

    def refuse(module, given):
        passes.append(given[0].shape[:-1].numel())
        if passes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    layers[-1].mlp.register_forward_pre_hook(refuse)
    layers[0].mlp.register_forward_hook(lambda module, given, out: clean.append(out.shape[:-1].numel()))
    ticks = []
    found = run_session(ablation_job, model.nn, arrays, plan | {"tokens_per_pass": 10**6}, ticks.append)
    for name in whole:
        assert_allclose(found[name], whole[name], atol=1e-10, err_msg=name)
    assert any(n > limit for n in passes)  # refused, and yet the prompts and their partners ran once, a probe beside
    assert sorted(clean) == [1, tokens.numel(), tokens.numel()]
    assert sum(ticks) == len(heads) * len(tokens)


# ---------------------------------------------------------------- units by device


def work(prompts=100, length=128, heads=8):
    structure = wrap(families.build("llama-gqa")).structure
    graph = Graph(ablate=sweep(Head(layer, head % structure.n_heads) for layer in range(2) for head in range(heads)))
    return Work(None, {"": graph}, structure, prompts, length, 4, 2304)


@pytest.mark.parametrize(
    ("tokens", "memory", "block"),
    [
        (65536, 10**12, 50),  # 64 prompts of 8 heads fill a pass: two units of a size
        (16384, 10**12, 15),
        (65536, 4 * 10**6, 2),  # 10^6 bytes: 3 layers x 672 bytes of 6 heads, 8 wide, and 800 measured, 355 tokens
        (100, 1, 1),
    ],
)
def test_units_on_a_gpu_fill_its_passes(tokens, memory, block):
    found = block_for(work(), tokens, memory, 2, stored=400)
    assert found == block


def test_a_run_takes_the_units_of_its_device(monkeypatch, tmp_path):
    monkeypatch.setattr("selfrepair_nn.running.run.fitting_block", lambda model, work, stored, processes: 7)
    given = {"prompts": families.random_ids(families.build("llama-gqa"), 40), "layers": "0", "progress": False}
    given |= {"model": families.build("llama-gqa")}
    kept = [
        sr.run(out=tmp_path / f"{n}.zarr", **given | more).attrs["prompts_per_chunk"]
        for n, more in enumerate([{}, {"batch_size": 5}, {"tokens_per_pass": 70}])
    ]
    assert kept == [40, 5, 40]  # never less than elsewhere, and always what was chosen
    monkeypatch.setattr("selfrepair_nn.layout.experiment.default_block", lambda length: 3)
    assert sr.run(out=tmp_path / "x.zarr", **given).attrs["prompts_per_chunk"] == 7
    monkeypatch.undo()
    assert packing.fitting_block(wrap(given["model"]), work(), 0) == work().block


def test_a_half_of_which_nothing_is_wanted_gives_something_all_the_same():
    model = wrap(families.build("llama-gqa"))
    tokens = torch.as_tensor(families.random_ids(model.module, 2))
    plan = Graph(ablate=sweep([Head(1, 0)])).plan(model.layout) | {"tokens_per_pass": 10**4}
    wanted = np.array([[0, 5]])
    shapes = dict.fromkeys(("logit_change",), ("case", "prompt", tokens.shape[1] - 1))
    unit = Unit("u", ablation_job, slice(0, 2), plan, lambda p: _arrays(tokens, p), shapes, wanted=wanted)
    first, second = (run_session(half.job, model.nn, half.arrays, half.plan) for half in unit.halves())
    whole = run_session(unit.job, model.nn, unit.arrays, unit.plan)
    assert_allclose(second["logit_change"][0, 0, :5], whole["logit_change"][0, 1, :5], atol=1e-10)
    assert first["logit_change"].isfinite().any()


def _arrays(tokens, prompts):
    return {"tokens": tokens[prompts], "partner_tokens": tokens.roll(1, 0)[prompts]}


# ---------------------------------------------------------------- a proof that is known


def test_a_proof_is_known_for_the_same_state_alone(monkeypatch):
    """For the same weights and answers, but not for another description of them; and nothing that failed is."""
    model = wrap(families.build("gpt2"))
    require(model, state="as it is")
    counted = []
    inner = check._on_random_tokens
    monkeypatch.setattr(check, "_on_random_tokens", lambda model: counted.append(1) or inner(model))
    require(model, state="as it is")
    assert not counted
    require(model)
    require(model, state="another")
    assert len(counted) == 2
    parallel = replace(model.structure, parallel=True)
    wrong = replace(model, description=replace(model.description, structure=parallel))
    for _ in range(2):
        with pytest.raises(UnsupportedModel):
            require(wrong, state="as it is")
    assert len(counted) == 4
