"""From trajectories to scores: rewards weighted and summed, success apart from reward, ungraded apart from 0."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from bcft.config.schema import SelectionSettings
from bcft.errors import DataError, FaultError, UsageError
from bcft.rewards.base import REFERENCE_COLUMNS, Answers, Reward, answers_of, ask, import_function, name_of, reference
from bcft.runs.storage import ROLLOUTS, SCORES, read_jsonl
from bcft.selection.filter import Candidate
from bcft.types import Message, Problem, Success, Trajectory

DEFAULT_REWARD = "bcft.rewards.math_reward"
"""The dotted path of the reward function, unless the recipe names others or has an environment."""


@dataclass(frozen=True, slots=True)
class Score:
    """The rewards of one trajectory, and their sum."""

    trajectory: Trajectory
    rewards: tuple[tuple[str, float | None], ...]
    """Each reward function's name and its value, None if it could not grade."""
    graded: bool
    reward: float
    """The weighted sum of the graded rewards and of the environment's; 0.0 when there are none."""
    success: Success

    @property
    def candidate(self) -> Candidate:
        """The record that the filter reads."""
        trajectory = self.trajectory
        errored = trajectory.ended == "error"
        return Candidate(
            id=trajectory.id,
            problem_id=trajectory.problem_id,
            reward=self.reward,
            graded=self.graded,
            success=self.success,
            status="errored" if errored else "truncated" if trajectory.truncated else "done",
            digest=sha256(repr([turn.action_ids for turn in trajectory.turns]).encode()).hexdigest(),
            round=trajectory.round,
        )

    def to_json(self, decision: str, cutoff: float) -> dict[str, Any]:
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
            "decision": decision,
            "cutoff": cutoff,
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any], trajectory: Trajectory) -> "Score":
        """Return the score of a trajectory from its line: the reward functions are not called again."""
        rewards = tuple((r["name"], r["value"] if r["graded"] else None) for r in line["rewards"])
        return cls(trajectory, rewards, line["graded"], line["reward"], line["success"])


def stored_scores(directory: Path) -> list[Score]:
    """Return the scores of a round's own trajectories from its files."""
    trajectories = {line["id"]: Trajectory.from_json(line) for line in read_jsonl(directory / ROLLOUTS)}
    lines = read_jsonl(directory / SCORES)
    return [Score.from_json(line, trajectories[line["id"]]) for line in lines if line["id"] in trajectories]


def score(
    trajectories: Sequence[Trajectory],
    problems: Mapping[str, Problem],
    functions: Sequence[Reward],
    *,
    weights: Sequence[float],
    success: Reward | None,
) -> list[Score]:
    """Score trajectories with reward functions in TRL's signature, in the form of each problem's prompt.

    weights: one for each function, as in TRL: summed over the functions that did not return None. Success is the last
    known one of the environment, else it follows from the success function: solved at 1.0 or more, unknown at None.

    Raises FaultError when a function raises or returns another number of values than it was given completions.
    """
    finished = [trajectory for trajectory in trajectories if trajectory.ended != "error"]
    attempted = [problems[trajectory.problem_id] for trajectory in finished]
    completions = [_completion(trajectory, problem) for trajectory, problem in zip(finished, attempted, strict=True)]
    columns = [ask(function, attempted, completions) for function in functions]
    if success in functions:  # a success function that is also a reward is called once
        solved = columns[functions.index(success)]
    else:
        solved = ask(success, attempted, completions) if success else [None] * len(attempted)
    names = [name_of(function) for function in functions]
    values = {trajectory.id: row for trajectory, *row in zip(finished, solved, *columns, strict=True)}
    no_values: list[float | None] = [None] * (1 + len(functions))
    return [_score(trajectory, names, weights, values.get(trajectory.id, no_values)) for trajectory in trajectories]


def _score(
    trajectory: Trajectory, names: Sequence[str], weights: Sequence[float], values: Sequence[float | None]
) -> Score:
    """Return the score of one trajectory; values: of the success function, then of each reward function."""
    solved, *rewards = values
    named = tuple(zip(names, rewards, strict=True))
    if trajectory.ended == "error":  # it never finished: neither a reward of 0 nor a failure of the policy
        return Score(trajectory, named, graded=False, reward=0.0, success="unknown")
    given = [weight * value for weight, value in zip(weights, rewards, strict=True) if value is not None]
    environment_reward = trajectory.environment_reward
    given += [] if environment_reward is None else [environment_reward]
    success: Success = "unknown" if solved is None else "yes" if solved >= 1.0 else "no"
    if trajectory.success != "unknown":
        success = trajectory.success
    return Score(trajectory, named, bool(given), float(sum(given)), success)


def _completion(trajectory: Trajectory, problem: Problem) -> str | list[Message]:
    """Return everything after the prompt: a string if the prompt is one and there is one turn, else messages."""
    if isinstance(problem.prompt, str) and len(trajectory.turns) <= 1:
        return trajectory.turns[0].action if trajectory.turns else ""
    return list(trajectory.conversation)


MAX_ERROR_SHARE = 0.05
"""A command stops when more than this share of environments fails."""


@dataclass(frozen=True)
class Scorer:
    """Reward functions with their weights, and the function that decides about success, if there is one."""

    functions: tuple[Reward, ...]
    weights: tuple[float, ...]
    success: Reward | None

    @classmethod
    def of(
        cls,
        selection: SelectionSettings,
        held_out: Sequence[Problem],
        *,
        environment: str | None,
        reward_funcs: Sequence[Reward] | None = None,
    ) -> "Scorer":
        """Return the scorer of a recipe. `reward_funcs` replace the functions that the recipe names.

        Raises UsageError for another number of weights than of functions, or a function that does not exist, and
        DataError as `success_function` does.
        """
        names = reward_names(selection, environment=environment)
        functions = tuple(reward_funcs or (import_function(name, key="reward_funcs") for name in names))
        weights = selection.reward_weights or (1.0,) * len(functions)
        if len(weights) != len(functions):
            raise UsageError(f"reward_weights: {len(weights)} weights for {len(functions)} reward functions")
        success = success_function(selection, held_out, environment=environment, rewards=reward_funcs or ())
        return cls(functions, weights, success)

    @property
    def answers(self) -> Answers | None:
        """How the success function reads answers; None if it does not compare answers with references."""
        return answers_of(self.success)

    def check(self, problems: Sequence[Problem]) -> str:
        """Grade the references of problems against themselves; return a note if that is not possible, or ''.

        Raises DataError with the first reference that a function does not accept.
        """
        readers = [function for function in self.functions if answers_of(function)]
        for function in readers:
            check_references(function, problems)
        if self.functions and not readers:
            return "references: not graded against themselves, no reward function is known to read them"
        return ""

    def score(self, trajectories: Sequence[Trajectory], problems: Mapping[str, Problem]) -> list[Score]:
        """Score trajectories. Raises FaultError when too many environments failed, or when a function fails."""
        refuse_failures(trajectories)
        return score(trajectories, problems, self.functions, weights=self.weights, success=self.success)


def refuse_failures(trajectories: Sequence[Trajectory]) -> None:
    """Raise FaultError when more than `MAX_ERROR_SHARE` of the trajectories ended in an error of their environment."""
    errors = [trajectory for trajectory in trajectories if trajectory.ended == "error"]
    if len(errors) > MAX_ERROR_SHARE * len(trajectories):
        first = f"{errors[0].id}: {errors[0].error}"
        raise FaultError(f"{len(errors)} of {len(trajectories)} trajectories failed; {first}")


def reward_names(selection: SelectionSettings, *, environment: str | None) -> tuple[str, ...]:
    """Return the dotted paths of the reward functions: by default `DEFAULT_REWARD`, and none with an environment."""
    if selection.reward_funcs is not None:
        return selection.reward_funcs
    return () if environment else (DEFAULT_REWARD,)


def success_function(
    selection: SelectionSettings,
    held_out: Sequence[Problem],
    *,
    environment: str | None,
    rewards: Sequence[Reward] = (),
) -> Reward | None:
    """Return the function that decides about success: `success_func`, else the first reward function.

    rewards: functions that replace the recipe's `reward_funcs`. Returns None if `success_func` is '', if the
    environment decides instead, and if the default reward would decide but a held-out problem has no reference answer.

    Raises UsageError when the function does not exist, and DataError when it reads answers and does not accept a
    held-out reference as its own solution.
    """
    name, names = selection.success_func, reward_names(selection, environment=environment)
    if name == "" or (name is None and not rewards and not names):
        return None
    if name is None and rewards:
        function = rewards[0]
    else:
        key = "reward_funcs" if name is None else "success_func"
        function = import_function(name or names[0], key=key)
    if answers_of(function):
        by_default = name is None and not rewards and selection.reward_funcs is None
        if by_default and not _have_references(held_out):
            return None
        check_references(function, held_out)
    return function


def check_references(function: Reward, problems: Sequence[Problem]) -> None:
    """Grade each reference against itself: a refused one would make every attempt at its problem wrong.

    Raises DataError with the first reference that the function does not accept.
    """
    texts = [reference(problem) for problem in problems]
    names = [name for name in REFERENCE_COLUMNS if any(name in problem.columns for problem in problems)]
    columns = names or [REFERENCE_COLUMNS[0]]
    questions = [
        Problem(problem.id, text, dict.fromkeys(columns, text), problem.where)
        for problem, text in zip(problems, texts, strict=True)
    ]
    grades = ask(function, questions, texts)
    refused = [question for question, grade in zip(questions, grades, strict=True) if grade != 1.0]
    if refused:
        more = f" (nor those of {len(refused) - 1} more rows)" if len(refused) > 1 else ""
        raise DataError(
            f"{refused[0].where}: {name_of(function)} does not accept the reference {reference(refused[0])[-60:]!r} "
            f"as its own solution{more}: correct or remove it, or name other reward functions"
        )


def _have_references(problems: Sequence[Problem]) -> bool:
    """Return whether there are problems, and every one has a reference answer."""
    return bool(problems) and all(any(name in problem.columns for name in REFERENCE_COLUMNS) for problem in problems)
