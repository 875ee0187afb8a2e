"""Text to token ids, once, for training, rollouts and evaluation alike.

A prompt goes through the tokenizer's chat template where there is one (a plain string is a user message),
else it is plain text behind the tokenizer's BOS. A completion is tokenised apart from its prompt, because a
rollout never sees the two merged, and ends with what the template emits after an assistant message, up to
and including the first stop id. A conversation goes on behind the very ids that were sampled.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from bcft.errors import DataError
from bcft.types import Message, Prompt, messages

DATE = "26 Jul 2024"
"""Llama-3 templates print today's date; this is the one they fall back to, so prompts never change overnight."""

# Unicode noncharacters, which no interchanged text may hold: they mark places in rendered text.
_BREAK = "\ufdd0"
_CONTENT = "\ufdd1"
_RECENT = 4096
"""Conversations kept as rendered: more than are played at once."""


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
        probe = self.prompts(["?"])[0]
        self.bos_count = probe.count(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else 0

    @cached_property
    def fingerprint(self) -> str:
        """A hash of vocabulary, merges and template: what decides which ids a text becomes."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        return hashlib.sha256(f"{parts}\x1f{tokenizer.chat_template}\x1f{self.stop_ids}".encode()).hexdigest()

    def prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the ids of each prompt, ready to be continued by the policy."""
        if self.chat:
            return self._tokenise([self._render(_messages(p, escape=self._escape), generate=True) for p in prompts])
        head = self._plain_head()
        return [head + ids for ids in self._tokenise([self._escape(_plain_text(p)) for p in prompts])]

    def completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each completion, its stop token last."""
        return [ids + self.tail_ids for ids in self._tokenise([self._escape(text) for text in texts])]

    def continuation(
        self, history: Sequence[Message], action_ids: Sequence[int], observation: Prompt
    ) -> tuple[list[int], bool]:
        """Return the ids that an observation adds behind an action, and False; or the whole next context, and True.

        history: all messages before the action. The whole is rendered anew where the template changes earlier text
        (drops thoughts, say) or the action did not stop as the template ends a message; whitespace that the template
        strips from the action itself changes nothing. A cut action gets the end it lacks.
        """
        tail = len(self.tail_ids)
        stopped = tuple(action_ids[-tail:]) == tuple(self.tail_ids)
        cut = not action_ids or action_ids[-1] not in self.stop_ids
        if not self.chat:
            added = self._tokenise([self._escape(_plain_text(observation))])[0]
            return added if not cut else self.tail_ids + added, False
        said = self.decode(action_ids[:-tail] if stopped else action_ids)
        whole: list[Message] = [*history, {"role": "assistant", "content": said}, *messages(observation)]
        before, actual = (self._conversation(part) for part in (history, whole))
        said = self._escape(said)
        rest = actual.removeprefix(before)
        shown = next((text for text in (said, said.strip()) if rest.startswith(text)), None)
        if actual.startswith(before) and shown is not None and (stopped or cut):
            added = self._tokenise([rest.removeprefix(shown)])[0]
            # What follows the action must be its end: else the template has put something else in its place.
            if added[:tail] == self.tail_ids:
                return added[tail:] if stopped else added, False
        return self._tokenise([actual])[0], True

    def _conversation(self, said: Sequence[Message]) -> str:
        """Return messages as the policy is to answer them; the last ones rendered are at hand, for rendering takes time
        that grows with their number and each is wanted twice: after one turn, and before the next."""
        key = tuple((message["role"], message["content"]) for message in said)
        if key not in self._recent:
            if len(self._recent) >= _RECENT:
                del self._recent[next(iter(self._recent))]
            self._recent[key] = self._render(_messages(said, escape=self._escape), generate=True)
        return self._recent[key]

    def text(self, prompt: Prompt) -> str:
        """Return the prompt as the policy reads it, for people."""
        return self._render(_messages(prompt), generate=True) if self.chat else _plain_text(prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an action, without its stop token and other special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _escape(self, text: str) -> str:
        """Break control tokens that stand in data, so that `<|eot_id|>` in a problem is only text."""
        return self._special.sub(lambda match: match[0][0] + _BREAK + match[0][1:], text)

    def _tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        pieces = [text.split(_BREAK) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        if not flat:
            return []
        ids = iter(self.tokenizer(flat, add_special_tokens=False)["input_ids"])
        return [[token for _ in parts for token in next(ids)] for parts in pieces]

    def _render(self, messages: Sequence[Message], *, generate: bool) -> str:
        from jinja2 import TemplateError

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
        if not self.chat:
            if self.tokenizer.eos_token_id is None:
                raise DataError("the tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
            return [self.tokenizer.eos_token_id]
        messages: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _CONTENT}]
        rendered = self._render(messages, generate=False)
        ids = self._tokenise([rendered.rpartition(_CONTENT)[2]])[0]
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        for position, token in enumerate(ids):
            if token in known | special:
                return ids[: position + 1]
        raise DataError(
            "the chat template emits no stop token after an assistant message, so a policy trained with it would "
            f"never stop: it ends in {rendered.rpartition(_CONTENT)[2]!r}; set chat_template_path to one that does"
        )


def _messages(prompt: Prompt, *, escape: Any = str) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": escape(prompt)}]
    return [{"role": message["role"], "content": escape(message["content"])} for message in prompt]


def _plain_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if [message["role"] for message in prompt] == ["user"]:  # the same thing, written otherwise
        return prompt[0]["content"]
    raise DataError("the prompt is a list of messages but the tokenizer has no chat template: set chat_template_path")
