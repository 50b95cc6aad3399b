"""Inputs that are not what they seem: records, damaged files, halves of characters, choices that do not apply."""

import csv
import gzip
import json
from hashlib import sha256
from pathlib import Path

import families
import numpy as np
import pytest
from terminal import saved, selfrepair
from test_prompts import TOY, A, B, C, D

import selfrepair_nn as sr
from selfrepair_nn.corpora import open_corpus
from selfrepair_nn.errors import SelfRepairError, UsageError
from selfrepair_nn.paths import local
from selfrepair_nn.prompts import load_prompts

TEXTS = ["ab", "", 'cd\nef, "gh"', "é"]
"""With what needs quoting, more than a line, and nothing."""


def as_json(texts, column="text"):
    return json.dumps([{"id": i, column: text} for i, text in enumerate(texts)])


def as_lines(texts, column="text"):
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))


def as_table(path, texts, delimiter, column="text"):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([["id", column], *enumerate(texts)])
    return path.read_text(encoding="utf-8")


def as_parquet(path, texts, column="text"):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"id": range(len(texts)), column: pa.array(texts)}), path)


def written(path, texts, column="text"):
    """The texts in the format that the path's ending tells."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        as_parquet(path, texts, column)
    elif kind in ("csv", "tsv"):
        as_table(path, texts, {"csv": ",", "tsv": "\t"}[kind], column)
    else:
        path.write_text({"json": as_json, "jsonl": as_lines, "ndjson": as_lines}[kind](texts, column))
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def documents(path, column="text"):
    return list(open_corpus(str(path), "train", column, None)[0])


@pytest.mark.parametrize(
    "name",
    [
        "r.json",
        "r.jsonl",
        "r.ndjson",
        "r.csv",
        "r.tsv",
        "r.parquet",
        "R.JSON",
        "r.json.gz",
        "r.jsonl.gz",
        "r.csv.gz",
    ],
)
def test_records_are_read_as_records(tmp_path, name):
    path = tmp_path / name
    written(path.with_name(name.lower()), TEXTS, "body").rename(path)
    assert documents(path, "body") == TEXTS
    found = load_prompts(path, TOY, length=2, bos="never", column="body")
    assert found.tokens[0].tolist() == [A, B]
    assert found.source["column"] == "body"
    assert found.source["sha256"] == sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UsageError, match=r"no column 'text': choose one of id, body"):
        documents(path)
    with pytest.raises(UsageError, match=r"dataset_split 'test' does not apply.*leave --dataset-split out"):
        load_prompts(path, TOY, length=2, column="body", split="test")


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_null_and_empty_rows_count_in_the_index(tmp_path, ending):
    texts = ["ab", None, "cd"] if ending != "csv" else ["ab", "", "cd"]
    found = load_prompts(written(tmp_path / f"r.{ending}", texts), TOY, length=2, bos="never")
    assert found.document.tolist() == [0, 2]


def test_json_of_every_usual_shape(tmp_path):
    path = tmp_path / "r.json"
    for text in (
        '["ab", "cd"]',
        '[{"text": "ab"}, "cd"]',
        '\ufeff[{"text": "ab"}, {"text": "cd"}]',
        '{"text": "ab"}\n{"text": "cd"}\n',
        '\n{"text": "ab"}\r\n{"text": "cd"}',
    ):
        path.write_bytes(text.encode())
        assert documents(path) == ["ab", "cd"], text
    path.write_text('{\n  "text": "ab"\n}')
    assert documents(path) == ["ab"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.json", '[{"text": "ab"}', "r.json is not JSON"),
        ("r.json", "", "r.json is not JSON"),
        ("r.json", "prose, not JSON", "r.json is not JSON"),
        ("r.json", '[{"text": "ab"}, 3]', "r.json, row 2, is neither"),
        ("r.json", '{"data": [{"text": "ab"}]}', "no column 'text': choose one of data"),
        ("r.json", '{"text": ["ab", "cd"]}', "column 'text' of .*row 1, holds list"),
        ("r.json", '[{"text": 5}]', "column 'text' of .*row 1, holds int: write text there, or null"),
        ("r.json", '[{"text": "ab", "text": "cd"}]', "names 'text' twice"),
        ("r.json", "[" * 100_000, "r.json is not JSON"),
        ("r.json", "[" + "9" * 5000 + "]", "r.json is not JSON"),
        ("r.json", '{"text": "ab"}\n{"text"', "r.json, line 2, is not JSON"),
        ("r.jsonl", '{"text": "ab", "text": "cd"}', "line 1, is not JSON.*names 'text' twice"),
        (
            "r.jsonl",
            '{"text": [{"role": "user"}], "title": "ab"}',
            r"line 1, holds list: choose one of text \(title\)",
        ),
        ("r.jsonl", '{"text": "ab"}'.encode("utf-16"), "line 1, is not UTF-8"),
        ("r.csv", "", "is empty"),
        ("r.csv", "id,text\n1,ab,cd\n", "line 2, has 3 fields, the first line 2: quote"),
        ("r.csv", "id,text\n1,ab\n2\n", "line 3, has 1 fields"),
        ("r.csv", "text,text\nab,cd\n", "names the column 'text' twice"),
        ("r.csv", 'id,text\n1,"ab', "line 2, is no row"),
        ("r.csv", "id;text\n1;ab\n", "choose one of id;text"),
        ("r.csv", "id,text\n1,é\n".encode("latin-1"), "line 2, is not UTF-8"),
        ("r.csv", "id,text\n1,ab\n".encode("utf-16"), "is not UTF-8"),
        ("r.parquet", "PAR1 is no Parquet", "cannot read .* as Parquet"),
        ("r.parquet", "", "cannot read .* as Parquet"),
        ("r.jsonl.gz", '{"text": "ab"}', "reading .* failed.*[Gg]zip"),
        ("r.jsonl.gz", gzip.compress(b'{"text": "ab"}\n' * 100)[:-9], "reading .* failed"),
        ("r.txt.gz", "ab", "cannot read .*[Gg]zip"),
        ("r.txt.gz", gzip.compress(b"ab" * 100)[:-9], "cannot read"),
        ("r.zst", b"\x28\xb5\x2f\xfd\x04", "not UTF-8"),
        ("r.txt", "ab".encode("utf-16"), "not UTF-8 text at byte 0"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SelfRepairError, match=message) as caught:
        load_prompts(tmp_path / name, TOY, length=2)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def test_columns_of_parquet_that_are_no_text(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"text": pa.array([b"ab"]), "nested": pa.array([{"text": "ab"}]), "id": pa.array([1])}
    parquet.write_table(pa.table(columns), tmp_path / "r.parquet")
    for column, kind in (("text", "bytes"), ("nested", "dict"), ("id", "int")):
        with pytest.raises(UsageError, match=f"column '{column}' of .*row 1, holds {kind}"):
            load_prompts(tmp_path / "r.parquet", TOY, length=2, column=column)
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], "i4")), pa.py_buffer(b"a\xff")]
    )
    parquet.write_table(pa.table({"text": broken}), tmp_path / "r.parquet")
    with pytest.raises(UsageError, match="row 1, is not UTF-8"):
        load_prompts(tmp_path / "r.parquet", TOY, length=2)


def test_a_text_that_is_packed(tmp_path):
    (tmp_path / "r.txt.gz").write_bytes(gzip.compress(b"ab\n\f\ncd"))
    assert documents(tmp_path / "r.txt.gz") == ["ab", "cd"]


@pytest.mark.parametrize("half", [r"\ud83d", r"\ude00", r"\ude00\ud83d"])
@pytest.mark.parametrize(("name", "place"), [("r.jsonl", "line 3"), ("r.json", "row 3")])
def test_half_a_surrogate_pair_is_refused_with_its_file_and_row(tmp_path, name, place, half):
    lines = ['{"text": "ab"}', r'{"text": "a\ud83c\udf0db"}', f'{{"text": "ab{half}c"}}']
    text = "\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]"
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=rf"{name}, {place}, column 'text', holds half .* at character 2"):
        load_prompts(tmp_path / name, TOY, length=2)
    (tmp_path / name).write_text(text.replace(half, "d"))
    assert load_prompts(tmp_path / name, TOY, length=2, bos="never").tokens[0].tolist() == [A, B]


def test_half_a_surrogate_pair_in_a_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: iter([{"text": "ab"}, {"text": "\udc80"}]))
    (tmp_path / "corpus").mkdir()
    with pytest.raises(UsageError, match="corpus, row 2, column 'text', holds half"):
        load_prompts(tmp_path / "corpus", TOY, length=2)


@pytest.mark.parametrize("choice", [{"split": "test"}, {"column": "body"}, {"revision": "v1"}])
@pytest.mark.parametrize("kind", ["sample", "text", "npy", "array"])
def test_choices_that_only_datasets_have(tmp_path, kind, choice):
    (tmp_path / "t.txt").write_text("abcdef")
    ids = np.array([[A, B, C, D]])
    np.save(tmp_path / "t.npy", ids)
    source = {"sample": "sample", "text": tmp_path / "t.txt", "npy": tmp_path / "t.npy", "array": ids}[kind]
    assert load_prompts(source, TOY, length=4).n >= 1
    flags = {"revision": "--prompts-revision", "split": "--dataset-split", "column": "--column"}
    flag = flags[next(iter(choice))]
    with pytest.raises(UsageError, match=f"does not apply.*leave {flag} out"):
        load_prompts(source, TOY, length=4, **choice)


def test_a_revision_of_a_directory(tmp_path):
    (tmp_path / "corpus").mkdir()
    with pytest.raises(UsageError, match="prompts_revision 'v1' does not apply"):
        load_prompts(tmp_path / "corpus", TOY, length=4, revision="v1")


# Addresses where paths are


ADDRESSES = [
    "s3://bucket/x.zarr",
    "gs://bucket/x.zarr",
    "hf://datasets/a/b",
    "file:///tmp/x.zarr",
    "memory://x.zarr",
]


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A working directory that has to stay empty."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "address", [*ADDRESSES, "simplecache::s3://bucket/x.zarr", "HTTPS://host/x.zarr", "s3:/bucket"]
)
@pytest.mark.parametrize("command", ["run", "plan", "plot", "report", "info", "jobs", "compare-paper"])
def test_an_address_is_no_store(nowhere, monkeypatch, command, address):
    monkeypatch.setattr(
        "selfrepair_nn.layout.experiment.describe", lambda *a: pytest.fail("looked at the model first")
    )
    given = ["heads", "--out", address] if command in ("run", "plan") else [address]
    ended = selfrepair(command, *given)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(
        f"selfrepair: error: {'out' if '--out' in given else 'store'} {address!r} is an address"
    )
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("address", [*ADDRESSES, Path("s3://bucket/x.zarr")])
def test_an_address_is_no_store_in_python_either(nowhere, address):
    for call in (
        lambda: sr.open_store(address),
        lambda: sr.run("heads", out=address),
        lambda: sr.plot(sr.simulate_heads(), address),
        lambda: sr.write_report(sr.simulate_heads(), address),
    ):
        with pytest.raises(UsageError, match="is an address"):
            call()


def test_paths_that_only_look_like_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("./s3:/x.zarr", "a:b/x.zarr", "C:/x.zarr", "x:y"):
        assert local(path) == Path(path)
    assert local("~/x.zarr") == tmp_path / "x.zarr"
    for path in ("~nobody-of-that-name/x.zarr", 3, None, "x\0.zarr"):
        with pytest.raises(UsageError, match="is no path"):
            local(path)


# Revisions of what has none


@pytest.mark.parametrize("command", [["run", "heads", "--model"], ["plan", "heads", "--model"], ["check"]])
def test_a_revision_of_a_model_that_is_here(nowhere, tmp_path_factory, command):
    place = tmp_path_factory.mktemp("models")
    saved(place / "m")
    (place / "m.gguf").write_bytes(b"GGUF")
    for model in ("tiny-neox", place / "m", place / "m.gguf"):
        ended = selfrepair(*command, model, "--revision", "step1000")
        assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
        assert f"revision 'step1000' is for models of the hub, and {str(model)!r} is here" in ended.err


def test_a_revision_of_a_model_that_is_loaded(nowhere):
    with pytest.raises(UsageError, match="revision 'v1' is for models of the hub"):
        sr.run("heads", model=sr.wrap(families.build("gpt2")), revision="v1")


# Prompts that a recipe makes


@pytest.mark.parametrize(
    "flags", [["--prompts", "x.txt"], ["--column", "body"], ["--tokens", 512], ["--length", 16]]
)
@pytest.mark.parametrize("recipe", ["ioi", "induction"])
def test_choices_of_prompts_that_a_recipe_does_not_read(nowhere, recipe, flags):
    ended = selfrepair("plan", recipe, *flags)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == (
        f"selfrepair: error: recipe '{recipe}' makes prompts of its own and takes no {flags[0]}: leave it out\n"
    )


def test_choices_of_prompts_that_a_recipe_reads(nowhere, tmp_path_factory):
    assert selfrepair("plan", "contrastive", "--tokens", 512, "--bos", "never").code == 0
    assert selfrepair("plan", "ioi", "--bos", "never", "--prompts", "sample").code == 0
    mine = tmp_path_factory.mktemp("mine") / "mine.py"
    mine.write_text(
        '"""Mine."""\nfrom dataclasses import replace\nimport selfrepair_nn as sr\n'
        "def graph(structure, options):\n    return sr.Graph(ablate=sr.sweep([sr.Head(0, 0)]))\n"
        "def prompts(structure, tokenizer, options):\n"
        "    return sr.text_prompts(structure, tokenizer, replace(options, length=16))\n"
    )
    assert selfrepair("plan", mine, "--tokens", 512, "--bos", "never").code == 0


# Numbers that nobody means

ENDLESS = "9" * 5000


@pytest.mark.parametrize("number", [10**12 + 1, 10**30, "9" * 4000, ENDLESS])
@pytest.mark.parametrize(
    "flag",
    ["tokens", "length", "batch-size", "tokens-per-pass", "workers", "threads", "mean-prompts", "seed", "in-flight"],
)
def test_a_number_that_no_run_can_mean(nowhere, flag, number):
    ended = selfrepair("plan", "heads", f"--{flag}", number if flag != "seed" else f"{number}{'0' * 9}")
    assert (ended.code, ended.out) == (2, "")
    assert flag.replace("-", "_") in ended.err.replace("-", "_")
    assert "Traceback" not in ended.err
    assert len(ended.err) < 600


@pytest.mark.parametrize(
    ("recipe", "param", "said"),
    [
        ("ioi", "count=100000000000", "parameter count must be at most 1,000,000,000, not 100,000,000,000"),
        ("ioi", "count=400000000", "count must be at most 100,000, not 400,000,000"),
        ("induction", "count=400000000", "count must be at most 100,000, not 400,000,000"),
        ("induction", "period=100000000000", "parameter period must be at most"),
        ("induction", f"count={'9' * 4000}", "not a number of about 4000 digits"),
        ("induction", f"count={ENDLESS}", "is not like its default"),
        ("neurons", "count=-100000000000", "parameter count must be at most"),
        ("self_reinforcement", "scales=(1, 1e999)", "parameter scales: inf is not finite"),
        ("self_reinforcement", "scales=100000000000", "parameter scales must be at most"),
        ("self_reinforcement", "scales={[]:1}", "is not like its default"),
        ("ioi", "count=" + "[" * 5000, "is not like its default"),
    ],
)
def test_a_parameter_that_no_run_can_mean(nowhere, recipe, param, said):
    ended = selfrepair("plan", recipe, "--param", param)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert said in ended.err
    assert len(ended.err) < 600


@pytest.mark.parametrize(
    "flags",
    [
        ["--shard", f"1/{ENDLESS}"],
        ["--layers", ENDLESS],
        ["--layers", f"0:{ENDLESS}"],
        ["--heads", f"0.{ENDLESS}"],
        ["--model", ENDLESS],
    ]
    + [["--prompts", f"./{ENDLESS}"], ["--host", f"http://a:{ENDLESS}"], ["--out", ENDLESS]],
    ids=lambda flags: flags[0],
)
def test_no_message_is_endless(nowhere, monkeypatch, flags):
    ended = selfrepair("run", "heads", "--tokens", 64, "--length", 32, *flags)
    assert ended.code in (1, 2)
    assert "Traceback" not in ended.err
    assert len(ended.err) < 900
