"""The `hf` engine: a decode loop of our own on transformers' models, caches and warpers.

Unlike `generate` it prefills a prompt once for all its samples, replaces finished rows by waiting ones, and samples
every token from the attempt's identity. Beam search, assisted decoding, compilation and stop strings are left out.

Rows are right-aligned: a cache of width W holds a row's n tokens in its last n columns, so rows of any length can join,
leave and be trimmed together.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from bcft.generation import kv_cache
from bcft.generation.kv_cache import GrowingLayer, Sessions, States, aligned, length_of, select_rows, stack
from bcft.generation.noise import identity_seed, sample
from bcft.generation.processors import processors
from bcft.policy import cpu
from bcft.policy.shape import context_length
from bcft.policy.text_ids import common_beginning
from bcft.types import Action, Request, Sampling, Stop

_COMPACT_EVERY = 8
"""Steps between two checks for finished rows: each check waits for the device."""
_PREFILL_TOKENS = 16_384
"""Padded prompt tokens in one forward pass of prompts."""
_CPU_PREFILL_TOKENS = 1_024
"""The same for a model on a CPU that is not small: more are no faster, and have more padding."""
_MOST_DONE = 0.125
"""The share of finished rows from which on a large model on a CPU drops them at once: there a look at them is free."""
_LEAST_SHARED = 8
"""Tokens at the beginning of all contexts from which on a large model on a CPU reads them once."""


@dataclass
class _Rows:
    """The attempts in decoding; the first dimension of every tensor is the row. Owned by one call of `_decode`."""

    requests: list[Request]
    cache: DynamicCache
    mask: torch.Tensor  # (B, W) whether a cache column holds a token of the row
    last: torch.Tensor  # (B,) the token sampled last, not yet in the cache
    made: torch.Tensor  # (B,) tokens sampled so far
    limit: torch.Tensor  # (B,) tokens that may be sampled
    done: torch.Tensor  # (B,)
    seeds: torch.Tensor  # (B, 2)
    ids: torch.Tensor  # (B, most) the tokens sampled
    seen: torch.Tensor  # (B, S) context and action, padded with a context token; S = 0 without a repetition penalty

    def select(self, keep: torch.Tensor) -> None:
        """Keep the rows of these indices (K,), in this order."""
        select_rows(self.cache, keep)
        self.requests = [self.requests[i] for i in keep.tolist()]
        for name in ("mask", "last", "made", "limit", "done", "seeds", "ids", "seen"):
            setattr(self, name, getattr(self, name)[keep])

    def trim(self) -> None:
        """Drop the cache columns that no row uses any more."""
        unused = self.mask.shape[1] - int(self.mask.sum(1).max())
        if unused:
            self.mask = self.mask[:, unused:]
            for layer in self.cache.layers:
                layer.drop_columns(unused)

    def join(self, other: "_Rows") -> None:
        """Append other rows, padding the narrower of two fields."""
        self.requests += other.requests
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            states = (stack(getattr(mine, n), getattr(theirs, n), dim=2, left=True) for n in ("keys", "values"))
            mine.reallocate(*states)
        self.mask = stack(self.mask, other.mask, dim=1, left=True)
        self.ids = stack(self.ids, other.ids, dim=1, left=False)
        if self.seen.shape[1]:
            width = max(self.seen.shape[1], other.seen.shape[1])
            self.seen = torch.cat([_widen(self.seen, width), _widen(other.seen, width)])
        for name in ("last", "made", "limit", "done", "seeds"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))


class HFEngine:
    """Sample with a transformers model. Call it inside `sampling_mode` of `mode`.

    rows: most attempts decoded together; None: as many as the free memory holds, at most 512. When memory runs out the
    number is halved and only the unfinished attempts are repeated, to the same tokens.
    keep_sessions: keep the caches of sessions from one call to the next, as conversations of several turns need.
    """

    def __init__(self, model: Any, *, pad_id: int, rows: int | None = None, keep_sessions: bool = True) -> None:
        self.model = model
        self.pad_id = pad_id
        self.rows = rows
        self.keep_sessions = keep_sessions
        self.sessions = Sessions()
        self.context = context_length(model.config)
        large = cpu.is_large(model)
        self.prefill_tokens = _CPU_PREFILL_TOKENS if large else _PREFILL_TOKENS
        self.least_shared = _LEAST_SHARED if large else sys.maxsize
        self.most_done = _MOST_DONE if large else 1.0
        self.joins = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)

    def generate(self, requests: Sequence[Request]) -> Iterator[Action]:
        """Yield one action for each request, in the order they finish.

        Raises torch.OutOfMemoryError when not even one row fits, ValueError when two requests share a key.
        """
        if len({request.key for request in requests}) != len(requests):
            raise ValueError("two requests have the same key, so they would get the same noise")
        self.sessions.forget_all_but(request.session for request in requests)
        for sampling, stop_ids in dict.fromkeys((r.sampling, r.stop_ids) for r in requests):
            alike = [r for r in requests if (r.sampling, r.stop_ids) == (sampling, stop_ids)]
            yield from self._retry(alike, sampling)

    def _retry(self, requests: list[Request], sampling: Sampling) -> Iterator[Action]:
        full = [r for r in requests if len(r.context_ids) >= self.context or r.max_new_tokens < 1]
        yield from (Action(r.key, (), "context_full") for r in full)
        skip = {r.key for r in full}
        # Longest first: rows of similar length are decoded together, and a lack of memory shows at once.
        ordered = sorted((r for r in requests if r.key not in skip), key=lambda r: (-len(r.context_ids), r.context_ids))
        remaining = {r.key: r for r in ordered}
        rows = self.rows or self._rows_that_fit(ordered)
        while remaining:
            try:
                for action in self._decode(list(remaining.values()), sampling, rows):
                    del remaining[action.key]
                    yield action
            except torch.OutOfMemoryError:
                if rows == 1 and not self.sessions:
                    raise
                self.sessions.forget_all_but(())  # they can be computed again
                rows = self.rows = max(rows // 2, 1)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _decode(self, requests: list[Request], sampling: Sampling, rows: int) -> Iterator[Action]:
        """Decode requests, equal contexts adjacent, with at most `rows` rows at a time."""
        warpers = processors(sampling)
        waiting, active, beginning = requests, None, self._beginning(requests)
        while waiting or active:
            free = rows - (len(active.requests) if active else 0)
            if waiting and (active is None or (free >= max(1, rows // 4) and _can_trim(active.cache))):
                waiting, joined = self._admit(waiting, free, beginning, sampling, warpers)
                if active is None:
                    active = joined
                else:
                    active.join(joined)
            assert active is not None
            for _ in range(_COMPACT_EVERY):
                self._step(active, sampling, warpers)
                if active.limit.device.type == "cpu" and int(active.done.sum()) >= self.most_done * len(active.done):
                    break
            self._keep(active)
            yield from _finished(active)
            active = _unfinished(active)

    def _admit(
        self, waiting: list[Request], free: int, beginning: States, sampling: Sampling, warpers: LogitsProcessorList
    ) -> tuple[list[Request], _Rows]:
        """Prefill as many waiting requests as fit into the free rows; return the others and the new rows."""
        chosen, contexts = 0, set()
        for request in waiting[: max(free, 1)]:
            contexts.add(request.context_ids)
            if len(contexts) > 1 and len(contexts) * len(waiting[0].context_ids) > _PREFILL_TOKENS:
                break
            chosen += 1
        return waiting[chosen:], self._begin(waiting[:chosen], beginning, sampling, warpers)

    def _begin(
        self, requests: list[Request], beginning: States, sampling: Sampling, warpers: LogitsProcessorList
    ) -> _Rows:
        """Read the contexts of requests: only the new tokens of those that continue a session."""
        known = [request for request in requests if self.sessions.known(request)]
        continued = {request.key for request in known}
        parts = [self._resume(known, sampling, warpers)] if known else []
        fresh = [request for request in requests if request.key not in continued]
        for together in self._parts(fresh, known=length_of(beginning)):
            parts.append(self._prefill(together, beginning, sampling, warpers))
        for part in parts[1:]:
            parts[0].join(part)
        return parts[0]

    def _parts(self, requests: list[Request], *, known: int) -> Iterator[list[Request]]:
        """Yield requests, the longest contexts first, by forward passes of prompts; all at once if rows cannot join.

        known: tokens at the beginning of all contexts that are read already.
        """
        part: list[Request] = []
        contexts: set[tuple[int, ...]] = set()
        for request in requests:
            contexts.add(request.context_ids)
            if (
                self.joins
                and len(contexts) > 1
                and len(contexts) * (len(part[0].context_ids) - known) > self.prefill_tokens
            ):
                yield part
                part, contexts = [], {request.context_ids}
            part.append(request)
        if part:
            yield part

    def _keep(self, rows: _Rows) -> None:
        """Keep the caches of finished rows, for the next turns of their sessions."""
        if not self.keep_sessions:
            return
        ended = [i for i, done in enumerate(rows.done.tolist()) if done and rows.requests[i].session is not None]
        if not ended or not _can_trim(rows.cache):
            return
        held = rows.mask.sum(1).tolist()
        for i in ended:
            request, made = rows.requests[i], int(rows.made[i])
            # The last sampled token is not in the cache yet; columns after a row was done are not its tokens.
            ids = (*request.context_ids, *rows.ids[i, : made - 1].tolist())
            self.sessions.keep(request, ids, rows.cache, row=i, behind=held[i] - len(ids))

    @torch.no_grad()
    def _resume(self, requests: list[Request], sampling: Sampling, warpers: LogitsProcessorList) -> _Rows:
        """Read the new tokens of conversations with a cached earlier part.

        All read as many tokens as the conversation with the most new ones, the others some of their own again, so that
        the new tokens of all rows are in the same columns.
        """
        known = [self.sessions.known(request) for request in requests]
        new = max(len(r.context_ids) - n for r, n in zip(requests, known, strict=True))
        lengths = [len(r.context_ids) - new for r in requests]
        if min(lengths) < 1:  # a context is no longer than the new part of another
            return self._prefill(requests, (), sampling, warpers)
        contexts = [request.context_ids for request in requests]
        return self._rows(requests, *self._read(contexts, self.sessions.layers(requests, lengths)), sampling, warpers)

    @torch.no_grad()
    def _beginning(self, requests: list[Request]) -> States:
        """Read what all contexts that are not cached begin with, such as a system prompt; empty if not worth it."""
        contexts = list({request.context_ids for request in requests if not self.sessions.known(request)})
        if not self.joins or len(contexts) < 2:
            return ()
        shared = min(common_beginning(contexts), *(len(context) - 1 for context in contexts))
        if shared < self.least_shared:
            return ()
        cache, _, _ = self._read([contexts[0][:shared]], [])
        return tuple((layer.keys[0], layer.values[0]) for layer in cache.layers)

    @torch.no_grad()
    def _prefill(
        self, requests: list[Request], beginning: States, sampling: Sampling, warpers: LogitsProcessorList
    ) -> _Rows:
        contexts = list(dict.fromkeys(request.context_ids for request in requests))
        # A context shorter than the longest reads some of the beginning again, so that the new tokens of all contexts
        # are in the same columns.
        new = max(map(len, contexts)) - length_of(beginning)
        lengths = [len(context) - new for context in contexts]
        layers = aligned([beginning] * len(contexts), lengths) if beginning and min(lengths) > 0 else []
        cache, mask, logits = self._read(contexts, layers)
        place = {context: index for index, context in enumerate(contexts)}
        expand = torch.tensor([place[request.context_ids] for request in requests], device=self.model.device)
        select_rows(cache, expand)
        return self._rows(requests, cache, mask[expand], logits[expand], sampling, warpers)

    def _read(
        self, contexts: Sequence[tuple[int, ...]], layers: list[GrowingLayer]
    ) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        """Read contexts to their ends; return the cache, its mask (B, W) and the logits (B, V) of the next tokens.

        layers: a cache of the beginning of each context, which may be left out; all but as many tokens of each context
        as the longest has beyond its own.
        """
        cache, device = DynamicCache(config=self.model.config), self.model.device
        if self.joins:
            cache.layers = layers or [GrowingLayer() for _ in cache.layers]
        width = max(map(len, contexts))
        held = layers[0].keys.shape[2] if layers else 0
        padded = [((self.pad_id,) * (width - len(c)) + c)[held:] for c in contexts]
        mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=device)
        logits = self.model(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, held:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return cache, mask, logits

    def _rows(
        self,
        requests: list[Request],
        cache: DynamicCache,
        mask: torch.Tensor,
        logits: torch.Tensor,
        sampling: Sampling,
        warpers: LogitsProcessorList,
    ) -> _Rows:
        """Return rows for contexts in the cache, mask (B, W), their first token sampled from logits (B, V)."""
        device, width = self.model.device, mask.shape[1]
        limits = [min(r.max_new_tokens, self.context - len(r.context_ids)) for r in requests]
        most, n = max(limits), len(requests)
        seen = torch.empty(n, 0, dtype=torch.long, device=device)
        if sampling.repetition_penalty != 1.0:
            filled = [(*r.context_ids, *[r.context_ids[0]] * (width + most - len(r.context_ids))) for r in requests]
            seen = torch.tensor(filled, device=device)
        rows = _Rows(
            requests=list(requests),
            cache=cache,
            mask=mask,
            last=torch.zeros(n, dtype=torch.long, device=device),
            made=torch.zeros(n, dtype=torch.long, device=device),
            limit=torch.tensor(limits, device=device),
            done=torch.zeros(n, dtype=torch.bool, device=device),
            seeds=torch.tensor([identity_seed(*r.key) for r in requests], dtype=torch.int32, device=device),
            ids=torch.full((n, most), self.pad_id, device=device),
            seen=seen,
        )
        _sample_tokens(rows, logits, sampling, warpers)
        return rows

    @torch.no_grad()
    def _step(self, rows: _Rows, sampling: Sampling, warpers: LogitsProcessorList) -> None:
        """Sample one more token for each row; finished rows are decoded too until they are dropped."""
        positions = rows.mask.sum(1, keepdim=True)
        rows.mask = torch.nn.functional.pad(rows.mask, (0, 1), value=1)
        logits = self.model(
            input_ids=rows.last[:, None],
            attention_mask=rows.mask,
            position_ids=positions.clamp(max=self.context - 1),
            past_key_values=rows.cache,
            use_cache=True,
        ).logits[:, -1]
        _sample_tokens(rows, logits, sampling, warpers)

    def _rows_that_fit(self, requests: Sequence[Request]) -> int:
        """Estimate how many rows' keys, values and logits half of the free memory holds."""
        if not requests:
            return 1
        config = self.model.config.get_text_config()
        tokens = max(min(len(r.context_ids) + r.max_new_tokens, self.context) for r in requests)
        free = torch.cuda.mem_get_info()[0] // 2 if self.model.device.type == "cuda" else 2**30
        cached = kv_cache.cached_numbers_per_token(config)
        return kv_cache.rows_that_fit(cached=cached, vocabulary=config.vocab_size, tokens=tokens, free=free)


def _sample_tokens(rows: _Rows, logits: torch.Tensor, sampling: Sampling, warpers: LogitsProcessorList) -> None:
    """Sample a token from logits (B, V) for each row that is not done."""
    scores = warpers(rows.seen, logits.float())
    token = sample(scores, rows.seeds, rows.made.int()) if sampling.temperature > 0.0 else scores.argmax(-1)
    live = ~rows.done
    index = torch.arange(len(token), device=token.device)
    column = rows.made.clamp(max=rows.ids.shape[1] - 1)
    rows.ids[index, column] = torch.where(live, token, rows.ids[index, column])
    if rows.seen.shape[1]:
        position = torch.tensor([len(r.context_ids) for r in rows.requests], device=token.device) + column
        rows.seen[index, position] = torch.where(live, token, rows.seen[index, position])
    rows.last = token
    rows.made = rows.made + live
    stop = torch.tensor(rows.requests[0].stop_ids, device=token.device)
    rows.done = rows.done | torch.isin(token, stop) | (rows.made >= rows.limit)


def _finished(rows: _Rows) -> Iterator[Action]:
    done, made = rows.done.tolist(), rows.made.tolist()
    for index, request in enumerate(rows.requests):
        if done[index]:
            ids = tuple(rows.ids[index, : made[index]].tolist())
            limit: Stop = "max_tokens" if made[index] == request.max_new_tokens else "context_full"
            yield Action(request.key, ids, "stop_token" if ids[-1] in request.stop_ids else limit)


def _unfinished(rows: _Rows) -> _Rows | None:
    keep = (~rows.done).nonzero()[:, 0]
    if len(keep) == 0:
        return None
    if len(keep) < len(rows.requests):
        rows.select(keep)
        if _can_trim(rows.cache):
            rows.trim()
    return rows


def _can_trim(cache: DynamicCache) -> bool:
    """Return whether columns of the cache can be dropped and padded: not with sliding windows or recurrent states."""
    return all(isinstance(layer, GrowingLayer) for layer in cache.layers)


def _widen(seen: torch.Tensor, width: int) -> torch.Tensor:
    """Repeat the last column up to `width`: a token seen twice is penalized once."""
    return torch.cat([seen, seen[:, -1:].expand(-1, width - seen.shape[1])], dim=1)
