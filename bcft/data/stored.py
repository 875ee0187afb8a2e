"""Rows that may be more than memory holds: the first stay objects, the others are in a temporary file.

A dataset has one form, whatever its size: a sequence that is read in order, often more than once. Of every row memory
holds some 16 bytes, its problem's id and its place; rows beyond the first `IN_MEMORY` bytes are read back when they are
asked for. The file has no name: it is gone when the process ends, however it ends. A value that is none of JSON's,
such as a date, stays in memory.
"""

import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from bcft.environments.base import SHARES, Split
from bcft.runs.storage import temporary_storage
from bcft.types import Demonstration, Lazy, Problem, Prompt, TrainingExample

IN_MEMORY = 64 << 20
"""Bytes of rows, as JSON, that stay in memory as objects. More saves the time to read them back."""


class Store:
    """Demonstrations, each appended once and read back by its number.

    Raises StorageError when the disk of temporary files is full.
    """

    def __init__(self) -> None:
        self._objects: dict[int, Demonstration] = {}
        self._columns: dict[int, dict[str, Any]] = {}  # of rows in the file, the columns that are not
        self._ends = array("q", [0])  # behind each row in the file; one that is an object takes no room there
        self._ids = array("Q")
        self._room = IN_MEMORY
        self._file: Any = None
        self._written = True

    def __len__(self) -> int:
        return len(self._ids)

    def append(self, row: Demonstration) -> None:
        """Add a row."""
        number, end = len(self._ids), self._ends[-1]
        content, others = _packed(row)
        self._ids.append(number_of(row.problem.id))
        if self._room > 0 or not content:
            self._objects[number] = row
            self._room -= len(content)
        else:
            with temporary_storage("the rows"):
                if self._file is None:
                    self._file = tempfile.TemporaryFile(prefix="bcft-", buffering=1 << 16)  # noqa: SIM115 - stays open
                self._file.write(content)
            end, self._written = end + len(content), False
            if others:
                self._columns[number] = others
        self._ends.append(end)

    def extend(self, rows: Iterable[Demonstration]) -> "Store":
        """Add rows; return the store."""
        for row in rows:
            self.append(row)
        return self

    def row(self, number: int) -> Demonstration:
        """Return a row."""
        if (row := self._objects.get(number)) is not None:
            return row
        if not self._written:
            with temporary_storage("the rows"):
                self._file.flush()
            self._written = True
        start, end = self._ends[number], self._ends[number + 1]
        return _unpacked(os.pread(self._file.fileno(), end - start, start), self._columns.get(number, {}))

    @property
    def ids(self) -> np.ndarray:
        """The ids of all rows' problems, as `number_of` gives them: uint64 (N,)."""
        return np.array(self._ids, dtype=np.uint64)

    def view(self, numbers: Sequence[int] | np.ndarray | None = None) -> "Rows":
        """Return the rows of these numbers, in this order; None: all."""
        return Rows(self, np.arange(len(self)) if numbers is None else np.asarray(numbers, dtype=np.int64))


class Rows(Lazy[Demonstration]):
    """Some rows of a store."""

    def __init__(self, store: Store, numbers: np.ndarray) -> None:
        super().__init__(len(numbers), lambda i: store.row(int(numbers[i])))
        self._store, self._numbers = store, numbers

    @property
    def ids(self) -> np.ndarray:
        """The ids of the rows' problems: uint64 (N,)."""
        return np.asarray(self._store.ids[self._numbers])

    def where(self, chosen: np.ndarray) -> "Rows":
        """Return the rows at these places, or those where an array of booleans (N,) is true."""
        return Rows(self._store, self._numbers[chosen])


def number_of(identity: str) -> int:
    """Return a problem's id, 16 hex digits, as the number it is; of another text its hash."""
    try:
        return int(identity, 16) if len(identity) == 16 else _hash(identity)
    except ValueError:
        return _hash(identity)


def ids_of(rows: Sequence[Demonstration]) -> np.ndarray:
    """Return the ids of the rows' problems as numbers: uint64 (N,)."""
    if isinstance(rows, Rows):
        return rows.ids
    return np.fromiter((number_of(row.problem.id) for row in rows), dtype=np.uint64, count=len(rows))


# Splits by hash
SMALL = 5
"""One problem in so many may be dev, and one in so many test, where the share of `SHARES` is too small."""


def by_hash(rows: Rows, *, dev: int | None, test: int | None) -> dict[Split, Rows]:
    """Split by the hash of the prompt; dev, test: how many problems an evaluation asks for, None to take none out.

    The shares of `SHARES` are held out, all of them even if fewer are evaluated: a later evaluation may take more. A
    share smaller than asked for gets further training problems, in the order of their hash, up to one in `SMALL` of
    all. (A tiny dataset may have more than that in a share by chance: the rest is then trained on.)
    """
    ids, problem = np.unique(rows.ids, return_inverse=True)
    buckets = (ids >> np.uint64(32)) / 2**32  # as `bcft.types.bucket`
    most = len(ids) // SMALL
    asked: dict[Split, int] = {}
    asked |= {} if test is None else {"test": test}
    asked |= {} if dev is None else {"dev": dev}
    names: tuple[Split, ...] = ("train", "dev", "test")
    split_of = np.zeros(len(ids), dtype=np.int8)  # the number of its split among the names
    for split, n in asked.items():
        low, high = SHARES[split]
        share = np.flatnonzero((low <= buckets) & (buckets < high))
        split_of[share if len(share) >= n else share[:most]] = names.index(split)
    held = {split: int((split_of == names.index(split)).sum()) for split in asked}
    left = np.flatnonzero(split_of == 0)
    for split, n in asked.items():
        more = max(0, min(n, most) - held[split])
        split_of[left[:more]] = names.index(split)
        left = left[more:]
    return {name: rows.where((split_of == number)[problem]) for number, name in enumerate(names)}


def first_problems(rows: Rows, n: int) -> tuple[Demonstration, ...]:
    """Return n problems in the order of their hash: a sample that no order of the file can bias."""
    _, firsts = np.unique(rows.ids, return_index=True)
    return tuple(rows.where(firsts[:n]))


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _packed(row: Demonstration) -> tuple[bytes, dict[str, Any]]:
    """Return a row as JSON, and the columns that JSON would change, which it holds as null.

    b"" if it would change the texts themselves, such as a string of another class.
    """
    problem, sampled = row.problem, row.sampled
    others = {name: value for name, value in problem.columns.items() if not _is_plain(value)}
    columns = {**problem.columns, **dict.fromkeys(others)}
    texts = [problem.id, _form(problem.prompt), problem.where, _form(row.prompt), [*row.completion], row.tokenizer]
    values = [columns, *texts, row.weight, sampled and [sampled.to_json(), sampled.where]]
    return (json.dumps(values).encode(), others) if _is_plain(values) else (b"", {})


def _unpacked(content: bytes, others: Mapping[str, Any]) -> Demonstration:
    columns, identity, prompt, where, first, completion, tokenizer, weight, sampled = json.loads(content)
    problem = Problem(identity, _prompt(prompt), columns | others, where)
    example = TrainingExample.from_json(sampled[0], where=sampled[1]) if sampled else None
    return Demonstration(problem, _prompt(first), tuple(completion), example, tokenizer, weight)


def _form(prompt: Prompt) -> Any:
    """Return a prompt so that JSON keeps whether it is a text, a list or a tuple."""
    return prompt if isinstance(prompt, str) else [isinstance(prompt, tuple), [*prompt]]


def _prompt(form: Any) -> Prompt:
    if isinstance(form, str):
        return form
    is_tuple, conversation = form
    return tuple(conversation) if is_tuple else list(conversation)


def _is_plain(value: object) -> bool:
    """Return whether JSON gives a value back as it is."""
    kind = type(value)
    if kind is int:
        return -(2**63) <= value < 2**63  # type: ignore[operator] # it is an int
    if kind is list:
        return all(map(_is_plain, value))  # type: ignore[call-overload] # it is a list
    if kind is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())  # type: ignore[attr-defined]
    return kind in (str, float, bool, type(None))
