"""Items of reasoning-gym's generators, made and graded in this process or in the sandbox.

A policy writes the answers. In this process only scorers run that cannot hang on one: the package's own comparison of
texts, and those of `COMPARING`. All others run in the sandbox. So do the generators of `UNSEEDED`, whose items are the
same in every process only there: its hash seed is fixed.
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
import signal
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any, TypedDict

import numpy as np

from bcft.errors import FaultError
from bcft.rewards.sandbox import FAILURES, Job, Sandbox

SIZE = 8_000
"""What a dataset is made with. `acre` alone takes time for it (a second for 2,000), and most make later items too."""
COMPARING = frozenset(
    {
        *("ab", "circuit_logic", "color_cube_rotation", "dice", "family_relationships", "needle_haystack"),
        *("self_reference", "sentence_reordering", "spell_backward", "word_sorting", "zebra_puzzles"),
        *("calendar_arithmetic", "chain_sum", "decimal_arithmetic", "decimal_chain_sum", "gsm_symbolic"),
        *("number_format", "products", "rectangle_count"),
        *("mini_sudoku", "sudoku"),
    }
)
"""Generators with a scorer of their own that was read: it compares texts, numbers, or digits one by one."""
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
        self.names = {part["name"] for part in parts}
        self.made_outside = bool(self.names & UNSEEDED)
        self.made: dict[int, Item | str] = {}
        self.entries: dict[int, Any] = {}

    @property
    def dataset(self) -> Any:
        """The package's own object, made when it is first asked for."""
        return _dataset(self.generator, self.arguments)

    @cached_property
    def graded_outside(self) -> bool:
        """Whether a policy's answers are graded in the sandbox."""
        package = importlib.import_module("reasoning_gym")
        plain = package.dataset.ProceduralDataset.score_answer
        own = {name for name in self.names if package.factory.DATASETS[name][0].score_answer is not plain}
        return self.made_outside or not own <= COMPARING

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
        """Make items, in the sandbox if need be; leave out those that the generator does not have.

        Raises FaultError when the sandbox does not make them: they are the run's problems, and none may be missing.
        """
        missing = [index for index in dict.fromkeys(indices) if index not in self.made]
        if not self.made_outside:
            made = {index: _item(self.entry(index)) for index in missing}
        else:
            size = min(BLOCK, math.ceil(len(missing) / (os.cpu_count() or 1))) or 1
            blocks = [missing[start : start + size] for start in range(0, len(missing), size)]
            requests = [(self.generator, self.arguments, json.dumps(block)) for block in blocks]
            made = {}
            for block, text in zip(blocks, self._maker.call(requests), strict=True):
                if text in FAILURES:
                    raise FaultError(
                        f"reasoning-gym:{self.generator}: making items {block[0]} to {block[-1]} ended in the sandbox "
                        f"({text}; {MAKING_SECONDS:.0f} s and {_MEMORY >> 30} GiB are allowed): run the same command "
                        f"again, or ask for smaller problems in dataset_args"
                    )
                made |= dict(zip(block, json.loads(text), strict=True))
        self.made |= {index: item for index, item in made.items() if item is not None}

    def entry(self, index: int) -> Any:
        """Return the package's own entry: None if there is no such index, a text that says why it cannot be made."""
        if index not in self.entries:
            self.entries[index] = _entry(self.dataset, index)
        return self.entries[index]

    def scores(self, answers: Sequence[tuple[int, str]], *, trusted: bool = False) -> list[float | None]:
        """Return the generator's score for each (index, answer), from 0 to 1; trusted: no policy wrote them.

        A score is None where the sandbox had to give up on the answer.
        """
        scores: list[float | None]
        distinct = list(dict.fromkeys(answers))
        if not (self.made_outside if trusted else self.graded_outside):
            scores = [_score(self.dataset, self.entry(index), answer) for index, answer in distinct]
        else:
            requests = [(self.generator, self.arguments, str(index), answer) for index, answer in distinct]
            scores = [None if text in FAILURES else float(text) for text in self._grader.call(requests)]
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


# In this process, and in a worker of the sandbox


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the block.

    Their handlers raise, which the package and this file would take for a mistake of an answer or of an item.
    """
    if threading.current_thread() is not threading.main_thread():  # no handler runs in any other
        yield
        return
    waiting: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    raising = {number: handler for number, handler in before.items() if callable(handler)}
    try:
        for number in raising:
            signal.signal(number, lambda number, _: waiting.append(number))
        yield
    finally:
        for number, handler in raising.items():
            signal.signal(number, handler)
        for late in waiting:
            signal.raise_signal(late)


@cache
@_uninterrupted()
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


@_uninterrupted()
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


@_uninterrupted()
def _score(dataset: Any, entry: Any, answer: str) -> float:
    """Return the generator's score of an answer; 0.0 where its scorer raises, which wrong answers cause.

    Raises MemoryError: in the sandbox it says nothing about the answer.
    """
    try:
        score = float(dataset.score_answer(answer=answer, entry=copy.deepcopy(entry)))
    except MemoryError:
        raise
    except Exception:
        return 0.0
    return min(1.0, max(0.0, score)) if math.isfinite(score) else 0.0


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

    Some scorers call `eval` to read lists; that of `bitwise_arithmetic` evaluates its own problem, and no answer.
    """
    if "__" in answer:
        return "0.0"
    dataset = _dataset(generator, arguments)
    _seed(arguments, int(index))
    entry = _entry(dataset, int(index))  # some generators evaluate the problem that they make
    parts = {type(part).__module__ for part in (dataset, *getattr(dataset, "datasets", {}).values())}
    modules = [vars(sys.modules[name]) for name in parts if not name.endswith(".bitwise_arithmetic")]
    for module in modules:
        module["eval"] = ast.literal_eval
    try:
        return str(_score(dataset, entry, answer))
    finally:  # the server calls this once, and workers begin as it was left
        for module in modules:
            del module["eval"]


def _seed(arguments: str, index: int) -> None:
    """Seed the global generators, from which some items are drawn."""
    seed = zlib.crc32(f"{arguments} {index}".encode())
    random.seed(seed)
    np.random.seed(seed)


def reason(error: Exception) -> str:
    """Return an exception of the package in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].removeprefix("AssertionError: ")
