"""Messages and prompts: what a message may hold, and the identity of a problem."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

ROLES = ("system", "user", "assistant", "tool")
"""Whose message it is; `tool` is an observation, as `user` is."""
_NONCHARACTER = re.compile("[\ufdd0-\ufdef]")
_MEANT = {
    **dict.fromkeys(("human", "user_input"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("function", "ipython", "observation"), "tool"),
    "developer": "system",
}
"""Role of other formats -> the one of `ROLES` that says the same."""
_THOUGHT = "write it into content as the model's template does, such as <think>…</think> before the answer"
_CALL = "write the call into content as the model's template prints it"
_REMEDIES = {
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _THOUGHT),
    **dict.fromkeys(("tool_calls", "function_call"), _CALL),
}
"""Key of a message -> what to do about it."""


class Message(TypedDict):
    """One chat message; `role` is one of `ROLES`."""

    role: str
    content: str


Prompt = str | Sequence[Message]


def problem_id(prompt: Prompt) -> str:
    """Return 16 hex digits that depend on the prompt's canonical text alone."""
    messages = [("user", prompt)] if isinstance(prompt, str) else [(m["role"], m["content"]) for m in prompt]
    words = [(role, " ".join(content.split())) for role, content in messages]
    # A string is one user message, and its id that of its words alone.
    canonical = words[0][1] if [role for role, _ in words] == ["user"] else json.dumps(words, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def bucket(identity: str) -> float:
    """Map a problem id to a number in [0, 1). The number decides the split."""
    return int(identity[:8], 16) / 2**32


def messages(prompt: Prompt) -> list[Message]:
    """Return a prompt or an observation as messages of its own: a string is one user message.

    A key beside role and content whose value is empty is as if absent: `datasets` fills missing keys with None.
    Raises ValueError for anything but a string or a list of messages with a role of `ROLES` and a text.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": valid_text(prompt)}]
    if not isinstance(prompt, list | tuple) or not prompt:
        raise ValueError(f"expected a string or a list of messages, not {with_type(prompt)}")
    return [_message(message, f"message {number}") for number, message in enumerate(prompt)]


def _message(value: object, where: str) -> Message:
    """Return role and content of a message. Raises ValueError that names what it holds besides."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: a message is {{role, content}}, both text, not {with_type(value)}")
    role, content = value.get("role"), value.get("content")
    if role is None and {"from", "value"} <= value.keys():
        raise ValueError(
            f"{where}: a ShareGPT message: rename from to role and value to content, and human and gpt to user and "
            f"assistant"
        )
    if not isinstance(role, str):
        raise ValueError(f"{where}: a message is {{role, content}}, both text, not {with_type(value)}")
    if role not in ROLES:
        meant = f": rename it to {_MEANT[role]}" if role in _MEANT else ""
        raise ValueError(f"{where}: role {show(role)} is not one of {', '.join(ROLES)}{meant}")
    for key, further in value.items():
        if key not in ("role", "content") and not is_empty(further):
            _refuse(str(key), further, role, where)
    if isinstance(content, list | tuple):
        kinds = {str(part.get("type")) if isinstance(part, Mapping) else "text" for part in content} - {"text"}
        remedy = f"{', '.join(sorted(kinds))} cannot be trained" if kinds else "join the texts into one string"
        raise ValueError(f"{where}: content must be text, not a list of parts: {remedy}")
    if not isinstance(content, str):
        raise ValueError(f"{where}: a message is {{role, content}}, both text, not {with_type(value)}")
    try:
        return {"role": role, "content": valid_text(content)}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _refuse(key: str, value: object, role: str, where: str) -> None:
    """Raise ValueError for a key of a message that would be dropped, unless it says what is done anyway."""
    remedy = _REMEDIES.get(key, "remove it, or write it into content")
    if key in ("weight", "train"):
        # Every assistant message carries loss, and no other one does.
        if says_yes(value) if role == "assistant" else says_no(value):
            return
        remedy = "assistant messages carry loss, and no others do: remove the key (train_on: last_turn trains the last)"
    raise ValueError(f"{where}: its key {key!r} ({show(value)}) cannot be trained: {remedy}")


def valid_text(text: str) -> str:
    """Return a text.

    Raises ValueError if it holds half of a surrogate pair, which no file can hold, or a Unicode noncharacter, which no
    text may hold: the renderer marks places with these.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at character {error.start}: not valid text") from error
    if match := _NONCHARACTER.search(text):
        raise ValueError(f"the noncharacter {match[0]!r} at character {match.start()}: not valid text")
    return text


def is_empty(value: object) -> bool:
    """Return whether a value says nothing: None, '', or a list or mapping of such values alone."""
    if isinstance(value, Mapping):
        return all(is_empty(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(item) for item in value)
    return value is None or (isinstance(value, str) and not value)


def says_yes(value: object) -> bool:
    """Return whether a value is true or 1, as a number or in letters."""
    return _flag(value) == 1.0


def says_no(value: object) -> bool:
    """Return whether a value is false or 0, as a number or in letters."""
    return _flag(value) == 0.0


def _flag(value: Any) -> float | None:
    word = {"true": "1", "false": "0"}.get(value.strip().lower(), value) if isinstance(value, str) else value
    try:
        return float(word)
    except (TypeError, ValueError):
        return None


def show(value: object) -> str:
    """Return a value for an error message: its `repr` on one line, at most 60 characters."""
    text = " ".join(repr(value).splitlines())
    return text if len(text) <= 60 else text[:57] + "..."


def with_type(value: object) -> str:
    """Return a value for an error message, with the name of its type."""
    return f"{type(value).__name__} {show(value)}"
