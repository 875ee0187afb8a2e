"""Environments that are written for TRL's `environment_factory` (GRPOTrainer), unchanged.

Such a class has `reset(**row)`, which gets the problem's columns and returns what is added to the prompt, or None. Its
other public methods are tools. `get_reward()`, if it has one, grades the finished attempt. Instances are made once and
reset for each attempt, as TRL does: their constructors may open connections, and nothing closes these.

Left out: several environments in one run, by TRL's column `environment` (write one class that chooses), and rows
without a prompt. TRL has no word for success: name a `success_func`, or the rewards alone choose.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from bcft.rewards.base import described
from bcft.types import Feedback, Problem, Prompt
from bcft.types.plain import with_type

_OWN = ("reset", "get_reward")
"""Public methods that are no tools."""


def is_trl_environment(made: object) -> bool:
    """Return whether a factory made an environment for TRL rather than for bcft.

    `reset` of the latter takes a problem, and there is a `step`; one for TRL has other public methods beside `reset`.
    """
    reset = getattr(type(made), "reset", None)
    if not inspect.isfunction(reset) or not set(_public(made)) - {"reset"}:
        return False
    signature = inspect.signature(made.reset)  # type: ignore[attr-defined] # it has one, see above
    if "problem" in signature.parameters:
        return False
    try:
        signature.bind("a problem", seed=0)
    except TypeError:
        return True
    return not callable(getattr(made, "step", None))


def _public(made: object) -> list[str]:
    """Return the names of an object's public methods, sorted."""
    # On the class: on the object, properties would be read.
    return [name for name, _ in inspect.getmembers(type(made), predicate=inspect.isfunction) if name[0] != "_"]


class Pool:
    """Instances of a user's class: one is taken for each attempt, and given back after it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._idle: list[Any] = []

    def __repr__(self) -> str:  # part of the hash of what is played
        return described(self._make)

    def take(self) -> Any:
        """Return an instance that no attempt has."""
        try:
            return self._idle.pop()  # one step, also with other threads
        except IndexError:
            return self._make()

    def give(self, instance: Any) -> None:
        """Take an instance back."""
        self._idle.append(instance)


class TRLEnvironment:
    """One attempt in an environment of TRL's: the first action without tool calls ends it."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self._inner = pool, pool.take()
        self._sound = True
        names = _public(self._inner)
        self.tools: Sequence[Callable[..., Any]] = [getattr(self._inner, name) for name in names if name not in _OWN]
        self._rewards = "get_reward" in names

    def reset(self, problem: Problem, *, seed: int) -> Prompt:  # noqa: ARG002 - TRL gives none
        """Reset the instance with the problem's columns; return the prompt with what the instance adds to it.

        Raises ValueError when that is neither text nor content parts.
        """
        row = copy.deepcopy({**problem.columns, "prompt": problem.prompt})
        self._sound = False
        added = self._inner.reset(**row)
        self._sound = True
        if added is None:
            return problem.prompt
        if isinstance(problem.prompt, str) and isinstance(added, str):
            return problem.prompt + added
        if not isinstance(added, str | list):
            raise ValueError(f"TRL's reset returns text, content parts or None, not {with_type(added)}")
        messages: list[Any] = [{"role": "user", "content": problem.prompt}]
        messages = messages if isinstance(problem.prompt, str) else [*problem.prompt]
        content = messages[-1]["content"]
        both = content + added if isinstance(added, str) else [{"type": "text", "text": content}, *added]
        return [*messages[:-1], {**messages[-1], "content": both}]

    def step(self, action: str) -> Feedback:  # noqa: ARG002 - the instance knows calls alone
        """End the attempt."""
        return Feedback(observation=None, reward=None, done=True)

    def get_reward(self) -> Any:
        """Return the instance's own reward; None if it has no `get_reward`."""
        return self._inner.get_reward() if self._rewards else None

    def close(self) -> None:
        """Give the instance back, unless its `reset` failed."""
        if self._sound:
            self._pool.give(self._inner)
