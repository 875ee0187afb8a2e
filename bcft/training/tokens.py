"""The tokens of the examples to train on, as one Arrow table that may be larger than memory."""

import os
import tempfile
import uuid
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np

from bcft.errors import StorageError
from bcft.types import IGNORED, Lazy, TrainingExample

IN_MEMORY = 64 << 20
"""Bytes of token ids and labels that stay in memory; more are written to a temporary file, which is memory-mapped."""
BATCH = 1 << 20
"""Tokens of a record batch."""
_COLUMNS = ("input_ids", "labels")


class Tokens:
    """Token ids and labels of examples: appended, then read as a table with the columns that the trainer reads.

    Raises StorageError when the disk of temporary files is full.
    """

    def __init__(self) -> None:
        self._lengths, self._supervised = array("i"), array("i")
        self._digests = array("Q")
        self._ids, self._labels = array("i"), array("i")
        self._open = 0  # rows that are in no batch yet
        self._batches: list[Any] = []
        self._size = 0
        self._writer: Any = None
        self._path = ""
        self._table: Any = None

    @classmethod
    def of(cls, examples: Iterable[TrainingExample]) -> "Tokens":
        """Return the tokens of examples."""
        tokens = cls()
        for example in examples:
            tokens.append(example)
        return tokens

    def append(self, example: TrainingExample) -> None:
        """Add the tokens of an example."""
        ids, labels = array("i", example.input_ids), array("i", example.labels)
        self._lengths.append(len(ids))
        self._supervised.append(len(labels) - labels.count(IGNORED))
        digest = blake2b(ids.tobytes(), digest_size=16).digest()
        self._digests.frombytes(digest)
        self._ids += ids
        self._labels += labels
        self._open += 1
        if len(self._ids) >= BATCH:
            self._close_batch()

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example: (N,)."""
        return np.array(self._lengths, dtype=np.int64)

    @property
    def supervised(self) -> np.ndarray:
        """The number of tokens of each example that carry loss: (N,)."""
        return np.array(self._supervised, dtype=np.int64)

    def distinct(self) -> np.ndarray:
        """Return the numbers of the examples whose ids no earlier example has, in order: (M,)."""
        digests = np.array(self._digests, dtype=np.uint64).reshape(-1, 2)
        order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: of equal ones the first comes first
        again = np.zeros(len(order), dtype=bool)
        again[1:] = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
        return np.sort(order[~again])

    @property
    def table(self) -> Any:
        """All rows, a `pyarrow.Table`; nothing can be appended after this."""
        if self._table is None:
            import pyarrow as pa  # noqa: PLC0415 - slow to import, and `refilter` needs only the class

            self._close_batch()
            if self._writer is None:
                self._table = pa.Table.from_batches(self._batches)
            else:
                with _storage():
                    self._writer.close()
                self._table = pa.ipc.open_stream(pa.memory_map(self._path)).read_all()
                os.unlink(self._path)  # the mapping keeps its content until the process ends, however it ends
        return self._table

    def _close_batch(self) -> None:
        import pyarrow as pa  # noqa: PLC0415 - as above

        lengths = self._lengths[len(self._lengths) - self._open :]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), type=pa.int32())
        columns = [pa.ListArray.from_arrays(offsets, pa.array(np.array(part, dtype=np.int32)))
                   for part in (self._ids, self._labels)]  # fmt: skip
        self._batches.append(pa.RecordBatch.from_arrays(columns, names=list(_COLUMNS)))
        self._size += self._batches[-1].nbytes
        self._ids, self._labels, self._open = array("i"), array("i"), 0
        if self._size > IN_MEMORY:
            with _storage():
                if self._writer is None:
                    handle, self._path = tempfile.mkstemp(prefix="bcft-", suffix=".arrow")
                    os.close(handle)
                    self._writer = pa.ipc.new_stream(pa.OSFile(self._path, "wb"), self._batches[0].schema)
                for batch in self._batches:
                    self._writer.write_batch(batch)
            self._batches = []


class Examples(Lazy[TrainingExample]):
    """Examples whose tokens are in a table; the text of one is read when it is asked for.

    numbers: the rows of the table that these examples are: (N,); make: (row, input_ids, labels) -> its example.
    """

    def __init__(
        self,
        tokens: Tokens,
        numbers: np.ndarray,
        make: Callable[[int, tuple[int, ...], tuple[int, ...]], TrainingExample],
    ) -> None:
        self.tokens = tokens
        self.numbers = numbers
        self._make = make
        super().__init__(len(numbers), self._example)

    def _example(self, index: int) -> TrainingExample:
        number, table = int(self.numbers[index]), self.tokens.table
        return self._make(number, *(tuple(table[name][number].as_py()) for name in _COLUMNS))


def supervised_tokens(examples: Sequence[TrainingExample]) -> int:
    """Return how many tokens of all examples carry loss."""
    if isinstance(examples, Examples):
        return int(examples.tokens.supervised[examples.numbers].sum())
    return sum(example.supervised for example in examples)


def longest_example(examples: Sequence[TrainingExample]) -> int:
    """Return the tokens of the longest example."""
    if isinstance(examples, Examples):
        return int(examples.tokens.lengths[examples.numbers].max())
    return max(len(example.input_ids) for example in examples)


def to_dataset(examples: Sequence[TrainingExample]) -> Any:
    """Return examples as a `datasets.Dataset` of the columns that the trainer reads."""
    from datasets import Dataset  # noqa: PLC0415 - seconds to import, and rows are counted without it
    from datasets.table import InMemoryTable  # noqa: PLC0415 - as above

    given = isinstance(examples, Examples)
    tokens = examples.tokens if isinstance(examples, Examples) else Tokens.of(examples)
    # A fingerprint of the content would read the whole table.
    dataset = Dataset(InMemoryTable(tokens.table), fingerprint=uuid.uuid4().hex[:16])
    if given and len(examples) < len(dataset):
        return dataset.select(examples.numbers)  # type: ignore[attr-defined]
    return dataset


@contextmanager
def _storage() -> Any:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write the tokens to a temporary file in {tempfile.gettempdir()}: {error.strerror or error}: make "
            f"room there, or set TMPDIR to a directory on a disk with room"
        ) from error
