"""Only the final residual stream is read: the same numbers, all other components as one sum."""

import families
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import selfrepair_nn as sr
from selfrepair_nn.components import Attention, FinalNorm, Head, Layers, Mlp, Parallel, PostNorms, Swap
from selfrepair_nn.equations import PARTS, complete
from selfrepair_nn.errors import UsageError
from selfrepair_nn.estimating.traffic import crossing_bytes
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.layout.plan import Work
from selfrepair_nn.options import Options
from selfrepair_nn.replacements import Reinforce, Scale
from selfrepair_nn.tracing.cases import needs, read_out, realised
from selfrepair_nn.tracing.jobs import ablation_job
from selfrepair_nn.tracing.session import run_session

SAME = ("direct_effect", "ablated_direct_effect", "logit_change", "mean_logit_change", "self_repair", "from_norm")
CASES = (
    (Head(1, 0),),
    (Head(1, 1), Head(2, 2)),
    (Attention(2),),
    (Mlp(1), Head(2, 1)),
    (Layers(1, 2),),
    (Swap(1),),
    (Parallel(0, 2),),
)
FROZEN = frozenset({Head(2, 0), Mlp(2), FinalNorm()})


@pytest.fixture
def both(wrapped, seeded):
    """both(name, **graph): the job with every component and with their sum, completed: two {name: array}."""

    def run(name, **graph):
        model, ids = wrapped(name), torch.as_tensor(seeded(name))
        arrays = {"tokens": ids, "partner_tokens": ids[families.derangement(len(ids))]}
        found = []
        for record in ("sums", "total"):
            plan = Graph(record=record, **graph).plan(model.layout) | {"tokens_per_pass": 100}
            results = run_session(ablation_job, model.nn, arrays, plan)
            found.append(complete({name: value.numpy() for name, value in results.items()}))
        return found

    return run


@pytest.mark.parametrize("freeze", [frozenset(), FROZEN], ids=["live", "frozen"])
@pytest.mark.parametrize("replacement", ["resample", "zero", Scale(0.5)], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "llama-gqa", "gemma2", "falcon-two-norms"])
def test_it_is_the_sum_of_the_parts(both, name, replacement, freeze):
    cases = CASES[:4] if isinstance(replacement, Scale) else CASES
    parts, total = both(name, ablate=cases, replacement=replacement, freeze=freeze)
    exact = 1e-6 if name == "gemma2" else 1e-10
    for each in SAME:
        assert_allclose(total[each], parts[each], rtol=0, atol=exact, err_msg=each)
    summed = sum(parts[each] for each in PARTS if each in parts)
    assert_allclose(total["from_components"], summed, rtol=0, atol=exact)
    assert np.abs(summed).max() > 1e-2
    assert not {"from_heads", "from_mlps", "from_post_norms", "closure"} & {*total}


def test_norms_behind_sublayers_are_frozen_there_too(both):
    parts, total = both("glm4", ablate=sweep([Head(1, 0), Head(2, 1)]), freeze=frozenset({PostNorms()}))
    assert_allclose(total["logit_change"], parts["logit_change"], rtol=0, atol=1e-12)


def test_a_store_of_it_is_summed_up_and_drawn(tmp_path):
    whole = {"model": "tiny-llama", "tokens": 512, "length": 32, "layers": "6:", "progress": False}
    one = sr.run(out=tmp_path / "total.zarr", split="total", **whole)
    other = sr.run(out=tmp_path / "sums.zarr", **whole)
    ours, theirs = sr.by_head(one), sr.by_head(other)
    assert_allclose(ours.top_self_repair, theirs.top_self_repair, atol=1e-5)
    parts = theirs.top_from_heads + theirs.top_from_mlps
    assert_allclose(ours.top_from_components, parts, atol=1e-5)
    said = str(sr.summary(one))
    assert "= others" in said
    assert "worst |closure| none, as nothing is split" in said
    assert max(map(len, said.splitlines())) <= 100
    assert sr.plot(tmp_path / "total.zarr")
    assert "from components" in sr.write_report(tmp_path / "total.zarr", names=()).read_text()


def test_far_less_crosses_into_a_sandbox(wrapped):
    """Two tensors where a pass begins and the one where it ends, there and back, whatever lies between."""
    structure = wrapped("gpt2").structure
    heads, prompts, length, itemsize = 50, 4, 8, 2
    found = {
        (record, count): crossing_bytes(
            Work(
                None,
                {None: Graph(ablate=sweep([Head(0, 0)]) * count, record=record)},
                structure,
                prompts,
                length,
                prompts,
                100,
            ),
            itemsize,
        )
        for record in ("sums", "total")
        for count in (1, 1 + heads)
    }
    of_a_pass = {
        record: (found[record, 1 + heads] - found[record, 1]) / heads / (prompts * length * itemsize)
        for record in ("sums", "total")
    }
    assert of_a_pass["total"] == 4 * structure.d_model
    layers = structure.n_layers
    assert of_a_pass["sums"] == (2 + 2 * (layers + 1) + 2 * (layers - 1)) * structure.d_model


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"split": "total", "components": "all"}, "split 'total' follows no component"),
        ({"split": "parts"}, "sums, total"),
    ],
)
def test_what_does_not_go_together(choices, said):
    with pytest.raises(UsageError, match=said):
        sr.Options(**choices)


def test_what_reads_more_than_the_end_is_refused():
    for more in ({"neurons": 1}, {"replacement": Reinforce(1.0)}):
        with pytest.raises(UsageError, match="final residual stream alone"):
            Graph(ablate=sweep([Head(0, 0)]), record="total", **more)


@pytest.mark.parametrize(
    ("name", "record", "probed"),
    [
        ("llama-gqa", "total", {1}),
        ("llama-gqa", "sums", {1}),
        ("llama-gqa", "full", {0, 1, 2}),
        ("glm4", "sums", {1, 2}),
    ],
)
def test_weights_are_asked_for_of_no_more_layers_than_are_told_apart(wrapped, name, record, probed):
    """Of the sums over later heads what their attention writes is enough, unless a norm stands behind it."""
    model = wrapped(name)
    plan = realised(Graph(ablate=sweep([Head(1, 0)]), record=record).plan(model.layout))
    assert read_out(plan, plan["cases"]) == probed
    compared = {"total": set(), "sums": {2}, "full": {0, 2}}[record]
    assert needs(plan, plan["cases"])["attention"] == {1} | (compared - probed)


# ---------------------------------------------------------------- what is chosen where nobody chose


SERVED = {"model": "m", "host": "http://127.0.0.1:1"}
TRENDS = {"until_ci": 0.05, "ci_of": "layers"}


@pytest.mark.parametrize(
    ("choices", "split"),
    [
        (SERVED | TRENDS, "total"),
        (SERVED | TRENDS | {"split": "sums"}, "sums"),
        (SERVED | TRENDS | {"components": "top"}, "sums"),
        (SERVED | TRENDS | {"words": 3}, "sums"),
        (SERVED | {"until_ci": 0.05}, "sums"),
        (SERVED, "sums"),
        ({"model": "m"} | TRENDS, "sums"),
    ],
    ids=str,
)
def test_layer_trends_of_a_server_are_not_split_unless_asked(choices, split):
    assert Options(**choices).split == split
