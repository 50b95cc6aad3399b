"""Units of work: what they must give is known beforehand, and their halves give the same."""

import re
from dataclasses import replace

import families
import numpy as np
import pytest
import torch
from fake_service import assert_right, computed, described, unit

from selfrepair_nn.components import select_heads
from selfrepair_nn.equations import complete
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.layout.plan import Work
from selfrepair_nn.layout.units import Unit, ablation_shapes
from selfrepair_nn.quantities import recorded
from selfrepair_nn.replacements import Reinforce
from selfrepair_nn.tracing.jobs import ablation_job
from selfrepair_nn.tracing.session import run_session

RECORDS = {
    "sums": {},
    "full": {"record": "full"},
    "neurons": {"neurons": 2, "residual_norm": True},
    "attention": {"attention": (0, 1, 2)},
    "reinforce": {"replacement": Reinforce(2.0)},
}


def real(model, record, thresholds=None):
    """An ablation unit of two layers' heads on four prompts."""
    heads = select_heads("1:", None, model.structure.n_layers, model.structure.n_heads)
    graph = Graph(ablate=sweep(heads), **{"replacement": "zero"} | RECORDS[record])
    plan = graph.plan(model.layout) | {"tokens_per_pass": 64}
    tokens = torch.as_tensor(families.random_ids(model.nn._module))

    def inputs(prompts):
        position = torch.arange(len(tokens))[prompts] % 3
        return {"tokens": tokens[prompts], "edited_position": position}

    limits = None if thresholds is None else np.full(len(heads), thresholds)
    work = Work(None, {"": graph}, model.structure, *tokens.shape, len(tokens), 64)
    shapes = ablation_shapes(plan, work.sizes, packed=limits is not None)
    return Unit("ablation", ablation_job, slice(0, len(tokens)), plan, inputs, shapes, limits)


def ran(model, unit):
    return run_session(unit.job, model.nn, unit.arrays, unit.plan)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_what_a_job_gives_is_known_beforehand(wrapped, name, record):
    model = wrapped(name)
    each = real(model, record)
    assert each.flaw(ran(model, each)) is None


@pytest.mark.parametrize("record", ["full", "neurons"])
def test_it_is_known_where_only_top_tokens_come_back(wrapped, record):
    model = wrapped("gpt2")
    each = real(model, record, thresholds=0.5)
    found = ran(model, each)
    assert each.flaw(found) is None
    name = "component_change" if record == "full" else "neuron_change"
    assert 0 < len(found[name]) < found["direct_effect"].numel() / 2


@pytest.mark.parametrize("thresholds", [None, 0.5])
@pytest.mark.parametrize("record", ["full", "neurons"])
@pytest.mark.parametrize("single", [False, True])
def test_two_halves_give_what_the_whole_gives(wrapped, record, thresholds, single):
    """Half of the prompts each, and of a single prompt half of the cases each."""
    model = wrapped("gpt2")
    each = real(model, record, thresholds)
    each = replace(each, prompts=slice(1, 2)) if single else each
    halves = each.halves()
    assert [len(h.plan["cases"]) for h in halves] == ([5, 5] if single else [10, 10])
    whole, joined = ran(model, each), each.join(*(ran(model, half) for half in halves))
    assert each.flaw(joined) is None
    for name, value in whole.items():
        torch.testing.assert_close(joined[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("thresholds", [None, 0.5])
@pytest.mark.parametrize("record", ["full", "neurons"])
def test_parts_cut_at_any_case_give_what_the_whole_gives(wrapped, record, thresholds):
    """On all prompts, and one of the parts is halved again by prompts."""
    model = wrapped("gpt2")
    each = real(model, record, thresholds)
    one, other = each.cut(3)
    halves = [ran(model, half) for half in other.halves()]
    whole, joined = ran(model, each), each.join(ran(model, one), other.join(*halves), parts=(one, other))
    assert each.flaw(joined) is None
    for name, value in whole.items():
        torch.testing.assert_close(joined[name], value, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_halved_has_no_halves():
    assert unit(3, 4, cases=1).halves() == ()


@pytest.mark.parametrize("stop", [1, 2, 3, 7])
@pytest.mark.parametrize("cases", [1, 2, 5])
def test_halves_of_halves_join_to_the_whole(stop, cases):
    def asked(each):
        halves = each.halves()
        return each.join(*map(asked, halves)) if halves else computed(*described(each))

    each = unit(0, stop, cases)
    assert_right(each, asked(each))


def test_labels_tell_all_parts_apart():
    def parts(each):
        return [each, *(part for half in each.halves() for part in parts(half))]

    every = parts(unit(0, 5, 6))
    assert len({part.label for part in every}) == len({str(described(part)) for part in every}) == len(every)


@pytest.mark.parametrize(
    ("change", "flaw"),
    [
        (lambda found: found.pop("logit"), "it holds"),
        (lambda found: found.update(more=found["logit"]), "it holds"),
        (lambda found: found["sums"]["z"].update({1: found["logit"]}), "it holds"),
        (lambda found: found.update(logit=found["logit"][:1]), r"logit has shape \(1, 3\), not \(4, 3\)"),
        (
            lambda found: found.update(logit=found["logit"].long()),
            "logit is no tensor of floating-point numbers",
        ),
        (lambda found: found.update(logit=[1.0]), "logit is no tensor"),
        (lambda found: found["changes"].mul_(float("inf")), "changes is not finite"),
    ],
)
def test_what_is_wrong_with_a_result_is_named(change, flaw):
    each = unit(0, 4)
    found = computed(*described(each))
    assert each.flaw(found) is None
    change(found)
    assert re.match(flaw, each.flaw(found))


@pytest.mark.parametrize("found", [None, [], "text", {}])
def test_what_is_no_result_is_a_flaw(found):
    assert unit(0, 4).flaw(found).startswith("it holds")


def test_what_follows_from_the_rest_is_not_asked_for():
    clean = ("logit", "target_constant", "norm_scale", "direct_effect")
    ablated = ("ablated_direct_effect", "logit_change", "from_heads", "from_mlps", "ablated_norm_scale")
    measured = {name: np.ones((1, 1)) for name in (*clean, *ablated)}
    assert complete(measured).keys() - measured.keys() == {each.name for each in recorded(("always",), "derived")}


@pytest.mark.parametrize(
    "change", [torch.Tensor.to_sparse, lambda x: x.to("meta"), lambda x: x + 0j, torch.Tensor.tolist, torch.Tensor.int]
)
def test_a_result_that_is_no_plain_tensor_is_a_flaw(change):
    whole = unit(0, 2)
    found = computed(*described(whole))
    assert whole.flaw(found) is None
    assert "logit is no tensor" in whole.flaw(found | {"logit": change(found["logit"])})
