"""Users' files, each to its rows: json, jsonl, csv, tsv and parquet, the text formats with gzip as well.

Rows are yielded as they are read: a file may be larger than memory, unless it is one JSON array. A malformed file or
row raises DataError with file and line. Nothing is guessed and nothing is skipped.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bcft.errors import DataError
from bcft.types import show

Row = tuple[dict[str, Any], str]
"""A row's columns and its place, such as `file:line`."""
BATCH = 1000
"""Rows of a table that are in memory at once."""
GZIP = b"\x1f\x8b"
"""The first bytes of every gzip file."""


def read_rows(path: Path) -> Iterator[Row]:
    """Yield all rows of a file with a suffix of `SUFFIXES`. Raises DataError, also where there are none."""
    if not path.is_file():
        raise DataError(f"dataset_name: {path} does not exist")
    row: Row | None = None
    for row in _READERS[suffix_of(path)](path):
        yield row
    if row is None:
        raise DataError(f"{path}: no rows")


def suffix_of(path: Path) -> str:
    """Return the one of `SUFFIXES` that a name ends with, in letters of either case; '' if none."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, each with its line break, without compression and byte order mark.

    A gzip file is checked as a whole before its first line: what is damaged may still decompress to some text.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(len(GZIP)) == GZIP or path.name.lower().endswith(".gz")
            raw.seek(0)
            lines: Any = raw
            if packed:
                lines = gzip.GzipFile(fileobj=raw)
                while lines.read(1 << 20):
                    pass
                lines.seek(0)
            for number, line in enumerate(lines):
                yield line if number else line.removeprefix(b"\xef\xbb\xbf")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}: compress it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


# JSON
_ONE_A_LINE = ": write an array of objects, or one object a line"


def read_json_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON file: an array of them, or one on each line. Raises DataError with file and line."""
    lines, first = _lines(path), True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if line.lstrip()[:1] == b"[" and first:
            raw = b"\n" * (number - 1) + line + b"".join(lines)
            rows = _parse_json(raw, str(path))
            yield from ((_mapping(row, f"{path}: row {i}"), f"{path}: row {i}") for i, row in enumerate(rows))
            return
        first, where = False, f"{path}:{number}"
        yield _mapping(_parse_json(line.removesuffix(b"\n"), where, remedy=_ONE_A_LINE), where), where


def _parse_json(raw: bytes, where: str, *, remedy: str = "") -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if name := _doubled(key for key, _ in pairs):
            raise DataError(f"{where}: key {name!r} is given twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise DataError(f"{where}: {constant} is not a JSON number")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply") from error
    except json.JSONDecodeError as error:
        place = where if error.lineno == 1 else f"{where}:{error.lineno}"
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}{remedy}") from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{where}: not readable as JSON: {error}") from error


def _doubled(names: Iterable[str]) -> str | None:
    """Return the first name that is given twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _mapping(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with columns, not {type(row).__name__}")
    return row


# Tables
_DELIMITERS = "separate columns by commas (.csv) or tabs (.tsv)"
_CARRIAGE_RETURN = re.compile(r"(?<=\r)(?!\n)(?!$)")


def _read_table(path: Path, *, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a file whose first line names the columns; fields may be quoted."""
    try:
        with _fields_of_any_length():
            reader = csv.DictReader(_text_lines(path), strict=True, delimiter=delimiter)
            _check_header(reader.fieldnames or (), f"{path}:{reader.line_num}")
            for row in reader:
                if None in row or None in row.values():
                    fields = len(reader.fieldnames or ())
                    raise DataError(f"{path}:{reader.line_num}: not as many fields as the header has ({fields})")
                yield row, f"{path}:{reader.line_num}"
    except csv.Error as error:
        place, remedy = f"after line {reader.line_num}", "write quotes within a quoted field twice, or use jsonl"
        if not reader.line_num:
            place, remedy = "in line 1", _DELIMITERS
        raise DataError(f"{path}: not readable {place}: {error}: {remedy}") from error


def _text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file as text. A line may also end in a carriage return alone, as the csv module has it."""
    before = 0
    for line in _lines(path):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 (byte {before + error.start}): save the file as UTF-8") from error
        before += len(line)
        yield from _CARRIAGE_RETURN.split(text) if "\r" in text else (text,)


def _check_header(names: Iterable[str], where: str) -> None:
    """Raise DataError for a header that names two columns alike, or one not at all, or has another delimiter."""
    names = list(names)
    if len(names) == 1 and ";" in names[0]:
        raise DataError(f"{where}: the header is one column, {show(names[0])}: {_DELIMITERS}")
    if (name := _doubled(names)) is not None and name.strip():
        raise DataError(f"{where}: column {name!r} is given twice: rename one of them")
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise DataError(f"{where}: column {number} has no name: name or remove it (pandas: to_csv(index=False))")


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Let the csv module read fields of any length within the block: its limit is one of the whole process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # noqa: PLC0415 - slow to import, and other formats do not need it
    import pyarrow.parquet  # noqa: PLC0415 - as above

    try:
        names = pyarrow.parquet.read_schema(path).names
        if name := _doubled(names):
            raise DataError(f"{path}: column {name!r} is given twice: rename one of them")
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    yield row, f"{path}: row {number}"
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as parquet: {' '.join(str(error).split())}") from error


# What `datasets` saves
def is_saved(directory: Path) -> bool:
    """Return whether `Dataset.save_to_disk` wrote a directory."""
    return (directory / "state.json").is_file()


def saved_splits(directory: Path) -> tuple[str, ...] | None:
    """Return the splits, each a directory in this one, that `DatasetDict.save_to_disk` wrote; None if it did not."""
    file = directory / "dataset_dict.json"
    if not file.is_file():
        return None
    return tuple(map(str, _mapping(_parse_json(file.read_bytes(), str(file)), str(file)).get("splits", ())))


def read_saved(directory: Path) -> Iterator[Row]:
    """Yield the rows of a `datasets.Dataset` that `save_to_disk` wrote.

    The files are read in batches: `datasets` would map them into memory, where all that was read stays resident.
    """
    import pyarrow  # noqa: PLC0415 - as above
    import pyarrow.ipc  # noqa: PLC0415 - as above

    number = 0
    try:
        state = json.loads((directory / "state.json").read_bytes())
        if state.get("_indices_data_files"):
            raise DataError(f"{directory}: saved by an old version of datasets with a selection: save it again")
        for file in state["_data_files"]:
            with pyarrow.OSFile(str(directory / file["filename"])) as content:
                for batch in pyarrow.ipc.open_stream(content):
                    for row in batch.to_pylist():
                        yield row, f"{directory} row {number}"
                        number += 1
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{directory}: not readable as save_to_disk writes it: {reason}: save it again") from error
    if not number:
        raise DataError(f"{directory}: no rows")


_TEXT: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_json_rows,
    ".json": read_json_rows,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
}
_READERS = {**_TEXT, ".parquet": _read_parquet, **{f"{suffix}.gz": reader for suffix, reader in _TEXT.items()}}
"""File suffix -> the function that yields the rows of such a file."""
SUFFIXES = tuple(_READERS)
"""The ends of the names of files that can be read, in lower case."""
