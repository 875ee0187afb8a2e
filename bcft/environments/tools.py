"""The tools that an environment offers to the policy, and what calls of them return.

A tool is a Python function, mostly a method of the environment, with type hints and a Google-style docstring, from
which its schema follows; or a JSON schema with the name of a method. Results are those of TRL's GRPO: the text of what
a function returns, and what it raises as `{'error': ...}`, so that a function raises where the policy made a mistake.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from bcft.errors import BcftError, UsageError
from bcft.rewards.awaiting import start
from bcft.rewards.base import name_of, users_code
from bcft.types import Message, show
from bcft.types.calls import Function, ToolCall, tool_name
from bcft.types.calls import tools as checked

Tool: TypeAlias = Callable[..., Any] | Mapping[str, Any]


@runtime_checkable
class Offering(Protocol):
    """An environment with tools."""

    tools: Sequence[Tool]


@runtime_checkable
class Rewarding(Protocol):
    """An environment with a reward for the whole attempt."""

    def get_reward(self) -> Any:
        """Return a number, None, or an awaitable of one; called once, after the last action."""
        ...


@dataclass(frozen=True)
class Toolbox:
    """The tools of one environment, by name."""

    functions: Mapping[str, Callable[..., Any]]
    schemas: tuple[dict[str, Any], ...]
    """JSON schemas, as chat templates read them."""

    def results(self, calls: Sequence[ToolCall]) -> list[Message]:
        """Make the calls, in their order, and return the message of each; asynchronous ones run concurrently."""
        values = [self._call(call["function"]) for call in calls]
        return [_message(call, _settled(value)) for call, value in zip(calls, values, strict=True)]

    def _call(self, called: Function) -> Any:
        name = called["name"]
        if name not in self.functions:
            return _error(f"Tool {name} not found.")  # in the words of TRL
        try:
            value = self.functions[name](**called["arguments"])
            return start(value) if inspect.isawaitable(value) else value
        except Exception as error:  # what a tool raises is for the policy to read
            return _read(error)


def toolbox(environment: object, name: str) -> Toolbox | None:
    """Return the tools that an environment offers; None without any. Raises UsageError for a tool without a schema.

    name: of the environment, for messages.
    """
    if not isinstance(environment, Offering) or not environment.tools:
        return None
    pairs = list(_tools(environment, f"environment: {name}: tools:"))
    names = [tool_name(schema) for schema, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"environment: {name}: tools: {', '.join(twice)}: given twice")
    functions = {tool: function for tool, (_, function) in zip(names, pairs, strict=True)}
    return Toolbox(functions, tuple(schema for schema, _ in pairs))


def reward_of(environment: object) -> float | None:
    """Return an environment's reward for the whole attempt; None if it gives none."""
    if not isinstance(environment, Rewarding):
        return None
    value = environment.get_reward()
    value = start(value).result() if inspect.isawaitable(value) else value
    return None if value is None else float(value)


def _tools(environment: Offering, where: str) -> Iterator[tuple[dict[str, Any], Callable[..., Any]]]:
    for tool in environment.tools:
        if callable(tool):
            yield _schema(tool, where), tool
            continue
        try:
            (schema,) = checked([tool])
        except ValueError as error:
            raise UsageError(f"{where} {error}, nor a function") from error
        method = getattr(environment, tool_name(schema), None)
        if not callable(method):
            raise UsageError(f"{where} {show(tool_name(schema))} is no method of the environment: add one of that name")
        yield schema, method


def _schema(function: Callable[..., Any], where: str) -> dict[str, Any]:
    from transformers.utils import get_json_schema  # noqa: PLC0415 - loads torch, and most environments have no tools

    with users_code(f"{where} {name_of(function)} has no schema:", UsageError):
        (schema,) = checked([get_json_schema(function)])
    return schema


def _settled(value: Any) -> Any:
    if not isinstance(value, Future):
        return value
    try:
        return value.result()
    except Exception as error:  # as of a plain function
        return _read(error)


def _read(error: Exception) -> dict[str, str]:
    """Return what the policy reads of an exception. Raises it where it is no answer to a call.

    That is a request to stop the run, which arrives within any call, and memory that has run out.
    """
    if isinstance(error, BcftError | MemoryError):
        raise error
    return _error(str(error))


def _error(text: str) -> dict[str, str]:
    return {"error": text}


def _message(call: ToolCall, value: Any) -> Message:
    """Return the message of a result; its content is text, or a list of content parts as it is."""
    parts = isinstance(value, list) and value and all(isinstance(p, Mapping) and "type" in p for p in value)
    message: Message = {"role": "tool", "name": call["function"]["name"], "content": value if parts else str(value)}
    if "id" in call:
        message["tool_call_id"] = call["id"]
    return message
