"""Reward functions: their signature, which is TRL's, how a recipe names one, and how one is called."""

import asyncio
import copy
import functools
import hashlib
import importlib
import inspect
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from tokenize import TokenError
from typing import Any, SupportsFloat

from bcft.errors import BcftError, DataError, FaultError, UsageError
from bcft.rewards.awaiting import is_async, start
from bcft.rewards.signature import (
    IDS,
    TRL_ARGUMENTS,
    inner_function,
    missing_columns,
    reads_messages,
    takes,
    why_missing,
)
from bcft.rewards.signature import name_of as name_of
from bcft.types import Message, Problem, messages, show

Reward = Callable[..., Any]
"""A reward function in TRL's signature, plain or asynchronous: one number for each completion, None if it cannot grade.
"""
REFERENCE_COLUMNS = ("answer", "solution", "ground_truth")
"""Columns that hold a reference answer, in the order in which a reward looks for them."""
_LONGEST_MESSAGE = 500


def solved(reward: float) -> bool:
    """Return whether the reward of a success function means success: 1.0 or more, to 9 decimals as all rewards.

    >>> solved(sum([1 / 10] * 10))
    True
    """
    return round(reward, 9) >= 1.0


@dataclass(frozen=True, slots=True)
class Answers:
    """How a reward reads the answers that it compares with references.

    It is the attribute `answers` of the reward function. Then references are graded against themselves before a run,
    majority votes are counted by answer, and the sanity check reports how many answers are readable.
    """

    extract: Callable[[str], str]
    """A completion -> the answer that it states, or '' if it states none."""
    key: Callable[[str], str]
    """An answer -> a text that equal answers share."""
    check: Callable[[Sequence[Problem]], str] | None = None
    """Its own check of references before a run: problems -> what it found, in words."""


def answers_of(function: Reward | None) -> Answers | None:
    """Return how a reward function reads answers; None if it does not compare answers with references."""
    answers = getattr(inner_function(function), "answers", None) if function else None
    return answers if isinstance(answers, Answers) else None


@contextmanager
def users_code(summary: str, kind: type[BcftError]) -> Iterator[None]:
    """Report any exception of a user's code in the block as an error of `kind`, in one line.

    The line is the summary with the exception's type, message and place. A BcftError passes through.
    """
    try:
        yield
    except BcftError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        message = message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + "..."
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename[:1] != "<"]
        where = f"{frames[-1].filename}:{frames[-1].lineno}"  # the last that is a file's: `<frozen importlib>` is none
        raise kind(f"{summary} {type(error).__name__}: {message} ({where}; --debug shows more)") from error


# How a function is called


@dataclass(frozen=True, slots=True)
class TrainerState:
    """The argument `trainer_state`: what a `transformers.TrainerState` holds before a training starts.

    `max_steps` and `num_train_epochs` stay 0: the rows that are kept decide them.
    """

    global_step: int = 0
    """Optimizer steps so far; 0 outside training."""
    epoch: float = 0.0
    max_steps: int = 0
    num_train_epochs: int = 0
    log_history: tuple[Mapping[str, float], ...] = ()
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True


@dataclass(frozen=True, slots=True)
class Batch:
    """Attempts that are graded together."""

    problems: Sequence[Problem]
    """The problem of each attempt."""
    completions: Sequence[str | Sequence[Message]]
    """In the form of the problem's prompt."""
    completion_ids: Sequence[Sequence[int]] | None = None
    """The token ids of each completion; None if they are not known."""
    columns: Collection[str] | None = None
    """All columns of the run's problems, also of those elsewhere; None: those of these problems."""
    step: int = 0
    """Optimizer steps so far."""


@dataclass(frozen=True, slots=True)
class Returned:
    """What a reward function returned for a batch, and what it logged meanwhile."""

    values: tuple[float | None, ...]
    """For each attempt."""
    logged: Mapping[str, float]
    """What it gave to `log_metric`: the mean of each metric's finite values."""
    extra: Mapping[str, Sequence[Any]]
    """What it gave to `log_extra`: for each column a value for each attempt."""


def ask(
    function: Reward,
    problems: Sequence[Problem],
    completions: Sequence[str | Sequence[Message]],
    *,
    completion_ids: Sequence[Sequence[int]] | None = None,
) -> list[float | None]:
    """Call a user's reward function on a batch and return its values. Raises as `ask_all` does."""
    if not problems:
        return []
    ((_, returned),) = ask_all([(function, Batch(problems, completions, completion_ids))])
    return list(returned.values)


def ask_all(requests: Sequence[tuple[Reward, Batch]]) -> Iterator[tuple[int, Returned]]:
    """Call reward functions with TRL's arguments; yield the number of each request and its values, once they are there.

    The arguments are keywords: TRL's own and the problems' other columns, each a list. A column that a problem lacks is
    None there. A function gets copies of its own, and without `**kwargs` only what its signature names. Asynchronous
    functions run after the others and concurrently.

    Raises FaultError, with the function's name, when it raises, or returns anything but a list of as many finite
    numbers or None; DataError when it needs a column that no problem has. Of asynchronous functions, the values of the
    others come first.
    """
    waiting = {}
    for number, (function, batch) in enumerate(requests):
        call = _Call(function, batch)
        if is_async(function):
            waiting[number] = call
            continue
        with users_code(f"{call.name} raised", FaultError):
            values = function(**call.arguments)
            if inspect.isawaitable(values):
                values = start(values).result()
        yield number, call.returned(values)
    futures = {start(call.awaited()): (number, call) for number, call in waiting.items()}
    errors: dict[int, BcftError] = {}
    try:
        for future in as_completed(futures):
            number, call = futures[future]
            try:
                returned = call.returned(future.result())
            except BcftError as error:
                errors[number] = error
            else:
                yield number, returned
    finally:
        for future in futures:
            future.cancel()
    if errors:
        raise errors[min(errors)]


@dataclass(slots=True)
class _Call:
    """One call of a function: its arguments, and what it logs."""

    function: Reward
    batch: Batch
    arguments: dict[str, Any] = field(init=False)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        batch = self.batch
        keys = batch.columns
        if keys is None:
            keys = dict.fromkeys(key for problem in batch.problems for key in problem.columns)
        if taken := [key for key in keys if key in TRL_ARGUMENTS]:
            where = next(problem.where for problem in batch.problems) or "the rows"
            raise DataError(f"{where}: column {taken[0]!r} has the name of an argument of TRL's: rename it")
        if missing := missing_columns(self.function, keys, ids=batch.completion_ids is not None):
            raise DataError(why_missing(self.function, missing, keys))
        given: dict[str, Any] = {key: [problem.columns.get(key) for problem in batch.problems] for key in keys}
        given |= {"prompts": [problem.prompt for problem in batch.problems], "completions": batch.completions}
        if batch.completion_ids is not None:
            given |= dict.fromkeys(IDS, batch.completion_ids)
        if reads_messages(self.function):
            given["prompts"] = [messages(prompt) if isinstance(prompt, str) else prompt for prompt in given["prompts"]]
            given["completions"] = [
                [{"role": "assistant", "content": text}] if isinstance(text, str) else text
                for text in batch.completions
            ]
        chosen = {key: values for key, values in given.items() if takes(self.function, key)}
        # Each value is copied by itself, or attempts at one problem would share their prompt.
        self.arguments = {
            key: [list(ids) for ids in values] if key in IDS else [copy.deepcopy(value) for value in values]
            for key, values in chosen.items()
        }
        others = {
            "trainer_state": TrainerState(global_step=batch.step),
            "log_extra": self.log_extra,
            "log_metric": self.log_metric,
        }
        self.arguments |= {key: value for key, value in others.items() if takes(self.function, key)}

    @property
    def name(self) -> str:
        """The function's name."""
        return name_of(self.function)

    async def awaited(self) -> Any:
        """Return what the function returns when it is awaited."""
        with users_code(f"{self.name} raised", FaultError):
            try:
                return await self.function(**self.arguments)
            except (asyncio.CancelledError, SystemExit) as error:  # either would end the loop of all functions
                raise FaultError(f"{self.name} raised {type(error).__name__}: {error}") from error

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Take a column of values, one for each attempt."""
        self.extra.setdefault(str(column), []).extend(_plain_numbers(value) for value in _plain_numbers(values))

    def log_metric(self, name: str, value: SupportsFloat) -> None:
        """Take a value of a metric."""
        if not isinstance(value, SupportsFloat):
            raise FaultError(f"{self.name} logged the metric {name!r} as {show(value)}: give a number")
        self.metrics.setdefault(str(name), []).append(float(value))

    def returned(self, values: Any) -> Returned:
        """Return what the function returned and logged. Raises FaultError for anything but numbers and None."""
        problems = self.batch.problems
        numbers = _numbers(values, problems, name=self.name)
        for column, entries in self.extra.items():
            if len(entries) != len(problems):
                raise FaultError(
                    f"{self.name} logged {len(entries)} values of {column!r} for {len(problems)} completions"
                )
        finite = {name: [value for value in given if math.isfinite(value)] for name, given in self.metrics.items()}
        logged = {name: sum(given) / len(given) for name, given in finite.items() if given}
        return Returned(numbers, logged, dict(self.extra))


def _numbers(values: Any, problems: Sequence[Problem], *, name: str) -> tuple[float | None, ...]:
    """Return values as numbers: of a list or another sequence, an array or a tensor. Raises FaultError for others."""
    listed = _plain_numbers(values)
    if isinstance(listed, str | bytes | bytearray) or not isinstance(listed, Sequence):
        kind = "None" if values is None else f"{type(values).__name__} {show(values)}"
        raise FaultError(f"{name} returned {kind}, not a list of numbers")
    if len(listed) != len(problems):
        raise FaultError(f"{name} returned {len(listed)} values for {len(problems)} completions")
    numbers: list[float | None] = []
    for value, problem in zip(listed, problems, strict=True):
        number = None if value is None else _number(value)
        if number is not None and not math.isfinite(number):
            place = problem.where or f"problem {problem.id}"
            raise FaultError(
                f"{name} returned {show(value)} for {place}: return a finite number, or None where it cannot grade"
            )
        numbers.append(number)
    return tuple(numbers)


def _number(value: Any) -> float:
    """Return a value as a number; NaN for what is none."""
    try:
        return float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):  # several numbers, or more than a float holds
        return math.nan


def _plain_numbers(values: Any) -> Any:
    """Return the numbers of an array or a tensor as Python's own; other values as they are."""
    return values.tolist() if hasattr(values, "tolist") else values


# How a function is named


def described(function: Callable[..., Any]) -> str:
    """Return a function's name, and a hash of its source if that can be read: a changed function differs.

    The arguments of a `functools.partial` follow, and the numbers and texts that a function has from its factory. Of an
    object with `__call__` it is the class; its state may change with every call.
    """
    bound = ""
    if isinstance(function, functools.partial):
        arguments = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in sorted(function.keywords.items()))]
        bound = re.sub(r" at 0x[0-9a-fA-F]+", "", f"({', '.join(arguments)})")  # an address changes from run to run
    inner = inner_function(function)
    name = f"{inner.__module__}.{name_of(inner)}"
    if inspect.isfunction(inner):
        held = inspect.getclosurevars(inner).nonlocals.items()
        plain = [f"{key}={value!r}" for key, value in sorted(held) if isinstance(value, str | int | float | None)]
        bound += f"[{', '.join(plain)}]" if plain else ""
    try:
        source = inspect.getsource(inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner))
    except (OSError, TypeError, SyntaxError, TokenError):  # typed into an interpreter, no function, or edited since
        return name + bound
    return f"{name}@{hashlib.sha256(source.encode()).hexdigest()[:8]}{bound}"


def reward_functions(given: Reward | str | Sequence[Reward | str], *, key: str = "reward_funcs") -> list[Reward]:
    """Return functions from one or several, each a function or a dotted path. Raises UsageError with the key."""
    if isinstance(given, str) or callable(given):
        given = [given]
    if not isinstance(given, list | tuple):
        raise UsageError(f"{key}: {show(given)} is neither a function nor a dotted path, nor a list of these")
    for item in given:
        if not (isinstance(item, str) or callable(item)):
            raise UsageError(f"{key}: {show(item)} is neither a function nor a dotted path")
    return [import_function(item, key=key) if isinstance(item, str) else item for item in given]


def import_function(path: str, *, key: str) -> Callable[..., Any]:
    """Return the function with a dotted path such as `my_rewards.length`; the working directory is searched too.

    Raises UsageError that names the recipe's key, also for any exception that the import of the module raises.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise UsageError(f"{key}: {path!r} is not a dotted path such as my_rewards.length")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with users_code(f"{key}: cannot import {module!r}:", UsageError):
        imported = importlib.import_module(module)
        function = getattr(imported, name, None)  # a module that loads its parts on demand may raise here
    if function is None:
        raise UsageError(f"{key}: module {module!r} has no function {name!r}")
    if not callable(function):
        raise UsageError(f"{key}: {path} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def reference(problem: Problem) -> str:
    """Return a problem's reference answer, or '' if it has none."""
    values = (problem.columns.get(name) for name in REFERENCE_COLUMNS)
    return str(next((value for value in values if value is not None), ""))
