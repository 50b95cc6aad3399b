"""Rows of a file of records: JSON lines, JSON, CSV, TSV or Parquet, plain or gzipped, each with its place there."""

import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from typing import Any

from selfrepair_nn.errors import SelfRepairError, UsageError, one_line

Rows = Iterator[tuple[str, dict[str, Any]]]
LONGEST_FIELD = 2**31 - 1


def opened(path: str | os.PathLike) -> BufferedIOBase:
    """A file's bytes, unpacked where its name ends in .gz."""
    return gzip.open(path, "rb") if _lower(path).endswith(".gz") else open(path, "rb")


def reader(path: str | os.PathLike) -> tuple[str, Callable[[str, str, str], Rows]] | None:
    """The kind of records that a file's name tells, and what reads them; None for text."""
    ending = os.path.splitext(_lower(path).removesuffix(".gz"))[1]
    return READERS.get(ending)


def _lower(path: str | os.PathLike) -> str:
    return os.fspath(path).lower()


def _json_lines(path: str, name: str, column: str) -> Rows:
    with opened(path) as file:
        for number, raw in enumerate(file, start=1):
            place = f"{name}, line {number}"
            line = _decoded(raw, f"{place},", first=number == 1)
            if line.strip():
                row = _parsed(line, f"{place},")
                if not isinstance(row, dict):
                    raise UsageError(f"{place}, is not a JSON object: write {{…}} on each line")
                yield place, row


def _json(path: str, name: str, column: str) -> Rows:
    """An array of objects or of strings, one object, or one on each line as in .jsonl."""
    with opened(path) as file:
        text = _decoded(file.read(), name, first=True)
    if _is_lines(text):
        yield from _json_lines(path, name, column)
        return
    found = _parsed(text, name)
    for number, row in enumerate(found if isinstance(found, list) else [found], start=1):
        place = f"{name}, row {number}"
        if not isinstance(row, dict | str):
            raise UsageError(f"{place}, is neither a JSON object nor a string: give an array of these")
        yield place, {column: row} if isinstance(row, str) else row


def _is_lines(text: str) -> bool:
    """Whether the first line is a whole JSON object and more follow."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _table(separator: str) -> Callable[[str, str, str], Rows]:
    return lambda path, name, column: _rows_of_table(path, name, separator)


def _rows_of_table(path: str, name: str, separator: str) -> Rows:
    """A header, then rows of as many fields; a field may be quoted, and then holds separators and lines."""
    csv.field_size_limit(LONGEST_FIELD)
    with opened(path) as file:
        lines = (_decoded(raw, f"{name}, line {n},", first=n == 1) for n, raw in enumerate(file, start=1))
        rows = csv.reader(lines, delimiter=separator, strict=True)
        header = _next(rows, name)
        if not header:
            raise UsageError(f"{name} is empty: its first line names the columns")
        if twice := next((n for n in header if header.count(n) > 1), None):
            raise UsageError(f"{name} names the column {twice!r} twice: rename one")
        while (row := _next(rows, name)) is not None:
            place = f"{name}, line {rows.line_num}"
            if row and len(row) != len(header):
                raise UsageError(
                    f"{place}, has {len(row)} fields, the first line {len(header)}: quote what holds {separator!r}"
                )
            if row:
                yield place, dict(zip(header, row, strict=True))


def _next(rows: Any, name: str) -> list[str] | None:
    try:
        return next(rows, None)
    except csv.Error as error:
        raise UsageError(f"{name}, line {rows.line_num}, is no row of a table: {one_line(error)}") from error


def _parquet(path: str, name: str, column: str) -> Rows:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise SelfRepairError(f"{name} is Parquet: pip install pyarrow, or give a text file") from error
    try:
        file = parquet.ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise UsageError(f"cannot read {name} as Parquet: {one_line(error)}") from error
    with file:
        names, number = file.schema_arrow.names, 0
        wanted = [column] if column in names else names
        for batch in file.iter_batches(batch_size=256, columns=wanted):
            for i in range(batch.num_rows):
                number += 1
                place = f"{name}, row {number}"
                yield place, {each: _value(batch.column(each)[i], place) for each in wanted}


def _value(scalar: Any, place: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}, is not UTF-8 text: {one_line(error)}") from error


def _decoded(raw: bytes, subject: str, first: bool) -> str:
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{subject} is not UTF-8 text (byte {error.start} of it): convert the file"
        ) from error


def _parsed(text: str, subject: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{subject} is not JSON: {one_line(error)}") from error


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"an object names {key!r} twice")
        found[key] = value
    return found


READERS = {
    ".jsonl": ("jsonl", _json_lines),
    ".ndjson": ("jsonl", _json_lines),
    ".json": ("json", _json),
    ".csv": ("csv", _table(",")),
    ".tsv": ("tsv", _table("\t")),
    ".parquet": ("parquet", _parquet),
}
DAMAGED = (OSError, EOFError, zlib.error)
"""What unpacking a damaged file raises."""
