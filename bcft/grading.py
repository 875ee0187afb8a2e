"""By what attempts are graded: the functions a recipe names, or that came from Python, checked before use."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bcft.config import Recipe
from bcft.errors import DataError, FaultError, UsageError
from bcft.rewards import Reward, import_function, math_reward
from bcft.scoring import Score, score
from bcft.types import Problem, Trajectory

REFERENCES = ("answer", "solution", "ground_truth")
"""Columns that hold a reference answer, in the order a reward looks for them."""
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


def reference(problem: Problem) -> str:
    """Return a problem's reference answer; '' where it has none."""
    return str(next((problem.columns[name] for name in REFERENCES if name in problem.columns), ""))
