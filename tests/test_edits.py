"""Every kind of edit and record of the engine, against whole forward passes with plain hooks, and by its identities."""

from dataclasses import astuple, replace
from functools import cache
from itertools import permutations, product

import families
import numpy as np
import oracle_edits
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from terminal import assert_same_numbers
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.components import (
    Attention,
    FinalNorm,
    Head,
    Layers,
    Mixers,
    Mlp,
    Neuron,
    Norm,
    Parallel,
    Permuted,
    PostNorms,
    Swap,
)
from selfrepair_nn.equations import complete
from selfrepair_nn.errors import Incomplete, UsageError
from selfrepair_nn.graph import Graph, Variants, freeze_set, sweep
from selfrepair_nn.models.architectures import structure_of
from selfrepair_nn.models.load import wrap
from selfrepair_nn.replacements import (
    Constant,
    OtherHead,
    Reinforce,
    ReinforcePartner,
    ReinforceRandom,
    Scale,
)
from selfrepair_nn.store import Store
from selfrepair_nn.tracing.jobs import ablation_job, effects_job
from selfrepair_nn.tracing.session import run_session

TIGHT = 1e-10
EAGER = 1e-6  # the softmax of eager attention is float32 in all families but GPT-2
FAMILIES = ["gpt2", "gptj", "neox-parallel", "neox-sequential", "llama-gqa", "opt"]  # of three layers
LAYERS, HEADS = 3, 3  # what every one of them has at least


def telling(conditions, *in_every_family):
    """Every family under every condition: in every run GPT-2 under all of them, the others under those named."""
    every = [(name, *condition) for name in FAMILIES for condition in conditions]
    return representative(every, *(case for case in every if case[0] == "gpt2" or case[1:] in in_every_family))


def words(case):
    return "-".join(map(str, case))


@cache
def prompts(name, length=8):
    """One block of prompts with everything that a job can be given: {name: tensor}."""
    ids = torch.as_tensor(families.random_ids(families.build(name), length=length))
    return {
        "tokens": ids,
        "partner_tokens": ids[families.derangement(len(ids))],
        "counterfactual_tokens": torch.where(torch.arange(length) == 2, ids.roll(2, 0), ids),
        "other": ids.roll(3, 0)[:, 1:].contiguous(),
        "edited_position": torch.tensor([3, 0, 6, 2]),
        "random_direction": directions(len(ids), families.build(name).config.hidden_size),
    }


def directions(prompts, width):
    """Vectors of length 1."""
    drawn = torch.randn(prompts, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


@cache
def edited(name, target="centred", value_bias="output"):
    """The oracle, on a model of its own."""
    return oracle_edits.Edited(families.build(name, exact=True), prompts(name), target, value_bias)


@pytest.fixture
def job(wrapped):
    """job(name, ablate, …): the engine on the block of `prompts`, completed by the equations: {name: array}."""

    def run(name, ablate, replacement="resample", tokens_per_pass=10**4, thresholds=None, work=ablation_job, **graph):
        model, arrays = wrapped(name, exact=True), dict(prompts(name))
        if replacement == "mean":
            arrays["means"] = means(name)
        if thresholds is not None:
            arrays["thresholds"] = torch.as_tensor(thresholds)
        graph["freeze"] = present(name, graph.get("freeze", frozenset()))
        plan = Graph(ablate=tuple(ablate), replacement=replacement, **graph).plan(model.layout)
        found = run_session(work, model.nn, arrays, plan | {"tokens_per_pass": tokens_per_pass})
        found = {name: value.numpy() for name, value in found.items()}
        return complete(found) if work is ablation_job else found

    return run


@cache
def present(name, sites):
    """Those of the sites that the model has: some have one norm for attention and MLP."""
    structure = structure_of(families.build(name))
    return frozenset(site for site in sites if site.lies_in(structure))


def means(name):
    """The mean of every activation over the block, as the oracle saw them."""
    seen = edited(name).clean
    activations = {
        "z": {layer: z.flatten(2) for layer, z in seen.z.items()},
        "mlp": seen.mlp,
        "neurons": seen.hidden,
    }
    return {what: {k: x.mean((0, 1)) for k, x in layers.items()} for what, layers in activations.items()}


def plain(site):
    """A site or replacement as the oracle takes it."""
    return site if isinstance(site, str) else (type(site).__name__.lower(), *astuple(site))


@cache
def expected(name, case, replacement="resample", freeze=frozenset(), target="centred", value_bias="output"):
    """The oracle's word on one case."""
    sites, frozen = tuple(map(plain, case)), tuple(map(plain, present(name, freeze)))
    return edited(name, target, value_bias).case(sites, plain(replacement), frozen)


def close(actual, desired, atol=TIGHT, size=0.0, **said):
    """Equal to `atol` logits, or to that share of the largest number (`size`), finite everywhere.

    A gated MLP behind frozen norms answers by thousands of logits.
    """
    assert np.isfinite(actual).all()
    size = max(1.0, size, np.abs(desired).max())
    assert_allclose(actual, desired, rtol=0, atol=atol * size, **said)


def agree(name, found, ablate, replacement="resample", freeze=frozenset(), **conventions):
    """Everything that the job measured is what the oracle says of each case, and of the clean run."""
    for part, values in edited(name, **conventions).clean_values().items():
        if part in found:
            close(found[part], values, err_msg=part)
    for index, case in enumerate(ablate):
        theirs = expected(name, case, replacement, freeze, **conventions)
        compared = found.keys() & theirs.keys() - {"neuron_change"}
        assert len(compared) >= 7
        for part in compared:
            close(found[part][index], theirs[part], err_msg=f"{part} of {case}")
    close(found["closure"], 0, size=np.abs(found["logit_change"]).max())


# ---------------------------------------------------------------- sites, replacements, freezing

CASES = (
    (Head(0, 1),),
    (Head(1, 0), Head(1, 2), Head(2, 1)),
    (Attention(1),),
    (Attention(2), Attention(0)),
    (Mlp(0),),
    (Mlp(1),),
    (Mlp(2),),
    (Mlp(0), Mlp(2)),
    (Neuron(0, 3),),
    (Neuron(2, 3),),
    (Neuron(1, 0), Neuron(1, 5)),
    (Neuron(2, 4), Neuron(0, 2)),
    (Head(0, 1), Mlp(0), Head(2, 1), Neuron(1, 2), Mlp(2)),
    (Mlp(1), Head(1, 0)),
    (Neuron(1, 3), Head(1, 1)),
    (Mlp(2), Attention(2)),
    (Head(2, 0), Mlp(0)),
    (Attention(1), Neuron(2, 1), Mlp(0)),
)
OF_HEADS = tuple(case for case in CASES if all(isinstance(site, Head | Attention) for site in case))
REPLACEMENTS = (
    "resample",
    "counterfactual",
    "mean",
    "zero",
    "identity",
    Scale(0.5),
    Scale(-1.0),
    Constant(0.25),
)
REPLACEMENTS += (OtherHead(Head(2, 0)), OtherHead(Head(0, 1)))
NORMS = frozenset(Norm(layer, before) for layer in range(LAYERS) for before in ("attention", "mlp"))
FREEZES = {
    "nothing": frozenset(),
    "norms": NORMS,
    "some": frozenset({Head(1, 1), Attention(2), Mlp(1), Norm(1, "mlp"), Norm(2, "attention")}),
    "norms-and-final": NORMS | {FinalNorm()},
    "mlps": frozenset({Mlp(0), Mlp(1), Mlp(2), Norm(2, "mlp")}),
}
CONVENTIONS = (("centred", "output"), ("difference", "head"), ("raw", "output"), ("difference", "output"))
CHOICES = [
    (replacement, freeze, *CONVENTIONS[(number + turn) % 4], ("full", "sums")[(number // 2 + turn) % 2])
    for number, replacement in enumerate(REPLACEMENTS)
    for turn, freeze in enumerate(("nothing", tuple(FREEZES)[1 + number % 4]))
]


EVERYWHERE = [choice for choice in CHOICES if choice[0] in ("counterfactual", "zero")]


@pytest.mark.parametrize("case", telling(CHOICES, *EVERYWHERE), ids=words)
def test_every_kind_of_site(job, case):
    """Heads, attention layers, MLPs and neurons, alone and together: everything measured, several to a pass."""
    name, replacement, freeze, target, value_bias, record = case
    ablate = OF_HEADS if isinstance(replacement, OtherHead) else CASES
    choices = {"target": target, "value_bias": value_bias}
    more = {"record": record, "residual_norm": record == "full", "tokens_per_pass": 100 if record == "sums" else 10**4}
    found = job(name, ablate, replacement, freeze=FREEZES[freeze], **more, **choices)
    agree(name, found, ablate, replacement, FREEZES[freeze], **choices)


@pytest.mark.parametrize("case", telling([(freeze,) for freeze in FREEZES], ("nothing",)), ids=words)
def test_deleted_layers(job, case):
    """By really taking them out of the model, all of them at the end; beside other ablations, in their passes."""
    name, freeze = case
    sites = [Layers(0, 1), Layers(1, 2), Layers(2, 3), Layers(0, 2), Layers(1, 3), Mlp(0), Head(2, 1)]
    ablate = sweep([*sites, Layers(0, 3)])
    replacement = dict(zip(FREEZES, ("zero", "resample", "mean", "counterfactual", "zero"), strict=True))[
        freeze
    ]
    for choices in ({}, {"target": "difference", "value_bias": "head"})[: 1 + (freeze == "nothing")]:
        more = {"record": "full", "residual_norm": True, "freeze": FREEZES[freeze]}
        found = job(name, ablate, replacement, **more, **choices)
        agree(name, found, ablate, replacement, FREEZES[freeze], **choices)


@pytest.mark.parametrize("case", telling([(freeze,) for freeze in FREEZES], ("nothing",)), ids=words)
def test_moved_layers(job, case):
    """By really moving them in the model, any order of two or three; side by side by plain hooks."""
    name, freeze = case
    ablate = sweep([Swap(0), Head(1, 1), Swap(1), Parallel(0, 2), Permuted((2, 0, 1)), Mlp(1), Parallel(0, 3)])
    for choices in ({}, {"target": "difference", "value_bias": "head"})[: 1 + (freeze == "nothing")]:
        found = job(name, ablate, "zero", residual_norm=True, freeze=FREEZES[freeze], **choices)
        agree(name, found, ablate, "zero", FREEZES[freeze], **choices)


MOVED = (Layers(0, 2), Layers(2, 3), *map(Permuted, permutations(range(3))), Swap(1), Parallel(0, 3), Parallel(1, 3))


@pytest.mark.parametrize("name", ["neox-parallel", "llama-gqa", "olmo2", "lfm2"])
def test_every_order_of_a_block_and_how_far_it_moves_the_stream(job, name):
    """Deleted, in every order, side by side; beside recorded neurons of another layer where there can be any."""
    ablate = sweep(MOVED)
    found = job(name, ablate, "zero", also=("stream_distance",))
    agree(name, found, ablate, "zero")
    distance = found["stream_distance"]
    assert_array_equal(distance[:2], 1)
    assert np.abs(distance[2]).max() < TIGHT, "the order that they have"
    assert distance[3:].min() > 1e-3


def test_a_moved_stream_beside_recorded_neurons(job):
    ablate = sweep([Layers(0, 1), Swap(0), Parallel(0, 2)])
    more = {"neurons": 2}
    both, alone = (job("llama-gqa", ablate, "zero", also=a, **more) for a in (("stream_distance",), ()))
    agree("llama-gqa", both, ablate, "zero")
    assert both.keys() - alone.keys() == {"stream_distance"}
    for part in alone:
        assert_array_equal(both[part], alone[part])


@pytest.mark.parametrize("case", telling([("nothing",), ("some",), ("norms-and-final",)], ("some",)), ids=words)
def test_reinforced_heads(job, case):
    """A head's own write added to what its layer reads, at one position: it is not frozen itself."""
    name, freeze = case
    ablate = sweep(Head(layer, head) for layer in range(LAYERS) for head in (0, 1))
    for scale, choices in ((0.5, {}), (-0.25, {"target": "raw", "value_bias": "head"})):
        found = job(name, ablate, Reinforce(scale), record="full", freeze=FREEZES[freeze], **choices)
        agree(name, found, ablate, Reinforce(scale), FREEZES[freeze], **choices)
        assert np.abs(found["inserted_direct_effect"]).max() > 1e-2


@pytest.mark.parametrize("null", [ReinforcePartner, ReinforceRandom])
@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "llama-gqa", "glm4"])
def test_nulls_of_reinforcement(job, name, null):
    """What the head writes on the partner's tokens, or a random direction as long as its write, is added instead."""
    ablate = sweep([Head(0, 1), Head(1, 0)])
    for scale, choices in ((2.0, {}), (-0.5, {"target": "raw", "value_bias": "head"})):
        found = job(name, ablate, null(scale), **choices)
        agree(name, found, ablate, null(scale), **choices)
        own = job(name, ablate, Reinforce(scale), **choices)
        assert np.abs(found["inserted_direct_effect"] - own["inserted_direct_effect"]).max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel"])
def test_nulls_of_reinforcement_in_a_store(stored, name):
    """Side by side, as the recipe has them; partners and directions are the run's own, whatever the blocks."""
    dataset, blocks = (stored(NULLS, name, f"{n}.zarr", seed=5, batch_size=n) for n in (3, 4))
    where, order = torch.as_tensor(dataset.edited_position.values), dataset.partner.values
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert (order != np.arange(4)).all()
    width = families.build(name).config.hidden_size
    drawn = np.stack([np.random.default_rng((5, place)).standard_normal(width) for place in range(4)])
    ids = prompts(name)["tokens"]
    given = {
        "edited_position": where,
        "partner_tokens": ids[order],
        "random_direction": torch.as_tensor(drawn / np.linalg.norm(drawn, axis=1, keepdims=True)),
    }
    them = oracle_edits.Edited(families.build(name, exact=True), prompts(name) | given)
    for write, word in (("own", "reinforce"), ("partner", "reinforcepartner"), ("random", "reinforcerandom")):
        for head in (Head(0, 1), Head(1, 1)):
            one = dataset.sel(write=write, layer=head.layer, head=head.head)
            theirs = them.case((plain(head),), (word, 2.0))
            for part in theirs.keys() & set(dataset.data_vars):
                close(one[part].values, theirs[part], err_msg=part)
    for part in ("logit_change", "ablated_direct_effect"):
        close(blocks[part].values[:, dataset.selected], dataset[part].values[:, dataset.selected])


@pytest.mark.parametrize("name", ["qwen3", "mistral", "llama-headdim", "llama-biases", "opt-biasless"])
def test_the_other_families(job, name):
    """Normed queries and keys, odd widths, biases of every kind: one job of everything that has two layers."""
    ablate = [case for case in CASES if all(site.layer < 2 for site in case)]
    freeze = frozenset({Norm(1, "attention"), Norm(1, "mlp"), Norm(0, "mlp"), Mlp(0)})
    for replacement in ("counterfactual", Scale(0.5)):
        found = job(name, ablate, replacement, record="full", freeze=freeze)
        agree(name, found, ablate, replacement, freeze)
    for site in (Layers(0, 1), Layers(1, 2), Swap(0), Parallel(0, 2)):
        agree(name, job(name, [(site,)], "zero"), [(site,)], "zero")
    reinforced = sweep([Head(0, 1), Head(1, 2)])
    agree(name, job(name, reinforced, Reinforce(2.0)), reinforced, Reinforce(2.0))


@pytest.mark.parametrize("name", ["olmo2", "glm4"])
def test_norms_behind_sublayers(job, name):
    """Their scales react in the head's own layer too; they can be frozen; what a head writes has passed them."""
    ablate = [case for case in CASES if not any(isinstance(site, Neuron) for site in case)]
    for replacement, freeze in (
        ("counterfactual", frozenset()),
        ("mean", FREEZES["some"]),
        (Scale(0.5), frozenset({PostNorms(), Mlp(1), Norm(2, "attention")})),
    ):
        found = job(name, ablate, replacement, record="full", freeze=freeze, tokens_per_pass=100)
        agree(name, found, ablate, replacement, freeze)
        assert (np.abs(found["from_post_norms"]).max() > 1e-3) == (PostNorms() not in freeze)
    for site in (Layers(0, 1), Layers(1, 3), Swap(0), Permuted((2, 0, 1)), Parallel(1, 3)):
        agree(name, job(name, [(site,)], "zero"), [(site,)], "zero")
    reinforced = sweep([Head(0, 1), Head(1, 2), Head(2, 0)])
    agree(name, job(name, reinforced, Reinforce(2.0)), reinforced, Reinforce(2.0))


def test_mixers_without_heads(job):
    """Layers of two kinds: ablated beside each other, deleted, swapped; the mixers live and frozen."""
    ablate = [
        *sweep([Head(1, 0), Attention(3), Mlp(0), Neuron(2, 3), Mlp(1)]),
        (Mlp(2), Head(1, 1)),
        (Head(1, 2), Head(3, 3), Neuron(0, 1)),
    ]
    for replacement, freeze in (
        ("counterfactual", frozenset()),
        ("mean", frozenset({Mixers(), Mlp(2), Norm(2, "attention")})),
        ("zero", frozenset({Norm(2, "attention"), Norm(3, "mlp"), Head(3, 1)})),
    ):
        found = job("lfm2", ablate, replacement, record="full", freeze=freeze, tokens_per_pass=100)
        agree("lfm2", found, ablate, replacement, freeze)
        assert (np.abs(found["from_mixers"]).max() > 1e-3) == (Mixers() not in freeze)
    for site in (Layers(0, 1), Layers(1, 3), Swap(0), Permuted((3, 1, 0, 2)), Swap(2), Parallel(0, 4)):
        agree("lfm2", job("lfm2", [(site,)], "zero"), [(site,)], "zero")
    reinforced = sweep([Head(1, 1), Head(3, 2)])
    agree("lfm2", job("lfm2", reinforced, Reinforce(2.0)), reinforced, Reinforce(2.0))


# ---------------------------------------------------------------- path patching and norms, by their identities


@pytest.mark.parametrize("name", FAMILIES)
def test_path_patching(job, wrapped, name):
    """Only the receivers react, and to the sender's direct path alone."""
    sizes = wrapped(name).structure.n_layers, wrapped(name).structure.n_heads
    senders = ((Head(0, 1),), (Mlp(0),), (Head(0, 0), Neuron(1, 3)))
    for receivers in ((Mlp(2),), (Head(1, 0), Head(2, 1)), (Attention(2), Mlp(1))):
        graph = Graph(ablate=senders).path(receivers, *sizes)
        found = job(name, senders, freeze=graph.freeze, record="full")
        agree(name, found, senders, freeze=graph.freeze)


@pytest.mark.parametrize("name", FAMILIES)
def test_path_patching_to_every_receiver_is_the_plain_ablation(job, wrapped, name):
    sizes = wrapped(name).structure.n_layers, wrapped(name).structure.n_heads
    every = [*(Attention(layer) for layer in range(LAYERS)), *(Mlp(layer) for layer in range(LAYERS)), Mixers()]
    assert Graph(ablate=CASES).path(every, *sizes).freeze == frozenset()
    none = Graph(ablate=CASES).path((), *sizes)
    assert none.freeze == freeze_set("downstream", *sizes)
    found = job(name, CASES, freeze=none.freeze)
    for part in ("from_heads", "from_mlps"):
        close(found[part], 0)


@pytest.mark.parametrize("case", telling([("resample",), ("zero",), (Scale(2.0),)], ("zero",)), ids=words)
def test_with_everything_frozen_the_logit_loses_the_direct_effect(job, wrapped, case):
    """Whatever is ablated, of whatever kind; layers that are deleted or swapped too."""
    name, replacement = case
    sizes = wrapped(name).structure.n_layers, wrapped(name).structure.n_heads
    for freeze in (freeze_set("all", *sizes), freeze_set("all", *sizes) | NORMS):
        ablate = CASES + (
            sweep([Layers(0, 2), Layers(1, 2), Swap(0), Swap(1)]) if replacement == "zero" else ()
        )
        found = job(name, ablate, replacement, freeze=freeze)
        close(found["logit_change"], found["ablated_direct_effect"] - found["direct_effect"])
        assert (np.abs(found["logit_change"]).mean((1, 2)) > 1e-4).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_norms_make_late_answers_linear(job, wrapped, name):
    """With every norm, later head and MLP frozen the answers to two ablations add up: only the stream is between."""
    sizes = wrapped(name).structure.n_layers, wrapped(name).structure.n_heads
    freeze = freeze_set("all", *sizes) | NORMS
    one, other, both = job(name, ((Head(0, 0),), (Mlp(2),), (Head(0, 0), Mlp(2))), freeze=freeze)[
        "logit_change"
    ]
    close(both, one + other)


# ---------------------------------------------------------------- what changes nothing, and what is the same


@pytest.mark.parametrize("name", FAMILIES)
def test_what_changes_nothing(job, name):
    """Scale 1, identity, a head in its own place, reinforcement by 0: in every case, to rounding."""
    alone = sweep(Head(layer, head) for layer in range(LAYERS) for head in range(HEADS))
    trials = [(CASES, "identity"), (CASES, Scale(1.0)), (alone, Reinforce(0.0))]
    trials += [((case,), OtherHead(case[0])) for case in alone[::4]]
    for ablate, replacement in trials:
        found = job(name, ablate, replacement, record="full")
        for part in ("logit_change", "mean_logit_change", "from_heads", "from_mlps", "component_change"):
            close(found[part], 0, err_msg=f"{part}, {replacement}")
        close(found["ablated_direct_effect"], found["direct_effect"])


@pytest.mark.parametrize("name", FAMILIES)
def test_scaling_by_nothing_is_zero_ablation(job, name):
    zero, scaled = (job(name, CASES, by, record="full") for by in ("zero", Scale(0.0)))
    for part, values in zero.items():
        close(scaled[part], values, err_msg=part)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vector_that_is_the_mean_is_mean_ablation(job, wrapped, name):
    width = wrapped(name, exact=True).structure.d_head
    vectors = {(Head(1, 2),): means(name)["z"][1][2 * width : 3 * width], (Mlp(0),): means(name)["mlp"][0]}
    for case, vector in vectors.items():
        mean, given = (job(name, (case,), by, record="full") for by in ("mean", Constant(vector)))
        for part, values in mean.items():
            close(given[part], values, err_msg=part)


def test_a_vector_must_be_as_wide_as_what_it_replaces(wrapped):
    structure = wrapped("gpt2", exact=True).structure
    vector = Constant([0.5] * structure.d_head)
    assert Graph(ablate=sweep([Head(0, 1), Attention(2)]), replacement=vector).misfit(structure) is None
    told = Graph(ablate=sweep([Head(0, 1), Mlp(1)]), replacement=vector).misfit(structure)
    assert told == f"L1.mlp holds {structure.d_model} numbers, the Constant {structure.d_head}"
    assert (vector.word, Constant(0.5).word) == (f"constant_{structure.d_head}_numbers", "constant_0.5")
    for wrong in (["a"], [0.5, float("nan")], "ab"):
        with pytest.raises(UsageError, match="value of Constant"):
            Constant(wrong)


OF_LAYERS = [(replacement,) for replacement in ("resample", "mean", "zero", "counterfactual", Constant(1.0))]


@pytest.mark.parametrize("case", telling(OF_LAYERS, ("zero",)), ids=words)
def test_an_attention_layer_is_all_its_heads(job, wrapped, case):
    name, replacement = case
    heads = range(wrapped(name).structure.n_heads)
    for layer in range(LAYERS):
        ablate = ((Attention(layer),), tuple(Head(layer, head) for head in heads))
        for values in job(name, ablate, replacement, record="full").values():
            if len(values) == 2:
                close(values[0], values[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_deleted_layer_is_its_parts_in_closed_form(job, wrapped, name):
    """Its components lose their clean effects; with the bias they are what the zeroed heads and MLP write."""
    structure = wrapped(name).structure
    per_layer = structure.n_heads + 1 + (structure.attention_bias or structure.value_bias)
    sites = [Layers(0, 1), Layers(1, 3), Layers(2, 3), Layers(0, 3)]
    found = job(name, sweep(sites), "zero", record="full")
    clean = found["component_direct_effect"]
    first = clean.shape[-1] - LAYERS * per_layer
    for index, site in enumerate(sites):
        own = slice(first + site.layer * per_layer, first + site.stop * per_layer)
        close(found["component_change"][index][..., own], -clean[..., own])
        close(found["direct_effect"][index], clean[..., own].sum(-1))
        close(found["ablated_direct_effect"][index], 0)
        assert not found["component_change"][index][..., : own.start].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_components_and_the_norm_make_the_whole_change(job, name):
    """R' S / S' - R from every component's change, whatever is ablated."""
    trials = [(CASES, replacement) for replacement in ("resample", Constant(0.5))]
    trials += [
        (sweep([Layers(0, 2), Layers(2, 3)]), "zero"),
        (sweep([Head(0, 1), Head(2, 2)]), Reinforce(5.0)),
    ]
    for ablate, replacement in trials:
        found = job(name, ablate, replacement, record="full", freeze=FREEZES["some"])
        existing = found["logit"] - found["target_constant"]
        whole = existing + found["component_change"].sum(-1) + found.get("inserted_direct_effect", 0)
        stretch = found["norm_scale"] / found["ablated_norm_scale"]
        close(found["logit_change"], whole * stretch - existing)


# ---------------------------------------------------------------- neurons


def without_mlp(layer):
    """The cases in which the MLP of a layer is not replaced as a whole."""
    return tuple(case for case in (*CASES, (Neuron(layer, 6), Head(layer, 1))) if Mlp(layer) not in case)


OF_NEURONS = [(freeze, layer) for freeze in ("nothing", "some", "mlps") for layer in range(LAYERS)]


@pytest.mark.parametrize("case", telling(OF_NEURONS, ("nothing", 1), ("some", 2)), ids=words)
def test_neurons(job, case):
    """Each neuron's write by its own row of the weights; the bias, which does not change, completes the MLP."""
    name, freeze, layer = case
    ablate, them = without_mlp(layer), edited(name)
    found = job(name, ablate, "counterfactual", neurons=layer, freeze=FREEZES[freeze])
    clean = them.neuron_effects(them.clean, layer).numpy()
    whole = them.effects[..., them.labels.index(f"L{layer}.mlp")].numpy()
    close(found["mlp_direct_effect"], whole)
    close(found["mlp_change"], found["neuron_change"].sum(-1))
    for index, case in enumerate(ablate):
        theirs = expected(name, case, "counterfactual", FREEZES[freeze])
        close(found["neuron_direct_effect"][index], clean)
        close(found["neuron_change"][index], theirs["neuron_change"][layer], err_msg=str(case))
        close(found["mlp_change"][index], theirs["component_change"][..., them.labels.index(f"L{layer}.mlp")])
    ranked = np.sort(found["neuron_change"], -1)[..., ::-1][..., :10]
    close(found["top_neuron_change"], ranked)
    named = np.take_along_axis(found["neuron_change"], found["top_neuron"], -1)
    close(found["top_neuron_change"], named)
    named = np.take_along_axis(found["neuron_direct_effect"], found["top_neuron"], -1)
    close(found["top_neuron_direct_effect"], named)


@pytest.mark.parametrize("name", FAMILIES)
def test_recording_neurons_changes_nothing_else(job, name):
    ablate = without_mlp(2)
    with_them, without = (job(name, ablate, neurons=neurons) for neurons in (2, None))
    for part, values in without.items():
        close(with_them[part], values, err_msg=part)


# ---------------------------------------------------------------- attention

WINDOWED = ["gpt2", "neox-parallel", "llama-gqa", "opt", "qwen3", "mistral", "mistral-sliding"]


@pytest.mark.parametrize("length", [8, 21])  # more positions than a head is wide: several passes
@pytest.mark.parametrize("name", WINDOWED)
def test_attention(wrapped, name, length):
    """Against the weights that eager attention computes; 0 where there is no token so far back."""
    model, tokens = wrapped(name, exact=True), prompts(name, length)["tokens"]
    heads = [Head(1, 1), Head(0, 2), Head(1, 0)]
    distances = (1, 0, 3, length - 1, length + 2)
    plan = Graph(ablate=sweep(heads), replacement="zero", attention=distances).plan(model.layout)
    found = run_session(ablation_job, model.nn, {"tokens": tokens}, plan | {"tokens_per_pass": 10**4})["attention"]
    eager = families.build(name, exact=True, attention="eager")
    with torch.no_grad():
        weights = eager(tokens, output_attentions=True, use_cache=False).attentions
    assert found.shape == (3, 4, length - 1, len(distances))
    theirs = np.zeros(found.shape)
    for (index, head), (place, distance) in product(enumerate(heads), enumerate(distances)):
        for position in range(distance, length - 1):
            paid = weights[head.layer][:, head.head, position, position - distance]
            theirs[index, :, position, place] = paid
    close(found.numpy(), theirs, TIGHT if name == "gpt2" else EAGER)
    assert not found[..., 4].any()


def test_attention_to_all_distances_adds_up(job):
    """… to 1, and reading it leaves every other number alone."""
    ablate = sweep([Head(0, 0), Head(2, 4), Head(1, 1)])
    with_it, without = (job("gpt2", ablate, attention=distances) for distances in (tuple(range(8)), ()))
    close(with_it["attention"].sum(-1), 1)
    for part, values in without.items():
        close(with_it[part], values, err_msg=part)


# ---------------------------------------------------------------- only the top tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_unpacked_on_the_top_tokens(job, name):
    """In their order: case, prompt, position; a case may have none and another all."""
    ablate = without_mlp(1)
    choices = {"record": "full", "neurons": 1, "tokens_per_pass": 100}
    whole = job(name, ablate, **choices)
    effect = whole["direct_effect"]
    limits = np.quantile(effect, 0.8, (1, 2))
    limits[:2] = effect[0].max() + 1, effect[1].min()
    packed = job(name, ablate, thresholds=limits, **choices)
    top = effect >= limits[:, None, None]
    assert 0 < top.sum() < top.size
    for part, values in whole.items():
        large = part in ("component_change", "neuron_change", "neuron_direct_effect")
        close(packed[part], values[top] if large else values, 0, err_msg=part)


@pytest.mark.parametrize("case", telling([(torch.float32,), (torch.bfloat16,)], (torch.bfloat16,)), ids=words)
def test_thresholds_are_of_the_stored_effects(case):
    """Bit for bit, or a token at the threshold would be lost; of cases with several sites, too."""
    name, dtype = case
    model = wrap(families.build(name).to(dtype))
    trials = [
        (CASES, "resample"),
        (sweep([Layers(0, 2), Swap(1), Parallel(0, 3)]), "zero"),
        (sweep([Head(1, 1)]), Reinforce(2.0)),
    ]
    for ablate, replacement in trials:
        plan = Graph(ablate=ablate, replacement=replacement).plan(model.layout) | {"tokens_per_pass": 100}
        chosen, stored = (run_session(f, model.nn, prompts(name), plan) for f in (effects_job, ablation_job))
        assert torch.equal(chosen["direct_effect"], stored["direct_effect"])


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (dict(ablate=(Head(0, 1),)), r"sweep\(\["),
        (dict(ablate=("L0H1",)), r"sweep\(\["),
        (dict(ablate=((Norm(0, "mlp"),),)), "L0.mlp_norm cannot be ablated; choose"),
        (dict(ablate=((Head(0, 1), Head(0, 1)),)), "name it once"),
        (dict(ablate=((Attention(1), Head(1, 2)),)), "L1.attention and L1H2"),
        (dict(ablate=((Neuron(2, 3), Mlp(2)),)), "L2N3 and L2.mlp"),
        (dict(ablate=((Layers(0, 1), Mlp(2)),), replacement="zero"), "alone"),
        (dict(ablate=((Swap(0),),), replacement=Scale(0.5)), "beside a replacement of resample"),
        (dict(ablate=((Swap(0),),), replacement="zero", record="full"), 'record "sums"'),
        (dict(ablate=((Swap(0),),), replacement="zero", neurons=1), "choose another layer"),
        (dict(ablate=((Parallel(0, 3),),), replacement="zero", neurons=2), "choose another layer"),
        (dict(ablate=((Parallel(0, 2),),), replacement="zero", record="full"), 'record "sums"'),
        (dict(ablate=((Parallel(0, 2), Mlp(2)),), replacement="zero"), "alone"),
        (dict(ablate=((Mlp(2),),), also=("stream_distance",)), "of whole layers"),
        (dict(ablate=((Mlp(1),),), neurons=1), "choose another layer"),
        (dict(ablate=((Mlp(1),),), replacement=OtherHead(Head(0, 0))), "ablate heads"),
        (dict(ablate=((Attention(1),),), replacement=Reinforce(1.0)), "one head at a time"),
        (dict(ablate=((Head(1, 0), Head(1, 1)),), replacement=Reinforce(1.0)), "one head at a time"),
        (dict(ablate=((Head(1, 0),),), replacement=0.5), "choose one of"),
        (dict(ablate=((Head(1, 0),),), replacement=Scale), "choose one of"),
        (dict(ablate=((Head(1, 0),),), freeze=frozenset({Neuron(1, 0)})), "L1N0 cannot be frozen; choose"),
        (dict(ablate=((Mlp(1),),), attention=(1,)), "let each entry"),
        (dict(ablate=((Head(1, 0),),), attention=(-1,)), "from 0 on"),
        (dict(ablate=((Head(1, 0),),), attention=(1.5,)), "from 0 on"),
    ],
    ids=str,
)
def test_a_graph_that_cannot_be_says_why(graph, said):
    """In one line, with the name of what is wrong and with what to do."""
    with pytest.raises(UsageError, match=said) as caught:
        Graph(**graph)
    assert "\n" not in str(caught.value)


def test_norms_receivers_and_axes_that_cannot_be():
    graph = Graph(ablate=((Head(0, 1),),))
    for wrong, said in (
        (lambda: Norm(1, "final"), "attention, mlp"),
        (lambda: Swap(-1), "layer of Swap must be a whole number"),
        (lambda: Permuted((3, 5)), "follow on each other"),
        (lambda: Permuted((3, 3)), "each once"),
        (lambda: Permuted((3,)), "two or more"),
        (lambda: Permuted("43"), "lists layers"),
        (lambda: Permuted(4), "lists layers"),
        (lambda: Permuted((1.5, 2)), "order of Permuted must be a whole number"),
        (lambda: Parallel(2, 3), "two layers or more; let stop be 4"),
        (lambda: graph.path((Mlp(3),), 3, 2), "L3.mlp cannot receive: choose"),
        (lambda: graph.path((Attention(3),), 3, 2), "layers 0 to 2 with heads 0 to 1"),
        (lambda: graph.path((Neuron(1, 1),), 3, 2), "L1N1 cannot receive: choose"),
        (lambda: Variants("layer", {0: graph}), "choose another"),
        (lambda: Variants("scale", {}), "at least one"),
        (lambda: Variants("scale", {0: graph, 1: replace(graph, neurons=2)}), "share neurons"),
    ):
        with pytest.raises(UsageError, match=said):
            wrong()


LAYER = st.integers(0, 3)  # the last is one too many
PARTS = st.one_of(
    st.builds(Head, LAYER, st.integers(0, 4)),
    st.builds(Attention, LAYER),
    st.builds(Mlp, LAYER),
    st.builds(Neuron, LAYER, st.integers(0, 43)),
)
WHOLE = st.one_of(
    st.builds(Layers, LAYER, st.integers(1, 4)),
    st.sampled_from([Swap(0), Swap(2), Permuted((1, 2, 0)), Parallel(0, 2), Parallel(1, 4)]),
    st.just(FinalNorm()),
)
ONE_CASE = (
    st.lists(PARTS, min_size=1, max_size=3) | st.tuples(PARTS) | st.lists(WHOLE, min_size=1, max_size=2)
)
FREEZABLE = st.builds(Head, LAYER, st.integers(0, 4)) | st.sampled_from([*sorted(NORMS), PostNorms(), FinalNorm()])
FREEZABLE |= st.builds(Mlp, LAYER) | st.builds(Attention, LAYER)
ANY_REPLACEMENT = st.just("zero") | st.sampled_from(
    [*REPLACEMENTS, Reinforce(1.0), ReinforceRandom(1.0), OtherHead(Head(9, 0)), "noise", None]
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ablate=st.lists(ONE_CASE.map(tuple), min_size=1, max_size=2).map(tuple),
    replacement=ANY_REPLACEMENT,
    freeze=st.frozensets(FREEZABLE, max_size=4),
    record=st.sampled_from(["sums", "full"]),
    neurons=st.none() | LAYER,
    attention=st.just(()) | st.just(()) | st.tuples(st.integers(-1, 9)),
)
def test_any_graph_is_refused_in_one_line_or_runs_and_closes(job, wrapped, ablate, replacement, **more):
    """Nothing in between: no graph that is accepted fails within the model, or leaves a remainder."""
    graph, refused = None, ""
    try:
        graph = Graph(ablate=ablate, replacement=replacement, **more)
    except UsageError as error:
        refused = str(error)
    assert len(refused.splitlines()) == (graph is None)
    if graph is not None and graph.beyond(wrapped("gpt2", exact=True).structure) is None:
        found = job("gpt2", ablate, replacement, **more)
        close(found["closure"], 0, size=np.abs(found["logit_change"]).max())
        assert all(np.isfinite(values).all() for values in found.values())


# ---------------------------------------------------------------- in a store

RECIPE = '''"""Edits of several kinds, or variants of them."""

import selfrepair_nn as sr

PARAMETERS = {"only": ""}
CASES = (
    (sr.Head(0, 1), sr.Mlp(0), sr.Neuron(1, 2)),
    (sr.Attention(1),),
    (sr.Neuron(2, 3),),
    (sr.Head(2, 0), sr.Head(1, 1)),
)


def graph(structure, options):
    sizes = structure.n_layers, structure.n_heads
    plain = sr.Graph(ablate=CASES, record="full", residual_norm=True, neurons=2)
    variants = {
        "resample": plain,
        "mean": sr.Graph(ablate=CASES, replacement="mean", record="full", residual_norm=True, neurons=2),
        "half": sr.Graph(ablate=CASES, replacement=sr.Scale(0.5), record="full", residual_norm=True, neurons=2),
        "path": plain.path((sr.Mlp(2), sr.Head(2, 1)), *sizes),
    }
    return variants[options.param["only"]] if options.param["only"] else sr.Variants("ablation", variants)
'''

REINFORCED = '''"""Heads that read their own output, more and more of it."""

import selfrepair_nn as sr


def graph(structure, options):
    heads = sr.sweep([sr.Head(0, 1), sr.Head(1, 0), sr.Head(1, 1)])
    graphs = {scale: sr.Graph(ablate=heads, replacement=sr.Reinforce(scale)) for scale in (0.0, 0.5, 2.0)}
    return sr.Variants("scale", graphs)
'''

NULLS = '''"""Heads that read their own write, another prompt's and a random one."""

import selfrepair_nn as sr


def graph(structure, options):
    heads = sr.sweep([sr.Head(0, 1), sr.Head(1, 1)])
    kinds = {"own": sr.Reinforce, "partner": sr.ReinforcePartner, "random": sr.ReinforceRandom}
    graphs = {name: sr.Graph(ablate=heads, replacement=kind(2.0)) for name, kind in kinds.items()}
    return sr.Variants("write", graphs)
'''

COUNTERFACTUALS = '''"""Prompts with counterfactuals, measured by the difference of two tokens; attention too."""

import numpy as np

import selfrepair_nn as sr

TOKENS = np.array(GIVEN)


def prompts(structure, tokenizer, options):
    counterfactual = TOKENS.copy()
    counterfactual[:, 2] = np.roll(TOKENS, 2, 0)[:, 2]
    return sr.Prompts(TOKENS, np.arange(len(TOKENS)), {"name": "given"}, counterfactual, np.roll(TOKENS, 3, 0)[:, 1:])


def graph(structure, options):
    heads = sr.sweep([sr.Head(0, 1), sr.Head(2, 0)])
    return sr.Graph(ablate=heads, replacement="counterfactual", attention=(0, 1, 3))
'''


@pytest.fixture
def stored(wrapped, seeded, tmp_path):
    """stored(recipe's text, family, **choices): a run of a recipe of one's own, as a loaded dataset."""

    def run(text, name, out="s.zarr", **choices):
        (tmp_path / "mine.py").write_text(text)
        choices = {"prompts": seeded(name), "batch_size": 3, "progress": False} | choices
        choices.setdefault("partners", families.derangement(4) if text == RECIPE else None)
        return sr.run(
            str(tmp_path / "mine.py"), model=wrapped(name, exact=True), out=tmp_path / out, **choices
        ).load()

    return run


RECIPE_CASES = (
    (Head(0, 1), Mlp(0), Neuron(1, 2)),
    (Attention(1),),
    (Neuron(2, 3),),
    (Head(2, 0), Head(1, 1)),
)
TOP_ONLY = ("component_change", "neuron_change", "neuron_direct_effect")


def assert_theirs(dataset, name, cases, replacement, **more):
    """Every variable of a store without variants, by name, against the oracle; large ones on the top tokens only."""
    for index, case in enumerate(cases):
        theirs, one = expected(name, case, replacement, **more), dataset.isel(case=index)
        theirs = theirs | {"neuron_change": theirs["neuron_change"][2]}
        for part in theirs.keys() & set(dataset.data_vars):
            values, wanted = one[part].values, theirs[part].numpy()
            if part in TOP_ONLY:
                kept = np.isfinite(values).all(-1)
                assert kept.sum() == TOP
                assert (np.isnan(values) | kept[..., None]).all()
                assert one.direct_effect.values[kept].min() >= one.direct_effect.values[~kept].max()
                values, wanted = values[kept], wanted[kept]
            close(values, wanted, err_msg=f"{part} of {case}")


TOP = 7  # a quarter of 4 prompts of 7 positions


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "llama-gqa"])
def test_cases_in_a_store(stored, name):
    """Labels, dimensions, and every number by its label, over blocks of three prompts and one."""
    dataset = stored(RECIPE, name, param={"only": "resample"}, share=0.25, components="top")
    labels = ["L0H1+L0.mlp+L1N2", "L1.attention", "L2N3", "L2H0+L1H1"]
    assert dataset.case.values.tolist() == labels
    assert dataset.case_layer.values.tolist() == [0, 1, 2, 1]
    assert dataset.done.dims == ("case", "prompt")
    assert dataset.done.all()
    assert dataset.selected.dims == dataset.noise_floor.dims == ("case",)
    assert dataset.noise_floor[1] == dataset.noise_floor[3]
    assert np.isfinite(dataset.noise_floor).all()
    dims = {"direct_effect": (), "component_change": ("component",), "top_neuron": ("rank",)}
    dims |= {"neuron_change": ("neuron",), "ablated_residual_norm": (), "mlp_change": ()}
    for part, last in dims.items():
        assert dataset[part].dims == ("case", "prompt", "position", *last)
    assert not {"layer", "head"} & set(dataset.dims)
    assert dataset.component.values.tolist() == edited(name).labels
    assert_theirs(dataset, name, RECIPE_CASES, "resample")


def test_variants_are_the_single_runs(stored):
    """Along their axis; what is of the clean run has no such axis."""
    name = "neox-parallel"
    choices = {"share": 0.25, "components": "top", "mean_prompts": 3}
    dataset = stored(RECIPE, name, **choices)
    assert dataset.ablation.values.tolist() == ["resample", "mean", "half", "path"]
    for label in dataset.ablation.values.tolist():
        lent = {} if label in ("resample", "path") else {"partners": None}
        alone = stored(RECIPE, name, f"{label}.zarr", param={"only": label}, **choices | lent)
        for part in alone.data_vars:
            assert ("ablation" in dataset[part].dims) == (part not in CLEAN_ONLY), part
            values = dataset[part] if part in CLEAN_ONLY else dataset[part].sel(ablation=label)
            assert values.dims == alone[part].dims
            assert_array_equal(values, alone[part], err_msg=f"{part}, {label}")
    assert_theirs(dataset.sel(ablation="half"), name, RECIPE_CASES, Scale(0.5))
    changes = dataset.logit_change.values
    assert all(np.abs(changes[i] - changes[j]).max() > 1e-2 for i in range(4) for j in range(i))


CLEAN_ONLY = ("done", "selected", "noise_floor", "logit", "mean_logit", "target_constant", "norm_scale")
CLEAN_ONLY += ("direct_effect", "residual_norm", "component_direct_effect", "mlp_direct_effect")
CLEAN_ONLY += ("neuron_direct_effect", "threshold")


@pytest.mark.parametrize(
    ("text", "more"),
    [(RECIPE, {"param": {"only": "mean"}, "partners": None}), (REINFORCED, {})],
    ids=["cases", "variants"],
)
def test_stopped_and_resumed(stored, monkeypatch, tmp_path, text, more):
    """Bit for bit what an undisturbed run gives, means and thresholds included."""
    choices = {"batch_size": 1, "share": 0.25} | more
    stored(text, "gpt2", "whole.zarr", **choices)
    write = Store.write_prompts

    def stopping(self, block, *arguments):
        if block.start == 2:
            raise KeyboardInterrupt
        write(self, block, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_prompts", stopping)
        with pytest.raises(Incomplete, match="2 of 4 units"):
            stored(text, "gpt2", "part.zarr", **choices)
    stopped = sr.open_store(tmp_path / "part.zarr")
    finished = stopped.done.any([d for d in stopped.done.dims if d != "prompt"])
    assert finished.values.tolist() == [True, True, False, False]
    stored(text, "gpt2", "part.zarr", **choices)
    assert_same_numbers(tmp_path / "part.zarr", tmp_path / "whole.zarr")


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel"])
def test_reinforcement_in_a_store(stored, name):
    """A grid of heads by scales; each prompt is edited at the position that the store names."""
    dataset = stored(REINFORCED, name, seed=5)
    assert dataset.scale.values.tolist() == [0.0, 0.5, 2.0]
    assert dataset.inserted_direct_effect.dims == ("scale", "layer", "head", "prompt", "position")
    assert dataset.direct_effect.dims == ("layer", "head", "prompt", "position")
    where = torch.as_tensor(dataset.edited_position.values)
    assert set(where.tolist()) <= set(range(7))
    them = oracle_edits.Edited(families.build(name, exact=True), prompts(name) | {"edited_position": where})
    close(dataset.logit_change.sel(scale=0).values[dataset.selected], 0)
    for scale, head in product((0.5, 2.0), (Head(0, 1), Head(1, 0), Head(1, 1))):
        one = dataset.sel(scale=scale, layer=head.layer, head=head.head)
        theirs = them.case((plain(head),), ("reinforce", scale))
        for part in theirs.keys() & set(dataset.data_vars):
            close(one[part].values, theirs[part], err_msg=part)
        beside = np.arange(7) != where.numpy()[:, None]
        close(one.inserted_direct_effect.values[beside], 0, 0)
        assert (np.abs(one.inserted_direct_effect.values[~beside]) > 1e-6).all()
        earlier = np.arange(7) < where.numpy()[:, None]
        close(one.logit_change.values[earlier], 0)
    assert not dataset.selected.sel(layer=0, head=0)
    assert np.isnan(dataset.logit_change.sel(layer=0, head=0)).all()


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_twins_and_differences_in_a_store(stored, name):
    """Prompts of the recipe's own, with another token to compare with; attention by its distance."""
    ids = prompts(name)["tokens"].numpy()
    dataset = stored(COUNTERFACTUALS.replace("GIVEN", str(ids.tolist())), name, prompts=None)
    assert_array_equal(dataset.other, np.roll(ids, 3, 0)[:, 1:])
    assert dataset.attrs["target"] == "difference"
    assert dataset.attention.dims == ("layer", "head", "prompt", "position", "distance")
    assert dataset.distance.values.tolist() == [0, 1, 3]
    for head in (Head(0, 1), Head(2, 0)):
        theirs = expected(name, (head,), "counterfactual", target="difference")
        one = dataset.sel(layer=head.layer, head=head.head)
        for part in theirs.keys() & set(dataset.data_vars):
            close(one[part].values, theirs[part], err_msg=part)
        close(one.closure.values, 0)
        whole = one.attention.sum("distance")
        close(whole[:, :2].values, 1)
        assert (whole[:, 4:] < 1).all()


def test_neurons_go_with_the_top_components_only(stored):
    """What would silently be kept for a few tokens is refused where all were asked for."""
    with pytest.raises(UsageError, match="components 'top' or 'none'"):
        stored(RECIPE, "gpt2", param={"only": "half"}, partners=None, components="all")
