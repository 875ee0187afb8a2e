"""Where the rows of a split come from: files, directories, saved datasets, the Hub, a function, or Python.

Rows are yielded as they are read. A mixture is several such datasets.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from glob import glob
from itertools import chain, islice
from pathlib import Path
from typing import Any

from bcft.config import python
from bcft.config.effects import is_function
from bcft.data.files import SUFFIXES, Row, is_saved, read_rows, read_saved, saved_splits, suffix_of
from bcft.data.formats import DatasetFormat, RowFormat
from bcft.errors import DataError
from bcft.integrations.reasoning_gym import PREFIX, AnswerFormat, Source, checked_source, reward_function
from bcft.policy.hub_errors import hub_reason
from bcft.rewards.base import Reward, import_function, users_code
from bcft.runs.storage import KEPT
from bcft.types import show

_SPLIT = re.compile(r"([\w.-]+)(?:\[(\d*):(\d*)\])?")
BUILDERS = ("json", "csv", "parquet")
"""Paths of a mixture's dataset that only say in which format its `data_files` are."""


@dataclass(frozen=True)
class DataSource:
    """The keys of a recipe that say which problems there are, and which of them are held out."""

    dataset_name: str
    dataset_config: str | None
    dataset_train_split: str
    dataset_test_split: str | None
    eval_dev_problems: int
    eval_test_problems: int
    dataset_args: Mapping[str, Any] = field(default_factory=dict)
    answer_format: AnswerFormat = "text"
    prompt_suffix: str | None = None
    datasets: Sequence[Mapping[str, Any]] | None = None
    dataset_format: DatasetFormat = "trl"
    prompt_column: str | None = None
    completion_column: str | None = None
    answer_column: str | None = None
    system_prompt: str | None = None

    @property
    def form(self) -> RowFormat:
        """What the columns of its rows mean."""
        return RowFormat(**{key.name: getattr(self, key.name) for key in fields(RowFormat)})

    @property
    def generated(self) -> Source | None:
        """The checked generator of a reasoning-gym dataset; None for another. Raises as `checked_source` does."""
        if not self.dataset_name.startswith(PREFIX):
            return None
        form, suffix = self.answer_format, self.prompt_suffix
        return checked_source(self.dataset_name, self.dataset_args, answer_format=form, prompt_suffix=suffix)


HELD_OUT = tuple(key.name for key in fields(DataSource))


def own_reward(recorded: Mapping[str, Any]) -> Reward | None:
    """Return the reward function that the problems of a run come with, from its config.yaml; None if there is none."""
    if not recorded.get("dataset_name", "").startswith(PREFIX):
        return None
    source = DataSource(**{name: recorded[name] for name in HELD_OUT if name in recorded}).generated
    return reward_function(source) if source else None


def parse_split(text: str, *, key: str) -> tuple[str, slice]:
    """Return the name of a split and its slice: `train[:2000]` is ("train", slice(None, 2000))."""
    match = _SPLIT.fullmatch(text)
    if match is None:
        raise DataError(f"{key}: {text!r} is not understood: give a name, or a name with rows as in train[:2000]")
    name, start, stop = match.groups()
    return name, slice(int(start) if start else None, int(stop) if stop else None)


def rows_of(train: Iterable[Any]) -> Iterator[Row]:
    """Yield rows that were given in Python, each with its place. Raises what `config.python.rows_of` does."""
    return ((dict(row), f"train_dataset row {number}") for number, row in enumerate(python.rows_of(train) or []))


class Dataset:
    """The splits of a dataset by name. A Hub dataset is loaded once, when a split is not on this machine.

    data_dir, data_files: of a part of a mixture, as `datasets.load_dataset` takes them.
    """

    def __init__(self, source: DataSource, *, data_dir: str | None = None, data_files: Any = None) -> None:
        self.source = source
        self.name, self.path = source.dataset_name, Path(source.dataset_name)
        self.train_split, self.train_slice = parse_split(source.dataset_train_split, key="dataset_train_split")
        self.function = is_function(self.name) and not self.path.exists()
        self._loaded_by = {"data_dir": data_dir, "data_files": data_files}
        self._files = self._named_files(data_dir, data_files)

    def has(self, split: str) -> bool:
        """Return whether there is a split of this name besides the rows to train on."""
        if self.has_no_splits:
            return False
        if self._file(split):
            return True
        if self._saved is not None:
            return split in self._saved
        return not (self.path.is_dir() and self._file(self.train_split)) and split in self._hub

    @property
    def has_no_splits(self) -> bool:
        """Whether it is rows alone: files, a function, or one saved `datasets.Dataset`."""
        return self._files is not None or self.function or self._is_saved

    def read(self, split: str) -> Iterator[Row]:
        """Yield every row of a split with its place."""
        if self.function:
            return _function_rows(self.name, self.source.dataset_args)
        files = self._files if self._files is not None else list(filter(None, [self._file(split)]))
        if files:
            return chain.from_iterable(map(read_rows, files))
        if self._is_saved:
            return read_saved(self.path)
        splits = self._hub if self._saved is None else self._saved
        if split not in splits:
            names = ", ".join(splits) or "none"
            raise DataError(f"dataset_train_split: {self.name} has no split {split!r}; it has {names}")
        if self._saved is not None:
            return read_saved(self.path / split)
        return ((dict(row), f"{self.name} {split} row {i}") for i, row in enumerate(self._hub[split]))

    def _named_files(self, data_dir: str | None, data_files: Any) -> list[Path] | None:
        """Return the files that the name or `data_files` means; None where it means something else."""
        if self.name in BUILDERS and data_files and not self.path.exists():
            given = data_files.get(self.train_split, []) if isinstance(data_files, Mapping) else data_files
            patterns = [given] if isinstance(given, str) else [*given]
            return files_of([str(Path(data_dir or "", pattern)) for pattern in patterns])
        if self.path.is_dir() or self.function:
            return None
        several = any(sign in self.name for sign in ",*?[{")
        return files_of(_patterns(self.name)) if self.path.is_file() or several or suffix_of(self.path) else None

    @cached_property
    def _is_saved(self) -> bool:
        """Whether it is one saved `datasets.Dataset`; files of splits in its directory come first."""
        return is_saved(self.path) and not self._file(self.train_split)

    @cached_property
    def _saved(self) -> tuple[str, ...] | None:
        """The splits of a saved `datasets.DatasetDict`; None of anything else."""
        return saved_splits(self.path)

    def _file(self, split: str) -> Path | None:
        """Return the file `<split>.<suffix>` of the directory. Raises DataError where there are several."""
        if not self.path.is_dir():
            return None
        files = [
            path
            for path in sorted(self.path.iterdir())
            if path.name.startswith(split) and path.name[len(split) :].lower() in SUFFIXES and path.is_file()
        ]
        if len(files) > 1:
            names = " and ".join(path.name for path in files)
            raise DataError(f"dataset_name: {self.path} has {names}: one file for each split: remove or join them")
        return files[0] if files else None

    @cached_property
    def _hub(self) -> Any:
        return load_hub(self.source, **{key: value for key, value in self._loaded_by.items() if value})


# Several files
def _patterns(text: str) -> list[str]:
    """Return the parts between commas, but for those within braces; a name that exists is one part."""
    if Path(text).exists():
        return [text]
    return [part.strip() for part in re.split(r",(?![^{}]*\})", text) if part.strip()]


def files_of(patterns: Sequence[str]) -> list[Path]:
    """Return the files of names and patterns, in this order, those of one pattern in the order of their names.

    A pattern has `*`, `?`, `[ab]`, `**` for any directories, or `{a,b}`. Raises DataError for one without a file, for a
    file that is no data file, and for one that is meant twice.
    """
    files: list[Path] = []
    for pattern in patterns:
        for single in [pattern] if Path(pattern).exists() else _alternatives(pattern):
            names = [single] if Path(single).exists() else sorted(glob(single, recursive=True))
            found = [Path(name) for name in names if not Path(name).is_dir() or name == single]
            if not found:
                raise DataError(f"dataset_name: {single} does not exist")
            files += found
    seen: set[Path] = set()
    for path in files:
        if path.is_dir():
            raise DataError(f"dataset_name: {path} is a directory: name the files in it, such as {path}/*.jsonl")
        if not suffix_of(path):
            known = ", ".join(SUFFIXES)
            raise DataError(f"dataset_name: {path} is there, but not a format that can be read: {known}")
        if (place := path.resolve()) in seen:
            raise DataError(f"dataset_name: {path} is meant twice: name each file once")
        seen.add(place)
        if path.name == KEPT and len(files) > 1:
            raise DataError(f"dataset_name: {path} has the kept rows of a run: give it alone")
    return files


def _alternatives(pattern: str) -> list[str]:
    """Return the patterns that `{a,b}` stands for."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [whole for word in match[1].split(",") for whole in _alternatives(f"{before}{word.strip()}{after}")]


# A function
def _function_rows(name: str, arguments: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows that a function `module:function` returns. Raises DataError, also for what it raises."""
    function = import_function(name.replace(":", "."), key="dataset_name")
    with users_code(f"dataset_name: {name} called with {dict(arguments)} raised", DataError):
        given = function(**arguments)
    if isinstance(given, Mapping | str) or not isinstance(given, Iterable):
        raise DataError(
            f"dataset_name: {name} returned {show(given)}: return the rows of one split: a list or a generator of "
            f"dicts, or a datasets.Dataset"
        )
    rows, number, end = iter(given), 0, object()
    while True:
        with users_code(f"dataset_name: {name} raised at row {number}", DataError):
            row = next(rows, end)
        if row is end:
            break
        if not isinstance(row, Mapping):
            raise DataError(f"{name} row {number}: expected a mapping from columns to values, not {show(row)}")
        yield dict(row), f"{name} row {number}"
        number += 1
    if not number:
        raise DataError(f"{name}: no rows")


# A mixture
@dataclass(frozen=True)
class Part:
    """One dataset of a mixture."""

    name: str
    rows: Iterator[Row]
    fraction: float | None


def parts_of(source: DataSource) -> Iterator[Part]:
    """Yield the datasets of a mixture, whose keys are those of TRL's `DatasetConfig`."""
    for number, entry in enumerate(source.datasets or ()):
        try:
            yield _part(source, entry)
        except DataError as error:
            reason = re.sub("^dataset_(name|train_split): ", "", str(error))
            raise DataError(f"datasets: number {number + 1}: {reason}") from error


def _part(source: DataSource, entry: Mapping[str, Any]) -> Part:
    name = str(entry["path"])
    if name.startswith(("bcft:", PREFIX)) or (Path(name) / KEPT).is_file() or Path(name).name == KEPT:
        raise DataError(f"{name} has held-out problems of its own: give it alone, as dataset_name")
    split, config = entry.get("split") or "train", entry.get("name")
    made = replace(source, datasets=None, dataset_name=name, dataset_config=config, dataset_train_split=split)
    dataset = Dataset(made, data_dir=entry.get("data_dir"), data_files=entry.get("data_files"))
    rows = islice(dataset.read(dataset.train_split), dataset.train_slice.start, dataset.train_slice.stop)
    columns = entry.get("columns")
    return Part(name, rows if columns is None else _selected(rows, columns), entry.get("fraction"))


def _selected(rows: Iterable[Row], columns: Sequence[str]) -> Iterator[Row]:
    for row, where in rows:
        if missing := [name for name in columns if name not in row]:
            raise DataError(f"{where}: no column {missing[0]!r}, which datasets selects; it has {', '.join(row)}")
        yield {name: row[name] for name in columns}, where


def shares(sizes: Sequence[int], fractions: Sequence[float | None]) -> list[int]:
    """Return how many rows of each dataset a mixture takes: its first, as `trl.get_dataset` does.

    The fractions are scaled to sum to one; the mixture is the largest for which no dataset has too few rows. Without
    fractions all rows are taken.
    """
    given = [fraction for fraction in fractions if fraction is not None]
    if not given:
        return [*sizes]
    weights = [fraction / sum(given) for fraction in given]
    total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [round(weight * total) for weight in weights]


# The Hub
def load_hub(source: DataSource, **loaded_by: Any) -> Any:
    """Return the `DatasetDict` of a Hub id, or of a directory in the same layout.

    loaded_by: `data_dir` and `data_files` of `datasets.load_dataset`.
    """
    import datasets  # noqa: PLC0415 - seconds to import, and only a Hub id needs it

    name = source.dataset_name
    try:
        return datasets.load_dataset(name, source.dataset_config, **loaded_by)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        hub = "" if Path(name).exists() else hub_reason(error, name, kind="dataset")
        reason = hub or (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"dataset_name: cannot load {name!r} as a file, a directory or a Hub dataset: {reason}"
        ) from error
