"""Text to token ids, once, for training, rollouts and evaluation alike.

A prompt goes through the tokenizer's chat template where there is one (a plain string is a user message), else it is
plain text behind the tokenizer's BOS. A completion is tokenized apart from its prompt, because a rollout never sees
the two merged, and ends with what the template emits after an assistant message, up to and including the first stop
id. A conversation continues behind the very ids that were sampled.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from bcft.errors import DataError
from bcft.types import Message, Prompt, messages

DATE = "26 Jul 2024"
"""Llama-3 templates print today's date. This is the one they fall back to, so that prompts never change overnight."""

# Unicode noncharacters, which interchanged text must not contain: they mark places in rendered text.
_BREAK = "\ufdd0"
_CONTENT = "\ufdd1"
_RECENT = 4096
"""Rendered conversations that are remembered: more than are played at once."""


class Renderer:
    """One tokenizer with its template: prompts and completions as token ids.

    Raises DataError when the template emits no stop token after an assistant message, or cannot be rendered.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._recent: dict[tuple[tuple[str, str], ...], str] = {}
        self.chat = bool(tokenizer.chat_template)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(re.escape(s) for s in sorted(special, key=len, reverse=True)) or r"(?!)")
        known = {*stop_ids, tokenizer.eos_token_id} - {None}
        self.tail_ids = self._tail(known)
        self.stop_ids: tuple[int, ...] = tuple(sorted(known | {self.tail_ids[-1]}))
        shortest = self.prompts(["?"])[0]
        self.bos_count = shortest.count(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else 0

    @cached_property
    def fingerprint(self) -> str:
        """A hash of vocabulary, merges and template: all that decides which ids a text becomes."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        return hashlib.sha256(f"{parts}\x1f{tokenizer.chat_template}\x1f{self.stop_ids}".encode()).hexdigest()

    def prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the ids of each prompt, ready for the policy to continue."""
        if self.chat:
            return self._tokenize([self._render(_messages(p, escape=self._escape), generate=True) for p in prompts])
        head = self._plain_head()
        return [head + ids for ids in self._tokenize([self._escape(_plain_text(p)) for p in prompts])]

    def completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each completion, its stop token last."""
        return [ids + self.tail_ids for ids in self._tokenize([self._escape(text) for text in texts])]

    def continuation(
        self, before: Sequence[Message], action_ids: Sequence[int], observation: Prompt
    ) -> tuple[list[int], bool]:
        """Return the ids that an observation adds behind an action, and False; or the whole next context, and True.

        before: all messages before the action. The whole context is rendered anew where the template changes earlier
        text (drops thoughts, say) or the action did not stop as the template ends a message. Whitespace that the
        template strips from the action itself changes nothing. A truncated action gets the end that it lacks.
        """
        tail = len(self.tail_ids)
        stopped = tuple(action_ids[-tail:]) == tuple(self.tail_ids)
        truncated = not action_ids or action_ids[-1] not in self.stop_ids
        if not self.chat:
            added = self._tokenize([self._escape(_plain_text(observation))])[0]
            return added if not truncated else self.tail_ids + added, False
        action = self.decode(action_ids[:-tail] if stopped else action_ids)
        conversation: list[Message] = [*before, {"role": "assistant", "content": action}, *messages(observation)]
        earlier, whole = (self._conversation(part) for part in (before, conversation))
        action = self._escape(action)
        rest = whole.removeprefix(earlier)
        shown = next((text for text in (action, action.strip()) if rest.startswith(text)), None)
        if whole.startswith(earlier) and shown is not None and (stopped or truncated):
            added = self._tokenize([rest.removeprefix(shown)])[0]
            # The action must be followed by its end: else the template has put something else in its place.
            if added[:tail] == self.tail_ids:
                return added[tail:] if stopped else added, False
        return self._tokenize([whole])[0], True

    def _conversation(self, conversation: Sequence[Message]) -> str:
        """Return messages as the policy is to answer them.

        The latest results are remembered: rendering takes time that grows with the number of messages, and each
        conversation is needed twice, after one turn and before the next.
        """
        key = tuple((message["role"], message["content"]) for message in conversation)
        if key not in self._recent:
            if len(self._recent) >= _RECENT:
                del self._recent[next(iter(self._recent))]
            self._recent[key] = self._render(_messages(conversation, escape=self._escape), generate=True)
        return self._recent[key]

    def text(self, prompt: Prompt) -> str:
        """Return the prompt as the policy reads it, for people."""
        return self._render(_messages(prompt), generate=True) if self.chat else _plain_text(prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an action, without its stop token and other special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _escape(self, text: str) -> str:
        """Break control tokens in data, so that `<|eot_id|>` in a problem is only text."""
        return self._special.sub(lambda match: match[0][0] + _BREAK + match[0][1:], text)

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        pieces = [text.split(_BREAK) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        if not flat:
            return []
        ids = iter(self.tokenizer(flat, add_special_tokens=False)["input_ids"])
        return [[token for _ in parts for token in next(ids)] for parts in pieces]

    def _render(self, messages: Sequence[Message], *, generate: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=generate, date_string=DATE
                )
            )
        except (TemplateError, TypeError) as error:
            roles = " ".join(message["role"] for message in messages)
            raise DataError(f"the chat template refuses the messages ({roles}): {error}") from error

    def _plain_head(self) -> list[int]:
        ids = list(self.tokenizer("", add_special_tokens=True)["input_ids"])
        return ids[:1] if ids[:1] == [self.tokenizer.bos_token_id] else []

    def _tail(self, known: set[int]) -> list[int]:
        """Return what follows an action, up to the first stop id; known: the stop ids known so far."""
        if not self.chat:
            if self.tokenizer.eos_token_id is None:
                raise DataError("the tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
            return [self.tokenizer.eos_token_id]
        messages: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _CONTENT}]
        end = self._render(messages, generate=False).rpartition(_CONTENT)[2]
        ids = self._tokenize([end])[0]
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        for position, token in enumerate(ids):
            if token in known | special:
                return ids[: position + 1]
        raise DataError(
            "the chat template emits no stop token after an assistant message, so a policy trained with it would "
            f"never stop: it ends in {end!r}; set chat_template_path to a template that emits one"
        )


def _messages(prompt: Prompt, *, escape: Callable[[str], str] = str) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": escape(prompt)}]
    return [{"role": message["role"], "content": escape(message["content"])} for message in prompt]


def _plain_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if [message["role"] for message in prompt] == ["user"]:  # the same as a string
        return prompt[0]["content"]
    raise DataError("the prompt is a list of messages but the tokenizer has no chat template: set chat_template_path")
