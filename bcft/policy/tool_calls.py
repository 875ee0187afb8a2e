"""Tool calls as a policy writes them, read from its tokens by the response template that belongs to a chat template.

Messages are those that TRL's `parse_response` gives. It takes a malformed call for plain text; here it is known, with
the reason, so that the policy can be told.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from bcft.errors import DataError, UsageError
from bcft.policy.chat_template import Renderer
from bcft.policy.template import END_OF_CALL
from bcft.types import Message, messages
from bcft.types.calls import tool_calls

_REMEDY = (
    "set chat_template_path to one that does, such as that of Qwen2.5, Qwen3, Llama 3.1 or 3.2, or give "
    "tokenizer_config.json a response_template"
)
_LONGEST = 300
"""Characters of a reason."""


@dataclass(frozen=True)
class Said:
    """What an action says."""

    message: Message
    """With the calls, and with the thought where it is apart."""
    fault: Message | None = None
    """What the policy reads about a malformed call; None if there is none."""


class CallReader:
    """Reads the actions of one policy."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._tokenizer = renderer.tokenizer

    def check(self) -> None:
        """Raise UsageError unless the chat template renders calls and results, and its calls can be read."""
        if self._refused:
            raise UsageError(f"environment: it has tools, {self._refused}")

    def read(self, context_ids: Sequence[int], ids: Sequence[int], tools: Sequence[dict[str, Any]]) -> Said:
        """Return what an action says behind a context; tools: the schemas that its arguments are cast by."""
        plain: Message = {"role": "assistant", "content": self._renderer.decode(ids)}
        if not ids:
            return Said(plain)
        try:
            parsed = self._tokenizer.parse_response(
                list(ids), schema=self._response_template, prefix=list(context_ids), tools=list(tools)
            )
            calls = [_as_text(call) for call in parsed.get("tool_calls") or ()]
            tool_calls(calls)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            return Said(plain, self._fault(error))
        content = str(parsed.get("content") or "").removesuffix(self._tokenizer.eos_token or "")
        thought = next((parsed[key] for key in ("reasoning_content", "thinking") if parsed.get(key)), "")
        message: Any = {**plain, "content": content, "reasoning_content": thought, "tool_calls": calls}
        try:
            return Said(messages([message])[0])
        except ValueError:  # what no file may hold: then it is text alone
            return Said(plain)

    @cached_property
    def _refused(self) -> str:
        from trl.chat_template_utils import supports_tool_calling  # noqa: PLC0415 - seconds, and few need it

        if not supports_tool_calling(self._tokenizer):
            return f"and the chat template renders no tool calls: {_REMEDY}"
        if not self._response_template:
            return f"and how the chat template writes calls is not known: {_REMEDY}"
        return "" if self._renderer.ends_calls else f"and the chat template ends a call in no stop token: {END_OF_CALL}"

    @cached_property
    def _response_template(self) -> Any:
        # An attribute of the tokenizers that have one; set there, TRL's own would be saved with every model.
        if own := getattr(self._tokenizer, "response_template", None):
            return own
        from trl.chat_template_utils import add_response_schema  # noqa: PLC0415 - see above

        try:
            return add_response_schema(SimpleNamespace(chat_template=self._tokenizer.chat_template)).response_template
        except ValueError:  # no template that TRL knows
            return None

    def _fault(self, error: Exception) -> Message:
        reason = " ".join(str(error.__cause__ or error).removeprefix("tool_calls: ").split())[:_LONGEST]
        return {"role": self._fault_role, "content": str({"error": f"Malformed tool call: {reason}"})}

    @cached_property
    def _fault_role(self) -> str:
        """`tool`, or `user` where the template has a tool's result behind a call alone."""
        asked: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}]
        try:
            self._renderer.prompts([[*asked, {"role": "tool", "content": "?"}]])
        except DataError:
            return "user"
        return "tool"


def _as_text(call: Any) -> Any:
    """Return a call with its arguments as JSON text, in which a null stays."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}
