"""Where text comes from: the shipped sample, a file or a dataset, as an iterator over documents and its provenance."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from hashlib import file_digest, sha256
from importlib.resources import files
from pathlib import Path

from selfrepair_nn.errors import SelfRepairError, UsageError, one_line

SAMPLE = "sample"

_DATASET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.+-]+)?")
_FILE = re.compile(r".*\.(np[yz]|te?xt|md|jsonl?|[ct]sv|parquet|arrow|gz|zst|zip|pt|pkl|bin)", re.IGNORECASE)
_SEPARATOR = re.compile(r"(?m:^|\n)\f(?:\n|\Z)")


def open_corpus(source, split: str, column: str, revision: str | None) -> tuple[Iterator[str], dict]:
    """The documents behind a name, one after the other, and their provenance; see `prompts.load_prompts`."""
    if source is None or source == SAMPLE:
        return _text(files("selfrepair_nn") / "models" / "embedded" / "heldout.txt", "sample", SAMPLE)
    if is_texts(source):
        digest = sha256(json.dumps(list(source)).encode()).hexdigest()
        return (each for each in source), {"kind": "texts", "name": "texts", "sha256": digest}
    name, path = str(source), os.path.expanduser(source)
    if os.path.isfile(path) and name.lower().endswith(".jsonl"):
        return _json_lines(path, name, column)
    if os.path.isfile(path):
        return _text(Path(path), "text", name)
    if os.path.isdir(path):
        return _dataset(name, path, None, split, column, None)
    if _DATASET.fullmatch(name) and not _FILE.fullmatch(name):
        repository, _, configuration = name.partition(":")
        return _dataset(name, repository, configuration or None, split, column, _commit(repository, revision))
    raise UsageError(
        f"no file {name[:80]!r}: give a text, .jsonl or .npy file, a dataset as owner/name, or {SAMPLE!r}; "
        "in Python texts themselves are given as a list"
    )


def is_texts(source) -> bool:
    """Whether the source is a list of texts, each a document."""
    return isinstance(source, list | tuple) and bool(source) and all(isinstance(each, str) for each in source)


def _text(path, kind: str, name: str) -> tuple[Iterator[str], dict]:
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {name}: {one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8 text at byte {error.start}: convert it, or give .npy token ids"
        ) from error
    if "\0" in text:
        raise UsageError(f"{name} is not text, it holds zero bytes: give UTF-8 text, or .npy token ids")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    origin = {"kind": kind, "name": name, "sha256": sha256(raw).hexdigest()}
    return (document for document in _SEPARATOR.split(text)), origin


def _json_lines(path: str, name: str, column: str) -> tuple[Iterator[str], dict]:
    try:
        with open(path, "rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {name}: {one_line(error)}") from error
    return _column(_objects(path), name, column), {
        "kind": "jsonl",
        "name": name,
        "column": column,
        "sha256": digest,
    }


def _objects(path: str) -> Iterator[dict]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number}, is not JSON: {one_line(error)}") from error
            if not isinstance(row, dict):
                raise UsageError(f"{path}, line {number}, is not a JSON object: write {{...}} on each line")
            yield row


def _dataset(name, path, configuration, split, column, revision) -> tuple[Iterator[str], dict]:
    try:
        import datasets
    except ImportError as error:
        raise SelfRepairError(f"{name} is a dataset: pip install datasets, or give a text file") from error
    try:
        rows = datasets.load_dataset(path, configuration, split=split, revision=revision, streaming=True)
    except Exception as error:
        kind = UsageError if isinstance(error, (FileNotFoundError, ValueError)) else SelfRepairError
        raise kind(
            f"{name!r} is no file, and no dataset with split {split!r} could be opened: {one_line(error)};"
            f" check the name and the network, or use a text file or {SAMPLE!r}"
        ) from error
    origin = {"kind": "dataset", "name": name, "split": split, "column": column, "revision": revision}
    return _column(rows, name, column), origin


def _commit(repository: str, revision: str | None) -> str | None:
    """The commit that a dataset's revision stands for now; the revision itself where the Hub is silent."""
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(repository, revision=revision, timeout=10).sha
    except Exception:
        return revision


def _column(rows: Iterable[dict], name: str, column: str) -> Iterator[str]:
    """The text of each row; null is an empty document, so that indices stay the source's."""
    try:
        for row in rows:
            if column not in row:
                raise UsageError(f"{name} has no column {column!r}: choose one of {', '.join(map(str, row))}")
            text = row[column]
            if not isinstance(text, (str, type(None))):
                raise UsageError(
                    f"column {column!r} of {name} holds {type(text).__name__}: choose one of text"
                )
            yield text or ""
    except SelfRepairError:
        raise
    except Exception as error:
        raise SelfRepairError(
            f"reading {name} failed, try again or give another file: {one_line(error)}"
        ) from error
