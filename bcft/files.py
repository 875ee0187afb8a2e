"""Files of users' rows: json, jsonl, csv and parquet, every row with the place it stands at."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bcft.errors import DataError


def read_json_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the objects of a JSON file, an array of them or one a line. Raises DataError with file and line."""
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if raw.lstrip()[:1] == b"[":
        rows = _parse_json(raw, str(path))
        yield from ((_mapping(row, f"{path}: row {i}"), f"{path}: row {i}") for i, row in enumerate(rows))
        return
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield _mapping(_parse_json(line, where), where), where


def _parse_json(raw: bytes, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise DataError(f"{where}: key {key!r} stands twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise DataError(f"{where}: {constant} is no JSON number")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply") from error
    except json.JSONDecodeError as error:
        place = where if error.lineno == 1 else f"{where}:{error.lineno}"
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error


def _mapping(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with columns, found {type(row).__name__}")
    return row


def _read_csv(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: not as many fields as the header has ({len(reader.fieldnames or ())})")
                yield row, where
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as parquet: {error}") from error
    yield from ((row, f"{path}: row {i}") for i, row in enumerate(rows))


READERS = {".jsonl": read_json_rows, ".json": read_json_rows, ".csv": _read_csv, ".parquet": _read_parquet}


def shown(value: Any) -> str:
    """Return a value for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
