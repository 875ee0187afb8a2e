"""Turns to training rows: each token trained once, loss on the policy's actions alone.

A row goes on for as long as the next context begins with all that the row holds. Where a template rewrites earlier
turns (it drops old thoughts, say), the policy read other ids than the row holds, and a new row begins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bcft.types import IGNORED, Demonstration, Problem, Row, Trajectory, Turn, messages


@dataclass(frozen=True, slots=True)
class Stretch:
    """What of a conversation one row holds: the turns from `first` to `last`, and their ids."""

    first: int
    last: int
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def stretches(turns: Sequence[Turn], *, train_on: str = "all_turns") -> list[Stretch]:
    """Return the rows of a conversation, those left out in which nothing would carry loss.

    train_on: `all_turns`, or `last_turn`: loss on the last action alone, all before it is context. An action that says
    nothing carries no loss: its stop token alone would teach to say nothing.
    """
    found: list[Stretch] = []
    ids: list[int] = []
    labels: list[int] = []
    first = 0
    for number, turn in enumerate(turns):
        if turn.rewritten:
            found.append(Stretch(first, number - 1, tuple(ids), tuple(labels)))
            ids, labels, first = [], [], number
        trained = turn.action.strip() and (train_on == "all_turns" or number == len(turns) - 1)
        ids += [*turn.ids, *turn.action_ids]
        labels += [*[IGNORED] * len(turn.ids), *(turn.action_ids if trained else [IGNORED] * len(turn.action_ids))]
    found.append(Stretch(first, len(turns) - 1, tuple(ids), tuple(labels)))
    return [_trimmed(one) for one in found if any(label != IGNORED for label in one.labels)]


def _trimmed(row: Stretch) -> Stretch:
    """Leave out what stands behind the last token that carries loss: nothing is learned from it."""
    end = max(place for place, label in enumerate(row.labels) if label != IGNORED) + 1
    return Stretch(row.first, row.last, row.input_ids[:end], row.labels[:end])


def kept_lines(
    trajectory: Trajectory, problem: Problem, *, reward: float, source: str, train_on: str = "all_turns"
) -> list[dict[str, Any]]:
    """Return the rows of `kept.jsonl`: messages to read, or for another tokenizer; to train on, the ids as sampled.

    source: whose attempt it was, `self` or `teacher`.
    """
    said = list(trajectory.opening) or messages(problem.prompt)
    before: list[int] = []  # of each action, how many messages stand before it
    for turn in trajectory.turns:
        before.append(len(said))
        said += [{"role": "assistant", "content": turn.action}, *turn.observation]
    lines = []
    for row in stretches(trajectory.turns, train_on=train_on):
        begins = before[row.last if train_on == "last_turn" else row.first]
        lines.append(
            {
                "id": trajectory.id,
                "problem_id": problem.id,
                "turn": row.first,
                "source": source,
                "prompt": [dict(message) for message in said[:begins]],
                "completion": [dict(message) for message in said[begins : before[row.last] + 1]],
                "input_ids": list(row.input_ids),
                "labels": list(row.labels),
                "reward": reward,
                "weight": 1.0,
            }
        )
    return lines


def demonstration_line(demonstration: Demonstration, row: Row, number: int) -> dict[str, Any]:
    """Return row `number` of demonstrations as `kept.jsonl` holds it: beside what was kept, and graded by nobody."""
    problem = demonstration.problem
    said = list(demonstration.conversation) or [
        *messages(problem.prompt),
        {"role": "assistant", "content": demonstration.completion},
    ]
    first = demonstration.begins or len(said) - 1
    return {
        "id": f"demonstration-{number}",
        "problem_id": problem.id,
        "turn": 0,
        "source": "demonstration",
        "prompt": [dict(message) for message in said[:first]],
        "completion": [dict(message) for message in said[first:]],
        "input_ids": list(row.input_ids),
        "labels": list(row.labels),
        "reward": 0.0,
        "weight": 1.0,
    }


def row_of(line: Mapping[str, Any]) -> Row:
    """Return a row of `kept.jsonl` as the trainer takes it."""
    return Row(line["problem_id"], tuple(line["input_ids"]), tuple(line["labels"]), line["id"])
