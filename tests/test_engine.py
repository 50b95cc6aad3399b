"""Every number of the engine against the independent oracle: its own full pass for each ablation, and plain hooks."""

import families
import numpy as np
import oracle
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from tiers import representative

from selfrepair_nn.components import FinalNorm, Head, Mlp, select_heads
from selfrepair_nn.graph import Graph, freeze_set, sweep
from selfrepair_nn.models.load import wrap
from selfrepair_nn.tracing.jobs import ablation_job, effects_job
from selfrepair_nn.tracing.session import run_session

TIGHT = 1e-10
STOCK = 1e-5  # Hugging Face's RMSNorm computes in float32, whatever the model's type
EVERY = list(families.FAMILIES)
THOROUGH = ["gpt2", "neox-parallel", "llama-biases"]
LAYER_NORM = ["gpt2", "gptj", "neox-parallel", "neox-sequential", "opt", "opt-biasless"]
NAMES = {"logit": "logit", "norm_scale": "norm_scale", "target_constant": "constant"}
NAMES |= {name: name for name in (*oracle.PER_HEAD, "component_direct_effect", "component_change")}
NAMES |= {name: name for name in oracle.OF_SOME_MODELS}
# Every ablation with every target and every value bias.
CONFIGURATIONS = [
    ("resample", "centred", "output"),
    ("zero", "raw", "head"),
    ("resample", "raw", "head"),
    ("mean", "centred", "head"),
    ("mean", "raw", "output"),
    ("zero", "centred", "output"),
    ("identity", "raw", "output"),
]
CHOICES = [
    (name, *configuration)
    for name in EVERY
    for configuration in CONFIGURATIONS[: None if name in THOROUGH else 2]
]
EVERY_RUN = [choice for choice in CHOICES if choice[0] == "gpt2" or choice[1:] == CONFIGURATIONS[0]]
EVERY_RUN += [("llama-biases", "zero", "raw", "head"), ("neox-parallel", "mean", "centred", "head")]


@pytest.fixture
def reference(wrapped, seeded):
    """reference(name, **options): the oracle's numbers on the prompts that `measure` uses."""

    def found(name, exact=True, **options):
        ids = seeded(name)
        return oracle.reference(
            wrapped(name, exact=exact).nn._module, ids, partners=families.derangement(len(ids)), **options
        )

    return found


def close(actual, desired, atol=TIGHT):
    """Equal to an absolute tolerance, NaN in the same places; dimensions by name where both have names."""
    if hasattr(desired, "dims"):
        desired = desired.transpose(*actual.dims)
    assert_allclose(actual, desired, rtol=0, atol=atol)


def agree(dataset, expected, atol=TIGHT):
    """Every stored quantity that the oracle knows, and the labels of the components."""
    missing = {*oracle.OF_SOME_MODELS} - expected["of_this_model"]
    assert missing.isdisjoint(dataset)
    layers, having = dataset.layer.values.tolist(), expected["having"]
    places = [layers.index(layer) for layer in having]
    for name, of in NAMES.items():
        if name not in missing:
            ours, theirs = dataset[name].values, expected[of]
            if "layer" in dataset[name].dims:
                assert np.isnan(np.delete(ours, places, 0)).all(), name
                ours, theirs = ours[places], theirs[having]
            assert np.isfinite(ours).all(), name
            assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=name)
    assert dataset.component.values.tolist() == expected["components"]


def job(model, ids, ablate, replacement, rows=10**6, mean_z=None, **graph):
    """The job itself on one block of prompts, with the derangement's partners: {name: array}."""
    tokens = torch.as_tensor(ids)
    arrays = {"tokens": tokens, "partner_tokens": tokens[families.derangement(len(ids))]}
    if mean_z is not None:
        arrays["means"] = {"z": mean_z}
    plan = Graph(ablate=ablate, replacement=replacement, **graph).plan(model.layout) | {"tokens_per_pass": rows}
    return {k: v.numpy() for k, v in run_session(ablation_job, model.nn, arrays, plan).items()}


# ---------------------------------------------------------------- single heads


@pytest.mark.parametrize("choice", representative(CHOICES, *EVERY_RUN), ids="-".join)
def test_every_quantity(measure, reference, choice):
    name, ablation, target, value_bias = choice
    choices = {"ablation": ablation, "target": target, "value_bias": value_bias}
    dataset = measure(name, **choices)
    agree(dataset, reference(name, **choices))
    close(dataset.closure, 0)
    assert dataset.logit.dtype == np.float64


@pytest.mark.parametrize(
    "name", representative([name for name in EVERY if name not in LAYER_NORM], "llama-biases", "qwen3")
)
def test_every_quantity_of_models_as_they_come(measure, reference, name):
    agree(measure(name, exact=False), reference(name, exact=False), STOCK)


@pytest.mark.parametrize("name", representative(THOROUGH, "llama-biases"))
def test_the_ablations_do_something(measure, name):
    """Lest all of this agrees on zeros."""
    for ablation in ("resample", "mean", "zero"):
        dataset = measure(name, ablation=ablation)
        parts = ["direct_effect", "logit_change", "from_heads", "from_mlps", "from_norm", "mean_logit_change"]
        for part in parts:
            assert np.abs(dataset[part]).mean() > 1e-3, (ablation, part)


@pytest.mark.parametrize("name", representative(["gpt2", "neox-parallel", "llama-gqa"], "gpt2"))
def test_mean_logits_turn_one_target_into_the_other(measure, reference, name):
    centred, raw = (reference(name, target=target) for target in ("centred", "raw"))
    dataset = measure(name)
    close(dataset.mean_logit, raw["logit"] - centred["logit"])
    close(dataset.mean_logit_change, raw["logit_change"] - centred["logit_change"])


@pytest.mark.parametrize("components", ["none", "all"])
@pytest.mark.parametrize("name", representative(["gpt2", "neox-parallel", "llama-gqa"], "llama-gqa"))
def test_a_selection_of_heads(measure, reference, name, components):
    """What is selected is as in the whole run; the rest is NaN and not done."""
    dataset = measure(name, heads="1.0,2.2,1.1", components=components, batch_size=3)
    expected = reference(name)
    assert dataset.layer.values.tolist() == [1, 2]
    assert dataset["head"].values.tolist() == [0, 1, 2]
    selected = np.array([[True, True, False], [False, False, True]])
    assert_array_equal(dataset.selected, selected)
    assert_array_equal(dataset.done, np.repeat(selected[..., None], 4, -1))
    for part in oracle.PER_HEAD:
        values = np.where(selected[..., None, None], expected[part][1:3, :3], np.nan)
        close(dataset[part], values)


def test_mean_over_fewer_prompts_than_are_run(measure, wrapped, seeded):
    """The reference set is the run's first prompts, wherever the blocks end."""
    ids = seeded("gpt2")
    model = wrapped("gpt2", exact=True).nn._module
    for few in (1, 3):
        dataset = measure("gpt2", ablation="mean", mean_prompts=few, batch_size=2)
        agree(dataset, oracle.reference(model, ids, ablation="mean", mean_ids=ids[:few]))


def test_partners_are_taken_as_given(measure, wrapped, seeded):
    """Across blocks, and a prompt may be its own partner: then nothing happens to it."""
    ids, partners = seeded("neox-parallel"), np.array([3, 1, 0, 2])
    model = wrapped("neox-parallel", exact=True).nn._module
    dataset = measure("neox-parallel", partners=partners, batch_size=2)
    agree(dataset, oracle.reference(model, ids, partners=partners))
    close(dataset.logit_change[:, :, 1], 0)
    assert dataset.partner.values.tolist() == partners.tolist()


# ---------------------------------------------------------------- freezing


@pytest.mark.parametrize(("freeze", "ablation"), [("downstream", "resample"), ("all", "zero")])
@pytest.mark.parametrize(
    "name",
    representative(
        ["gpt2", "gptj", "neox-parallel", "neox-sequential", "llama-gqa", "opt"], "gpt2", "neox-parallel", "llama-gqa"
    ),
)
def test_frozen(measure, reference, name, freeze, ablation):
    dataset = measure(name, freeze=freeze, ablation=ablation)
    agree(dataset, reference(name, freeze=freeze, ablation=ablation))
    close(dataset.from_heads, 0)
    close(dataset.from_mlps, 0)


@pytest.mark.parametrize("name", EVERY)
def test_with_everything_frozen_the_logit_loses_the_direct_effect(wrapped, seeded, name):
    model = wrapped(name, exact=True)
    layers, heads = model.structure.n_layers, model.structure.n_heads
    every = select_heads(None, None, layers, heads)
    found = job(model, seeded(name), sweep(every), "resample", freeze=freeze_set("all", layers, heads))
    close(found["logit_change"], found["ablated_direct_effect"] - found["direct_effect"])
    assert_array_equal(found["ablated_norm_scale"], found["norm_scale"][None].repeat(len(every), 0))
    assert np.abs(found["logit_change"]).mean() > 1e-2


@pytest.mark.parametrize("name", ["neox-parallel", "gpt2"])
def test_last_layer(measure, name):
    """Appendix B: nothing in a parallel model can answer its last heads but the norm, in closed form."""
    last = measure(name).isel(layer=-1)
    own = last.ablated_direct_effect - last.direct_effect
    close(last.from_heads, 0)
    assert (np.abs(last.from_mlps).max() < TIGHT) == (name == "neox-parallel")
    stretch = last.norm_scale / last.ablated_norm_scale
    existing = last.logit - last.target_constant
    if name == "neox-parallel":
        close(last.logit_change, stretch * (existing + own) - existing)
        close(last.self_repair, (stretch - 1) * existing + (stretch - 1) * own)
    close(last.norm_on_existing, (stretch - 1) * existing)
    close(last.norm_on_change, (stretch - 1) * (own + last.from_mlps))


# ---------------------------------------------------------------- the top share


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", representative(["gpt2", "neox-parallel", "llama-gqa"], "llama-gqa"))
def test_top_share(measure, name, batch_size):
    """Every component on each head's tokens of highest direct effect over the whole run, nothing elsewhere."""
    every = measure(name)
    share, tokens = 0.2, every.logit.size
    top = measure(name, components="top", share=share, batch_size=batch_size)
    stored = np.isfinite(top.component_change)
    effects = every.direct_effect.values.reshape(*every.direct_effect.shape[:2], -1)
    least = np.sort(effects, axis=-1)[..., -int(share * tokens)]
    expected = every.direct_effect >= least[..., None, None]
    assert_array_equal(stored.all("component"), expected)
    assert_array_equal(stored.any("component"), expected)
    assert (expected.sum(("prompt", "position")) == int(share * tokens)).all()
    close(top.component_change, every.component_change.where(expected))
    for part in (*oracle.PER_HEAD, "component_direct_effect"):
        close(top[part], every[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", representative(["gpt2", "neox-parallel", "llama-gqa"], "gpt2", "llama-gqa"))
def test_the_top_share_is_chosen_by_the_stored_effects(name, dtype):
    """Bit for bit, or a token at the threshold would be lost: the clean passes' effects are the job's."""
    model = wrap(families.build(name).to(dtype))
    tokens = torch.as_tensor(families.random_ids(model.nn._module, 6, 20))
    heads = select_heads("1:", None, model.structure.n_layers, model.structure.n_heads)
    arrays = {"tokens": tokens, "partner_tokens": tokens.roll(1, 0)}
    plan = Graph(ablate=sweep(heads), record="full").plan(model.layout) | {"tokens_per_pass": 500}
    chosen, stored = (run_session(each, model.nn, arrays, plan) for each in (effects_job, ablation_job))
    assert torch.equal(chosen["direct_effect"], stored["direct_effect"])


# ---------------------------------------------------------------- several heads at once


def joint(model, ids, case, replacement, freeze=frozenset(), target="centred", value_bias="output"):
    """What the job must say of one case, by plain hooks: all its heads replaced, what `freeze` names held clean."""
    parts = oracle.find_parts(model.nn._module)
    setting = oracle.Setting(parts, torch.as_tensor(ids), target, value_bias, None)
    clean = oracle._clean(setting)
    means = {layer: z.mean((0, 1)) for layer, z in clean.seen.z.items()}
    set_heads = {(s.layer, s.head): clean.seen.z[s.layer][:, :, s.head] for s in freeze if type(s) is Head}
    set_heads |= {
        (h.layer, h.head): oracle._new_z(
            setting, clean, replacement, families.derangement(len(ids)), means, h.layer, h.head
        )
        for h in case
    }
    set_mlps = {s.layer: clean.seen.mlp[s.layer] for s in freeze if type(s) is Mlp}
    set_scale = clean.S_all if FinalNorm() in freeze else None
    seen = oracle.run(parts, setting.ids, set_heads=set_heads, set_mlps=set_mlps, set_scale=set_scale)
    effects = oracle._direct_effects(setting.writes(seen, clean.seen), clean.goal, clean.S)
    change = effects - clean.effects
    own = [clean.labels.index(h.label) for h in case]
    others = [i for i, kind in enumerate(clean.kinds) if kind == "head" and i not in own]
    mlps = [i for i, kind in enumerate(clean.kinds) if kind == "mlp"]
    found = {
        "direct_effect": clean.effects[..., own].sum(-1),
        "ablated_direct_effect": effects[..., own].sum(-1),
        "logit_change": setting.logit(seen) - clean.logit,
        "from_heads": change[..., others].sum(-1),
        "from_mlps": change[..., mlps].sum(-1),
        "ablated_norm_scale": clean.S if set_scale is not None else setting.scale(seen)[:, :-1],
        "component_change": change,
    }
    return {name: value.numpy() for name, value in found.items()}


CASES = (
    (Head(1, 0), Head(1, 2)),  # one layer
    (Head(1, 1), Head(2, 0)),  # two layers, the first begins where the case above does
    (Head(2, 2), Head(0, 1)),  # named from the end
    (Head(0, 0), Head(0, 1), Head(0, 2)),  # a whole layer of the NeoX
    (Head(2, 1),),
    (Head(0, 2), Head(1, 2), Head(2, 2)),
    (Head(1, 0), Head(1, 1), Head(2, 0), Head(2, 1)),
)
FROZEN = {
    "nothing": frozenset(),
    "both": frozenset({Head(1, 1), Head(2, 0), Mlp(1)}),  # a case that ablates one of them does not freeze it
    "mlps-and-norm": frozenset({Mlp(0), Mlp(2), FinalNorm()}),
    "heads": frozenset({Head(1, 0), Head(1, 2), Head(2, 1), Head(0, 0)}),
}
OF_SEVERAL = [
    (name, replacement, freeze)
    for name in ("gpt2", "neox-parallel", "neox-sequential", "llama-gqa")
    for replacement in ("resample", "mean", "zero")
    for freeze in FROZEN
]
TELLING = [case for case in OF_SEVERAL if case[0] == "gpt2" and "resample" in case]
TELLING += [("gpt2", "mean", "nothing"), ("gpt2", "zero", "both"), ("neox-parallel", "zero", "nothing")]
TELLING += [("neox-parallel", "resample", "mlps-and-norm"), ("neox-sequential", "mean", "both")]
TELLING += [("llama-gqa", "resample", "nothing"), ("llama-gqa", "zero", "both")]


@pytest.mark.parametrize("choice", representative(OF_SEVERAL, *TELLING), ids="-".join)
def test_several_heads_at_once(wrapped, seeded, choice):
    name, replacement, freeze = choice[0], choice[1], FROZEN[choice[2]]
    model, ids = wrapped(name, exact=True), seeded(name)
    z = oracle.run(oracle.find_parts(model.nn._module), torch.as_tensor(ids)).z
    mean_z = {layer: values.mean((0, 1)).flatten() for layer, values in z.items()}
    for record, rows in (("sums", 70), ("full", 10**6)):
        found = job(model, ids, CASES, replacement, rows, mean_z, freeze=freeze, record=record)
        for index, case in enumerate(CASES):
            expected = joint(model, ids, case, replacement, freeze)
            for part in expected.keys() & found.keys():
                close(found[part][index], expected[part])


@pytest.mark.parametrize(("target", "value_bias"), [("raw", "head"), ("raw", "output"), ("centred", "head")])
def test_several_heads_under_every_convention(wrapped, seeded, target, value_bias):
    model, ids = wrapped("gpt2", exact=True), seeded("gpt2")
    conventions = {"target": target, "value_bias": value_bias}
    found = job(model, ids, CASES, "zero", record="full", **conventions)
    for index, case in enumerate(CASES):
        for part, values in joint(model, ids, case, "zero", **conventions).items():
            close(found[part][index], values)
