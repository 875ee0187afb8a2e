"""Datasets to demonstrations and held-out problems.

A source is a name of this package (`bcft:arithmetic`), a json, jsonl, csv or parquet file, a directory with one
such file a split, whatever `datasets.load_dataset` takes, or what `collect`, `refilter` or a round kept: then the
held-out problems are those of the run that kept it. Rows have `prompt` and `completion`, as strings or messages,
`messages`, or `question` and `answer` as GSM8K ships them. Nothing is guessed: a row of another shape ends the run
with its file and line.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bcft.config.loader import Recipe
from bcft.data.readers import READERS, demonstration, read_json_rows
from bcft.environments import arithmetic, grid_walk, guess_number, twenty_questions
from bcft.environments.base import Split
from bcft.errors import DataError
from bcft.runs.storage import MANIFEST, read_json
from bcft.types import Demonstration, bucket

SUFFIXES = tuple(READERS)
TEST_SHARE, DEV_SHARE = 0.05, 0.05
HARDER_PROBLEMS = 200
EMBEDDED_ROWS = 20_000
"""Length of the `train` split of an embedded dataset; a slice such as `train[:2000]` takes fewer."""
EMBEDDED: dict[str, Callable[..., Sequence[Mapping[str, Any]]]] = {
    "bcft:arithmetic": partial(arithmetic.items, demonstrator="expert"),
    "bcft:arithmetic-apprentice": partial(arithmetic.items, demonstrator="apprentice"),
    "bcft:grid-walk": grid_walk.items,
    "bcft:guess-number": guess_number.items,
    "bcft:twenty-questions": twenty_questions.items,
}
KEPT = "kept.jsonl"
SOURCE = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")
"""Keys that say where a run's problems came from."""
_SPLIT = re.compile(r"([\w.-]+)(?:\[(\d*):(\d*)\])?")


@dataclass(frozen=True)
class Splits:
    """What a recipe's dataset comes apart into. `harder` is filled by embedded datasets only."""

    train: tuple[Demonstration, ...]
    dev: tuple[Demonstration, ...]
    test: tuple[Demonstration, ...]
    harder: tuple[Demonstration, ...] = ()
    replay: tuple[Demonstration, ...] = ()
    """Demonstrations of `replay_dataset`, none of them of a held-out problem."""
    shared_prompts: int = 0
    """Training prompts that are also in dev or test: more than 0 only with `allow_overlap`."""

    @property
    def held_out(self) -> tuple[Demonstration, ...]:
        """Everything that is not trained on."""
        return (*self.dev, *self.test, *self.harder)

    @property
    def digest(self) -> str:
        """A hash of all that is trained on and measured on: a run goes on with the same data only."""
        digest = hashlib.sha256()
        for d in (*self.train, *self.held_out, *self.replay):
            ids = d.sampled.input_ids if d.sampled else ()
            row = (d.problem.id, d.problem.prompt, d.completion, dict(d.problem.columns), d.conversation, ids)
            digest.update(json.dumps(row, default=str, sort_keys=True).encode())
        return digest.hexdigest()

    def __str__(self) -> str:
        held = f"{len(self.dev):,} dev and {len(self.test):,} test problems held out"
        return f"{len(self.train):,} demonstrations to train on, {held}"


def load_splits(recipe: Recipe) -> Splits:
    """Load the recipe's dataset and take dev and test out of training, and its `replay_dataset` without these.

    Raises DataError for a source that cannot be read, a malformed row, or training prompts in dev or test.
    """
    splits = _load(recipe)
    if recipe["replay_dataset"] is None:
        return splits
    there = {**recipe.values, "dataset_name": recipe["replay_dataset"], "allow_overlap": True}
    try:
        found = _load(replace(recipe, values=there, given=recipe.given - {"dataset_test_split"})).train
    except DataError as error:
        raise DataError(f"replay_dataset: {str(error).removeprefix('dataset_name: ')}") from error
    held_out = {d.problem.id for d in splits.held_out}
    replay = tuple(d for d in found if d.problem.id not in held_out and (d.completion or d.sampled))
    if not replay:
        name = recipe["replay_dataset"]
        raise DataError(f"replay_dataset: {name}: no demonstration that is not of a held-out problem")
    return replace(splits, replay=replay)


def _load(recipe: Recipe) -> Splits:
    name, sizes = recipe["dataset_name"], (recipe["eval_dev_problems"], recipe["eval_test_problems"])
    train_split, train_slice = _parse_split(recipe["dataset_train_split"])
    if name.startswith("bcft:"):
        return _embedded(name, train_slice, *sizes)
    if (kept := _kept_file(name)) is not None:
        return _kept(recipe, kept, train_slice)
    found = [demonstration(row, where) for row, where in _read(recipe, train_split)[train_slice]]
    test_split, test_slice = _parse_split(recipe["dataset_test_split"])
    own_test = _has_split(recipe, test_split)
    train, dev, test = _by_hash(found, test=not own_test)
    if own_test:
        test = [demonstration(row, where, problem_only=True) for row, where in _read(recipe, test_split)[test_slice]]
    shared = _shared(recipe, train, (*dev, *test))
    return Splits(tuple(train), _first(dev, sizes[0]), _first(test, sizes[1]), shared_prompts=shared)


def _shared(recipe: Recipe, train: Sequence[Demonstration], held: Sequence[Demonstration]) -> int:
    """Return how many training prompts are held-out ones too. Raises DataError where there may be none."""
    held_out = {d.problem.id: d for d in held}
    shared = [d for d in train if d.problem.id in held_out]
    if shared and not recipe["allow_overlap"]:
        first = shared[0].problem
        raise DataError(
            f"{first.where}: {len(shared)} of {len(train)} training prompts are also in dev or test "
            f"(this one is {held_out[first.id].problem.where}): remove them, or set allow_overlap: true"
        )
    return len(shared)


def _kept_file(name: str) -> Path | None:
    """Return the rows that a run kept, where the name is that file or the directory with it."""
    path = Path(name)
    file = path / KEPT if path.is_dir() else path
    return file if file.name == KEPT and file.is_file() else None


def _kept(recipe: Recipe, file: Path, train: slice) -> Splits:
    """Return rows that a run kept, and what that run held out: its recipe is beside them, or above its rounds."""
    configs = [folder / "config.yaml" for folder in (file.parent, file.parent.parent)]
    config = next((path for path in configs if path.is_file()), None)
    if config is None:
        raise DataError(f"{file}: no config.yaml beside it says what was held out: give the run it was made by")
    run = yaml.safe_load(config.read_text(encoding="utf-8"))
    values = {**recipe.values, **{key: run[key] for key in SOURCE if key in run}}
    if _kept_file(values["dataset_name"]) is not None:
        raise DataError(f"{config}: made from {values['dataset_name']}, which is itself what a run kept")
    source = _load(replace(recipe, values=values))
    made = read_json(file.parent / MANIFEST) if (file.parent / MANIFEST).is_file() else {}
    rows = [demonstration(row, where) for row, where in read_json_rows(file)][train]
    found = tuple(replace(d, tokenizer=str(made.get("tokenizer", ""))) for d in rows)
    if not found:
        raise DataError(f"{file}: no rows: nothing was kept")
    return replace(source, train=found, shared_prompts=_shared(recipe, found, source.held_out))


def _embedded(name: str, train: slice, dev: int, test: int) -> Splits:
    if name not in EMBEDDED:
        raise DataError(f"dataset_name: {name!r} is not embedded; there are {', '.join(sorted(EMBEDDED))}")

    def take(split: Split, n: int, **level: Any) -> tuple[Demonstration, ...]:
        rows = EMBEDDED[name](split, n, **level)
        return tuple(demonstration(dict(row), f"{name} {split} row {i}") for i, row in enumerate(rows))

    def hold(split: Split, n: int) -> tuple[Demonstration, ...]:
        """Take distinct problems: a split may have fewer than are asked for."""
        return tuple({d.problem.id: d for d in take(split, n)}.values())

    start, stop, _ = train.indices(EMBEDDED_ROWS)
    worked = name.startswith("bcft:arithmetic")
    harder = take("test", min(test, HARDER_PROBLEMS), level="harder") if worked else ()
    return Splits(take("train", stop)[start:], hold("dev", dev), hold("test", test), harder)


def _by_hash(
    found: Iterable[Demonstration], *, test: bool
) -> tuple[list[Demonstration], list[Demonstration], list[Demonstration]]:
    """Split by the hash of the prompt: under 5 % is test, then 5 % dev, the rest training.

    However few problems are evaluated, all of a share stay out of training: a later evaluation may take more.
    """
    train, dev, held = [], [], []
    for one in found:
        share = bucket(one.problem.id)
        if share < TEST_SHARE and test:
            held.append(one)
        elif TEST_SHARE <= share < TEST_SHARE + DEV_SHARE:
            dev.append(one)
        else:
            train.append(one)
    return train, dev, held


def _first(found: Sequence[Demonstration], n: int) -> tuple[Demonstration, ...]:
    """Return n problems in the order of their hash: a sample that no order of the file can bias."""
    distinct = {d.problem.id: d for d in reversed(found)}
    return tuple(distinct[key] for key in sorted(distinct)[:n])


# Reading
def _parse_split(text: str) -> tuple[str, slice]:
    match = _SPLIT.fullmatch(text)
    if match is None:
        raise DataError(f"split {text!r} is not understood: give a name, or a name with rows as in train[:2000]")
    name, start, stop = match.groups()
    return name, slice(int(start) if start else None, int(stop) if stop else None)


def _file(name: str, split: str) -> Path | None:
    """Return the file that holds a split: the named file for training, or `<split>.<suffix>` in the named directory."""
    path = Path(name)
    if path.is_dir():
        return next((p for suffix in SUFFIXES if (p := path / f"{split}{suffix}").is_file()), None)
    return path if path.suffix in SUFFIXES else None


def _has_split(recipe: Recipe, split: str) -> bool:
    path = Path(recipe["dataset_name"])
    if path.suffix in SUFFIXES and not path.is_dir():
        # A single file is its own training split, unless the test split is named as another file.
        if "dataset_test_split" in recipe.given:
            raise DataError(
                f"dataset_test_split: {path} is one file without splits: give its directory, or remove the key"
            )
        return False
    if _file(recipe["dataset_name"], split):
        return True
    if path.is_dir() and _file(recipe["dataset_name"], _parse_split(recipe["dataset_train_split"])[0]):
        present = False
    else:
        present = split in _hub(recipe)
    if not present and "dataset_test_split" in recipe.given:
        raise DataError(f"dataset_test_split: {recipe['dataset_name']} has no split {split!r}")
    return present


def _read(recipe: Recipe, split: str) -> list[tuple[dict[str, Any], str]]:
    """Return every row of a split with the place it stands at."""
    path = _file(recipe["dataset_name"], split)
    if path is None:
        splits = _hub(recipe)
        if split not in splits:
            raise DataError(f"{recipe['dataset_name']} has no split {split!r}; it has {', '.join(splits)}")
        name = recipe["dataset_name"]
        return [(dict(row), f"{name} {split} row {i}") for i, row in enumerate(splits[split])]
    if not path.is_file():
        raise DataError(f"dataset_name: {path} does not exist")
    rows = list(READERS[path.suffix](path))
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _hub(recipe: Recipe) -> Any:
    """Return the `DatasetDict` of a Hub id, or of a directory laid out like one."""
    import datasets

    name = recipe["dataset_name"]
    try:
        return datasets.load_dataset(name, recipe["dataset_config"])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"dataset_name: cannot load {name!r} as a file, a directory or a Hub dataset: {reason}"
        ) from error
