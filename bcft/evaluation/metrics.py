"""What a round's attempts come to in numbers: how they did, how much they differ, what a second attempt changed."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from bcft.selection.scoring import Score
from bcft.types import Success


def tally(scores: Sequence[Score]) -> dict[str, Any]:
    """Return how a round's attempts did: `rollout` of its metrics."""
    played = [found.trajectory for found in scores]
    rewards = [found.reward for found in scores if found.graded]
    return {
        "played": len(played),
        "tokens": sum(len(turn.action_ids) for trajectory in played for turn in trajectory.turns),
        "success": sum(found.success == "yes" for found in scores) / max(len(scores), 1),
        "unknown": sum(found.success == "unknown" for found in scores),
        "reward_mean": sum(rewards) / max(len(rewards), 1),
        "reward_max": max(rewards, default=0.0),
        "truncated": sum(trajectory.cut for trajectory in played),
        "ungraded": sum(not found.graded for found in scores),
        "errors": sum(trajectory.ended == "error" for trajectory in played),
        "stop_rate": sum(not trajectory.cut for trajectory in played) / max(len(played), 1),
    }


def revision(told: Sequence[tuple[Success, Success]]) -> dict[str, Any]:
    """Return what became of first attempts that were judged: told has success after the first turn and at the end."""
    n = len(told)
    return {
        "n": n,
        "first": sum(first == "yes" for first, _ in told) / n,
        "last": sum(last == "yes" for _, last in told) / n,
        "wrong_to_right": sum(first == "no" and last == "yes" for first, last in told),
        "right_to_wrong": sum(first == "yes" and last != "yes" for first, last in told),
    }


def diversity(scores: Sequence[Score]) -> dict[str, float]:
    """Return how much a round's attempts differ: what a policy that collapses loses before it loses success.

    unique_correct_per_problem: distinct solved attempts, mean over the problems attempted; distinct_2: distinct pairs
    of neighbouring tokens over all such pairs of the round (Li et al. 2016, https://arxiv.org/abs/1510.03055);
    completion_length: mean tokens of an attempt.
    """
    problems = {found.trajectory.problem_id for found in scores}
    correct = {(f.trajectory.problem_id, f.candidate.digest) for f in scores if f.success == "yes"}
    actions = [turn.action_ids for found in scores for turn in found.trajectory.turns]
    pairs = [pair for ids in actions for pair in pairwise(ids)]
    return {
        "unique_correct_per_problem": len(correct) / max(len(problems), 1),
        "distinct_2": len(set(pairs)) / max(len(pairs), 1),
        "completion_length": sum(map(len, actions)) / max(len(scores), 1),
    }
