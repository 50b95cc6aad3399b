"""Attention edges and values that are taken away: against eager attention that is masked, and by identities."""

from functools import cache
from types import SimpleNamespace

import families
import numpy as np
import oracle_edges
import oracle_edits
import pytest
import torch
from numpy.testing import assert_allclose
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn.components import Attention, Head, Mlp
from selfrepair_nn.edges import KnockOut, ZeroValues
from selfrepair_nn.equations import complete
from selfrepair_nn.errors import SelfRepairError, UsageError
from selfrepair_nn.graph import Graph
from selfrepair_nn.models.load import wrap
from selfrepair_nn.prompts import Prompts
from selfrepair_nn.tracing.jobs import ablation_job
from selfrepair_nn.tracing.session import run_session

TIGHT = 1e-9
LENGTH, N = 19, 4  # longer than any head is wide
FAMILIES = ("gpt2", "neox-parallel", "llama-gqa", "mistral-sliding", "llama-headdim")
ODD = ("bloom", "gemma2", "gpt-oss", "olmo2", "deepseek-v3", "lfm2")  # ALiBi, caps, sinks, norms behind, latent values
PAIRS = [[(5, 2), (18, 0)], [(3, 3)], [], [(7, 1), (7, 2), (7, 3)]]
EDGES = {
    "previous": KnockOut(back=1),
    "some back": KnockOut(back=(0, 3)),
    "first": KnockOut(keys=0),
    "keys of each": KnockOut(keys=[[0, 2], [4], [], [18]]),
    "most": KnockOut(most=1),
    "two most": KnockOut(most=2),
    "pairs": KnockOut(edges=[(9, 4), (9, 9), (2, 0)]),
    "pairs of each": KnockOut(edges=PAIRS),
    "several": KnockOut(back=1, keys=(0, 3), most=1, edges=PAIRS),
}


@cache
def prompts(name):
    ids = torch.as_tensor(families.random_ids(families.build(name), N, LENGTH))
    return {"tokens": ids, "partner_tokens": ids, "counterfactual_tokens": ids, "edited_position": ids[:, 0]}


def built(name, **choices):
    """Of a family, without a cap behind its logits, which the oracle does not know."""
    model = families.build(name, exact=True, **choices)
    model.config.final_logit_softcapping = None
    return model


@cache
def engine(name):
    return wrap(built(name))


@cache
def masked(name, value_bias):
    """The oracle on an eager model whose softmax keeps float64."""
    model = built(name, attention="eager")
    with oracle_edges.cutting(model):
        return oracle_edits.Edited(model, prompts(name), "centred", value_bias)


@cache
def paid(name):
    """The attention of each layer: [prompt, head, query, key]."""
    them = masked(name, "output")
    with oracle_edges.cutting(them.parts.model) as found:
        them.run(them.ids, oracle_edits.Edits())
    return {layer: x[..., :LENGTH] for layer, x in found.items()}


def edges_of(name, site, given):
    """By plain loops: bool [prompt, query, key]."""
    found = torch.zeros(N, LENGTH, LENGTH, dtype=torch.bool)
    keys = {"keys of each": [[0, 2], [4], [], [18]], "first": [[0]] * N, "several": [[0, 3]] * N}.get(given, [[]] * N)
    of_each = PAIRS if given in ("pairs of each", "several") else [[]] * N
    pairs = {"pairs": [[(9, 4), (9, 9), (2, 0)]] * N}.get(given, of_each)
    back = {"previous": (1,), "some back": (0, 3), "several": (1,)}.get(given, ())
    most = {"most": 1, "two most": 2, "several": 1}.get(given, 0)
    for prompt in range(N):
        for query in range(LENGTH):
            row = paid(name)[site.layer][prompt, site.head, query]
            found[prompt, query, row.argsort(descending=True, stable=True)[:most]] = True
            for key in range(query + 1):
                found[prompt, query, key] |= query - key in back or key in keys[prompt] or (query, key) in pairs[prompt]
    return found


def without(name, sites, given, live, value_bias):
    """What each head reads out without its edges: {("head", layer, head): z [prompt, T, head_dim]}."""
    them, edges = masked(name, value_bias), {}
    for site in sites:
        edges.setdefault(site.layer, {})[site.head] = edges_of(name, site, given)
    left = {s: paid(name)[s.layer][:, s.head].masked_fill(edges[s.layer][s.head], 0).sum(-1) for s in sites}
    sinks = name == "gpt-oss"
    for site in sites if live and not sinks else ():  # a row of -inf alone is no softmax
        edges[site.layer][site.head] &= (left[site] > 0)[..., None]
    found = dict(oracle_edges.without(them, edges, live))
    for site in sites:
        where = ("head", site.layer, site.head)
        constant, kept = them._constant(where), left[site][..., None]
        if not live:
            found[where] = found[where] + (1 - kept) * constant
        elif not sinks:
            found[where] = torch.where(kept > 0, found[where], constant)
    return found


def run(model, name, ablate, replacement, **graph):
    """The engine on the block, completed by the equations: {name: array}."""
    place = SimpleNamespace(order=np.arange(N), precision="float64")
    more = replacement.arrays(place, slice(0, N)) if not isinstance(replacement, str) else {}
    arrays = prompts(name) | {key: torch.as_tensor(value) for key, value in more.items()}
    plan = Graph(ablate=tuple(ablate), replacement=replacement, **graph).plan(model.layout)
    with oracle_edges.cutting(model.module):  # some have eager attention alone, whose softmax is float32
        found = run_session(ablation_job, model.nn, arrays, plan | {"tokens_per_pass": 10**4})
    return complete({key: value.numpy() for key, value in found.items()})


def softened(replacement, softmax):
    """The same edges under another softmax."""
    said = {name: getattr(replacement, name) for name in ("back", "most")}
    keys, edges = replacement.keys, replacement.edges
    said["keys"] = keys if isinstance(keys, tuple) else lists(keys)
    said["edges"] = None if edges is None else [[pair for pair in row if pair[0] >= 0] for row in edges.values.tolist()]
    return KnockOut(softmax, **said)


def lists(fixed):
    return [[each for each in row if each >= 0] for row in fixed.values.tolist()]


def agree(found, index, theirs, **said):
    assert len(theirs.keys() & found.keys()) >= 7
    for part in theirs.keys() & found.keys():
        mine, other = found[part][index], theirs[part].numpy()
        assert np.isfinite(mine).all()
        size = max(1.0, np.abs(other).max())
        assert_allclose(mine, other, rtol=0, atol=TIGHT * size, err_msg=f"{part} {said}")


TRIALS = [(name, [*EDGES][(2 * i + turn) % 8]) for i, name in enumerate((*FAMILIES, *ODD)) for turn in (0, 1)]
TRIALS += [(name, "several") for name in ("neox-parallel", "llama-gqa", "gpt-oss", "gemma2")]


EVERY_RUN = [("gpt2", "some back"), ("neox-parallel", "keys of each"), ("llama-gqa", "two most")]
EVERY_RUN += [("mistral-sliding", "pairs of each"), ("llama-headdim", "previous"), ("llama-gqa", "several")]
EVERY_RUN += [("bloom", "first"), ("gemma2", "several"), ("gpt-oss", "several"), ("olmo2", "previous")]
EVERY_RUN += [("deepseek-v3", "first"), ("lfm2", "most"), ("gpt-oss", "pairs")]


@pytest.mark.parametrize("trial", representative(TRIALS, *EVERY_RUN), ids="-".join)
def test_knocked_out_edges(trial):
    """A head alone, two in a case and a whole layer; both softmaxes; both conventions of the value bias."""
    name, given = trial
    model = engine(name)
    layers = [n for n in range(model.structure.n_layers) if n not in model.structure.headless]
    early, late = Head(layers[0], 1), Head(layers[-1], 0)
    whole = tuple(Head(layers[-1], head) for head in range(model.structure.n_heads))
    ablate = [(early,), (late,), (early, late), (Attention(layers[-1]),)]
    cases = [(early,), (late,), (early, late), whole]
    for softmax, value_bias in (("live", "output"), ("frozen", "head" if given in ("first", "most") else "output")):
        found = run(model, name, ablate, softened(EDGES[given], softmax), value_bias=value_bias)
        for index, case in enumerate(cases):
            z = without(name, case, given, softmax == "live", value_bias)
            with oracle_edges.cutting(masked(name, value_bias).parts.model):
                theirs = masked(name, value_bias).case(list(z), ("given", z))
            agree(found, index, theirs, case=case, softmax=softmax, value_bias=value_bias)
        assert np.abs(found["logit_change"]).max() > 1e-3
        assert np.abs(found["closure"]).max() < TIGHT * max(1, np.abs(found["logit_change"]).max())


def test_the_log_probability_too():
    """Its own write is what the head would have read out without the edge."""
    name = "llama-gqa"
    found = run(engine(name), name, [(Head(1, 2),)], KnockOut(back=1), also=("logprob",))
    z = without(name, [Head(1, 2)], "previous", True, "output")
    with oracle_edges.cutting(masked(name, "output").parts.model):
        theirs = masked(name, "output").in_nats(list(z), ("given", z))
    agree(found, 0, theirs)


# ---------------------------------------------------------------- values, and identities


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "llama-gqa"])
def test_zeroed_values(name):
    """By zeroing what the value projection gives, which all heads of a group read; and as edges that are cut."""
    model, them = engine(name), masked(name, "head")
    group = model.structure.n_heads // model.structure.n_kv_heads
    heads, positions = [Head(1, head) for head in range(group)], [[0, 3], [7], [18], []]
    z = read_without_values(model, name, 0, positions)
    given = {("head", 1, head.head): z[:, :, head.head] for head in heads}
    with oracle_edges.cutting(them.parts.model):
        theirs = them.case(list(given), ("given", given))
    for replacement in (ZeroValues(positions), KnockOut("frozen", keys=positions)):
        agree(run(model, name, [tuple(heads)], replacement, value_bias="head"), 0, theirs)
    assert ZeroValues(positions).word.startswith("zerovalues_")
    assert ZeroValues(0).word == "zerovalues_0"


def read_without_values(model, name, kv_head, positions):
    """z of layer 1 where the values of a key-value head are zeroed at positions of each prompt, by a plain hook."""
    s, seen = model.structure, {}
    layer = model.module.get_submodule(s.places["layers"])[1]

    def zero(module, args, output):
        output = output.clone()
        if s.places["value_layout"] == "interleaved":
            values = output.unflatten(-1, (s.n_kv_heads, -1))[..., -s.d_head :]
        else:
            values = output[..., -s.n_kv_heads * s.d_head :].unflatten(-1, (s.n_kv_heads, s.d_head))
        for prompt, some in enumerate(positions):
            values[prompt, some, kv_head] = 0
        return output

    handles = [layer.get_submodule(s.places["value"]).register_forward_hook(zero)]
    projection = layer.get_submodule(s.places["output_projection"])
    handles.append(projection.register_forward_pre_hook(lambda _, args: seen.update(z=args[0].clone())))
    with torch.no_grad():
        model.module(prompts(name)["tokens"], use_cache=False)
    for handle in handles:
        handle.remove()
    return seen["z"].unflatten(-1, (s.n_heads, s.d_head))


@pytest.mark.parametrize("name", ["neox-parallel", "gpt-oss", "olmo2"])
@pytest.mark.parametrize("softmax", ["live", "frozen"])
def test_without_any_edge_a_head_is_zero(name, softmax):
    """Under either convention: what no input changes stays where it counts with the output bias."""
    every = tuple(range(LENGTH))
    for value_bias in ("output", "head"):
        ablate = [(Head(1, 0),), (Attention(2),)]
        cut, zero = (
            run(engine(name), name, ablate, by, value_bias=value_bias) for by in (KnockOut(softmax, keys=every), "zero")
        )
        for part, values in zero.items():
            assert_allclose(cut[part], values, rtol=0, atol=TIGHT * max(1, np.abs(values).max()), err_msg=part)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_edges_that_carry_nothing(dtype):
    """A prompt without one, and edges beyond a sliding window: nothing changes at all, in any number format."""
    model = wrap(families.build("mistral-sliding").to(dtype))
    far = KnockOut(edges=[[(18, 0), (17, 3)], [], [(9, 1)], []])
    for softmax in ("live", "frozen"):
        found = run(model, "mistral-sliding", [(Head(0, 1),)], softened(far, softmax))
        for part in ("logit_change", "from_mlps", "from_heads"):
            assert not found[part].any()
        assert (found["ablated_direct_effect"] == found["direct_effect"]).all()


def test_what_is_left_of_a_head_that_pays_nearly_all_to_one_token():
    """In float32 as in float64: what is kept is summed, not subtracted from 1."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        module = families.build("llama-gqa").to(dtype)
        with torch.no_grad():  # queries and keys five times as long: attention is as good as one token's
            for layer in module.model.layers:
                layer.self_attn.q_proj.weight.mul_(5)
        found[dtype] = run(wrap(module), "llama-gqa", [(Head(1, 2),), (Head(2, 0),)], KnockOut(most=1))
    exact, coarse = found.values()
    assert np.median(np.abs(exact["logit_change"])) > 0.1
    for part in ("ablated_direct_effect", "logit_change"):
        assert np.quantile(np.abs(coarse[part] - exact[part]), 0.95) < 1e-3 * np.abs(exact[part]).max()


# ---------------------------------------------------------------- in a run

RECIPE = """
"Edges."
import selfrepair_nn as sr

def graph(structure, options):
    heads = [sr.Head(1, 0), sr.Head(2, 1)]
    pairs = [[(5, 2)], [(6, 1), (6, 2)], [(4, 4)], []]
    by = {"live": sr.KnockOut(edges=pairs), "most": sr.KnockOut(most=1), "values": sr.ZeroValues([[1], [2], [3], [4]])}
    return sr.Variants("cut", {name: sr.Graph(ablate=sr.sweep(heads), replacement=one) for name, one in by.items()})
"""


def test_edges_in_a_store(wrapped, seeded, tmp_path):
    """Whatever the blocks and the passes, here and as it travels; and the run says what was cut."""
    (tmp_path / "edges.py").write_text(RECIPE)
    choices = {"model": wrapped("llama-gqa", exact=True), "prompts": seeded("llama-gqa"), "progress": False}
    runs = [{"batch_size": 4}, {"batch_size": 1, "tokens_per_pass": 16}, {"batch_size": 3, "backend": "simulated"}]
    outs = [tmp_path / f"{i}.zarr" for i in range(len(runs))]
    both = zip(outs, runs, strict=True)
    found = [sr.run(tmp_path / "edges.py", out=out, **choices, **more).load() for out, more in both]
    for other in found[1:]:
        for part in ("logit_change", "ablated_direct_effect", "self_repair"):
            assert_allclose(other[part], found[0][part], rtol=0, atol=1e-10)
    changed = np.abs(found[0].logit_change.sel(cut="live").where(found[0].selected)).max(("layer", "head"))
    assert not changed[0, :5].any()
    assert changed[0, 5] > 1e-3
    assert not changed[3].any()
    kinds = found[0].ablation.item().split(", ")
    assert [kind.split("_")[0] for kind in kinds] == ["knockout", "knockout", "zerovalues"]


def test_other_edges_are_another_run(wrapped, seeded, tmp_path):
    (tmp_path / "edges.py").write_text(RECIPE)
    choices = {"model": wrapped("llama-gqa", exact=True), "prompts": seeded("llama-gqa"), "progress": False}
    sr.run(tmp_path / "edges.py", out=tmp_path / "x.zarr", **choices)
    sr.run(tmp_path / "edges.py", out=tmp_path / "x.zarr", **choices)
    (tmp_path / "edges.py").write_text(RECIPE.replace("(6, 1)", "(6, 3)"))
    with pytest.raises(SelfRepairError, match="something else is done to them"):
        sr.run(tmp_path / "edges.py", out=tmp_path / "x.zarr", **choices)


def test_edges_that_are_none():
    """Each is told in one line, with what is valid; those that the prompts do not have before anything runs."""
    for wrong, told in (
        ({}, "cuts no edge: say which"),
        ({"edges": []}, "cuts no edge: say which"),
        ({"back": -1}, "back must be a whole number"),
        ({"back": "previous"}, "back 'previous' is not understood: give numbers of tokens back"),
        ({"keys": 0.5}, "keys must be a whole number"),
        ({"edges": [(2, 5)]}, r"edge \(2, 5\): a token attends to itself and to earlier ones"),
        ({"edges": [(2,)]}, r"give pairs \(query, key\)"),
        ({"back": 1, "softmax": "hot"}, "softmax 'hot' is not known; choose one of live, frozen"),
    ):
        with pytest.raises(UsageError, match=told):
            KnockOut(**wrong)
    with pytest.raises(UsageError, match=r"L1.mlp: KnockOut is for heads"):
        Graph(ablate=((Mlp(1),),), replacement=KnockOut(back=1))
    rows = Prompts(np.ones((3, 8), int), np.arange(3), {})
    for wrong, told in (
        (KnockOut(back=8), "back 8: prompts of 8 tokens have positions 0 to 7"),
        (KnockOut(keys=(0, 9)), "keys 9: prompts of 8 tokens have positions 0 to 7"),
        (KnockOut(edges=[(8, 1)]), "edges 8: prompts of 8 tokens have positions 0 to 7"),
        (KnockOut(keys=[[0], [1]]), "keys for 2 prompts: there are 3, in the order of the text"),
        (ZeroValues([[0], [1], [2], [3]]), "keys for 4 prompts: there are 3, in the order of the text"),
    ):
        assert wrong.amiss(rows) == told
    assert KnockOut(back=1, keys=[[0], [1], [2]]).amiss(rows) is None


def test_a_place_that_no_prompt_has_is_told_before_anything_runs(wrapped, seeded, tmp_path):
    (tmp_path / "edges.py").write_text(RECIPE.replace("(4, 4)", "(9, 4)"))
    choices = {"model": wrapped("llama-gqa", exact=True), "prompts": seeded("llama-gqa"), "progress": False}
    with pytest.raises(UsageError, match="edges 9: prompts of 8 tokens have positions 0 to 7"):
        sr.run(tmp_path / "edges.py", out=tmp_path / "x.zarr", **choices)
    assert not (tmp_path / "x.zarr").exists()
