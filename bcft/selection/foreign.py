"""Trajectories that other tools scored: rows of messages with a reward, in any file of rows.

They come from a results file of verifiers or OpenEnv, from an evaluation's log, or from `bcft export --to dataset`.
Their rewards are taken as they are, and their text is what a later run trains on. No token of them is known.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from bcft.data.files import read_rows
from bcft.data.readers import demonstration
from bcft.data.sources import files_of
from bcft.errors import DataError
from bcft.runs.storage import ROLLOUTS
from bcft.selection.brief import Brief
from bcft.selection.filter import Candidate, Status
from bcft.types import Demonstration, Message, Success, show
from bcft.types.plain import is_empty, says_no, says_yes
from bcft.types.text import in_file

OUTCOME = (
    "reward", "graded", "success", "decision", "stop_condition", "is_truncated", "truncated", "has_error", "error",
    "round", "pass_rate", "problem_id", "id", "episode_id",
)  # fmt: skip
"""Columns about the attempt; all others are its problem's."""
_IDS = ("id", "episode_id")
"""Columns that name the attempt, here and in OpenEnv."""
_LIMITS = ("max_tokens", "context_full", "length", "max_length", "max_total_completion_tokens_reached")
"""Values of `stop_condition` that say that the last message is not whole."""


@dataclass(frozen=True, slots=True)
class TextRow:
    """A kept trajectory without token ids: a row that `sft` tokenizes."""

    id: str
    problem_id: str
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    reward: float
    columns: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Return a line of `kept.jsonl`."""
        said = {"prompt": in_file(self.prompt), "completion": in_file(self.completion)}
        return {**self.columns, **said, "reward": self.reward, "weight": self.weight}


class ForeignRows:
    """The trajectories in some files of rows, in their order, each read again when its text is needed."""

    def __init__(self, places: Sequence[str]) -> None:
        """Read every row once. Raises DataError with file and line for a row that is no trajectory with a reward."""
        try:
            self.files = files_of(places)
        except DataError as error:
            raise DataError(str(error).replace("dataset_name", "rollouts", 1)) from error
        self.scores: list[Brief] = []
        self.last_round = 0
        self.errors = 0
        self.first_error = ""
        self._reader: Iterator[tuple[int, TextRow]] = iter(())
        self._next = 0
        attempts, names = Counter[tuple[int, str]](), set[str]()
        for row, where in self._rows():
            score = _score(row, where, attempts)
            if score.id in names:
                raise DataError(f"{where}: id {score.id!r} is given twice: give every row its own, or none")
            names.add(score.id)
            self.scores.append(score)
            self.last_round = max(self.last_round, score.candidate.round)
            if score.errored:
                self.errors += 1
                self.first_error = self.first_error or f"{where}: {row.get('error') or 'has_error'}"

    def text(self, number: int) -> list[TextRow]:
        """Return the row to train on of the trajectory at a position; best asked in ascending order."""
        if number < self._next:
            self._next, self._reader = 0, iter(())
        if not self._next:
            self._reader = enumerate(map(self._text, self._rows(), self.scores))
        for position, row in self._reader:
            self._next = position + 1
            if position == number:
                return [row] if row.completion else []
        raise IndexError(number)

    def _rows(self) -> Iterator[tuple[dict[str, Any], str]]:
        for file in self.files:
            yield from read_rows(file)

    @staticmethod
    def _text(given: tuple[dict[str, Any], str], score: Brief) -> TextRow:
        made, reward = _trajectory(*given), score.reward
        prompt = made.prompt if not isinstance(made.prompt, str) else [Message(role="user", content=made.prompt)]
        columns = made.problem.columns
        return TextRow(score.id, made.problem.id, tuple(prompt), tuple(made.completion), reward, columns)


def is_foreign(place: str) -> bool:
    """Return whether a place of `rollouts` is a file of rows, rather than a run or its rollouts."""
    path = Path(place)
    if path.is_dir() or path.name == ROLLOUTS:
        return False
    if path.is_file() and path.suffix == ".jsonl":
        with path.open("rb") as file:
            line = file.readline()
        try:
            first = json.loads(line)
        except ValueError:
            return True  # its reader says what is wrong with it
        return not (isinstance(first, dict) and {"turns", "ended"} <= first.keys())
    return True


def _trajectory(row: Mapping[str, Any], where: str) -> Demonstration:
    """Return prompt and completion of a row; what follows the last message of the assistant is left out."""
    given = {key: value for key, value in row.items() if key not in OUTCOME}
    for key in ("completion", "messages"):
        if isinstance(given.get(key), list):
            given[key] = _up_to_assistant(given[key])
    if not given.get("completion", True) or (given.get("messages") == [] and "prompt" in given):
        given = {key: value for key, value in given.items() if key not in ("completion", "messages")}
        return demonstration(given, where, problem_only=True)
    return demonstration(given, where)


def _up_to_assistant(said: list[Any]) -> list[Any]:
    ours = [i for i, m in enumerate(said) if isinstance(m, Mapping) and m.get("role") == "assistant"]
    return said[: ours[-1] + 1] if ours else [] if all(isinstance(m, Mapping) for m in said) else said


def _score(row: Mapping[str, Any], where: str, attempts: Counter[tuple[int, str]]) -> Brief:
    """Return the outcome of a row; attempts: how many came before, by round and problem."""
    made = _trajectory(row, where)
    reward, errored = _reward(row, where), says_yes(row.get("has_error")) or not is_empty(row.get("error"))
    truncated = any(says_yes(row.get(key)) for key in ("is_truncated", "truncated"))
    truncated = truncated or row.get("stop_condition") in _LIMITS
    if not made.completion and not errored:
        raise DataError(f"{where}: no message of the assistant, and no error: give its completion, or has_error: true")
    number = _round(row.get("round"), where)
    # An environment's opening may be the same for all problems: a name that is given says more than the words.
    problem = made.problem.id if is_empty(row.get("problem_id")) else str(row["problem_id"])
    attempt = attempts[number, problem]
    attempts[number, problem] += 1
    status: Status = "errored" if errored else "truncated" if truncated else "done"
    graded = reward is not None and not errored and not says_no(row.get("graded", True))
    said = json.dumps(in_file(made.completion), sort_keys=True)
    candidate = Candidate(
        id=next((str(row[key]) for key in _IDS if not is_empty(row.get(key))), f"{number}-{problem}-{attempt}"),
        problem_id=problem,
        reward=reward if graded and reward is not None else 0.0,
        graded=graded,
        success=_success(row.get("success"), where),
        status=status,
        digest=sha256(said.encode()).hexdigest(),
        round=number,
    )
    return Brief(candidate, (("reward", candidate.reward if graded else None),), truncated, {}, {})


def _reward(row: Mapping[str, Any], where: str) -> float | None:
    if "reward" not in row:
        raise DataError(
            f"{where}: no column reward: a trajectory is selected by its reward; rename the column that has it, or "
            f"give it null where an attempt is not graded"
        )
    value = row["reward"]
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: reward: expected a finite number or null, not {show(value)}")
    return float(value)


def _success(value: Any, where: str) -> Success:
    """Return what a row says about its success; unknown where it says nothing."""
    if is_empty(value) or value == "unknown":
        return "unknown"
    if value == "yes" or says_yes(value):
        return "yes"
    if value == "no" or says_no(value):
        return "no"
    raise DataError(f"{where}: success: expected true, false, yes, no or unknown, not {show(value)}")


def _round(value: Any, where: str) -> int:
    if is_empty(value):
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{where}: round: expected a whole number of at least 0, not {show(value)}")
    return value
