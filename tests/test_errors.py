"""What goes wrong: one line on stderr that names the bad value and the remedy, the right exit code, nothing lost."""

import errno
import json
import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from terminal import assert_same_numbers, done, files, ids, saved, selfrepair
from zarr.storage import _local

PROMPTS, LENGTH, VOCABULARY, CONTEXT = 6, 7, 61, 24


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A directory with a good model `m` and good prompts `p.npy`; nobody may change it."""
    directory = tmp_path_factory.mktemp("good")
    saved(directory / "m")
    ids(directory / "p.npy", PROMPTS, LENGTH)
    return directory


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    """A working directory with links to the good ones, offline."""
    for name in ("m", "p.npy"):
        (tmp_path / name).symlink_to(good / name)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # the variable is read at import only
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*flags, model="m", prompts="p.npy", out="out/s.zarr"):
    return selfrepair("run", "heads", "--model", model, "--prompts", prompts, "--out", out, *flags)


def assert_explained(ended, code, *fragments):
    """One line that says it all; the usage errors of click are two lines of usage and then that line."""
    *before, last = ended.err.strip().splitlines()
    assert ended.code == code, ended
    assert "Traceback" not in ended.err
    assert ended.out == ""
    if before:
        assert code == 2
        assert [line.split()[0] for line in before if line] == ["Usage:", "Try"]
    assert re.match(r"(selfrepair: error|Error): ", last)
    for fragment in fragments:
        assert re.search(fragment, last), f"{fragment!r} is not in {last!r}"
    assert len(last) < 600


def assert_refused(directory, code, fragments, flags=(), **choices):
    """Refused with this code and these words, and nothing in the directory written, changed or lost."""
    before = files(directory)
    assert_explained(run(*flags, **choices), code, *fragments)
    assert {n: f for n, f in files(directory).items() if not n.startswith("out/")} == before
    assert not (directory / "out" / "s.zarr").exists()


# Models


@pytest.mark.parametrize(
    ("model", "code", "fragments"),
    [
        ("no-such-model", 2, ["'no-such-model'", "tiny-neox, tiny-llama", "directory", "hub"]),
        ("nobody/no-such-model", 2, ["'nobody/no-such-model'", "tiny-neox, tiny-llama"]),
        ("tiny-neo", 2, ["'tiny-neo'", "tiny-neox"]),
        ("./no-such-directory", 2, ["'./no-such-directory'", "does not exist"]),
        ("/no/such/directory", 2, ["'/no/such/directory'", "does not exist"]),
        ("no-such-file.gguf", 2, ["'no-such-file.gguf'", "does not exist"]),
    ],
)
def test_an_unknown_model(place, model, code, fragments):
    assert_refused(place, code, fragments, model=model)


def test_a_directory_without_a_configuration(place):
    (place / "notes").mkdir()
    (place / "notes" / "a.txt").write_text("mine")
    assert_refused(place, 2, ["'notes'", r"config\.json", "save_pretrained"], model="notes")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "frobnicate"}'])
def test_a_broken_configuration(place, text):
    (place / "broken").mkdir()
    (place / "broken" / "config.json").write_text(text)
    assert_refused(place, 1, ["'broken'"], model="broken")


@pytest.mark.parametrize("change", [{"n_embd": 31}, {"n_layer": 0}, {"n_layer": "x"}])
def test_an_impossible_configuration(place, good, change):
    (place / "broken").mkdir()
    configuration = json.loads((good / "m" / "config.json").read_text()) | change
    (place / "broken" / "config.json").write_text(json.dumps(configuration))
    assert_refused(place, 1, ["'broken'"], model="broken")


@pytest.mark.parametrize(
    ("family", "fragments"),
    [
        ("nanochat", ["nanochat", "head by head", "final norm also norms its embedding"]),
        ("diffllama", ["'diffllama'", "not supported"]),
        ("opt-postnorm", ["opt", "norms come after", "do_layer_norm_before"]),
        ("opt-projected", ["opt", "word_embed_proj_dim"]),
    ],
)
def test_a_model_that_cannot_be_decomposed(place, family, fragments):
    saved(place / "other", family)
    assert_refused(place, 1, fragments, model="other")


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def overwritten(path):
    path.write_bytes(b"x" * 5000)


def removed(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut_in_half, emptied, overwritten, removed])
def test_a_damaged_file_of_weights(place, good, damage):
    shutil.copytree(good / "m", place / "damaged")
    damage(place / "damaged" / "model.safetensors")
    assert_explained(run(model="damaged"), 1, "'damaged'")
    assert done(place / "out" / "s.zarr") == 0
    shutil.copy(good / "m" / "model.safetensors", place / "damaged")
    assert run(model="damaged").code == 0


def test_a_file_that_is_no_gguf(place):
    (place / "x.gguf").write_bytes(b"nonsense")
    assert_refused(place, 1, [r"'x\.gguf'"], model="x.gguf")


def test_weights_that_the_files_lack_are_not_made_up(place, good):
    """The loader draws missing weights at random and only warns: numbers of that model would mean nothing."""
    shutil.copytree(good / "m", place / "short")
    configuration = json.loads((good / "m" / "config.json").read_text()) | {"n_layer": 5}
    (place / "short" / "config.json").write_text(json.dumps(configuration))
    assert_explained(run(model="short"), 1, "'short'", "missing|lack")


def test_weights_of_other_shapes(place, good):
    shutil.copytree(good / "m", place / "other")
    configuration = json.loads((good / "m" / "config.json").read_text()) | {"n_embd": 35}
    (place / "other" / "config.json").write_text(json.dumps(configuration))
    assert_explained(run(model="other"), 1, "'other'", "shape|size")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("flags", [[], ["--skip-check"]])
def test_weights_that_are_not_finite(place, value, flags):
    """No NaN is ever stored as a result, whether or not the model is checked."""
    model = families.build("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 3] = value
    model.save_pretrained(place / "nan")
    assert_explained(run(*flags, model="nan"), 1, "finite|nan|inf")
    assert done(place / "out" / "s.zarr") == 0


# Prompts


def one_id(value):
    tokens = np.zeros((PROMPTS, LENGTH), np.int64)
    tokens[1, 2] = value
    return tokens


@pytest.mark.parametrize(
    ("array", "fragments"),
    [
        (one_id(VOCABULARY), ["61", "prompt 1, position 2", "0 to 60", "tokenizer"]),
        (one_id(-1), ["-1", "prompt 1, position 2", "0 to 60"]),
        (np.zeros(LENGTH, int), [r"\(7,\)", r"\[prompt, position\]"]),
        (np.zeros((1, PROMPTS, LENGTH), int), [r"\(1, 6, 7\)", r"\[prompt, position\]"]),
        (np.zeros((PROMPTS, LENGTH)), ["float64", "integers"]),
        (np.zeros((PROMPTS, LENGTH), bool), ["bool", "integers"]),
        (np.zeros((PROMPTS, LENGTH), "U3"), ["integers"]),
        (np.zeros((PROMPTS, 1), int), ["1", "at least 2"]),
        (np.zeros((0, LENGTH), int), [r"\(0, 7\)", "at least one"]),
        (np.zeros((1, LENGTH), int), ["two prompts", "mean or zero"]),
        (np.zeros((PROMPTS, CONTEXT + 1), int), ["25", "24 or less"]),
        (np.zeros((PROMPTS, LENGTH), object), ["integers"]),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else "",
)
def test_token_ids_that_do_not_fit(place, array, fragments):
    np.save("bad.npy", array, allow_pickle=True)
    named = [] if fragments[0] in ("two prompts", "25") else [r"bad\.npy"]
    assert_refused(place, 2, [*named, *fragments], prompts="bad.npy")


class Planted:
    """An object that shows whether a pickle was opened."""

    def __reduce__(self):
        return os.mkdir, ("pickle-was-opened",)


def test_a_pickle_is_never_opened(place):
    np.save("bad.npy", np.array([Planted()], object), allow_pickle=True)
    assert_refused(place, 2, [r"bad\.npy", "integers"], prompts="bad.npy")
    assert not (place / "pickle-was-opened").exists()


def cut(path):
    np.save(path, np.zeros((PROMPTS, LENGTH), int))
    path.write_bytes(path.read_bytes()[:150])


def text(path):
    path.write_text("hello")


def folder(path):
    path.mkdir()


@pytest.mark.parametrize("make", [cut, text, folder, emptied])
def test_a_file_that_is_no_npy(place, make):
    make(place / "bad.npy")
    assert_refused(place, 2, [r"bad\.npy"], prompts="bad.npy")


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"", ["0 tokens", "more text"]),
        (b"   \n\n", ["more text"]),
        (b"Hello there.", ["too few", "length", "more text"]),
        (bytes(range(256)) * 40, ["UTF-8", "128"]),
        (b"abc\0def" * 400, ["zero bytes"]),
        ("naïve".encode("latin-1") * 500, ["UTF-8"]),
    ],
)
def test_a_text_that_does_not_do(place, content, fragments):
    (place / "t.txt").write_bytes(content)
    assert_refused(place, 2, [r"t\.txt", *fragments], model="tiny-neox", prompts="t.txt")


@pytest.mark.parametrize("prompts", ["none.txt", "none.npy", "no/such/file.txt", "none.jsonl"])
def test_prompts_that_are_not_there(place, prompts):
    assert_refused(place, 2, [re.escape(prompts)], prompts=prompts)


def test_a_dataset_that_cannot_be_reached(place):
    name = "nobody/no-such-set"
    assert_refused(place, 1, [f"'{name}'", "network", "sample"], prompts=name, model="tiny-neox")


@pytest.mark.parametrize("prompts", ["sample", "t.txt"])
def test_text_for_a_model_without_a_tokenizer(place, prompts):
    (place / "t.txt").write_text("Some words. " * 400)
    assert_refused(place, 2, ["tokenizer", r"\.npy"], prompts=prompts)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--length", "8"], ["8", "7 or less"]),
        (["--length", "1"], ["1", "2 or more"]),
        (["--length", "0"], ["0", "1"]),
        (["--tokens", "0"], ["tokens", "0"]),
        (["--tokens", "6"], ["6", "7 or more"]),
        (["--tokens", "many"], ["'--tokens'", "'many'"]),
        (["--bos", "always"], ["always", r"p\.npy"]),
        (["--seed", "-1"], ["seed", "-1", "0 or more"]),
        (["--seed", "1.5"], ["'--seed'", r"'1\.5'"]),
    ],
    ids=" ".join,
)
def test_an_amount_that_does_not_fit(place, flags, fragments):
    assert_refused(place, 2, fragments, flags)


def test_a_length_beyond_the_context(place):
    assert_refused(
        place, 2, ["5000", "256 or less"], ["--length", "5000"], model="tiny-neox", prompts="sample"
    )


# Partners


@pytest.mark.parametrize(
    ("partners", "fragments"),
    [
        ([1, 1, 3, 2, 5, 4], ["entry 1, 1", "0 to 5"]),
        ([1, 0, 3, 2, 5, 6], ["entry 5, 6", "0 to 5"]),
        ([1, 0, 3, 2, 5, -1], ["entry 5, -1", "0 to 5"]),
        ([1, 0, 2], [r"\(3,\)", "6 prompts"]),
        ([[1, 0, 3, 2, 5, 4]], [r"\(1, 6\)", "6 prompts"]),
        ([1.0, 0, 3, 2, 5, 4], ["float64", "integers"]),
    ],
    ids=str,
)
def test_partners_that_are_no_permutation(place, partners, fragments):
    np.save("r.npy", np.array(partners))
    assert_refused(place, 2, [r"r\.npy", *fragments], ["--partners", "r.npy"])


@pytest.mark.parametrize("ablation", ["mean", "zero", "identity"])
def test_partners_without_resampling(place, ablation):
    np.save("r.npy", np.roll(np.arange(PROMPTS), 1))
    assert_refused(
        place, 2, ["partners", "resample", ablation], ["--partners", "r.npy", "--ablation", ablation]
    )


def test_partners_that_are_not_there(place):
    assert_refused(place, 2, [r"none\.npy"], ["--partners", "none.npy"])


# Options


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--layers", "7"], ["7", "0 to 2"]),
        (["--layers", "8:12"], ["'8:12'", "0 to 2"]),
        (["--layers", "0:9"], ["'0:9'", "0 to 2"]),
        (["--layers", "-4"], ["-4", "0 to 2"]),
        (["--layers", "2:1"], ["'2:1'", "no layer"]),
        (["--layers", "first"], ["'first'", "8:12"]),
        (["--layers", "1-2"], ["'1-2'", "8:12"]),
        (["--layers", ","], ["layers", "empty"]),
        (["--heads", "7.1"], [r"7\.1", "layers 0 to 2"]),
        (["--heads", "0.9"], [r"0\.9", "heads 0 to 4"]),
        (["--heads", "L1H9"], ["L1H9", "heads 0 to 4"]),
        (["--heads", "9"], ["'9'", r"9\.6", "L9H6"]),
        (["--heads", "*"], [r"'\*'", r"10\.\*"]),
        (["--heads", ""], ["heads", "empty"]),
        (["--layers", "0", "--heads", "1.1"], ["'0'", r"'1\.1'", "widen"]),
        (["--dtype", "int8"], ["'--dtype'", "'int8'", "float32.*bfloat16"]),
        (["--ablation", "nil"], ["'nil'", "resample.*identity"]),
        (["--target", "mean"], ["'mean'", "centred.*raw"]),
        (["--freeze", "some"], ["'some'", "none.*downstream.*all"]),
        (["--value-bias", "none"], ["'none'", "output.*head"]),
        (["--components", "some"], ["'some'", "none.*top.*all"]),
        (["--backend", "cloud"], ["'cloud'", "local"]),
        (["--share", "0"], ["share", "0"]),
        (["--share", "1.5"], ["share", r"1\.5"]),
        (["--share", "nan"], ["share", "nan"]),
        (["--batch-size", "0"], ["batch.size", "0", "at least 1"]),
        (["--tokens-per-pass", "-5"], ["tokens_per_pass", "-5", "at least 1"]),
        (["--mean-prompts", "0"], ["mean.prompts", "0", "at least 1"]),
        (["--lenght", "3"], ["'--lenght'", "--length"]),
    ],
    ids=" ".join,
)
def test_an_option_that_cannot_be(place, flags, fragments):
    assert_refused(place, 2, fragments, flags)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(place, device):
    assert_explained(run("--device", device), 2, f"'{device}'", "cpu")
    assert done(place / "out" / "s.zarr") == 0
    assert run("--device", "cpu").code == 0


@pytest.mark.parametrize("option", ["dtype", "device"])
def test_check_refuses_the_same(place, option):
    assert_explained(selfrepair("check", "m", f"--{option}", "int8"), 2, "'int8'", "float32|cpu")


# Recipes


RECIPES = {
    "syntax": ("def graph(:\n", ["SyntaxError", "line 1"]),
    "nothing": ("x = 1\n", [r"graph\(structure, options\)"]),
    "raises": ("1 / 0\n", ["ZeroDivisionError"]),
    "imports": ("import no_such_package\n", ["no_such_package"]),
    "exits": ("raise SystemExit(3)\n", ["exits.py"]),
    "raises-later": ("def graph(structure, options):\n    return 1 / 0\n", ["ZeroDivisionError"]),
    "returns-none": ("def graph(structure, options):\n    return None\n", ["Graph"]),
    "ablates-nothing": (
        "import selfrepair_nn as sr\ndef graph(structure, options):\n    return sr.Graph(ablate=())\n",
        ["ablate"],
    ),
    "ablates-beyond": (
        "import selfrepair_nn as sr\ndef graph(structure, options):\n    return sr.Graph(((sr.Head(9, 9),),))\n",
        ["L9H9"],
    ),
    "arguments": ("def graph(structure):\n    return 1\n", [r"graph\(structure, options\)"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_cannot_be_used(place, name):
    content, fragments = RECIPES[name]
    Path(f"{name}.py").write_text(content)
    before = files(place)
    ended = selfrepair("run", f"{name}.py", "--model", "m", "--prompts", "p.npy", "--out", "out/s.zarr")
    assert_explained(ended, 2, rf"{name}\.py", *fragments)
    assert {n: f for n, f in files(place).items() if not n.startswith("out/")} == before
    assert not Path("out/s.zarr").exists()


@pytest.mark.parametrize("recipe", ["headz", "none.py", "recipes/none.py"])
def test_an_unknown_recipe(place, recipe):
    ended = selfrepair("run", recipe, "--model", "m", "--prompts", "p.npy", "--out", "out/s.zarr")
    assert_explained(ended, 2, re.escape(f"'{recipe}'"), "heads", r"\.py")
    assert not Path("out").exists()


# Places to write


@pytest.mark.parametrize("out", ["taken", "taken/x.zarr", "taken/a/b/x.zarr", "p.npy"])
def test_a_file_where_a_directory_should_be(place, out):
    (place / "taken").write_text("mine")
    before = files(place)
    assert_explained(run(out=out), 1, re.escape(out))
    assert files(place) == before


def test_a_directory_without_permission(place):
    with read_only(place / "locked"):
        assert_explained(run(out="locked/s.zarr"), 1, r"locked/s\.zarr", "Permission|Read-only")
        assert_explained(run(out="locked/new"), 1, "locked/new", "Permission|Read-only")
        assert list((place / "locked").iterdir()) == []


@contextmanager
def read_only(path):
    """A directory that cannot be written: for root, who may write anywhere, a file system that is read-only."""
    path.mkdir()
    if os.geteuid():
        path.chmod(0o555)
        yield
        path.chmod(0o755)
    else:
        with mounted(path, "ro"):
            yield


@contextmanager
def mounted(path, options):
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_directory_that_is_somebody_elses(place):
    (place / "thesis.zarr").mkdir()
    (place / "thesis.zarr" / "thesis.tex").write_text("years of work")
    before = files(place)
    assert_explained(run(out="thesis.zarr"), 1, r"'thesis\.zarr'", "not a store", "another path")
    assert before.items() <= files(place).items()


def test_another_programs_zarr(place):
    import xarray as xr

    xr.Dataset({"temperature": ("x", [1.5, 2.5])}).to_zarr("weather.zarr", consolidated=False)
    before = files(place / "weather.zarr")
    assert_explained(run(out="weather.zarr"), 1, r"'weather\.zarr'", "not a store", "another path")
    assert_explained(selfrepair("info", "weather.zarr"), 1, r"'weather\.zarr'", "not a store")
    assert files(place / "weather.zarr") == before


@pytest.mark.parametrize("command", ["info", "report", "plot"])
def test_a_store_that_is_not_there(place, command):
    assert_explained(selfrepair(command, "none.zarr"), 1, r"'none\.zarr'", "no store")


# A full disk


@pytest.fixture
def disk(monkeypatch):
    """disk(n): the disk is full once n units are marked done; disk(None): there is space again."""
    put, left = _local._put, [None]

    def counted(path, value, *arguments, **options):
        if left[0] is not None:
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            left[0] -= "s.zarr/done/c/" in str(path)
        return put(path, value, *arguments, **options)

    monkeypatch.setattr(_local, "_put", counted)
    return lambda units: left.__setitem__(0, units)


def test_a_full_disk(place, disk):
    """In the middle of the work: what is done stays, and the same command goes on once there is space."""
    flags = ["--batch-size", "1"]
    assert run(*flags, out="whole.zarr").code == 0
    disk(2)
    assert_explained(run(*flags), 1, r"s\.zarr", "No space left", "resume")
    disk(None)
    assert done(place / "out" / "s.zarr") == 2 * 15
    assert run(*flags).code == 0
    assert_same_numbers(place / "out" / "s.zarr", place / "whole.zarr")


def test_a_disk_that_is_full_from_the_start(place, disk):
    disk(0)
    assert_explained(run(), 1, r"s\.zarr", "No space left")
    assert [p.name for p in (place / "out").iterdir()] == []
    disk(None)
    assert run().code == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_is_really_full(place):
    choices = {"prompts": ids(place / "many.npy", 30, CONTEXT), "out": "disk/s.zarr"}
    (place / "disk").mkdir()
    with mounted(place / "disk", "size=400k"):
        assert_explained(run("--batch-size", "2", **choices), 1, r"disk/s\.zarr", "No space left", "resume")
        assert 0 < done(place / "disk" / "s.zarr") < 30 * 15
        subprocess.run(["mount", "-o", "remount,size=20m", place / "disk"], check=True)
        assert run("--batch-size", "2", **choices).code == 0
        assert run("--batch-size", "2", **choices | {"out": "whole.zarr"}).code == 0
        assert_same_numbers(place / "disk" / "s.zarr", place / "whole.zarr")
