"""Pieces of text to token ids, so that the pieces together are the text.

Control tokens in data are broken up and stay text. Some tokenizers (SentencePiece and its like) put a space before
every text that they get: a piece that continues another is tokenized behind it, and gets no such space.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

# Unicode noncharacters, which interchanged text must not contain: they mark places in rendered text.
BREAK = "\ufdd0"
"""Stands inside a control token that is only text."""
_ANCHORS = ("\n", "0", "a", ".", "\x01", "\u2603")
"""Texts to tokenize a piece behind. One that merges with the piece's first character is not used."""


class TextIds:
    """A tokenizer that gets its text in pieces."""

    def __init__(self, tokenizer: Any, stop_ids: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        # Some tokenizers do not mark their stop token as special.
        self.special = {i: token.content for i, token in added if token.special or i in stop_ids}
        literals = sorted(self.special.values(), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, literals)) or r"(?!)")
        self._anchor = self._ids(["a"])[0]
        self.seamless = all(
            self._decode([*left, *right]) == self._decode(whole)
            for left, right, whole in (
                self._ids([a, b, a + b]) for a, b in (("a", "b"), ("43", "\n"), ("a", " b"), ("<", "/s>"))
            )
        )
        """Whether pieces can be tokenized one by one: the tokenizer puts nothing before a text."""

    def escape(self, text: str) -> str:
        """Break control tokens in data, so that `<|eot_id|>` in a problem is only text."""
        return self.pattern.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)

    def ids(self, texts: Sequence[str], behind: Sequence[str] = ()) -> list[list[int]]:
        """Return the ids of texts, escaped ones as well; behind: the text that each one continues, if any."""
        pieces = [text.split(BREAK) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        if self.seamless:
            ids = iter(self._ids(flat))
        else:
            starts = [before.rpartition(BREAK)[2] for before in behind] or [""] * len(texts)
            before = [piece for start, parts in zip(starts, pieces, strict=True) for piece in (start, *parts[:-1])]
            ids = iter(self._continued(before, flat))
        return [[token for _ in parts for token in next(ids)] for parts in pieces]

    def text(self, ids: Sequence[int]) -> str:
        """Return sampled ids as a template would have rendered them: with control tokens, and data escaped."""
        texts: list[str] = []
        run: list[int] = []
        for token in (*ids, None):
            if token is not None and token not in self.special:
                run.append(token)
                continue
            texts.append(self.escape(self.words(run)))
            run = []
            if token is not None:
                texts.append(self.special[token])
        return "".join(texts)

    def words(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens, its first space kept: decoders may strip it."""
        known = [token for token in ids if token not in self.special]
        if self.seamless or not known:
            return self._decode(known)
        return self._decode(self._anchor + known).removeprefix(self._decode(self._anchor))

    def _continued(self, before: Sequence[str], pieces: Sequence[str]) -> list[list[int]]:
        """Return the ids of pieces, each as it is tokenized in one text with the one before it, but apart."""
        joined = self._ids([start + piece for start, piece in zip(before, pieces, strict=True)])
        return [
            whole[len(head) :] if whole[: len(head)] == head else self._apart(piece)
            for piece, head, whole in zip(pieces, self._ids(before), joined, strict=True)
        ]

    def _apart(self, piece: str) -> list[int]:
        """Return the ids of a piece whose first characters would merge with the text before it."""
        for anchor in _ANCHORS:
            head, whole = self._ids([anchor, anchor + piece])
            if whole[: len(head)] == head and self._tokenizer.unk_token_id not in head:
                return whole[len(head) :]
        return self._ids([piece])[0]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return list(self._tokenizer(list(texts), add_special_tokens=False)["input_ids"])

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def common_beginning(rows: Sequence[Sequence[int]]) -> int:
    """Return how many ids all rows begin with alike."""
    different = (i for i, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1)
    return next(different, min(map(len, rows)))
