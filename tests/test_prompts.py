"""Rows, partners and token texts, worked by hand on a tokenizer of single characters and by property."""

import io
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfrepair_nn import corpora, prompts
from selfrepair_nn.errors import SelfRepairError, UsageError
from selfrepair_nn.prompts import Prompts, load_partners, load_prompts, partners, token_texts

LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"
VOCABULARY = {"<bos>": 0, "<eos>": 1, "?": 2} | {c: i for i, c in enumerate(LETTERS, start=3)}
A, B, C, D, E, F = range(3, 9)


def tokenizer(bos="<bos>", eos="<eos>"):
    """One token per character, BOS id 0, and a post-processor that adds BOS unless told not to."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, VOCABULARY[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


TOY = tokenizer()
BARE = tokenizer(bos=None, eos=None)


@pytest.fixture
def write(tmp_path):
    def _write(text, name="text.txt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return _write


@pytest.fixture
def save(tmp_path):
    def _save(array, name="ids.npy"):
        np.save(tmp_path / name, array)
        return str(tmp_path / name)

    return _save


# Packing


def test_packing_worked_by_hand(write):
    path = write("abc\n\f\nde\n\f\nf")
    found = load_prompts(path, TOY, length=3)
    # stream: a b c EOS d e EOS f, cut by two behind a BOS each
    assert found.tokens.tolist() == [[0, A, B], [0, C, 1], [0, D, E], [0, 1, F]]
    assert found.document.tolist() == [0, 0, 1, 2]
    assert found.tokens.dtype == found.document.dtype == np.int64
    assert (found.n, found.length) == (4, 3)


def test_packing_without_bos_drops_the_unfinished_row(write):
    found = load_prompts(write("abc\n\f\nde\n\f\nf"), TOY, length=3, bos="never")
    assert found.tokens.tolist() == [[A, B, C], [1, D, E]]
    assert found.document.tolist() == [0, 1]
    assert found.source["bos_id"] is None
    assert found.source["bos_added"] is False


def test_no_special_tokens_where_the_tokenizer_has_none(write):
    found = load_prompts(write("abc\n\f\nde"), BARE, length=2)
    assert found.tokens.tolist() == [[A, B], [C, D]]
    assert found.source["bos_id"] is None
    assert found.source["separator_id"] is None


def test_bos_of_id_zero_is_a_real_token(write):
    assert TOY.bos_token_id == 0
    found = load_prompts(write("abcd"), TOY, length=3, bos="auto")
    assert found.tokens.tolist() == [[0, A, B], [0, C, D]]
    assert found.source["bos_id"] == 0
    assert found.source["bos_added"] is True


def test_separator_of_id_zero_is_a_real_token(write):
    found = load_prompts(write("ab\n\f\ncd"), tokenizer(bos=None, eos="<bos>"), length=5)
    assert found.tokens.tolist() == [[A, B, 0, C, D]]


def test_never_a_double_bos_where_eos_is_bos(write):
    same = tokenizer("<eos>", "<eos>")
    found = load_prompts(write("ab\n\f\ncde\n\f\nf"), same, length=3)
    # stream: a b | 1 c d | e 1 | f; the second row begins with the separator, which is its BOS
    assert found.tokens.tolist() == [[1, A, B], [1, C, D], [1, E, 1]]
    assert found.document.tolist() == [0, 1, 1]


def test_never_a_double_bos_where_the_text_writes_it(write):
    found = load_prompts(write("<bos>abc<bos>def"), TOY, length=4)
    assert found.tokens.tolist() == [[0, A, B, C], [0, D, E, F]]


@pytest.mark.parametrize("text", ["ab<eos>\n\f\ncd", "ab\n\f\n<eos>cd"])
def test_a_separator_that_is_there_already_is_not_repeated(write, text):
    assert load_prompts(write(text), TOY, length=5, bos="never").tokens.tolist() == [[A, B, 1, C, D]]


def test_empty_documents_count_in_the_index_and_add_nothing(write):
    found = load_prompts(write("\f\nab\n\f\n\f\n\n\f\ncd\n\f"), TOY, length=2, bos="never")
    # the documents: "", "ab", "", "", "cd", ""
    assert found.tokens.tolist() == [[A, B], [1, C]]
    assert found.document.tolist() == [1, 4]


def test_windows_line_ends_and_byte_order_mark_change_nothing(write):
    plain = load_prompts(write("ab\nc\n\f\nde"), TOY, length=4)
    windows = load_prompts(write(b"\xef\xbb\xbfab\r\nc\r\n\f\r\nde", "windows.txt"), TOY, length=4)
    assert windows.tokens.tolist() == plain.tokens.tolist()


@pytest.mark.parametrize("text", ["ab\fcd", "ab\f\ncd", "ab\n\fcd"])
def test_only_a_line_of_its_own_separates_documents(write, text):
    assert load_prompts(write(text), TOY, length=len(text), bos="never").source["documents"] == 1


def test_tokens_limits_the_rows(write):
    path = write("abcdefghijkl")
    assert load_prompts(path, TOY, length=3, tokens=8).tokens.tolist() == [[0, A, B], [0, C, D]]
    assert load_prompts(path, TOY, length=3, tokens=3).n == 1
    few = load_prompts(path, TOY, length=3, tokens=10**6)
    assert few.n == 6
    assert few.source["tokens_asked"] == 10**6


def test_length_defaults_to_128_or_the_model(write):
    path = write("ab" * 200)
    assert load_prompts(path, TOY).length == 128
    assert load_prompts(path, TOY, max_length=2048).length == 128
    assert load_prompts(path, TOY, max_length=20).length == 20


def test_bos_always_insists(write):
    assert load_prompts(write("abcd"), TOY, length=3, bos="always").tokens[:, 0].tolist() == [0, 0]
    with pytest.raises(UsageError, match="no BOS"):
        load_prompts(write("abcd"), BARE, length=3, bos="always")


documents = st.lists(st.text(LETTERS.replace("\n", ""), max_size=12), min_size=1, max_size=90)


@settings(deadline=None, max_examples=60)
@given(documents, st.integers(2, 9), st.integers(1, 120) | st.none(), st.sampled_from(["auto", "never"]))
def test_rows_are_the_stream_in_order(texts, length, tokens, bos):
    stream = []
    for text in filter(None, texts):
        stream += [1] * bool(stream) + [VOCABULARY[c] for c in text]
    own = length - (bos == "auto")
    possible = len(stream) // own
    if possible == 0 or (tokens is not None and tokens < length):
        with pytest.raises(UsageError):
            _from_list(texts, length, tokens, bos)
        return
    found = _from_list(texts, length, tokens, bos)
    assert found.n == (possible if tokens is None else min(possible, tokens // length))
    assert found.tokens[:, length - own :].ravel().tolist() == stream[: found.n * own]
    if bos == "auto":
        assert set(found.tokens[:, 0]) == {0}
    assert np.all(np.diff(found.document) >= 0)
    assert all(texts[d] for d in found.document)
    assert found.document.max() < found.source["documents"] <= len(texts)


def _from_list(texts, length, tokens, bos):
    """Packs documents through a jsonl file, where a document may hold anything."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
        return load_prompts(path, TOY, length=length, tokens=tokens, bos=bos)


def test_how_many_documents_are_tokenised_at_once_changes_nothing(write, monkeypatch):
    path = write("\n\f\n".join("abcdefgh"[: 1 + i % 8] for i in range(100)))
    one = load_prompts(path, TOY, length=5, tokens=200)
    monkeypatch.setattr(prompts, "_AT_ONCE", 1)
    other = load_prompts(path, TOY, length=5, tokens=200)
    assert one.sha256 == other.sha256
    assert one.source == other.source
    assert one.document.tolist() == other.document.tolist()


def test_a_long_text_is_read_no_further_than_needed(monkeypatch):
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"text": "abcdefgh"}

    _stub_dataset(monkeypatch, lambda *a, **k: endless())
    found = load_prompts("owner/name", TOY, length=8, tokens=80)
    assert found.n == 10
    assert len(read) <= prompts._AT_ONCE


# The object


def test_prompts_hash_shape_and_ids():
    tokens = np.arange(6).reshape(2, 3)
    found = load_prompts(tokens)
    shape, ids = np.array([2, 3], "<i8"), np.arange(6).astype("<i8")
    assert found.sha256 == sha256(shape.tobytes() + ids.tobytes()).hexdigest()
    assert found.sha256 != load_prompts(tokens.reshape(3, 2)).sha256
    assert found.sha256 == load_prompts(tokens.astype(">i2")).sha256
    assert found.sha256 == Prompts(tokens.astype("int32"), np.arange(2), {}).sha256


def test_take(write):
    found = load_prompts(np.arange(12).reshape(4, 3))
    assert found.take(2).tokens.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.take(2).document.tolist() == [0, 1]
    assert found.take(99).n == 4
    assert found.take(2).sha256 == load_prompts(np.arange(6).reshape(2, 3)).sha256
    with pytest.raises(UsageError, match="0"):
        found.take(0)


def test_provenance_is_json_and_says_what_was_done(write):
    path = write("abc\n\f\ndef")
    source = load_prompts(path, TOY, length=3, tokens=np.int64(100)).source
    assert json.loads(json.dumps(source)) == source
    assert source["kind"] == "text"
    assert source["name"] == path
    assert source["sha256"] == sha256(Path(path).read_bytes()).hexdigest()
    assert source["documents"] == 2
    assert source["length"] == 3
    assert source["tokens_asked"] == 100
    assert source["tokenizer"]


def test_documents_counts_those_in_the_rows(write):
    path = write("abcd\n\f\nabcd\n\f\nabcd")
    assert load_prompts(path, TOY, length=3, tokens=3).source["documents"] == 1
    assert load_prompts(path, TOY, length=3, tokens=6).source["documents"] == 1
    assert load_prompts(path, TOY, length=3, tokens=9).source["documents"] == 2


@pytest.mark.parametrize("document", [np.zeros(3, int), np.zeros((2, 1), int)])
def test_document_must_match(document):
    with pytest.raises(UsageError, match="document"):
        Prompts(np.zeros((2, 4), int), document, {})


# Token ids as they are


@pytest.mark.parametrize("dtype", ["int16", "uint16", ">i4", "int64", "uint64"])
def test_npy_is_used_as_it_is(save, dtype):
    rows = np.array([[0, 5, 9], [7, 0, 0]], dtype)
    found = load_prompts(save(rows), tokenizer=TOY)
    assert found.tokens.tolist() == rows.tolist()
    assert found.tokens.dtype == np.int64
    assert found.document.tolist() == [0, 1]
    assert found.source["kind"] == "npy"
    assert found.source["bos_added"] is False
    json.dumps(found.source)


def test_npy_rows_and_columns_are_limited_only_on_request(save):
    path = save(np.arange(600).reshape(3, 200))
    assert load_prompts(path).tokens.shape == (3, 200)
    assert load_prompts(path, tokens=450).tokens.shape == (2, 200)
    assert load_prompts(path, tokens=9, length=4).tokens.tolist() == [[0, 1, 2, 3], [200, 201, 202, 203]]
    assert load_prompts(path, tokens=10**9).n == 3


def test_an_array_is_token_ids_too():
    assert load_prompts([[1, 2], [3, 4]]).source["kind"] == "array"


def test_npy_in_fortran_order(save):
    rows = np.asfortranarray(np.arange(6).reshape(2, 3))
    assert load_prompts(save(rows)).tokens.flags.c_contiguous


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(4), r"shape \(4,\)"),
        (np.zeros((2, 2, 2), int), r"\(2, 2, 2\)"),
        (np.zeros((2, 2)), "float64"),
        (np.zeros((2, 2), bool), "bool"),
        (np.array([["a", "b"]]), "<U1"),
        (np.zeros((0, 4), int), "no prompt"),
        (np.zeros((4, 1), int), "at least 2"),
        (np.zeros((4, 0), int), "at least 2"),
        (np.array([[1, 2], [3, -4]]), "-4 at prompt 1, position 1 .* 0 to 99"),
        (np.array([[1, 2], [100, 101]]), "100 at prompt 1, position 0 .* 0 to 99"),
        (np.array([[1, 2**64 - 1]], "uint64"), str(2**64 - 1)),
    ],
)
def test_ids_that_do_not_fit(save, array, message):
    for source in (save(array), array):
        with pytest.raises(UsageError, match=message) as caught:
            load_prompts(source, vocab_size=100)
        assert "\n" not in str(caught.value)


def test_ids_without_a_vocabulary_must_still_be_ids(save):
    with pytest.raises(UsageError, match="-1"):
        load_prompts(np.array([[0, -1]]))
    with pytest.raises(UsageError, match=str(2**64 - 1)):
        load_prompts(np.array([[1, 2**64 - 1]], "uint64"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 9}, "length 9 .* 8 or less"),
        ({"max_length": 4}, "length 8 .* 4 or less"),
        ({"tokens": 7}, "tokens 7 .* 8"),
        ({"bos": "always"}, "always"),
    ],
)
def test_npy_options_that_do_not_fit(options, message):
    with pytest.raises(UsageError, match=message):
        load_prompts(np.zeros((2, 8), int), **options)


class Trap:
    def __reduce__(self):
        return (os.system, ("exit 1",))


def test_a_pickle_is_never_opened(tmp_path, save, monkeypatch):
    def opened(*_a, **_k):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", opened)
    monkeypatch.setattr(pickle, "loads", opened)
    bare = tmp_path / "pickle.npy"
    bare.write_bytes(pickle.dumps(Trap()))
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([[1, Trap()]], dtype=object), allow_pickle=True)
    for path in (bare, objects):
        with pytest.raises(UsageError, match=path.name):
            load_prompts(path)
        with pytest.raises(UsageError, match=path.name):
            load_partners(path, 2)


def _header(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04zip",
        b"hello there",
        _header((4, 4)) + bytes(100),
        _header((10**12, 10**3)),
    ],
)
def test_an_unreadable_npy(tmp_path, content):
    path = tmp_path / "broken.npy"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"broken\.npy") as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


def test_a_missing_npy(tmp_path):
    with pytest.raises(UsageError, match=r"none\.npy"):
        load_prompts(tmp_path / "none.npy")


# Texts that do not fit


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        ("", 3, "0 tokens.*give more text"),
        ("\f\n\f\n", 3, "0 tokens"),
        ("a", 3, "1 tokens.*2 or less"),
        ("abcd", 9, "4 tokens.*9.*5 or less"),
        ("<bos>abc", 9, "4 tokens.*4 or less"),
    ],
)
def test_too_short(write, text, length, message):
    with pytest.raises(UsageError, match=message):
        load_prompts(write(text), TOY, length=length)


@pytest.mark.parametrize("text", ["a", "abcd", "<bos>abc", "abc\n\f\nd"])
def test_the_length_that_the_error_names_is_the_longest_that_works(write, text):
    path = write(text)
    with pytest.raises(UsageError) as caught:
        load_prompts(path, TOY, length=50)
    fits = int(str(caught.value).split("set length to ")[1].split()[0])
    assert load_prompts(path, TOY, length=fits).n == 1
    with pytest.raises(UsageError):
        load_prompts(path, TOY, length=fits + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "length 1.*2 or more"),
        ({"length": 0}, "length 0"),
        ({"length": -5}, "length -5"),
        ({"length": 2.5}, r"length 2\.5"),
        ({"tokens": 0}, "tokens 0"),
        ({"tokens": -3}, "tokens -3"),
        ({"tokens": 2, "length": 3}, "tokens 2 .* 3 or more"),
        ({"tokens": 100}, "tokens 100 .* 128"),
        ({"length": 30, "max_length": 20}, "length 30 .* 20 or less"),
        ({"bos": "yes"}, "'yes'.*auto, always, never"),
        ({"length": 3, "vocab_size": 4}, "token id 4 at prompt 0, position 2 .* 0 to 3"),
    ],
)
def test_text_options_that_do_not_fit(write, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_prompts(write("abcdefgh"), TOY, **options)
    assert "\n" not in str(caught.value)


def test_text_needs_a_tokenizer(write):
    with pytest.raises(UsageError, match=r"text\.txt.*tokenizer"):
        load_prompts(write("abc"))
    with pytest.raises(UsageError, match=r"sample.*tokenizer"):
        load_prompts()


@pytest.mark.parametrize(
    ("raw", "message"), [(b"abc\xff", "byte 3"), (b"ab\0c", "zero"), (bytes(range(256)), "UTF-8")]
)
def test_binary_is_refused(write, raw, message):
    with pytest.raises(UsageError, match=message):
        load_prompts(write(raw), TOY, length=2)


@pytest.mark.parametrize(
    "source",
    [
        "missing.txt",
        "a/b.txt",
        "./corpus",
        "../up/corpus",
        "/root/of/corpus",
        "~/corpus",
        "a/b/c",
        "",
        "two words",
        "x" * 5000 + "!",
    ],
)
def test_a_missing_file_is_not_looked_for_on_the_network(monkeypatch, tmp_path, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpora, "_dataset", lambda *a: pytest.fail("asked the network"))
    with pytest.raises(UsageError, match="no file") as caught:
        load_prompts(source, TOY)
    assert len(str(caught.value)) < 300


def test_sample_ships():
    shipped = Path(prompts.__file__).parent / "models" / "embedded" / "heldout.txt"
    if not shipped.exists():
        pytest.skip("the shipped text is not written yet")
    found = load_prompts("sample", TOY, length=16)
    assert found.source["kind"] == found.source["name"] == "sample"
    assert found.sha256 == load_prompts(None, TOY, length=16).sha256
    assert found.n > 1
    assert found.document[-1] > 0


# jsonl and datasets


def test_jsonl(write):
    path = write('{"body": "ab"}\n\n{"body": null}\n{"body": "cd"}\n', "rows.jsonl")
    found = load_prompts(path, TOY, length=2, bos="never", column="body")
    assert found.tokens.tolist() == [[A, B], [1, C]]
    assert found.document.tolist() == [0, 2]
    assert found.source["sha256"] == sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "ab"}\n{"text"', "line 2"),
        ('{"body": "ab", "id": 1}', "'text'.*body, id"),
        ('{"text": 3}', "int"),
        ("[1, 2]", "line 1.*object"),
        (b'{"text": "\xff"}', "line 1, is not UTF-8"),
    ],
)
def test_jsonl_that_does_not_fit(write, text, message):
    with pytest.raises(SelfRepairError, match=message):
        load_prompts(write(text, "rows.jsonl"), TOY, length=2)


def _stub_dataset(monkeypatch, load):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(corpora, "_commit", lambda name, revision: revision or "0a1b2c")


def test_hub_dataset_is_streamed_at_the_commit_it_resolves_to(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return iter([{"text": "abcdefgh"}] * 3)

    _stub_dataset(monkeypatch, load)
    found = load_prompts("owner/name-1.0", TOY, length=4, tokens=8, split="validation")
    options = {"split": "validation", "revision": "0a1b2c", "streaming": True}
    assert asked == [(("owner/name-1.0", None), options)]
    assert found.tokens.tolist() == [[0, A, B, C], [0, D, E, F]]
    assert found.source | {"kind": "dataset", "name": "owner/name-1.0", "revision": "0a1b2c"} == found.source
    load_prompts("owner/name:20231101.en", TOY, length=4)
    assert asked[1][0] == ("owner/name", "20231101.en")
    load_prompts("wikitext", TOY, length=4)
    assert asked[2][0] == ("wikitext", None)


def test_dataset_without_a_number_of_tokens_gives_the_default(monkeypatch):
    _stub_dataset(monkeypatch, lambda *a, **k: iter([{"text": "abcdefgh" * 1000}] * 1000))
    found = load_prompts("owner/name", TOY, length=100)
    assert found.n == prompts.DEFAULT_TOKENS // 100
    assert found.source["tokens_asked"] == prompts.DEFAULT_TOKENS


def test_a_dataset_of_files_is_read_from_a_directory(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "corpus").mkdir()
    rows = {"text": ["abc", None, "def"] * 50, "id": list(range(150))}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "corpus" / "train.parquet")
    found = load_prompts(tmp_path / "corpus", TOY, length=4, tokens=12, bos="never")
    assert found.tokens.tolist() == [[A, B, C, 1], [D, E, F, 1], [A, B, C, 1]]
    assert found.document.tolist() == [0, 2, 3]
    assert found.source["kind"] == "dataset"
    assert found.source["split"] == "train"
    with pytest.raises(UsageError, match=r"'test'.*train") as caught:
        load_prompts(tmp_path / "corpus", TOY, length=4, split="test")
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"'body'.*text, id"):
        load_prompts(tmp_path / "corpus", TOY, length=4, column="body")
    with pytest.raises(UsageError, match=r"'id'.*int"):
        load_prompts(tmp_path / "corpus", TOY, length=4, column="id")


def test_unknown_and_unreachable_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    for raised, kind in (
        (datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub"), UsageError),
        (ValueError("Config name is missing.\nPlease pick one of ['en', 'fr']"), UsageError),
        (ConnectionError("Couldn't reach the Hub"), SelfRepairError),
    ):

        def load(*_a, error=raised, **_k):
            raise error

        _stub_dataset(monkeypatch, load)
        with pytest.raises(SelfRepairError, match="'o/n' is no file") as caught:
            load_prompts("o/n", TOY)
        assert type(caught.value) is kind
        assert caught.value.__cause__ is raised
        assert "sample" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert str(raised).split("\n")[-1] in str(caught.value)


def test_a_stream_that_breaks_says_so(monkeypatch):
    def broken():
        yield {"text": "abc"}
        raise ConnectionError("reset by peer")

    _stub_dataset(monkeypatch, lambda *a, **k: broken())
    with pytest.raises(SelfRepairError, match="reset by peer") as caught:
        load_prompts("owner/name", TOY, length=3)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_missing_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(corpora, "_commit", lambda *a: None)
    with pytest.raises(SelfRepairError, match="pip install datasets"):
        load_prompts("owner/name", TOY)


def test_the_commit_is_the_revision_where_the_hub_is_silent(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def silent(*_a, **_k):
        raise ConnectionError

    monkeypatch.setattr(hub.HfApi, "dataset_info", silent)
    assert corpora._commit("owner/name", "main") == "main"
    assert corpora._commit("owner/name", None) is None


# Partners


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(0, 2**63))
def test_partners_are_a_derangement(n, seed):
    found = partners(n, seed)
    assert found.dtype == np.int64
    assert sorted(found) == list(range(n))
    assert not np.any(found == np.arange(n))
    assert found.tolist() == partners(n, seed).tolist()


def test_partners_are_the_same_everywhere():
    assert partners(8, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert partners(5, 12345).tolist() == [3, 0, 4, 2, 1]


def test_partners_are_uniform_over_derangements():
    counts = Counter(tuple(partners(4, seed)) for seed in range(3600))
    assert len(counts) == 9
    chi_squared = sum((count - 400) ** 2 / 400 for count in counts.values())
    assert chi_squared < 26.1  # 8 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("n", "seed", "message"), [(1, 0, "mean or zero"), (0, 0, "two"), (4, -1, "seed -1"), (4, "x", "'x'")]
)
def test_partners_that_cannot_be(n, seed, message):
    with pytest.raises(UsageError, match=message):
        partners(n, seed)


def test_partners_from_the_user(save):
    chosen = [2, 1, 3, 0]  # 1 is its own partner
    assert load_partners(chosen, 4).tolist() == chosen
    found = load_partners(save(np.array(chosen, "uint8")), 4)
    assert found.tolist() == chosen
    assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([1, 0, 1, 3], "entry 2, 1, is named before"),
        ([1, 0, 4, 3], "entry 2, 4, is no prompt"),
        ([1, 0, -1, 3], "entry 2, -1"),
        ([1, 0, 2], r"\(3,\).*4 prompts"),
        ([[1, 0, 2, 3]], r"\(1, 4\)"),
        ([1.0, 0.0, 2.0, 3.0], "float64"),
        ([True, False, True, True], "bool"),
    ],
)
def test_partners_that_do_not_fit(save, chosen, message):
    for source in (chosen, save(np.array(chosen))):
        with pytest.raises(UsageError, match=message):
            load_partners(source, 4)
    with pytest.raises(UsageError, match=r"none\.npy"):
        load_partners("none.npy", 4)


# Token texts


def test_token_texts():
    ids = np.array([[A, 0], [VOCABULARY[" "], A]])
    found = token_texts(TOY, ids)
    assert found.tolist() == [["a", "<bos>"], [" ", "a"]]
    assert found.shape == ids.shape
    assert all(type(t) is str for t in found.ravel())


def test_token_texts_decodes_each_id_once():
    class Counting:
        def __init__(self):
            self.seen = Counter()

        def decode(self, ids, **_options):
            self.seen[tuple(ids)] += 1
            return f"<{ids[0]}>"

    counting = Counting()
    found = token_texts(counting, np.tile([5, 7, 5], (4, 2)))
    assert found.shape == (4, 6)
    assert found[0, 1] == "<7>"
    assert counting.seen == {(5,): 1, (7,): 1}


def test_token_texts_without_a_tokenizer():
    assert token_texts(None, np.array([12, 3])).tolist() == ["12", "3"]


def test_only_numpy_is_imported():
    code = (
        "import sys, selfrepair_nn.prompts; print({'torch', 'datasets', 'transformers'} & set(sys.modules))"
    )
    root = Path(prompts.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
