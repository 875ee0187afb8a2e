"""Items of reasoning-gym's generators, made and graded in this process or in the sandbox.

Most scorers compare texts. Those of `EVALUATING` evaluate the answer, and run in the sandbox. So do the generators of
`UNSEEDED`, whose items are the same in every process only there: its hash seed is fixed.
"""

import ast
import atexit
import copy
import dataclasses
import importlib
import json
import math
import os
import random
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypedDict

import numpy as np

from bcft.rewards.sandbox import FAILURES, Job, Sandbox

SIZE = 8_000
"""What a dataset is made with. `acre` alone takes time for it (a second for 2,000), and most make later items too."""
EVALUATING = frozenset(
    {
        *("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"),  # eval
        *("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"),
        "coin_flip",  # Fraction("1e999999999")
    }
)
"""Generators whose scorers evaluate the text of an answer, the second row with sympy."""
UNSEEDED = frozenset(
    {
        *("intermediate_integration", "isomorphic_strings", "knight_swap", "polynomial_multiplication"),
        *("ransom_note", "word_ladder"),
        *("codeio", "list_functions", "pool_matrix"),
    }
)
"""Generators whose items depend on Python's hash seed, or (the last row) on a global generator, or seed that."""
BLOCK = 16
"""Most items that one worker of the sandbox makes."""
SCORING_SECONDS, MAKING_SECONDS = 5.0, 120.0
_MEMORY = 4 << 30


class Item(TypedDict):
    """What a prompt is made of; the answer is null where a generator publishes none."""

    question: str
    answer: str | None


class Items:
    """The items of one generator with its arguments; those that were made are kept."""

    def __init__(self, generator: str, arguments: str) -> None:
        self.generator, self.arguments = generator, arguments
        parts = json.loads(arguments)["datasets"] if generator == "composite" else [{"name": generator}]
        names = {part["name"] for part in parts}
        self.made_outside = bool(names & UNSEEDED)
        self.graded_outside = bool(names & (UNSEEDED | EVALUATING))
        self.made: dict[int, Item | str] = {}
        self.entries: dict[int, Any] = {}

    @property
    def dataset(self) -> Any:
        """The package's own object, made when it is first asked for."""
        return _dataset(self.generator, self.arguments)

    def between(self, start: int, stop: int, *, wanted: int) -> Iterator[tuple[int, Item | str]]:
        """Yield indices and items, or why one cannot be made, until the generator has no more.

        wanted: how many will do if all are different; workers of the sandbox make several at a time.
        """
        step = min(wanted, BLOCK * (os.cpu_count() or 1)) if self.made_outside else 1
        for first in range(start, stop, step):
            indices = range(first, min(stop, first + step))
            self.make(indices)
            for index in indices:
                if index not in self.made:
                    return
                yield index, self.made[index]

    def make(self, indices: Iterable[int]) -> None:
        """Make items, in the sandbox if need be; leave out those that the generator does not have."""
        missing = [index for index in dict.fromkeys(indices) if index not in self.made]
        if not self.made_outside:
            made = {index: _item(self.entry(index)) for index in missing}
        else:
            size = min(BLOCK, math.ceil(len(missing) / (os.cpu_count() or 1))) or 1
            blocks = [missing[start : start + size] for start in range(0, len(missing), size)]
            requests = [(self.generator, self.arguments, json.dumps(block)) for block in blocks]
            made = {}
            for block, text in zip(blocks, self._maker.call(requests), strict=True):
                items = [text] * len(block) if text in FAILURES else json.loads(text)
                made |= dict(zip(block, items, strict=True))
        self.made |= {index: item for index, item in made.items() if item is not None}

    def entry(self, index: int) -> Any:
        """Return the package's own entry: None if there is no such index, a text that says why it cannot be made."""
        if index not in self.entries:
            self.entries[index] = _entry(self.dataset, index)
        return self.entries[index]

    def scores(self, answers: Sequence[tuple[int, str]], *, trusted: bool = False) -> list[float]:
        """Return the generator's score for each (index, answer), from 0 to 1; trusted: no policy wrote them."""
        distinct = list(dict.fromkeys(answers))
        if not (self.made_outside if trusted else self.graded_outside):
            scores = [_score(self.dataset, self.entry(index), answer) for index, answer in distinct]
        else:
            requests = [(self.generator, self.arguments, str(index), answer) for index, answer in distinct]
            scores = [_number(text) for text in self._grader.call(requests)]
        known = dict(zip(distinct, scores, strict=True))
        return [known[answer] for answer in answers]

    def answer(self, index: int) -> str | None:
        """Return the oracle answer; None if there is none."""
        self.make([index])
        item = self.made.get(index)
        return item["answer"] if isinstance(item, dict) else None

    @property
    def _maker(self) -> Sandbox:
        return _sandbox("made", (self.generator, self.arguments, "[0]"), MAKING_SECONDS)

    @property
    def _grader(self) -> Sandbox:
        return _sandbox("graded", (self.generator, self.arguments, "0", "1"), SCORING_SECONDS)


@cache
def items_of(generator: str, arguments: str) -> Items:
    """Return the items of a generator with its arguments, as JSON."""
    return Items(generator, arguments)


def _sandbox(function: str, warm_up: tuple[str, ...], seconds: float) -> Sandbox:
    """Return a sandbox that the process keeps: its server has made the generator."""
    job = Job(f"{__name__}.{function}", (warm_up,), "reasoning_gym")
    if (job, seconds) not in _SANDBOXES:
        _SANDBOXES[job, seconds] = Sandbox(job, seconds=seconds, memory=_MEMORY)
    return _SANDBOXES[job, seconds]


_SANDBOXES: dict[tuple[Job, float], Sandbox] = {}


@atexit.register
def close() -> None:
    """End the servers of all sandboxes; the next answer starts another."""
    for sandbox in _SANDBOXES.values():
        sandbox.close()


@cache
def _dataset(generator: str, arguments: str) -> Any:
    """Return the package's dataset. Raises what its checks raise."""
    package = importlib.import_module("reasoning_gym")
    given: dict[str, Any] = {"size": SIZE} | json.loads(arguments)
    if generator == "composite":
        spec = package.composite.DatasetSpec
        given["datasets"] = [
            spec(part["name"], part.get("weight", 1.0), _typed(part["name"], part.get("config") or {}))
            for part in given["datasets"]
        ]
    return package.create_dataset(generator, **_typed(generator, given))


def _typed(generator: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments in which a list is a tuple where the configuration's default is one: recipes have lists."""
    fields = dataclasses.fields(importlib.import_module("reasoning_gym").factory.DATASETS[generator][1])
    tuples = {field.name for field in fields if isinstance(field.default, tuple)}
    return {key: tuple(value) if key in tuples else value for key, value in arguments.items()}


def _entry(dataset: Any, index: int) -> Any:
    """Return an entry: None if there is no such index, a text that says why the generator fails at it."""
    try:
        return dataset[index]
    except IndexError:
        return None
    except Exception as error:
        return reason(error)


def _item(entry: Any) -> Item | str | None:
    """Return what a prompt is made of; of another value of `_entry` the value itself."""
    if entry is None or isinstance(entry, str):
        return entry
    return Item(question=str(entry["question"]), answer=None if entry["answer"] is None else str(entry["answer"]))


def _score(dataset: Any, entry: Any, answer: str) -> float:
    """Return the generator's score of an answer; 0.0 where its scorer raises, which wrong answers cause."""
    try:
        score = float(dataset.score_answer(answer=answer, entry=copy.deepcopy(entry)))
    except Exception:
        return 0.0
    return min(1.0, max(0.0, score)) if math.isfinite(score) else 0.0


def _number(text: str) -> float:
    """Return a score from the sandbox; 0.0 for an answer that took too long or too much memory."""
    try:
        return float(text)
    except ValueError:
        return 0.0


# In a worker of the sandbox


def made(generator: str, arguments: str, indices: str) -> str:
    """Return items as JSON, as `_item` does."""
    dataset = _dataset(generator, arguments)
    items = []
    for index in json.loads(indices):
        _seed(arguments, index)
        items.append(_item(_entry(dataset, index)))
    return json.dumps(items)


def graded(generator: str, arguments: str, index: str, answer: str) -> str:
    """Return the score of an answer; one that names Python's internals is wrong, and nothing is evaluated but values.

    The scorers call `eval` to read lists.
    """
    if "__" in answer:
        return "0.0"
    dataset = _dataset(generator, arguments)
    for part in (dataset, *getattr(dataset, "datasets", {}).values()):
        vars(sys.modules[type(part).__module__])["eval"] = ast.literal_eval
    _seed(arguments, int(index))
    entry = _entry(dataset, int(index))
    return str(_score(dataset, entry, answer))


def _seed(arguments: str, index: int) -> None:
    """Seed the global generators, from which some items are drawn."""
    seed = zlib.crc32(f"{arguments} {index}".encode())
    random.seed(seed)
    np.random.seed(seed)


def reason(error: Exception) -> str:
    """Return an exception of the package in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].removeprefix("AssertionError: ")
