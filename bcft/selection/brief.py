"""What is kept of a scored trajectory where there are too many to hold them all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from bcft.selection.filter import Candidate
from bcft.types import Success

if TYPE_CHECKING:
    from bcft.selection.scoring import Score

Scored: TypeAlias = "Score | Brief"
"""A score with or without its trajectory: both say all that is reported about one."""


@dataclass(frozen=True, slots=True)
class Brief:
    """A score without its trajectory."""

    candidate: Candidate
    rewards: tuple[tuple[str, float | None], ...]
    truncated: bool
    logged: Mapping[str, float]
    extra: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The trajectory's."""
        return self.candidate.id

    @property
    def graded(self) -> bool:
        """Whether any function graded it."""
        return self.candidate.graded

    @property
    def reward(self) -> float:
        """The weighted sum of its rewards."""
        return self.candidate.reward

    @property
    def success(self) -> Success:
        """Whether the problem is solved."""
        return self.candidate.success

    @property
    def tokens(self) -> int:
        """How many were sampled."""
        return self.candidate.length

    @property
    def errored(self) -> bool:
        """Whether its environment failed."""
        return self.candidate.status == "errored"


def score_line(score: Scored, decision: str, cutoff: float) -> dict[str, Any]:
    """Return a line of `scores.jsonl`; `logged` and `extra` are there if a function logged something."""
    line = {
        "id": score.id,
        "graded": score.graded,
        "reward": score.reward,
        "rewards": [
            {"name": name, "graded": value is not None, "value": 0.0 if value is None else value}
            for name, value in score.rewards
        ],
        "success": score.success,
        "decision": decision,
        "cutoff": cutoff,
    }
    notes = {"logged": dict(score.logged), "extra": dict(score.extra)}
    return line | {name: values for name, values in notes.items() if values}
