"""Where text comes from: the shipped sample, a file or a dataset, as an iterator over documents and its provenance."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from hashlib import file_digest, sha256
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any

from selfrepair_nn.errors import SelfRepairError, UsageError, one_line
from selfrepair_nn.records import DAMAGED, opened, reader
from selfrepair_nn.settings import require_hub

SAMPLE, SPLIT, COLUMN = "sample", "train", "text"

_DATASET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.+-]+)?")
_FILE = re.compile(
    r".*\.(np[yz]|te?xt|md|(nd)?jsonl?|[ct]sv|parquet|arrow|gz|zst|zip|pt|pkl|bin)", re.IGNORECASE
)
_SEPARATOR = re.compile(r"(?m:^|\n)\f(?:\n|\Z)")
_HALF = re.compile(r"[\ud800-\udfff]")


def open_corpus(source, split: str, column: str, revision: str | None) -> tuple[Iterator[str], dict]:
    """The documents behind a name, one after the other, and their provenance; see `prompts.load_prompts`."""
    source = SAMPLE if source is None else source
    if is_texts(source):
        require_plain("a list of texts", split, column, revision)
        digest = sha256(json.dumps(list(source)).encode()).hexdigest()
        return (each for each in source), {"kind": "texts", "name": "texts", "sha256": digest}
    name, path = str(source), os.path.expanduser(source)
    if source == SAMPLE:
        require_plain(name, split, column, revision)
        return _text(files("selfrepair_nn") / "models" / "embedded" / "heldout.txt", "sample", SAMPLE)
    if os.path.isfile(path):
        return _file(path, name, split, column, revision)
    if os.path.isdir(path):
        _require_unset(name, "a directory", prompts_revision=(revision, None))
        return _dataset(name, path, None, split, column, None)
    if _DATASET.fullmatch(name) and not _FILE.fullmatch(name):
        require_hub()
        repository, _, configuration = name.partition(":")
        return _dataset(name, repository, configuration or None, split, column, _commit(repository, revision))
    raise UsageError(
        f"no file {name[:80]!r}: give a file of text, of records (.jsonl, .json, .csv, .tsv, .parquet) or of token "
        f"ids (.npy), a dataset as owner/name, or {SAMPLE!r}; in Python texts themselves are given as a list"
    )


def is_texts(source) -> bool:
    """Whether the source is a list of texts, each a document."""
    return isinstance(source, list | tuple) and bool(source) and all(isinstance(each, str) for each in source)


def require_plain(name: str, split: str, column: str, revision: str | None) -> None:
    """UsageError for a choice that only datasets and records have, made for prompts that are neither."""
    _require_records(name, split, revision)
    _require_unset(name, "text or token ids, which have no columns", column=(column, COLUMN))


def require_text(text: Any, place: str) -> None:
    """UsageError for what no tokenizer reads."""
    if not isinstance(text, str):
        raise UsageError(f"{place} is {type(text).__name__}, not text")
    if found := _HALF.search(text):
        raise UsageError(
            f"{place} holds half of a surrogate pair, {found[0]!r} at character {found.start()}, which is no text: "
            "mend it or leave it out"
        )


def _require_records(name: str, split: str, revision: str | None) -> None:
    _require_unset(name, "no dataset", dataset_split=(split, SPLIT), prompts_revision=(revision, None))


def _require_unset(name: str, what: str, **chosen: tuple[Any, Any]) -> None:
    """What was chosen, beside what it is where nobody chose."""
    for option, (value, default) in chosen.items():
        if value != default:
            flag = option.replace("_", "-")
            raise UsageError(f"{option} {value!r} does not apply: {name} is {what}; leave --{flag} out")


def _file(path: str, name: str, split: str, column: str, revision: str | None) -> tuple[Iterator[str], dict]:
    if (records := reader(path)) is None:
        require_plain(name, split, column, revision)
        return _text(Path(path), "text", name)
    _require_records(name, split, revision)
    kind, read = records
    try:
        with open(path, "rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {name}: {one_line(error)}") from error
    origin = {"kind": kind, "name": name, "column": column, "sha256": digest}
    return _column(read(path, name, column), name, column), origin


def _text(path, kind: str, name: str) -> tuple[Iterator[str], dict]:
    try:
        raw = path.read_bytes()
        with opened(path) as file:
            text = file.read().decode("utf-8-sig")
    except DAMAGED as error:
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


def _dataset(name, path, configuration, split, column, revision) -> tuple[Iterator[str], dict]:
    try:
        import datasets
    except ImportError as error:
        raise SelfRepairError(f"{name} is a dataset: pip install datasets, or give a text file") from error
    try:
        rows = datasets.load_dataset(
            path,
            configuration,
            split=split,
            revision=revision,
            streaming=True,
            **_no_code(datasets.load_dataset),
        )
    except Exception as error:
        kind = UsageError if isinstance(error, (FileNotFoundError, ValueError)) else SelfRepairError
        raise kind(
            f"{name!r} is no file, and no dataset with split {split!r} could be opened: {one_line(error)};"
            f" check the name and the network, or use a text file or {SAMPLE!r}"
        ) from error
    origin = {"kind": "dataset", "name": name, "split": split, "column": column, "revision": revision}
    numbered = ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=1))
    return _column(numbered, name, column), origin


def _no_code(load) -> dict[str, Any]:
    """That a dataset's own code is not run, for the versions of `datasets` that still can or ask."""
    return {"trust_remote_code": False} if "trust_remote_code" in signature(load).parameters else {}


def _commit(repository: str, revision: str | None) -> str | None:
    """The commit that a dataset's revision stands for now; the revision itself where the Hub is silent."""
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(repository, revision=revision, timeout=10).sha
    except Exception:
        return revision


def _column(rows: Iterable[tuple[str, dict]], name: str, column: str) -> Iterator[str]:
    """The text of each row, with its place; null is an empty document, so that indices stay the source's."""
    try:
        for place, row in rows:
            if column not in row:
                raise UsageError(f"{name} has no column {column!r}: choose one of {', '.join(map(str, row))}")
            if not isinstance(row[column], str | None):
                raise UsageError(
                    f"column {column!r} of {place}, holds {type(row[column]).__name__}: {_remedy(row)}"
                )
            require_text(row[column] or "", f"{place}, column {column!r},")
            yield row[column] or ""
    except SelfRepairError:
        raise
    except Exception as error:
        raise SelfRepairError(
            f"reading {name} failed, try again or give another file: {one_line(error)}"
        ) from error


def _remedy(row: dict) -> str:
    names = ", ".join(str(name) for name, value in row.items() if isinstance(value, str))
    return f"choose one of text ({names})" if names else "write text there, or null for none"
