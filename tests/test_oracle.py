"""The oracle itself: one case worked by hand, identities, and the same numbers by other routes."""

import copy
import re
from functools import cache
from math import sqrt

import families
import numpy as np
import oracle
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from tiers import representative
from transformers import GPT2Config, GPT2LMHeadModel

TIGHT = 1e-11
STOCK = 1e-5  # Hugging Face's RMSNorm in float32
PARTNERS = families.derangement(4)
KINDS = ("gpt2", "gptj", "neox-parallel", "llama-biases", "opt-biasless")
EVERY = representative(families.FAMILIES, *KINDS)
ABLATIONS = ["resample", "zero", "mean", "identity"]
CHANGES = [
    "logit_change",
    "self_repair",
    "from_heads",
    "from_mlps",
    "from_norm",
    "norm_on_existing",
    "norm_on_change",
]
PARALLEL = "neox-parallel"
SIDE_BY_SIDE = (PARALLEL, "gptj")
LAYER_NORM = ["gpt2", "gptj", "neox-parallel", "neox-sequential", "opt", "opt-biasless"]
WITH_CONSTANT = [*LAYER_NORM, "llama-biases", "qwen2"]


@cache
def built(name: str, exact: bool = True):
    """The family's model and its prompts, made once."""
    model = families.build(name, exact=exact)
    return model, families.random_ids(model)


@cache
def measured(name: str, exact: bool = True, **options):
    """`reference` on the family's prompts, computed once for each set of options."""
    model, ids = built(name, exact)
    return oracle.reference(model, ids, partners=PARTNERS, **options)


def close(actual, desired, atol: float = TIGHT) -> None:
    """Equal to an absolute tolerance in logits; NaN nowhere."""
    assert np.isfinite(actual).all()
    assert_allclose(actual, desired, rtol=0, atol=atol)


def real_logits(model, ids) -> torch.Tensor:
    """The model's own logits, no hook in sight."""
    with torch.no_grad():
        return model(torch.as_tensor(ids), use_cache=False).logits


def centred_logit(logits: torch.Tensor, ids) -> np.ndarray:
    """The next token's logit less the vocabulary's mean, [prompt, position]."""
    following = torch.as_tensor(ids)[:, 1:, None]
    return (logits[:, :-1].gather(-1, following)[..., 0] - logits[:, :-1].mean(-1)).numpy()


# ---------------------------------------------------------------- worked by hand


def write(parameter: torch.nn.Parameter, rows) -> None:
    """Set a parameter to explicit numbers."""
    with torch.no_grad():
        parameter.copy_(torch.tensor(rows, dtype=torch.float64))


def e(a: float, b: float) -> list[float]:
    """The plane of the case below: mean zero, scale sqrt((a^2 + b^2) / 2), which is 5 for e(7, 1)."""
    return [a, b, -b, -a]


@pytest.fixture(scope="module")
def hand_made():
    """A GPT-2 with one layer, two heads and one neuron, eps 0, on two prompts of token 0 and of token 1.

    Queries and keys are zero, so attention is uniform; a prompt repeats its token, so z is that token's
    value. Token 0 is e(2, 2), normed e(1, 1); token 1 is e(2, -2), normed e(1, -1).
    Head 0 reads z = (x0, x1) + c with c = (0, 1), from the norm's beta (0, 3, 0, 0) and its value bias
    (0, -2); it writes e(0, 6) and e(3, -3) per unit: less c's, e(3, 3) on token 0 and e(-3, 9) on token 1.
    Head 1 reads z = (x1, x0), its value bias (-3, 0) taking the beta's 3 off again, and writes e(2, 0) and
    e(0, -4) per unit. The output bias is (2, 2, 2, 2) - e(3, -3), which undoes c's write but for a constant
    that no norm sees.
    The neuron is relu(x1 - 2/5) of the normed stream and writes e(16, 0).
    """
    sizes = {"vocab_size": 3, "n_positions": 4, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_inner": 1}
    plain = {"activation_function": "relu", "layer_norm_epsilon": 0.0, "tie_word_embeddings": False}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **plain, bos_token_id=0, eos_token_id=0)).double().eval()
    block = model.transformer.h[0]
    write(model.transformer.wte.weight, [e(2, 2), e(2, -2), [9, 9, 9, 0]])
    write(model.transformer.wpe.weight, [[1, 1, 1, 1]] * 4)
    write(block.ln_1.bias, [0, 3, 0, 0])
    values = [[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    write(block.attn.c_attn.weight, [[0] * 8 + row for row in values])
    write(block.attn.c_attn.bias, [0] * 8 + [0, -2, -3, 0])
    write(block.attn.c_proj.weight, [e(0, 6), e(3, -3), e(2, 0), e(0, -4)])
    write(block.attn.c_proj.bias, [2 - 3, 2 + 3, 2 - 3, 2 + 3])
    write(block.mlp.c_fc.weight, [[0], [1], [0], [0]])
    write(block.mlp.c_fc.bias, [-2 / 5])
    write(block.mlp.c_proj.weight, [e(16, 0)])
    write(block.mlp.c_proj.bias, [0, 0, 0, 0])
    write(model.transformer.ln_f.weight, [2, 1, 1, 1])
    write(model.transformer.ln_f.bias, [0.5, 0, 0, 0])
    write(model.lm_head.weight, [[2, 0, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0]])
    return model


# Prompt 0 repeats token 0 and its last target is token 2: position 1. All by hand, target "raw":
# u = (4, 0, 0, 0), gamma u = (8, 0, 0, 0), d = C(gamma u) = (6, -2, -2, -2), so <e(a, b), d> = 8 a and
# <(1, 1, 1, 1), d> = 0; k = <beta, u> = 2.
# Clean stream: e(2, 2) + e(3, 3) + e(2, -4) = e(7, 1), S = 5, the neuron reads 1/5 and is off.
# Direct effects: embedding 16/5, head 0 24/5, head 1 16/5; logit 56/5 + 2.
IDS = np.array([[0, 0, 2], [1, 1, 2]])


def at(result: dict, name: str) -> float:
    """The number of head 0 (where there is a head) at prompt 0, position 1."""
    values = result[name]
    return values[0, 0, 0, 1] if values.ndim == 4 else values[0, 1]


def expect(result: dict, **numbers: float) -> None:
    """The named numbers, and Equation 1 and 2 over them."""
    for name, number in numbers.items():
        assert at(result, name) == pytest.approx(number, abs=1e-12), name
    assert at(result, "closure") == pytest.approx(0, abs=1e-12)


def by_hand(model, **options) -> dict:
    """`reference` on the case worked by hand."""
    return oracle.reference(model, IDS, partners=[1, 0], **({"target": "raw"} | options))


def test_hand_made_components(hand_made):
    """Labels and direct effects, and where the values' constant goes."""
    result = by_hand(hand_made)
    assert result["components"] == ["embed", "pos_embed", "L0H0", "L0H1", "L0.attention_bias", "L0.mlp"]
    assert_allclose(result["component_direct_effect"][0, 1], [16 / 5, 0, 24 / 5, 16 / 5, 0, 0], atol=1e-12)
    as_hooks_see = by_hand(hand_made, value_bias="head")
    expected = [16 / 5, 0, 24 / 5 + 24 / 5, 16 / 5, -24 / 5, 0]  # c's write is e(3, -3)
    assert_allclose(as_hooks_see["component_direct_effect"][0, 1], expected, atol=1e-12)


@pytest.mark.parametrize("value_bias", ["output", "head"])
def test_hand_made_resample(hand_made, value_bias):
    """Head 0 writes e(-3, 9): the neuron reads 7/5 and writes e(16, 0): stream e(17, 7), S' = 13."""
    result = by_hand(hand_made, value_bias=value_bias)
    own = 0 if value_bias == "output" else 24 / 5
    expect(
        result,
        logit=56 / 5 + 2,
        norm_scale=5,
        direct_effect=24 / 5 + own,
        ablated_direct_effect=-24 / 5 + own,
        logit_change=8 * 17 / 13 - 56 / 5,
        self_repair=8 * 17 / 13 - 56 / 5 + 48 / 5,
        from_heads=0,
        from_mlps=8 * 16 / 5,
        from_norm=(5 / 13 - 1) * 8 * 17 / 5,
        norm_on_existing=(5 / 13 - 1) * 56 / 5,
        norm_on_change=(5 / 13 - 1) * 8 * 10 / 5,
        ablated_norm_scale=13,
    )
    assert_allclose(result["component_change"][0, 0, 0, 1], [0, 0, -48 / 5, 0, 0, 128 / 5], atol=1e-12)


def test_hand_made_zero(hand_made):
    """Zero leaves c: stream e(4, -2), the neuron is off. Or it takes c too: e(1, 1), the neuron is 3/5."""
    constant_stays = by_hand(hand_made, ablation="zero")
    S = sqrt((4**2 + 2**2) / 2)
    numbers = {"direct_effect": 24 / 5, "ablated_direct_effect": 0, "from_mlps": 0, "ablated_norm_scale": S}
    expect(constant_stays, **numbers, logit_change=8 * 4 / S - 56 / 5, from_norm=(5 / S - 1) * 8 * 4 / 5)
    all_gone = by_hand(hand_made, ablation="zero", value_bias="head")
    a = 1 + 16 * 3 / 5
    S = sqrt((a**2 + 1) / 2)
    numbers = {
        "direct_effect": 48 / 5,
        "ablated_direct_effect": 0,
        "from_mlps": 8 * (a - 1) / 5,
        "ablated_norm_scale": S,
    }
    expect(all_gone, **numbers, logit_change=8 * a / S - 56 / 5, from_norm=(5 / S - 1) * 8 * a / 5)


def test_hand_made_mean(hand_made):
    """Over two rows of token 0 and one of token 1, z less c is (1, 1/3): e(1, 5), stream e(5, 3)."""
    mean_ids = np.array([[0, 0, 0], [0, 0, 0], [1, 1, 1]])
    result = by_hand(hand_made, ablation="mean", mean_ids=mean_ids)
    S_mid = sqrt((5**2 + 3**2) / 2)
    a = 5 + 16 * (3 / S_mid - 2 / 5)
    S = sqrt((a**2 + 3**2) / 2)
    expect(result, ablated_direct_effect=8 / 5, ablated_norm_scale=S, logit_change=8 * a / S - 56 / 5)


def test_hand_made_freezing(hand_made):
    """With the neuron held off the stream is e(1, 7), S' = 5 or e(4, -2); with S held, only head 0 counts."""
    live = by_hand(hand_made, freeze="downstream")
    expect(live, logit_change=8 / 5 - 56 / 5, from_mlps=0, from_norm=0, ablated_norm_scale=5, self_repair=0)
    zero = by_hand(hand_made, freeze="downstream", ablation="zero")
    expect(zero, logit_change=8 * 4 / sqrt(10) - 56 / 5, from_mlps=0)
    held = by_hand(hand_made, freeze="all", ablation="zero")
    expect(held, logit_change=-24 / 5, self_repair=0, from_norm=0, ablated_norm_scale=5)


def test_hand_made_targets(hand_made):
    """The mean row is (2, 0, 0, 0): centred u is half of raw u. Token 2 less token 0 is the same row."""
    for target in ["centred", (2, 0)]:
        half = by_hand(hand_made, target=target)
        expect(half, logit=28 / 5 + 1, constant=1, direct_effect=12 / 5, logit_change=4 * 17 / 13 - 28 / 5)


# ---------------------------------------------------------------- identities, for every family


@pytest.mark.parametrize("target", ["centred", "raw"])
@pytest.mark.parametrize("value_bias", ["output", "head"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_components_sum_to_the_real_logit(name, value_bias, target):
    """logit = sum of the direct effects + k, against logits computed without any hook."""
    model, ids = built(name)
    result = measured(name, ablation="identity", value_bias=value_bias, target=target, heads=())
    logits = real_logits(model, ids)
    raw = logits[:, :-1].gather(-1, torch.as_tensor(ids)[:, 1:, None])[..., 0].numpy()
    close(result["logit"], centred_logit(logits, ids) if target == "centred" else raw)
    close(result["component_direct_effect"].sum(-1) + result["constant"], result["logit"])


@pytest.mark.parametrize("name", EVERY)
def test_stock_models_obey_to_single_precision(name):
    """Without exact norms the same holds to 1e-5; in LayerNorm families to 1e-11 all the same."""
    result, exact = measured(name, exact=False), measured(name)
    atol = TIGHT if name in LAYER_NORM else STOCK
    close(result["component_direct_effect"].sum(-1) + result["constant"], result["logit"], atol)
    close(result["closure"], 0, atol)
    for variable in oracle.PER_HEAD:
        close(result[variable], exact[variable], atol)


@pytest.mark.parametrize("freeze", [None, "downstream", "all"])
@pytest.mark.parametrize("name", EVERY)
def test_identity_changes_nothing(name, freeze):
    """Writing back what was there gives zeros, exactly where no scale is written back."""
    result = measured(name, ablation="identity", freeze=freeze)
    for variable in [*CHANGES, "component_change"]:
        close(result[variable], 0, TIGHT if freeze == "all" else 0)
    assert_array_equal(result["direct_effect"], result["ablated_direct_effect"])


@pytest.mark.parametrize("value_bias", ["output", "head"])
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", EVERY)
def test_closure(name, ablation, value_bias):
    """Equation 2 closes, and the norm's part is the sum of its own two."""
    result = measured(name, ablation=ablation, value_bias=value_bias)
    close(result["closure"], 0)
    close(result["from_norm"], result["norm_on_existing"] + result["norm_on_change"])
    close(
        result["self_repair"] + result["ablated_direct_effect"] - result["direct_effect"],
        result["logit_change"],
    )


@pytest.mark.parametrize("name", EVERY)
def test_all_frozen_leaves_the_heads_own_change(name):
    """Everything held, the norm's scale too: the logit changes by the head's own direct effect."""
    result = measured(name, freeze="all")
    close(result["logit_change"], result["ablated_direct_effect"] - result["direct_effect"])
    assert_array_equal(
        result["ablated_norm_scale"], np.broadcast_to(result["norm_scale"], result["closure"].shape)
    )
    for variable in ["self_repair", "from_heads", "from_mlps", "from_norm"]:
        close(result[variable], 0)


def obeys_appendix_b(result: dict, layer: int) -> None:
    """logit_change = (S/S' - 1)(logit - k) + (S/S')(DE' - DE), for all heads of a layer."""
    ratio = result["norm_scale"] / result["ablated_norm_scale"][layer]
    own = (result["ablated_direct_effect"] - result["direct_effect"])[layer]
    close(result["logit_change"][layer], (ratio - 1) * (result["logit"] - result["constant"]) + ratio * own)


@pytest.mark.parametrize("name", EVERY)
def test_frozen_downstream_is_appendix_b(name):
    """With the final norm alone live, Appendix B holds in every layer and all repair is the norm's."""
    result = measured(name, freeze="downstream")
    close(result["from_heads"], 0)
    close(result["from_mlps"], 0)
    close(result["self_repair"], result["from_norm"])
    assert np.abs(result["from_norm"]).max() > 0.05
    for layer in range(result["closure"].shape[0]):
        obeys_appendix_b(result, layer)


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
def test_last_layer_of_a_parallel_model_is_appendix_b(ablation):
    """There nothing runs after the head but the norm, frozen or not."""
    result = measured(PARALLEL, ablation=ablation)
    obeys_appendix_b(result, -1)
    close(result["from_mlps"][-1], 0, 0)
    close(result["from_heads"][-1], 0, 0)
    assert np.abs(measured("neox-sequential", ablation=ablation)["from_mlps"][-1]).max() > 0.05


@pytest.mark.parametrize("name", EVERY)
def test_only_what_runs_later_changes(name):
    """No change in earlier layers, in the other heads of the same layer, in embeddings or biases."""
    result = measured(name)
    for layer, head in np.ndindex(result["closure"].shape[:2]):
        for index, label in enumerate(result["components"]):
            change = result["component_change"][layer, head, ..., index]
            later = label.startswith("L") and int(re.findall(r"\d+", label)[0]) > layer
            same_mlp = label == f"L{layer}.mlp" and name not in SIDE_BY_SIDE
            moves = not label.endswith("bias") and (later or same_mlp or label == f"L{layer}H{head}")
            assert (np.abs(change).max() > 1e-3) == moves, (layer, head, label)


@pytest.mark.parametrize("ablation", ["resample", "mean"])
@pytest.mark.parametrize("name", WITH_CONSTANT)
def test_value_bias_does_not_matter_to_changes(name, ablation):
    """For resample and mean the constant is in z before and after."""
    output, head = measured(name, ablation=ablation), measured(name, ablation=ablation, value_bias="head")
    for variable in CHANGES:
        close(output[variable], head[variable])
    assert np.abs(output["direct_effect"] - head["direct_effect"]).max() > 0.05


@pytest.mark.parametrize("name", EVERY)
def test_which_families_have_an_attention_bias(name):
    """Under "output" where there is a constant or an output bias; under "head" only with an output bias."""
    kinds = {
        value_bias: {label.split(".")[-1] for label in measured(name, value_bias=value_bias)["components"]}
        for value_bias in ("output", "head")
    }
    assert ("attention_bias" in kinds["output"]) == (name in WITH_CONSTANT)
    assert ("attention_bias" in kinds["head"]) == (name in set(WITH_CONSTANT) - {"qwen2", "opt-biasless", "gptj"})
    assert ("pos_embed" in kinds["head"]) == (name in ("gpt2", "opt", "opt-biasless"))


# ---------------------------------------------------------------- the same numbers by other routes


def edited(model, layer: int, head: int):
    """A copy whose head writes nothing, and that layer's output projection in the copy and in the model."""
    head_dim = oracle.find_parts(model).layers[layer].W_O.shape[0] // model.config.num_attention_heads
    gone = copy.deepcopy(model)
    projections = [oracle.find_parts(m).layers[layer].projection for m in (gone, model)]
    weight = projections[0].weight.detach()
    by_input = weight.T if isinstance(projections[0], torch.nn.Linear) else weight
    by_input[head * head_dim : (head + 1) * head_dim] = 0
    return gone, *projections


def output_of(model, module, ids) -> torch.Tensor:
    """A module's output in a run of the model."""
    seen = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    real_logits(model, ids)
    handle.remove()
    return seen[0]


def logits_with(model, module, added: torch.Tensor, ids) -> torch.Tensor:
    """The model's logits with something added to one module's output."""
    handle = module.register_forward_hook(lambda module, args, output: output + added)
    logits = real_logits(model, ids)
    handle.remove()
    return logits


def write_of(model, layer: int, head: int, ids) -> torch.Tensor:
    """A head's write: the layer's attention output with the head less that without it."""
    gone, projection, full = edited(model, layer, head)
    return output_of(model, full, ids) - output_of(gone, projection, ids)


LAST_HEADS = [(0, 0), (1, -1)]  # one in each of two layers, the last one not on the first slice


def other_route(model, ids, layer: int, head: int, added: torch.Tensor) -> np.ndarray:
    """The centred logit's change when a head is struck out of the weights and writes `added` instead."""
    gone, projection, _ = edited(model, layer, head)
    after = logits_with(gone, projection, added, ids)
    return centred_logit(after, ids) - centred_logit(real_logits(model, ids), ids)


@pytest.mark.parametrize(("layer", "head"), LAST_HEADS)
@pytest.mark.parametrize("name", EVERY)
def test_ablations_by_editing_the_output_projection(name, layer, head):
    """Resample, mean and zero by weights and attention outputs only: no z, no slicing of its axis."""
    model, ids = built(name)
    head %= model.config.num_attention_heads
    own = write_of(model, layer, head, ids)
    routes = {
        "resample": own[PARTNERS],
        "mean": own.mean((0, 1)).expand_as(own),
        "zero": torch.zeros_like(own),
    }
    for ablation, added in routes.items():
        result = measured(name, ablation=ablation, value_bias="head")
        close(result["logit_change"][layer, head], other_route(model, ids, layer, head, added), 1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_value_constant_is_z_of_a_norm_without_gain(name):
    """With gamma zero the attention reads beta everywhere, and z is the constant whatever it attends to."""
    model, ids = built(name)
    flat = copy.deepcopy(model)
    parts = oracle.find_parts(flat)
    norm, constant = parts.layers[1].norm, oracle.value_constant(oracle.find_parts(model).layers[1])
    with torch.no_grad():
        norm.weight.zero_()
    z = oracle.run(parts, torch.as_tensor(ids)).z[1]
    close(z.numpy(), np.broadcast_to(0 if constant is None else constant, z.shape))
    assert (constant is not None) == (name in WITH_CONSTANT)


@pytest.mark.parametrize("name", WITH_CONSTANT)
def test_zero_leaves_the_constant_by_default(name):
    """value_bias "output": strike the head out of the weights, but add its constant's write."""
    model, ids = built(name)
    layer = oracle.find_parts(model).layers[1]
    constant = oracle.value_constant(layer)[0]
    added = constant @ layer.W_O[: len(constant)]
    change = measured(name, ablation="zero")["logit_change"]
    close(change[1, 0], other_route(model, ids, 1, 0, added), 1e-10)
    assert np.abs(change - measured(name, ablation="zero", value_bias="head")["logit_change"]).max() > 0.01


@pytest.mark.parametrize("name", ["neox-parallel", "llama-gqa"])
def test_common_direction_of_the_unembedding(name):
    """A vector added to every row of the unembedding moves raw numbers and leaves centred ones alone."""
    model, ids = built(name)
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted.lm_head.weight += torch.linspace(-1, 1, model.config.hidden_size)
    for target, same in [("centred", True), ("raw", False)]:
        before = measured(name, target=target)
        after = oracle.reference(shifted, ids, partners=PARTNERS, target=target)
        for variable in ["logit", "direct_effect", "logit_change", "self_repair", "from_norm"]:
            assert np.allclose(before[variable], after[variable], rtol=0, atol=1e-10) == same


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "opt"])
def test_centred_is_raw_less_the_mean_over_targets(name):
    """Centred numbers are raw ones less their mean over all tokens as targets."""
    model, ids = built(name)
    zero = np.zeros_like(ids[:, 1:])

    def against_zero(tokens):
        options = {"ablation": "zero", "heads": [(0, 0)]}
        return oracle.reference(model, ids, target=(tokens, zero), **options)

    every, own = (
        [against_zero(zero + token) for token in range(model.config.vocab_size)],
        against_zero(ids[:, 1:]),
    )
    centred = measured(name, ablation="zero")
    for variable in ["logit", "component_direct_effect", "constant"]:
        close(own[variable] - np.mean([r[variable] for r in every], axis=0), centred[variable])
    change = own["logit_change"] - np.mean([r["logit_change"] for r in every], axis=0)
    close(change[0, 0], centred["logit_change"][0, 0])


def test_bias_of_the_unembedding():
    """A bias of the unembedding is part of k: raw as it is, centred less its mean; nothing else moves."""
    model, ids = built(PARALLEL)
    biased = copy.deepcopy(model)
    bias = torch.linspace(-1, 3, model.config.vocab_size, dtype=torch.float64)
    biased.lm_head.bias = torch.nn.Parameter(bias)
    for target, mean in [("raw", 0), ("centred", 1)]:
        before = measured(PARALLEL, target=target)
        after = oracle.reference(biased, ids, partners=PARTNERS, target=target)
        for variable in ["constant", "logit"]:
            close(after[variable] - before[variable], bias.numpy()[ids[:, 1:]] - mean)
        close(after["self_repair"], before["self_repair"])


# ---------------------------------------------------------------- use


@pytest.mark.parametrize("name", EVERY)
def test_a_prompt_does_not_depend_on_its_batch(name):
    """A prompt's first tokens alone give what they give among others, a head what it gives among all."""
    model, ids = built(name)
    alone = oracle.reference(model, ids[:1, :2], ablation="zero", heads=[(1, 1)])
    among = measured(name, ablation="zero")
    for variable in oracle.PER_HEAD:
        assert np.isfinite(alone[variable]).sum() == 1
        close(alone[variable][1, 1, 0, 0], among[variable][1, 1, 0, 0])


def test_mean_over_a_stated_set():
    """The reference set is free, and by default the prompts themselves."""
    model, ids = built("gpt2")
    other = oracle.reference(model, ids, ablation="mean", mean_ids=families.random_ids(model, 3, 5, seed=9))
    own = oracle.reference(model, ids, ablation="mean", mean_ids=ids)
    assert_array_equal(own["logit_change"], measured("gpt2", ablation="mean")["logit_change"])
    assert np.abs(own["logit_change"] - other["logit_change"]).max() > 0.01


@pytest.mark.parametrize("name", EVERY)
def test_eager_attention_gives_the_same(name):
    """To the single precision of its softmax."""
    eager = families.build(name, exact=True, attention="eager")
    result = oracle.reference(eager, built(name)[1], partners=PARTNERS)
    close(result["self_repair"], measured(name)["self_repair"], TIGHT if name == "gpt2" else STOCK)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ablation": "noise"},
        {"target": "mean"},
        {"value_bias": "none"},
        {"freeze": "some"},
        {"partners": None},
    ],
)
def test_misspelt_options_are_refused(wrong):
    """Nothing falls through to a default."""
    model, ids = built("gpt2")
    with pytest.raises(ValueError, match=next(iter(wrong))):
        oracle.reference(model, ids, **({"partners": PARTNERS} | wrong))


@pytest.mark.parametrize("name", families.REFUSED)
def test_models_without_a_definition_are_refused(name):
    """The models run, and the oracle says no."""
    model = families.build(name)
    ids = families.random_ids(model)
    assert torch.isfinite(real_logits(model, ids)).all()
    with pytest.raises(ValueError, match="no definition"):
        oracle.reference(model, ids, ablation="zero")


# ---------------------------------------------------------------- the families


@pytest.mark.parametrize("name", [*EVERY, *families.REFUSED])
def test_families_are_random_and_reproducible(name):
    """Every parameter varies, is float64, and depends on the seed alone."""
    model, again, other = families.build(name), families.build(name), families.build(name, seed=1)
    pairs = zip(model.parameters(), again.parameters(), other.parameters(), strict=True)
    for parameter, same, different in pairs:
        assert parameter.dtype == torch.float64
        assert parameter.std() > 0.05
        assert torch.equal(parameter, same)
        assert not torch.equal(parameter, different)
    assert not model.training


@pytest.mark.parametrize("name", EVERY)
def test_heads_of_the_families_matter(name):
    """Logits of a unit or more; every head, and every part of Equation 2, moves them."""
    result = measured(name)
    assert result["logit"].std() > 1
    assert np.abs(result["logit_change"]).mean((2, 3)).min() > 0.05
    for variable in ["direct_effect", "from_heads", "from_mlps", "from_norm"]:
        assert np.abs(result[variable]).mean() > 0.02


def test_the_sliding_window_is_felt():
    """The window is shorter than the prompts, so without it the logits differ."""
    model, ids = built("mistral-sliding")
    wide = copy.deepcopy(model)
    wide.config.sliding_window = None
    difference = (real_logits(wide, ids) - real_logits(model, ids)).abs().amax((0, 2))
    assert (difference[: families.SLIDING_WINDOW] < TIGHT).all()
    assert (difference[families.SLIDING_WINDOW :] > 0.1).all()
