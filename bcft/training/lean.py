"""Training on a CPU without work on padding and on positions that carry no loss.

Both change how a micro-batch is computed, not what: its loss and gradient are the same but for rounding.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from trl.trainer import utils

GROUP_TOKENS = 512
"""Tokens, padding included, of rows that are run together: enough to keep a CPU busy, few enough for its caches."""


def by_length(batch: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Split a batch of rows (B, T), padded on the right, into groups of like length, each as wide as its longest row.

    A group has at most `GROUP_TOKENS` tokens, or one longer row. The order is that of the lengths, of equals that of
    the batch.
    """
    lengths = batch["attention_mask"].sum(1).tolist()
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[row] <= GROUP_TOKENS:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [{name: values[rows, : lengths[rows[-1]]] for name, values in batch.items()} for rows in groups]


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
