"""The traps of the design that the engine could fall into, one by one, where the oracle would not say which it was."""

from functools import cache

import families
import numpy as np
import oracle
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.components import Head, select_heads
from selfrepair_nn.errors import SelfRepairError, UnsupportedModel
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.models.load import wrap
from selfrepair_nn.tracing import readouts
from selfrepair_nn.tracing.jobs import ablation_job
from selfrepair_nn.tracing.probes import probe
from selfrepair_nn.tracing.session import run_session

EVERY = list(families.FAMILIES)
TIGHT = 1e-10


def ablate(model, ids, **graph):
    """Every head by itself: {name: array [case, prompt, position]}, cases in order of layer and head."""
    heads = select_heads(None, None, model.structure.n_layers, model.structure.n_heads)
    tokens = torch.as_tensor(ids)
    arrays = {"tokens": tokens, "partner_tokens": tokens[families.derangement(len(ids))]}
    plan = Graph(ablate=sweep(heads), **graph).plan(model.layout) | {"tokens_per_pass": 10**6}
    return run_session(ablation_job, model.nn, arrays, plan)


def probe_job(model, arrays, plan, tick=None):
    """What the probe finds of every layer."""
    return probe(model, plan, range(plan["model"]["n_layers"]), arrays["tokens"][:, 1:])


def probed(model, ids, **graph):
    """The weights as the engine knows them."""
    plan = Graph(ablate=sweep((Head(0, 0),)), **graph).plan(model.layout)
    return run_session(probe_job, model.nn, {"tokens": torch.as_tensor(ids)}, plan)


# ---------------------------------------------------------------- what a head is


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "llama-gqa", "opt"])
def test_a_slice_of_the_attention_output_is_not_a_head(name):
    """A head that writes nothing has no effect, though its slice of the output is full of the others' writes."""
    module = families.build(name, exact=True)
    parts = oracle.find_parts(module)
    width = parts.layers[1].W_O.shape[0] // parts.n_heads
    projection = parts.layers[1].projection
    with torch.no_grad():
        rows = projection.weight.T if isinstance(projection, torch.nn.Linear) else projection.weight
        rows[2 * width : 3 * width] = 0
    model = wrap(module)
    found = ablate(model, families.random_ids(module))
    silent = model.structure.n_heads + 2
    for part in ("direct_effect", "ablated_direct_effect", "logit_change"):
        assert_allclose(found[part][silent], 0, atol=TIGHT)
        assert found[part][silent - 1].abs().mean() > 1e-2


@pytest.mark.parametrize(
    ("name", "width"),
    [("llama-headdim", 8), ("qwen3", 12), ("llama-gqa", 8), ("gpt2", 6), ("neox-parallel", 12)],
)
def test_head_width_is_the_projections(wrapped, name, width):
    """Not hidden size / heads, and as many heads as the projection reads, however few keys and values there are."""
    structure = wrapped(name).structure
    config = wrapped(name).nn._module.config
    assert (structure.n_heads, structure.d_head) == (config.num_attention_heads, width)
    assert structure.d_model == config.hidden_size
    if name in ("llama-headdim", "qwen3"):
        assert structure.d_head != config.hidden_size / structure.n_heads


@pytest.mark.parametrize("value_bias", ["output", "head"])
@pytest.mark.parametrize("target", ["centred", "raw"])
@pytest.mark.parametrize("name", EVERY)
def test_the_probe_finds_the_weights(wrapped, seeded, name, target, value_bias):
    """Transposed (GPT-2's Conv1D), fused, grouped or tied: what calls find is what the parameters hold."""
    model, ids = wrapped(name, exact=True), seeded(name)
    found = probed(model, ids, target=target, value_bias=value_bias)
    parts = oracle.find_parts(model.nn._module)
    for index, layer in enumerate(parts.layers):
        assert_allclose(found["output_projection"][index].flatten(0, 1), layer.W_O, atol=1e-12)
        assert_allclose(found["output_bias"][index], 0 if layer.b_O is None else layer.b_O, atol=1e-12)
        constant = oracle.value_constant(layer) if value_bias == "output" else None
        assert_allclose(found["value_constant"][index], 0 if constant is None else constant, atol=1e-12)
    goal = oracle._target(parts, torch.as_tensor(ids), target)
    assert_allclose(found["direction"], goal.d, atol=TIGHT)
    assert_allclose(found["constant"], goal.k, atol=TIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "neox-parallel"])
def test_a_large_bias_does_not_drown_the_probed_weights(name, dtype):
    """W_O + b_O is rounded where the projection is called: b_O must not eat the digits of W_O. Real models have such
    biases: in a few directions of the stream they are tens of times the weights."""
    module = families.build(name).to(dtype)
    parts = oracle.find_parts(module)
    with torch.no_grad():
        for layer in parts.layers:
            layer.projection.bias *= 30
    found = probed(wrap(module), families.random_ids(module))
    for index, layer in enumerate(oracle.find_parts(module).layers):
        error = found["output_projection"][index].flatten(0, 1).double() - layer.W_O
        relative = (error.square().mean() / layer.W_O.square().mean()).sqrt()
        assert relative < torch.finfo(dtype).eps, f"W_O of layer {index} is off by {relative:.2%}"


def test_in_a_parallel_layer_the_mlp_does_not_see_the_heads(wrapped, seeded):
    """The same layer's MLP changes in a sequential model only; the next layer's in both."""
    for name in ("neox-parallel", "neox-sequential"):
        model = wrapped(name)
        found = ablate(model, seeded(name), record="full")["component_change"]
        heads, parallel = model.structure.n_heads, name == "neox-parallel"
        width = heads + 2  # heads, attention bias, MLP
        for case in range(2 * heads):
            own_mlp = 1 + (case // heads) * width + heads + 1
            same, following = found[case, ..., own_mlp], found[case, ..., own_mlp + width]
            assert (same.abs().max() < TIGHT) == parallel
            assert following.abs().max() > 1e-2


@pytest.mark.parametrize("name", families.REFUSED)
def test_what_is_not_a_sum_of_heads_is_refused(name, tmp_path):
    """Before anything is run or written, and with the family named."""
    module = families.build(name)
    with pytest.raises(UnsupportedModel, match=module.config.model_type):
        wrap(module)
    module.float().save_pretrained(tmp_path / "saved")
    with pytest.raises(UnsupportedModel):
        sr.run(model=str(tmp_path / "saved"), prompts=np.zeros((2, 4), int), out=tmp_path / "x.zarr")
    assert not (tmp_path / "x.zarr").exists()


# ---------------------------------------------------------------- numbers of few digits


def test_readouts_stay_wide_under_autocast():
    """The server runs blocks under bfloat16 autocast, where a matrix product of float32 tensors is bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 5, 64, generator=generator) for _ in range(2))
    plan = {"model": {"centred_norm": True, "norm_epsilon": 1e-5, "n_heads": 4, "d_head": 16}}
    readings = {
        "along": lambda: readouts.along(x, y),
        "product": lambda: readouts.product(x, y.mT),
        "centre": lambda: readouts.centre(x, plan),
        "norm_scale": lambda: readouts.norm_scale(x, plan),
        "widen": lambda: readouts.widen(x.bfloat16()),
        "per_head": lambda: readouts.per_head(x, plan),
    }
    expected = {name: reading() for name, reading in readings.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ y.mT).dtype == torch.bfloat16  # else this machine cannot show it
        found = {name: reading() for name, reading in readings.items()}
    for name in readings:
        assert found[name].dtype == torch.float32, name
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "llama-gqa"])
def test_a_job_under_autocast(seeded, name):
    """What is stored is float32, and as near to the truth as a forward pass in bfloat16 can be."""
    model = wrap(families.build(name).float())
    ids = seeded(name)
    expected = ablate(model, ids, record="full")
    with torch.autocast("cpu", torch.bfloat16):
        found = ablate(model, ids, record="full")
    assert {values.dtype for values in found.values()} == {torch.float32}
    assert not torch.equal(found["logit"], expected["logit"])
    spread = expected["logit"].std()
    summed = found["component_direct_effect"].sum(-1) + found["target_constant"]
    assert (summed - found["logit"]).abs().max() < 0.1 * spread
    for part in ("logit", "direct_effect", "logit_change"):
        assert (found[part] - expected[part]).square().mean().sqrt() < 0.05 * spread, part


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """half(name, dtype): a run of a model in few digits, and of the same weights in float64."""

    @cache
    def run(name, dtype):
        folder = tmp_path_factory.mktemp("half")
        few = families.build(name).to(dtype)
        many = families.build(name).to(dtype).double()
        ids = families.random_ids(few, 6, 12)
        choices = {"prompts": ids, "components": "all", "partners": families.derangement(6)}
        return [
            sr.run(model=wrap(module), out=folder / f"{i}.zarr", progress=False, **choices).load()
            for i, module in enumerate((few, many))
        ]

    return run


def rms(values, dims=None):
    """Root mean square."""
    return np.sqrt((values**2).mean(dims))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", representative(["gpt2", "neox-parallel", "llama-gqa"], "gpt2"))
def test_a_model_in_few_digits(half, name, dtype):
    """Closure, and the distance to the same weights in float64, are small against the logits."""
    few, many = half(name, dtype)
    digit, spread = 8 * torch.finfo(dtype).eps, float(many.logit.std())
    assert few.direct_effect.dtype == np.float32
    assert rms(few.closure) < digit * spread
    for part in (
        "logit",
        "direct_effect",
        "logit_change",
        "self_repair",
        "from_heads",
        "from_mlps",
        "from_norm",
    ):
        assert rms(few[part] - many[part]) < digit * spread, part


@pytest.mark.parametrize("name", representative(["gpt2", "neox-parallel", "llama-gqa"], "gpt2"))
def test_the_noise_floor_is_as_high_as_the_noise(half, name):
    """Smaller effects are rounding, the store says of it: then it must be what rounding does to an effect."""
    few, many = half(name, torch.bfloat16)
    noise = rms(few.logit_change - many.logit_change, ("head", "prompt", "position"))
    assert (few.noise_floor > 0).all()
    assert (few.noise_floor > noise / 10).all()
    assert (few.noise_floor < noise * 10).all()


# ---------------------------------------------------------------- prompts and weights at the edge


@pytest.mark.parametrize("ablation", ["mean", "zero", "identity"])
@pytest.mark.parametrize("name", representative(["gpt2", "neox-parallel", "opt"], "gpt2"))
def test_one_prompt_of_two_tokens(measure, wrapped, seeded, name, ablation):
    """A batch of one with one position: no dimension is ever squeezed away."""
    ids = seeded(name, 1, 2)
    dataset = measure(name, ablation=ablation, prompts=ids)
    expected = oracle.reference(wrapped(name, exact=True).nn._module, ids, ablation=ablation)
    assert dataset.logit.shape == (1, 1)
    for part in oracle.PER_HEAD:
        assert_allclose(dataset[part], expected[part], atol=TIGHT, err_msg=part)


def test_token_zero_is_a_token(measure, wrapped):
    """As read, as predicted, and as nothing else."""
    ids = np.array([[0, 5, 0, 0], [3, 0, 7, 0]])
    dataset = measure("gpt2", prompts=ids)
    expected = oracle.reference(wrapped("gpt2", exact=True).nn._module, ids, partners=[1, 0])
    assert_array_equal(dataset.target, ids[:, 1:])
    for part in oracle.PER_HEAD:
        assert_allclose(dataset[part], expected[part], atol=TIGHT, err_msg=part)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("ablation", ["resample", "mean"])
def test_weights_that_are_not_finite(tmp_path, value, ablation):
    """One line that says so, before anything is stored."""
    module = families.build("llama-gqa")
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight[0, 0] = value
    path = tmp_path / "x.zarr"
    with pytest.raises(SelfRepairError, match="not finite") as error:
        sr.run(model=wrap(module), prompts=families.random_ids(module), out=path, ablation=ablation)
    assert "\n" not in str(error.value)
    assert not path.exists()


def test_a_prompt_that_is_not_finite(tmp_path):
    """The units before it are kept, and its own is named."""
    module = families.build("llama-gqa")
    with torch.no_grad():
        module.model.embed_tokens.weight[52] = float("nan")
    ids = families.random_ids(module, 6) % 52
    ids[4, 3] = 52
    path = tmp_path / "x.zarr"
    with pytest.raises(SelfRepairError, match="prompts 4 to 5"):
        sr.run(model=wrap(module), prompts=ids, out=path, ablation="zero", batch_size=2, check=False)
    assert sr.open_store(path).done.all(("layer", "head")).values.tolist() == [True] * 4 + [False] * 2


def test_weights_that_are_not_finite_do_not_pass_the_check_at_load(tmp_path):
    module = families.build("llama-gqa").float()
    with torch.no_grad():
        module.lm_head.weight[3, 1] = float("nan")
    module.save_pretrained(tmp_path)
    with pytest.raises(SelfRepairError, match="cannot be decomposed"):
        sr.load(str(tmp_path))
