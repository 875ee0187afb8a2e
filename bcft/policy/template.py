"""What a chat template makes of messages, as text, and whether it is what the messages say.

A template may put text of its own before an answer (a channel, an empty thought), end it in its own way, rewrite
earlier messages or drop what it does not know. What belongs to a row is kept; what would be lost is refused by name.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import cached_property
from typing import Any, cast

from jinja2 import TemplateError

from bcft.errors import DataError
from bcft.policy.template_kwargs import checked_kwargs, kwargs_key
from bcft.policy.text_ids import BREAK, TextIds
from bcft.types import Message, Prompt, show
from bcft.types.calls import ToolCall, texts, tool_name
from bcft.types.text import THOUGHT

DATE = "26 Jul 2024"
"""Llama-3 templates print today's date. This is the one they fall back to, so that prompts never change overnight."""
_DAY = date(2024, 7, 26)
"""The same, for templates that ask for it in a form of their own."""

CONTENT = "\ufdd1"
"""Stands for a message's text in a rendering; a Unicode noncharacter."""
_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError)
"""What a template raises for messages that it is not made for."""
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_SWITCH = re.compile(r"/(?:no_)?think\b")
"""Words in a message that some templates obey and take out."""
_TEXT_TEMPLATE = "set chat_template_path to a template that takes messages of text"
_THOUGHT_KEYS = (THOUGHT, "thinking", "reasoning")
"""What templates call a thought that is apart from the content."""
_TOOLS = "set chat_template_path to a template that does"
END_OF_CALL = "add what ends a call to eos_token_id in the model's generation_config.json"
"""What to do about a template that ends calls in a token that is no stop token."""
_RECENT = 256
"""Generation prompts that are remembered: rows may all have tools of their own."""


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
        self.stops: tuple[str, ...] = ()
        """The letters of all stop tokens: some templates end a tool call with another one."""

    def context(self, prompt: Prompt, template_kwargs: Mapping[str, Any] | None = None) -> str:
        """Return the prompt as the policy reads it.

        Raises DataError when the template refuses the messages, or loses the text of one, a call or a tool.
        """
        given = as_messages(prompt, escape=self._escape)
        shown = self.render(given, template_kwargs, generate=True)
        for tool in (template_kwargs or {}).get("tools", ()):
            if not _holds(shown, tool_name(tool)):
                raise DataError(f"tools: the chat template does not render {tool_name(tool)!r}: {_TOOLS}")
        for message in given:
            if "tool_calls" in message:
                self._require_calls()
            if message["role"] != "assistant" and not _holds(shown, message["content"]):
                raise DataError(
                    f"the chat template does not render the {message['role']}'s text {_plain(message['content'])}: set "
                    f"chat_template_path to a template that does"
                )
        return shown

    def answer(
        self, prompt: Prompt, context: str, said: Message, template_kwargs: Mapping[str, Any] | None = None
    ) -> str:
        """Return what the template writes behind a context for an answer, up to and including its stop token.

        context: of the same prompt, as `context` returns it; said: the assistant's message. Raises DataError when the
        template rewrites the context, loses a part of the answer, or writes a tag of the answer's once more.
        """
        (written,) = as_messages([said], escape=self._escape)
        whole = self.render([*as_messages(prompt, escape=self._escape), written], template_kwargs, generate=False)
        if not whole.startswith(context):
            at = _alike(whole, context)
            remedies = [*self._switch(), "set another chat_template_path"]
            thinks = "</think>" in said["content"] or THOUGHT in said
            remedies += [] if thinks else ["give completions that carry their thought"]
            raise DataError(
                f"the generation prompt is not a prefix of the rendering: it has {context[at:][:40]!r} where the "
                f"rendering has {whole[at:][:40]!r}: {', or '.join(remedies)}"
            )
        body, tail = whole.removeprefix(context), self.tail
        stop = next((stop for stop in self.stops if body.rstrip().endswith(stop)), "")
        if self.end and body.endswith(self.end):
            body = body.removesuffix(self.end)
        elif self.tail and self.tail in body:
            body = body.rpartition(self.tail)[0]
        elif "tool_calls" in said and stop:
            body, tail = body.rstrip().removesuffix(stop), stop
        else:
            remedy = f": leave rows with tool calls out, or {END_OF_CALL}" if "tool_calls" in said else ""
            raise DataError(
                f"the chat template emits no stop token after this completion: it ends in {_plain(body[-40:])}{remedy}"
            )
        self._check_parts(body, written)
        if "tool_calls" not in said:
            self._check_content(body, written["content"], template_kwargs)
        return body + tail

    def behind(
        self,
        whole: str,
        before: Sequence[Message],
        reply: Message,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return what a conversation has behind the stop token of a reply in it.

        whole: as `context` returns it; before: the messages before the reply. Raises DataError without a stop token.
        """
        given = as_messages([*before, reply], escape=self._escape)
        closed = self.render(given, template_kwargs, generate=False)
        if whole.startswith(closed):
            bare = closed.rstrip()
            return whole.removeprefix(bare if bare.endswith(self.stops) else closed)
        # The template writes its last message in another way: the reply's stop token is the one after all before it.
        earlier = self.render(given[:-1], template_kwargs, generate=False)
        stop = re.compile("|".join(map(re.escape, self.stops)))
        ends = [match.end() for match in stop.finditer(whole)][len(stop.findall(earlier)) :]
        if not ends:
            raise DataError(f"the chat template writes no stop token before a tool's result: {_TOOLS}")
        return whole[ends[0] :]

    def _check_parts(self, body: str, written: Message) -> None:
        """Raise DataError unless a rendering holds an answer's thought and, where there are calls, all its parts."""
        thought = written.get(THOUGHT, "")
        if not _holds(body, thought):
            raise DataError(
                f"the chat template does not render the thought {_plain(thought)}: write it into content as the "
                f"template does, such as <think>…</think> before the answer, or remove {THOUGHT}"
            )
        if "tool_calls" not in written:
            return
        self._require_calls()
        called = [call["function"] for call in written["tool_calls"]]
        stated = [text for one in called for text in (one["name"], *texts(one["arguments"]))]
        for text in [written["content"], *stated]:
            if not _holds(body, text):
                raise DataError(
                    f"the chat template drops {_plain(text)} of a message with tool calls, which ends in "
                    f"{_plain(body[-40:])}: take it off, or set chat_template_path to a template that renders it"
                )

    def _require_calls(self) -> None:
        if self._call_refused:
            raise DataError(f"the chat template renders no tool calls{self._call_refused}: {_TOOLS}")

    @cached_property
    def _call_refused(self) -> str:
        """'' if the template renders a tool call; else why not, behind a colon if there is a reason."""
        try:
            return "" if CONTENT in self._rendered_call() else ", and would drop them"
        except DataError as error:
            return f": {error}"

    @cached_property
    def ends_calls(self) -> bool:
        """Whether a stop token follows a call: without one, a policy that calls a tool is sampled on and on."""
        end = self._rendered_call().rpartition(CONTENT)[2]
        return any(stop in end for stop in self.stops)

    def _rendered_call(self) -> str:
        """Return a question and a call of the tool `CONTENT`. Raises DataError as `render` does."""
        call = ToolCall(type="function", function={"name": CONTENT, "arguments": {}}, id="call00000")
        said: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        return self.render([{"role": "user", "content": "?"}, said], generate=False)

    def _check_content(self, body: str, written: str, template_kwargs: Mapping[str, Any] | None) -> None:
        """Raise DataError unless an answer stands at the end of its rendering, with no tag of its own before it."""
        before = self.generation_prompt(template_kwargs)
        shown = next((text for text in (written, written.strip()) if body.endswith(text)), None)
        if shown is not None:
            lead = before + body.removesuffix(shown)
        else:  # the generation prompt may hold the beginning of the answer, such as `<think>`
            whole, part = _squash(before + body), _squash(written)
            if not whole.endswith(part):
                raise DataError(
                    f"the chat template drops a part of the completion {_plain(written)}: it ends in "
                    f"{_plain(body[-40:])}: take that part off, or set chat_template_path to a template that renders it"
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
            if len(self._generation) >= _RECENT:
                del self._generation[next(iter(self._generation))]
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
            if "tools" in unread:
                raise DataError(f"tools: the chat template has no place for them: {_TOOLS}, or remove the column")
            raise DataError(f"chat_template_kwargs: {', '.join(unread)}: the chat template has no such name: remove it")
        kwargs = self._kwargs | own
        if "tools" in own:
            kwargs["tools"] = _escaped(own["tools"], self._escape)
        if self._dated is not None:
            kwargs["chat_template"] = self._dated
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [self._as_read(message) for message in given],
                    tokenize=False,
                    add_generation_prompt=generate,
                    **kwargs,
                )
            )
        except _ERRORS as error:
            roles = " ".join(message["role"] for message in given)
            remedy = ""
            if given[0]["role"] == "system" and len(given) > 1 and self._takes(given[1:], template_kwargs):
                remedy = ": it takes no system message here: write it into the user's, or remove system_prompt"
            raise DataError(f"the chat template refuses the messages ({roles}): {_one_line(error)}{remedy}") from error

    def _takes(self, given: Sequence[Message], template_kwargs: Mapping[str, Any] | None) -> bool:
        try:
            self.render(given, template_kwargs, generate=True)
        except DataError:
            return False
        return True

    def _as_read(self, message: Message) -> dict[str, Any]:
        """Return a message under the keys that the template reads."""
        read = {key: value for key, value in message.items() if key not in ("train", THOUGHT)}
        return read | ({self._thought_key: message[THOUGHT]} if THOUGHT in message else {})

    @cached_property
    def _thought_key(self) -> str:
        """What the template calls a thought apart from the content; if it knows none, what most of them call it."""
        for key in _THOUGHT_KEYS:
            said = {"role": "assistant", "content": "?", key: CONTENT}
            asked = [{"role": "user", "content": "?"}, said]
            # Some templates refuse messages of this form; another key may do.
            with suppress(*_ERRORS):
                if CONTENT in self._tokenizer.apply_chat_template(asked, tokenize=False, **self._kwargs):
                    return key
        return THOUGHT

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


def as_messages(prompt: Prompt, *, escape: Callable[[str], str] = str) -> list[Message]:
    """Return a prompt as messages, their texts passed through `escape`, those of calls as well."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": escape(prompt)}]
    read = [{k: v if k == "role" else _escaped(v, escape) for k, v in message.items()} for message in prompt]
    return cast(list[Message], read)


def _escaped(value: Any, escape: Callable[[str], str]) -> Any:
    """Return a value of JSON with its texts passed through `escape`, the keys of its objects as well."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Mapping):
        return {escape(key): _escaped(item, escape) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item, escape) for item in value]
    return value


def _holds(shown: str, text: str) -> bool:
    """Return whether a rendering has a text: as it is, stripped, as JSON or Python, or without thinking switches."""
    if text in shown:
        return True
    whole, bare = _squash(shown), text.strip()
    forms = (text, *(json.dumps(bare, ensure_ascii=ascii)[1:-1] for ascii in (False, True)), repr(bare)[1:-1])
    return any(_squash(form) in whole for form in forms)


def _squash(text: str) -> str:
    return "".join(_SWITCH.sub("", text).split()).casefold()


def _plain(text: str) -> str:
    return show(text.replace(BREAK, ""))


def _alike(left: str, right: str) -> int:
    """Return how many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
