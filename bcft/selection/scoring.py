"""Played trajectories to scores: rewards weighted and summed, success apart from reward, ungraded apart from 0."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from bcft.config.loader import Recipe
from bcft.errors import DataError, FaultError, UsageError
from bcft.rewards.base import REFERENCES, Reward, ask, import_function, name_of, reference
from bcft.rewards.math_answers import math_reward
from bcft.selection.filter import Candidate
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


MOST_ERRORS = 0.05
"""The share of trajectories whose environment may fail before a command ends."""


@dataclass(frozen=True)
class Grading:
    """Reward functions with their weights, and what says whether an attempt solved its problem: None for nothing."""

    functions: tuple[Reward, ...]
    weights: tuple[float, ...]
    success: Reward | None

    @classmethod
    def of(
        cls, recipe: Recipe, held_out: Sequence[Problem], *, reward_funcs: Sequence[Callable[..., Any]] | None = None
    ) -> "Grading":
        """Return a recipe's; `reward_funcs` take the place of those it names.

        Raises UsageError when there is a weight too many or too few, or no such function.
        """
        names = reward_names(recipe)
        functions = tuple(reward_funcs or (import_function(name, key="reward_funcs") for name in names))
        weights = tuple(recipe["reward_weights"] or [1.0] * len(functions))
        if len(weights) != len(functions):
            raise UsageError(f"reward_weights: {len(weights)} weights for {len(functions)} reward functions")
        return cls(functions, weights, success_function(recipe, held_out, functions))

    def check(self, problems: Sequence[Problem]) -> str:
        """Grade the references of problems against themselves where that can be done; say so where it cannot, or ''."""
        if math_reward in self.functions:
            check_references(problems)
        elif self.functions:
            return "references: not graded against themselves, no reward function is known to read them"
        return ""

    def score(self, trajectories: Sequence[Trajectory], problems: Mapping[str, Problem]) -> list[Score]:
        """Score what was played. Raises FaultError when too many environments failed, or a function does."""
        refuse_failures(trajectories)
        return score(trajectories, problems, self.functions, weights=self.weights, success=self.success)


def refuse_failures(trajectories: Sequence[Trajectory]) -> None:
    """Raise FaultError when more than `MOST_ERRORS` of the trajectories ended in an error of their environment."""
    errors = [trajectory for trajectory in trajectories if trajectory.ended == "error"]
    if len(errors) > MOST_ERRORS * len(trajectories):
        first = f"{errors[0].id}: {errors[0].error}"
        raise FaultError(f"{len(errors)} of {len(trajectories)} trajectories failed; {first}")


def reward_names(recipe: Recipe) -> list[str]:
    """Return the reward functions a recipe names: where it says nothing, `math_reward` for answers to questions, and
    none beside an environment."""
    names: list[str] | None = recipe["reward_funcs"]
    if names is not None:
        return names
    return [] if recipe["environment"] else ["bcft.rewards.math_reward"]


def success_function(recipe: Recipe, held_out: Sequence[Problem], rewards: Sequence[Reward] = ()) -> Reward | None:
    """Return what says whether an attempt solved its problem: `success_func`, else the first reward function.

    rewards: functions that take the place of the recipe's `reward_funcs`. None where `success_func` is '', where an
    environment is asked instead, and where `math_reward` is nobody's wish but the default's and would find no reference
    answers.

    Raises DataError when `math_reward` does not accept a held-out reference answer as its own solution.
    """
    name, names = recipe["success_func"], reward_names(recipe)
    if name == "" or (name is None and not rewards and not names):
        return None
    if name is None and rewards:
        function = rewards[0]
    else:
        key = "reward_funcs" if name is None else "success_func"
        function = import_function(name or names[0], key=key)
    if function is math_reward:
        told = bool(held_out) and all(any(key in problem.columns for key in REFERENCES) for problem in held_out)
        if not told and name is None and recipe["reward_funcs"] is None:
            return None
        check_references(held_out)
    return function


def check_references(problems: Sequence[Problem]) -> None:
    """Grade each reference answer against itself: one that is not its own solution would make every attempt wrong.

    Raises DataError with the first that `math_reward` does not accept.
    """
    texts = [reference(problem) for problem in problems]
    graded = math_reward(prompts=texts, completions=texts, answer=texts)
    refused = [problem for problem, value in zip(problems, graded, strict=True) if value != 1.0]
    if refused:
        more = f" (nor those of {len(refused) - 1} more rows)" if len(refused) > 1 else ""
        raise DataError(
            f"{refused[0].where}: math_reward does not accept the reference {reference(refused[0])[-60:]!r} "
            f"as its own solution{more}: mend or remove it, or name other reward functions"
        )
