"""The whole way on a real pretrained model: SmolLM2-135M, a Llama of 30 layers x 9 heads."""

import numpy as np
import oracle
import pytest
import torch
from smollm2 import Unavailable, smollm2

import selfrepair_nn as sr
from selfrepair_nn.components import Head
from selfrepair_nn.prompts import load_prompts

HEADS = (Head(0, 5), Head(10, 2), Head(24, 4), Head(29, 6))

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def directory():
    try:
        return str(smollm2())
    except Unavailable as error:
        pytest.skip(f"SmolLM2 CANNOT BE HAD, nothing real is tested: {error}")


@pytest.fixture(scope="module")
def found(directory, tmp_path_factory):
    """A float32 run of four heads over real text, and the same in float64 by plain hooks."""
    from transformers import AutoModelForCausalLM

    model = sr.load(directory)
    tokens = load_prompts("sample", model.tokenizer, tokens=96, length=32).tokens
    out = tmp_path_factory.mktemp("real") / "heads.zarr"
    heads = ",".join(h.label for h in HEADS)
    ours = sr.run("heads", model=model, prompts=tokens, heads=heads, components="all", out=out).load()
    module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    places = [(h.layer, h.head) for h in HEADS]
    return ours, oracle.reference(module, tokens, partners=ours.partner.values, heads=places)


def test_every_stored_quantity_is_the_float64_reference(found):
    ours, reference = found
    compared = 0
    for name in set(ours.data_vars) & set(reference):
        for head in HEADS if ours[name].dims[0] == "layer" else (None,):
            mine = ours[name] if head is None else ours[name].sel(layer=head.layer, head=head.head)
            theirs = reference[name] if head is None else reference[name][head.layer, head.head]
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-3, err_msg=f"{name} {head}")
            compared += 1
    assert compared >= 11 * len(HEADS)


def test_closure_and_noise_floor(found):
    ours, _ = found
    assert np.nanmax(abs(ours.closure)) < 1e-3
    assert float(ours.noise_floor.max()) < 1e-3


def test_the_model_was_not_left_untouched(found):
    """Guards the two tests above against comparing nothing with nothing."""
    ours, _ = found
    assert (
        abs(ours.logit_change).max(["prompt", "position"]).stack(h=("layer", "head")).dropna("h") > 0.1
    ).all()
