"""Whose numbers a store holds: any difference of the model that decides numbers is found, whenever it was made."""

import json
import shutil

import families
import numpy as np
import pytest
import torch
from tiers import representative
from transformers import PreTrainedTokenizerFast

import selfrepair_nn as sr
from selfrepair_nn.errors import Incomplete, StoreError, UnsupportedModel, UsageError
from selfrepair_nn.models.identity import (
    WORDS,
    differences,
    fingerprint,
    identity,
    tensor_hash,
    tokenizer_hash,
)
from selfrepair_nn.models.load import find, load_tokenizer
from selfrepair_nn.store import Store


@pytest.fixture
def module():
    return families.build("llama-gqa")


@pytest.fixture
def run(tmp_path):
    """run(model, **choices): the same short run into the same store each time."""

    def again(model, **choices):
        ids = families.random_ids(families.build("llama-gqa"), 6)
        given = {"prompts": ids, "layers": "2", "batch_size": 3, "out": tmp_path / "s.zarr"}
        return sr.run(model=model, progress=False, **given | choices).load()

    return again


def interrupted(run, model, monkeypatch):
    """The run, stopped after its first block."""
    from selfrepair_nn.running.filling import Filling

    write = Filling._write

    def stop(self, block, *rest):
        write(self, block, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(Filling, "_write", stop)
    with pytest.raises(Incomplete):
        run(model)
    monkeypatch.undo()


# ---------------------------------------------------------------- every byte


def test_every_single_bit_counts():
    x = torch.randn(3, 7)
    known = {tensor_hash(x)}
    raw = x.view(torch.int32).flatten()
    for place in range(raw.numel()):
        for bit in range(32):
            changed = raw.clone()
            changed[place] ^= -(2**31) if bit == 31 else 1 << bit
            known.add(tensor_hash(changed.view(torch.float32).view(3, 7)))
    assert len(known) == 1 + 21 * 32


def test_order_counts_within_blocks_and_between_them():
    x = torch.randn(4 * WORDS)
    swapped = x.view(4, -1)[[1, 0, 2, 3]].flatten()
    rolled = x.roll(1)
    mirrored = x.clone()
    mirrored[::2], mirrored[1::2] = x[1::2], x[::2]
    signs = x.clone()
    signs[:WORDS] *= -1  # an even number of top bits, which a sum with even keys would not see
    assert len({tensor_hash(v) for v in (x, swapped, rolled, mirrored, signs, x.view(2, -1))}) == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_every_dtype_and_size(dtype):
    x = torch.arange(2 * WORDS + 5).remainder(7).sub(3).to(dtype)
    last = x.clone()
    last[-1] = 1 if dtype == torch.bool and not last[-1] else 0
    assert tensor_hash(x) == tensor_hash(x.clone()) != tensor_hash(last)
    assert tensor_hash(x[1:]) == tensor_hash(x[1:].clone())
    square = x[: 4 * (len(x) // 4)].view(4, -1)
    assert tensor_hash(square.T) == tensor_hash(square.T.contiguous())


def test_a_step_of_another_size_gives_the_same_hash(monkeypatch):
    """As on a GPU, where more is summed at a time."""
    x = torch.randn(5 * WORDS + 3)
    known = tensor_hash(x)
    monkeypatch.setattr("selfrepair_nn.models.identity.AT_ONCE", {"cpu": 2 * WORDS})
    assert tensor_hash(x) == known


# ---------------------------------------------------------------- finished and unfinished stores


@pytest.mark.parametrize("part", representative(["q_proj", "k_proj", "v_proj", "o_proj"], "q_proj", "o_proj"))
def test_one_head_silenced_in_place(run, module, part):
    """Of a finished store and of a run that goes on; every head of every projection."""
    run(module)
    weight = getattr(module.model.layers[1].self_attn, part).weight
    width = module.config.head_dim
    for start in range(0, weight.shape[part == "o_proj"], width):
        kept = weight.detach().clone()
        weight.data[(slice(None), slice(start, start + width))[:: 1 if part == "o_proj" else -1]] = 0
        with pytest.raises(StoreError, match=r"another model.*weights: model\.layers\.1 \(1 of"):
            run(module)
        weight.data = kept
    assert run(module).done.all()


def test_an_unfinished_run_does_not_go_on_with_another_model(run, module, monkeypatch):
    interrupted(run, module, monkeypatch)
    module.model.layers[2].mlp.down_proj.weight.data[3, 4] *= 1.0001
    with pytest.raises(StoreError, match=r"model\.layers\.2"):
        run(module)
    module.model.layers[2].mlp.down_proj.weight.data = (
        families.build("llama-gqa").model.layers[2].mlp.down_proj.weight.data
    )
    assert run(module).done.all()


def test_it_is_looked_at_when_the_run_begins_and_not_when_it_was_wrapped(run, module):
    model = sr.wrap(module)
    run(model)
    module.lm_head.weight.data[0, 0] += 1
    with pytest.raises(StoreError, match="lm_head"):
        run(model)


def other_activation(module):
    module.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def other_epsilon(module):
    module.model.norm.variance_epsilon = 0.5


def other_frequencies(module):
    module.model.rotary_emb.inv_freq *= 1.0001


def other_base(module):
    module.config.rope_parameters["rope_theta"] = 20000.0


def a_hook(module):
    module.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def less_scaling(module):
    for layer in module.model.layers:
        layer.self_attn.scaling *= 0.9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_activation, "logits on a fixed input"),
        (other_epsilon, "logits on a fixed input"),
        (less_scaling, "logits on a fixed input"),
        (other_frequencies, r"buffers: model\.rotary_emb"),
        (other_base, "rope_theta.*10000.* there, .*20000"),
        (a_hook, r"hook .* on model\.layers\.0\.mlp"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_weights_do_not_tell(run, module, change, said):
    run(module)
    change(module)
    with pytest.raises(StoreError, match=said):
        run(module)


@pytest.fixture
def directory(tmp_path, module):
    module.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_a_directory_with_other_weights_in_it(run, directory):
    run(directory)
    module = families.build("llama-gqa", seed=1)
    module.save_pretrained(directory)
    with pytest.raises(StoreError, match="weights: "):
        run(directory)


def test_a_configuration_edited_between_two_shards(run, directory):
    run(directory, shard="1/2")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 500000.0
    path.write_text(json.dumps(config))
    with pytest.raises(StoreError, match="rope_theta"):
        run(directory, shard="2/2")


def test_what_does_not_compute_may_change(run, directory, tmp_path):
    """Paths, dates, what is said of outputs and of tokens; and the same model moved elsewhere by hand."""
    run(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "use_cache": False,
        "transformers_version": "5.0.0",
        "pad_token_id": 3,
        "_name_or_path": "elsewhere",
    }
    path.write_text(json.dumps(config))
    assert run(directory).done.all()


def test_another_tokenizer(run, directory):
    def give(vocabulary):
        from tokenizers import Tokenizer, models

        words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(directory)

    give({"a": 0, "b": 1})
    run(directory)
    give({"a": 0, "c": 1})
    with pytest.raises(StoreError, match="tokenizer"):
        run(directory)


def test_a_tokenizer_that_was_used_is_the_same():
    tokenizer = load_tokenizer(find("tiny-llama"))
    before = tokenizer_hash(tokenizer)
    tokenizer(["a text", "another, longer"], padding=bool(tokenizer.pad_token), truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before != tokenizer_hash(None)


def test_packages_that_changed_are_told_and_not_refused(run, module, monkeypatch, capsys):
    interrupted(run, module, monkeypatch)
    monkeypatch.setattr("selfrepair_nn.provenance.version", lambda package: "0.0.1")
    assert run(module).done.all()
    assert "other versions (" in capsys.readouterr().err


def test_a_store_that_does_not_say_whose_it_is_is_opened_but_not_gone_on_with(run, module, tmp_path):
    run(module)
    Store(tmp_path / "s.zarr")._describe(lambda now: {k: v for k, v in now.items() if k != "identity"})
    assert "layer" in str(sr.summary(sr.open_store(tmp_path / "s.zarr")))
    with pytest.raises(StoreError, match="earlier version"):
        run(module)


# ---------------------------------------------------------------- adapters

peft_asks_what_is_deprecated = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def adapted(module, scale=2):
    import peft

    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=2, lora_alpha=scale, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(module, settings).double()


@peft_asks_what_is_deprecated
def test_a_model_with_adapters_is_decomposed_with_them(run, module, tmp_path):
    """Against the same model with the adapters merged into its weights."""
    import peft

    model = adapted(module)
    found = run(model)
    merged = adapted(families.build("llama-gqa")).merge_and_unload()
    assert isinstance(model, peft.PeftModel)
    other = run(merged, out=tmp_path / "merged.zarr")
    assert float(abs(found.self_repair).mean()) > 1e-3
    for name in ("logit", "direct_effect", "self_repair", "from_norm"):
        np.testing.assert_allclose(found[name], other[name], atol=1e-5)
    plain = run(families.build("llama-gqa"), out=tmp_path / "plain.zarr")
    assert not np.allclose(found.logit, plain.logit, atol=1e-2)


@peft_asks_what_is_deprecated
@pytest.mark.parametrize("change", ["other weights", "switched off", "other scale", "taken away"])
def test_adapters_belong_to_the_model(run, module, change):
    model = adapted(module)
    run(model)
    if change == "other weights":
        next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] += 0.01
    elif change == "switched off":
        model.disable_adapter_layers()
    elif change == "other scale":
        model = adapted(families.build("llama-gqa"), scale=4)
    else:
        model = families.build("llama-gqa")
    with pytest.raises(StoreError, match="another model"):
        run(model)


@peft_asks_what_is_deprecated
def test_adapters_that_add_tokens_are_refused(module):
    import peft

    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedModel, match="virtual tokens"):
        sr.wrap(peft.get_peft_model(module.float(), settings))


# ---------------------------------------------------------------- the record


def test_differences_are_told_in_words(module):
    record = identity(sr.wrap(module))
    assert differences(record, record, 0) == []
    assert json.loads(json.dumps(record)) == record
    other = record | {"dtype": "bfloat16", "answers": (np.array(record["answers"]) + 1e-9).tolist()}
    assert differences(record, other, 1e-5) == ['dtype: "float64" there, "bfloat16" here']
    assert fingerprint(record) != fingerprint(other)
    other = record | {"answers": (np.array(record["answers"]) + 1).tolist()}
    assert "fixed input" in differences(record, other, 1e-5)[0]


def test_a_model_without_its_weights_is_refused():
    with torch.device("meta"):
        module = type(families.build("llama-gqa"))(families.build("llama-gqa").config)
    with pytest.raises(UsageError, match="without"):
        sr.wrap(module)


def test_a_model_that_accelerate_spread_out(run, module, tmp_path):
    """Parts of it are on disk until they are used; its weights are looked at all the same."""
    import accelerate

    places = dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "lm_head", "model.rotary_emb"], "cpu"
    )
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    spread = accelerate.dispatch_model(module, places, main_device="cpu", offload_dir=str(tmp_path / "off"))
    assert any(p.is_meta for p in spread.parameters())
    found = run(spread)
    shutil.rmtree(tmp_path / "s.zarr")
    np.testing.assert_allclose(found.self_repair, run(families.build("llama-gqa")).self_repair, atol=1e-9)
