"""Reward functions: their signature, which is TRL's, how a recipe names one, and how one is called."""

import hashlib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, SupportsFloat

from bcft.errors import BcftError, FaultError, UsageError
from bcft.types import Message, Problem

Reward = Callable[..., Sequence[float | None]]
"""A reward function in TRL's signature: one number for each completion, None if it cannot grade."""
REFERENCE_COLUMNS = ("answer", "solution", "ground_truth")
"""Columns that hold a reference answer, in the order in which a reward looks for them."""


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


def answers_of(function: Reward | None) -> Answers | None:
    """Return how a reward function reads answers; None if it does not compare answers with references."""
    answers = getattr(function, "answers", None)
    return answers if isinstance(answers, Answers) else None


@contextmanager
def users_code(summary: str, kind: type[BcftError]) -> Iterator[None]:
    """Report any exception of a user's code in the block as an error of `kind`, in one line.

    The line is the summary with the exception's type and message. A BcftError passes through.
    """
    try:
        yield
    except BcftError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        raise kind(f"{summary} {type(error).__name__}: {message} (--debug shows where)") from error


def ask(
    function: Reward, problems: Sequence[Problem], completions: Sequence[str | Sequence[Message]]
) -> list[float | None]:
    """Call a user's reward function with TRL's arguments: prompts, completions, and the problems' other columns.

    A column that any problem has is given for all of them, with None for a problem without it.
    Raises FaultError, with the function's name, when it raises, returns another number of values, or returns anything
    but finite numbers and None.
    """
    if not problems:
        return []
    name = name_of(function)
    names = dict.fromkeys(key for problem in problems for key in problem.columns)
    columns = {key: [problem.columns.get(key) for problem in problems] for key in names}
    prompts = [problem.prompt for problem in problems]
    with users_code(f"{name} raised", FaultError):
        values = list(function(prompts=prompts, completions=completions, **columns))
    if len(values) != len(problems):
        raise FaultError(f"{name} returned {len(values)} values for {len(problems)} completions")
    for value, problem in zip(values, problems, strict=True):
        if value is not None and not (isinstance(value, SupportsFloat) and math.isfinite(float(value))):
            raise FaultError(
                f"{name} returned {value!r} for {problem.where}: return a finite number, or None where it cannot grade"
            )
    return [None if value is None else float(value) for value in values]


def name_of(function: Callable[..., Any]) -> str:
    """Return a function's name; for another object that can be called, the name of its class."""
    return getattr(function, "__name__", type(function).__name__)


def described(function: Callable[..., Any]) -> str:
    """Return a function's name, and a hash of its source if that can be read: a changed function differs."""
    name = f"{function.__module__}.{name_of(function)}"
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # typed into a bare interpreter, or not a function
        return name
    return f"{name}@{hashlib.sha256(source.encode()).hexdigest()[:8]}"


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
    try:
        function = getattr(imported, name)
    except AttributeError as error:
        raise UsageError(f"{key}: module {module!r} has no function {name!r}") from error
    if not callable(function):
        raise UsageError(f"{key}: {path} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def reference(problem: Problem) -> str:
    """Return a problem's reference answer, or '' if it has none."""
    return str(next((problem.columns[name] for name in REFERENCE_COLUMNS if name in problem.columns), ""))
