"""Messages and prompts: what a message may hold, and the identity of a problem."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NotRequired, TypedDict

from bcft.types.calls import ToolCall, stored, tool_calls
from bcft.types.plain import is_empty, says_no, says_yes, show, valid_text, with_type

ROLES = ("system", "user", "assistant", "tool")
"""Whose message it is; `tool` is an observation, as `user` is."""
MEANT = {
    **dict.fromkeys(("human", "user_input"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("function", "ipython", "observation"), "tool"),
    "developer": "system",
}
"""Role of other formats -> the one of `ROLES` that says the same."""
THOUGHT: Final = "reasoning_content"
"""The key of an assistant's thought, apart from what it says."""
_THOUGHTS = (THOUGHT, "reasoning", "thinking")
"""What datasets and templates call it."""
_OF_ROLE = {
    **dict.fromkeys(("tool_calls", *_THOUGHTS, "train", "weight"), "assistant"),
    **dict.fromkeys(("tool_call_id", "name"), "tool"),
}
"""Key of a message -> whose message may have it."""
_MARKED = "only the assistant's messages carry loss: remove the key"
_REMEDIES = {
    "function_call": 'write it as tool_calls: [{"type": "function", "function": {"name": …, "arguments": {…}}}]',
    **dict.fromkeys(("train", "weight"), _MARKED),
}
"""Key of a message -> what to do about it where it is refused."""
_ADD = "remove it, or write it into content"


class Message(TypedDict):
    """One chat message; `role` is one of `ROLES`. The other keys are there only where they say something."""

    role: str
    content: str
    tool_calls: NotRequired[list[ToolCall]]
    """What an assistant calls, beside or instead of its content."""
    tool_call_id: NotRequired[str]
    """Of a tool's result: the call that it answers."""
    name: NotRequired[str]
    """Of a tool's result: the tool."""
    reasoning_content: NotRequired[str]
    """An assistant's thought, where it is apart from the content."""
    train: NotRequired[bool]
    """Whether an assistant's message is marked to carry loss, or not to; no template reads it."""


Prompt = str | Sequence[Message]


def problem_id(prompt: Prompt) -> str:
    """Return 16 hex digits that depend on the prompt's canonical text alone, calls and thoughts included."""
    given: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    words = [[message["role"], " ".join(message["content"].split()), *_beside(message)] for message in given]
    # A string is one user message, and its id that of its words alone.
    alone = len(words) == 1 and len(words[0]) == 2 and words[0][0] == "user"
    canonical = words[0][1] if alone else json.dumps(words, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(str(canonical).encode()).hexdigest()[:16]


def _beside(message: Message) -> list[dict[str, Any]]:
    """Return what a message says beside its content; the ids of calls say nothing."""
    if len(message) == 2:  # most say nothing beside their content
        return []
    said: dict[str, Any] = {"calls": [call["function"] for call in message.get("tool_calls", [])]}
    said |= {"name": message.get("name"), THOUGHT: message.get(THOUGHT)}
    return [kept] if (kept := {key: value for key, value in said.items() if value}) else []


def bucket(identity: str) -> float:
    """Map a problem id to a number in [0, 1). The number decides the split."""
    return int(identity[:8], 16) / 2**32


def messages(prompt: Prompt) -> list[Message]:
    """Return a prompt or an observation as messages of its own: a string is one user message.

    A key beside role and content whose value is empty is as if absent: `datasets` fills missing keys with None.
    Content that is a list of parts of text is their texts in a row. Raises ValueError for anything but a string or a
    list of messages, and for a message with a key that would be dropped.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": valid_text(prompt)}]
    if not isinstance(prompt, list | tuple) or not prompt:
        raise ValueError(f"expected a string or a list of messages, not {with_type(prompt)}")
    return [_message(message, f"message {number}") for number, message in enumerate(prompt)]


def _message(value: object, where: str) -> Message:
    """Return a message with the keys of `Message` alone. Raises ValueError that names what it holds besides."""
    if not isinstance(value, Mapping):
        raise _no_message(value, where)
    role, content = value.get("role"), value.get("content")
    if role is None and {"from", "value"} <= value.keys():
        raise ValueError(
            f"{where}: a ShareGPT message: rename the column to conversations and set dataset_format: sharegpt"
        )
    if not isinstance(role, str):
        raise _no_message(value, where)
    if role not in ROLES:
        meant = f": rename it to {MEANT[role]}" if role in MEANT else ""
        raise ValueError(f"{where}: role {show(role)} is not one of {', '.join(ROLES)}{meant}")
    others = [key for key in value if key not in ("role", "content")]
    further = {str(key): value[key] for key in others if not is_empty(value[key])} if others else {}
    for key, item in further.items():
        if _OF_ROLE.get(key) != role and not (key in ("weight", "train") and says_no(item)):
            raise ValueError(_refusal(key, item, where))
    if isinstance(content, list | tuple):
        content = _joined(content, where)
    if content is None and "tool_calls" in further:
        content = ""
    if not isinstance(content, str):
        raise _no_message(value, where)
    try:
        message: Message = {"role": role, "content": valid_text(content)}
        if further:
            _add(message, further)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return message


def _no_message(value: object, where: str) -> ValueError:
    return ValueError(f"{where}: a message is {{role, content}}, both text, not {with_type(value)}")


def _joined(parts: Sequence[Any], where: str) -> str:
    """Return the text of content that is a list of parts. Raises ValueError where a part is no text."""
    kinds = {str(part.get("type")) if isinstance(part, Mapping) else "text" for part in parts} - {"text"}
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if kinds or not parts or not all(isinstance(text, str) for text in texts):
        remedy = f"{', '.join(sorted(kinds))} cannot be trained" if kinds else "join the texts into one string"
        raise ValueError(
            f'{where}: content must be text, or parts {{"type": "text", "text": …}}, not another list: {remedy}'
        )
    return "".join(map(str, texts))


def _add(message: Message, further: Mapping[str, Any]) -> None:
    """Add the keys beside role and content to a message of a role that may have them. Raises ValueError."""
    if "tool_calls" in further:
        message["tool_calls"] = tool_calls(further["tool_calls"])
    if "tool_call_id" in further:
        message["tool_call_id"] = _text_of("tool_call_id", further["tool_call_id"])
    if "name" in further:
        message["name"] = _text_of("name", further["name"])
    thoughts = [key for key in _THOUGHTS if key in further]
    if len({further[key] if isinstance(further[key], str) else key for key in thoughts}) > 1:
        raise ValueError(f"{' and '.join(thoughts)} say different things: remove one of them")
    if thoughts:
        message[THOUGHT] = _text_of(thoughts[0], further[thoughts[0]])
    marks = {key: further[key] for key in ("train", "weight") if key in further and message["role"] == "assistant"}
    for key, mark in marks.items():
        if not (says_yes(mark) or says_no(mark)):
            raise ValueError(f"its key {key!r} ({show(mark)}): a message carries loss or does not: give 1 or 0")
    if len({says_yes(mark) for mark in marks.values()}) > 1:
        raise ValueError("train and weight say different things: remove one of them")
    if marks:
        message["train"] = says_yes(next(iter(marks.values())))


def _text_of(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"its key {key!r} is text, not {with_type(value)}")
    return valid_text(value)


def _refusal(key: str, value: object, where: str) -> str:
    """Return why a key of a message is refused: it would be dropped."""
    remedy = _REMEDIES.get(key) or (f"it belongs to the {_OF_ROLE[key]}'s message" if key in _OF_ROLE else _ADD)
    return f"{where}: its key {key!r} ({show(value)}) cannot be trained: {remedy}"


def in_file(given: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as files hold them: without nulls, arguments with a null in them as JSON text."""
    return [
        {**message, "tool_calls": [stored(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else {**message}
        for message in given
    ]
