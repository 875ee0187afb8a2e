"""Tool calls and tools in the one form that chat templates read: OpenAI's, with the arguments as an object.

Tables (`datasets`, parquet) give every row the keys of all rows: a null in an object is as if absent. Arguments and
tools may also be JSON text, in which a null stays.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NotRequired, TypedDict

from bcft.types.plain import is_empty, show, valid_text, with_type

_CALL = 'a tool call is {"type": "function", "function": {"name": ..., "arguments": {...}}}'
_TOOL = 'a tool is a JSON schema, {"type": "function", "function": {"name": ..., "parameters": {...}}}'


class Function(TypedDict):
    """What is called; `arguments` by name."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """One call that an assistant's message makes; `id` is there if the row gives one."""

    type: str
    function: Function
    id: NotRequired[str]


def tool_calls(value: object) -> list[ToolCall]:
    """Return the calls of a message. Raises ValueError for another form, and for a key that would be dropped."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"tool_calls: expected a list of calls, not {with_type(value)}")
    return [_call(call) for call in value]


def _call(value: object) -> ToolCall:
    wrong = ValueError(f"tool_calls: {_CALL}, not {with_type(value)}")
    if not isinstance(value, Mapping):
        raise wrong
    # A call may also be written without the object around it: {"name": ..., "arguments": {...}}.
    inner = value if is_empty(value.get("function")) else value["function"]
    name, kind, identity = (
        inner.get("name") if isinstance(inner, Mapping) else None,
        value.get("type") or "function",
        value.get("id") or "",
    )
    if not isinstance(name, str) or not name.strip() or kind != "function" or not isinstance(identity, str):
        raise wrong
    known = {"type", "id", "function", *(("name", "arguments") if inner is value else ())}
    for keys, source in ((known, value), (known | {"name", "arguments"}, inner)):
        for key in source.keys() - keys:
            if not is_empty(source[key]):
                raise ValueError(f"tool_calls: no template reads the key {key!r} of a call: remove it")
    called = Function(name=valid_text(name), arguments=_arguments(inner.get("arguments"), name))
    call = ToolCall(type="function", function=called)
    if identity:
        call["id"] = valid_text(identity)
    return call


def _arguments(value: object, name: str) -> dict[str, Any]:
    given = _read(value, f"the arguments of {name}") if isinstance(value, str) else without_null(value or {})
    if not isinstance(given, dict):
        raise ValueError(f"tool_calls: the arguments of {name} are an object with names as keys, not {show(value)}")
    _check_json(given, f"tool_calls: the arguments of {name}")
    return given


def stored(call: ToolCall) -> dict[str, Any]:
    """Return a call as files hold it: arguments with a null in them are JSON text, in which it stays.

    >>> stored({"type": "function", "function": {"name": "f", "arguments": {"x": None}}})["function"]["arguments"]
    '{"x": null}'
    """
    called = call["function"]
    if without_null(called["arguments"]) == called["arguments"]:
        return {**call}
    return {**call, "function": {**called, "arguments": json.dumps(called["arguments"], ensure_ascii=False)}}


def tools(value: object) -> list[dict[str, Any]]:
    """Return the tools of a row, a list of JSON schemas or such a list as JSON text. Raises ValueError for another."""
    given = _read(value, "the list") if isinstance(value, str) else without_null(value)
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise ValueError(f"expected a list of JSON schemas, not {with_type(value)}")
    for tool in given:
        if not tool_name(tool):
            raise ValueError(f"{_TOOL}, not {show(tool)}")
    _check_json(given, "tools")
    return given


def tool_name(tool: Mapping[str, Any]) -> str:
    """Return the name of a tool; '' if it has none."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def without_null(value: Any) -> Any:
    """Return a value of a table in lists and dicts of its own, without the keys that are null."""
    if isinstance(value, Mapping):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_null(item) for item in value]
    return value


def texts(value: Any) -> Iterator[str]:
    """Yield every text in a value of JSON, the keys of its objects as well."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def _read(text: str, what: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(text, parse_constant=refuse) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{what}: {show(text)} is not JSON: {reason}") from error


def _check_json(value: Any, what: str) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what}: not JSON: {error}") from error
    for text in texts(value):
        valid_text(text)
