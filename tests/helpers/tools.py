"""Environments with tools, of bcft's kind and of TRL's, and calls as templates read them."""

import random

from bcft.types import Feedback


def call(name, **arguments):
    """Return a call of a tool."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls, content=""):
    """Return an assistant's message with calls."""
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


class Calculator:
    """Adds for the policy, and grades its last words."""

    def __init__(self):
        self.tools = [self.add]

    def reset(self, problem, *, seed):
        """Return the prompt; `seed` decides what `add` may not get."""
        self.answer, self.refused = problem.columns.get("answer", "42"), random.Random(seed).randrange(1000, 2000)
        return problem.prompt

    def add(self, a: int, b: int = 1) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        if a < 0:
            raise ValueError("a must not be negative")
        return a + b

    def step(self, action):
        """Grade, and end unless the policy wants to go on."""
        right = self.answer in action
        if action.endswith("..."):
            return Feedback("Go on.", None, done=False)
        return Feedback(None, float(right), done=True, success=right)


class Described(Calculator):
    """The same, with a tool that is a JSON schema."""

    def __init__(self):
        parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
        self.tools = [{"type": "function", "function": {"name": "add", "description": "?", "parameters": parameters}}]


class Counter:
    """An environment for TRL, written to its documentation; `made` counts the instances."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self._asked = 0

    def reset(self, **kwargs) -> str | None:
        """Start at 0; `start` and `target` are columns."""
        self._asked = 0
        self.counter, self.target = kwargs.get("start", 0), kwargs.get("target", 3)
        return f" Reach {self.target}." if "target" in kwargs else None

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter.

        Returns:
            The updated counter value.
        """
        if step < 0:
            raise ValueError("Step must not be negative.")
        self.counter += step
        return self.counter

    async def look(self, unit: str = "points") -> str:
        """
        Tell the counter.

        Args:
            unit: What is counted.

        Returns:
            The counter in words.
        """
        return f"It is {self.counter} {unit}."

    def get_reward(self) -> float:
        """Grade the finished attempt."""
        self._asked += 1
        assert self._asked == 1, "the reward is asked for once"
        return float(self.counter == self.target)
