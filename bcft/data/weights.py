"""Where the loss is: which turns of a demonstration carry it, and how much each row weighs."""

import math
from collections.abc import Sequence

import numpy as np

from bcft.config.schema import TrainingSettings
from bcft.errors import DataError, UsageError
from bcft.training.tokens import weighing, weights_of
from bcft.types import Demonstration, Message, TrainingExample
from bcft.types import messages as as_messages

_LARGE = 1e100
"""Weights above it are divided first: the sum of some near the largest float is not finite."""


# Turns
def trained_turns(demonstration: Demonstration, train_on: str) -> list[bool]:
    """Return whether each action of a demonstration carries loss; train_on: `all_turns`, `last_turn` or `marked`.

    Raises DataError that names the place for a mark that would be ignored: of an action that carries loss although it
    is marked not to, or of a message in the prompt.
    """
    actions, where = _actions(demonstration.completion), demonstration.problem.where
    if train_on == "marked":
        if any(message.get("train") for message in as_messages(demonstration.prompt)):
            raise DataError(
                f"{where}: an assistant's message of the prompt is marked to carry loss, which no prompt does: move it "
                f"to the completion, or remove the mark"
            )
        return marked_turns(demonstration.completion)
    trained = [train_on == "all_turns" or number == len(actions) - 1 for number in range(len(actions))]
    for number, (action, is_trained) in enumerate(zip(actions, trained, strict=True)):
        if is_trained and action.get("train") is False:
            raise DataError(
                f"{where}: the assistant's message {number} is marked not to carry loss, and train_on: {train_on} "
                f"trains it: set train_on: marked, or remove the mark"
            )
    return trained


def marked_turns(completion: Sequence[Message]) -> list[bool]:
    """Return whether each action of a conversation carries loss by the marks alone.

    An action without a mark does, unless another one is marked to: then those alone do.
    """
    marks = [action.get("train") for action in _actions(completion)]
    return [not any(marks) if mark is None else mark for mark in marks]


def unmarked(conversation: Sequence[Message]) -> list[Message]:
    """Return the messages of a conversation without marks."""
    copies = [message.copy() for message in conversation]
    for message in copies:
        message.pop("train", None)
    return copies


def without_idle_marks(conversation: Sequence[Message], *, marked: bool = False) -> list[Message]:
    """Return the messages of a conversation without the marks that change nothing.

    marked: whether marks say which turns carry loss; else a mark to carry it changes nothing.
    """
    if marked:
        return unmarked(conversation) if all(marked_turns(conversation)) else list(conversation)
    return [message if message.get("train") is False else unmarked([message])[0] for message in conversation]


def _actions(completion: Sequence[Message]) -> list[Message]:
    return [message for message in completion if message["role"] == "assistant"]


def check_marks(demonstrations: Sequence[Demonstration], train_on: str) -> None:
    """Raise DataError if marks shall say what is trained and there are none."""
    if train_on != "marked" or any("train" in message for d in demonstrations for message in d.completion):
        return
    raise DataError(
        f"train_on: marked: no message of {len(demonstrations):,} rows is marked: give the assistant's messages train: "
        f"true or false (or weight: 1 or 0), or set train_on: all_turns"
    )


# Rows
def to_mean_1(weights: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Return weights (N,), not all 0, times the factor that makes 1 their mean over all rows; equal ones are exactly 1.

    rows: how many rows have each weight (N,); None: one.
    """
    counts = np.ones(len(weights)) if rows is None else rows
    most = float(weights.max())
    shares = weights / most if most > _LARGE else weights
    made: np.ndarray = shares * float(counts.sum()) / math.fsum(shares * counts)
    return made


def scaled(examples: Sequence[TrainingExample], training: TrainingSettings) -> tuple[Sequence[TrainingExample], str]:
    """Return the examples with weights of mean 1, and a note; with the weights as given under `loss_reduction: sum`.

    So a learning rate means the same in whatever unit the weights are given. A sum is not scaled: under it a row of
    weight 2 is that row twice. The note is '' if every weight is 1. No weight may be 0.
    Raises UsageError for a loss that takes no weights.
    """
    weights = weights_of(examples)
    if not (weights != 1.0).any():
        return examples, ""
    if training.loss_type != "nll":
        raise UsageError(f"loss_type: {training.loss_type} takes no weights of rows: give nll, or remove the weights")
    if training.passed_through.get("label_smoothing_factor"):
        raise UsageError("label_smoothing_factor: it takes no weights of rows: leave it out, or remove the weights")
    made, most, least = to_mean_1(weights), float(weights.max()), float(weights.min())
    mean = most / float(made.max())
    note = f"weights: rows weigh {least:.4g} to {most:.4g} in the loss"
    if training.loss_reduction == "sum":
        return examples, f"{note}, not scaled: loss_reduction is sum"
    if math.isclose(mean, 1.0, rel_tol=1e-9):
        return examples, f"{note}, 1 in the mean"
    if not (made != 1.0).any():
        words = f"weights: every row has the weight {most:.4g}, which is as if there were none"
        return weighing(examples, made), words
    return weighing(examples, made), f"{note}, divided by their mean {mean:.4g}"
