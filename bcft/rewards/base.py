"""What a reward function is: TRL's signature, how a recipe names one, and how it is called."""

import hashlib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

from bcft.errors import BcftError, FaultError, UsageError
from bcft.types import Message, Problem

Reward = Callable[..., Sequence[float | None]]
"""A reward function in TRL's signature: one number a completion, None where it cannot tell."""
REFERENCES = ("answer", "solution", "ground_truth")
"""Columns that hold a reference answer, in the order a reward looks for them."""


def ask(
    function: Reward, problems: Sequence[Problem], completions: Sequence[str | Sequence[Message]]
) -> list[float | None]:
    """Call somebody's reward function with TRL's arguments: prompts, completions, and the problems' other columns.

    Raises FaultError, with the function's name, when it raises, returns another number of values, or something else
    than finite numbers and None.
    """
    if not problems:
        return []
    name = name_of(function)
    columns = {key: [p.columns.get(key) for p in problems] for key in problems[0].columns}
    try:
        values = list(function(prompts=[p.prompt for p in problems], completions=completions, **columns))
    except BcftError:
        raise
    except Exception as error:
        raise FaultError(f"{name} raised {type(error).__name__}: {error} (--debug shows where)") from error
    if len(values) != len(problems):
        raise FaultError(f"{name} returned {len(values)} values for {len(problems)} completions")
    for value, problem in zip(values, problems, strict=True):
        if value is not None and not (isinstance(value, SupportsFloat) and math.isfinite(float(value))):
            raise FaultError(
                f"{name} returned {value!r} for {problem.where}: a finite number, or None where it can't tell"
            )
    return [None if value is None else float(value) for value in values]


def name_of(function: Callable[..., Any]) -> str:
    """Return what a reward function is called; of an object that is called like one, its class."""
    return getattr(function, "__name__", type(function).__name__)


def described(function: Callable[..., Any]) -> str:
    """Return a function's name and a hash of its text, where that can be read: two that differ are told apart."""
    name = f"{function.__module__}.{name_of(function)}"
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # typed into a bare interpreter, or no function
        return name
    return f"{name}@{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def import_function(path: str, *, key: str) -> Callable[..., Any]:
    """Return the function a dotted path such as `my_rewards.length` names, the working directory included.

    Raises UsageError that names the recipe's key.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise UsageError(f"{key}: {path!r} is not a dotted path such as my_rewards.length")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, SyntaxError) as error:
        raise UsageError(f"{key}: cannot import {module!r}: {error}") from error
    except AttributeError as error:
        raise UsageError(f"{key}: module {module!r} has no function {name!r}") from error
    if not callable(found):
        raise UsageError(f"{key}: {path} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def reference(problem: Problem) -> str:
    """Return a problem's reference answer; '' where it has none."""
    return str(next((problem.columns[name] for name in REFERENCES if name in problem.columns), ""))
