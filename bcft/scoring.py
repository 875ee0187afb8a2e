"""Played trajectories to scores: rewards weighted and summed, success apart from reward, ungraded apart from 0."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import Any

from bcft.rewards import Reward, ask, name_of
from bcft.selection import Candidate
from bcft.types import Message, Problem, Success, Trajectory


@dataclass(frozen=True, slots=True)
class Score:
    """What one trajectory is worth."""

    trajectory: Trajectory
    rewards: tuple[tuple[str, float | None], ...]
    """Each reward function's name and what it returned, None where it could not grade."""
    graded: bool
    reward: float
    """The weighted sum of what was graded, the environment's rewards added; 0.0 when nothing was."""
    success: Success

    @property
    def candidate(self) -> Candidate:
        """What the filter looks at."""
        played = self.trajectory
        digest = sha256(repr([turn.action_ids for turn in played.turns]).encode()).hexdigest()
        errored = played.ended == "error"
        return Candidate(
            id=played.id,
            problem_id=played.problem_id,
            reward=self.reward,
            graded=self.graded,
            success=self.success,
            status="errored" if errored else "truncated" if played.cut else "done",
            digest=digest,
            round=played.round,
        )

    def to_json(self, fate: str, cutoff: float) -> dict[str, Any]:
        """Return a line of `scores.jsonl`."""
        return {
            "id": self.trajectory.id,
            "graded": self.graded,
            "reward": self.reward,
            "rewards": [
                {"name": name, "graded": value is not None, "value": 0.0 if value is None else value}
                for name, value in self.rewards
            ],
            "success": self.success,
            "fate": fate,
            "cutoff": cutoff,
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any], trajectory: Trajectory) -> "Score":
        """Return the score of a trajectory from its line; reward functions are asked once only."""
        rewards = tuple((r["name"], r["value"] if r["graded"] else None) for r in line["rewards"])
        return cls(trajectory, rewards, line["graded"], line["reward"], line["success"])


def score(
    trajectories: Sequence[Trajectory],
    problems: Mapping[str, Problem],
    functions: Sequence[Reward],
    *,
    weights: Sequence[float],
    success: Reward | None,
) -> list[Score]:
    """Score trajectories by reward functions in TRL's signature, in the form of each problem's prompt.

    weights: one a function, as in TRL: summed over the functions that did not return None. Success is the
    environment's last word, else the success function's: solved at 1.0 or more, unknown at None.

    Raises FaultError when a function raises or returns another number of values than it was given completions.
    """
    whole = [played for played in trajectories if played.ended != "error"]
    asked = [problems[played.problem_id] for played in whole]
    completions = [_completion(played, problem) for played, problem in zip(whole, asked, strict=True)]
    columns = [ask(function, asked, completions) for function in functions]
    # A success function that is also a reward is asked once.
    told = columns[functions.index(success)] if success in functions else None
    if told is None:
        told = ask(success, asked, completions) if success else [None] * len(asked)
    names = [name_of(function) for function in functions]
    values = {played.id: found for played, *found in zip(whole, told, *columns, strict=True)}
    nothing: list[float | None] = [None] * (1 + len(functions))
    return [_score(played, names, weights, values.get(played.id, nothing)) for played in trajectories]


def _score(played: Trajectory, names: Sequence[str], weights: Sequence[float], values: Sequence[float | None]) -> Score:
    """Return the score of one trajectory; values: what the success function said, then each reward function."""
    solved, *rewards = values
    named = tuple(zip(names, rewards, strict=True))
    if played.ended == "error":  # it was never finished: not a reward of 0, and no failure of the policy's
        return Score(played, named, graded=False, reward=0.0, success="unknown")
    given = [weight * value for weight, value in zip(weights, rewards, strict=True) if value is not None]
    own = played.environment_reward
    given += [] if own is None else [own]
    known: Success = "unknown" if solved is None else "yes" if solved >= 1.0 else "no"
    return Score(
        played, named, bool(given), float(sum(given)), known if played.success == "unknown" else played.success
    )


def _completion(played: Trajectory, problem: Problem) -> str | list[Message]:
    """Return all that was said after the prompt: a string for a string, else messages."""
    if isinstance(problem.prompt, str) and len(played.turns) <= 1:
        return played.turns[0].action if played.turns else ""
    said: list[Message] = []
    for turn in played.turns:
        said += [{"role": "assistant", "content": turn.action}, *turn.observation]
    return said


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
