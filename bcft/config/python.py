"""What a caller gives from Python and a command line cannot: switches by name, and rows in place of a dataset."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bcft.errors import DataError, UsageError
from bcft.types import show

Rows = Sequence[Mapping[str, Any]]


def switches(**flags: bool) -> frozenset[str]:
    """Return the flags that are on, as the command line calls them: `switches(dry_run=True)` is `{"dry-run"}`."""
    return frozenset(name.replace("_", "-") for name, on in flags.items() if on)


def rows_of(train_dataset: Iterable[Mapping[str, Any]] | None) -> Rows | None:
    """Return the rows of a `datasets.Dataset`, as it is, or of any iterable of dicts as a list; None for None.

    Raises UsageError for what has no rows, DataError with its number for a row that is not a dict.
    """
    if train_dataset is None:
        return None
    if isinstance(train_dataset, Mapping):
        splits = ", ".join(map(str, train_dataset))
        raise UsageError(f"train_dataset: a dict of {splits:.80}: give one split, such as train_dataset['train']")
    kind = type(train_dataset)
    if kind.__module__.partition(".")[0] == "pandas":
        raise UsageError(f"train_dataset: a pandas {kind.__name__}: give datasets.Dataset.from_pandas(df)")
    if isinstance(train_dataset, str) or not hasattr(train_dataset, "__iter__"):
        raise UsageError(
            f"train_dataset: wants a datasets.Dataset or a list of dicts, not {show(train_dataset)}; "
            "dataset_name takes a file or a Hub id"
        )
    # What has rows by number stays as it is: it may be larger than memory.
    rows: Any = train_dataset if hasattr(kind, "__len__") and hasattr(kind, "__getitem__") else list(train_dataset)
    wrong = next((i for i, row in enumerate(rows) if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise DataError(
            f"train_dataset row {wrong}: expected a mapping from columns to values, not {show(rows[wrong])}"
        )
    if not len(rows):
        raise DataError("train_dataset: no rows")
    checked: Rows = rows
    return checked


def named_rows(rows: Sequence[Mapping[str, Any]] | None) -> dict[str, str]:
    """Return `dataset_name` as a run records it for rows given from Python: a name with a hash of all rows.

    A run is then not resumed with other rows. Returns {} for None.
    """
    if rows is None:
        return {}
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(dict(row), default=str, skipkeys=True).encode())
    return {"dataset_name": f"train_dataset@{digest.hexdigest()[:8]}"}
