"""The recipes ioi, induction and contrastive, from prompts to summaries, against plain hooks in float64."""

from contextlib import ExitStack
from dataclasses import replace

import families
import numpy as np
import oracle
import pytest
import torch
from matplotlib.collections import PathCollection
from numpy.testing import assert_allclose
from test_tasks import Words

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.choosing import in_half, selecting_half
from selfrepair_nn.errors import UsageError
from selfrepair_nn.graph import Graph, sweep

TIGHT = 1e-10
EAGER = 1e-5  # Hugging Face's eager softmax is float32


class Numbers:
    """A tokenizer whose words are the ids themselves."""

    bos_token_id = None

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def run(recipe, model, folder, **choices):
    out = folder / f"{recipe}.zarr"
    return sr.run(recipe, model=model, out=out, progress=False, **choices)


def setting(module, ids, target="centred"):
    """The oracle's clean run."""
    found = oracle.Setting(oracle.find_parts(module), torch.as_tensor(ids), target, "output", None)
    return found, oracle._clean(found)


def whole(ds):
    """The prompts of a store: its tokens and the last target."""
    return np.concatenate([ds.token.values, ds.target.values[:, -1:]], axis=1)


# ---------------------------------------------------------------- name movers


@pytest.fixture(scope="module", params=["neox-sequential", "neox-parallel"])
def ioi(request, wrapped, tmp_path_factory):
    model = replace(wrapped(request.param, exact=True), tokenizer=Words())
    ds = run("ioi", model, tmp_path_factory.mktemp("ioi"), param={"count": 12, "movers": 2}).load()
    module, ids = model.nn._module, whole(ds)
    return ds, module, ids, *setting(module, ids, (ids[:, 1:], ds.other.values))


def of_heads(effects, clean):
    """{label: mean at the last position} of every head."""
    heads = [i for i, kind in enumerate(clean.kinds) if kind == "head"]
    return {clean.labels[i]: float(effects[:, -1, i].mean()) for i in heads}


def ablated(ioi, heads):
    """One whole pass with these heads replaced by the partners' z: its direct effects, its real logit difference."""
    ds, _, ids, given, clean = ioi
    partners = ds.partner.values
    new = {(h.layer, h.head): clean.seen.z[h.layer][partners][:, :, h.head] for h in heads}
    seen = oracle.run(given.parts, given.ids, set_heads=new)
    effects = oracle._direct_effects(given.writes(seen, clean.seen), clean.goal, clean.S)
    return effects, difference(seen.logits, ids, ds)


def difference(logits, ids, ds):
    """Logit of the last token minus that of the other name, where it is to be said."""
    rows = np.arange(len(ids))
    last = logits[:, -2].numpy()
    return last[rows, ids[:, -1]] - last[rows, ds.other.values[:, -1]]


def test_the_name_movers_are_the_heads_of_largest_direct_effect(ioi):
    ds, *_, clean = ioi
    effects = of_heads(clean.effects, clean)
    ranked = sorted(effects, key=effects.get, reverse=True)
    first = sr.select_heads(None, ranked[0], 3, 3)[0].layer
    deleted = [(sr.Layers(first, stop).label) for stop in range(first + 1, 3)]
    assert ds.case.values.tolist() == [*ranked[:2], "+".join(ranked[:2]), *deleted]


def test_each_ablation_against_plain_hooks(ioi):
    ds, _, ids, _, clean = ioi
    found = sr.name_movers(ds)
    before = difference(clean.seen.logits, ids, ds)
    assert_allclose(found.attrs["logit_difference"], before.mean(), rtol=0, atol=TIGHT)
    assert found.attrs["clean_correct"] == (before > 0).mean()
    for label in ds.case.values[:3]:
        names = str(label).split("+")
        effects, after = ablated(ioi, sr.select_heads(None, ",".join(names), 3, 3))
        one = found.sel(case=label)
        own = sum(of_heads(clean.effects, clean)[name] for name in names)
        left = sum(of_heads(effects, clean)[name] for name in names)
        change = after - before
        expected = {"direct_effect": own, "ablated_direct_effect": left, "logit_change": change.mean()}
        expected |= {"self_repair": change.mean() - (left - own), "correct": (after > 0).mean()}
        expected["logit_change_se"] = change.std(ddof=1) / len(change) ** 0.5
        for name, value in expected.items():
            assert_allclose(one[name], value, rtol=0, atol=TIGHT, err_msg=f"{label} {name}")
        assert one.kind == ("joint" if len(names) > 1 else "single")


def test_backups_rise_most_when_the_name_movers_are_gone(ioi):
    ds, *_, clean = ioi
    names = str(ds.case.values[2]).split("+")
    effects, _ = ablated(ioi, sr.select_heads(None, ",".join(names), 3, 3))
    before, after = (of_heads(x, clean) for x in (clean.effects, effects))
    rise = {name: after[name] - before[name] for name in before if name not in names}
    found = sr.backups(ds, 4)
    assert found.component.values.tolist() == sorted(rise, key=rise.get, reverse=True)[:4]
    for i, name in enumerate(found.component.values):
        assert_allclose(found.direct_effect[i], before[name], rtol=0, atol=TIGHT)
        assert_allclose(found.joint[i], after[name], rtol=0, atol=TIGHT)


def drawn_again(values):
    """Half the 95% interval of the mean of values [prompt], by drawing prompts anew."""
    picks = np.random.default_rng(0).integers(len(values), size=(3000, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return (high - low) / 2


def test_intervals_of_name_movers_and_backups_are_those_of_drawing_prompts_anew(wrapped, tmp_path):
    model = replace(wrapped("neox-sequential", exact=True), tokenizer=Words())
    ds = run("ioi", model, tmp_path, param={"count": 40, "movers": 2}).load()
    movers, rising, last = sr.name_movers(ds), sr.backups(ds, 4), ds.isel(position=-1)
    clean, change = last.logit.values, last.logit_change.values
    removed = (last.direct_effect - last.ablated_direct_effect).values
    whole_run = {"logit_difference": clean, "clean_correct": clean > 0}
    pairs = [(movers.attrs[f"{name}_half_width"], values) for name, values in whole_run.items()]
    for name, values in {"removed": removed, "logit_change": change, "correct": clean + change > 0}.items():
        pairs += zip(movers[f"{name}_half_width"].values, values, strict=True)
    cases, components, seen = (ds[n].values.tolist() for n in ("case", "component", "case_layer"))
    for one in (rising.isel(rank=rank) for rank in range(4)):
        at = components.index(str(one.component.values))
        changes = last.component_change.values[..., at]
        pairs.append((one.direct_effect_half_width, last.component_direct_effect.values[:, at]))
        pairs.append((one.joint_half_width, changes[2]))
        if one.moved.notnull():
            pairs.append((one.moved_half_width, changes[cases.index(sr.Layers(seen[0], int(one["layer"])).label)]))
    ratios = [float(width) / drawn_again(values) for width, values in pairs if len({*values.tolist()}) > 1]
    assert len(ratios) > 15
    assert min(ratios) > 0.8
    assert max(ratios) < 1.5


def test_found_on_half_and_reported_on_the_rest(wrapped, tmp_path):
    """Name movers and backups are those of the half that selects, every number is of the other, by plain hooks."""
    model = replace(wrapped("neox-sequential", exact=True), tokenizer=Words())
    choices = {"count": 24, "movers": 2, "found_on": "half"}
    ds = run("ioi", model, tmp_path, param=choices).load()
    module, ids = model.nn._module, whole(ds)
    given, clean = setting(module, ids, (ids[:, 1:], ds.other.values))
    selects = selecting_half(ds.document.values)
    assert 8 <= selects.sum() <= 16
    assert ds.attrs["found_on"] == "half"
    some = [20, 3, 11, 5, 17]  # of a part of the run, too, what selected is not reported
    assert in_half(ds.isel(prompt=some)).tolist() == (~selects[some]).tolist()
    heads = [i for i, kind in enumerate(clean.kinds) if kind == "head"]
    last = clean.effects[:, -1, heads].numpy()
    order = np.argsort(-last[selects].mean(0), kind="stable")
    names = [clean.labels[heads[i]] for i in order[:2]]
    assert ds.case.values.tolist()[:2] == names
    effects, after = ablated((ds, module, ids, given, clean), sr.select_heads(None, ",".join(names), 3, 3))
    rest = np.sort(order[2:])
    rise = (effects[:, -1, heads].numpy() - last)[:, rest]
    ranked = np.argsort(-rise[selects].mean(0), kind="stable")
    ranked = ranked[rise[selects].mean(0)[ranked] > TIGHT]
    found = sr.backups(ds, len(ranked))
    assert found.component.values.tolist() == [clean.labels[heads[rest[i]]] for i in ranked] != []
    for rank, place in enumerate(ranked):
        reported = (last[:, rest] + rise)[~selects, place].mean()
        assert_allclose(found.joint[rank], reported, rtol=0, atol=TIGHT)
        assert_allclose(found.selecting_rise[rank], rise[selects, place].mean(), rtol=0, atol=TIGHT)
    movers = sr.name_movers(ds)
    before = difference(clean.seen.logits, ids, ds)
    assert_allclose(movers.attrs["logit_difference"], before[~selects].mean(), rtol=0, atol=TIGHT)
    joint = movers.isel(case=2)
    assert_allclose(joint.logit_change, (after - before)[~selects].mean(), rtol=0, atol=TIGHT)
    told = f"selected on {selects.sum()} prompts, reported on {(~selects).sum()} others"
    assert told in str(sr.summary(ds))
    assert told in figures.draw("ioi", ds).get_supxlabel()
    whole_run = sr.choose_tokens(ds, split_selection=False)
    assert_allclose(sr.name_movers(whole_run).attrs["logit_difference"], before.mean(), rtol=0, atol=TIGHT)
    with pytest.raises(UsageError, match="found_on 'most' is not known; choose one of all, half"):
        run("ioi", model, tmp_path / "x", param=choices | {"found_on": "most"})
    with pytest.raises(UsageError, match="say how many, strongest="):
        Graph(ablate=sweep([sr.Head(0, 0)]), found_on="half")


def without_layers(module, given, layers):
    """A whole pass in which these layers give back what they read."""
    with ExitStack() as stack:
        for layer in layers:
            hook = module.gpt_neox.layers[layer].register_forward_hook(lambda m, args, out: args[0])
            stack.callback(hook.remove)
        return oracle.run(given.parts, given.ids)


def test_a_moved_head_reads_what_the_name_mover_reads(ioi):
    ds, module, _, given, clean = ioi
    first = sr.select_heads(None, str(ds.case.values[0]), 3, 3)[0].layer
    found = sr.backups(ds, 9)
    for i, layer in enumerate(found["layer"].values):
        if layer <= first:
            assert np.isnan(found.moved[i])
            continue
        seen = without_layers(module, given, range(first, layer))
        effects = oracle._direct_effects(given.writes(seen, clean.seen), clean.goal, clean.S)
        expected = of_heads(effects, clean)[str(found.component.values[i])]
        assert_allclose(found.moved[i], expected, rtol=0, atol=TIGHT)


def test_nothing_is_asked_before_the_last_position(ioi):
    ds = ioi[0].isel(position=slice(0, -1))
    for name in ("logit", "direct_effect", "logit_change", "self_repair", "component_change"):
        assert (ds[name] == 0).all(), name


def test_a_finished_run_is_resumed_with_the_heads_that_were_found(wrapped, tmp_path):
    model = replace(wrapped("neox-sequential", exact=True), tokenizer=Words())
    first = run("ioi", model, tmp_path, param={"count": 8})
    again = run("ioi", model, tmp_path, param={"count": 8})
    assert again.attrs["created"] == first.attrs["created"]
    assert again.case.values.tolist() == first.case.values.tolist()


def test_what_follows_needs_the_loudest_heads():
    with pytest.raises(UsageError, match="strongest="):
        Graph(ablate=sweep((sr.Head(0, 0),)), then=lambda heads: [heads])


@pytest.mark.parametrize("replacement", ["identity", sr.Scale(0.5)])
def test_layers_are_not_deleted_beside_a_replacement_that_takes_nothing_away(replacement):
    with pytest.raises(UsageError, match="layer 1: whole layers"):
        Graph(ablate=((sr.Layers(1, 2),),), replacement=replacement)


# ---------------------------------------------------------------- induction


@pytest.fixture(scope="module")
def induction(wrapped, tmp_path_factory):
    model = wrapped("llama-gqa", exact=True)
    folder = tmp_path_factory.mktemp("induction")
    return run("induction", model, folder, param={"count": 4, "period": 7}).load(), model.nn._module


def before(row, position):
    """Where a row's token has been before, or None."""
    earlier = np.flatnonzero(row[:position] == row[position])
    return int(earlier[-1]) if earlier.size else None


def test_scores_are_the_attention_that_the_model_pays(induction):
    ds, _ = induction
    ids = whole(ds)
    eager = families.build("llama-gqa", exact=True, attention="eager")
    with torch.no_grad():
        paid = eager(torch.as_tensor(ids), output_attentions=True).attentions
    found = sr.induction_by_head(ds)
    positions = ds.sizes["position"]
    known = [(i, q, before(ids[i], q)) for i in range(len(ids)) for q in range(positions)]
    known = [(i, q, k) for i, q, k in known if k is not None]
    assert len(known) == len(ids) * 6
    for layer, weights in enumerate(paid):
        copying = np.mean([weights[i, :, q, k + 1].numpy() for i, q, k in known], axis=0)
        last = np.mean([weights[i, :, q, q - 1].numpy() for i, q, _ in known], axis=0)
        assert_allclose(found.induction[layer], copying, rtol=0, atol=EAGER)
        assert_allclose(found.previous_token[layer], last, rtol=0, atol=EAGER)


def test_repair_is_of_the_repeated_half(induction):
    ds, module = induction
    ids = whole(ds)
    expected = oracle.reference(module, ids, partners=ds.partner.values)
    later = [q for q in range(ds.sizes["position"]) if before(ids[0], q) is not None]
    found = sr.induction_by_head(ds, share=1)
    for name in ("direct_effect", "logit_change", "self_repair", "from_heads", "from_norm"):
        assert_allclose(found[name], expected[name][..., later].mean((2, 3)), rtol=0, atol=TIGHT)
    assert (found.tokens == len(ids) * len(later)).all()


def test_kinds_of_heads_by_hand(induction):
    ds = induction[0].copy()
    ds["attention"] = 0 * ds.attention
    ds.attention[0, 1, :, :, 0] = 0.5
    ds.attention[1, 2, :, :, 1] = 0.41
    ds.attention[2, 3] = 0.9
    heads, kinds = sr.induction_by_head(ds, least=0.4), sr.by_kind(ds, least=0.4)
    special = {(0, 1): "previous token", (1, 2): "induction", (2, 3): "induction"}
    for place in np.ndindex(heads.kind.shape):
        assert heads.kind.values[place] == special.get(place, "other")
    assert kinds.heads.sel(kind=["induction", "previous token", "other"]).values.tolist() == [2, 1, 15]
    pair = [heads.self_repair.values[1, 2], heads.self_repair.values[2, 3]]
    assert_allclose(kinds.self_repair.sel(kind="induction"), np.mean(pair))
    removed = heads.direct_effect.values[0, 1] - heads.ablated_direct_effect.values[0, 1]
    assert_allclose(kinds.removed.sel(kind="previous token"), removed)


# ---------------------------------------------------------------- a counterfactual that differs in one token


@pytest.fixture(scope="module")
def contrast(wrapped, tmp_path_factory):
    model = replace(wrapped("neox-sequential", exact=True), tokenizer=Numbers())
    ids = families.random_ids(model.nn._module, 6, 12, seed=3)
    ids[ids == 5] = 6
    ids[[0, 2, 3, 5], [2, 0, 9, 4]] = 5
    ids[2, 7] = 5
    param = {"old": "5", "new": "9"}
    ds = run("contrastive", model, tmp_path_factory.mktemp("contrast"), prompts=ids, layers=":", param=param)
    return ds.load(), model.nn._module, ids[[0, 2, 3, 5]]


def test_a_twin_differs_where_it_was_edited(contrast):
    ds, _, ids = contrast
    assert ds.ablation.values.tolist() == ["resample", "counterfactual"]
    np.testing.assert_array_equal(ds.token, ids[:, :-1])
    np.testing.assert_array_equal(ds.counterfactual, np.where(ids == 5, 9, ids)[:, :-1])
    assert ds.counterfactual_text.values[0, 2] == "9"


def test_both_ablations_against_plain_hooks(contrast):
    ds, module, ids = contrast
    given, clean = setting(module, ids)
    lenders = {
        "resample": clean.seen.z,
        "counterfactual": oracle.run(given.parts, torch.as_tensor(np.where(ids == 5, 9, ids))).z,
    }
    first = np.argmax(ids == 5, axis=1)
    counted = np.arange(ids.shape[1] - 1) >= first[:, None]
    found = sr.contrast_by_head(ds)
    assert_allclose(found.attrs["edited_share"], counted.mean())
    for ablation, z in lenders.items():
        rows = ds.partner.values if ablation == "resample" else slice(None)
        for layer, head in np.ndindex(3, 3):
            seen = oracle._ablated(given, clean, layer, head, z[layer][rows][:, :, head])
            own = clean.labels.index(f"L{layer}H{head}")
            told = {k: v.numpy() for k, v in oracle._measure(given, clean, seen, own).items()}
            removed = (told["direct_effect"] - told["ablated_direct_effect"])[counted]
            back = told["self_repair"][counted]
            expected = {"direct_effect": told["direct_effect"][counted].mean(), "removed": removed.mean()}
            expected |= {"logit_change": told["logit_change"][counted].mean()}
            expected |= {"size": np.sqrt(np.mean(removed**2)), "tokens": counted.sum()}
            expected["repaired"] = np.linalg.lstsq(removed[:, None], back, rcond=None)[0][0]
            one = found.sel(ablation=ablation, layer=layer, head=head)
            for name, value in expected.items():
                assert_allclose(
                    one[name], value, rtol=0, atol=1e-8, err_msg=f"{ablation} L{layer}H{head} {name}"
                )


def test_nothing_changes_before_the_first_edit(contrast):
    ds, _, ids = contrast
    first = np.argmax(ids == 5, axis=1)
    for prompt, stop in enumerate(first):
        early = ds.logit_change.sel(ablation="counterfactual")[:, :, prompt, :stop]
        assert (early == 0).all()
        assert (ds.logit_change.sel(ablation="counterfactual")[:, :, prompt, stop:] != 0).any()


# ---------------------------------------------------------------- stores of other recipes


def test_each_analysis_says_whose_store_it_takes():
    ds = sr.simulate_heads(2, 2, 3, 4)
    for analysis, recipe in ((sr.name_movers, "ioi"), (sr.backups, "ioi"), (sr.induction_by_head, "induction"),
                             (sr.by_kind, "induction"), (sr.contrast_by_head, "contrastive")):  # fmt: skip
        with pytest.raises(UsageError, match=f"run {recipe}"):
            analysis(ds)


# ---------------------------------------------------------------- figures


def dots(axes):
    scatters = [c.get_offsets() for c in axes.collections if isinstance(c, PathCollection)]
    return in_order(np.concatenate([np.asarray(points) for points in scatters]))


def in_order(points):
    return points[np.lexsort(points.T)]


def pairs(x, y):
    return in_order(np.column_stack([np.ravel(x), np.ravel(y)]))


def words(figure):
    legends = [
        text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().texts
    ]
    return " ".join([figure.get_supxlabel(), figure.get_suptitle(), *legends])


def test_figure_of_name_movers_and_backups(ioi):
    ds = ioi[0]
    figure, movers, rising = figures.draw("ioi", ds), sr.name_movers(ds), sr.backups(ds)
    left, right = figure.axes
    taken, lost = ([bar.get_width() for bar in bars] for bars in left.containers if hasattr(bars, "patches"))
    shown = movers.isel(case=slice(0, 3))
    assert_allclose(taken, shown.direct_effect - shown.ablated_direct_effect)
    assert_allclose(lost, -shown.logit_change)
    assert [label.get_text().replace("\n", "+") for label in left.get_yticklabels()] == ds.case.values[
        :3
    ].tolist()
    for bars, name in zip(right.containers, ("direct_effect", "joint", "moved"), strict=True):
        assert_allclose(bars.lines[0].get_xdata(), rising[name])
    assert [label.get_text() for label in right.get_yticklabels()] == rising.component.values.tolist()
    assert (
        f"12 prompts. In the clean run the indirect object's logit is {movers.logit_difference:+.3f}"
        in words(figure)
    )


def test_figure_of_induction(induction):
    ds, _ = induction
    figure, heads = figures.draw("induction", ds), sr.induction_by_head(ds)
    left, right = figure.axes
    assert_allclose(dots(left), pairs(heads.previous_token, heads.induction))
    kinds = sr.by_kind(ds)
    labels = [label.get_text() for label in right.get_yticklabels()]
    for kind in kinds.kind.values:
        count = int(kinds.heads.sel(kind=kind))
        assert f"{kind}: {count}" in words(figure)
        assert any(label.startswith(f"mean of {count}\n{kind} head") for label in labels) == (count > 0)
    values = {sr.Head(i, j).label: heads.isel(layer=i, head=j) for i, j in np.ndindex(heads.kind.shape)}
    named = [(label, kind) for label in labels for kind in kinds.kind.values if f"\n{kind} head" in label]
    values |= {label: kinds.sel(kind=kind) for label, kind in named}
    for bars, name in zip(right.containers, ("removed", "logit_change", "self_repair"), strict=True):
        x, y = bars.lines[0].get_data()
        rows = np.round(y).astype(int)
        assert_allclose(x, [float(values[labels[row]][name]) for row in rows])
        beyond = {*range(len(labels))} - {*rows.tolist()}
        told = [text.get_text().replace("\N{MINUS SIGN}", "-").split(" ")[0] for text in right.texts]
        assert all(f"{float(values[labels[row]][name]):+.2g}" in told for row in beyond)


def test_figure_of_the_contrast(contrast):
    ds = contrast[0]
    figure, heads = figures.draw("contrast", ds), sr.contrast_by_head(ds)
    for axes, ablation in zip(figure.axes, ("resample", "counterfactual"), strict=False):
        one = heads.sel(ablation=ablation)
        assert_allclose(dots(axes), pairs(one.removed, one.logit_change))
    assert_allclose(dots(figure.axes[2]), pairs(*heads.repaired.sel(ablation=["resample", "counterfactual"])))
    assert f"9 heads, {int(heads.tokens[0, 0])} tokens each" in words(figure)


def test_figures_of_several_stores_have_a_row_each(ioi, induction, contrast):
    for name, ds, columns in (
        ("ioi", ioi[0], 2),
        ("induction", induction[0], 2),
        ("contrast", contrast[0], 3),
    ):
        figure = figures.draw(name, {"one": ds, "two": ds})
        panels = [axes for axes in figure.axes if axes.get_title("left")]
        assert len(panels) == 2 * columns
        assert any("two" in axes.get_title("left") for axes in panels)


def test_stores_are_suited_to_their_own_figures(ioi, induction, contrast):
    for name, ds in (("ioi", ioi[0]), ("induction", induction[0]), ("contrast", contrast[0])):
        suited = figures.suited(ds)
        assert name in suited
        assert not ({"ioi", "induction", "contrast"} - {name}) & set(suited)
