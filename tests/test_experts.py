"""Mixtures of experts compute in a way that their dtype allows, whoever loaded them, and are left as they were."""

import families
import numpy as np
import oracle
import pytest
import torch
from test_engine import STOCK, agree
from transformers import AutoModelForCausalLM

import selfrepair_nn as sr
from selfrepair_nn.models.load import check, load, wrap

LIMIT = {"float64": STOCK, "float32": 1e-4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(name): the directory of a mixture, float64."""

    def folder(name):
        path = tmp_path_factory.getbasetemp() / f"experts-{name}"
        if not path.exists():
            families.build(name).save_pretrained(path)
        return path

    return folder


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_from_a_directory(saved, tmp_path, name, dtype):
    ids = np.random.default_rng(0).integers(0, 53, (3, 6))
    choices = {"partners": families.derangement(3), "components": "all"}
    found = sr.run(
        model=saved(name), prompts=ids, dtype=dtype, out=tmp_path / "s.zarr", progress=False, **choices
    )
    agree(
        found.load(), oracle.reference(families.build(name), ids, partners=choices["partners"]), LIMIT[dtype]
    )


def test_what_is_loaded_computes_wherever_it_is_used(saved):
    """A worker's process, too: it loads the model by itself."""
    module = load(str(saved("mixtral")), dtype="float64", check=False).module
    ids = torch.arange(6)[None]
    with torch.no_grad():
        np.testing.assert_allclose(module(ids).logits, families.build("mixtral")(ids).logits, atol=1e-9)


def test_a_module_is_left_as_it_was(saved, tmp_path):
    """Of transformers' own choice, under which a float64 model does not run at all."""
    module = AutoModelForCausalLM.from_pretrained(saved("mixtral"), dtype=torch.float64)
    chosen = module.config._experts_implementation
    if chosen == "eager":
        pytest.skip("this transformers chooses what works")
    ids = np.random.default_rng(0).integers(0, 53, (3, 6))
    partners = families.derangement(3)
    found = sr.run(
        model=module,
        prompts=ids,
        partners=partners,
        components="all",
        out=tmp_path / "s.zarr",
        progress=False,
    )
    agree(found.load(), oracle.reference(families.build("mixtral"), ids, partners=partners), STOCK)
    assert module.config._experts_implementation == chosen


def test_what_works_is_kept(saved):
    module = AutoModelForCausalLM.from_pretrained(saved("mixtral"), dtype=torch.float32)
    loaded = load(str(saved("mixtral")), dtype="float32").module
    assert loaded.config._experts_implementation == module.config._experts_implementation


@pytest.mark.parametrize("name", ["minimax-m2", "phi-moe"])
def test_in_16_bits_tokens_that_rounding_reroutes_do_not_condemn_a_mixture(name):
    """But what is wrong everywhere does."""
    module = families.build(name).to(torch.bfloat16)
    assert all(each.passed for each in check(wrap(module)))
    module.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
    assert not all(each.passed for each in check(wrap(module)))
