"""What a user may write, what a store is called for it, and what is refused before anything is loaded."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import families
import numpy as np
import pytest
import torch
import xarray as xr
from terminal import ENVIRONMENT, assert_same_numbers, files, ids, saved, selfrepair

import selfrepair_nn as sr
from selfrepair_nn.door import requested
from selfrepair_nn.errors import StoreError, UsageError
from selfrepair_nn.naming import Request, Sizes
from selfrepair_nn.options import RENAMED, Options
from selfrepair_nn.recipe import find_recipe
from selfrepair_nn.store import Store

NEOX = Sizes(8, 8, 256)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return ids(tmp_path_factory.mktemp("prompts") / "p.npy")


# One value, however it is written

HEADS = [["L5H1"], ["5.1"], [(5, 1)], [[5, 1]], [sr.Head(5, 1)], sr.Head(5, 1), (5, 1), np.array([[5, 1]]), "L5H1",
         "5.1", {"5.1"}, iter([(np.int64(5), np.int32(1))]), torch.tensor([[5, 1]])]  # fmt: skip
LAYERS = [[5, 6], (5, 6), range(5, 7), slice(5, 7), np.array([6, 5]), torch.tensor([5, 6]), "5,6", "5:7", "-3,-2",
          ["5", 6], [5.0, np.int64(6)], {5, 6}, [range(5, 7)], "6,5,5"]  # fmt: skip


def place(**choices):
    recipe = find_recipe(choices.pop("recipe", "heads"))
    options = recipe.resolved(Options(**choices))
    return Request(recipe, options, choices.get("model", "tiny-neox"), NEOX, options.dtype)


@pytest.mark.parametrize("layers", LAYERS, ids=repr)
def test_layers_are_the_same_however_they_are_written(layers):
    written = Options(layers=layers)
    assert {head.layer for head in sr.select_heads(written.layers, None, 8, 8)} == {5, 6}
    assert sr.select_heads(layers, None, 8, 8) == sr.select_heads("5:7", None, 8, 8)
    assert place(layers=layers).choices == place(layers="5,6").choices
    assert place(layers=layers).name == "heads-tiny-neox-layers5,6.zarr"


@pytest.mark.parametrize("heads", HEADS, ids=repr)
def test_heads_are_the_same_however_they_are_written(heads):
    written = Options(heads=heads)
    assert sr.select_heads(None, written.heads, 8, 8) == (sr.Head(5, 1),)
    assert place(heads=written.heads).choices == place(heads="5.1").choices


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("layers", 5, "5"),
        ("layers", np.int64(5), "5"),
        ("tokens", np.int64(512), 512),
        ("tokens", 512.0, 512),
        ("tokens", np.float32(512), 512),
        ("tokens", torch.tensor(512), 512),
        ("seed", np.uint8(3), 3),
        ("share", np.float32(0.5), 0.5),
        ("share", 1, 1.0),
        ("until_ci", torch.tensor(0.25), 0.25),
        ("check", np.bool_(False), False),
        ("out", Path("a/b"), "a/b"),
        ("model", Path("m"), "m"),
        ("prompts", Path("t.txt"), "t.txt"),
        ("prompts", ["one", "two"], ("one", "two")),
        ("dtype", torch.float64, "float64"),
        ("dtype", np.float64, "float64"),
        ("device", torch.device("cuda:1"), "cuda:1"),
        ("shard", (3, 8), "3/8"),
        ("param", {"scale": np.float64(3)}, {"scale": 3.0}),
        ("param", {"scales": np.array([1, 3])}, {"scales": [1, 3]}),
        ("param", "scale=3", ("scale=3",)),
        ("param", ["a=1", "b=2"], ("a=1", "b=2")),
    ],
)
def test_plain_meanings_are_taken(name, given, kept):
    found = getattr(Options(**{name: given}), name)
    assert (found, type(found)) == (kept, type(kept))
    assert getattr(replace(Options(**{name: given})), name) == kept


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_taken_and_told(old, new, capsys):
    assert Options(**{old: 64}) == Options(**{new: 64}) != Options()
    assert capsys.readouterr().err.count(f"{old} is called {new} now") == 1
    assert Options(**{old: None}) == Options()
    assert not capsys.readouterr().err
    with pytest.raises(UsageError, match=f"give only {new}"):
        Options(**{old: 64, new: 64})


@pytest.mark.parametrize("option", fields(Options), ids=lambda option: option.name)
def test_none_is_the_default(option):
    assert getattr(Options(**{option.name: None}), option.name) == option.default


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("layers", True, r"\[0, 5, -1\]"),
        ("layers", 5.5, "5.5"),
        ("layers", {"a": 1}, "range"),
        ("layers", [1.5], "1.5"),
        ("heads", [5, 1], r"\(9, 6\)"),
        ("heads", 5.1, "5.1"),
        ("heads", [5.1], "5.1"),
        ("heads", [(1, 2, 3)], "L9H6"),
        (
            "prompts",
            [[1, 2, 3], [4, 5]],
            r"rows of 3 and of 2 tokens \(prompts 0 and 1\).*no padding.*row\[:2\]",
        ),
        ("prompts", [], "empty"),
        ("prompts", [1, "a"], "list of texts"),
        ("prompts", {"a": 1}, "list of texts"),
        ("prompts", 5, "list of texts"),
        ("prompts", object(), "list of texts"),
        ("tokens", "512", "whole number"),
        ("tokens", 512.5, "512.5"),
        ("tokens", True, "True"),
        ("tokens", 10**5000, "at most"),
        ("tokens", float("inf"), "inf"),
        ("share", float("nan"), "nan"),
        ("share", "2%", "'2%'"),
        ("until_ci", 0, "above 0"),
        ("param", 5, "NAME=VALUE"),
        ("param", {1: 2}, "text"),
        ("check", "no", "True or False"),
        ("check", 1, "True or False"),
        ("yes", "yes", "True or False"),
        ("ablation", ["zero"], "choose one of resample"),
        ("ablation", 0, "choose one of resample"),
        ("out", 5, "path"),
        ("out", "", "path"),
        ("dtype", int, "'int'.*float32"),
        ("seed", -1, "0 or more"),
        ("host", "http://a..b", "http://127.0.0.1:8001"),
        ("host", 5, "text"),
        ("dataset_split", "", "text"),
        ("shard", (9, 8), "1/8 to 8/8"),
        ("shard", "9" * 5000 + "/1", "1/8 to 8/8"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_is_one_line(name, given, said):
    with pytest.raises(UsageError, match=said) as refused:
        Options(**{name: given})
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sr.run("heads", token=512), r"no option 'token' \(did you mean tokens\?\); there.*layers"),
        (lambda: sr.run(nope=1), "no option 'nope'; there are model, prompts"),
        (lambda: sr.run("heads", progres=True), "did you mean progress"),
        (lambda: sr.preview("heads", calibrat=True), "did you mean calibrate"),
        (lambda: sr.Options(lenght=5), "did you mean length"),
        (lambda: sr.Options("tiny-neox"), "by name"),
        (lambda: sr.run("haeds"), r"no recipe 'haeds' \(did you mean heads\?\); there"),
        (lambda: sr.run(5), "recipe must be a"),
        (lambda: sr.run("neurons", param={"coutn": 2}), "no parameter 'coutn' .did you mean count"),
        (lambda: sr.run("neurons", param="count"), "NAME=VALUE"),
        (
            lambda: sr.run("self_reinforcement", param="scales={[]:1}"),
            "parameter scales: .* is not like its default",
        ),
    ],
)
def test_a_misspelt_name_is_told_with_the_nearest(call, said):
    with pytest.raises(UsageError, match=said):
        call()


# Prompts


@pytest.fixture(scope="module")
def neox():
    return sr.load("tiny-neox", check=False)


TEXTS = ["The first text is about a house by the sea. " * 9, "And the second one about a ship. " * 12]


def small(model, out, **choices):
    return sr.run("heads", model=model, layers=7, ablation="zero", out=out, progress=False, **choices).load()


def test_texts_are_packed_like_a_file_of_them(neox, tmp_path):
    (tmp_path / "t.txt").write_text("\n\f\n".join(TEXTS))
    given = small(neox, tmp_path / "list.zarr", prompts=TEXTS, length=32)
    read = small(neox, tmp_path / "file.zarr", prompts=tmp_path / "t.txt", length=32)
    np.testing.assert_array_equal(given.token, read.token)
    np.testing.assert_array_equal(given.document, read.document)
    np.testing.assert_array_equal(given.self_repair, read.self_repair)
    assert set(given.document.values) == {0, 1}
    source = json.loads(given.attrs["provenance"])["prompts"]
    assert (source["kind"], source["documents"]) == ("texts", 2)
    other = small(neox, tmp_path / "other.zarr", prompts=TEXTS[::-1], length=32)
    assert json.loads(other.attrs["provenance"])["prompts"]["sha256"] != source["sha256"]


def test_token_ids_are_the_same_run_in_any_container(neox, tmp_path):
    rows = np.random.default_rng(0).integers(0, 2048, (4, 16))
    np.save(tmp_path / "rows.npy", rows)
    texts = sr.text_prompts(neox.structure, neox.tokenizer, Options(prompts=rows))
    containers = [rows, rows.tolist(), torch.tensor(rows), [*rows], tmp_path / "rows.npy", texts]
    settings = {small(neox, tmp_path / "s.zarr", prompts=each).attrs["settings"] for each in containers}
    assert len(settings) == 1, "one store: each after the first goes on with it"


def test_prompts_that_are_made_are_used_and_cut(neox, tmp_path):
    made = sr.ioi_prompts(neox.tokenizer, 8)
    whole = small(neox, tmp_path / "whole.zarr", prompts=made)
    assert whole.attrs["target"] == "difference"
    np.testing.assert_array_equal(whole.token, made.tokens[:, :-1])
    with pytest.raises(UsageError, match="4 rows of 6 tokens hold none that counts"):
        small(neox, tmp_path / "part.zarr", prompts=made, length=6, tokens=24)
    made = replace(made, counted=np.arange(made.length - 1) % 2 == np.zeros((8, 1)))
    part = small(neox, tmp_path / "part.zarr", prompts=made, length=6, tokens=24)
    np.testing.assert_array_equal(part.counted, made.counted[:4, :5])
    np.testing.assert_array_equal(part.token, made.tokens[:4, :5])
    np.testing.assert_array_equal(part.other, made.other[:4, :5])


# Names


@pytest.mark.parametrize(
    ("choices", "name"),
    [
        ({}, "heads-tiny-neox"),
        (
            {"device": "cpu", "batch_size": 3, "workers": 2, "threads": 1, "tokens_per_pass": 99, "check": False},
            "heads-tiny-neox",
        ),
        ({"shard": "1/2", "backend": "simulated"}, "heads-tiny-neox"),
        ({"remote": True, "in_flight": 5, "patience": 9, "yes": True}, "heads-tiny-neox-remote"),
        ({"tokens": 16384, "length": 128, "select": "all", "seed": 0, "layers": None}, "heads-tiny-neox"),
        ({"tokens": 2048}, "heads-tiny-neox-tokens2048"),
        ({"tokens": 2048, "layers": [5, 6], "ablation": "zero"}, "heads-tiny-neox-tokens2048-layers5,6-zero"),
        ({"layers": "4:", "heads": "L5H1,6.*"}, "heads-tiny-neox-layers4-7-heads5.1,6.all"),
        ({"dtype": "float64", "target": "raw", "seed": 3}, "heads-tiny-neox-raw-float64-seed3"),
        ({"until_ci": 0.05, "ci_of": "layers"}, "heads-tiny-neox-until-ci0.05-ci-of-layers"),
        ({"select": "top-share", "share": 0.1}, "heads-tiny-neox-share0.1-top-share"),
        ({"components": "top", "freeze": "downstream"}, "heads-tiny-neox-freeze-downstream-components-top"),
        ({"prompts": "owner/pile-10k"}, "heads-tiny-neox-pile-10k"),
        ({"prompts": "a/b/text.txt"}, "heads-tiny-neox-text"),
        ({"remote": True, "layers": 3}, "heads-tiny-neox-layers3-remote"),
        ({"recipe": "neurons", "param": {"count": 4}}, "neurons-tiny-neox"),
        ({"recipe": "neurons", "param": ["count=8"]}, "neurons-tiny-neox-count8"),
        ({"recipe": "contrastive"}, "contrastive-tiny-neox"),
        ({"recipe": "contrastive", "tokens": 1024}, "contrastive-tiny-neox"),
        ({"recipe": "contrastive", "param": {"new": "/"}}, "contrastive-tiny-neox-new-_"),
        (
            {"recipe": "self_reinforcement", "param": {"scales": (1, 2)}},
            "self_reinforcement-tiny-neox-scales1,2",
        ),
        ({"model": "a/b/M.gguf"}, "heads-M"),
    ],
    ids=str,
)
def test_a_store_is_named_by_what_was_chosen(choices, name):
    assert place(**choices).name == f"{name}.zarr"
    assert str(place(**choices).path) == f"outputs/{name}.zarr"
    assert str(place(**choices, out="x").path) == f"x/{name}.zarr"
    assert str(place(**choices, out="y.zarr").path) == "y.zarr"


def test_many_choices_make_a_name_that_every_file_system_takes():
    many = {
        "layers": [0, 2, 4, 6],
        "heads": ",".join(f"{n}.{n}" for n in range(8)),
        "tokens": 2048,
        "dtype": "float64",
    }
    names = {place(**many, seed=seed, param={}).name for seed in (0, 1, 2)}
    assert len(names) == 3
    assert all(len(name.encode()) <= 105 for name in names)
    assert all(name.startswith("heads-tiny-neox-tokens2048-") for name in names)
    assert place(**many).name in names, "the same again has the same name"
    odd = place(prompts="a:\\b/é*?<\n>" + "x" * 200 + ".txt", model="ü" * 100).name
    assert len(odd.encode()) <= 105
    assert not set(odd) & set('/\\:*?"<>|\n')


def test_the_second_experiment_has_a_place_of_its_own(model, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["run", "heads", "--model", model, "--prompts", prompts]
    flags = [[], ["--layers", "1:3"], ["--layers", "1,2"], ["--ablation", "zero"], ["--tokens", "14"]]
    for more in (*flags, *flags):
        ended = selfrepair(*command, *more)
        assert ended.code == 0, ended.err
    places = {f"heads-m-p{name}.zarr" for name in ("", "-layers1,2", "-zero", "-tokens14")}
    assert {path.name for path in Path("outputs").glob("*.zarr")} == places


def test_plan_names_the_store_that_run_makes(model, prompts, tmp_path):
    choices = {"model": model, "prompts": prompts, "heads": [(1, 2)], "out": tmp_path}
    planned = sr.preview("heads", **choices)["store"]
    assert sr.run("heads", progress=False, **choices).encoding["source"] == planned


def test_the_command_is_kept_in_one_form(model, prompts, tmp_path):
    stored = [
        sr.run(model=model, prompts=prompts, layers=layers, out=tmp_path / f"{n}.zarr", progress=False)
        for n, layers in enumerate(([1, 2], "1,2", np.array([1, 2])))
    ]
    assert_same_numbers(tmp_path / "0.zarr", tmp_path / "1.zarr")
    commands = {ds.attrs["command"].replace(f"{n}.zarr", "") for n, ds in enumerate(stored)}
    assert commands == {f"selfrepair_nn.run('heads', model={str(model)!r}, prompts={str(prompts)!r}, "
                        f"out={str(tmp_path) + '/'!r}, layers='1,2')"}  # fmt: skip


# A store that holds another run


@pytest.fixture(scope="module")
def made(model, prompts, tmp_path_factory):
    """A finished run in x.zarr of a directory, and the flags that it was made with; nobody may change it."""
    flags = ["--model", str(model), "--prompts", str(prompts), "--out", "x.zarr"]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(directory := tmp_path_factory.mktemp("made"))
        assert selfrepair("run", "heads", *flags, "--layers", "1", "--tokens", "28").code == 0
    return directory, flags


@pytest.fixture
def taken(made, tmp_path, monkeypatch):
    """The same in the working directory, where it may be changed."""
    monkeypatch.chdir(tmp_path)
    directory, flags = made
    shutil.copytree(directory / "x.zarr", "x.zarr")
    return flags


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--layers", "2", "--tokens", "28"], "layers 1 there, 2 here"),
        (["--tokens", "28"], "layers 1 there, left open here"),
        (["--layers", "1", "--tokens", "42"], "tokens 28 there, 42 here"),
        (["--layers", "1", "--tokens", "28", "--ablation", "zero"], "ablation resample there, zero here"),
        (["--layers", "1", "--tokens", "28", "--dtype", "float64"], "dtype float32 there, float64 here"),
        (["--layers", "1", "--tokens", "28", "--seed", "1"], "seed 0 there, 1 here"),
        (["--layers", "1", "--tokens", "28", "--freeze", "all"], "freeze none there, all here"),
        (["--layers", "1", "--tokens", "28", "--heads", "1.1"], "heads left open there, 1.1 here"),
    ],
    ids=" ".join,
)
def test_a_conflict_is_told_in_words_with_a_place_that_is_free(taken, flags, said):
    before = files(Path("x.zarr"))
    ended = selfrepair("run", "heads", *taken, *flags)
    assert ended.code == 1
    assert f"'x.zarr' holds another run ({said}): choose another --out, free is --out " in ended.err
    assert len(ended.err.splitlines()) == 1
    assert files(Path("x.zarr")) == before
    free = ended.err.rstrip().rpartition("--out ")[2]
    assert not Path(free).exists()
    again = selfrepair("run", "heads", *taken[:-2], *flags, "--out", free)
    assert again.code == 0, again.err


def test_another_recipe_and_another_model_are_told(taken, tmp_path):
    ended = selfrepair("run", "noise", *taken, "--layers", "1", "--tokens", "28")
    assert "(recipe heads there, token_scatter here)" in ended.err
    other = saved(tmp_path / "other", seed=1)
    ended = selfrepair("run", "heads", *taken[2:], "--model", other, "--layers", "1", "--tokens", "28")
    assert re.search(r"\(model .*/m there, .* here\)", ended.err)


def test_the_same_prompts_under_another_name_are_the_same_run(taken, prompts):
    shutil.copy(prompts, "copy.npy")
    flags = ["--layers", "1", "--tokens", "28", "--prompts", "copy.npy"]
    assert selfrepair("run", "heads", *taken, *flags).code == 0
    shutil.copy(ids(Path("other.npy"), seed=5), "copy.npy")
    ended = selfrepair("run", "heads", *taken, *flags)
    assert "there, copy.npy here" in ended.err
    np.save(prompts.with_name("mine.npy"), np.load(prompts))
    changed = [*taken[:2], "--prompts", prompts.with_name("mine.npy"), "--out", "y.zarr", "--layers", "1"]
    assert selfrepair("run", "heads", *changed).code == 0
    np.save(prompts.with_name("mine.npy"), np.load(prompts) + 1)
    ended = selfrepair("run", "heads", *changed)
    assert "(the prompts' token ids are others)" in ended.err, ended.err


def test_a_store_without_its_options_is_compared_by_its_settings(taken):
    newer = ("options", "figures")
    Store(Path("x.zarr"))._describe(lambda now: {k: v for k, v in now.items() if k not in newer})
    assert selfrepair("run", "heads", *taken, "--layers", "1", "--tokens", "28").code == 0
    ended = selfrepair("run", "heads", *taken, "--layers", "2", "--tokens", "28")
    assert "(other places are ablated; something else is done to them)" in ended.err


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"attributes": 3}', '{"attributes": {"options": "3"}}',
                                    '{"attributes": {"settings": "[]", "options": "{}"}}'])  # fmt: skip
def test_a_damaged_description_is_left_to_who_opens_it(taken, damage):
    Path("x.zarr/zarr.json").write_text(damage)
    requested("heads", Options(model=taken[1], prompts=taken[3], out="x.zarr", layers=1))


# At once

HEAVY = ("torch", "transformers", "xarray", "zarr", "nnsight", "datasets", "matplotlib", "scipy")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "heads", "--layers", "9:12"], 2, "layers 0 to 7"),
        (["plan", "heads", "--layers", "9:12"], 2, "layers 0 to 7"),
        (["run", "heads", "--heads", "9.1"], 2, "layers 0 to 7"),
        (["run", "heads", "--heads", "1.9"], 2, "heads 0 to 7"),
        (["run", "heads", "--layers", "1", "--heads", "2.1"], 2, "widen"),
        (["run", "haeds"], 2, "did you mean heads"),
        (["run", "none.py"], 2, "no recipe"),
        (["run", "heads", "--dtype", "float23"], 2, "float32"),
        (["run", "heads", "--token", "5"], 2, "--tokens"),
        (["run", "heads", "--share", "2"], 2, "share"),
        (["run", "heads", "--model", "./nowhere"], 2, "does not exist"),
        (["run", "neurons", "--param", "coutn=1"], 2, "did you mean count"),
        (["run", "noise", "--select", "top-share"], 2, "--select all"),
        (["check", "tiny-neox", "--dtype", "int8"], 2, "float32"),
        (["run", "heads", "--tokens", "512", "--out", "x.zarr"], 1, "tokens 2048 there, 512 here"),
        (
            ["run", "heads", "--tokens", "2048", "--layers", "1", "--out", "x.zarr"],
            1,
            "layers left open there, 1 here",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_it_is_refused_before_anything_is_imported(tmp_path, arguments, code, said):
    (tmp_path / "x.zarr").mkdir()
    asked = place(tokens=2048)
    graph = asked.recipe.graph(_Sizes, asked.options)
    settings = {"heads": graph.labels, "graph": [None, graph.digest]}
    told = {"options": asked.choices, "settings": settings}
    attributes = {n: json.dumps(v) for n, v in told.items()} | {"recipe": "heads", "model": "tiny-neox"}
    (tmp_path / "x.zarr" / "zarr.json").write_text(json.dumps({"attributes": attributes}))
    loaded = f"print([m for m in {HEAVY} if m in sys.modules], 'late' if time.process_time() > 20 else 'in time')"
    program = (
        f"import atexit, sys, time; atexit.register(lambda: {loaded}); sys.argv = ['selfrepair', *{arguments!r}]\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", f"{program}from selfrepair_nn.cli import main; main()"],
        env=os.environ | ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (code, "[] in time\n"), ended.stderr
    assert said in ended.stderr


class _Sizes:
    n_layers = n_heads = 8
    d_mlp = 512


def test_a_recipe_is_executed_once_a_run(tmp_path, model, prompts):
    """What is looked at beforehand is what runs: a user's file is not executed once more for it."""
    (tmp_path / "mine.py").write_text(
        f'"""Mine."""\nwith open({str(tmp_path / "count")!r}, "a") as f:\n    f.write("x")\n'
        "import selfrepair_nn as sr\n"
        "def graph(structure, options):\n    return sr.Graph(ablate=sr.sweep([sr.Head(1, 1)]))\n"
    )
    command = [
        "run",
        tmp_path / "mine.py",
        "--model",
        model,
        "--prompts",
        prompts,
        "--out",
        tmp_path / "s.zarr",
    ]
    assert selfrepair(*command).code == 0
    assert (tmp_path / "count").read_text() == "x"
    assert xr.open_zarr(tmp_path / "s.zarr").attrs["recipe"] == "mine"


def test_shards_and_workers_agree_on_the_name(model, prompts, tmp_path):
    choices = [
        "--model",
        model,
        "--prompts",
        prompts,
        "--layers",
        "1:",
        "--batch-size",
        "1",
        "--out",
        tmp_path,
    ]
    for flags in (["--shard", "1/2"], ["--workers", "2", "--shard", "2/2"]):
        ended = selfrepair("run", "heads", *choices, *flags)
        assert ended.code in (0, 75), ended.err
    assert [path.name for path in tmp_path.glob("*.zarr")] == ["heads-m-p-layers1,2.zarr"]
    assert bool(xr.open_zarr(tmp_path / "heads-m-p-layers1,2.zarr").done.all())


def test_a_handed_in_model_is_named_by_what_it_computes_in(tmp_path, prompts):
    names = set()
    for exact in (False, True):
        model = sr.wrap(families.build("gpt2").double() if exact else families.build("gpt2").float())
        ds = sr.run(model=model, prompts=prompts, layers=1, out=tmp_path, progress=False)
        names.add(Path(ds.encoding["source"]).name)
    assert names == {f"heads-GPT2LMHeadModel-p-layers1{end}.zarr" for end in ("", "-float64")}


def test_a_conflict_is_an_error_of_the_store_in_python(taken):
    with pytest.raises(StoreError, match=r"layers 1 there, 2 here\): choose another --out, free is --out "):
        sr.run(model=taken[1], prompts=taken[3], out="x.zarr", layers=[2], tokens=28)
