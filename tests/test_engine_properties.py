"""What must hold of a run whatever the model, the prompts and the settings: drawn at random."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import families
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import CLEAN, SWEPT
from numpy.testing import assert_allclose, assert_array_equal
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.components import Head, select_heads
from selfrepair_nn.equations import complete
from selfrepair_nn.graph import Graph, sweep
from selfrepair_nn.tracing.jobs import ablation_job, mean_job
from selfrepair_nn.tracing.session import run_session

TIGHT = 1e-10  # logits, on models that compute in float64 throughout
REPLACEMENTS = ["resample", "mean", "zero"]
CHANGES = ["logit_change", "mean_logit_change", "self_repair", "from_heads", "from_mlps", "from_norm"]
CHANGES += ["norm_on_existing", "norm_on_change", "component_change"]


def quick(examples):
    """So many examples, each as slow as a shared machine makes it."""
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class Drawn(NamedTuple):
    """A random configuration: a wrapped model, its prompts, their partners, heads, and the other choices of a run."""

    model: Any
    prompts: np.ndarray
    partners: np.ndarray
    heads: list[Head]
    choices: dict[str, Any]


@st.composite
def configurations(draw, wrapped, ablations=tuple(REPLACEMENTS), fewest=1):
    """Any family, 1 to 6 prompts of 2 to 8 tokens, any subset of heads, any convention, any freezing.

    But GPT-J, whose attention is computed in float32 whatever is asked, and so rounds by the batch.
    """
    model = wrapped(draw(st.sampled_from([name for name in families.FAMILIES if name != "gptj"])), exact=True)
    layers, heads = model.structure.n_layers, model.structure.n_heads
    n, length = draw(st.integers(fewest, 6)), draw(st.integers(2, 8))
    ids = families.random_ids(model.nn._module, n, length, seed=draw(st.integers(0, 99)))
    partners = np.array(draw(st.permutations(range(n))))
    every = list(select_heads(None, None, layers, heads))
    chosen = draw(st.lists(st.sampled_from(every), min_size=1, max_size=4, unique=True))
    choices = {
        "ablation": draw(st.sampled_from(ablations)),
        "target": draw(st.sampled_from(["centred", "raw"])),
        "value_bias": draw(st.sampled_from(["output", "head"])),
        "freeze": draw(st.sampled_from(["none", "none", "downstream", "all"])),
    }
    return Drawn(model, ids, partners, chosen, choices)


def measure(drawn, **more):
    """One run of a configuration, as a loaded dataset."""
    choices = {"heads": ",".join(map(str, drawn.heads)), "check": False} | drawn.choices | more
    if choices["ablation"] == "resample":
        choices["partners"] = drawn.partners
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run.zarr"
        return sr.run(model=drawn.model, prompts=drawn.prompts, out=out, progress=False, **choices).load()


def numbers(drawn, heads=None, **more):
    """What the job and the equations give, every component included, without a store: {name: [case, ...]}."""
    choices, structure = drawn.choices | more, drawn.model.structure
    heads, tokens = heads or drawn.heads, torch.as_tensor(drawn.prompts)
    graph = Graph(
        ablate=sweep(tuple(heads)),
        replacement=choices["ablation"],
        record="full",
        target=choices["target"],
        value_bias=choices["value_bias"],
    ).frozen(choices["freeze"], structure.n_layers, structure.n_heads)
    plan = graph.plan(drawn.model.layout) | {"tokens_per_pass": 2 * tokens.numel()}
    arrays = {"tokens": tokens, "partner_tokens": tokens[drawn.partners]}
    totals = run_session(
        mean_job, drawn.model.nn, arrays, plan | {"keep": {"z": list(range(structure.n_layers))}}
    )
    arrays["means"] = {"z": {layer: total / tokens.numel() for layer, total in totals["z"].items()}}
    found = run_session(ablation_job, drawn.model.nn, arrays, plan)
    return complete({name: values.numpy() for name, values in found.items()})


def same(actual, desired, atol=TIGHT):
    """Every stored quantity equal, NaN in the same places."""
    assert actual.data_vars.keys() == desired.data_vars.keys()
    for name in desired.data_vars:
        values = actual[name].transpose(*desired[name].dims)
        assert values.shape == desired[name].shape
        assert_allclose(values, desired[name], rtol=0, atol=atol, err_msg=name)


# ---------------------------------------------------------------- how the work is cut


@pytest.mark.parametrize("ablation", representative(REPLACEMENTS, "mean"))
@given(data=st.data())
@quick(4)
def test_batch_size_and_rows_do_not_matter(wrapped, ablation, data):
    drawn = data.draw(configurations(wrapped, ablations=(ablation,)))
    components = data.draw(st.sampled_from(["none", "all"]))
    whole = measure(drawn, batch_size=16, components=components)
    small = data.draw(st.sampled_from([1, 3]))
    rows = data.draw(st.sampled_from([1, drawn.prompts.size, 3 * drawn.prompts.size, 10**6]))
    same(measure(drawn, batch_size=small, tokens_per_pass=rows, components=components), whole)
    assert np.isfinite(whole.where(whole.selected, 0).to_array()).all()
    assert whole.logit.shape == (drawn.prompts.shape[0], drawn.prompts.shape[1] - 1)


@pytest.mark.parametrize("ablation", representative(REPLACEMENTS, "resample"))
@given(data=st.data())
@quick(3)
def test_layers_apart_or_together(wrapped, ablation, data):
    """The first layer and the others, in two runs and in one."""
    drawn = data.draw(configurations(wrapped, ablations=(ablation,)))
    whole, first, others = (measure(drawn, heads=None, layers=layers) for layers in (None, "0:1", "1:"))
    same(xr.concat([first, others], "layer", data_vars="minimal", coords="minimal", compat="equals"), whole)


@given(data=st.data())
@quick(20)
def test_the_order_of_heads_does_not_matter(wrapped, data):
    """For the job too, where the cases may come in any order and any company."""
    drawn = data.draw(configurations(wrapped))
    shuffled = data.draw(st.permutations(drawn.heads))
    together = numbers(drawn, heads=shuffled)
    apart = {head: numbers(drawn, heads=[head]) for head in drawn.heads}
    for index, head in enumerate(shuffled):
        for name in (*SWEPT, "component_change"):
            assert_allclose(together[name][index], apart[head][name][0], rtol=0, atol=TIGHT, err_msg=name)


def test_the_order_of_the_specification_does_not_matter(wrapped, tmp_path):
    model = wrapped("gpt2", exact=True)
    ids = families.random_ids(model.nn._module)
    stores = [
        sr.run(model=model, prompts=ids, heads=heads, out=tmp_path / f"{i}.zarr", progress=False).load()
        for i, heads in enumerate(["0.1,2.3,1.0", "L2H3,1.0,0.1,1.0"])
    ]
    same(stores[1], stores[0], atol=0)


@pytest.mark.parametrize("ablation", representative(REPLACEMENTS, "resample"))
@given(data=st.data())
@quick(4)
def test_permuted_prompts_give_permuted_results(wrapped, ablation, data):
    drawn = data.draw(configurations(wrapped, ablations=(ablation,), fewest=2))
    order = np.array(data.draw(st.permutations(range(len(drawn.prompts)))))
    inverse = np.argsort(order)
    moved = drawn._replace(prompts=drawn.prompts[order], partners=inverse[drawn.partners[order]])
    size = data.draw(st.sampled_from([1, 3, 16]))
    ours = measure(drawn).drop_vars("noise_floor")  # of the first two prompts
    theirs = measure(moved, batch_size=size).drop_vars("noise_floor")
    same(theirs, ours.isel(prompt=order))
    assert_array_equal(theirs.token, ours.token[order])


@pytest.mark.parametrize("ablation", representative(["zero", "mean"], "mean"))
@given(data=st.data())
@quick(4)
def test_one_prompt_is_enough(wrapped, ablation, data):
    """The smallest batch: alone, a prompt gives what it gives in company."""
    drawn = data.draw(configurations(wrapped, ablations=(ablation,)))
    of_runs = ["noise_floor", "threshold"]
    every = measure(drawn, mean_prompts=1).drop_vars(of_runs)
    alone = drawn._replace(prompts=drawn.prompts[:1])
    same(measure(alone).drop_vars(of_runs), every.isel(prompt=[0]))


# ---------------------------------------------------------------- what the numbers must be


@given(data=st.data())
@quick(20)
def test_identity_changes_nothing(wrapped, data):
    found = numbers(data.draw(configurations(wrapped, ablations=("identity",))))
    for name in CHANGES:
        assert_allclose(found[name], 0, atol=TIGHT, err_msg=name)
    assert_allclose(found["ablated_norm_scale"] - found["norm_scale"], 0, atol=TIGHT)
    assert_allclose(found["ablated_direct_effect"], found["direct_effect"], rtol=0, atol=TIGHT)


@given(data=st.data())
@quick(20)
def test_conversion_of_targets(wrapped, data):
    """raw = centred + mean, of the logits and of their changes."""
    drawn = data.draw(configurations(wrapped))
    centred, raw = (numbers(drawn, target=target) for target in ("centred", "raw"))
    for name in ("logit", "logit_change"):
        assert_allclose(raw[name], centred[name] + centred[f"mean_{name}"], rtol=0, atol=TIGHT, err_msg=name)
    for name in ("mean_logit", "mean_logit_change", "norm_scale", "ablated_norm_scale"):
        assert_allclose(raw[name], centred[name], rtol=0, atol=TIGHT, err_msg=name)


@given(data=st.data())
@quick(20)
def test_equations_close(wrapped, data):
    """Equations 1 and 2 and Appendix B; and the components add up to both logits."""
    found = numbers(data.draw(configurations(wrapped)))
    own = found["ablated_direct_effect"] - found["direct_effect"]
    effects = found["logit"] - found["target_constant"]
    summed, change = found["component_direct_effect"].sum(-1), found["component_change"].sum(-1)
    stretch = found["norm_scale"] / found["ablated_norm_scale"]
    for left, right in [
        (found["closure"], 0),
        (found["self_repair"], found["logit_change"] - own),
        (found["from_norm"], found["norm_on_existing"] + found["norm_on_change"]),
        (summed, effects),
        (change, own + found["from_heads"] + found["from_mlps"]),
        (found["logit_change"], stretch * (summed + change) - effects),
    ]:
        assert_allclose(left, right, rtol=0, atol=TIGHT)


@given(data=st.data())
@quick(20)
def test_value_bias_only_moves_a_constant(wrapped, data):
    """Resample and mean ablation lose the same whichever component owns a head's constant part."""
    drawn = data.draw(configurations(wrapped, ablations=("resample", "mean")))
    head, output = (numbers(drawn, value_bias=owner) for owner in ("head", "output"))
    for found in (head, output):
        found["own_change"] = found["ablated_direct_effect"] - found["direct_effect"]
    for name in (*CLEAN, "own_change", "logit_change", "self_repair", "from_heads", "from_mlps", "from_norm"):
        assert_allclose(head[name], output[name], rtol=0, atol=TIGHT, err_msg=name)
