"""The tokens of the examples to train on, as one Arrow table that may be larger than memory."""

import mmap
import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np

from bcft.runs.storage import temporary_storage
from bcft.types import IGNORED, Lazy, TrainingExample

IN_MEMORY = 64 << 20
"""Bytes of token ids and labels that stay in memory; more are written to a temporary file, which is memory-mapped."""
BATCH = 1 << 20
"""Tokens of a record batch."""
_COLUMNS = ("input_ids", "labels")


class Tokens:
    """Token ids and labels of examples: appended, then read as a table with the columns that the trainer reads.

    by_labels: whether examples with the same ids and other labels are distinct. Raises StorageError when the disk of
    temporary files is full.
    """

    def __init__(self, *, by_labels: bool = False) -> None:
        self._by_labels = by_labels
        self._lengths, self._supervised, self._predicted = array("i"), array("i"), array("i")
        self._weights = array("d")
        self._digests = array("Q")
        self._ids, self._labels = array("i"), array("i")
        self._open = 0  # rows that are in no batch yet
        self._batches: list[Any] = []
        self._size = 0
        self._file: Any = None  # it has no name: it is gone when the process ends, however it ends
        self._writer: Any = None
        self._table: Any = None

    def append(self, example: TrainingExample) -> None:
        """Add the tokens of an example."""
        ids, labels = array("i", example.input_ids), array("i", example.labels)
        self._lengths.append(len(ids))
        self._supervised.append(len(labels) - labels.count(IGNORED))
        self._predicted.append(self._supervised[-1] - (labels[:1] != array("i", [IGNORED])))
        self._weights.append(example.weight)
        content = ids.tobytes() + labels.tobytes() if self._by_labels else ids.tobytes()
        self._digests.frombytes(blake2b(content, digest_size=16).digest())
        self._ids += ids
        self._labels += labels
        self._open += 1
        if len(self._ids) >= BATCH:
            self._close_batch()

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example: (N,)."""
        return np.array(self._lengths, dtype=np.int64)

    @property
    def supervised(self) -> np.ndarray:
        """The number of tokens of each example that carry loss: (N,)."""
        return np.array(self._supervised, dtype=np.int64)

    @property
    def predicted(self) -> np.ndarray:
        """The number of labels behind the first token of each example, which no token predicts: (N,)."""
        return np.array(self._predicted, dtype=np.int64)

    @property
    def weights(self) -> np.ndarray:
        """The weight of each example: (N,)."""
        return np.array(self._weights, dtype=np.float64)

    def distinct(self, *, add_weights: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of the examples that no earlier one equals, in order, and their weights: (M,) both.

        add_weights: whether an example that equals an earlier one adds its weight to it.
        """
        digests = np.array(self._digests, dtype=np.uint64).reshape(-1, 2)
        order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: of equal ones the first comes first
        new = np.ones(len(order), dtype=bool)
        new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
        first = np.empty_like(order)
        first[order] = order[new][np.cumsum(new) - 1]
        kept, weights = np.sort(order[new]), self.weights
        again = np.flatnonzero(first != np.arange(len(first)))
        if add_weights:
            np.add.at(weights, first[again], weights[again])
        return kept, weights[kept]

    @property
    def table(self) -> Any:
        """All rows, a `pyarrow.Table`; nothing can be appended after this."""
        if self._table is None:
            import pyarrow as pa  # noqa: PLC0415 - slow to import, and `refilter` needs only the class

            self._close_batch()
            if self._writer is None:
                self._table = pa.Table.from_batches(self._batches)
            else:
                with temporary_storage("the tokens"):
                    self._writer.close()
                    self._file.flush()
                mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
                self._table = pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
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
            with temporary_storage("the tokens"):
                if self._writer is None:
                    self._file = tempfile.TemporaryFile(prefix="bcft-")  # noqa: SIM115 - stays open
                    self._writer = pa.ipc.new_stream(pa.PythonFile(self._file, "w"), self._batches[0].schema)
                for batch in self._batches:
                    self._writer.write_batch(batch)
            self._batches = []


class Examples(Lazy[TrainingExample]):
    """Examples whose tokens are in a table; the text of one is read when it is asked for.

    numbers, weights: the rows of the table that these examples are, and what they weigh: (N,); make: (row, input_ids,
    labels) -> its example, whatever it weighs.
    """

    def __init__(
        self,
        tokens: Tokens,
        numbers: np.ndarray,
        weights: np.ndarray,
        make: Callable[[int, tuple[int, ...], tuple[int, ...]], TrainingExample],
    ) -> None:
        super().__init__(len(numbers), self._example)
        self.tokens = tokens
        self.numbers = numbers
        self.weights = weights
        self._make = make

    def weighing(self, weights: np.ndarray) -> "Examples":
        """Return the same examples with other weights: (N,)."""
        return Examples(self.tokens, self.numbers, weights, self._make)

    def _example(self, index: int) -> TrainingExample:
        number, table, weight = int(self.numbers[index]), self.tokens.table, float(self.weights[index])
        made = self._make(number, *(tuple(table[name][number].as_py()) for name in _COLUMNS))
        return made if made.weight == weight else replace(made, weight=weight)


def tokens_of(examples: Sequence[TrainingExample]) -> tuple[Tokens, np.ndarray]:
    """Return the tokens of examples, and the rows of their table that the examples are: (N,)."""
    if isinstance(examples, Examples):
        return examples.tokens, examples.numbers
    tokens = Tokens()
    for example in examples:
        tokens.append(example)
    return tokens, np.arange(len(tokens))


def weights_of(examples: Sequence[TrainingExample]) -> np.ndarray:
    """Return the weights of examples: (N,)."""
    return examples.weights if isinstance(examples, Examples) else np.array([e.weight for e in examples], dtype=float)


def weighing(examples: Sequence[TrainingExample], weights: np.ndarray) -> Sequence[TrainingExample]:
    """Return the same examples with other weights: (N,)."""
    if isinstance(examples, Examples):
        return examples.weighing(weights)
    return [replace(example, weight=float(weight)) for example, weight in zip(examples, weights, strict=True)]


def supervised_tokens(examples: Sequence[TrainingExample]) -> int:
    """Return how many tokens of all examples carry loss."""
    if isinstance(examples, Examples):
        return int(examples.tokens.supervised[examples.numbers].sum())
    return sum(example.supervised for example in examples)


def longest_example(examples: Examples) -> int:
    """Return the tokens of the longest example."""
    return int(examples.tokens.lengths[examples.numbers].max())
