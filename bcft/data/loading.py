"""Datasets to demonstrations and held-out problems.

A dataset is a name of this package (`bcft:arithmetic`), a generator of another (`reasoning-gym:chain_sum`), what
`sources` reads (files, directories, saved datasets, the Hub, a function, a mixture of these), rows given in Python, or
the kept rows of a run (of `collect`, `refilter` or a round): the held-out problems are then those of that run.
`readers` documents the columns of a row. However many rows there are, few are in memory (`stored`).

Test is the split `test`, dev the split `validation`. Where there is none it is taken out of training by the hash of the
problems' text.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from bcft.config.schema import DataSettings, EvaluationSettings
from bcft.data.files import SUFFIXES, Row, read_json_rows
from bcft.data.readers import ARGUMENTS, demonstration
from bcft.data.repeated import differing, repeated_prompts
from bcft.data.sources import HELD_OUT, Dataset, DataSource, parse_split, parts_of, rows_of, shares
from bcft.data.stored import SMALL, Rows, Store, by_hash, first_problems, ids_of
from bcft.data.weights import without_idle_marks
from bcft.environments.base import Split, embedded_datasets
from bcft.errors import DataError, UsageError
from bcft.integrations import reasoning_gym
from bcft.rewards.base import Reward
from bcft.runs.storage import KEPT, MANIFEST, read_json, read_yaml
from bcft.types import Demonstration, Lazy, Problem, messages, show

__all__ = ["HELD_OUT", "SUFFIXES", "Splits", "load_splits"]

HARDER_PROBLEMS = 200
EMBEDDED_ROWS = 20_000
"""Length of the `train` split of an embedded dataset; a slice such as `train[:2000]` takes fewer."""
GIVEN = "train_dataset"
"""How the name of rows that were given in Python begins in a run's config.yaml."""
_OTHER_NAMES = ("dev", "val", "valid", "eval")
"""What people call the split that is `validation` here."""


@dataclass(frozen=True)
class Splits:
    """The demonstrations to train on, and the held-out problems. Only embedded datasets have `harder` ones."""

    train: Sequence[Demonstration]
    dev: tuple[Demonstration, ...]
    test: tuple[Demonstration, ...]
    harder: tuple[Demonstration, ...] = ()
    replay: Sequence[Demonstration] = ()
    """Demonstrations of `replay_dataset`, none of a held-out problem."""
    repeated: Sequence[tuple[Problem, Problem]] = ()
    """The first row of a prompt, and a later one with another value in one of its columns."""
    marked: bool = False
    """Whether marks of messages say which turns are trained."""
    reward: Reward | None = None
    """The reward function that the problems come with; it takes the place of the default one."""
    shares: str = ""
    """How many rows each dataset of a mixture contributes, in words."""

    @property
    def held_out(self) -> tuple[Demonstration, ...]:
        """All problems that are not trained on."""
        return (*self.dev, *self.test, *self.harder)

    @cached_property
    def digest(self) -> str:
        """A hash of all data that is trained on or evaluated: a run is resumed with the same data only."""
        digest = hashlib.sha256()
        for d in chain(self.train, self.held_out, self.replay):
            # A plain pair is its problem and one text. The format is frozen: a run has the hash it was started with.
            completion = without_idle_marks(d.completion, marked=self.marked)
            pair = [*map(len, completion)] in ([], [2]) and d.sampled is None and d.prompt == d.problem.prompt
            text = completion[-1]["content"] if completion else ""
            conversation = [] if pair else [*without_idle_marks(messages(d.prompt)), *completion]
            ids = d.sampled.input_ids if d.sampled else ()
            # A column `question` beside a prompt was no part of the problem when the format was made.
            columns = {key: value for key, value in d.problem.columns.items() if key != "question"}
            prompt = d.problem.prompt if isinstance(d.problem.prompt, str) else without_idle_marks(d.problem.prompt)
            row = (d.problem.id, prompt, text, columns, conversation, ids, *(() if d.weight == 1.0 else (d.weight,)))
            digest.update(json.dumps(row, default=str, sort_keys=True).encode())
        return digest.hexdigest()

    def problems_to_attempt(self) -> dict[str, Problem]:
        """Return the problems that a policy may attempt for training, by id: the first row of each.

        Raises DataError when there are none.
        """
        problems: dict[str, Problem] = {}
        for d in self.train:
            problems.setdefault(d.problem.id, d.problem)
        if not problems:
            raise DataError("no problems to attempt: the training split is empty once dev and test are taken out")
        return problems

    def require_dev(self, asked: int) -> None:
        """Raise an error that says what to change if there are no dev problems; asked: `eval_dev_problems`."""
        if self.dev:
            return
        if not asked:
            raise UsageError("eval_dev_problems: 0: dev problems choose the best round: give a number such as 128")
        problems = len({d.problem.id for d in self.train})
        where = self.train[0].problem.where if self.train else "dataset_name"
        raise DataError(
            f"{where}: {problems} problems are too few to hold some out as dev, which choose the best round: give "
            f"{SMALL} or more, or a split `validation` (validation.jsonl in the dataset's directory)"
        )

    def note_conflicts(self, read: Collection[str] | None) -> str:
        """Return in words how many rows repeat a prompt with another value in a column that nothing reads.

        read: the columns that a reward or an environment reads; None: every one. The template's arguments always count
        as read. Raises DataError with both places where a row repeats a prompt with another value in such a column.
        """
        counts: Counter[str] = Counter()
        for first, again in self.repeated:
            for name in differing(first, again):
                if read is None or name in read or name in ARGUMENTS:
                    mine, other = (show(problem.columns.get(name)) for problem in (again, first))
                    raise DataError(
                        f"{again.where}: the prompt of {first.where} with another {name}: {mine}, there {other}: "
                        f"remove one of the two rows"
                    )
                counts[name] += 1
        if not counts:
            return ""
        first, again = self.repeated[0]
        columns = ", ".join(f"{name} in {n:,}" for name, n in counts.items())
        return (
            f"{len(self.repeated):,} rows repeat a prompt with another value ({columns}), as {again.where} does "
            f"{first.where}: the first row counts, and neither reward nor environment reads the columns"
        )

    @property
    def held_out_words(self) -> str:
        """How many problems are held out, in words."""
        words = f"{len(self.dev):,} dev and {len(self.test):,} test problems held out"
        return f"{words}; {self.shares}" if self.shares else words

    def __str__(self) -> str:
        return f"{len(self.train):,} demonstrations to train on, {self.held_out_words}"


def load_splits(
    data: DataSettings,
    evaluation: EvaluationSettings,
    *,
    train: Iterable[Mapping[str, Any]] | None = None,
    demonstrations: bool = True,
) -> Splits:
    """Load the dataset and hold dev and test out of training; load `replay_dataset` without these problems.

    train: rows in place of `dataset_name`, such as a `datasets.Dataset`; demonstrations: whether the rows are trained
    on, so that each needs a completion: without, a prompt alone is a row.
    Raises DataError for a dataset that cannot be read, a malformed row, or training prompts in dev or test.
    """
    values = {**vars(data), **vars(evaluation)}
    source = DataSource(**{name: values[name] for name in HELD_OUT})
    loaded = _load(
        source,
        dev=evaluation.eval_dev_problems,
        test=evaluation.eval_test_problems,
        allow_overlap=data.allow_overlap,
        demonstrations=demonstrations,
        given=None if train is None else rows_of(train),
    )
    splits = replace(loaded, marked=data.train_on == "marked")
    if data.replay_dataset is None:
        return splits
    # A configuration belongs to its dataset; the train split, its slice included, is taken from either dataset.
    same = data.replay_dataset == data.dataset_name
    replayed = replace(
        source,
        dataset_name=data.replay_dataset,
        dataset_config=data.dataset_config if same else None,
        dataset_args=data.dataset_args if same else {},
        datasets=None,
        eval_dev_problems=0,
        eval_test_problems=0,
    )
    return replace(splits, replay=_replay(replayed, splits.held_out))


def _replay(source: DataSource, held_out: Sequence[Demonstration]) -> Sequence[Demonstration]:
    """Return the training split of the dataset to replay, without held-out problems and empty completions."""
    try:
        train = _load(source, dev=0, test=0, allow_overlap=True, demonstrations=True, require_test=False).train
    except DataError as error:
        raise DataError(f"replay_dataset: {str(error).removeprefix('dataset_name: ')}") from error
    excluded = {d.problem.id for d in held_out}
    places = [place for place, d in enumerate(train) if d.problem.id not in excluded and (d.sampled or d.answered)]
    if not places:
        raise DataError(f"replay_dataset: {source.dataset_name}: no demonstration is left without held-out problems")
    return Lazy(len(places), lambda i: train[places[i]])


def _load(
    source: DataSource,
    *,
    dev: int,
    test: int,
    allow_overlap: bool,
    demonstrations: bool,
    given: Iterable[Row] | None = None,
    require_test: bool = True,
) -> Splits:
    """Return the splits of a dataset, with at most so many dev and test problems.

    given: its rows, from Python; require_test: refuse a dataset without the test split that the recipe names.
    """
    name = source.dataset_name
    dataset = Dataset(source)
    if given is None and name.startswith("bcft:"):
        return _embedded(source, dataset.train_slice, dev=dev, test=test)
    if given is None and (generated := source.generated):
        return _generated(generated, dataset, dev=dev, test=test)
    if given is None and (kept := _kept_file(name)) is not None:
        return _kept(source, kept, dataset.train_slice, dev=dev, test=test, allow_overlap=allow_overlap)
    if given is None and source.datasets:
        train, words = _mixed(source, problem_only=not demonstrations)
    else:
        rows = dataset.read(dataset.train_split) if given is None else given
        train, words = _stored(rows, source, dataset.train_slice, problem_only=not demonstrations).view(), ""
    own = {} if given is not None or source.datasets else _own_splits(dataset, required=require_test)
    parts = by_hash(
        train,
        dev=None if "dev" in own else source.eval_dev_problems,
        test=None if "test" in own else source.eval_test_problems,
    )
    parts.update(own)
    if not allow_overlap:
        _refuse_overlap(parts["train"], parts["dev"], parts["test"])
        if own:
            _refuse_overlap(parts["dev"], parts["test"], of="dev")
    return Splits(
        parts["train"],
        first_problems(parts["dev"], dev),
        first_problems(parts["test"], test),
        repeated=repeated_prompts(train, *own.values()),
        shares=words,
    )


def _read(rows: Iterable[Row], source: DataSource, *, problem_only: bool = True) -> Iterator[Demonstration]:
    """Yield the demonstrations that rows state."""
    form = source.form
    return (demonstration(row, where, form=form, problem_only=problem_only) for row, where in rows)


def _stored(rows: Iterable[Row], source: DataSource, part: slice = slice(None), *, problem_only: bool = True) -> Store:
    """Return the demonstrations of rows, of which only a slice is read."""
    return Store().extend(_read(islice(rows, part.start, part.stop), source, problem_only=problem_only))


def _mixed(source: DataSource, *, problem_only: bool) -> tuple[Rows, str]:
    """Return the rows of a mixture, one dataset after the other, and in words how many each has and contributes."""
    store, starts, parts = Store(), [0], list(parts_of(source))
    for part in parts:
        store.extend(_read(part.rows, source, problem_only=problem_only))
        starts.append(len(store))
    sizes = np.diff(starts).tolist()
    taken = shares(sizes, [part.fraction for part in parts])
    numbers = [np.arange(start, start + n) for start, n in zip(starts, taken, strict=False)]
    words = (f"{n:,} of {size:,} from {part.name}" for part, n, size in zip(parts, taken, sizes, strict=True))
    return store.view(np.concatenate(numbers)), f"rows: {', '.join(words)}"


def _own_splits(dataset: Dataset, *, required: bool) -> dict[Split, Rows]:
    """Return the problems of the splits that a dataset holds out itself.

    Raises DataError if `dataset_test_split` names one that is missing and required.
    """
    key, asked = "dataset_test_split", dataset.source.dataset_test_split
    test_split, test_slice = parse_split(asked or "test", key=key)
    if asked and required and dataset.has_no_splits:
        what = "one file" if dataset.path.is_file() else "rows"
        raise DataError(f"{key}: {dataset.name} is {what} without splits: give a directory, or remove the key")
    own: dict[Split, Rows] = {}
    if dataset.has(test_split):
        own["test"] = _stored(dataset.read(test_split), dataset.source, test_slice).view()
    elif asked and required:
        raise DataError(f"{key}: {dataset.name} has no split {test_split!r}")
    # A recipe may train on `validation`, or call it its test split.
    if "validation" not in (test_split, dataset.train_split) and dataset.has("validation"):
        own["dev"] = _stored(dataset.read("validation"), dataset.source).view()
    for name in _OTHER_NAMES:
        if dataset.path.is_dir() and name not in (test_split, dataset.train_split) and dataset.has(name):
            raise DataError(f"dataset_name: {dataset.name}: its split {name!r} is not read: rename it to validation")
    return own


def _refuse_overlap(train: Sequence[Demonstration], *held_out: Sequence[Demonstration], of: str = "training") -> None:
    """Raise DataError if a training prompt is also held out; of: another name of the prompts that must not be."""
    held = [ids_of(part) for part in held_out]
    shared = np.flatnonzero(np.isin(ids_of(train), np.concatenate(held)))
    if len(shared):
        first = train[int(shared[0])].problem
        there = next(d for part in held_out for d in part if d.problem.id == first.id)
        parts = "dev or test" if of == "training" else "test"
        raise DataError(
            f"{first.where}: {len(shared)} of {len(train)} {of} prompts are also in {parts} "
            f"(this one is {there.problem.where}): remove them, or set allow_overlap: true"
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
    made_from = replace(source, **{key: recorded[key] for key in HELD_OUT if key in recorded})
    if _kept_file(made_from.dataset_name) is not None:
        raise DataError(f"{config}: its dataset, {made_from.dataset_name}, is itself the kept rows of a run")
    if made_from.dataset_name.startswith(f"{GIVEN}@"):
        raise DataError(
            f"{config}: the run was given its rows in Python, so that its held-out problems cannot be read: write the "
            f"rows to a file, and give the run that file as dataset_name"
        )
    splits = _load(made_from, dev=dev, test=test, allow_overlap=allow_overlap, demonstrations=False)
    manifest = read_json(file.parent / MANIFEST) if (file.parent / MANIFEST).is_file() else {}
    tokenizer = str(manifest.get("tokenizer", ""))
    rows = _read(islice(read_json_rows(file), train.start, train.stop), source, problem_only=False)
    kept = Store().extend(replace(d, tokenizer=tokenizer) for d in rows).view()
    if not kept:
        raise DataError(f"{file}: no rows: the run kept none")
    if not allow_overlap:
        _refuse_overlap(kept, splits.held_out)
    held_out = {d.problem.id for d in splits.held_out}
    return replace(splits, train=kept, repeated=tuple(pair for pair in splits.repeated if pair[0].id in held_out))


# Embedded datasets
def _embedded(source: DataSource, train: slice, *, dev: int, test: int) -> Splits:
    datasets, name = embedded_datasets(), source.dataset_name
    if name not in datasets:
        raise DataError(f"dataset_name: {name!r} is not embedded; there are {', '.join(sorted(datasets))}")
    dataset = datasets[name]

    def demonstrations(rows: Sequence[Mapping[str, Any]], part: str) -> tuple[Demonstration, ...]:
        return tuple(demonstration(row, f"{name} {part} row {i}", form=source.form) for i, row in enumerate(rows))

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


# Generated datasets
def _generated(source: reasoning_gym.Source, dataset: Dataset, *, dev: int, test: int) -> Splits:
    if dataset.train_split != "train":
        raise DataError(f"dataset_train_split: {source.name} has the split train, and no {dataset.train_split!r}")
    rows = reasoning_gym.problems(source, test=test, dev=dev, train=dataset.train_slice)
    train, dev_part, test_part = (tuple(_read(rows[name], dataset.source)) for name in ("train", "dev", "test"))
    return Splits(train, dev_part, test_part, reward=reasoning_gym.reward_function(source))
