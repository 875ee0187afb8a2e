"""The arguments of a chat template that a recipe or a row may set."""

from collections.abc import Mapping
from typing import Any

from bcft.errors import DataError
from bcft.types import show

NOT_TO_SET = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "sanitize_control_tokens", "continue_final_message", "strftime_now"),
        *("bos_token", "eos_token", "pad_token", "unk_token"),
    }
)
"""Arguments of `apply_chat_template` that decide what a row is, and are not a recipe's."""


def checked_kwargs(template_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a problem's arguments for the template. Raises DataError for those that are not a row's to set."""
    if not template_kwargs:
        return {}
    if not isinstance(template_kwargs, Mapping):
        raise DataError(f"chat_template_kwargs: expected names and values, not {show(template_kwargs)}")
    set_by_row = {"tools"} if isinstance(template_kwargs.get("tools"), list) else set()  # it has a column of its own
    if taken := sorted(template_kwargs.keys() & NOT_TO_SET - set_by_row):
        raise DataError(f"chat_template_kwargs: {', '.join(taken)}: set by the program, not by a row: remove it")
    # A table's rows all have the same names: None stands for a name that the row does not have.
    return {name: value for name, value in template_kwargs.items() if value is not None}


def kwargs_key(template_kwargs: Mapping[str, Any] | None) -> str:
    """Return arguments for the template as text, the same for equal ones."""
    return repr(sorted(checked_kwargs(template_kwargs).items())) if template_kwargs else ""
