"""What a reward function is: TRL's signature, how a recipe names one, and how it is called."""

import hashlib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from bcft.errors import BcftError, FaultError, UsageError
from bcft.types import Message, Problem

Reward = Callable[..., Sequence[float | None]]
"""A reward function in TRL's signature: one number for each completion, None where it cannot grade."""
REFERENCE_COLUMNS = ("answer", "solution", "ground_truth")
"""Columns that hold a reference answer, in the order in which a reward looks for them."""


@dataclass(frozen=True, slots=True)
class Answers:
    """How a reward reads the answers that it compares with references.

    It is the attribute `answers` of the reward function. Then references are graded against themselves before a run,
    majority votes are counted by answer, and the sanity check reports how many answers are readable.
    """

    extract: Callable[[str], str]
    """A completion -> the answer that it states, '' where it states none."""
    key: Callable[[str], str]
    """An answer -> a text that equal answers share."""


def answers_of(function: Reward | None) -> Answers | None:
    """Return how a reward function reads answers; None where it compares none with references."""
    answers = getattr(function, "answers", None)
    return answers if isinstance(answers, Answers) else None


def ask(
    function: Reward, problems: Sequence[Problem], completions: Sequence[str | Sequence[Message]]
) -> list[float | None]:
    """Call a user's reward function with TRL's arguments: prompts, completions, and the problems' other columns.

    Raises FaultError, with the function's name, when it raises, returns another number of values, or returns anything
    but finite numbers and None.
    """
    if not problems:
        return []
    name = name_of(function)
    columns = {key: [problem.columns.get(key) for problem in problems] for key in problems[0].columns}
    prompts = [problem.prompt for problem in problems]
    try:
        values = list(function(prompts=prompts, completions=completions, **columns))
    except BcftError:
        raise
    except Exception as error:
        raise FaultError(f"{name} raised {type(error).__name__}: {error} (--debug shows where)") from error
    if len(values) != len(problems):
        raise FaultError(f"{name} returned {len(values)} values for {len(problems)} completions")
    for value, problem in zip(values, problems, strict=True):
        if value is not None and not (isinstance(value, SupportsFloat) and math.isfinite(float(value))):
            raise FaultError(
                f"{name} returned {value!r} for {problem.where}: return a finite number, or None where it cannot grade"
            )
    return [None if value is None else float(value) for value in values]


def name_of(function: Callable[..., Any]) -> str:
    """Return a reward function's name; for an object that can be called, the name of its class."""
    return getattr(function, "__name__", type(function).__name__)


def described(function: Callable[..., Any]) -> str:
    """Return a function's name and a hash of its source where that can be read, so that a changed one differs."""
    name = f"{function.__module__}.{name_of(function)}"
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # typed into a bare interpreter, or not a function
        return name
    return f"{name}@{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def import_function(path: str, *, key: str) -> Callable[..., Any]:
    """Return the function with a dotted path such as `my_rewards.length`; the working directory is searched too.

    Raises UsageError that names the recipe's key.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise UsageError(f"{key}: {path!r} is not a dotted path such as my_rewards.length")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, SyntaxError) as error:
        raise UsageError(f"{key}: cannot import {module!r}: {error}") from error
    except AttributeError as error:
        raise UsageError(f"{key}: module {module!r} has no function {name!r}") from error
    if not callable(function):
        raise UsageError(f"{key}: {path} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def reference(problem: Problem) -> str:
    """Return a problem's reference answer; '' where it has none."""
    return str(next((problem.columns[name] for name in REFERENCE_COLUMNS if name in problem.columns), ""))
