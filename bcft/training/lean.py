"""Training on a CPU without work on padding, on a beginning that rows share, and on positions that carry no loss.

All three change how a micro-batch is computed, not what: its loss and gradient are the same but for rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from trl.trainer import utils

from bcft.policy.text_ids import common_beginning
from bcft.training.loss import WEIGHT
from bcft.types import IGNORED

GROUP_TOKENS = 512
"""Tokens of rows that are run together: enough to keep a CPU busy, few enough for its caches and for one mask."""


def isolates(model: Any) -> bool:
    """Return whether a model takes a mask that keeps rows in one sequence apart: rotary positions, full attention."""
    config = model.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) and "position_ids" in signature(model.forward).parameters
    full = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    return bool(rotary) and full and model.config._attn_implementation == "sdpa"


def pack(batch: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return a batch of rows (B, T), padded on the right, as sequences (1, T) of several rows each, without padding.

    What the prompts of all rows begin with, such as a system prompt, is read once for a sequence. A mask (1, 1, T, T)
    lets each row see itself and that beginning. A sequence has at most `GROUP_TOKENS` tokens, or one longer row.
    Weights (B, T), if the batch has some, stay with their tokens.
    """
    mask, ids, labels = batch["attention_mask"], batch["input_ids"], batch["labels"]
    sizes = mask.sum(1).tolist()
    rows = [row[:size] for row, size in zip(ids.tolist(), sizes, strict=True)]
    # The token before a label is the row's own, so that its hidden state predicts the label.
    first = (labels != IGNORED).int().argmax(1).tolist()
    shared = max(0, min(common_beginning(rows), *(place - 1 for place in first)))
    groups: list[list[int]] = []
    room = 0
    for row, size in enumerate(sizes):
        if size - shared > room:
            groups.append([])
            room = GROUP_TOKENS - shared
        groups[-1].append(row)
        room -= size - shared
    sequences = [_sequence([ids[i, : sizes[i]] for i in group], [labels[i] for i in group], shared) for group in groups]
    if WEIGHT in batch:
        for sequence, group in zip(sequences, groups, strict=True):
            weights = [batch[WEIGHT][i, : sizes[i]] for i in group]
            sequence[WEIGHT] = torch.cat([weights[0][:shared], *(row[shared:] for row in weights)])[None]
    return sequences


def _sequence(rows: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], shared: int) -> dict[str, torch.Tensor]:
    """Return rows (T,) behind each other in one sequence, their `shared` first tokens once."""
    shared = shared if len(rows) > 1 else 0
    parts = [rows[0][:shared], *(row[shared:] for row in rows)]
    targets = [torch.full((shared,), IGNORED)]
    for row, mine in zip(rows, labels, strict=True):
        # What is before a row's first token does not predict it.
        targets += [torch.full((1,), IGNORED), mine[shared + 1 : len(row)]]
    positions = [torch.arange(shared), *(torch.arange(shared, len(row)) for row in rows)]
    sequence = {
        "input_ids": torch.cat(parts)[None],
        "labels": torch.cat(targets)[None],
        "position_ids": torch.cat(positions)[None],
    }
    if len(rows) == 1:
        return sequence | {"attention_mask": torch.ones_like(sequence["input_ids"])}
    owner = torch.cat([torch.full((len(part),), number) for number, part in enumerate(parts)])
    seen = (owner[None] == owner[:, None]) | (owner == 0)[None]
    return sequence | {"attention_mask": seen.tril()[None, None]}


@contextmanager
def labeled_positions_only() -> Iterator[None]:
    """Let TRL's head project only the positions that carry loss, inside this block.

    It does so where Triton runs. Elsewhere it projects all, since shapes that change would be compiled anew on some
    accelerators; a CPU compiles nothing.
    """
    before = utils._use_triton
    utils._use_triton = lambda device: True  # noqa: ARG005 - the signature of TRL's
    try:
        yield
    finally:
        utils._use_triton = before
