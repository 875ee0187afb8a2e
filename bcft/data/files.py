"""Users' files, each to its rows: json, jsonl, csv, tsv and parquet, the text formats with gzip as well.

A malformed file or row raises DataError with file and line. Nothing is guessed and nothing is skipped.
"""

import csv
import gzip
import io
import json
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
GZIP = b"\x1f\x8b"
"""The first bytes of every gzip file."""


def read_rows(path: Path) -> list[Row]:
    """Return all rows of a file with a suffix of `SUFFIXES`. Raises DataError, also where there are none."""
    if not path.is_file():
        raise DataError(f"dataset_name: {path} does not exist")
    rows = list(_READERS[suffix_of(path)](path))
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def suffix_of(path: Path) -> str:
    """Return the one of `SUFFIXES` that a name ends with, in letters of either case; '' if none."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def _content(path: Path) -> bytes:
    """Return the bytes of a file, without compression."""
    try:
        raw = path.read_bytes()
        if raw.startswith(GZIP) or path.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}: compress it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return raw


# JSON
def read_json_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON file: an array of them, or one on each line. Raises DataError with file and line."""
    raw = _content(path).removeprefix(b"\xef\xbb\xbf")
    if raw.lstrip()[:1] == b"[":
        rows = _parse_json(raw, str(path))
        yield from ((_mapping(row, f"{path}: row {i}"), f"{path}: row {i}") for i, row in enumerate(rows))
        return
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield (
                _mapping(_parse_json(line, where, remedy=": write an array of objects, or one object a line"), where),
                where,
            )


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


def _read_table(path: Path, *, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a file whose first line names the columns; fields may be quoted."""
    raw = _content(path)
    rows: list[Row] = []
    try:
        text = io.StringIO(raw.decode("utf-8-sig"), newline="")
        with _fields_up_to(len(raw)):
            reader = csv.DictReader(text, strict=True, delimiter=delimiter)
            _check_header(reader.fieldnames or (), f"{path}:{reader.line_num}")
            for row in reader:
                if None in row or None in row.values():
                    fields = len(reader.fieldnames or ())
                    raise DataError(f"{path}:{reader.line_num}: not as many fields as the header has ({fields})")
                rows.append((row, f"{path}:{reader.line_num}"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error
    except csv.Error as error:
        place, remedy = f"after line {reader.line_num}", "write quotes within a quoted field twice, or use jsonl"
        if not reader.line_num:
            place, remedy = "in line 1", _DELIMITERS
        raise DataError(f"{path}: not readable {place}: {error}: {remedy}") from error
    yield from rows


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
def _fields_up_to(size: int) -> Iterator[None]:
    """Let the csv module read fields of this size within the block: its limit is one of the whole process."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, min(size, 2**31 - 1)))
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
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as parquet: {' '.join(str(error).split())}") from error
    yield from ((row, f"{path}: row {i}") for i, row in enumerate(rows))


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
