"""Whose weights answer, where they cannot be read: any change of a model is told in its place, and rounding is not."""

import json
from functools import cache
from types import SimpleNamespace

import families
import further
import numpy as np
import pytest
import torch
from terminal import selfrepair

import selfrepair_nn as sr
from selfrepair_nn.backends.local import backend, greeted_here
from selfrepair_nn.errors import Incomplete, StoreError, UsageError
from selfrepair_nn.layout.greeting import first_unit
from selfrepair_nn.models.alike import mixed
from selfrepair_nn.models.apart import compared
from selfrepair_nn.models.greeting import PARTS, described, greeting_of, is_greeting
from selfrepair_nn.models.load import load, wrap
from selfrepair_nn.running.opening import require_same_answers
from selfrepair_nn.store import Store
from selfrepair_nn.tracing.first_job import drawn

EVERY = [*families.FAMILIES, *further.MODELS, *further.HYBRIDS]
NO_MATTER = ("k_proj.bias", "e_score_correction_bias")
"""What changes nothing: the same for every key, or only which experts are chosen."""


def built(name="llama-gqa", dtype=torch.float32, **more):
    return families.build(name, **more).to(dtype)


@cache
def known(name="llama-gqa", dtype=torch.float32):
    return greeted_here(wrap(built(name, dtype)))


def changed(change, name="llama-gqa", dtype=torch.float32):
    """The greeting after `change` of a model that was as the known one."""
    module = built(name, dtype)
    with torch.no_grad():
        change(module)
    return greeted_here(wrap(module))


def told(change, **of):
    return compared(known(**of), changed(change, **of))


# ---------------------------------------------------------------- what is told


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_of_a_layer_is_told_in_its_place(name):
    """Each by itself a little larger; of all families, what norms, biases, routers, experts and mixers hold too."""
    model = wrap(families.build(name))
    before, count = greeted_here(model), model.structure.n_layers
    assert compared(before, greeted_here(model)).kind == "same"
    for layer in {count - 1, *model.structure.headless[:1]}:
        place = f"{model.structure.places['layers']}.{layer}."
        others = [f"of layer {n}" for n in range(count) if n != layer]
        held = [(n, p) for n, p in model.module.named_parameters() if n.startswith(place)]
        for parameter_name, parameter in held:
            if parameter_name.endswith(NO_MATTER):
                continue
            kept = parameter.data
            parameter.data = kept.flip(0) if "router" in parameter_name else kept * 1.05 + 1e-3
            found = compared(before, greeted_here(model))
            parameter.data = kept
            assert found.kind == "other", parameter_name
            assert f"of layer {layer}" in found.differences[0], parameter_name
            assert not any(each in found.differences[0] for each in others), parameter_name


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_one_weight_of_one_head(part):
    def change(module):
        getattr(module.model.layers[1].self_attn, part).weight[3, 5] *= 1.05

    found = told(change)
    assert found.kind == "other"
    assert "other weights: the attention of layer 1, by up to" in found.differences[0]


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_one_weight_of_an_mlp(part):
    def change(module):
        getattr(module.model.layers[2].mlp, part).weight[3, 5] *= 1.05

    found = told(change)
    assert found.kind == "other"
    assert "other weights: the MLP of layer 2, by up to" in found.differences[0]


def one_head(module):
    module.model.layers[0].self_attn.o_proj.weight[:, :8] = 0


def final_gain(module):
    module.model.norm.weight[3] *= 1.05


def unembedding_row(module):
    module.lm_head.weight[7] *= 1.05


def frequencies(module):
    module.model.rotary_emb.inv_freq *= 1.01


def adapter(module):
    """A low-rank change of some projections, as LoRA merged into the weights."""
    generator = torch.Generator().manual_seed(0)
    for layer in module.model.layers:
        for weight in (layer.self_attn.q_proj.weight, layer.self_attn.v_proj.weight):
            a, b = (torch.randn(size, 2, generator=generator) for size in weight.shape)
            weight += 0.002 * a @ b.T


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (one_head, "the attention of layer 0, by"),
        (final_gain, "the final norm, by"),
        (unembedding_row, "the unembedding, by"),
        (frequencies, "the attention of layer 2, the attention of layer 1, the attention of layer 0, by"),
        (adapter, "the attention of layer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_changes(change, said):
    found = told(change)
    assert found.kind == "other"
    assert said in found.differences[0]
    assert "MLP" not in found.differences[0]


def test_other_weights_and_another_model():
    found = compared(known(), greeted_here(wrap(built(seed=1))))
    assert found.kind == "other"
    assert "and 6 more parts" in found.differences[0]
    found = compared(known(), greeted_here(wrap(built("qwen3"))))
    assert found.differences == ["another model: 3 layers (4 vectors) there, 2 layers (4 vectors) here"]


def test_one_head_of_a_model_in_bfloat16():
    """Not as small a change as in float32, but a tenth of a percent of what a layer writes."""
    found = told(one_head, dtype=torch.bfloat16)
    assert (found.kind, found.notes) == ("other", [])
    assert "other weights: the attention of layer 0, by up to" in found.differences[0]


# ---------------------------------------------------------------- the same weights


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2", "mixtral", "neox-parallel"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_another_number_format(name, dtype):
    found = compared(known(name), known(name, getattr(torch, dtype)))
    assert found.kind == "rounded"
    said = [f"it computes in float32 there, {dtype} here", f"weights are in float32 there, {dtype} here"]
    assert found.differences == said
    assert "last digits" in found.notes[0]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_that_were_rounded_and_widened_again(name, dtype):
    """A conversion that nobody tells: all parts are off by what it rounds, the embedding and the norm too."""

    def rounded(module):
        module.to(getattr(torch, dtype)).float()

    found = told(rounded, name=name)
    assert found.kind == "rounded"
    assert found.differences[0].startswith(f"the same weights, rounded to {dtype} as it seems")


def quantise(module, bits):
    """Each row of each projection in steps of its largest weight, as int8 and int4 hold them."""
    for name, weight in module.named_parameters():
        if "proj" in name:
            step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            weight.copy_((weight / step).round() * step)


def test_quantised_weights():
    found = told(lambda module: quantise(module, 8))
    assert found.kind == "rounded"
    assert "the same weights, quantised as it seems" in found.differences[0]
    four = changed(lambda module: quantise(module, 4))
    assert compared(known(), four).kind == "other"
    found = compared(known(), four | {"weights_in": "nf4"})
    assert found.kind == "rounded"
    assert found.differences[0] == "weights are in float32 there, nf4 here"


def test_another_order_of_sums_is_told_and_is_no_difference():
    """Two implementations of attention round otherwise, and so do other machines."""
    for dtype in (torch.float32, torch.bfloat16):
        eager = greeted_here(wrap(built(attention="eager", dtype=dtype)))
        found = compared(known(dtype=dtype), eager)
        assert (found.kind, found.differences) == ("same", [])
        assert found.notes[0] == "attention is sdpa there, eager here"
        assert "last digits" in found.notes[1]


def elsewhere(greeting, step):
    """As on a machine of another kind: all sums move, by so large a share of their usual size."""
    rng, moved = np.random.default_rng(0), json.loads(json.dumps(greeting))
    for part, values in moved["sums"].items():
        values = np.array(values)
        values[..., :-1] += step * values[..., -1:] * rng.standard_normal(values[..., :-1].shape)
        moved["sums"][part] = values.tolist()
    return moved


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 3e-7), (torch.bfloat16, 0.005)])
def test_rounding_of_every_sum_at_once_is_no_difference(dtype, step):
    found = compared(known(dtype=dtype), elsewhere(known(dtype=dtype), step))
    assert (found.kind, found.differences) == ("same", [])
    found = compared(known(dtype=dtype), elsewhere(changed(one_head, dtype=dtype), step))
    assert found.kind == "other"
    assert "other weights: the attention of layer 0, by" in found.differences[0]
    found = compared(known(dtype=dtype), elsewhere(known(dtype=dtype), 8 * step))
    assert found.kind != "same"


def test_products_in_a_coarser_format():
    """TF32 rounds what is multiplied, and no embedding and no norm."""
    coarse = elsewhere(known(), 3e-4)
    coarse["sums"] |= {part: known()["sums"][part] for part in ("embedding", "final_norm")}
    found = compared(known(), coarse)
    assert found.kind == "rounded"
    assert "coarser products" in found.differences[0]


def test_what_overflows_is_no_failure():
    """A layer whose known vectors are too large for float16 is compared by what is left of it."""

    def huge(module):
        for layer in module.model.layers:
            layer.mlp.down_proj.weight.mul_(1e4)

    once, again = (changed(huge, dtype=torch.float16) for _ in range(2))
    assert np.isfinite(once["sums"]["mlp"]).all()
    assert compared(once, again).kind == "same"


def test_what_a_sandbox_hides():
    """Attention without a name there may be the one here, unless one of them gives its weights."""
    hidden = known() | {"attention": "fused", "tensor_parallel": None}
    assert compared(known(), hidden).notes == []
    assert compared(hidden | {"attention": "eager"}, hidden).notes == ["attention is eager there, fused here"]
    assert "fused (sdpa or flash" in described(hidden)
    assert "is not told" in described(hidden)
    split = known() | {"tensor_parallel": 2}
    assert compared(known(), split).notes == ["tensor parallelism is 1 there, 2 here"]
    assert "each layer is split among 2 processes (tensor parallel 2)" in described(split)


def test_greetings_of_other_vectors_are_not_compared():
    found = compared(known(), known() | {"vectors": 2})
    assert (found.kind, found.differences) == ("unknown", [])
    assert "cannot be compared" in found.notes[0]


# ---------------------------------------------------------------- how little it costs


def test_known_numbers_are_what_they_are_said_to_be():
    numbers, others = drawn(50_000, 1), drawn(50_000, 2)
    assert numbers.abs().max() < 2
    assert torch.equal(numbers, numbers.bfloat16().float())
    assert torch.equal(numbers, numbers.half().float())
    assert abs(numbers.mean()) < 0.02
    for x in (others, numbers.roll(1), numbers.roll(64)):
        assert abs(np.corrcoef(numbers, x)[0, 1]) < 0.02
    assert (64 * numbers[:4]).tolist() == [124, -10, 74, -85]


def test_a_few_kilobytes_come_back_whatever_the_size():
    """Llama-3.1-405B: 126 layers, however wide."""
    layout = wrap(built()).layout | {"n_layers": 126, "d_model": 16384, "vocab_size": 128256}
    shapes = first_unit(layout).shapes
    assert 8 * sum(int(np.prod(shape)) for shape in shapes.values()) < 12_000
    assert len(json.dumps(known())) < 1_000


def test_no_more_than_one_pass_is_made():
    model = wrap(built())
    calls = []
    model.module.register_forward_hook(lambda *_: calls.append(1))
    greeted_here(model)
    assert len(calls) == 1


# ---------------------------------------------------------------- stores


@pytest.fixture
def directory(tmp_path):
    built().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def far(monkeypatch):
    """far(model): from now on that model answers at every host, as a server does that hides its weights."""
    from selfrepair_nn.backends.ndif import served

    there = {}

    def connected(options, model, ledger, watch):
        jobs = Flight()
        jobs.run = backend("local", there["model"])
        return jobs, {"dtype": "float32", "server": {"host": "http://h"}, "greeting": greeted_here(there["model"])}

    class Flight:
        hosts = SimpleNamespace(left=[])

        def __call__(self, units):
            return self.run(units)

    monkeypatch.setattr(served, "connected", connected)
    monkeypatch.setattr(served, "require_answer", lambda options: None)
    return lambda module: there.update(model=wrap(module))


def run(directory, out, host="http://h", **more):
    ids = families.random_ids(built(), 6)
    given = {"prompts": ids, "layers": "2", "batch_size": 3, "progress": False, "host": host}
    return sr.run(model=directory, out=out, **given | more)


def interrupted(monkeypatch, *given):
    """A run, stopped after its first block."""
    from selfrepair_nn.running.filling import Filling

    write = Filling._write

    def stop(self, block, *rest):
        write(self, block, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Filling, "_write", stop)
        with pytest.raises(Incomplete):
            run(*given)


def edited():
    module = built()
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight[3, 4] *= 1.05
    return module


def test_an_unfinished_store_goes_on_with_the_same_weights_alone(directory, tmp_path, far, monkeypatch, capsys):
    far(built())
    interrupted(monkeypatch, directory, tmp_path / "s.zarr")
    begun = Store(tmp_path / "s.zarr").attributes["greeting"]
    far(edited())
    with pytest.raises(StoreError, match=r"another model than .* on the server \(other weights: the MLP of layer 1"):
        run(directory, tmp_path / "s.zarr")
    far(built(attention="eager"))  # deployed again, elsewhere
    assert run(directory, tmp_path / "s.zarr").done.all()
    assert "is not in all as it was: attention is sdpa there, eager here" in capsys.readouterr().err
    assert Store(tmp_path / "s.zarr").attributes["greeting"] == begun


def test_a_store_of_a_server_is_compared_with_one_made_here(directory, tmp_path, far):
    far(built())
    there = run(directory, tmp_path / "there.zarr")
    here = run(directory, tmp_path / "here.zarr", host=None)
    assert sr.model_differences(there, here) == sr.model_differences(here, there) == []
    assert sr.model_differences(here, here) == []
    far(edited())
    other = run(directory, tmp_path / "other.zarr")
    (said,) = sr.model_differences(str(tmp_path / "here.zarr"), other)
    assert said.startswith("other weights: the MLP of layer 1, by up to")
    stores = [tmp_path / f"{name}.zarr" for name in ("there", "other")]
    drawn = selfrepair("plot", *stores, "--out", tmp_path / "f", "--figure", "norm_share")
    assert "other.zarr are not of the same" in drawn.err
    assert "the MLP of layer 1" in drawn.err
    assert not [*mixed([there, here])]
    told = selfrepair("info", stores[0]).out
    assert "weights in float32, computes in float32, attention sdpa, layers are not split" in told


def test_stores_that_do_not_say(directory, tmp_path):
    here = run(directory, tmp_path / "here.zarr", host=None)
    silent = here.assign_attrs()
    del silent.attrs["identity"]
    with pytest.raises(UsageError, match="does not say whose numbers"):
        sr.model_differences(here, silent)


def test_attribution_of_a_store_of_a_server_takes_the_same_model_alone(directory, tmp_path, far):
    far(built())
    there = run(directory, tmp_path / "there.zarr")
    assert sr.attribution(there, load(str(directory), check=False)).sizes["head"] == 6
    with pytest.raises(StoreError, match=r"another model .*the MLP of layer 1"):
        sr.attribution(there, wrap(edited()))



@pytest.mark.parametrize("letters", [[1e30], [-5.0], [65.0], [*b"eager x float32"], [*b"\x1b[31m 1 float32"]], ids=str)
def test_what_no_model_says_of_itself_is_not_known(letters):
    """A server answers as it likes."""
    sums = {part: torch.ones(1, 3) for part in ("embedding", "mixing", "mlp", "final_norm", "unembedding")}
    said = torch.tensor(letters, dtype=torch.float64)
    greeting = greeting_of(sums | {"dtype": torch.zeros(1), "weights": torch.zeros(1), "told": said})
    assert [greeting[name] for name in ("weights_in", "attention", "tensor_parallel")] == [None, "fused", None]


def test_a_greeting_that_was_changed_by_hand_is_a_mistake_in_words():
    ds = sr.simulate_heads().assign_attrs(identity="{}", greeting="{not json")
    with pytest.raises(UsageError, match="is no JSON"):
        sr.model_differences(ds, ds)


def damaged(greeting, **changed):
    return json.loads(json.dumps(greeting)) | changed


def with_sums(greeting, **changed):
    return damaged(greeting, sums=greeting["sums"] | changed)


GREETING = greeting_of(
    {part: torch.ones(*([2] if part in ("mixing", "mlp") else []), 5) for part in PARTS}
    | {"dtype": torch.zeros(1), "weights": torch.zeros(1), "told": torch.zeros(0)}
)

MALFORMED = {
    "no mapping": [1, 2],
    "a number": 7,
    "nothing": None,
    "empty": {},
    "without vectors": {name: value for name, value in GREETING.items() if name != "vectors"},
    "without what it computes in": {name: value for name, value in GREETING.items() if name != "computes_in"},
    "without sums": damaged(GREETING, sums={}),
    "sums that are a list": damaged(GREETING, sums=[1]),
    "a part that is text": with_sums(GREETING, mlp="many"),
    "a part that is nothing": with_sums(GREETING, mlp=None),
    "a part that is a mapping": with_sums(GREETING, mixing={"0": 1}),
    "a part of one number": with_sums(GREETING, embedding=[1.0]),
    "a part that is ragged": with_sums(GREETING, mlp=[[1.0, 2.0], [1.0]]),
    "a part that is deeper": with_sums(GREETING, mlp=[[[1.0, 2.0]]]),
    "a part with text in it": with_sums(GREETING, final_norm=["x", "y"]),
    "a part that is not finite": with_sums(GREETING, final_norm=[float("nan"), 1.0]),
    "attention that is a list": damaged(GREETING, attention=["sdpa"]),
    "attention that is nothing": damaged(GREETING, attention=None),
    "a degree in words": damaged(GREETING, tensor_parallel="two"),
    "weights in a number": damaged(GREETING, weights_in=16),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_greeting_that_makes_no_sense_is_not_known(kind, tmp_path):
    """Wherever it is met: a line in words, never a traceback, and never the same."""
    said = json.dumps(MALFORMED[kind])
    for one, other in ((MALFORMED[kind], GREETING), (GREETING, MALFORMED[kind])):
        found = compared(one, other)
        assert (found.kind, found.differences) == ("unknown", [])
        assert "makes no sense" in found.notes[0]
    ds = sr.simulate_heads().assign_attrs(identity="{}", greeting=said)
    with pytest.raises(UsageError, match=r"\(greeting\) makes no sense: it was changed by other hands"):
        sr.model_differences(ds, ds)
    store = SimpleNamespace(path=tmp_path / "s.zarr", attributes={"greeting": said})
    with pytest.raises(UsageError, match=r"\(greeting\) makes no sense"):
        require_same_answers(store, SimpleNamespace(name="m"), GREETING)


def test_what_makes_sense_is_known():
    assert is_greeting(GREETING)
    assert is_greeting(damaged(GREETING, tensor_parallel=2, weights_in="int8"))
    assert compared(GREETING, GREETING).kind == "same"


def test_sums_of_other_numbers_are_of_another_model():
    """Some were taken away by other hands."""
    fewer = with_sums(GREETING, mixing=GREETING["sums"]["mixing"][:1])
    found = compared(fewer, GREETING)
    assert found.kind == "other"
    assert "other numbers of sums (mixing)" in found.differences[0]


@pytest.mark.parametrize("identity", ["[1]", "7", "null", '"x"'])
def test_an_identity_that_makes_no_sense_is_a_mistake_in_words(identity):
    ds = sr.simulate_heads().assign_attrs(identity=identity, greeting=json.dumps(GREETING))
    with pytest.raises(UsageError, match=r"\(identity\) makes no sense"):
        sr.model_differences(ds, ds)


def test_a_run_whose_greeting_makes_no_sense_says_so(directory, tmp_path, far, monkeypatch):
    """When it is looked at, when it goes on, and when the numbers are compared with a model here."""
    far(built())
    interrupted(monkeypatch, directory, tmp_path / "s.zarr")
    store = Store(tmp_path / "s.zarr")
    for said in (json.dumps(MALFORMED["a part that is text"]), "{not json", "[" * 10**5):
        store.annotate(greeting=said)
        ended = selfrepair("info", tmp_path / "s.zarr")
        assert ended.code == 0, ended.err
        assert "not known: what is said of it (greeting) was changed by other hands" in ended.out
        with pytest.raises(UsageError, match=r"\(greeting\) (makes no sense|is no JSON): it was changed by other"):
            run(directory, tmp_path / "s.zarr")
        with pytest.raises(UsageError, match=r"\(greeting\)"):
            sr.attribution(sr.open_store(tmp_path / "s.zarr"), directory)
