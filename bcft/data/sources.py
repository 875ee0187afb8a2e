"""Where the rows of a split come from: a file, a directory with a file for each split, a Hub dataset, or Python."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from bcft.config import python
from bcft.data.files import SUFFIXES, Row, read_rows, suffix_of
from bcft.data.formats import DatasetFormat, RowFormat
from bcft.errors import DataError
from bcft.integrations.reasoning_gym import PREFIX, AnswerFormat, Source, checked_source, reward_function
from bcft.policy.hub_errors import hub_reason
from bcft.rewards.base import Reward

_SPLIT = re.compile(r"([\w.-]+)(?:\[(\d*):(\d*)\])?")
SAVED = ("dataset_dict.json", "state.json")
"""Files by which a directory that `Dataset.save_to_disk` wrote is known."""


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
    if not recorded["dataset_name"].startswith(PREFIX):
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


def rows_of(train: Iterable[Any]) -> list[Row]:
    """Return rows that were given in Python, each with its place. Raises what `config.python.rows_of` does."""
    return [(dict(row), f"train_dataset row {number}") for number, row in enumerate(python.rows_of(train) or [])]


class Dataset:
    """The splits of a dataset by name. A Hub dataset is loaded once, when a split is not a local file."""

    def __init__(self, source: DataSource) -> None:
        self.source = source
        self.name, self.path = source.dataset_name, Path(source.dataset_name)
        self.train_split, self.train_slice = parse_split(source.dataset_train_split, key="dataset_train_split")

    def has(self, split: str) -> bool:
        """Return whether there is a split of this name besides the rows to train on."""
        if self.is_file:
            return False
        if self._file(split):
            return True
        return not (self.path.is_dir() and self._file(self.train_split)) and split in self._hub

    @property
    def is_file(self) -> bool:
        """Whether it is one file, which has no splits."""
        return bool(suffix_of(self.path)) and not self.path.is_dir()

    def read(self, split: str) -> list[Row]:
        """Return every row of a split with its place."""
        path = self.path if self.is_file else self._file(split)
        if path is not None:
            if not path.is_file():
                self._refuse_other_files()
            return read_rows(path)
        if split not in self._hub:
            raise DataError(f"dataset_train_split: {self.name} has no split {split!r}; it has {', '.join(self._hub)}")
        return [(dict(row), f"{self.name} {split} row {i}") for i, row in enumerate(self._hub[split])]

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
        self._refuse_other_files()
        return load_hub(self.source)

    def _refuse_other_files(self) -> None:
        """Raise DataError for what is plainly no Hub id: files of other kinds, and several files."""
        parts = self.name.split(",")
        if any(sign in self.name for sign in "*?{") or (len(parts) > 1 and all(suffix_of(Path(p)) for p in parts)):
            raise DataError(f"dataset_name: {self.name}: one file or directory: join several files into one")
        if self.path.is_file():
            known = ", ".join(SUFFIXES)
            raise DataError(f"dataset_name: {self.path} is there, but not a format that can be read: {known}")
        if any((self.path / name).is_file() for name in SAVED):
            raise DataError(
                f"dataset_name: {self.path} was written by save_to_disk: write train.jsonl into a directory with "
                f"to_json, or give it in Python: train_dataset=datasets.load_from_disk(...)"
            )


def load_hub(source: DataSource) -> Any:
    """Return the `DatasetDict` of a Hub id, or of a directory in the same layout."""
    import datasets  # noqa: PLC0415 - seconds to import, and only a Hub id needs it

    name = source.dataset_name
    try:
        return datasets.load_dataset(name, source.dataset_config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        hub = "" if Path(name).exists() else hub_reason(error, name, kind="dataset")
        reason = hub or (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"dataset_name: cannot load {name!r} as a file, a directory or a Hub dataset: {reason}"
        ) from error
