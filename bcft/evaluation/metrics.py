"""A round's attempts in numbers: success and rewards, diversity, and second attempts against first ones."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bcft.selection.brief import Scored
from bcft.selection.scoring import Score
from bcft.types import Success


def tally(scores: Sequence[Scored]) -> dict[str, Any]:
    """Return how a round's attempts did: `rollout` of its metrics; `logged` is there if a reward function logged."""
    rewards = [score.reward for score in scores if score.graded]
    logged: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.logged.items():
            logged.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in logged.items()}
    figures = {
        "played": len(scores),
        "tokens": sum(score.tokens for score in scores),
        "success": sum(score.success == "yes" for score in scores) / max(len(scores), 1),
        "unknown": sum(score.success == "unknown" for score in scores),
        "reward_mean": sum(rewards) / max(len(rewards), 1),
        "reward_max": max(rewards, default=0.0),
        "truncated": sum(score.truncated for score in scores),
        "ungraded": sum(not score.graded for score in scores),
        "errors": sum(score.errored for score in scores),
        "stop_rate": sum(not score.truncated for score in scores) / max(len(scores), 1),
    }
    return figures | ({"logged": means} if means else {})


def revision(successes: Sequence[tuple[Success, Success]]) -> dict[str, Any]:
    """Return how second attempts compare with first ones.

    successes: after the first turn and at the end of each attempt, at least one.
    """
    n = len(successes)
    return {
        "n": n,
        "first": sum(first == "yes" for first, _ in successes) / n,
        "last": sum(last == "yes" for _, last in successes) / n,
        "wrong_to_right": sum(first == "no" and last == "yes" for first, last in successes),
        "right_to_wrong": sum(first == "yes" and last != "yes" for first, last in successes),
    }


def diversity(scores: Iterable[Score]) -> dict[str, float]:
    """Return how much a round's attempts differ: the figures of `Diversity`."""
    counted = Diversity()
    for score in scores:
        counted.add(score)
    return counted.figures


class Diversity:
    """How much attempts differ; a collapsing policy loses diversity before it loses success.

    Attempts are added one by one, and their tokens are not kept.
    """

    def __init__(self) -> None:
        self.attempts = self.tokens = 0
        self.problems: set[str] = set()
        self.correct: set[tuple[str, str]] = set()
        self.pairs = _Pairs()

    def add(self, score: Score) -> None:
        """Count an attempt."""
        candidate = score.candidate
        self.attempts += 1
        self.problems.add(candidate.problem_id)
        if candidate.success == "yes":
            self.correct.add((candidate.problem_id, candidate.digest))
        for turn in score.trajectory.turns:
            self.tokens += len(turn.action_ids)
            self.pairs.add(turn.action_ids)

    @property
    def figures(self) -> dict[str, float]:
        """Of all attempts.

        unique_correct_per_problem: distinct solved attempts, mean over the problems attempted; distinct_2: distinct
        pairs of neighboring tokens over all such pairs (Li et al. 2016, https://arxiv.org/abs/1510.03055);
        completion_length: mean tokens of an attempt.
        """
        return {
            "unique_correct_per_problem": len(self.correct) / max(len(self.problems), 1),
            "distinct_2": self.pairs.distinct / max(self.pairs.n, 1),
            "completion_length": self.tokens / max(self.attempts, 1),
        }


class _Pairs:
    """Counts pairs of neighboring tokens, and distinct ones, in 8 bytes for each of these: a set takes over 100."""

    MANY = 1 << 20
    """Most pairs that wait to be sorted, unless more were distinct so far."""

    def __init__(self) -> None:
        self.n = self._waiting = 0
        self._known: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._new: list[npt.NDArray[np.uint64]] = []

    def add(self, ids: Sequence[int]) -> None:
        """Count the pairs of a sequence of ids, which are below 2**32."""
        if len(ids) < 2:
            return
        numbers = np.asarray(ids, np.uint64)
        self._new.append(numbers[:-1] << np.uint64(32) | numbers[1:])
        self.n += len(ids) - 1
        self._waiting += len(ids) - 1
        if self._waiting > max(self.MANY, len(self._known) // 4):
            self._sort()

    @property
    def distinct(self) -> int:
        """How many differ."""
        self._sort()
        return len(self._known)

    def _sort(self) -> None:
        if not self._new:
            return
        pairs = np.concatenate([self._known, *self._new])  # `np.unique` would copy it, beside what it is made of
        self._known, self._new, self._waiting = pairs[:0], [], 0
        pairs.sort()
        self._known = pairs[np.concatenate([[True], pairs[1:] != pairs[:-1]])]
