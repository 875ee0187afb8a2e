"""Plain values of a row: whether they say something, whether they are valid text, and how an error shows them."""

import re
from collections.abc import Mapping
from typing import Any

_NONCHARACTER = re.compile("[\ufdd0-\ufdef]")


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
