"""Datasets to demonstrations and held-out problems.

A source is a name of this package (`bcft:arithmetic`), a json, jsonl, csv or parquet file, a directory with one
such file a split, or whatever `datasets.load_dataset` takes. Rows have `prompt` and `completion`, as strings or
messages, or `question` and `answer` as GSM8K ships them. Nothing is guessed: a row of another shape ends the run
with its file and line.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcft.config import Recipe
from bcft.errors import DataError
from bcft.problems import arithmetic
from bcft.types import Demonstration, Message, Problem, Prompt, bucket, problem_id

REFERENCES = ("answer", "solution", "ground_truth")
"""Columns that hold a reference answer, in the order a reward looks for them."""
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
TEST_SHARE, DEV_SHARE = 0.05, 0.05
HARDER_PROBLEMS = 200
EMBEDDED_ROWS = 20_000
"""Length of the `train` split of an embedded dataset; a slice such as `train[:2000]` takes fewer."""

_SPLIT = re.compile(r"([\w.-]+)(?:\[(\d*):(\d*)\])?")


@dataclass(frozen=True)
class Splits:
    """What a recipe's dataset comes apart into. `harder` is filled by embedded datasets only."""

    train: tuple[Demonstration, ...]
    dev: tuple[Demonstration, ...]
    test: tuple[Demonstration, ...]
    harder: tuple[Demonstration, ...] = ()
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
        for d in (*self.train, *self.held_out):
            row = (d.problem.id, d.problem.prompt, d.completion, dict(d.problem.columns))
            digest.update(json.dumps(row, default=str, sort_keys=True).encode())
        return digest.hexdigest()

    def __str__(self) -> str:
        held = f"{len(self.dev):,} dev and {len(self.test):,} test problems held out"
        return f"{len(self.train):,} demonstrations to train on, {held}"

    @property
    def reference(self) -> bool:
        """Whether every held-out problem has a reference answer, so that success can be told."""
        return bool(self.held_out) and all(any(n in d.problem.columns for n in REFERENCES) for d in self.held_out)


def load_splits(recipe: Recipe) -> Splits:
    """Load the recipe's dataset and take dev and test out of training.

    Raises DataError for a source that cannot be read, a malformed row, or training prompts in dev or test.
    """
    name, sizes = recipe["dataset_name"], (recipe["eval_dev_problems"], recipe["eval_test_problems"])
    train_split, train_slice = _parse_split(recipe["dataset_train_split"])
    if name.startswith("bcft:"):
        return _embedded(name, train_slice, *sizes)
    found = [_demonstration(row, where) for row, where in _read(recipe, train_split)[train_slice]]
    test_split, test_slice = _parse_split(recipe["dataset_test_split"])
    own_test = _has_split(recipe, test_split)
    train, dev, test = _by_hash(found, test=not own_test)
    if own_test:
        test = [_demonstration(row, where, problem_only=True) for row, where in _read(recipe, test_split)[test_slice]]
    held_out = {d.problem.id: d for d in (*dev, *test)}
    shared = [d for d in train if d.problem.id in held_out]
    if shared and not recipe["allow_overlap"]:
        first = shared[0].problem
        raise DataError(
            f"{first.where}: {len(shared)} of {len(train)} training prompts are also in dev or test "
            f"(this one is {held_out[first.id].problem.where}): remove them, or set allow_overlap: true"
        )
    return Splits(tuple(train), _first(dev, sizes[0]), _first(test, sizes[1]), shared_prompts=len(shared))


def _embedded(name: str, train: slice, dev: int, test: int) -> Splits:
    demonstrators: dict[str, arithmetic.Demonstrator] = {
        "bcft:arithmetic": "expert",
        "bcft:arithmetic-apprentice": "apprentice",
    }
    if name not in demonstrators:
        raise DataError(f"dataset_name: {name!r} is not embedded; there are {', '.join(sorted(demonstrators))}")

    def take(split: arithmetic.Split, n: int, level: arithmetic.Level = "standard") -> tuple[Demonstration, ...]:
        rows = arithmetic.items(split, n, level=level, demonstrator=demonstrators[name])
        return tuple(_demonstration(dict(row), f"{name} {split} row {i}") for i, row in enumerate(rows))

    start, stop, _ = train.indices(EMBEDDED_ROWS)
    harder = take("test", min(test, HARDER_PROBLEMS), level="harder")
    return Splits(take("train", stop)[start:], take("dev", dev), take("test", test), harder)


def _by_hash(
    found: Iterable[Demonstration], *, test: bool
) -> tuple[list[Demonstration], list[Demonstration], list[Demonstration]]:
    """Split by the hash of the prompt: under 5 % is test, then 5 % dev, the rest training.

    However few problems are evaluated, all of a share stay out of training: a later evaluation may take more.
    """
    train, dev, held = [], [], []
    for demonstration in found:
        share = bucket(demonstration.problem.id)
        if share < TEST_SHARE and test:
            held.append(demonstration)
        elif TEST_SHARE <= share < TEST_SHARE + DEV_SHARE:
            dev.append(demonstration)
        else:
            train.append(demonstration)
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
    readers = {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    rows = list(readers[path.suffix](path))
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


def _read_json(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if raw.lstrip()[:1] == b"[":
        rows = _parse_json(raw, str(path))
        yield from ((_mapping(row, f"{path}: row {i}"), f"{path}: row {i}") for i, row in enumerate(rows))
        return
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield _mapping(_parse_json(line, where), where), where


def _parse_json(raw: bytes, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise DataError(f"{where}: key {key!r} stands twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise DataError(f"{where}: {constant} is no JSON number")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply") from error
    except json.JSONDecodeError as error:
        place = where if error.lineno == 1 else f"{where}:{error.lineno}"
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error


def _mapping(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with columns, found {type(row).__name__}")
    return row


def _read_csv(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: not as many fields as the header has ({len(reader.fieldnames or ())})")
                yield row, where
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as parquet: {error}") from error
    yield from ((row, f"{path}: row {i}") for i, row in enumerate(rows))


# Rows to demonstrations


def _demonstration(row: dict[str, Any], where: str, *, problem_only: bool = False) -> Demonstration:
    """Return a row as a demonstration; with `problem_only` the completion may be missing."""
    if "prompt" in row:
        prompt_key, completion_key = "prompt", "completion"
    elif "question" in row and "answer" in row:
        prompt_key, completion_key = "question", "answer"
    else:
        raise DataError(
            f"{where}: columns {', '.join(sorted(map(str, row))) or 'none'}: "
            f"expected prompt and completion, or question and answer"
        )
    if completion_key not in row and not problem_only:
        raise DataError(f"{where}: no completion: a demonstration is a prompt and a completion")
    prompt = _prompt(row[prompt_key], f"{where}: {prompt_key}")
    completion = _completion(row[completion_key], f"{where}: {completion_key}") if completion_key in row else ""
    columns = {k: v for k, v in row.items() if k not in ("prompt", "question", "completion")}
    for key in REFERENCES:
        if key in columns and columns[key] is None:
            raise DataError(f"{where}: {key}: null: every row needs its reference answer, or none has one")
    return Demonstration(Problem(problem_id(prompt), prompt, columns, where), completion)


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        return _text(value, where, empty=False)
    messages = _messages(value, where)
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: the last message is the assistant's: its words belong into the completion")
    return messages


def _completion(value: Any, where: str) -> str:
    if isinstance(value, str):
        return _text(value, where)
    messages = _messages(value, where)
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"{where}: expected one assistant message, found {roles}")
    return messages[0]["content"]


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected a string or a list of messages, found {_shown(value)}")
    messages: list[Message] = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{where}: message {i}: expected role and content, found {_shown(message)}")
        if message["role"] not in ("system", "user", "assistant"):
            raise DataError(f"{where}: message {i}: role {message['role']!r} is not system, user or assistant")
        if not isinstance(message["content"], str):
            raise DataError(f"{where}: message {i}: content must be text, found {_shown(message['content'])}")
        messages.append({"role": message["role"], "content": _text(message["content"], f"{where}: message {i}")})
    return messages


def _text(value: str, where: str, *, empty: bool = True) -> str:
    if not empty and not value.strip():
        raise DataError(f"{where}: empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a surrogate pair at character {error.start}: not valid text") from error
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
