"""The key `datasets`: what an entry of a mixture may hold, with the names of TRL's `DatasetConfig`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bcft.types import show

FIELDS: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "path": ("a name like that of dataset_name", (str,)),
    "name": ("the name of a configuration", (str,)),
    "data_dir": ("a directory", (str,)),
    "data_files": ("a file, a list of files, or a mapping from splits to files", (str, list, dict)),
    "split": ("a name, or a name with rows as in train[:2000]", (str,)),
    "columns": ("a list of columns", (list,)),
    "fraction": ("a number > 0", (int, float)),
}
"""Field of an entry -> what it wants, in words and types. Null is as if absent, but for `path`."""


def mixture_faults(datasets: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what is wrong with a mixture."""
    if not datasets:
        yield "is empty: give one dataset or more"
    for number, entry in enumerate(datasets, 1):
        for field, value in entry.items():
            if field not in FIELDS:
                yield f"number {number}: unknown field {field}; there are {', '.join(FIELDS)}"
            elif value is not None and not _suits(field, value):
                yield f"number {number}: {field} wants {FIELDS[field][0]}, not {show(value)}"
        if entry.get("path") is None:
            yield f"number {number}: no path"
        elif entry["path"] in ("json", "csv", "parquet") and not entry.get("data_files"):
            yield f"number {number}: path {entry['path']} says only a format: give data_files too"
    without = [number for number, entry in enumerate(datasets, 1) if entry.get("fraction") is None]
    if without and len(without) < len(datasets):
        yield f"number {without[0]} has no fraction, and another has: give all of them one, or none"


def _suits(field: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, FIELDS[field][1]) or not value:
        return False
    texts = value if isinstance(value, list) else ()
    return all(isinstance(text, str) for text in texts) and (not isinstance(value, int | float) or value > 0)
