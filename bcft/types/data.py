"""Problems, demonstrations and the rows to train on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bcft.types.calls import tools
from bcft.types.text import Message, Prompt, in_file, messages

Source = Literal["self", "demonstration", "teacher"]
"""Whose trajectory an example is made from."""
IGNORED = -100
"""The label of a token that carries no loss, as in `torch.nn.CrossEntropyLoss`."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something to solve: a prompt, and the columns that a reward needs to grade an attempt."""

    id: str
    """`problem_id(prompt)`: equal texts are one problem, in every dataset."""
    prompt: Prompt
    """As given: a string or a list of messages."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """All other columns of the row, such as `answer`; `tools` as `types.calls.tools` reads them."""
    where: str = ""
    """`file:line` or `dataset row N`, for messages."""

    @property
    def template_kwargs(self) -> Mapping[str, Any]:
        """What its columns `chat_template_kwargs` and `tools` give to the chat template."""
        given: Mapping[str, Any] = self.columns.get("chat_template_kwargs") or {}
        return {**given, "tools": self.columns["tools"]} if self.columns.get("tools") else given


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """One row to train on: token ids, and labels that are `IGNORED` for tokens without loss.

    `to_json` is a line of `kept.jsonl`; `from_json` reads one. Raises ValueError when ids and labels differ in length,
    a label is neither `IGNORED` nor its token, or the weight is negative or not finite.
    """

    id: str
    """The trajectory it is made from, or `demonstration-N`; several examples of one trajectory share it."""
    problem_id: str
    input_ids: tuple[int, ...]
    """(T,) prompt and completion."""
    labels: tuple[int, ...]
    """(T,)"""
    turn: int = 0
    """The first turn of the trajectory that it holds."""
    source: Source = "demonstration"
    prompt: tuple[Message, ...] = ()
    """To read, and for another tokenizer: the messages before the first action that is trained."""
    completion: tuple[Message, ...] = ()
    """To read: the messages from that action to the last one that is trained."""
    reward: float = 0.0
    weight: float = 1.0
    """Its share in the loss, >= 0; 1.0 on average over a round's rows (`selection.weights`)."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The problem's arguments for the chat template, for another tokenizer."""
    where: str = ""
    """`file:line` or the like, for messages."""

    def __post_init__(self) -> None:
        where = self.where or self.id
        if len(self.input_ids) != len(self.labels):
            raise ValueError(f"{where}: {len(self.input_ids)} input_ids but {len(self.labels)} labels")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"{where}: weight {self.weight} is not a finite number >= 0")
        for position, (token, label) in enumerate(zip(self.input_ids, self.labels, strict=True)):
            if label not in (IGNORED, token):
                raise ValueError(f"{where}: label {label} at position {position} is not its token {token}")

    @property
    def supervised(self) -> int:
        """How many tokens carry loss."""
        return sum(label != IGNORED for label in self.labels)

    def to_json(self) -> dict[str, Any]:
        """Return a line of `kept.jsonl`; `chat_template_kwargs` and `tools` are there if the problem has some."""
        further = {"tools": self.template_kwargs["tools"]} if "tools" in self.template_kwargs else {}
        if arguments := {name: value for name, value in self.template_kwargs.items() if name != "tools"}:
            further["chat_template_kwargs"] = arguments
        line = {
            "id": self.id,
            "problem_id": self.problem_id,
            "turn": self.turn,
            "source": self.source,
            "prompt": in_file(self.prompt),
            "completion": in_file(self.completion),
            "input_ids": list(self.input_ids),
            "labels": list(self.labels),
            "reward": self.reward,
            "weight": self.weight,
        }
        return line | further

    @classmethod
    def from_json(cls, line: Mapping[str, Any], *, where: str = "") -> "TrainingExample":
        """Return the example of a line. Raises ValueError, TypeError or KeyError for another kind of line."""
        arguments = {k: v for k, v in (line.get("chat_template_kwargs") or {}).items() if v is not None}
        return cls(
            id=str(line["id"]),
            problem_id=str(line["problem_id"]),
            input_ids=tuple(map(int, line["input_ids"])),
            labels=tuple(map(int, line["labels"])),
            turn=int(line["turn"]),
            source=line["source"],
            prompt=tuple(messages(line["prompt"])),
            completion=tuple(messages(line["completion"])),
            reward=float(line["reward"]),
            weight=float(line["weight"]),
            template_kwargs=arguments | ({"tools": tools(line["tools"])} if line.get("tools") else {}),
            where=where,
        )


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A problem and a demonstrator's solution, as text."""

    problem: Problem
    prompt: Prompt
    """The first text that the policy reads: mostly the problem's prompt, as given."""
    completion: tuple[Message, ...] = ()
    """The messages after it, from the first action to the last, with the observations between them; empty for a problem
    without a solution."""
    sampled: TrainingExample | None = None
    """For a policy's own text, the sampled ids: a model with the same tokenizer trains on them as they are."""
    tokenizer: str = ""
    """The fingerprint of the tokenizer that `sampled` is made with."""
    weight: float = 1.0
    """What the loss of its tokens is multiplied by, as given."""

    @property
    def answered(self) -> bool:
        """Whether the last action says or calls anything."""
        last = self.completion[-1] if self.completion else None
        return last is not None and bool(last["content"].strip() or "tool_calls" in last)
