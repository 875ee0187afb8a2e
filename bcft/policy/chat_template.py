"""Text to token ids, once, for training, rollouts and evaluation alike.

A prompt goes through the tokenizer's chat template where there is one (a plain string is a user message), else it is
plain text behind the tokenizer's BOS. A row is what the template renders: the prompt with its generation prompt, and
what the template writes behind that for the answer, up to and including the first stop token. The two are tokenized
apart, because a rollout never sees them merged. A conversation continues behind the very ids that were sampled.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from bcft.errors import DataError, UsageError
from bcft.policy.template import CONTENT, DATE, Template, as_messages
from bcft.policy.template_kwargs import NOT_TO_SET, kwargs_key
from bcft.policy.text_ids import TextIds
from bcft.types import Message, Prompt, messages

__all__ = ["DATE", "Renderer", "bos_at_head"]

_HEADS = ("<|im_start|>", "<|start_header_id|>", "<|begin_of_text|>", "<start_of_turn>", "[INST]", "<|user|>")
"""What templates of other models write before a user's message."""
_NO_TEMPLATE = "{} but the tokenizer has no chat template: set chat_template_path"
_RECENT = 4096
"""Rendered conversations that are remembered: more than are played at once."""
_Kwargs = Mapping[str, Any] | None


class Renderer:
    """One tokenizer with its template: prompts and completions as token ids.

    template_kwargs: arguments for the template, such as `enable_thinking`; a problem may add its own.
    Raises DataError when the template loses a message's text, emits no stop token after an assistant message, or cannot
    be rendered; UsageError for arguments that are not a recipe's to set.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int] = (), template_kwargs: _Kwargs = None) -> None:
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.chat = bool(tokenizer.chat_template)
        if taken := sorted(self.template_kwargs.keys() & NOT_TO_SET):
            raise UsageError(
                f"chat_template_kwargs: {', '.join(taken)}: set by the program, not by a recipe: remove it"
            )
        if self.template_kwargs and not self.chat:
            raise UsageError("chat_template_kwargs: the tokenizer has no chat template: set chat_template_path")
        self._recent: dict[tuple[Any, ...], str] = {}
        known = {*stop_ids, tokenizer.eos_token_id} - {None}
        self._text = TextIds(tokenizer, known)
        self._template = Template(tokenizer, self._text, self.template_kwargs) if self.chat else None
        if self._template and (unread := self._template.unread(self.template_kwargs)):
            raise UsageError(
                f"chat_template_kwargs: {', '.join(unread)}: the chat template has no such name: remove it"
            )
        self.tail_ids = self._find_tail(known)
        self.stop_ids: tuple[int, ...] = tuple(sorted(known | {self.tail_ids[-1]}))
        if self._template:
            self._template.stops = self.stop_texts
        self._lead, self._lead_ids, self._lead_space = self._find_lead()
        shortest = self.prompts(["?"])[0]
        self.bos_count = bos_at_head(shortest, tokenizer.bos_token_id)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of vocabulary, merges, template and its arguments: all that decides which ids a text becomes."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        arguments = f"\x1f{kwargs_key(self.template_kwargs)}" if self.template_kwargs else ""
        text = f"{parts}\x1f{tokenizer.chat_template}\x1f{self.stop_ids}{arguments}"
        return hashlib.sha256(text.encode()).hexdigest()

    # Text to ids
    def prompts(
        self, prompts: Sequence[Prompt], template_kwargs: Sequence[Mapping[str, Any]] | None = None
    ) -> list[list[int]]:
        """Return the ids of each prompt, ready for the policy to continue.

        template_kwargs: for each prompt, arguments of the template beside the renderer's own. Raises DataError when the
        template refuses the messages or loses the text of one.
        """
        given = template_kwargs or [{}] * len(prompts)
        return self._prompt_ids([self._context(p, kwargs) for p, kwargs in zip(prompts, given, strict=True)])

    def completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each completion, its stop token last, as they follow a prompt: the words alone."""
        bare = self._template.bare if self._template else ""
        return self._action_ids([bare] * len(texts), [self._ended(self._text.escape(text)) for text in texts])

    def texts(self, prompt: Prompt, answer: str | Message, template_kwargs: _Kwargs = None) -> tuple[str, str]:
        """Return a prompt and an answer as the template renders them, the answer with its stop token.

        Raises DataError when the row would not be what the template renders, or not what prompt and answer say.
        """
        context, said = self._context(prompt, template_kwargs), _message(answer)
        if self._template is None:
            if further := said.keys() - {"role", "content", "train"}:
                raise DataError(_NO_TEMPLATE.format(f"the completion has {sorted(further)[0]}"))
            return context, self._text.escape(said["content"])
        return context, self._template.answer(prompt, context, said, template_kwargs)

    def rows(self, texts: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Return the ids of prompts and answers that `texts` returned, each tokenized apart."""
        prompts, actions = [prompt for prompt, _ in texts], [action for _, action in texts]
        return list(zip(self._prompt_ids(prompts), self._action_ids(prompts, actions), strict=True))

    def _context(self, prompt: Prompt, template_kwargs: _Kwargs) -> str:
        if self._template is None:
            if (template_kwargs or {}).get("tools"):
                raise DataError(_NO_TEMPLATE.format("the row has tools"))
            return self._text.escape(_plain_text(prompt))
        return self._template.context(prompt, template_kwargs)

    def _ended(self, text: str) -> str:
        return text + self._template.tail if self._template else text

    def _prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        ids = self._text.ids(texts)
        return ids if self.chat else [self._plain_head() + part for part in ids]

    def _action_ids(self, contexts: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        ids = self._text.ids(texts, contexts)
        return ids if self.chat else [part + self.tail_ids for part in ids]

    # Conversations
    def continuation(
        self,
        before: Sequence[Message],
        action_ids: Sequence[int],
        observation: Prompt,
        *,
        template_kwargs: _Kwargs = None,
        said: str | Message | None = None,
        results: bool = False,
    ) -> tuple[list[int], bool]:
        """Return the ids that an observation adds behind an action, and False; or the whole next context, and True.

        before: all messages before the action; said: the action's text, if it is not to be read from its ids, or its
        message, if it has calls or a thought apart from the text. The whole context is rendered anew where the template
        changes earlier text (drops thoughts, say) or the action did not stop as the template ends a message. Whitespace
        that the template strips from the action itself changes nothing.
        A truncated action gets the end that it lacks.

        results: the observation is what tools returned. Then the ids so far always stay, as in TRL's GRPO, whatever the
        template makes of the same messages.
        """
        truncated = not action_ids or action_ids[-1] not in self.stop_ids
        if self._template is None:
            stop = self._text.special.get(self.tail_ids[-1], "")
            added = self._text.ids([self._text.escape(_plain_text(observation))], [stop])[0]
            return added if not truncated else self.tail_ids + added, False
        tail = self._template.tail
        raw = self._text.text(action_ids)  # as a template would have to render it
        body, stopped = raw.removesuffix(tail), raw.endswith(tail)
        ends = tuple(action_ids[-len(self.tail_ids) :]) == tuple(self.tail_ids)
        action = self.decode(action_ids[: -len(self.tail_ids)] if ends else action_ids)
        reply = _message(action if said is None else said)
        earlier = self._conversation(before, template_kwargs)
        whole = self._conversation([*before, reply, *messages(observation)], template_kwargs)
        if results:
            behind = self._template.behind(whole, before, reply, template_kwargs)
            stop = "" if truncated else self._text.special.get(action_ids[-1], "")
            text = tail + behind if truncated else behind.removeprefix(stop)  # some templates begin results with it
            return self._text.ids([text], [stop])[0], False
        rest = whole.removeprefix(earlier)
        # The action must be followed by its end: else the template has put something else in its place.
        texts = (self._text.escape(action), self._text.escape(action.strip()))
        apart = self._lead if self._lead_ids or self._lead_space else ""  # what `decode` took off
        forms = (*texts, body, body.strip(), *(apart + text for text in texts))
        shown = next((text for text in forms if rest.startswith(text + tail)), None)
        if whole.startswith(earlier) and shown is not None and (stopped or truncated):
            done = shown + tail if stopped else shown
            return self._text.ids([rest.removeprefix(done)], [earlier + done])[0], False
        return self._text.ids([whole])[0], True

    def _conversation(self, conversation: Sequence[Message], template_kwargs: _Kwargs) -> str:
        """Return messages as the policy is to answer them.

        The latest results are remembered: rendering takes time that grows with the number of messages, and each
        conversation is needed twice, after one turn and before the next.
        """
        said = [(m["role"], m["content"], repr(m) if len(m) > 2 else "") for m in conversation]
        key = (kwargs_key(template_kwargs), *said)
        if key not in self._recent:
            if len(self._recent) >= _RECENT:
                del self._recent[next(iter(self._recent))]
            self._recent[key] = self._context(conversation, template_kwargs)
        return self._recent[key]

    # Ids to text, and what people read
    def text(self, prompt: Prompt, template_kwargs: _Kwargs = None) -> str:
        """Return the prompt as the policy reads it, for people."""
        if self._template is None:
            return _plain_text(prompt)
        return self._template.render(as_messages(prompt), template_kwargs, generate=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an action, without its stop token and other special tokens.

        What the template writes before an answer is not the policy's where it is whitespace or has special tokens (a
        channel): the text is what follows it, the last such if there are several.
        """
        ids = _behind(list(ids), self._lead_ids)
        if self._text.seamless and not self._lead_space:
            known = [token for token in ids if token not in self._text.special]
            return str(self.tokenizer.decode(known, skip_special_tokens=True))
        return self._text.words(ids).removeprefix(self._lead_space)

    def words(self, said: Message, ids: Sequence[int]) -> str:
        """Return the text of an action; with tool calls that of its ids, which is what a policy would have said."""
        return self.decode(ids) if "tool_calls" in said else said["content"]

    @property
    def ends_calls(self) -> bool:
        """Whether a stop token follows a tool call. Raises DataError where the template renders none."""
        return self._template is not None and self._template.ends_calls

    @property
    def opening_text(self) -> str:
        """The letters of the generation prompt; '' where they might begin anybody's text."""
        return next(iter(self._template.marks[1]), "") if self._template else ""

    @cached_property
    def stop_texts(self) -> tuple[str, ...]:
        """The letters of the stop tokens."""
        tokens = self.tokenizer.added_tokens_decoder
        return tuple(tokens[i].content for i in self.stop_ids if i in tokens and tokens[i].content.strip())

    def rendered_mark(self, prompt: Prompt) -> str:
        """Return what shows that a prompt is already rendered by a template; '' if nothing does.

        It begins with a control token or with what this or a well-known template writes before a user's message, or it
        ends with the generation prompt or a stop token.
        """
        starts, ends = [*self._text.special.values()], [*self.stop_texts]
        if self._template:
            starts, ends = [*self._template.marks[0], *_HEADS], [*self._template.marks[1], *ends]
        conversation = as_messages(prompt)
        first, last = conversation[0]["content"].lstrip(), conversation[-1]["content"].rstrip()
        shown = [mark for mark in starts if first.startswith(mark)] + [mark for mark in ends if last.endswith(mark)]
        return shown[0] if shown else ""

    # What the template puts around an answer
    def _find_tail(self, known: set[int]) -> list[int]:
        """Return what follows an action, up to the first stop id; known: the stop ids known so far."""
        template = self._template
        if template is None:
            if self.tokenizer.eos_token_id is None:
                raise DataError("the tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
            return [self.tokenizer.eos_token_id]
        ids = self._text.ids([template.end], ["?"])[0]
        for position, token in enumerate(ids):
            if token in known or token in self._text.special:
                stop = self._text.special.get(token) or str(self.tokenizer.decode([token]))
                template.tail = template.end.partition(stop)[0] + stop
                return ids[: position + 1]
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        ending = next((f"eos_token: {token}, or " for token in added if token in template.end), "")
        raise DataError(
            "the chat template emits no stop token after an assistant message, so a policy trained with it would "
            f"never stop: it ends in {template.end!r}; set {ending}chat_template_path to a template that emits one"
        )

    def _find_lead(self) -> tuple[str, list[int], str]:
        """Return what the template writes between the generation prompt and an answer.

        Also its ids if there are special tokens among them, and the space before an answer's text that is not the
        policy's: the template's, or what the tokenizer puts behind a special token.
        """
        template = self._template
        if template is None or not template.answered.startswith(template.bare):
            return "", [], ""
        lead = template.answered.removeprefix(template.bare).partition(CONTENT)[0]
        ids, answer = self._text.ids([lead, f"{lead}x"], [template.bare] * 2)
        ids = ids if self._text.pattern.search(lead) else []
        space = self._text.words(_behind(answer, ids)).removesuffix("x")
        return lead, ids, space if space.isspace() else ""

    def _plain_head(self) -> list[int]:
        ids = list(self.tokenizer("", add_special_tokens=True)["input_ids"])
        return ids[:1] if ids[:1] == [self.tokenizer.bos_token_id] else []


def bos_at_head(ids: Sequence[int], bos_id: int | None) -> int:
    """Return how many BOS tokens stand at the head of a row: with some templates every message begins with one."""
    return next((position for position, token in enumerate(ids) if token != bos_id), len(ids))


def _behind(ids: list[int], lead: list[int]) -> list[int]:
    """Return the ids behind the last occurrence of a lead; all of them if there is none."""
    starts = range(len(ids) - len(lead), -1, -1) if lead else ()
    start = next((start for start in starts if ids[start : start + len(lead)] == lead), None)
    return ids if start is None else ids[start + len(lead) :]


def _message(answer: str | Message) -> Message:
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer


def _plain_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if [message["role"] for message in prompt] == ["user"]:  # the same as a string
        return prompt[0]["content"]
    raise DataError(_NO_TEMPLATE.format("the prompt is a list of messages"))
