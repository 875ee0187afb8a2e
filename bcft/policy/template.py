"""What a chat template makes of messages, as text, and whether it is what the messages say.

A template may put text of its own before an answer (a channel, an empty thought), end it in its own way, rewrite
earlier messages or drop what it does not know. What belongs to a row is kept; what would be lost is refused by name.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from bcft.errors import DataError
from bcft.policy.text_ids import BREAK, TextIds
from bcft.types import Message, Prompt, show

DATE = "26 Jul 2024"
"""Llama-3 templates print today's date. This is the one they fall back to, so that prompts never change overnight."""
_DAY = date(2024, 7, 26)
"""The same, for templates that ask for it in a form of their own."""

CONTENT = "\ufdd1"
"""Stands for a message's text in a rendering; a Unicode noncharacter."""
NOT_TO_SET = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "sanitize_control_tokens", "continue_final_message", "strftime_now"),
        *("bos_token", "eos_token", "pad_token", "unk_token"),
    }
)
"""Arguments of `apply_chat_template` that decide what a row is, and are not a recipe's."""
_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError)
"""What a template raises for messages that it is not made for."""
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_SWITCH = re.compile(r"/(?:no_)?think\b")
"""Words in a message that some templates obey and take out."""
_TEXT_TEMPLATE = "set chat_template_path to a template that takes messages of text"


class Template:
    """A tokenizer's chat template: messages to text. Control tokens in the messages are broken.

    Raises DataError when it loses a message's text or cannot be rendered.
    """

    def __init__(self, tokenizer: Any, text: TextIds, template_kwargs: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._escape, self._special = text.escape, text.pattern
        self._kwargs = {"date_string": DATE} | dict(template_kwargs)
        self._generation: dict[str, str] = {}
        self._source = _source(tokenizer)
        self._dated = _with_date(self._source)
        self.bare, self.answered = self._try_out()
        self.end = self.answered.rpartition(CONTENT)[2]
        """What it writes after an answer."""
        self.tail = self.end
        """The part of it that ends with the stop token."""

    def context(self, prompt: Prompt, template_kwargs: Mapping[str, Any] | None = None) -> str:
        """Return the prompt as the policy reads it.

        Raises DataError when the template refuses the messages or loses the text of one.
        """
        given = as_messages(prompt, escape=self._escape)
        shown = self.render(given, template_kwargs, generate=True)
        for message in given:
            if message["role"] != "assistant" and not _holds(shown, message["content"]):
                raise DataError(
                    f"the chat template does not render the {message['role']}'s text {_plain(message['content'])}: set "
                    f"chat_template_path to a template that does"
                )
        return shown

    def answer(
        self, prompt: Prompt, context: str, content: str, template_kwargs: Mapping[str, Any] | None = None
    ) -> str:
        """Return what the template writes behind a context for an answer, up to and including its stop token.

        context: of the same prompt, as `context` returns it. Raises DataError when the template rewrites the context,
        loses a part of the answer, or writes a tag of the answer's once more.
        """
        written = self._escape(content)
        given = [*as_messages(prompt, escape=self._escape), Message(role="assistant", content=written)]
        whole = self.render(given, template_kwargs, generate=False)
        if not whole.startswith(context):
            at = _alike(whole, context)
            remedies = [*self._switch(), "set another chat_template_path"]
            remedies += [] if "</think>" in content else ["give completions that carry their thought"]
            raise DataError(
                f"the generation prompt is not a prefix of the rendering: it has {context[at:][:40]!r} where the "
                f"rendering has {whole[at:][:40]!r}: {', or '.join(remedies)}"
            )
        body = whole.removeprefix(context)
        if self.end and body.endswith(self.end):
            body = body.removesuffix(self.end)
        elif self.tail and self.tail in body:
            body = body.rpartition(self.tail)[0]
        else:
            raise DataError(f"the chat template emits no stop token after this completion: it ends in {body[-40:]!r}")
        self._check_answer(body, written, template_kwargs)
        return body + self.tail

    def _check_answer(self, body: str, written: str, template_kwargs: Mapping[str, Any] | None) -> None:
        """Raise DataError unless an answer stands at the end of its rendering, with no tag of its own before it."""
        before = self.generation_prompt(template_kwargs)
        shown = next((text for text in (written, written.strip()) if body.endswith(text)), None)
        if shown is not None:
            lead = before + body.removesuffix(shown)
        else:  # the generation prompt may hold the beginning of the answer, such as `<think>`
            whole, part = _squash(before + body), _squash(written)
            if not whole.endswith(part):
                raise DataError(
                    f"the chat template drops a part of the completion {_plain(written)}: it ends in {body[-40:]!r}: "
                    f"take that part off, or set chat_template_path to a template that renders it"
                )
            lead = whole.removesuffix(part)
        # A broken control token is only text, except at the beginning: there the answer seems to be rendered already.
        opening = _TAG.match(written.replace(BREAK, "").lstrip())
        for tag in (*([opening[0]] if opening else []), *_TAG.findall(written)):
            if tag in lead and self._special.match(tag):
                raise DataError(
                    f"the completion begins with {tag}, as if a template had rendered it already: set special_tokens: "
                    f"strip, or take it off"
                )
            if tag in lead:
                remedies = ["take it off the completion", *self._switch(), "set another chat_template_path"]
                raise DataError(
                    f"the completion has a {tag} of its own, and the chat template writes one before it: "
                    f"{', or '.join(remedies)}"
                )

    def _switch(self) -> list[str]:
        """Return the remedy that switches thoughts on or off, if the template has it."""
        return [] if self.unread(["enable_thinking"]) else ["set chat_template_kwargs (such as enable_thinking)"]

    def unread(self, names: Iterable[str]) -> list[str]:
        """Return the names that the template's text does not hold: as arguments they would have no effect."""
        return [name for name in names if not re.search(rf"\b{re.escape(name)}\b", self._source)]

    def generation_prompt(self, template_kwargs: Mapping[str, Any] | None = None) -> str:
        """Return what the template writes after a user's message for the policy to continue."""
        key = kwargs_key(template_kwargs)
        if key not in self._generation:
            asked: list[Message] = [{"role": "user", "content": "?"}]
            with_prompt, without = (self.render(asked, template_kwargs, generate=g) for g in (True, False))
            self._generation[key] = with_prompt[_alike(with_prompt, without) :]
        return self._generation[key]

    @cached_property
    def marks(self) -> tuple[list[str], list[str]]:
        """What shows that a prompt is already rendered: how it would begin, and how it would end."""
        head = self.render([{"role": "user", "content": CONTENT}], None, generate=True).partition(CONTENT)[0]
        starts = sorted(set(self._special.findall(self.bare)))
        spoken = head.removeprefix(self._tokenizer.bos_token or "").strip()
        # `<|user|>` or `[INST]` may be no tokens of their own; plain words might begin anybody's prompt.
        if len(spoken) > 2 and not spoken.isalnum() and not self._special.search(spoken):
            starts.append(spoken)
        end = self.generation_prompt().strip()
        return starts, [end] if len(end) > 2 and not end.isalnum() else []

    def render(
        self, given: Sequence[Message], template_kwargs: Mapping[str, Any] | None = None, *, generate: bool
    ) -> str:
        """Return messages as the template renders them; generate: with the generation prompt.

        Raises DataError of one line for messages that the template refuses.
        """
        own = checked_kwargs(template_kwargs)
        if unread := self.unread(own):
            raise DataError(f"chat_template_kwargs: {', '.join(unread)}: the chat template has no such name: remove it")
        kwargs = self._kwargs | own
        if self._dated is not None:
            kwargs["chat_template"] = self._dated
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(given), tokenize=False, add_generation_prompt=generate, **kwargs
                )
            )
        except _ERRORS as error:
            roles = " ".join(message["role"] for message in given)
            raise DataError(f"the chat template refuses the messages ({roles}): {_one_line(error)}") from error

    def _try_out(self) -> tuple[str, str]:
        """Return a bare prompt, and a rendering of the same with an answer, `CONTENT`."""
        asked: list[Message] = [{"role": "user", "content": "?"}]
        try:
            bare = self.render(asked, generate=True)
            question = self.render([{"role": "user", "content": CONTENT}], generate=True)
            answered = self.render([*asked, {"role": "assistant", "content": CONTENT}], generate=False)
        except DataError as error:
            raise DataError(f"{error}: {_TEXT_TEMPLATE}") from error
        for role, shown in (("user", question), ("assistant", answered)):
            if CONTENT not in shown:
                raise DataError(
                    f"the chat template loses the text of the {role}'s messages, as templates of vision models do that "
                    f"read lists of parts: {_TEXT_TEMPLATE}"
                )
        return bare, answered


def _source(tokenizer: Any) -> str:
    """Return the text of the template. Raises DataError if there are several, and none is the default."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError(f"{_one_line(error)}: set chat_template_path") from error


def _with_date(template: str) -> str | None:
    """Return the template with a `strftime_now` that always says `DATE`; None if it does not ask for the date."""
    if "strftime_now" not in template:
        return None
    forms = {form: _DAY.strftime(form) for form in re.findall(r"""strftime_now\(\s*["']([^"']*)["']""", template)}
    dates = json.dumps(forms, ensure_ascii=False)
    pinned = f"{{%- macro strftime_now(form) -%}}{{{{- {dates}.get(form, '{DATE}') -}}}}{{%- endmacro -%}}"
    return pinned + "{{ '' }}" + template  # behind a block, the template's first line break would be lost


def checked_kwargs(template_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a problem's arguments for the template. Raises DataError for those that are not a row's to set."""
    if not template_kwargs:
        return {}
    if not isinstance(template_kwargs, Mapping):
        raise DataError(f"chat_template_kwargs: expected names and values, not {show(template_kwargs)}")
    if taken := sorted(template_kwargs.keys() & NOT_TO_SET):
        raise DataError(f"chat_template_kwargs: {', '.join(taken)}: set by the program, not by a row: remove it")
    # A table's rows all have the same names: None stands for a name that the row does not have.
    return {name: value for name, value in template_kwargs.items() if value is not None}


def kwargs_key(template_kwargs: Mapping[str, Any] | None) -> str:
    """Return arguments for the template as text, the same for equal ones."""
    return repr(sorted(checked_kwargs(template_kwargs).items())) if template_kwargs else ""


def as_messages(prompt: Prompt, *, escape: Callable[[str], str] = str) -> list[Message]:
    """Return a prompt as messages, their texts passed through `escape`."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": escape(prompt)}]
    return [{"role": message["role"], "content": escape(message["content"])} for message in prompt]


def _holds(shown: str, text: str) -> bool:
    """Return whether a rendering has a message's text: as it is, stripped, as JSON, or without thinking switches."""
    if text in shown:
        return True
    whole = _squash(shown)
    return any(_squash(form) in whole for form in (text, json.dumps(text.strip(), ensure_ascii=False)[1:-1]))


def _squash(text: str) -> str:
    return "".join(_SWITCH.sub("", text).split()).casefold()


def _plain(text: str) -> str:
    return show(text.replace(BREAK, ""))


def _alike(left: str, right: str) -> int:
    """Return how many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
