"""Which tokens count: said once by the prompts, stored, and all that any statistic, summary, figure or page is over."""

import json
import re
from dataclasses import replace
from types import FunctionType

import families
import numpy as np
import pytest
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import beta
from test_task_recipes import Numbers
from test_tasks import Words
from tiers import representative

import selfrepair_nn as sr
from selfrepair_nn import figures, report, text
from selfrepair_nn.analysis import HALF_WIDTH, MEANS, remembering
from selfrepair_nn.errors import UsageError
from selfrepair_nn.explorer import words
from selfrepair_nn.quantities import QUANTITIES, SWEEP
from selfrepair_nn.recipe import find_recipe, recipe_paths

LENGTH, PROMPTS = 8, 26  # enough that means have intervals
COLUMNS = ["direct_effect", "logit_change", "self_repair", "from_heads", "from_mlps", "from_norm"]
OWN = ("ioi", "induction", "contrastive")
KINDS = (*OWN, "freeze", "neurons", "self_reinforcement")
"""Recipes in every run of the tests: cases, a grid, variants, what is recorded beside means, a single position."""

CHOICES = {
    "ioi": {"param": {"count": 24, "movers": 2}},
    "induction": {"param": {"count": 24, "period": 5}},
    "contrastive": {"param": {"old": "5", "new": "9"}},
    "neurons": {"param": {"count": 2}},
    "freeze_norms": {"param": {"count": 2}},
    "path_patching": {"param": {"count": 2}},
}


def mask(prompts=PROMPTS, positions=LENGTH - 1, seed=1):
    """Some tokens of some prompts: about half, none of the second prompt, all of the third."""
    counted = np.random.default_rng(seed).random((prompts, positions)) < 0.5
    counted[0, -1], counted[1], counted[2] = True, False, True
    return counted


def chosen(model, prompts=PROMPTS, seed=0, **more):
    """A user's own prompts, of which some tokens count."""
    ids = families.random_ids(model.nn._module, prompts, LENGTH, seed)
    counted = mask(prompts) if "counted" not in more else more.pop("counted")
    return sr.Prompts(ids, np.arange(prompts), {"name": "mine"}, counted=counted, **more)


def run(recipe, model, out, **choices):
    """A finished store of a recipe on prompts of which some tokens count."""
    if recipe == "contrastive":
        ids = chosen(model).tokens
        ids[:, 3] = 5
        choices["prompts"] = sr.Prompts(ids, np.arange(PROMPTS), {"name": "mine"}, counted=mask())
    elif recipe not in OWN:
        halves = 2 if recipe in ("optimal", "interactions", "backups") else 1  # of which one is reported
        choices.setdefault("prompts", chosen(model, halves * PROMPTS))
    tokenizer = {"ioi": Words(), "contrastive": Numbers()}.get(recipe)
    model = replace(model, tokenizer=tokenizer) if tokenizer else model
    return sr.run(recipe, model=model, out=out, progress=False, **CHOICES.get(recipe, {}) | choices)


@pytest.fixture(scope="module")
def stores(wrapped, tmp_path_factory):
    """stores(recipe): its finished store, made once; nobody may change it."""
    made, folder = {}, tmp_path_factory.mktemp("counted")

    def found(recipe):
        if recipe not in made:
            model = wrapped("mixtral" if recipe == "routing" else "neox-sequential", exact=True)
            made[recipe] = run(recipe, model, folder / f"{recipe}.zarr").load()
        return made[recipe]

    return found


def means(ds, name):
    """Means over the tokens that count, by plain NumPy: over what is left of a variable's dimensions."""
    return ds[name].transpose(..., "prompt", "position").values[..., ds.counted.values].mean(-1, dtype=float)


# ---------------------------------------------------------------- said by the prompts


@pytest.mark.parametrize(
    ("counted", "said"),
    [
        (np.ones((2, 4), bool), r"counted has shape \(2, 4\): give True or False for each of \(2, 3\)"),
        (np.ones((2, 3), int), "counted holds int64: give True or False"),
        (np.zeros((2, 3), bool), "False everywhere"),
        ([[True] * 3] * 2, "counted is a list: give a NumPy array"),
    ],
)
def test_prompts_name_what_is_wrong(counted, said):
    with pytest.raises(UsageError, match=said):
        sr.Prompts(np.zeros((2, 4), int), np.arange(2), {}, counted=counted)


def test_prompts_that_differ_in_what_counts_are_other_prompts():
    ids = np.arange(12).reshape(3, 4)
    counted = np.array([[True, False, True]] * 3)
    plain, some = (sr.Prompts(ids, np.arange(3), {}, counted=each) for each in (None, counted))
    every = sr.Prompts(ids, np.arange(3), {}, counted=np.ones((3, 3), bool))
    assert plain.sha256 == every.sha256 != some.sha256
    assert some.sha256 != sr.Prompts(ids, np.arange(3), {}, counted=~counted).sha256
    assert plain.counts.all()
    assert plain.counts.shape == (3, 3)
    counted[1] = False
    assert_array_equal(some.taken(np.array([2, 1])).counted, counted[[2, 1]])
    assert_array_equal(some.take(2).counted, counted[:2])


def test_two_runs_that_differ_in_what_counts_are_two(wrapped, tmp_path):
    model = wrapped("llama-gqa")
    run("heads", model, tmp_path / "s.zarr")
    with pytest.raises(sr.errors.StoreError, match="another run \\(prompts "):
        run("heads", model, tmp_path / "s.zarr", prompts=chosen(model, counted=mask(seed=2)))


def test_a_task_says_what_it_asks():
    ioi = sr.ioi_prompts(Words(), 8)
    assert_array_equal(ioi.counted, np.arange(ioi.length - 1) == [[ioi.length - 2]] * 8)
    for tokenizer in (None, Words()):
        repeated = sr.repeated_prompts(tokenizer, 40, count=3, period=6)
        for row, counted in zip(repeated.tokens, repeated.counted, strict=True):
            known = [row[p] in row[:p] for p in range(repeated.length - 1)]
            assert_array_equal(counted, known)  # who has read the token before knows what follows


def test_an_edit_asks_from_there_on_where_it_was_asked_before():
    words = Words()
    rows = ["a , b , c", "a b c d ,", "c b , d a", "b a , c d"]
    ids = np.array([words(row, add_special_tokens=False)["input_ids"] for row in rows])
    counted = np.ones((4, 4), bool)
    counted[0, 2], counted[3, 2:] = False, False
    edited = sr.edited_prompts(
        sr.Prompts(ids, np.arange(4), {"name": "rows"}, counted=counted), words, ",", "d"
    )
    assert edited.document.tolist() == [0, 2]  # of the second and the last nothing is asked that is edited
    assert edited.counted.tolist() == [[False, True, False, True], [False, False, True, True]]
    assert (edited.source["edit"]["rows_dropped"], edited.source["edit"]["exchanged"]) == (2, 3)


def test_prompts_are_a_choice_of_a_run(wrapped, tmp_path):
    model = wrapped("llama-gqa")
    given = chosen(model)
    for bad, said in (
        ({"length": LENGTH + 1}, f"length {LENGTH + 1} is beyond the rows of mine"),
        ({"bos": "always"}, "bos 'always'"),
        ({"tokens": 4}, "tokens 4"),
    ):
        with pytest.raises(UsageError, match=said):
            sr.run(model=model, prompts=given, out=tmp_path / "x.zarr", progress=False, **bad)
    beyond = sr.Prompts(given.tokens + 53, given.document, {"name": "mine"})
    with pytest.raises(UsageError, match=r"mine: token id \d+ at prompt 0"):
        sr.run(model=model, prompts=beyond, out=tmp_path / "x.zarr", progress=False)
    few = sr.run(model=model, prompts=given, out=tmp_path / "x.zarr", progress=False, tokens=3 * LENGTH)
    assert few.sizes["prompt"] == 3
    assert_array_equal(few.counted, given.counted[:3])


# ---------------------------------------------------------------- stored, and what the numbers are over


@pytest.mark.parametrize("recipe", representative(recipe_paths(), "heads", *KINDS))
def test_a_summary_is_over_what_counts(stores, recipe):
    """Every recipe's, by plain NumPy on the store."""
    ds = stores(recipe).assign_attrs(half="whole")
    assert QUANTITIES["counted"].dims == ds.counted.dims
    assert 0 < ds.counted.mean() < 1
    share = {} if recipe in OWN else {"share": 1.0}
    if "case" in ds.dims:
        found = sr.by_case(ds)
    elif {*ds.self_repair.dims} <= {*SWEEP}:
        found = sr.by_head(ds, **share)
    else:
        found = sr.by_variant(ds, **share)
    ran = ds.selected.transpose(*[d for d in ("layer", "head", "case") if d in ds.dims]).values
    for name in MEANS:
        for each in (found[name], found[f"top_{name}"]):
            values = each.transpose(*[d for d in ds[name].dims if d in each.dims]).values
            assert_allclose(values[..., ran], means(ds, name)[..., ran], rtol=1e-9, atol=1e-12, err_msg=name)
    tokens = int(ds.counted.sum())
    assert (found.tokens.values[ran] == tokens).all()
    assert found.attrs["counted_share"] == pytest.approx(tokens / ds.counted.size)


@pytest.mark.parametrize("recipe", OWN)
def test_the_printed_numbers_are_those_at_the_positions_that_are_asked(stores, recipe):
    ds = stores(recipe)
    printed = str(text.summary(ds))
    lines = printed.splitlines()
    rows = {"ioi": "case", "induction": "layer", "contrastive": "ablation"}[recipe]
    for label in ds[rows].values:
        start = next(i for i, line in enumerate(lines) if line.split()[:1] == str(label).split()[:1])
        row = " ".join(lines[start : start + 2]).replace("~", " ").split(str(label), 1)[1]
        numbers = [text.number(means(ds.sel({rows: label}), name).mean()) for name in COLUMNS]
        assert re.findall(r"[+-]\d\S*", row)[:6] == numbers
    assert "on the tokens that count, in logits" in printed
    assert f"{int(ds.counted.sum()):,} tokens each that count" in printed


def test_xarray_alone_gives_the_same(stores):
    ds = stores("induction")
    expected = ds.self_repair.where(ds.counted).mean(("prompt", "position"))
    assert_allclose(sr.by_head(ds).self_repair, expected, rtol=1e-9, atol=1e-12)
    assert_allclose(sr.induction_by_head(ds).self_repair, expected, rtol=1e-9, atol=1e-12)


def test_the_top_share_is_of_what_counts(stores):
    ds = stores("heads")
    effects = ds.direct_effect.values[..., ds.counted.values]
    for share in (0.02, 0.3, 1):
        keep = max(1, int(share * effects.shape[-1]))
        order = np.argsort(-effects, axis=-1, kind="stable")[..., :keep]
        repair = np.take_along_axis(ds.self_repair.values[..., ds.counted.values], order, -1)
        assert_allclose(sr.by_head(ds, share).top_self_repair, repair.mean(-1), rtol=1e-9)
        assert not (sr.top_share(ds, share) & ~ds.counted).any()
    assert_array_equal(sr.top_share(ds), np.broadcast_to(ds.counted, ds.self_repair.shape))


def test_standard_errors_are_of_the_prompts_in_which_something_counts(stores):
    ds = stores("ioi")
    last = ds.self_repair.values[..., -1].astype(float)
    expected = last.std(1, ddof=1) / np.sqrt(last.shape[1])
    for each in (
        sr.by_case(ds).self_repair_se,
        sr.by_case(ds).top_self_repair_se,
        sr.name_movers(ds).self_repair_se,
    ):
        assert_allclose(each, expected, rtol=1e-9)
    ds = stores("heads")
    values, n = ds.self_repair.values.astype(float), ds.counted.values.sum(1)
    sums = np.where(ds.counted.values, values, 0).sum(-1)
    without = ((sums.sum(-1)[..., None] - sums) / (n.sum() - n))[..., n > 0]  # each prompt left out in turn
    moved = without - (sums.sum(-1) / n.sum())[..., None]
    expected = np.sqrt((moved**2).sum(-1) * (1 - 1 / (n > 0).sum()))
    assert_allclose(sr.by_head(ds).self_repair_se, expected, rtol=1e-9)


def test_the_share_of_a_store_is_a_rule_of_its_prompts(stores):
    plain = sr.simulate_heads(2, 2, 3, 50)
    assert sr.by_head(plain).attrs["share"] == 0.02
    assert sr.by_head(stores("heads")).attrs["share"] == 1
    with pytest.raises(UsageError, match="give the share"):
        figures.draw("self_repair_by_layer", [plain, stores("heads")])
    figures.draw("self_repair_by_layer", [plain, stores("heads")], share=0.5)


def test_a_store_that_does_not_say_counts_every_token(stores):
    old = stores("heads").drop_vars("counted")
    every = old.assign_coords(counted=(("prompt", "position"), np.ones((PROMPTS, LENGTH - 1), bool)))
    xr.testing.assert_identical(sr.by_head(old), sr.by_head(every))
    assert sr.by_head(old).attrs["share"] == 0.02
    assert (sr.by_head(old).tokens == PROMPTS * (LENGTH - 1)).all()
    assert str(text.summary(old)) == str(text.summary(every))
    for recipe, analyses in (("ioi", (sr.name_movers, sr.backups)), ("contrastive", (sr.contrast_by_head,)),
                             ("induction", (sr.induction_by_head, sr.by_kind))):  # fmt: skip
        for analysis in analyses:
            with pytest.raises(UsageError, match="does not say which tokens count"):
                analysis(stores(recipe).drop_vars("counted"))


# ---------------------------------------------------------------- what does not count is never looked at

ANALYSES = [name for name, place in sr._PLACES.items() if place[0] == "selfrepair_nn.analysis"]
ANALYSES = [name for name in ANALYSES if name not in ("only", "in_nats")]  # which give a store
SOLE = {"attention": ("token", "logit", "mean_logit"), "promoted": ("token", "token_text")}
"""Whether tokens are repeated, and known, is seen against the first time: of that the clean logit is read. Whether a
promoted token was read before is seen in the text, all of it."""


def spoilt(ds):
    """The store with rubbish at every token that does not count, labels too: NaN at every other one, else a billion."""
    kept = {"counted"}.union(*(names for read, names in SOLE.items() if read in ds))
    found, odd = ds.copy(), np.add.outer(np.arange(ds.sizes["prompt"]), np.arange(ds.sizes["position"])) % 2
    fill = xr.Variable(("prompt", "position"), np.where(odd, np.nan, 1e9))
    for name, array in ds.variables.items():
        if name in kept or not {"prompt", "position"} <= {*array.dims}:
            continue
        blank = {"i": -7, "O": "?", "T": "?", "U": "?", "b": False}.get(array.dtype.kind)
        rubbish = fill if blank is None else xr.Variable((), blank)
        values = xr.where(ds.counted.variable, array, rubbish).transpose(*array.dims)
        found[name] = (array.dims, values.values.astype(array.dtype), array.attrs)
    return found


def outcome(function, *arguments):
    try:
        return function(*arguments)
    except UsageError as error:
        return str(error)


def analysed(ds, share):
    """What every public function of stores finds, or refuses."""
    with_share = (
        "by_head",
        "by_case",
        "by_variant",
        "norm_by_head",
        "scale_by_head",
        "token_noise",
        "top_share",
    )
    with remembering():
        found = {name: outcome(getattr(sr, name), ds) for name in ANALYSES}
        found |= {f"{name} {share}": outcome(getattr(sr, name), ds, share) for name in with_share}
        found["in nats"] = outcome(lambda ds: sr.by_head(sr.in_nats(ds)), ds)
        return found | {"summary": outcome(lambda ds: str(text.summary(ds)), ds), "page": outcome(page, ds)}


def page(ds):
    """The page's numbers: without pictures, which are compared as such, and without the text, all of which is shown."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "text", lambda *_: {})
        patch.setattr(figures, "drawn", lambda *_, **__: [])
        return report.render(ds, store="s.zarr")


def pixels(ds, name):
    figure = figures.draw(name, ds)
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(40)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


@pytest.fixture(scope="module")
def simulated():
    ds = sr.simulate_heads(4, 3, 30, 9, seed=2, components=True)
    return ds.assign_coords(counted=(("prompt", "position"), mask(30, 9)))


KEPT = representative(["simulated", *recipe_paths()], "simulated", "ioi", "freeze", "neurons")


@pytest.fixture(scope="module", params=KEPT)
def any_store(request, stores):
    return request.getfixturevalue("simulated") if request.param == "simulated" else stores(request.param)


def test_no_statistic_looks_at_what_does_not_count(any_store):
    one, other = (analysed(ds, 0.3) for ds in (any_store, spoilt(any_store)))
    for name, value in one.items():
        if isinstance(value, xr.Dataset | xr.DataArray):
            xr.testing.assert_identical(value, other[name])
        else:
            assert value == other[name], name
    with_intervals = [ds for ds in one.values() if isinstance(ds, xr.Dataset) and intervals(ds)]
    assert with_intervals
    assert all(any(np.isfinite(values).any() for values in intervals(ds)) for ds in with_intervals)


def intervals(ds):
    """Half-widths and ends of intervals; none of a result without rows."""
    named = [values for name, values in ds.items() if str(name).endswith(HALF_WIDTH) or name == "high"]
    return [values for values in named if values.size]


OVERVIEW = [name for name, each in figures.FIGURES.items() if each.overview]


def test_no_figure_shows_what_does_not_count(any_store):
    simulated = any_store.attrs["backend"] == "simulated"
    names = figures.suited(any_store) if simulated else find_recipe(any_store.attrs["recipe"]).figures
    names = [*names, *(name for name in OVERVIEW if figures.FIGURES[name].suits(any_store))]
    other = spoilt(any_store)
    with remembering():
        for name in names:
            assert_array_equal(pixels(any_store, name), pixels(other, name), err_msg=name)


def test_every_figure_is_tried(simulated):
    drawn = {*figures.suited(simulated)}.union(*(recipe.figures for recipe in sr.list_recipes()))
    drawn |= {"training"}  # of checkpoints; tests/test_revisions.py has some
    assert drawn | {*OVERVIEW} == {*figures.known()}


@pytest.mark.thorough
def test_every_function_is_tried(stores, simulated):
    every = [simulated, *map(stores, recipe_paths())]
    missing = [n for n in ANALYSES if all(isinstance(outcome(getattr(sr, n), ds), str) for ds in every)]
    assert missing == ["backup_roc", "compare_paper"]  # of GPT-2, and of models of the paper


def test_the_comparison_with_the_paper_neither():
    ds = sr.simulate_heads(3, 2, 4, 9, model="gpt2").assign_coords(
        counted=(("prompt", "position"), mask(4, 9))
    )
    xr.testing.assert_identical(sr.compare_paper(ds), sr.compare_paper(spoilt(ds)))
    assert "of tokens count here, all there" in sr.compare_paper(ds).attrs["differs"]


# ---------------------------------------------------------------- fewer passes


@pytest.fixture(scope="module", params=representative(["neox-parallel", "llama-gqa"], "neox-parallel"))
def asked(request):
    from selfrepair_nn.models.load import wrap

    model = wrap(families.build(request.param))
    return {"model": model, "prompts": chosen(model, 60), "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory):
    return sr.run(out=tmp_path_factory.mktemp("whole") / "s.zarr", components="all", **asked).load()


@pytest.mark.parametrize("share", [None, 0.1])
def test_the_top_share_alone_is_what_a_whole_run_finds_where_it_counts(asked, whole, tmp_path, share):
    ds = sr.run(out=tmp_path / "s.zarr", select="top-share", components="top", share=share, **asked).load()
    top = sr.top_share(whole, share).values
    assert top.sum(axis=(2, 3)).max() == int((share or 1) * whole.counted.sum())
    for name in (*MEANS[1:], "closure"):
        assert_array_equal(np.isfinite(ds[name].values), top, err_msg=name)
        assert_allclose(ds[name].values[top], whole[name].values[top], rtol=0, atol=1e-9)
    assert_array_equal(np.isfinite(ds.component_change.values).all(-1), top)
    assert_allclose(ds.component_change.values[top], whole.component_change.values[top], rtol=0, atol=1e-9)
    one, other = (sr.who_repairs(each, share) for each in (ds, whole))
    for name in ("top_self_repair", "top_self_repair_se", "norm_share", "repair", "top_repaired"):
        assert_allclose(one[name].values.astype(float), other[name].values.astype(float), rtol=0, atol=1e-9)
    if share is None:  # every token that counts is there
        assert_allclose(one.self_repair, other.self_repair, rtol=0, atol=1e-9)
        assert_array_equal(
            pixels(ds, "self_repair_by_layer").shape, pixels(whole, "self_repair_by_layer").shape
        )
        assert "token_noise" in figures.suited(ds)


@pytest.mark.parametrize("share", [None, 0.2])
def test_an_estimate_is_the_mean_over_what_counts(asked, whole, tmp_path, share):
    ds = sr.run(out=tmp_path / "s.zarr", until_ci=0.3, share=share, **asked).load()
    heads = sr.by_head(ds, share)
    assert_allclose(heads.top_self_repair, ds.estimate, rtol=0, atol=1e-9)
    by_label = ds.sortby("prompt")
    assert_array_equal(by_label.counted, whole.counted)
    top = sr.top_share(whole, share).values & by_label.done.values[..., None]
    assert_array_equal(np.isfinite(by_label.self_repair.values), top)
    expected = np.where(top, whole.self_repair, 0).sum((2, 3)) / top.sum((2, 3))
    assert_allclose(ds.estimate, expected, rtol=0, atol=1e-9)


def test_what_is_packed_crosses_a_server_and_is_halved(asked, whole, tmp_path):
    """The same trace body behind a server's serialisation; a unit that is split is joined again."""
    from selfrepair_nn.layout.experiment import prepare
    from selfrepair_nn.layout.sweep import Sweep, plans
    from selfrepair_nn.options import Options

    choices = asked | {"components": "top", "share": 0.2, "layers": "1"}
    ds = sr.run(out=tmp_path / "s.zarr", backend="simulated", **choices).load()
    top = sr.top_share(whole.sel(layer=[1]), 0.2).values
    assert_array_equal(np.isfinite(ds.component_change.values).all(-1), top)
    del choices["progress"]
    experiment = prepare("heads", Options(**choices))
    unit = Sweep(
        experiment, plans(experiment, asked["model"].layout), {}, np.zeros(len(experiment.heads))
    ).units([slice(0, 4)])[0]
    assert unit.halves()
    for each in (unit, unit.halves()[1].halves()[0]):
        found = ran(asked["model"], each)
        assert each.flaw(found) is None
        joined = each.join(*(ran(asked["model"], half) for half in each.halves()))
        assert_allclose(joined["component_change"], found["component_change"], rtol=0, atol=1e-9)


def ran(model, unit):
    from selfrepair_nn.tracing.session import run_session

    return run_session(unit.job, model.nn, unit.arrays, unit.plan)


def test_the_loudest_heads_are_those_on_what_counts(stores, wrapped, tmp_path):
    """At single positions they are others than over all."""
    model, effects = wrapped("neox-sequential", exact=True), stores("heads").direct_effect.values

    def strongest(means):
        return {(1 + i // 3, i % 3) for i in np.argsort(-means.ravel())[:2].tolist()}

    at = [strongest(effects[1:, :, :, p].mean(2)) for p in range(LENGTH - 1)]
    where = next(p for p, found in enumerate(at) if found != strongest(effects[1:].mean((2, 3))))
    counted = np.tile(np.arange(LENGTH - 1) == where, (PROMPTS, 1))
    choices = {"prompts": chosen(model, counted=counted), "layers": "1:", "param": {"count": 2}}
    ds = sr.run("neurons", model=model, out=tmp_path / "n.zarr", progress=False, **choices)
    picked = np.argwhere(ds.selected.values)
    assert {(int(ds.layer[i]), int(ds["head"][j])) for i, j in picked} == at[where]


def test_the_noise_floor_is_that_of_what_is_asked(wrapped, tmp_path):
    """Where nothing is asked the target is the difference of a token and itself, and no rounding shows."""
    model = replace(wrapped("neox-sequential"), tokenizer=Words())
    ds = sr.run("ioi", model=model, out=tmp_path / "s.zarr", progress=False, **CHOICES["ioi"])
    asked_alone = ds.noise_floor.values.max()
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "import numpy as np\nimport selfrepair_nn as sr\nfrom dataclasses import replace\n"
        "def prompts(structure, tokenizer, options):\n"
        "    return replace(sr.ioi_prompts(tokenizer, 12), counted=None)\n"
        "def graph(structure, options):\n"
        "    return sr.Graph(ablate=sr.sweep([sr.Head(0, 0)]))\n"
    )
    diluted = sr.run(
        str(recipe), model=model, out=tmp_path / "m.zarr", progress=False
    ).noise_floor.values.max()
    assert asked_alone > 1.5 * diluted


def test_a_head_is_reinforced_where_it_counts(stores, wrapped, tmp_path):
    ds = stores("self_reinforcement")
    asked, where = mask(), ds.edited_position.values
    some = asked.any(1)
    assert asked[np.flatnonzero(some), where[some]].all()
    assert_array_equal(ds.counted, (np.arange(LENGTH - 1) == where[:, None]) & asked)
    found = sr.reinforcement_by_head(ds)
    assert (found.tokens == some.sum()).all()
    assert np.isnan(found.before.values[..., ~some]).all()
    model = wrapped("neox-sequential", exact=True)
    plain = run("self_reinforcement", model, tmp_path / "s.zarr", prompts=chosen(model).tokens)
    drawn = np.random.default_rng(0).integers(0, LENGTH - 1, PROMPTS)
    assert_array_equal(plain.edited_position, drawn)  # as ever


# ---------------------------------------------------------------- whether the model does the task


def of_task(logits, counted, criterion, **attributes):
    """A store whose clean logits are these [prompt, position]."""
    ds = sr.simulate_heads(1, 1, *np.shape(logits)).assign_attrs(attributes)
    ds = ds.assign_coords(counted=(("prompt", "position"), np.array(counted, bool)))
    ds["logit"] = (("prompt", "position"), np.array(logits, float))
    return ds.assign_attrs(provenance=json.dumps({"prompts": {"criterion": criterion}}))


@pytest.mark.parametrize(
    ("right", "of", "does"),
    [
        (33, 64, 0),
        (41, 64, 1),
        (40, 64, 0),
        (20, 64, 0),
        (4, 8, 0),
        (7, 8, -1),
        (5, 5, -1),
        (6, 6, 1),
        (0, 3, 0),
    ],
)
def test_a_binomial_interval_says_whether_the_task_is_done(right, of, does):
    """Clopper and Pearson's, from the quantiles of the beta distribution."""
    ds = doing(right, of)
    found = sr.does_task(ds)
    low = beta.ppf(0.025, right, of - right + 1) if right else 0
    high = beta.ppf(0.975, right + 1, of - right) if right < of else 1
    assert (found.right, found.asked, found.chance, found.does) == (right, of, of / 2, does)
    assert_allclose([found.low, found.high], [low, high], atol=1e-9)
    assert sentence(right, of, does) in " ".join(str(text.summary(ds)).split())


def doing(right, of):
    """A store of so many prompts, of which so many are right."""
    logits = np.where(np.arange(of) < right, 0.3, -2.0)[:, None] * [0, 1]
    return of_task(logits, [[False, True]] * of, {"says": "prefers the right one"})


def sentence(right, of, does):
    told = {1: "it does this task", 0: "it does not do this task", -1: "too few prompts to tell"}[does]
    return f"the model prefers the right one in {right} of {of} prompts (chance: {of / 2:g}): {told}"


@pytest.mark.parametrize(("right", "of", "does"), [(33, 64, 0), (41, 64, 1), (7, 8, -1)])
def test_whether_the_task_is_done_is_said_everywhere(right, of, does, no_figures):
    ds, said = doing(right, of), sentence(right, of, does)
    assert f"T{said[1:]}" in figures.draw("self_repair_by_layer", ds).get_supxlabel()
    assert said in report.render(ds)


def test_repeated_tokens_are_seen_against_the_first_time():
    better, worse = [1, 1, 1, 2, 1.5, -9], [5, 5, 5, 4, 5.5, 9]
    counted = [[False] * 3 + [True] * 2 + [False]] * 10
    found = sr.does_task(of_task([better] * 8 + [worse] * 2, counted, {"says": "x", "back": 3}))
    assert (int(found.right), int(found.asked), found.attrs["unit"]) == (16 + 2, 20, "tokens")


def test_of_a_raw_target_the_mean_logit_is_taken_off():
    ds = of_task([[2.0]] * 8, [[True]] * 8, {"says": "x"}, target="raw")
    ds["mean_logit"] = 0 * ds.mean_logit + np.array([1, 3] * 4)[:, None]
    assert int(sr.does_task(ds).right) == 4


@pytest.mark.parametrize("recipe", OWN)
def test_a_task_tells_whether_it_is_done(stores, recipe):
    ds = stores(recipe)
    logit, counted = ds.logit.values.astype(float), ds.counted.values
    if recipe == "induction":
        logit = logit - np.pad(logit, ((0, 0), (5, 0)))[:, : logit.shape[1]]
    right, asked = int((logit[counted] > 0).sum()), int(counted.sum())
    unit = "prompts" if recipe == "ioi" else "tokens"
    said = f"in {right} of {asked} {unit} (chance: {asked / 2:g})"
    assert said in " ".join(str(text.summary(ds)).split())
    [figure] = [name for name in figures.suited(ds) if name in ("ioi", "induction", "contrast")]
    assert said in figures.draw(figure, ds).get_supxlabel()


def test_prompts_that_are_no_task_have_no_verdict(stores):
    ds = stores("heads")
    assert "task" not in sr.by_head(ds).attrs
    with pytest.raises(UsageError, match="no task"):
        sr.does_task(ds)


def test_every_public_analysis_is_a_function():
    assert all(isinstance(getattr(sr, name), FunctionType) for name in ANALYSES)
