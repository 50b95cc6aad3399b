"""Heads ablated together, whole sublayers, blocks of layers: against plain hooks, plain numpy, and what was planted."""

from itertools import combinations

import families
import numpy as np
import oracle_edits
import pytest
import torch
import xarray as xr
from numpy.testing import assert_allclose
from scipy.stats import mannwhitneyu

import selfrepair_nn as sr
from selfrepair_nn import figures
from selfrepair_nn.analysis import KNOWN_BACKUPS, STAGES, stages_of
from selfrepair_nn.analysis.taking_over import area
from selfrepair_nn.case_sites import written
from selfrepair_nn.choosing import in_half
from selfrepair_nn.components import Attention, Head, Mlp
from selfrepair_nn.errors import UsageError
from selfrepair_nn.recipe import find_recipe

TIGHT = 1e-9
PROMPTS, LENGTH = 24, 8
FAMILIES = ("gpt2", "neox-parallel", "llama-gqa", "olmo2")
HEADS = (Head(0, 1), Head(1, 0), Head(2, 1), Head(1, 2))


@pytest.fixture(scope="module")
def stored(wrapped, seeded, tmp_path_factory):
    """stored(recipe, family, **choices): the recipe's store of an exact float64 model on seeded prompts, made once."""
    made = {}

    def run(recipe, name, **choices):
        key = repr((recipe, name, choices))
        if key not in made:
            ids, folder = seeded(name, PROMPTS, LENGTH), tmp_path_factory.mktemp("joint")
            more = {} if recipe == "layer_order" else {"partners": families.derangement(PROMPTS)}
            model = wrapped(name, exact=True)
            out = folder / f"{recipe}.zarr"
            made[key] = sr.run(
                recipe, model=model, prompts=ids, out=out, progress=False, **more, **choices
            ).load()
        return made[key]

    return run


@pytest.fixture(scope="module")
def oracle(seeded):
    """oracle(family, *heads): what plain hooks on the whole model say of these heads, resampled together."""
    made, known = {}, {}

    def say(name, *heads):
        if name not in made:
            ids = torch.as_tensor(seeded(name, PROMPTS, LENGTH))
            arrays = {
                "tokens": ids,
                "partner_tokens": ids[families.derangement(PROMPTS)],
                "counterfactual_tokens": ids,
            }
            made[name] = oracle_edits.Edited(families.build(name, exact=True), arrays)
        if (name, *heads) not in known:
            found = made[name].case(tuple(("head", h.layer, h.head) for h in heads), "resample")
            known[name, *heads] = {
                k: x.numpy().reshape(-1, *x.shape[2:]) for k, x in found.items() if k in READ
            }
        return known[name, *heads]

    say.component = lambda name, head: made[name].labels.index(head.label)
    return say


READ = ("direct_effect", "ablated_direct_effect", "logit_change", "component_change")


def repair(found):
    return found["logit_change"] - found["ablated_direct_effect"] + found["direct_effect"]


def top(effects, share):
    return np.argsort(-effects, kind="stable")[: max(1, int(share * effects.size))]


# ---------------------------------------------------------------- against plain hooks


@pytest.mark.parametrize("name", FAMILIES)
def test_interactions_by_plain_hooks(stored, oracle, name):
    ds = stored("interactions", name, heads="0.1,1.0,2.1,1.2")
    assert len(ds["case"]) == 4 + 6 + 4 + 1
    for share in (1.0, 0.2):
        found = sr.interactions(ds, share)
        assert found.sizes["pair"] == 6
        for i, (a, b) in enumerate(combinations(sorted(HEADS), 2)):
            both, first, second = oracle(name, *_as_stored(ds, a, b)), oracle(name, a), oracle(name, b)
            some, one = top(both["direct_effect"], share), found.isel(pair=i)
            assert (str(one["first"].values), str(one["second"].values)) == (a.label, b.label)
            each_other = first["component_change"][:, oracle.component(name, b)]
            each_other = -each_other - second["component_change"][:, oracle.component(name, a)]
            expected = {
                "interaction": repair(both) - repair(first) - repair(second),
                "from_each_other": each_other,
                "from_others": repair(both) - repair(first) - repair(second) - each_other,
                "removed": both["direct_effect"] - both["ablated_direct_effect"],
                "logit_change": both["logit_change"],
                "alone": first["logit_change"] + second["logit_change"],
            }
            for what, values in expected.items():
                assert_allclose(one[what], values[some].mean(), atol=TIGHT, err_msg=f"{what} {a} {b} {share}")
    assert_allclose(found.interaction, found.logit_change - found.alone, atol=TIGHT)
    assert abs(found.interaction).max() > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_who_repairs_whom_by_plain_hooks(stored, oracle, name):
    found = sr.interactions(stored("interactions", name, heads="0.1,1.0,2.1,1.2"), 0.2)
    for a in HEADS:
        own = oracle(name, a)
        some = top(own["direct_effect"], 0.2)
        one = found.sel(head=a.label)
        for what in ("direct_effect", "logit_change"):
            assert_allclose(one[f"head_{what}"], own[what][some].mean(), atol=TIGHT)
        for b in HEADS:
            expected = own["component_change"][some, oracle.component(name, b)].mean() if a != b else np.nan
            assert_allclose(found.response.sel(ablated=a.label, responding=b.label), expected, atol=TIGHT)
    assert not found.response_known.sel(ablated="L2H1").any(), "nothing lies behind the last layer's head"


@pytest.mark.parametrize("name", FAMILIES)
def test_all_but_one_by_plain_hooks(stored, oracle, name):
    ds = stored("interactions", name, heads="0.1,1.0,2.1,1.2")
    found, whole = sr.clamped(ds, 0.2), oracle(name, *_as_stored(ds, *HEADS))
    for head in HEADS:
        rest = oracle(name, *_as_stored(ds, *(other for other in HEADS if other != head)))
        alone, some = oracle(name, head), top(rest["direct_effect"], 0.2)
        change = rest["component_change"][some, oracle.component(name, head)]
        removed = (rest["direct_effect"] - rest["ablated_direct_effect"])[some]
        given, one = (whole["logit_change"] - rest["logit_change"])[some], found.sel(head=head.label)
        assert_allclose(one.direct_effect, alone["direct_effect"][some].mean(), atol=TIGHT)
        assert_allclose(one.change, change.mean(), atol=TIGHT)
        assert_allclose(one.removed, removed.mean(), atol=TIGHT)
        assert_allclose(one.given_rest, given.mean(), atol=TIGHT)
        assert_allclose(one.takes_over, alone["logit_change"][some].mean() - given.mean(), atol=TIGHT)
        width = float(one.removed_half_width)
        known = np.isinf(width) or abs(float(one.removed)) > width
        assert_allclose(one.makes_up, change.mean() / removed.mean() if known else np.nan, atol=TIGHT)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_effects_given_a_set_by_plain_hooks(stored, oracle, name):
    ds = stored("backups", name, heads="0.1,1.0,2.1,1.2", param={"set": "L1H0,L0H1"})
    of_set = oracle(name, Head(0, 1), Head(1, 0))
    for share in (1.0, 0.2):
        found, some = sr.conditional_effects(ds, share), top(of_set["direct_effect"], share)
        assert found["head"].values.tolist() == ["L1H2", "L2H1"]
        assert {*found.attrs["set"].split("+")} == {"L0H1", "L1H0"}
        assert_allclose(found.attrs["set_logit_change"], of_set["logit_change"][some].mean(), atol=TIGHT)
        for head in (Head(1, 2), Head(2, 1)):
            both, alone, one = (
                oracle(name, Head(0, 1), Head(1, 0), head),
                oracle(name, head),
                found.sel(head=head.label),
            )
            given = both["logit_change"] - of_set["logit_change"]
            assert_allclose(one.alone, alone["logit_change"][some].mean(), atol=TIGHT)
            assert_allclose(one.conditional, given[some].mean(), atol=TIGHT)
            assert_allclose(one.takes_over, (alone["logit_change"] - given)[some].mean(), atol=TIGHT)


def _as_stored(ds, *heads):
    """The heads in any order: the oracle's word does not depend on it."""
    return tuple(sorted(heads))


# ---------------------------------------------------------------- planted, and null


def planted(pairs, rng, *, prompts=40, effect=1.0, floor=1e-6, heads=None):
    """A store of heads ablated alone and together; `pairs` are {case: (interaction, its spread)}, beyond singles."""
    heads = heads or sorted({head for pair in pairs for head in pair})
    cases = [(head,) for head in heads] + [*pairs]
    single = {head: 0.3 * effect + rng.normal(0, 0.1, (prompts, 6)) for head in heads}
    effects = {head: effect + rng.normal(0, 0.05, (prompts, 6)) for head in heads}
    repairs = [
        sum(single[head] for head in case)
        + (rng.normal(pairs[case][0], pairs[case][1], (prompts, 6)) if case in pairs else 0)
        for case in cases
    ]
    before = np.array([sum(effects[head] for head in case) for case in cases])
    dims, zero = ("case", "prompt", "position"), np.zeros_like(before)
    values = {"direct_effect": before, "ablated_direct_effect": zero, "self_repair": np.array(repairs)}
    values |= {"logit_change": values["self_repair"] - before, "from_heads": values["self_repair"]}
    values |= {"from_mlps": zero, "from_norm": zero, "closure": zero}
    data = {name: (dims, each) for name, each in values.items()}
    data["component_change"] = ((*dims, "component"), np.zeros((*before.shape, len(heads))))
    data |= {
        "done": (dims[:2], np.ones(before.shape[:2], bool)),
        "selected": ("case", np.ones(len(cases), bool)),
    }
    data |= {"noise_floor": ("case", np.full(len(cases), floor)), "logit": (dims[1:], zero[0] + 1)}
    labels = {"case": ["+".join(h.label for h in case) for case in cases]}
    labels |= {"case_sites": ("case", [written(case) for case in cases])}
    labels |= {"case_layer": ("case", [min(h.layer for h in case) for case in cases])}
    labels |= {"document": ("prompt", np.arange(prompts)), "component": [h.label for h in heads]}
    labels |= {"component_kind": ("component", ["head"] * len(heads))}
    labels |= {"component_layer": ("component", [h.layer for h in heads])}
    labels |= {"component_head": ("component", [h.head for h in heads])}
    told = {"model": "made", "ablation": "zero", "n_layers": 9, "n_heads": 9, "dtype": "float64"}
    found = xr.Dataset(data, labels, told)
    found.component_change.encoding["preferred_chunks"] = {"prompt": prompts}
    return found


A, B, C, D = (Head(layer, 0) for layer in range(4))
PLANTED = {(A, B): (-0.5, 0.2), (A, C): (0.5, 0.2), (B, C): (0.0, 0.05), (C, D): (0.0, 9.0)}


def relations(ds):
    return sr.interactions(ds, 1.0).relation.values.tolist()


def test_relations_are_told_where_they_are_known():
    made = planted(PLANTED, np.random.default_rng(0))
    assert relations(made) == ["redundant", "synergetic", "additive", "unclear"]
    against = planted(PLANTED, np.random.default_rng(0), effect=-1.0)
    assert relations(against)[:3] == ["synergetic", "redundant", "additive"], "what is removed is negative"
    noisy = planted(PLANTED, np.random.default_rng(0), floor=1.0)
    assert relations(noisy)[:3] == ["unclear", "unclear", "additive"]
    few = sr.interactions(planted(PLANTED, np.random.default_rng(0), prompts=19), 1.0)
    assert few.relation.values.tolist() == ["unclear"] * 4
    assert np.isinf(few.interaction_half_width).all()
    assert few.q_value.isnull().all()


def test_without_an_interaction_hardly_any_is_found():
    """Of 40 stores of 6 pairs: at a rate of 5% some 2 have a discovery, hardly ever more than 7."""
    heads = [Head(layer, 1) for layer in range(4)]
    found = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        made = planted(dict.fromkeys(combinations(heads, 2), (0.0, 1.0)), rng)
        found += bool((sr.interactions(made, 1.0).q_value <= 0.05).any())
    assert found <= 7


def test_intervals_are_of_the_differences_of_the_same_tokens():
    """Singles vary by 0.1 for each token, and the interaction does not: its interval knows."""
    made = planted({(A, B): (-0.2, 0.001)}, np.random.default_rng(0))
    found = sr.interactions(made, 1.0)
    assert float(found.interaction_half_width[0]) < 1e-3 < 0.01 < float(found.logit_change_half_width[0])


def backed(rng, takes_over, prompts=40):
    """A set of two heads; each further head costs so much more once the set is gone."""
    further = [Head(3 + i // 9, i % 9) for i in range(len(takes_over))]
    pairs = {(A, B): (0.0, 0.05)}
    pairs |= {(A, B, head): (-value, 0.2) for head, value in zip(further, takes_over, strict=True)}
    return planted(pairs, rng, prompts=prompts, heads=[A, B, *further]), further


def test_backups_are_heads_that_take_over():
    ds, further = backed(np.random.default_rng(1), [0.5, 0.0, 0.0, -0.5, 0.4])
    found = sr.conditional_effects(ds, 1.0)
    assert found["head"].values.tolist() == [head.label for head in further]
    assert found.backup.values.tolist() == [True, False, False, False, True]
    assert_allclose(found.takes_over, found.alone - found.conditional)
    assert_allclose(found.takes_over, [0.5, 0, 0, -0.5, 0.4], atol=0.1)
    assert found.attrs["set"] == "L0H0+L1H0"


def test_the_curve_of_known_backups():
    ds, further = backed(np.random.default_rng(2), [0.5, 0.1, 0.0, -0.3, 0.4, 0.0])
    named = [further[0], further[4]]
    curve = sr.backup_roc(ds, known=named, share=1.0)
    assert curve.attrs["auc"] == 1
    assert (curve.attrs["known"], curve.attrs["others"]) == (2, 4)
    assert curve.true_positive_rate.values.tolist() == [0, 0.5, 1, 1, 1, 1, 1]
    assert curve.false_positive_rate.values.tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1]
    mixed = sr.backup_roc(ds, known=[further[0], further[3]], share=1.0)
    assert (mixed.attrs["auc"], mixed.attrs["auc_half_width"]) == (0.5, 0), (
        "all are far apart, whoever is left out"
    )
    alike = sr.backup_roc(backed(np.random.default_rng(2), [0.0] * 8)[0], known="3.0,3.2,3.5", share=1.0)
    assert 0 < alike.attrs["auc_half_width"] < 1
    few = sr.backup_roc(
        backed(np.random.default_rng(2), [0.5, 0.1, 0.0], prompts=12)[0], known="3.0", share=1.0
    )
    assert few.attrs["auc_half_width"] == np.inf


def test_the_area_under_a_curve():
    """By hand, and as scipy counts the pairs; ties are a half."""
    for scores, positive, expected in (
        ([3, 2, 1], [True, False, False], 1.0),
        ([3, 2, 1], [False, False, True], 0.0),
        ([1, 1, 1], [True, False, True], 0.5),
        ([4, 3, 2, 1], [True, False, True, False], 0.75),
        ([4, 3, 3, 1], [False, True, False, True], 0.5 / 4),
    ):
        assert area(np.array(scores, float), np.array(positive)) == expected
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, positive = rng.integers(0, 6, 30).astype(float), rng.random(30) < 0.3
        pairs = positive.sum() * (~positive).sum()
        assert area(scores, positive) == pytest.approx(
            mannwhitneyu(scores[positive], scores[~positive]).statistic / pairs
        )


def test_the_known_backups_are_those_of_the_paper():
    """Wang et al. (2022): eight backup name movers of GPT-2 small; of other models none are known."""
    labels = " ".join(f"{layer}.{head}" for layer, head in KNOWN_BACKUPS["gpt2"])
    assert labels == "9.0 9.7 10.1 10.2 10.6 10.10 11.2 11.9"
    gpt2 = [Head(*place) for place in KNOWN_BACKUPS["gpt2"][:2]]
    pairs = {(A, B): (0.0, 0.05)} | {(A, B, head): (-0.5, 0.2) for head in gpt2} | {(A, B, C): (0.0, 0.2)}
    ds = planted(pairs, np.random.default_rng(0), heads=[A, B, C, *gpt2])
    curve = sr.backup_roc(ds.assign_attrs(model="openai-community/gpt2"), share=1.0)
    assert (curve.attrs["auc"], curve.attrs["known"], curve.attrs["source"]) == (1, 2, "Wang et al. (2022)")
    with pytest.raises(
        UsageError, match=r"no backups of 'made' are known here, those of gpt2 are: give known="
    ):
        sr.backup_roc(ds, share=1.0)


# ---------------------------------------------------------------- whole sublayers and stages

WHOLE = ("neox-parallel", "llama-gqa", "olmo2", "lfm2")


def summed(ds, case, wanted):
    """The mean over a case's top share of the summed change of some components: by numpy."""
    effect = ds.direct_effect.values[case].ravel()
    changes = ds.component_change.values[case].reshape(effect.size, -1)
    return changes[top(effect, 0.2)][:, wanted].sum(1).mean()


@pytest.mark.parametrize("name", WHOLE)
def test_who_compensates_for_a_whole_sublayer(stored, name):
    ds = stored("hydra", name, share=0.2)
    found = sr.hydra(ds, 0.2)
    layer, kind = ds.component_layer.values, ds.component_kind.values
    n_layers = ds.attrs["n_layers"]
    headless = [at for at in range(n_layers) if not ((layer == at) & (kind == "head")).any()]
    assert found["case"].values.tolist() == [
        *(f"L{at}.attention" for at in range(n_layers) if at not in headless),
        *(f"L{at}.mlp" for at in range(n_layers)),
    ]
    for i, (what, at) in enumerate(zip(found.kind.values, found.case_layer.values, strict=True)):
        assert_allclose(found.effect[i], -found.top_logit_change[i])
        for other in range(n_layers):
            for part in ("attention", "mlp"):
                wanted = (layer == other) & ((kind == "mlp") == (part == "mlp"))
                own = (other, part) == (at, what)
                wanted &= (kind == "attention_bias") | (not own)
                expected, one = (
                    summed(ds, i, wanted),
                    found.response.sel(responding_layer=other, part=part)[i],
                )
                assert_allclose(one, expected, atol=TIGHT)
    parts = found.top_from_norm + found.get("top_from_post_norms", 0)
    assert_allclose(found.compensation + parts, found.top_self_repair, atol=1e-7)
    assert_allclose(found.compensation_attention + found.compensation_mlp, found.compensation, atol=TIGHT)
    assert_allclose(found.response.sum(["responding_layer", "part"]), found.compensation, atol=TIGHT)
    assert sr.hydra(found, 0.2) is not None


@pytest.mark.parametrize("name", WHOLE)
def test_self_repair_by_stage(stored, name):
    ds = stored("hydra", name, share=0.2)
    n_layers = ds.attrs["n_layers"]
    stages = {"early": range(0, 1), "late": f"1:{n_layers}"}
    found, cases = sr.by_stage(ds, stages, 0.2), sr.by_case(ds, 0.2)
    layer, kind, early = ds.component_layer.values, ds.component_kind.values, cases.case_layer.values == 0
    for i, some in enumerate((early, ~early)):
        assert int(found.components[i]) == some.sum()
        for what in ("self_repair", "removed", "logit_change", "from_norm"):
            assert_allclose(found[what][i], cases[f"top_{what}"].values[some].mean(), atol=TIGHT)
        for j, here in enumerate((layer == 0, layer > 0)):
            each = [
                summed(
                    ds, case, here & ~((layer == cases.case_layer.values[case]) & (kind == _own(cases, case)))
                )
                for case in np.flatnonzero(some)
            ]
            assert_allclose(found.repair[i, j], np.mean(each), atol=TIGHT)
    parts = found.repair.sum("repairing") + found.from_norm + found.get("from_post_norms", 0)
    assert_allclose(parts, found.self_repair, atol=1e-7)
    assert found.repair_half_width.notnull().all()


def _own(cases, case):
    [site] = sr.sites_of(cases)[case]
    return "head" if isinstance(site, Attention) else "mlp"


def test_stages_of_heads_add_up_too(measure, seeded):
    ds = measure("llama-gqa", prompts=seeded("llama-gqa", PROMPTS, LENGTH))
    found, heads = sr.by_stage(ds, {"one": [0, 1], "two": [2]}, 0.2), sr.by_head(ds, 0.2)
    assert_allclose(found.self_repair[1], heads.top_self_repair[2].mean(), atol=TIGHT)
    assert_allclose(found.repair.sum("repairing") + found.from_norm, found.self_repair, atol=1e-7)
    assert found["layers"].values.tolist() == ["0 to 1", "2"]
    assert "stages" in figures.suited(ds)


@pytest.mark.parametrize(
    ("n_layers", "expected"),
    [(8, [2, 2, 3, 1]), (12, [2, 4, 5, 1]), (30, [6, 9, 12, 3]), (2, [0, 1, 0, 1]), (1, [0, 0, 1, 0])],
)
def test_usual_stages_are_shares_of_the_depth(n_layers, expected):
    found = stages_of(n_layers)
    assert [*found] == [*STAGES]
    assert [len(layers) for layers in found.values()] == expected
    assert [layer for layers in found.values() for layer in layers] == [*range(n_layers)]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"a": "0", "b": "2"}, "layers 1 are left out; each of 3 is in one stage"),
        ({"a": "0:2", "b": "1:3"}, "layers 1 are named twice"),
        ({"a": "0:9"}, "goes beyond the model"),
        ({"a": "zero"}, "is not a number or a range"),
    ],
)
def test_stages_that_are_none(stored, stages, said):
    with pytest.raises(UsageError, match=said):
        sr.by_stage(stored("hydra", "llama-gqa", share=0.2), stages)


# ---------------------------------------------------------------- blocks of layers


@pytest.mark.parametrize("name", ["neox-parallel", "llama-gqa"])
def test_what_a_block_keeps_side_by_side_and_in_other_orders(stored, name):
    ds = stored("layer_order", name, param={"block": 2})
    assert ds["case"].values.tolist() == [
        "layers 0:2",
        "parallel 0:2",
        "swap 0,1",
        "layers 1:3",
        "parallel 1:3",
        "swap 1,2",
    ]
    found = sr.composition(ds)
    change, distance = (ds[what].values.reshape(6, -1) for what in ("logit_change", "stream_distance"))
    for i, (case, gone) in enumerate(((1, 0), (2, 0), (4, 3), (5, 3))):
        width = float(found.deleted_half_width[i])
        known = np.isinf(width) or abs(change[gone].mean()) > width
        kept = 1 - change[case].mean() / change[gone].mean() if known else np.nan
        assert_allclose(found.logit_kept[i], kept, atol=TIGHT)
        assert_allclose(found.stream_distance[i], distance[case].mean(), atol=TIGHT)
    together = found.sel(kind="additive")
    pooled = 1 - change[[1, 4]].sum() / change[[0, 3]].sum()
    assert np.isnan(together.all_logit_kept) or abs(together.all_logit_kept - pooled) < TIGHT
    assert_allclose(together.all_stream_distance, distance[[1, 4]].mean(), atol=TIGHT)
    assert found.composed.values.tolist() == ["additive", "reordered"] * 2


def test_a_block_that_is_kept_and_one_that_is_lost():
    """Side by side as good as in sequence: 1, and an interval of no width; as bad as deleted: 0."""
    from made import any_store

    from selfrepair_nn.components import Layers, Parallel

    cases = [(Layers(0, 2),), (Parallel(0, 2),)]
    ds = any_store("layers", prompts=30)
    ds = ds.assign_coords(
        {"case": [c[0].label for c in cases], "case_sites": ("case", [*map(written, cases)])}
    )
    change = ds.logit_change.copy(data=np.stack([ds.logit_change.values[0] - 9, np.zeros((30, 5))]))
    ds = ds.assign(logit_change=change, stream_distance=xr.zeros_like(change))
    found = sr.composition(ds)
    assert (float(found.logit_kept[0]), float(found.logit_kept_half_width[0])) == (1, 0)
    same = change.copy(data=np.stack([change.values[0]] * 2))
    lost = sr.composition(ds.assign(logit_change=same))
    assert abs(float(lost.logit_kept[0])) < TIGHT
    assert float(lost.logit_kept_half_width[0]) < TIGHT


# ---------------------------------------------------------------- what recipes do, and refuse


class Sizes:
    n_layers, n_heads, headless, parallel, norms, post_norms = 6, 2, (2,), False, ("attention", "mlp"), False


def graph_of(recipe, **choices):
    found = find_recipe(recipe)
    return found.graph(Sizes, found.resolved(sr.Options(**choices)))


def test_the_strongest_heads_are_found_on_half():
    for recipe, count in (("interactions", 4), ("backups", 3)):
        graph = graph_of(recipe)
        assert (graph.strongest, graph.found_on, len(graph.ablate)) == (count, "half", 10)
    left = graph_of("interactions").of([Head(5, 1), Head(0, 0), Head(3, 1), Head(1, 1)])
    assert len(left.ablate) == 4 + 6 + 4 + 1
    assert len({frozenset(case) for case in left.ablate}) == 15
    three = graph_of("interactions", param={"count": 3}).of([Head(5, 1), Head(0, 0), Head(3, 1)])
    assert len(three.ablate) == 3 + 3 + 1, "all but one of three are the pairs"
    beside = graph_of("backups").of([Head(5, 1), Head(0, 0), Head(3, 1)])
    assert len(beside.ablate) == 3 + 1 + 7 + 7
    one = graph_of("backups", param={"movers": 1}).of([Head(5, 1)])
    assert len(one.ablate) == 1 + 9 + 9


def test_every_sublayer_and_every_order():
    assert [case[0] for case in graph_of("hydra", layers="1:3").ablate] == [Attention(1), Mlp(1), Mlp(2)]
    blocks = graph_of("layer_order")
    assert len(blocks.ablate) == 4 * (1 + 1 + 5)
    assert len(graph_of("layer_order", param={"block": 4, "step": 2}).ablate) == 2 * (1 + 1 + 3)


@pytest.mark.parametrize(
    ("recipe", "choices", "said"),
    [
        ("interactions", {"heads": "1.1"}, "choose two or more"),
        ("interactions", {"param": {"count": 1}}, "choose two or more"),
        ("backups", {"heads": "1.1,1.0,3.0"}, "leave further heads"),
        ("backups", {"param": {"set": "9.9"}}, "the model has layers 0 to 5"),
        ("layer_order", {"param": {"block": 7}}, "give 2 to 6 layers"),
        ("layer_order", {"param": {"step": 0}}, "a step of 1 or more"),
    ],
)
def test_recipes_that_cannot_be(recipe, choices, said):
    with pytest.raises(UsageError, match=said):
        graph_of(recipe, **choices)


def test_what_is_found_on_half_is_reported_on_the_rest(stored):
    ds = stored("interactions", "llama-gqa", param={"count": 2})
    found, rest = sr.interactions(ds, 1.0), in_half(ds)
    assert rest.sum() == PROMPTS // 2 == found.attrs["prompts_reporting"]
    mean = ds.self_repair.values[:, rest].mean((1, 2))
    assert_allclose(found.interaction, mean[2] - mean[0] - mean[1], atol=TIGHT)


def test_each_says_whose_store_it_takes(stored):
    heads = sr.simulate_heads(2, 2, 3, 4)
    for analysis, recipe in (
        (sr.interactions, "interactions"),
        (sr.clamped, "interactions"),
        (sr.conditional_effects, "backups"),
        (sr.backup_roc, "backups"),
        (sr.hydra, "hydra"),
        (sr.composition, "layer_order"),
    ):
        with pytest.raises(UsageError, match=f"run {recipe}") as caught:
            analysis(heads)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="run backups"):
        sr.conditional_effects(stored("interactions", "llama-gqa", heads="0.1,1.0,2.1,1.2"))
    with pytest.raises(UsageError, match="run hydra"):
        sr.hydra(stored("interactions", "llama-gqa", heads="0.1,1.0,2.1,1.2"))


def test_figures_suit_the_stores_that_hold_what_they_show(stored):
    suits = {
        "interactions": {"interactions", "clamping"},
        "backups": {"backups"},
        "hydra": {"hydra", "stages"},
        "layer_order": {"layer_order"},
    }
    choices = {
        "interactions": {"heads": "0.1,1.0,2.1,1.2"},
        "backups": {"heads": "0.1,1.0,2.1,1.2", "param": {"set": "L1H0,L0H1"}},
        "layer_order": {"param": {"block": 2}},
    }
    for recipe, names in suits.items():
        assert {*figures.suited(stored(recipe, "llama-gqa", **choices.get(recipe, {})))} == names
