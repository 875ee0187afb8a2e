"""What reward functions answered, kept attempt by attempt: no function is asked twice for an attempt.

A reward may be paid for or random. So each answer is written when it is there, before another function is asked.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from bcft.rewards.base import Returned, Reward, described
from bcft.runs.storage import Journal, journal_rows, plain
from bcft.types import Message, Problem, Trajectory

Completion = str | Sequence[Message]


def answers_path(directory: Path) -> Path:
    """Return the journal of answers in the directory whose journals hold the attempts."""
    return directory / "journal" / "rewards" / "000.jsonl"


@dataclass(frozen=True, slots=True)
class Graded:
    """What one function answered for one attempt, and what it logged meanwhile."""

    value: float | None
    logged: Mapping[str, float]
    """Of the batch that was asked with this attempt."""
    extra: Mapping[str, Any]


class ScoreStore:
    """The answers of reward functions, in a journal if there is a path.

    An answer belongs to a trajectory's id and text, to its problem, and to a function's name, source and arguments:
    what has changed is asked for again.
    """

    def __init__(self, path: Path | None, functions: Sequence[Reward], problems: Mapping[str, Problem]) -> None:
        self.keys = _keys(functions)
        self.problems = problems
        self.journal = None if path is None else Journal(path)
        self.digests: dict[str, str] = {}
        self.known: dict[tuple[str, str, str], Graded] = {}
        for row in journal_rows(path) if path else ():
            value = row["value"] if row["graded"] else None
            self.known[row["by"], row["id"], row["text"]] = Graded(value, row["logged"], row["extra"])

    def get(self, number: int, trajectory: Trajectory, completion: Completion) -> Graded | None:
        """Return what the function with this number answered for an attempt; None if it was not asked yet."""
        return self.known.get(self._key(number, trajectory, completion))

    def add(self, number: int, attempts: Sequence[tuple[Trajectory, Completion]], returned: Returned) -> None:
        """Keep the answers of the function with this number; they are on the disk when this returns."""
        rows: list[dict[str, Any]] = []
        for position, (trajectory, completion) in enumerate(attempts):
            value = returned.values[position]
            extra = {column: plain(values[position]) for column, values in returned.extra.items()}
            key = self._key(number, trajectory, completion)
            self.known[key] = Graded(value, returned.logged, extra)
            rows.append(
                {
                    **dict(zip(("by", "id", "text"), key, strict=True)),
                    "graded": value is not None,
                    "value": 0.0 if value is None else value,
                    "logged": dict(returned.logged),
                    "extra": extra,
                }
            )
        if self.journal:
            self.journal.append(rows)

    def forget(self, attempts: Sequence[tuple[Trajectory, Completion]]) -> None:
        """Drop from memory what was answered for attempts that are scored; the journal keeps it."""
        for trajectory, completion in attempts:
            for number in range(len(self.keys)):
                self.known.pop(self._key(number, trajectory, completion), None)
            self.digests.pop(trajectory.id, None)

    def _key(self, number: int, trajectory: Trajectory, completion: Completion) -> tuple[str, str, str]:
        identity = trajectory.id
        if identity not in self.digests:
            problem = self.problems[trajectory.problem_id]
            self.digests[identity] = _digest(trajectory, completion, problem) if self.journal else ""
        return self.keys[number], identity, self.digests[identity]


def _keys(functions: Sequence[Reward]) -> list[str]:
    """Return a text for each function; of two that are described alike each has its own."""
    names = [described(function) for function in functions]
    return [f"{name}#{Counter(names[:number])[name]}" for number, name in enumerate(names)]


def _digest(trajectory: Trajectory, completion: Completion, problem: Problem) -> str:
    """Return a hash of what a function reads: the problem with its columns, the completion and its ids."""
    ids = [turn.action_ids for turn in trajectory.turns]
    read = (problem.prompt, plain(dict(problem.columns)), completion, ids)
    return sha256(repr(read).encode("utf-8", "surrogatepass")).hexdigest()[:16]
