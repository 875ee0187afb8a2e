"""Datasets to demonstrations and held-out problems.

A dataset is a name of this package (`bcft:arithmetic`), a json, jsonl, csv or parquet file, a directory with one such
file for each split, anything that `datasets.load_dataset` takes, or the kept rows of a run (of `collect`, `refilter` or
a round): the held-out problems are then those of that run. `readers` documents the columns of a row.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bcft.config.schema import DataSettings, EvaluationSettings
from bcft.data.readers import READERS, Row, demonstration, read_json_rows
from bcft.environments.base import SHARES, Split, embedded_datasets
from bcft.errors import DataError
from bcft.runs.storage import KEPT, MANIFEST, read_json, read_yaml
from bcft.types import Demonstration, Problem, bucket, messages

SUFFIXES = tuple(READERS)
HARDER_PROBLEMS = 200
EMBEDDED_ROWS = 20_000
"""Length of the `train` split of an embedded dataset; a slice such as `train[:2000]` takes fewer."""
_SPLIT = re.compile(r"([\w.-]+)(?:\[(\d*):(\d*)\])?")


@dataclass(frozen=True)
class DataSource:
    """The keys of a recipe that name the source of its problems."""

    dataset_name: str
    dataset_config: str | None
    dataset_train_split: str
    dataset_test_split: str | None


SOURCE = tuple(field.name for field in fields(DataSource))


@dataclass(frozen=True)
class Splits:
    """The demonstrations to train on, and the held-out problems. Only embedded datasets have `harder` ones."""

    train: tuple[Demonstration, ...]
    dev: tuple[Demonstration, ...]
    test: tuple[Demonstration, ...]
    harder: tuple[Demonstration, ...] = ()
    replay: tuple[Demonstration, ...] = ()
    """Demonstrations of `replay_dataset`, none of a held-out problem."""

    @property
    def held_out(self) -> tuple[Demonstration, ...]:
        """All problems that are not trained on."""
        return (*self.dev, *self.test, *self.harder)

    @property
    def digest(self) -> str:
        """A hash of all data that is trained on or evaluated: a run is resumed with the same data only."""
        digest = hashlib.sha256()
        for d in (*self.train, *self.held_out, *self.replay):
            # A plain pair is its problem and one text. The format is frozen: a run has the hash it was started with.
            pair = len(d.completion) < 2 and d.sampled is None and d.prompt == d.problem.prompt
            text = d.completion[-1]["content"] if d.completion else ""
            conversation = () if pair else (*messages(d.prompt), *d.completion)
            ids = d.sampled.input_ids if d.sampled else ()
            row = (d.problem.id, d.problem.prompt, text, dict(d.problem.columns), conversation, ids)
            digest.update(json.dumps(row, default=str, sort_keys=True).encode())
        return digest.hexdigest()

    def problems_to_attempt(self) -> dict[str, Problem]:
        """Return the problems that a policy may attempt for training, by id. Raises DataError when there are none."""
        problems = {d.problem.id: d.problem for d in self.train}
        if not problems:
            raise DataError("no problems to attempt: the training split is empty once dev and test are taken out")
        return problems

    @property
    def held_out_words(self) -> str:
        """How many problems are held out, in words."""
        return f"{len(self.dev):,} dev and {len(self.test):,} test problems held out"

    def __str__(self) -> str:
        return f"{len(self.train):,} demonstrations to train on, {self.held_out_words}"


def load_splits(data: DataSettings, evaluation: EvaluationSettings) -> Splits:
    """Load the dataset and hold dev and test out of training; load `replay_dataset` without these problems.

    Raises DataError for a dataset that cannot be read, a malformed row, or training prompts in dev or test.
    """
    source = DataSource(**{name: getattr(data, name) for name in SOURCE})
    splits = _load(
        source,
        dev=evaluation.eval_dev_problems,
        test=evaluation.eval_test_problems,
        allow_overlap=data.allow_overlap,
        require_test=data.dataset_test_split is not None,
    )
    if data.replay_dataset is None:
        return splits
    # A configuration belongs to its dataset; the train split, its slice included, is taken from either dataset.
    config = data.dataset_config if data.replay_dataset == data.dataset_name else None
    replayed = replace(source, dataset_name=data.replay_dataset, dataset_config=config)
    return replace(splits, replay=_replay(replayed, splits.held_out))


def _replay(source: DataSource, held_out: Sequence[Demonstration]) -> tuple[Demonstration, ...]:
    """Return the training split of the dataset to replay, without held-out problems and empty completions."""
    try:
        train = _load(source, dev=0, test=0, allow_overlap=True, require_test=False).train
    except DataError as error:
        raise DataError(f"replay_dataset: {str(error).removeprefix('dataset_name: ')}") from error
    excluded = {d.problem.id for d in held_out}
    replay = tuple(
        d
        for d in train
        if d.problem.id not in excluded and (d.sampled or (d.completion and d.completion[-1]["content"]))
    )
    if not replay:
        raise DataError(f"replay_dataset: {source.dataset_name}: no demonstration is left without held-out problems")
    return replay


def _load(source: DataSource, *, dev: int, test: int, allow_overlap: bool, require_test: bool) -> Splits:
    """Return the splits of a dataset, with at most so many dev and test problems.

    require_test: refuse a dataset without the test split, rather than hold out a share of its problems.
    """
    name = source.dataset_name
    train_split, train_slice = _parse_split(source.dataset_train_split, key="dataset_train_split")
    if name.startswith("bcft:"):
        return _embedded(name, train_slice, dev=dev, test=test)
    if (kept := _kept_file(name)) is not None:
        return _kept(source, kept, train_slice, dev=dev, test=test, allow_overlap=allow_overlap)
    demonstrations = [demonstration(row, where) for row, where in _read(source, train_split)[train_slice]]
    test_split, test_slice = _parse_split(source.dataset_test_split or "test", key="dataset_test_split")
    has_test = _has_split(source, test_split, required=require_test)
    parts = _by_hash(demonstrations, test=not has_test)
    if has_test:
        rows = _read(source, test_split)[test_slice]
        parts["test"] = [demonstration(row, where, problem_only=True) for row, where in rows]
    if not allow_overlap:
        _refuse_overlap(parts["train"], (*parts["dev"], *parts["test"]))
    return Splits(tuple(parts["train"]), _first(parts["dev"], dev), _first(parts["test"], test))


def _refuse_overlap(train: Sequence[Demonstration], held_out: Sequence[Demonstration]) -> None:
    """Raise DataError if a training prompt is also held out."""
    by_id = {d.problem.id: d for d in held_out}
    shared = [d for d in train if d.problem.id in by_id]
    if shared:
        first = shared[0].problem
        raise DataError(
            f"{first.where}: {len(shared)} of {len(train)} training prompts are also in dev or test "
            f"(this one is {by_id[first.id].problem.where}): remove them, or set allow_overlap: true"
        )


# Kept rows of a run
def _kept_file(name: str) -> Path | None:
    """Return the file of kept rows that a name means: the file itself, or the one in a directory."""
    path = Path(name)
    file = path / KEPT if path.is_dir() else path
    return file if file.name == KEPT and file.is_file() else None


def _kept(source: DataSource, file: Path, train: slice, *, dev: int, test: int, allow_overlap: bool) -> Splits:
    """Return kept rows, and the problems that their run held out: its config.yaml is beside them or one level above."""
    configs = [folder / "config.yaml" for folder in (file.parent, file.parent.parent)]
    config = next((path for path in configs if path.is_file()), None)
    if config is None:
        raise DataError(f"{file}: no config.yaml beside it says which problems were held out: give its run directory")
    recorded = read_yaml(config)
    made_from = replace(source, **{key: recorded[key] for key in SOURCE if key in recorded})
    if _kept_file(made_from.dataset_name) is not None:
        raise DataError(f"{config}: its dataset, {made_from.dataset_name}, is itself the kept rows of a run")
    required = made_from.dataset_test_split is not None
    splits = _load(made_from, dev=dev, test=test, allow_overlap=allow_overlap, require_test=required)
    manifest = read_json(file.parent / MANIFEST) if (file.parent / MANIFEST).is_file() else {}
    tokenizer = str(manifest.get("tokenizer", ""))
    rows = [demonstration(row, where) for row, where in read_json_rows(file)][train]
    kept = tuple(replace(d, tokenizer=tokenizer) for d in rows)
    if not kept:
        raise DataError(f"{file}: no rows: the run kept none")
    if not allow_overlap:
        _refuse_overlap(kept, splits.held_out)
    return replace(splits, train=kept)


# Embedded datasets
def _embedded(name: str, train: slice, *, dev: int, test: int) -> Splits:
    datasets = embedded_datasets()
    if name not in datasets:
        raise DataError(f"dataset_name: {name!r} is not embedded; there are {', '.join(sorted(datasets))}")
    dataset = datasets[name]

    def demonstrations(rows: Sequence[Mapping[str, Any]], part: str) -> tuple[Demonstration, ...]:
        return tuple(demonstration(row, f"{name} {part} row {i}") for i, row in enumerate(rows))

    def problems(split: Split, n: int) -> tuple[Demonstration, ...]:
        """Return distinct problems: a split may have fewer than n."""
        return tuple({d.problem.id: d for d in demonstrations(dataset.items(split, n), split)}.values())

    start, stop, _ = train.indices(EMBEDDED_ROWS)
    harder = dataset.harder(min(test, HARDER_PROBLEMS)) if dataset.harder else ()
    return Splits(
        demonstrations(dataset.items("train", stop), "train")[start:],
        problems("dev", dev),
        problems("test", test),
        demonstrations(harder, "harder"),
    )


# Splits by hash
def _by_hash(demonstrations: Sequence[Demonstration], *, test: bool) -> dict[Split, list[Demonstration]]:
    """Split by the hash of the prompt, in the shares of `SHARES`; without `test` its share belongs to training.

    The whole share stays out of training, even if fewer are evaluated: a later evaluation may take more.
    """
    parts: dict[Split, list[Demonstration]] = {"train": [], "dev": [], "test": []}
    for d in demonstrations:
        split = next(split for split, (low, high) in SHARES.items() if low <= bucket(d.problem.id) < high)
        parts["train" if split == "test" and not test else split].append(d)
    return parts


def _first(demonstrations: Sequence[Demonstration], n: int) -> tuple[Demonstration, ...]:
    """Return n problems in the order of their hash: a sample that no order of the file can bias."""
    distinct = {d.problem.id: d for d in reversed(demonstrations)}
    return tuple(distinct[key] for key in sorted(distinct)[:n])


# Files and Hub datasets
def _parse_split(text: str, *, key: str) -> tuple[str, slice]:
    match = _SPLIT.fullmatch(text)
    if match is None:
        raise DataError(f"{key}: {text!r} is not understood: give a name, or a name with rows as in train[:2000]")
    name, start, stop = match.groups()
    return name, slice(int(start) if start else None, int(stop) if stop else None)


def _file(name: str, split: str) -> Path | None:
    """Return the file that holds a split: the named file for training, or `<split>.<suffix>` in the named directory."""
    path = Path(name)
    if path.is_dir():
        return next((p for suffix in SUFFIXES if (p := path / f"{split}{suffix}").is_file()), None)
    return path if path.suffix in SUFFIXES else None


def _has_split(source: DataSource, split: str, *, required: bool) -> bool:
    """Return whether a dataset has a split of this name. Raises DataError if it is required and missing."""
    name, path = source.dataset_name, Path(source.dataset_name)
    if path.suffix in SUFFIXES and not path.is_dir():
        if required:
            raise DataError(
                f"dataset_test_split: {path} is one file without splits: give its directory, or remove the key"
            )
        return False
    if _file(name, split):
        return True
    train_split, _ = _parse_split(source.dataset_train_split, key="dataset_train_split")
    present = not (path.is_dir() and _file(name, train_split)) and split in _hub(source)
    if required and not present:
        raise DataError(f"dataset_test_split: {name} has no split {split!r}")
    return present


def _read(source: DataSource, split: str) -> list[Row]:
    """Return every row of a split with its place."""
    path = _file(source.dataset_name, split)
    if path is None:
        splits, name = _hub(source), source.dataset_name
        if split not in splits:
            raise DataError(f"dataset_train_split: {name} has no split {split!r}; it has {', '.join(splits)}")
        return [(dict(row), f"{name} {split} row {i}") for i, row in enumerate(splits[split])]
    if not path.is_file():
        raise DataError(f"dataset_name: {path} does not exist")
    rows = list(READERS[path.suffix](path))
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _hub(source: DataSource) -> Any:
    """Return the `DatasetDict` of a Hub id, or of a directory in the same layout."""
    import datasets  # noqa: PLC0415 - seconds to import, and only a Hub id needs it

    name = source.dataset_name
    try:
        return datasets.load_dataset(name, source.dataset_config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"dataset_name: cannot load {name!r} as a file, a directory or a Hub dataset: {reason}"
        ) from error
