"""A round's attempts in numbers: success and rewards, diversity, and second attempts against first ones."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from bcft.selection.scoring import Score
from bcft.types import Success


def tally(scores: Sequence[Score]) -> dict[str, Any]:
    """Return how a round's attempts did: `rollout` of its metrics; `logged` is there if a reward function logged."""
    trajectories = [score.trajectory for score in scores]
    rewards = [score.reward for score in scores if score.graded]
    logged: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.logged.items():
            logged.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in logged.items()}
    figures = {
        "played": len(trajectories),
        "tokens": sum(len(turn.action_ids) for trajectory in trajectories for turn in trajectory.turns),
        "success": sum(score.success == "yes" for score in scores) / max(len(scores), 1),
        "unknown": sum(score.success == "unknown" for score in scores),
        "reward_mean": sum(rewards) / max(len(rewards), 1),
        "reward_max": max(rewards, default=0.0),
        "truncated": sum(trajectory.truncated for trajectory in trajectories),
        "ungraded": sum(not score.graded for score in scores),
        "errors": sum(trajectory.ended == "error" for trajectory in trajectories),
        "stop_rate": sum(not trajectory.truncated for trajectory in trajectories) / max(len(trajectories), 1),
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


def diversity(scores: Sequence[Score]) -> dict[str, float]:
    """Return how much a round's attempts differ; a collapsing policy loses diversity before it loses success.

    unique_correct_per_problem: distinct solved attempts, mean over the problems attempted; distinct_2: distinct pairs
    of neighboring tokens over all such pairs of the round (Li et al. 2016, https://arxiv.org/abs/1510.03055);
    completion_length: mean tokens of an attempt.
    """
    problems = {score.trajectory.problem_id for score in scores}
    correct = {(score.trajectory.problem_id, score.candidate.digest) for score in scores if score.success == "yes"}
    actions = [turn.action_ids for score in scores for turn in score.trajectory.turns]
    pairs = [pair for ids in actions for pair in pairwise(ids)]
    return {
        "unique_correct_per_problem": len(correct) / max(len(problems), 1),
        "distinct_2": len(set(pairs)) / max(len(pairs), 1),
        "completion_length": sum(map(len, actions)) / max(len(scores), 1),
    }
