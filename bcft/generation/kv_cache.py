"""Keys and values of the `hf` engine: a cache that grows in place, and the caches of conversations between turns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from bcft.types import Request

_SPARE_COLUMNS = 64
"""Tokens by which a cache can grow before it is copied into larger buffers."""
_MOST_ROWS = 512
SESSION_BYTES = 2**30
"""The most that caches of conversations hold between two turns; without a cache the whole context is read again."""


def cached_numbers_per_token(config: Any) -> int:
    """Return how many numbers the keys and values of one token are, given a model's configuration."""
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):  # latent attention: all heads read one vector and one rotated part
        return int(text.num_hidden_layers * (text.kv_lora_rank + text.qk_rope_head_dim))
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size)


def rows_that_fit(*, cached: int, vocabulary: int, tokens: int, free: int) -> int:
    """Return how many attempts can be decoded together.

    cached: count of numbers in the keys and values of one token; tokens: of an attempt; free: bytes.
    """
    # Twice the cache, since growing it copies; six fp32 rows of the vocabulary for warpers and noise.
    each = 2 * cached * tokens * 4 + 6 * 4 * vocabulary
    return max(1, min(_MOST_ROWS, free // each))


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer whose buffers have spare columns: `torch.cat` would copy all keys and values at every token.

    `keys` (B, H, W, D) and `values` (B, H, W, E) are views of W columns of their buffers, from a first column that
    moves right when columns are dropped. D and E differ in models with latent attention.
    """

    buffers: tuple[torch.Tensor, torch.Tensor]
    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new tokens, (B, H, n, D) and (B, H, n, E); return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.first, self.end = 0, 0
            self.reallocate(key_states, value_states)
            return self.keys, self.values
        n: int = key_states.shape[2]
        if self.end + n > self.buffers[0].shape[2]:
            self.reallocate(self.keys, self.values, more=n)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.end : self.end + n] = states
        self.end += n
        self.keys, self.values = (buffer[:, :, self.first : self.end] for buffer in self.buffers)
        return self.keys, self.values

    def reallocate(self, keys: torch.Tensor, values: torch.Tensor, *, more: int = 0) -> None:
        """Copy these states into new buffers that have space for `more` columns, with some to spare."""
        b, h, width, d = keys.shape
        wide = width + more + _SPARE_COLUMNS
        self.buffers = keys.new_empty(b, h, wide, d), values.new_empty(b, h, wide, values.shape[3])
        self.first, self.end = 0, width
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, :width] = states
        self.keys, self.values = (buffer[:, :, :width] for buffer in self.buffers)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of these indices (K,), in this order."""
        self.reallocate(self.keys[indices], self.values[indices])

    def drop_columns(self, n: int) -> None:
        """Drop the first n columns, without a copy."""
        self.first += n
        self.keys, self.values = (buffer[:, :, self.first : self.end] for buffer in self.buffers)


States: TypeAlias = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Each layer's keys (H, n, D) and values (H, n, E) of n tokens; empty: of none."""


def length_of(states: States) -> int:
    """Return how many tokens these are the states of."""
    return states[0][0].shape[1] if states else 0


@dataclass(frozen=True)
class _Session:
    """Token ids in the cache, and their states."""

    ids: tuple[int, ...]
    states: States

    @property
    def bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.states)


class Sessions:
    """Caches of conversations that may continue, by `Request.session`, of at most `SESSION_BYTES` together."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str | int, ...], _Session] = {}
        self.held = 0

    def __len__(self) -> int:
        return len(self.kept)

    def forget_all_but(self, sessions: Iterable[tuple[str | int, ...] | None]) -> None:
        """Drop all conversations but these."""
        continued = set(sessions)
        self.kept = {key: kept for key, kept in self.kept.items() if key in continued}
        self.held = sum(kept.bytes for kept in self.kept.values())

    def known(self, request: Request) -> int:
        """Return how many tokens of a request's context are cached: 0 if the cached ids are not its beginning."""
        kept = self.kept.get(request.session) if request.session is not None else None
        if kept is None or len(kept.ids) >= len(request.context_ids):
            return 0
        return len(kept.ids) if request.context_ids[: len(kept.ids)] == kept.ids else 0

    def keep(self, request: Request, ids: tuple[int, ...], cache: Any, *, row: int, behind: int) -> None:
        """Keep a row of a cache, if the limit allows.

        ids: the tokens of the row; behind: columns of the cache after these tokens, which are not kept.
        """
        assert request.session is not None
        end = cache.layers[0].keys.shape[2] - behind
        span = slice(end - len(ids), end)
        # Copied: a view would keep the whole batch's cache in memory.
        states = tuple((layer.keys[row, :, span].clone(), layer.values[row, :, span].clone()) for layer in cache.layers)
        session, before = _Session(ids, states), self.kept.pop(request.session, None)
        self.held -= before.bytes if before else 0
        if self.held + session.bytes <= SESSION_BYTES:
            self.kept[request.session] = session
            self.held += session.bytes

    def layers(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[GrowingLayer]:
        """Return the layers of a cache that holds the first `lengths[i]` tokens of each request i's context."""
        return aligned([self.kept[r.session].states for r in requests if r.session is not None], lengths)


def aligned(rows: Sequence[States], lengths: Sequence[int]) -> list[GrowingLayer]:
    """Return the layers of a cache whose row i ends in the first `lengths[i]` tokens of states i."""
    width, layers = max(lengths), []
    for index, first in enumerate(rows[0]):
        states = [part.new_zeros(len(rows), part.shape[0], width, part.shape[2]) for part in first]
        for row, (length, known) in enumerate(zip(lengths, rows, strict=True)):
            for part, kept in zip(states, known[index], strict=True):
                part[row, :, width - length :] = kept[:, :length]
        layer = GrowingLayer()
        layer.update(*states)
        layers.append(layer)
    return layers


def select_rows(cache: Any, rows: torch.Tensor) -> None:
    """Keep the rows of these indices (K,), in this order, in every layer of a cache.

    transformers' own method knows keys and values only. Layers of linear attention and convolutions keep dictionaries
    of states as well, whose first dimension is the row.
    """
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):
            layer.batch_select_indices(rows)
        if isinstance(layer, LinearAttentionLayer):
            for states in (layer.conv_states, layer.recurrent_states):
                states.update({index: state[rows] for index, state in states.items() if state is not None})


def stack(first: torch.Tensor, second: torch.Tensor, *, dim: int, left: bool) -> torch.Tensor:
    """Concatenate rows, the narrower tensor padded with zeros along `dim`, on the left or on the right."""
    width = max(first.shape[dim], second.shape[dim])
    padded = []
    for tensor in (first, second):
        blank = torch.zeros(
            [width - n if d == dim else n for d, n in enumerate(tensor.shape)], dtype=tensor.dtype, device=tensor.device
        )
        padded.append(torch.cat([blank, tensor] if left else [tensor, blank], dim=dim))
    return torch.cat(padded)
