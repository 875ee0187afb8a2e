"""The values that flow through the package: frozen, and wrong ones cannot be made.

Problem -> Demonstration -> Row is plain behaviour cloning from left to right.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict


class Message(TypedDict):
    """One chat message; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


Prompt = str | Sequence[Message]

IGNORED = -100
"""The label of a token that carries no loss, as in `torch.nn.CrossEntropyLoss`."""


def problem_id(prompt: Prompt) -> str:
    """Return 16 hex digits that depend on the prompt's canonical text alone."""
    text = prompt if isinstance(prompt, str) else json.dumps(list(prompt), sort_keys=True, ensure_ascii=False)
    canonical = " ".join(text.split())
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def bucket(identity: str) -> float:
    """Return the place of a problem id in [0, 1): what decides its split."""
    return int(identity[:8], 16) / 2**32


@dataclass(frozen=True, slots=True)
class Problem:
    """Something to be solved: a prompt, and whatever columns a reward needs to judge an attempt."""

    id: str
    """`problem_id(prompt)`: the same text is the same problem, wherever it stands."""
    prompt: Prompt
    """As given: a string or a list of messages."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """All other columns of the row, such as `answer`."""
    where: str = ""
    """`file:line` or `dataset row N`, for messages."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A problem and what a demonstrator answered, as text."""

    problem: Problem
    completion: str
    """What the demonstrator answered; empty where a problem comes without one."""


@dataclass(frozen=True, slots=True)
class Row:
    """What the trainer gets: token ids, and labels that are `IGNORED` where there is no loss.

    Raises ValueError when the two differ in length or a label is neither `IGNORED` nor its token.
    """

    problem_id: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    where: str = ""

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.labels):
            raise ValueError(f"{self.where}: {len(self.input_ids)} input_ids but {len(self.labels)} labels")
        for position, (token, label) in enumerate(zip(self.input_ids, self.labels, strict=True)):
            if label not in (IGNORED, token):
                raise ValueError(f"{self.where}: label {label} at position {position} is not its token {token}")

    @property
    def supervised(self) -> int:
        """How many tokens carry loss."""
        return sum(label != IGNORED for label in self.labels)
