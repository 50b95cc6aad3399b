"""No traceback for a user: plain mistakes are one line, in words; what nobody foresaw is one too, with a file."""

import inspect
import json
import re
from pathlib import Path

import fuzz
import numpy as np
import pytest
import xarray as xr
from terminal import assert_same_numbers, ids, saved, selfrepair

import selfrepair_nn as sr
from selfrepair_nn.backends.ndif.history import history
from selfrepair_nn.backends.ndif.ledger import SENDING, Ledger, ledger_path
from selfrepair_nn.errors import SelfRepairError, UsageError
from selfrepair_nn.running.run import run

SAMPLE, SEED = 150, 7


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return fuzz.Place(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def choices(place, tmp_path, monkeypatch):
    """The flags of a tiny run, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return ["--model", place.model, "--prompts", place.prompts]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("hardly_written")
def test_a_sample_of_all_mistakes_is_told_in_one_line_each(place, monkeypatch):
    """`python -m tests.fuzz` tries all of them."""
    monkeypatch.chdir(place.work)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert list(fuzz.complaints(fuzz.chosen(place, SAMPLE, SEED))) == []


def test_the_fuzzer_knows_every_option_and_every_public_name(place):
    names = {case.name for case in fuzz.chosen(place, None, 0)}
    for option in fuzz.fields(fuzz.Options):
        assert any(f"--{option.name.replace('_', '-')}" in name for name in names)
        assert any(f"{option.name}=" in name for name in names if name.startswith("sr.preview("))
    for name in sr.__all__:
        public = getattr(sr, name)
        if not (isinstance(public, type) and issubclass(public, Exception)):
            assert any(case.startswith(f"sr.{name}(") for case in names), name


def test_the_fuzzer_complains(place, monkeypatch):
    """Of a traceback, of what nobody foresaw, of more than a line: or it would be of no use."""

    def broken(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("selfrepair_nn.estimating.preview.prepare", broken)
    typed = fuzz._typed(["plan", "heads", "--model", place.model, "--prompts", place.prompts])
    called = fuzz._called("preview", sr.preview, (), lambda: {"model": place.model})
    assert "unexpected" in typed.try_it()
    assert called.try_it().startswith("RuntimeError")


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--seed", "-1", "--ablation", "mean"], 2, "seed must be a whole number (0 or more), not -1"),
        (["--seed", "-1", "--until-ci", "0.1"], 2, "seed must be a whole number (0 or more), not -1"),
        (["--out", "~no-such-user/x.zarr"], 2, "~no-such-user"),
        (["--device", "meta"], 2, "device 'meta' cannot be used here"),
        (["--device", "mps"], 2, "device 'mps' cannot be used here"),
        (["--tokens", "9" * 5000], 2, "not a valid integer"),
        (["--layers", "9" * 5000], 2, "goes beyond any model"),
        (["--layers", f"1:{'9' * 5000}"], 2, "goes beyond any model"),
        (["--heads", f"1.{'9' * 5000}"], 2, "goes beyond any model"),
        (["--tokens", "9" * 25], 2, "tokens must be at most 1,000,000,000,000"),
        (["--param", f"count={'9' * 5000}"], 2, "no parameter 'count'"),
        (["--workers", "100000"], 2, "must be at most 1,024"),
        (["--threads", "99999999"], 2, "must be at most 1,024"),
        (["--host", "http://a..b"], 2, "is not an address"),
        (["--host", f"http://{'a' * 80}.b"], 2, "is not an address"),
        (["--in-flight", "4"], 2, "in_flight is for a model on a server"),
        (["--patience", "9"], 2, "patience is for a model on a server"),
        (["--host", "http://127.0.0.1:1", "--device", "cpu"], 2, "device is for a model on this machine"),
        (["--host", "http://127.0.0.1:1", "--threads", "2"], 2, "threads is for a model on this machine"),
        (["--dataset-split", "test"], 2, "dataset_split"),
        (["--column", "body"], 2, "column"),
        (["--prompts-revision", "main"], 2, "prompts_revision"),
        (["--revision", "main"], 2, "revision"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_plain_mistake_is_one_line(choices, flags, code, said):
    ended = selfrepair("run", "heads", *choices, *flags)
    assert ended.code == code
    assert said in ended.err.splitlines()[-1]
    assert len(ended.err) < 900
    assert "unexpected" not in ended.err
    assert not list(Path().glob("**/*.zarr"))


@pytest.mark.parametrize(
    ("recipe", "flags", "option"),
    [
        ("layer_position", ["--layers", "1"], "--layers"),
        ("layer_position", ["--heads", "1.1"], "--heads"),
        ("ablation_kinds", ["--ablation", "zero"], "--ablation"),
        ("ablation_kinds", ["--components"], "--components"),
        ("freeze", ["--freeze", "all"], "--freeze"),
        ("self_reinforcement", ["--ablation", "zero"], "--ablation"),
        ("induction", ["--tokens", "512"], "--tokens"),
        ("induction", ["--prompts", "sample.txt"], "--prompts"),
    ],
)
def test_a_choice_that_a_recipe_does_not_take_is_refused(tmp_path, monkeypatch, recipe, flags, option):
    monkeypatch.chdir(tmp_path)
    ended = selfrepair("run", recipe, "--model", "tiny-neox", *flags)
    assert ended.code == 2
    assert re.search(rf"recipe '{recipe}' .*takes no {option}\b.*: leave it out", ended.err)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--ablation", "zero", "--seed", "3"], "seed"),
        (["--mean-prompts", "4"], "mean_prompts"),
        (["--share", "0.1"], "share"),
        (["--ablation", "zero", "--seed", "3", "--share", "0.1"], "seed and share"),
        (["--seed", "3"], None),
        (["--ablation", "mean", "--mean-prompts", "4"], None),
        (["--components", "top", "--share", "0.1"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_choice_that_changes_nothing_is_told(choices, flags, told):
    ended = selfrepair("run", "heads", *choices, *flags, "--layers", "1")
    assert ended.code == 0
    expected = f"selfrepair: {told}: chosen, but nothing in this run depends on it\n" if told else ""
    assert ended.err == expected


# What is in a store, and beside it


@pytest.fixture(scope="module")
def whole(place):
    return sr.open_store(place.store)


SUBSETS = {
    "a variable": lambda ds: ds[["self_repair"]],
    "no self-repair": lambda ds: ds.drop_vars("self_repair"),
    "no bookkeeping": lambda ds: ds.drop_vars(["done", "selected"]),
    "one head": lambda ds: ds.isel(head=0, drop=True),
    "one layer, without its axis": lambda ds: ds.isel(layer=0, drop=True),
    "few prompts": lambda ds: ds.isel(prompt=slice(2)),
    "no labels": lambda ds: ds.drop_vars([n for n in ds.coords if n not in ds.dims]),
    "no attributes": lambda ds: ds.drop_attrs(deep=False).assign_attrs(format=1),
    "nothing": lambda ds: xr.Dataset(attrs={"format": 1}),
}


@pytest.mark.parametrize("name", SUBSETS)
@pytest.mark.usefixtures("hardly_written")
@pytest.mark.filterwarnings("ignore")
def test_a_part_of_a_store_saved_by_xarray_is_used_or_refused(choices, whole, name):
    SUBSETS[name](whole.load()).drop_encoding().to_zarr("part.zarr", consolidated=False)
    run = ["run", "heads", *choices, "--layers", "1", "--out", "part.zarr"]
    for command in (["info"], ["plot"], ["report"], ["jobs"], ["compare-paper"], run):
        ended = selfrepair(*command, *([] if command is run else ["part.zarr"]))
        assert ended.code in (0, 1, 2)
        assert "unexpected" not in ended.err, (command, ended.err)
        assert len(ended.err.splitlines()) <= 1
    for name in ("summary", "by_head", "by_layer", "plot", "write_report", "top_share", "token_noise"):
        assert fuzz._called(name, getattr(sr, name), ("part.zarr",), dict).try_it() is None


BAD_LINES = [
    "[]", "{", "3", '{"event": 3}', '{"time": "x", "event": "sending", "part": "p", "job": "j", "bytes": 1}',
    '{"time": "2026-01-01T00:00:00", "event": "sending", "part": "p"}',
    '{"time": "2026-01-01T00:00:00", "event": "failed", "part": "p", "kind": ["a"], "text": "t"}',
    '{"time": "2026-01-01T00:00:00", "event": "fetched", "part": "p", "bytes": "many"}',
    '{"time": "2026-01-01T00:00:00", "event": ["sent"], "part": "p"}',
    '{"time": "2026-01-01T00:00:00", "event": "sent", "part": {}, "job": "j"}',
    '{"time": "2026-01-01T00:00:00", "event": "sent", "part": "p", "job": 5}',
    '{"time": "9999999-01-01", "event": "sent", "part": "p"}',
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_in_a_ledger_is_no_line(tmp_path, bad):
    path = ledger_path(tmp_path / "s.zarr")
    Ledger(path, "r").write(SENDING, "first", job="a", bytes=10)
    with open(path, "a") as file:
        file.write(bad.replace('"event"', '"run": "r", "event"') + "\n")
    Ledger(path, "r").write(SENDING, "second", job="b", bytes=10)
    assert list(Ledger(path, "r").records) == ["first", "second"]


def test_a_failure_of_a_kind_that_is_not_known_is_shown(tmp_path):
    path = ledger_path(tmp_path / "s.zarr")
    Ledger(path, "r").write("failed", "first", job="a", kind="of another version", text="why")
    assert "1 x of another version" in history(tmp_path / "s.zarr", "r")


# What nobody foresaw


def test_what_nobody_foresaw_is_one_line_and_a_file(choices, monkeypatch, tmp_path):
    monkeypatch.setenv("NDIF_API_KEY", "a-secret-of-mine-123")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def broken(*_, **__):
        raise ZeroDivisionError("a-secret-of-mine-123 by zero")

    monkeypatch.setattr("selfrepair_nn.running.run.prepare", broken)
    ended = selfrepair("run", "heads", *choices)
    assert (ended.code, ended.out) == (1, "")
    path = re.fullmatch(r"selfrepair: unexpected, please report it with what is in (.*)\n", ended.err)[1]
    told = Path(path).read_text()
    assert "Traceback" in told
    assert "ZeroDivisionError" in told
    assert "selfrepair run heads" in told
    assert "secret" not in told + ended.err


# Python


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sr.Scale("x"), "factor of Scale must be a number, not 'x'"),
        (lambda: sr.Scale(float("nan")), "finite"),
        (lambda: sr.Constant(None), "value of Constant must be a number"),
        (lambda: sr.Reinforce([1]), "scale of Reinforce must be a number"),
        (lambda: sr.OtherHead("L1H1"), "must be a Head"),
        (lambda: sr.Head("x", 1), "layer of Head must be a whole number"),
        (lambda: sr.Head(-1, 0), "layer of Head must be a whole number"),
        (lambda: sr.Head(1), r"Head\(layer: int, head: int\).*head"),
        (lambda: sr.Neuron(1, 1.5), "neuron of Neuron"),
        (lambda: sr.Norm(1, "here"), "attention, mlp"),
        (lambda: sr.Graph(ablate=5), "not iterable"),
        (lambda: sr.Graph(ablate=(sr.Head(0, 0),)), r"sweep\(\[...\]\)"),
        (lambda: sr.Graph(ablate=sr.sweep([sr.Head(0, 0)]), replacement=3), "ablation 3"),
        (lambda: sr.Graph(ablate=sr.sweep([sr.Head(0, 0)]), freeze=[1]), "cannot be frozen"),
        (lambda: sr.Graph(ablate=sr.sweep([sr.Head(0, 0)]), neurons="x"), "neurons must be a whole number"),
        (lambda: sr.Graph(ablate=sr.sweep([sr.Head(0, 0)]), nonsense=1), "nonsense"),
        (lambda: sr.Variants("axis", {}), "at least one graph"),
        (lambda: sr.Variants("axis", [1]), "Variants"),
        (lambda: sr.Variants(3, {"a": 1}), "axis must be a text"),
        (lambda: sr.sweep(5), "must be a Iterable|must be an? "),
        (lambda: sr.site(5), "must be a text"),
        (lambda: sr.Prompts([[1, 2], [3]], [0, 1], {}), "rows of 2 and of 1"),
        (lambda: sr.Prompts([[1.5, 2]], [0], {}), "integers"),
        (lambda: sr.Prompts([[1, 2]], [0], "here"), "source is a dict"),
        (lambda: sr.Options(check="no"), "True or False"),
        (lambda: sr.summary(5), "ds must be a dataset or the path of a store, not 5"),
        (lambda: sr.summary("nowhere.zarr"), "no store at"),
        (lambda: sr.by_head(xr.Dataset()), "not a store of the heads recipe"),
        (lambda: sr.by_head(sr.simulate_heads(1, 1, 2, 1), share="x"), "share must be a number"),
        (lambda: sr.by_head(sr.simulate_heads(1, 1, 2, 1), nonsense=1), r"by_head\(ds"),
        (lambda: sr.most_repaired(sr.simulate_heads(1, 1, 2, 1), count="x"), "count must be a whole number"),
        (lambda: sr.plot([]), "no dataset was given"),
        (lambda: sr.plot(sr.simulate_heads(1, 1, 2, 1), names=["pie"]), "no figure 'pie'"),
        (lambda: sr.plot(sr.simulate_heads(1, 1, 2, 1), directory=5), "directory must be a path"),
        (lambda: sr.open_store(None), "path must be a path"),
        (lambda: sr.load(5), "name must be a text"),
        (lambda: sr.load("tiny-neox", check="no"), "check must be True or False"),
        (lambda: sr.check(5), "5"),
        (lambda: sr.simulate_heads(n_layers="x"), "n_layers must be a whole number"),
        (lambda: sr.select_heads([5], None, "x", 8), "n_layers must be a whole number"),
        (lambda: sr.run("heads", confirm=5), "confirm"),
        (lambda: sr.run("heads", progress="yes"), "progress must be True or False"),
        (lambda: sr.ioi_prompts("x"), "tokenizer|cannot use what it was given"),
    ],
)
def test_python_tells_what_a_caller_got_wrong(call, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError if "store at" not in said else SelfRepairError, match=said) as refused:
        call()
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("hardly_written")
def test_a_stores_path_stands_for_its_dataset(place, whole, tmp_path):
    for path in (place.store, str(place.store)):
        assert str(sr.summary(path)) == str(sr.summary(whole))
        xr.testing.assert_identical(sr.by_layer(path), sr.by_layer(whole))
        assert len(sr.plot([path, whole], tmp_path, ["self_repair_by_layer"])) == 2
    assert sr.write_report(place.store, tmp_path / "page.html").exists()


def test_the_same_place_is_the_same_graph_however_it_is_written():
    one = sr.Graph(ablate=sr.sweep([sr.Head(5, 1)]), replacement=sr.Scale(2.0), attention=(1, 2))
    written = sr.Head(np.int64(5), np.int32(1))
    other = sr.Graph(ablate=[[written]], replacement=sr.Scale(np.float64(2)), attention=[1, 2], freeze=[])
    assert one.digest == other.digest
    assert repr(written) == "Head(layer=5, head=1)"


def test_a_model_can_be_checked_by_name():
    assert all(finding.passed for finding in sr.check("tiny-llama"))


def test_the_face_and_the_rooms_are_one_function(place, tmp_path):
    """What is refused at the face is nothing that a room would take: the numbers are the same."""
    sr.run(
        model=Path(place.model), prompts=place.prompts, layers=[1], out=tmp_path / "a.zarr", progress=False
    )
    run(
        model=str(place.model),
        prompts=str(place.prompts),
        layers="1",
        out=tmp_path / "b.zarr",
        progress=False,
    )
    assert_same_numbers(tmp_path / "a.zarr", tmp_path / "b.zarr")
    one, other = (json.loads(sr.open_store(tmp_path / n).attrs["settings"]) for n in ("a.zarr", "b.zarr"))
    assert one == other


def test_help_shows_what_a_public_function_takes():
    assert list(inspect.signature(sr.by_head).parameters) == ["ds", "share"]
    assert list(inspect.signature(sr.Head).parameters) == ["layer", "head"]
    assert "Raises" in inspect.getdoc(sr.run)


def test_saved_models_are_found_by_path(tmp_path):
    directory, prompts = saved(tmp_path / "m"), ids(tmp_path / "p.npy")
    assert sr.preview(model=directory, prompts=prompts)["store"] == "outputs/heads-m-p.zarr"
