"""Shared servers run jobs in a process without weights: there, by NDIF's own runner, the numbers are the same."""

import os
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec

import families
import nnsight
import pytest
import torch
from tiers import representative
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from selfrepair_nn.backends.local import greeted_here
from selfrepair_nn.backends.ndif.limits import Limits
from selfrepair_nn.components import (
    Attention,
    FinalNorm,
    Head,
    Layers,
    Mlp,
    Neuron,
    Norm,
    Parallel,
    Permuted,
    Swap,
    select_heads,
)
from selfrepair_nn.estimating.traffic import crossing_bytes
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.layout.experiment import prepare
from selfrepair_nn.layout.greeting import first_unit
from selfrepair_nn.layout.sweep import Sweep, plans
from selfrepair_nn.models.apart import compared
from selfrepair_nn.models.greeting import greeting_of
from selfrepair_nn.models.load import find, load
from selfrepair_nn.options import Options
from selfrepair_nn.replacements import OtherHead, Reinforce, Scale
from selfrepair_nn.tracing.jobs import ablation_job, effects_job, lengths_job, mean_job
from selfrepair_nn.tracing.session import run_session

REQUIRED = os.environ.get("SELFREPAIR_REQUIRE_SANDBOX") == "1"
INSTALL = "pip install --no-deps --ignore-requires-python -r tests/requirements-sandbox.txt"
pytestmark = pytest.mark.skipif(
    find_spec("ndif") is None and not REQUIRED,
    reason=f"the jobs were NOT tried in a process without weights, as shared servers run them: {INSTALL}",
)
RELATIVE = 1e-4  # float32
GREETING_CROSSINGS, MESSAGES = 5, 22_000
"""How often a layer's four vectors cross for the greeting (what its attention and its MLP write is read and written
back, what leaves it is set), and the bytes of the messages around them."""



def save_with_tokenizer(name, path):
    """One of the tiny models in float32, with a tokenizer of as many words as it needs."""
    model = families.build(name).float()
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    model.save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(path)


@pytest.fixture(
    scope="module", params=representative(["neox-parallel", "gptj", "gpt2", "llama-gqa"], "gptj", "llama-gqa")
)
def setting(request, tmp_path_factory):
    """The sandbox, the same model in this process, and token ids."""
    from sandbox import Sandbox

    path = str(tmp_path_factory.mktemp("saved"))
    save_with_tokenizer(request.param, path)
    model = load(path, check=False)
    sandbox = Sandbox(model.nn, path)
    tokens = torch.as_tensor(families.random_ids(model.nn._module))
    yield sandbox, model, {"tokens": tokens, "partner_tokens": tokens.roll(1, 0)}
    sandbox.close()


def planned(model, rows=96, **graph):
    """Every head by itself, several to a pass, in more than one pass a layer."""
    heads = select_heads(None, None, model.structure.n_layers, model.structure.n_heads)
    return Graph(ablate=sweep(heads), **graph).plan(model.layout) | {"tokens_per_pass": rows}


def assert_same(there, here):
    """Equal to float32's rounding, as a share of each quantity's largest value."""
    assert there.keys() == here.keys()
    for name in here:
        assert not there[name].requires_grad
        assert there[name].shape == here[name].shape
        assert (there[name] - here[name]).abs().max() <= RELATIVE * here[name].abs().max(), name


@pytest.mark.parametrize("record", ["sums", "full"])
@pytest.mark.parametrize("replacement", ["resample", "mean", "zero"])
def test_ablations_are_the_same_there(setting, replacement, record):
    sandbox, model, arrays = setting
    means = {"model": model.layout, "keep": {"z": list(range(model.structure.n_layers))}}
    if replacement == "mean":
        totals = sandbox.run(mean_job, arrays, means)
        arrays = arrays | {
            "means": {"z": {layer: z / arrays["tokens"].numel() for layer, z in totals["z"].items()}}
        }
    plan = planned(model, replacement=replacement, record=record)
    here = run_session(ablation_job, model.nn, arrays, plan)
    assert here["logit_change"].abs().mean() > 1e-2
    assert_same(sandbox.run(ablation_job, arrays, plan), here)


def test_identity_changes_nothing_there(setting):
    """The control: what crosses the socket and comes back is what was there."""
    sandbox, model, arrays = setting
    found = sandbox.run(ablation_job, arrays, planned(model, replacement="identity", record="full"))
    for name in ("logit_change", "mean_logit_change", "from_heads", "from_mlps", "component_change"):
        assert found[name].abs().max() <= RELATIVE * found["logit"].abs().max(), name


def test_freezing_is_the_same_there(setting):
    sandbox, model, arrays = setting
    sizes = model.structure.n_layers, model.structure.n_heads
    graph = Graph(ablate=sweep(select_heads("0", None, *sizes))).frozen("all", *sizes)
    plan = graph.plan(model.layout) | {"tokens_per_pass": 96}
    found = sandbox.run(ablation_job, arrays, plan)
    assert_same(found, run_session(ablation_job, model.nn, arrays, plan))
    assert found["from_mlps"].abs().max() <= RELATIVE * found["logit"].abs().max()


def greeted_alike(sandbox, model):
    """The greetings there and here, of which nothing differs; and how many bytes crossed for it."""
    unit = first_unit(model.layout)
    there, here = greeting_of(sandbox.run(unit.job, unit.arrays, unit.plan)), greeted_here(model)
    found = compared(here, there)
    assert (found.kind, found.differences) == ("same", [])
    assert (there["weights_in"], there["tensor_parallel"]) == (None, None)
    assert (there["attention"] == "eager") == (here["attention"] == "eager")
    return there, sandbox.crossed


def test_the_greeting_is_the_same_there(setting):
    """What a process without weights cannot know, it does not make up."""
    sandbox, model, _ = setting
    there, crossed = greeted_alike(sandbox, model)
    print(f"{model.name}: {crossed} bytes cross for the greeting")
    assert there["attention"] == ("eager" if model.structure.model_type == "gptj" else "fused")


@pytest.mark.parametrize(
    "name", representative(["gemma2", "lfm2", "falcon-sequential", "gpt-oss"], "gpt-oss")
)
def test_further_families_are_the_same_there(name, tmp_path):
    """Norms behind sublayers and a soft cap; mixers; a layer that returns a tuple; experts that return one."""
    from sandbox import Sandbox

    save_with_tokenizer(name, str(tmp_path))
    model = load(str(tmp_path), check=False)
    tokens = torch.as_tensor(families.random_ids(model.nn._module))
    arrays = {"tokens": tokens, "partner_tokens": tokens.roll(1, 0)}
    heads = select_heads(None, None, model.structure.n_layers, model.structure.n_heads, model.structure.headless)
    sandbox = Sandbox(model.nn, str(tmp_path))
    try:
        for record, replacement in (("sums", "resample"), ("full", "zero")):
            graph = Graph(ablate=sweep(heads), record=record, replacement=replacement, also=("logprob",))
            plan = graph.plan(model.layout) | {"tokens_per_pass": 96}
            here = run_session(ablation_job, model.nn, arrays, plan)
            assert_same(sandbox.run(ablation_job, arrays, plan), here)
        greeted_alike(sandbox, model)
    finally:
        sandbox.close()


MIXED = ((Head(0, 1), Mlp(0), Neuron(1, 2)), (Attention(1),), (Neuron(2, 3),), (Mlp(1), Head(1, 0)))
HEADS = sweep([Head(0, 1), Head(1, 0), Head(2, 1)])
NORMS = frozenset({Norm(1, "attention"), Norm(2, "mlp"), Norm(0, "mlp")})
EDITS = {
    "mixed": dict(
        ablate=MIXED, replacement="counterfactual", neurons=2, residual_norm=True, target="difference"
    ),
    "frozen": dict(ablate=MIXED, freeze=NORMS | {Mlp(1), Attention(2)}, neurons=2, record="full"),
    "everything-frozen": dict(ablate=MIXED, freeze=NORMS | {Mlp(1), Mlp(2), Attention(2), FinalNorm()}),
    "deleted": dict(ablate=sweep([Layers(0, 2), Layers(2, 3)]), replacement="zero", record="full", neurons=1),
    "swapped": dict(ablate=sweep([Swap(0), Permuted((2, 0, 1)), Parallel(0, 3)]), replacement="zero", freeze=NORMS),
    "reinforced": dict(ablate=HEADS, replacement=Reinforce(0.5), record="full"),
    "scaled": dict(ablate=MIXED, replacement=Scale(0.5)),
    "other-head": dict(ablate=HEADS, replacement=OtherHead(Head(2, 0)), attention=(0, 1, 5)),
    "mean": dict(ablate=MIXED, replacement="mean"),
    "words": dict(ablate=MIXED, words=2),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_kind_of_edit_is_the_same_there(setting, name):
    """Sites, replacements, frozen norms and records; the top tokens' packed results, too."""
    sandbox, model, arrays = setting
    tokens = arrays["tokens"]
    arrays = arrays | {
        "counterfactual_tokens": tokens.roll(2, 0),
        "other": tokens.roll(3, 0)[:, 1:].contiguous(),
    }
    arrays |= {"edited_position": torch.tensor([3, 0, 6, 2])}
    frozen = frozenset(s for s in EDITS[name].get("freeze", ()) if s.lies_in(model.structure))
    plan = Graph(**EDITS[name] | {"freeze": frozen}).plan(model.layout) | {"tokens_per_pass": 96}
    if name == "mean":
        keep = {"model": model.layout, "keep": {"z": [0, 1], "mlp": [0, 1], "neurons": [1, 2]}}
        totals = sandbox.run(mean_job, arrays, keep)
        arrays |= {"means": {w: {i: x / tokens.numel() for i, x in t.items()} for w, t in totals.items()}}
    here = run_session(ablation_job, model.nn, arrays, plan)
    assert here["logit_change"].abs().mean() > 1e-3
    if plan["neurons"] is not None:
        here.pop("top_neuron")
        arrays |= {"thresholds": here["direct_effect"].flatten(1).quantile(0.8, 1) + 1e-3}
        here = packed(here, arrays["thresholds"])
    there = sandbox.run(ablation_job, arrays, plan)
    there.pop("top_neuron", None)  # near ties
    assert_same(there, here)


def packed(found, thresholds):
    """What a job gives of the tokens at or above the thresholds only."""
    top = found["direct_effect"] >= thresholds[:, None, None]
    assert 0 < top.sum() < top.numel()
    large = ("component_change", "neuron_change", "neuron_direct_effect")
    return {name: values[top] if name in large else values for name, values in found.items()}


def test_the_other_jobs_are_the_same_there(setting):
    sandbox, model, arrays = setting
    plan = planned(model)
    assert_same(sandbox.run(effects_job, arrays, plan), run_session(effects_job, model.nn, arrays, plan))
    plan = {"model": model.layout, "keep": {"z": [0, 2], "mlp": [1], "neurons": [2]}, "lengths": [1, 3]}
    there, here = sandbox.run(mean_job, arrays, plan), run_session(mean_job, model.nn, arrays, plan)
    assert there.keys() == here.keys() == plan["keep"].keys()
    for what in here:
        assert_same(there[what], here[what])
    assert_same(sandbox.run(lengths_job, arrays, plan), run_session(lengths_job, model.nn, arrays, plan))


# ---------------------------------------------------------------- that it really is such a process


def look_around(model, arrays, plan):
    """Where the block runs: its process, what holds the parameters there, what of ours it could import."""
    return {
        "process": os.getpid(),
        "devices": {parameter.device.type for parameter in model._module.parameters()},
        "package": [name for name in sys.modules if name.split(".")[0] in ("selfrepair_nn", "test_sandbox")],
    }


def read_a_weight(model, arrays, plan):
    """What no job may do."""
    return {"sum": model.lm_head._module.weight.sum().item()}


def test_the_runner_has_no_weights_and_none_of_our_code(setting):
    sandbox, model, arrays = setting
    nnsight.register(__name__)
    sandbox.run(ablation_job, arrays, planned(model))
    found = sandbox.run(look_around, arrays, {})
    assert found["process"] not in (os.getpid(), os.getppid())
    assert found["devices"] == {"meta"}
    assert found["package"] == []
    assert {p.device.type for p in sandbox.client._module.parameters()} == {"meta"}
    assert run_session(read_a_weight_here, model.nn, arrays, {})["sum"] != 0
    with pytest.raises(Exception, match="meta"):
        sandbox.run(read_a_weight, arrays, {})


def read_a_weight_here(model, arrays, plan, tick):
    return read_a_weight(model, arrays, plan)


# ---------------------------------------------------------------- what crosses into it


@pytest.fixture(scope="module", params=representative(["tiny-neox", "tiny-llama"], "tiny-llama"))
def embedded(request):
    """A sandbox of a model that is large enough for its activations to outweigh everything else, and the model."""
    from sandbox import Sandbox

    path = find(request.param).location
    model = load(path, check=False)
    sandbox = Sandbox(model.nn, path)
    yield sandbox, model, path
    sandbox.close()


def test_little_crosses_for_the_greeting(embedded):
    """A few vectors a layer, and two of the vocabulary's size."""
    sandbox, model, _ = embedded
    _, crossed = greeted_alike(sandbox, model)
    sizes = model.structure
    layer = GREETING_CROSSINGS * 4 * sizes.d_model * 4 + MESSAGES
    most = sizes.n_layers * layer + 2 * sizes.vocab_size * 4 + 3 * MESSAGES
    print(f"{crossed} bytes cross for the greeting of {model.name}; at most {most}")
    assert crossed <= most


@pytest.mark.parametrize(
    "choices",
    [
        {"layers": "3:5"},
        {"layers": "3:5", "components": "all"},
        {"layers": "0", "ablation": "zero"},
        {"heads": "5.1"},
        {"layers": "3:5", "split": "total"},
    ],
    ids=lambda choices: " ".join(map(" ".join, choices.items())),
)
def test_as_many_bytes_cross_as_a_plan_says(embedded, choices):
    sandbox, model, path = embedded
    options = Options(model=path, tokens=512, length=64, batch_size=8, host="http://127.0.0.1:1", **choices)
    experiment = prepare("heads", options)
    (unit,) = Sweep(experiment, plans(experiment, model.layout), {}, None).units(experiment.work.units)
    began = time.perf_counter()
    sandbox.run(unit.job, unit.arrays, unit.plan)
    seconds = time.perf_counter() - began
    expected = crossing_bytes(experiment.work, itemsize=4)
    tokens = len(unit.plan["cases"]) * experiment.prompts.n * (experiment.prompts.length - 1)
    print(
        f"{choices}: {sandbox.crossed} bytes crossed, {sandbox.crossed / tokens:.0f} a head and token; "
        f"{expected} planned; {1000 * seconds / tokens:.3f} ms a head and token"
    )
    assert abs(sandbox.crossed / expected - 1) < 0.05


@contextmanager
def computing_in(module, dtype):
    """Within, a model computes in this number format; its weights and buffers are what they were afterwards."""
    before = {name: x.clone() for name, x in [*module.named_parameters(), *module.named_buffers()]}
    module.to(dtype)
    try:
        yield
    finally:
        for name, x in [*module.named_parameters(), *module.named_buffers()]:
            x.data = before[name]


def test_of_a_server_in_bfloat16_two_bytes_of_a_number_cross(embedded):
    sandbox, model, path = embedded
    options = Options(model=path, tokens=512, length=64, batch_size=8, host="http://127.0.0.1:1", layers="3:5")
    experiment = prepare("heads", options)
    (unit,) = Sweep(experiment, plans(experiment, model.layout), {}, None).units(experiment.work.units)
    with computing_in(model.nn._module, torch.bfloat16):
        sandbox.run(unit.job, unit.arrays, unit.plan)
    assert abs(sandbox.crossed / crossing_bytes(experiment.work, Limits().itemsize) - 1) < 0.05
