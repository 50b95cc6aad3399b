"""The recipe `neurons` and what is made of its stores: against plain hooks in float64 and naive code."""

import families
import numpy as np
import oracle
import pytest
import torch
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.analysis import neurons as analysis
from selfrepair_nn.analysis.recurrence import recurring
from selfrepair_nn.errors import Incomplete, StoreError, UsageError
from selfrepair_nn.running import run as running
from selfrepair_nn.store import Store

MODELS = ["gpt2", "neox-parallel", "llama-tied"]
DOWN = {"gpt2": "c_proj", "neox-parallel": "dense_4h_to_h", "llama-tied": "down_proj"}
COUNT, SHARE, PROMPTS, LENGTH = 2, 0.4, 6, 9
TOKENS = PROMPTS * (LENGTH - 1)
TOP = int(SHARE * TOKENS)
FUNCTIONS = [sr.erasure_neurons, sr.neuron_sparsity, sr.neuron_changes, sr.neuron_consistency]


@pytest.fixture(scope="module")
def stored(wrapped, seeded, tmp_path_factory):
    """stored(name): the finished store of the recipe on an exact model; made once, nobody may change it."""
    made = {}

    def found(name):
        if name not in made:
            out = tmp_path_factory.mktemp("neurons") / f"{name}.zarr"
            made[name] = sr.run("neurons", out=out, **choices(wrapped, seeded, name))
        return made[name]

    return found


def choices(wrapped, seeded, name, **more):
    """What the recipe is run with in these tests."""
    found = {"model": wrapped(name, exact=True), "prompts": seeded(name, PROMPTS, LENGTH), "share": SHARE}
    found |= {"partners": families.derangement(PROMPTS), "batch_size": 2, "param": {"count": COUNT}}
    return found | {"progress": False} | more


@pytest.fixture(scope="module")
def hooked(wrapped, seeded):
    """hooked(name): what plain hooks see, {(layer, head): {what: array}}; tokens are flattened."""
    made = {}

    def found(name):
        if name not in made:
            made[name] = by_hooks(
                wrapped(name, exact=True).nn._module, seeded(name, PROMPTS, LENGTH), DOWN[name]
            )
        return made[name]

    return found


def by_hooks(model, ids, down):
    """Direct effects of every neuron of the last MLP, before and after each head's ablation, from the weights alone."""
    parts, tokens = oracle.find_parts(model), torch.as_tensor(ids)
    partners = families.derangement(len(ids))
    down = getattr(parts.layers[-1].mlp, down)
    weight = down.weight.detach().double()
    weight = weight.T if isinstance(down, torch.nn.Linear) else weight  # [neuron, d_model]
    rows = model.get_output_embeddings().weight.detach().double()
    target = rows[tokens[:, 1:]] - rows.mean(0)
    direction = oracle.centre(parts.final_norm, oracle.gain(parts.final_norm) * target)
    seen = []
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().double()))
    clean = oracle.run(parts, tokens)
    scale = oracle.scale(parts.final_norm, clean.final)[:, :-1]

    def effects():
        return (seen[-1][:, :-1] * (direction @ weight.T) / scale[..., None]).flatten(0, 1).numpy()

    mlp_effect = ((clean.mlp[len(parts.layers) - 1][:, :-1] * direction).sum(-1) / scale).flatten().numpy()
    before, numbers, found = effects(), oracle.reference(model, ids, partners=partners), {}
    for layer in range(len(parts.layers)):
        for head in range(parts.n_heads):
            oracle.run(parts, tokens, set_heads={(layer, head): clean.z[layer][partners][:, :, head]})
            found[layer, head] = {"clean": before, "change": effects() - before, "mlp_effect": mlp_effect}
            found[layer, head] |= {
                n: numbers[n][layer, head].ravel() for n in ("direct_effect", "self_repair")
            }
    handle.remove()
    return found


def highest(values, share=SHARE):
    """The tokens of the top share, in order."""
    return np.sort(np.argsort(-values, kind="stable")[: max(1, int(share * len(values)))])


def chosen(seen, name):
    """The heads that the recipe should find: of those of the later half before the last MLP, the largest means."""
    n_layers = 1 + max(layer for layer, _ in seen)
    layers = range(n_layers // 2, n_layers - (name == "neox-parallel"))
    return sorted((h for h in seen if h[0] in layers), key=lambda h: -seen[h]["direct_effect"].mean())[:COUNT]


def heads_of(found):
    return list(zip(found["layer"].values.tolist(), found["head"].values.tolist(), strict=True))


def same(actual, desired):
    assert_allclose(actual, desired, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_the_recipe_finds_the_loudest_heads_itself(stored, hooked, name):
    ds = stored(name)
    at = np.argwhere(ds.selected.values)
    assert {(int(ds["layer"][i]), int(ds["head"][j])) for i, j in at} == set(chosen(hooked(name), name))
    assert ds.done.sum() == COUNT * PROMPTS


@pytest.mark.parametrize("name", MODELS)
def test_neurons_are_those_of_plain_hooks(stored, hooked, name):
    ds, seen = stored(name), hooked(name)
    assert ds.attrs["recorded_mlp"] == f"L{ds.attrs['n_layers'] - 1}.mlp"
    same(ds.mlp_direct_effect.values.ravel(), next(iter(seen.values()))["mlp_effect"])
    for layer, head in chosen(seen, name):
        mine, expected = ds.sel(layer=layer, head=head), seen[layer, head]
        top = highest(expected["direct_effect"])
        for variable, what in (("neuron_change", "change"), ("neuron_direct_effect", "clean")):
            rows = mine[variable].values.reshape(TOKENS, -1)
            same(rows[top], expected[what][top])
            assert np.isnan(np.delete(rows, top, axis=0)).all()
        same(mine.mlp_change.values.ravel(), expected["change"].sum(1))
        which = mine.top_neuron.values.reshape(TOKENS, -1)
        most = mine.top_neuron_change.values.reshape(TOKENS, -1)
        same(most, -np.sort(-expected["change"])[:, : most.shape[1]])
        same(most, np.take_along_axis(expected["change"], which, 1))
        same(
            mine.top_neuron_direct_effect.values.reshape(TOKENS, -1),
            np.take_along_axis(expected["clean"], which, 1),
        )


@pytest.mark.parametrize("name", MODELS)
def test_erasure_is_that_of_the_neuron_that_repairs_most(stored, hooked, name):
    found, seen = sr.erasure_neurons(stored(name), SHARE), hooked(name)
    assert heads_of(found) == chosen(seen, name)
    for rank, key in enumerate(chosen(seen, name)):
        one, expected = found.isel(rank=rank), seen[key]
        top = highest(expected["change"].sum(1))
        which = expected["change"][top].argmax(1)
        assert_array_equal(one.prompt * (LENGTH - 1) + one.position, top)
        assert_array_equal(one.neuron, which)
        clean, change = expected["clean"][top, which], expected["change"][top, which]
        same(one.neuron_direct_effect, clean)
        same(one.ablated_neuron_direct_effect, clean + change)
        same(one.mlp_direct_effect, expected["mlp_effect"][top])
        same(one.mlp_change, expected["change"][top].sum(1))
        same(one.anti_erasing, np.mean((clean < 0) & (change > 0)))
        same(one.mlp_positive, np.mean(expected["mlp_effect"][top] > 0))


@pytest.mark.parametrize("name", MODELS)
def test_sparsity_counts_tokens_place_by_place(stored, hooked, name):
    found, seen = sr.neuron_sparsity(stored(name), SHARE), hooked(name)
    for rank, key in enumerate(chosen(seen, name)):
        expected = seen[key]
        top = highest(expected["direct_effect"])
        for part in (0.5, 0.1, 0.05, 0.02, 0.01):
            for place in (1, 2, 7, 40):
                hits = 0
                for token in top:
                    effect = expected["direct_effect"][token]
                    hits += effect > 0 and sorted(expected["change"][token])[-place] >= part * effect
                assert float(found.repairs.sel(part=part, place=place)[rank]) == pytest.approx(
                    hits / len(top)
                )
        assert found.stored_tokens[rank] == TOP == found.top_tokens[rank]


@pytest.mark.parametrize("block", [1, 40, 2**22])
@pytest.mark.parametrize("name", MODELS)
def test_changes_of_every_neuron(stored, hooked, name, block, monkeypatch):
    monkeypatch.setattr(analysis, "BLOCK", block)
    found, seen = sr.neuron_changes(stored(name), SHARE), hooked(name)
    for rank, key in enumerate(chosen(seen, name)):
        one, expected = found.isel(rank=rank), seen[key]
        top = highest(expected["direct_effect"])
        change = expected["change"][top].mean(0)
        order = np.argsort(-change)
        assert_array_equal(one.neuron, order)
        same(one.change, change[order])
        sizes = np.abs(expected["change"][top]).mean(0)[order]
        same(one.change_size, sizes)
        same(one.cumulative_size, [sizes[: i + 1].sum() / sizes.sum() for i in range(len(sizes))])
        same(one.median_direct_effect, np.median(expected["clean"][top], axis=0)[order])
        assert one.rising == (change > 0).sum()


@pytest.mark.parametrize("name", MODELS)
def test_consistency_counts_tokens_prompts_and_pairs(stored, hooked, name):
    found, seen = sr.neuron_consistency(stored(name), SHARE), hooked(name)
    for rank, key in enumerate(chosen(seen, name)):
        one, expected = found.isel(rank=rank), seen[key]
        top = highest(expected["self_repair"])
        ten = [
            {n for n in np.argsort(-expected["change"][t])[:10] if expected["change"][t, n] > 0} for t in top
        ]
        prompt = top // (LENGTH - 1)
        for place in (0, 1, 5, 20):
            neuron = int(one.neuron[place])
            having = [neuron in of_token for of_token in ten]
            assert float(one.in_tokens[place]) == pytest.approx(np.mean(having))
            in_prompts = len({p for p, has in zip(prompt, having, strict=True) if has}) / len(set(prompt))
            assert float(one.in_prompts[place]) == pytest.approx(in_prompts)
        assert (np.diff(one.in_tokens) <= 0).all()
        pairs = [(i, j) for i in range(len(top)) for j in range(i)]
        within = [len(ten[i] & ten[j]) for i, j in pairs if prompt[i] == prompt[j]]
        between = [len(ten[i] & ten[j]) for i, j in pairs if prompt[i] != prompt[j]]
        assert float(one.shared_within) == pytest.approx(np.mean(within))
        assert float(one.shared_between) == pytest.approx(np.mean(between))


def test_recurring_neurons_by_hand():
    named = np.array([[0, 1], [0, 2], [0, -1]])
    found = recurring(named, np.array([4, 4, 7]), 4, np.arange(8))
    assert_array_equal(found["neuron"], [0, 1, 2, 3])
    assert_allclose(found["in_tokens"], [1, 1 / 3, 1 / 3, 0])
    assert_allclose(found["in_prompts"], [1, 1 / 2, 1 / 2, 0])
    assert found["shared_within"] == 1
    assert found["shared_between"] == 1


def test_a_token_of_no_positive_direct_effect_is_not_repaired(stored):
    ds = stored("gpt2").load()
    found = sr.neuron_sparsity(ds.assign(direct_effect=ds.direct_effect - 1e6), SHARE)
    assert (found.stored_tokens == TOP).all()
    assert not found.repairs.any()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_partly_done_store_counts_what_is_done(stored, function):
    ds = stored("llama-tied").load()
    part = ds.assign(done=ds.done & (ds.prompt < 4))
    first = ds.isel(prompt=slice(4)).assign_attrs(ds.attrs)
    blank = {name: part[name].where(part.done) for name in ("self_repair", "mlp_change", "direct_effect")}
    xr.testing.assert_allclose(
        function(part.assign(blank), SHARE / 2).drop_vars(["noise_floor"]),
        function(first, SHARE / 2).drop_vars(["noise_floor"]),
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_stores_without_neurons_are_refused(function):
    with pytest.raises(UsageError, match="run the recipe neurons"):
        function(sr.simulate_heads(2, 2, 4, 5))


@pytest.mark.parametrize("function", [sr.neuron_sparsity, sr.neuron_changes])
def test_a_share_beyond_what_is_stored_is_refused(stored, function):
    with pytest.raises(UsageError, match=r"give 0\.4 or less"):
        function(stored("gpt2"), 0.5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_variable_says_what_it_is(stored, function):
    for name, values in function(stored("gpt2"), SHARE).data_vars.items():
        assert values.attrs.keys() >= {"units", "long_name"} or name == "selected", name


# Finding the heads


def test_a_run_resumes_with_the_heads_it_found(wrapped, seeded, tmp_path, stored, monkeypatch):
    asked = choices(wrapped, seeded, "gpt2", out=tmp_path / "s.zarr")
    write, units = Store.write_prompts, []

    def once(store, *arguments):
        if units:
            raise KeyboardInterrupt
        units.append(write(store, *arguments))

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_prompts", once)
        with pytest.raises(Incomplete, match="1 of 3 units"):
            sr.run("neurons", **asked)
    monkeypatch.setattr(running, "strongest", None)
    xr.testing.assert_equal(sr.run("neurons", **asked).load(), stored("gpt2").load())


def test_another_choice_is_another_run(wrapped, seeded, stored):
    asked = choices(wrapped, seeded, "gpt2", out=stored("gpt2").encoding["source"])
    for other in ({"param": {"count": 3}}, {"heads": "1.0,2.1"}, {"layers": "1"}):
        with pytest.raises(StoreError, match="holds another run"):
            sr.run("neurons", **asked | other)


def test_named_heads_are_taken_as_they_are(wrapped, seeded, tmp_path, hooked):
    ds = sr.run("neurons", **choices(wrapped, seeded, "gpt2", heads="0.1,2.3", out=tmp_path / "s.zarr"))
    found = sr.neuron_sparsity(ds, SHARE)
    assert set(heads_of(found)) == {(0, 1), (2, 3)}


def test_more_heads_than_there_are_is_all_of_them(wrapped, seeded, tmp_path):
    asked = choices(wrapped, seeded, "gpt2", layers="1", param={"count": 99}, out=tmp_path / "s.zarr")
    assert sr.run("neurons", **asked).selected.sum() == 5


def test_the_plan_says_how_many_are_ablated():
    plan = sr.preview("neurons", model="tiny-neox", param={"count": 3})
    assert plan["ablated"].startswith("the 3 strongest of ")
    assert plan["ablated_tokens"] == 3 * plan["tokens"] / 2


@pytest.mark.parametrize("wrong", [{"strongest": 0}, {"strongest": 2, "ablate": ((sr.Mlp(1),),)}])
def test_loudest_is_a_number_of_single_heads(wrong):
    with pytest.raises(UsageError, match="swept one by one"):
        sr.Graph(**{"ablate": sr.sweep([sr.Head(0, 0), sr.Head(1, 1)])} | wrong)


# Figures


def test_figures_show_what_analysis_found(stored):
    ds = stored("gpt2")
    erasure = sr.erasure_neurons(ds, SHARE)
    axes = [a for a in figures.draw("erasure_neurons", ds, share=SHARE).axes if a.collections]
    for rank in range(COUNT):
        shown = axes[rank].collections[0]
        clean, ablated = (erasure[n][rank] for n in ("neuron_direct_effect", "ablated_neuron_direct_effect"))
        assert_allclose(shown.get_offsets(), np.column_stack([clean, ablated]))
        assert_allclose(shown.get_array(), erasure.mlp_direct_effect[rank])
    repairs = sr.neuron_sparsity(ds, SHARE).repairs
    lines = figures.draw("neuron_sparsity", ds, share=SHARE).axes[1].lines
    assert_allclose([line.get_ydata() for line in lines], repairs[1])
    changes = sr.neuron_changes(ds, SHARE).isel(rank=0)
    dots = figures.draw("neuron_changes", ds, share=SHARE).axes[0].collections[0]
    order = np.argsort(dots.get_offsets()[:, 0])
    assert_allclose(dots.get_offsets()[order, 1], changes.cumulative_size)
    assert_allclose(dots.get_array()[order], changes.median_direct_effect)
    consistency = sr.neuron_consistency(ds, SHARE)
    left, right = figures.draw("neuron_consistency", ds, share=SHARE).axes[:2]
    assert_allclose(left.lines[1].get_ydata(), consistency.in_tokens[1, :30])
    heights = [bar.get_height() for bar in right.patches]
    assert_allclose(heights, [*consistency.shared_within, *consistency.shared_between])


def test_several_stores_have_a_row_each(stored):
    datasets = {name: stored(name) for name in ("gpt2", "llama-tied")}
    for name in ("erasure_neurons", "neuron_sparsity", "neuron_changes"):
        drawn = figures.draw(name, datasets, share=SHARE).axes
        titles = [a.get_title("left") for panel in drawn for a in (panel, *panel.child_axes)]
        assert sum(title.startswith("gpt2, L") for title in titles) == COUNT
        assert sum(title.startswith("llama-tied, L") for title in titles) == COUNT
    assert len(figures.draw("neuron_consistency", datasets, share=SHARE).axes) == 4
