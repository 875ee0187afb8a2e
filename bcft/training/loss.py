"""How rows weigh in the loss, and how a step's loss is reduced.

The weight of a row multiplies the log-probabilities that TRL's fused head returns for its tokens, so nothing else is
computed, and nothing at all where every row has the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from bcft.training.tokens import tokens_of, weights_of
from bcft.types import TrainingExample

Reduction = Literal["token", "sequence", "sum"]
"""`loss_reduction`."""
WEIGHT = "weight"
"""The column of the dataset, and of a batch: (B, T), what each token's loss is multiplied by."""


def row_weights(examples: Sequence[TrainingExample], reduction: Reduction) -> np.ndarray | None:
    """Return what the loss of each row's tokens is multiplied by; None where that is 1 for all rows: (N,).

    Under `sequence` a step's sum is divided by its rows, so each row's tokens are divided by their own number.
    """
    weights = weights_of(examples)
    if reduction == "sequence":
        # As in TRL, what is before a row's first token does not predict it.
        tokens, numbers = tokens_of(examples)
        shared: np.ndarray = weights / np.maximum(tokens.predicted[numbers], 1)
        return shared
    return weights if (weights != 1.0).any() else None


@dataclass(frozen=True)
class WithWeights:
    """A collator that adds the rows' weights, where they have some, to the batch of another.

    A class, not a closure: processes that load data may get it pickled.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of rows."""
        batch = self.collate(rows)
        if WEIGHT in rows[0]:
            weights = torch.tensor([row[WEIGHT] for row in rows])
            batch[WEIGHT] = weights[:, None].expand(batch["labels"].shape).contiguous()
        return batch


def weighted(model: Callable[..., Any], weights: torch.Tensor) -> Callable[..., Any]:
    """Return a model whose log-probabilities are multiplied by the weights (B, T) of the tokens they are of."""

    def forward(**inputs: Any) -> Any:
        outputs = model(**inputs)
        outputs.log_probs = outputs.log_probs * weights[:, 1:].to(outputs.log_probs.device)
        return outputs

    return forward


def count_rows(batches: Sequence[Mapping[str, torch.Tensor]]) -> int:
    """Return the number of rows of batches."""
    return sum(len(batch["labels"]) for batch in batches)
