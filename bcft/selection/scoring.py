"""From trajectories to scores: rewards weighted and summed, success apart from reward, ungraded apart from 0."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

from bcft.config.schema import SelectionSettings
from bcft.errors import UsageError
from bcft.rewards.base import REFERENCE_COLUMNS, Answers, Batch, Reward, answers_of, ask_all, described, name_of, solved
from bcft.rewards.signature import named_columns, takes
from bcft.rollout.failures import refuse_failures
from bcft.runs.progress import Progress
from bcft.runs.storage import ROLLOUTS, SCORES, read_jsonl
from bcft.selection.brief import Brief, score_line
from bcft.selection.filter import Candidate
from bcft.selection.functions import check_columns, check_references, choose_functions, have_references
from bcft.selection.store import Graded, ScoreStore
from bcft.types import Message, Problem, Success, Trajectory

BATCH = 128
"""Most attempts that a reward function gets together; more if one problem has more."""
Attempt = TypeVar("Attempt")


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
    logged: Mapping[str, float] = field(default_factory=dict)
    """What the functions gave to `log_metric`: the means over the batch that it was graded in."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What the functions gave to `log_extra` for it."""

    @property
    def id(self) -> str:
        """The trajectory's."""
        return self.trajectory.id

    @property
    def tokens(self) -> int:
        """How many were sampled."""
        return self.trajectory.tokens

    @property
    def truncated(self) -> bool:
        """Whether the trajectory was."""
        return self.trajectory.truncated

    @property
    def errored(self) -> bool:
        """Whether its environment failed."""
        return self.trajectory.ended == "error"

    @property
    def brief(self) -> Brief:
        """The same without the trajectory."""
        return Brief(
            candidate=self.candidate,
            rewards=self.rewards,
            truncated=self.truncated,
            logged=self.logged or _NOTHING,
            extra=self.extra or _NOTHING,
        )

    @property
    def candidate(self) -> Candidate:
        """The record that the filter reads."""
        trajectory = self.trajectory
        return Candidate(
            id=trajectory.id,
            problem_id=trajectory.problem_id,
            reward=self.reward,
            graded=self.graded,
            success=self.success,
            status="errored" if self.errored else "truncated" if trajectory.truncated else "done",
            digest=sha256(repr([turn.action_ids for turn in trajectory.turns]).encode()).hexdigest(),
            round=trajectory.round,
            length=trajectory.tokens,
        )

    def to_json(self, decision: str, cutoff: float) -> dict[str, Any]:
        """Return a line of `scores.jsonl`; `logged` and `extra` are there if a function logged something."""
        return score_line(self, decision, cutoff)

    @classmethod
    def from_json(cls, line: Mapping[str, Any], trajectory: Trajectory) -> "Score":
        """Return the score of a trajectory from its line: the reward functions are not called again."""
        rewards = tuple((r["name"], r["value"] if r["graded"] else None) for r in line["rewards"])
        notes = {name: line.get(name, {}) for name in ("logged", "extra")}
        return cls(trajectory, rewards, line["graded"], line["reward"], line["success"], **notes)


_NOTHING: Mapping[str, Any] = {}


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
    store: Path | None = None,
    step: int = 0,
    label: str = "",
) -> list[Score]:
    """Score trajectories with reward functions in TRL's signature, in the form of each problem's prompt.

    weights: one for each function, as in TRL: summed over the functions that did not return None. Success is the last
    known one of the environment, else it follows from the success function: solved at 1.0 or more, unknown at None.
    store: a journal that gets every answer at once; an attempt that is there is not asked for again. step: optimizer
    steps so far. label: of the progress; '' for none.

    Raises FaultError when a function raises or returns another number of values than it was given completions.
    """
    played = [trajectory for trajectory in trajectories if trajectory.ended != "error"]
    others = [trajectory for trajectory in trajectories if trajectory.ended == "error"]
    batches = [*batches_of(played, lambda trajectory: trajectory.problem_id), *([others] if others else [])]
    made: dict[str, Score] = {}
    for scores in score_batches(
        batches, problems, functions, weights=weights, success=success, total=len(played), store=store, step=step,
        label=label,
    ):  # fmt: skip
        made |= {score.id: score for score in scores}
    return [made[trajectory.id] for trajectory in trajectories]


def score_batches(
    batches: Iterable[Sequence[Trajectory]],
    problems: Mapping[str, Problem],
    functions: Sequence[Reward],
    *,
    weights: Sequence[float],
    success: Reward | None,
    total: int,
    store: Path | None = None,
    step: int = 0,
    label: str = "",
) -> Iterator[list[Score]]:
    """Yield the scores of each batch of `batches_of` once it is scored, as `score` does; no other is in memory.

    Trajectories whose environment failed are not asked for. total: how many others there are, for the progress.
    """
    asked = list(functions)
    if success and not any(function is success for function in functions):
        asked.append(success)  # one that is also a reward is called once
    kept = ScoreStore(store, asked, problems)
    names = [name_of(function) for function in functions]
    decides = next((number for number, function in enumerate(asked) if function is success), None)
    columns = list(dict.fromkeys(key for problem in problems.values() for key in problem.columns))
    with Progress(label) as progress:
        progress.count(total, "attempts")
        for trajectories in batches:
            attempts = {
                trajectory.id: (trajectory, _completion(trajectory, problems[trajectory.problem_id]))
                for trajectory in trajectories
                if trajectory.ended != "error"
            }
            batch = list(attempts.values())
            missing = [[pair for pair in batch if kept.get(number, *pair) is None] for number in range(len(asked))]
            numbers = [number for number, pairs in enumerate(missing) if pairs]
            requests = [(asked[n], _batch(missing[n], problems, columns=columns, step=step)) for n in numbers]
            for place, returned in ask_all(requests):
                kept.add(numbers[place], missing[numbers[place]], returned)
            progress.advance(len(batch))
            scores = []
            for trajectory in trajectories:
                pair = attempts.get(trajectory.id)
                answers = [kept.get(number, *pair) if pair else None for number in range(len(asked))]
                scores.append(_score(trajectory, names, weights, answers, decides=decides))
            kept.forget(batch)
            yield scores


def batches_of(attempts: Iterable[Attempt], problem_of: Callable[[Attempt], str]) -> Iterator[list[Attempt]]:
    """Yield all attempts in batches of whole problems, because a reward may compare the attempts at a problem."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        groups.setdefault(problem_of(attempt), []).append(attempt)
    batch: list[Attempt] = []
    for group in groups.values():
        if batch and len(batch) + len(group) > BATCH:
            yield batch
            batch = []
        batch = [*batch, *group]
    if batch:
        yield batch


def _batch(
    attempts: Sequence[tuple[Trajectory, Any]], problems: Mapping[str, Problem], *, columns: Sequence[str], step: int
) -> Batch:
    return Batch(
        problems=[problems[trajectory.problem_id] for trajectory, _ in attempts],
        completions=[completion for _, completion in attempts],
        completion_ids=[_completion_ids(trajectory) for trajectory, _ in attempts],
        columns=columns,
        step=step,
    )


def _score(
    trajectory: Trajectory,
    names: Sequence[str],
    weights: Sequence[float],
    answers: Sequence[Graded | None],
    *,
    decides: int | None,
) -> Score:
    """Return the score of one trajectory; answers: of each reward function; decides: whose is success."""
    values = [None if answer is None else answer.value for answer in answers]
    rewards = values[: len(names)]
    named = tuple(zip(names, rewards, strict=True))
    if trajectory.ended == "error":  # it never finished: neither a reward of 0 nor a failure of the policy
        return Score(trajectory, named, graded=False, reward=0.0, success="unknown")
    given = [weight * value for weight, value in zip(weights, rewards, strict=True) if value is not None]
    environment_reward = trajectory.environment_reward
    given += [] if environment_reward is None else [environment_reward]
    decided = None if decides is None else values[decides]
    success: Success = "unknown" if decided is None else "yes" if solved(decided) else "no"
    if trajectory.success != "unknown":
        success = trajectory.success
    logged = {name: value for answer in answers if answer for name, value in answer.logged.items()}
    extra = {name: value for answer in answers if answer for name, value in answer.extra.items()}
    return Score(trajectory, named, bool(given), float(sum(given)), success, logged, extra)


def _completion(trajectory: Trajectory, problem: Problem) -> str | list[Message]:
    """Return everything after the prompt: a string if the prompt is one and there is one turn, else messages."""
    if isinstance(problem.prompt, str) and len(trajectory.turns) <= 1:
        return trajectory.turns[0].action if trajectory.turns else ""
    return list(trajectory.conversation)


def _completion_ids(trajectory: Trajectory) -> list[int]:
    """Return the token ids after the prompt up to the last action: actions, and the observations between them."""
    ids: list[int] = []
    prompt = trajectory.turns[0].ids if trajectory.turns else ()
    for number, turn in enumerate(trajectory.turns):
        if turn.rewritten:  # it holds the whole context
            same = next((n for n, (a, b) in enumerate(zip(prompt, turn.ids, strict=False)) if a != b), len(prompt))
            ids = list(turn.ids[same:])
        elif number:
            ids += turn.ids
        ids += turn.action_ids
    return ids


@dataclass(frozen=True)
class Scorer:
    """Reward functions with their weights, and the function that decides about success, if there is one."""

    functions: tuple[Reward, ...]
    weights: tuple[float, ...]
    success: Reward | None
    environment: bool = False
    """Whether attempts are played in an environment, which may give success and rewards of its own."""
    unreferenced: bool = False
    """Whether there is only the default reward, and held-out problems lack the references that it needs."""

    @classmethod
    def of(
        cls,
        selection: SelectionSettings,
        held_out: Sequence[Problem],
        *,
        environment: str | None,
        reward_funcs: Reward | str | Sequence[Reward | str] | None = None,
        own: Reward | None = None,
    ) -> "Scorer":
        """Return the scorer of a recipe. `reward_funcs` replace the functions that the recipe names.

        own: the reward function that the problems come with, if they do.

        Raises UsageError for another number of weights than of functions, and as `choose_functions` does; DataError
        when the held-out problems lack a column that is needed, or when the success function reads answers and does
        not accept one of their references as its own solution.
        """
        functions, success = choose_functions(selection, environment=environment, reward_funcs=reward_funcs, own=own)
        weights = selection.reward_weights or (1.0,) * len(functions)
        if len(weights) != len(functions):
            raise UsageError(f"reward_weights: {len(weights)} weights for {len(functions)} reward functions")
        by_default = not reward_funcs and selection.reward_funcs is None and bool(functions)
        unreferenced = by_default and own is None and not have_references(held_out)
        if unreferenced and selection.success_func is None:
            success = None
        scorer = cls(functions, weights, success, bool(environment), unreferenced)
        check_columns(scorer._asked_held_out, held_out, row="held-out row")
        if success and answers_of(success):
            check_references(success, held_out)
        return scorer

    @property
    def measures(self) -> Literal["success", "reward", "nothing"]:
        """What held-out attempts are measured by: success, the reward where success cannot be known, or nothing.

        With an environment `reward` means that `success_func` is '': its own success counts where it gives one.
        """
        if self.success:
            return "success"
        if self.functions and not self.unreferenced:
            return "reward"
        return "success" if self.environment else "nothing"

    @property
    def _asked_held_out(self) -> tuple[Reward, ...]:
        return (self.success,) if self.success else self.functions if self.measures == "reward" else ()

    @property
    def columns_read(self) -> frozenset[str]:
        """The columns that the functions may read: those that a signature names, and references with `**kwargs`."""
        functions = (*self.functions, *((self.success,) if self.success else ()))
        references = [name for function in functions for name in REFERENCE_COLUMNS if takes(function, name)]
        return frozenset(references) | {name for function in functions for name in named_columns(function)}

    @property
    def described(self) -> list[str]:
        """The functions, each with a hash of its source."""
        return sorted({described(function) for function in (*self.functions, self.success) if function})

    @property
    def answers(self) -> Answers | None:
        """How the success function reads answers; None if it does not compare answers with references."""
        return answers_of(self.success)

    def check(self, problems: Sequence[Problem]) -> str:
        """Grade the references of problems against themselves; return a note if that is not possible, or ''.

        Raises DataError with the first reference that a function does not accept, and for a column that is missing.
        """
        check_columns(self.functions, problems, row="row")
        readers = [function for function in self.functions if answers_of(function)]
        notes = [check_references(function, problems) for function in readers]
        if self.functions and not readers:
            return "references: not graded against themselves, no reward function is known to read them"
        return "; ".join(filter(None, notes))

    def score(
        self,
        trajectories: Sequence[Trajectory],
        problems: Mapping[str, Problem],
        *,
        store: Path | None = None,
        step: int = 0,
        label: str = "",
    ) -> list[Score]:
        """Score trajectories; `store`, `step` and `label` are those of `score`.

        Raises FaultError when too many environments failed, or when a function fails.
        """
        refuse_failures(trajectories)
        return score(
            trajectories, problems, self.functions,
            weights=self.weights, success=self.success, store=store, step=step, label=label,
        )  # fmt: skip

    def score_held_out(
        self,
        trajectories: Sequence[Trajectory],
        problems: Mapping[str, Problem],
        *,
        store: Path | None = None,
        step: int = 0,
        label: str = "",
    ) -> list[Score]:
        """Score held-out trajectories by what `measures` says: with the success function alone, or with the rewards.

        Raises FaultError as `score` does.
        """
        held_out = self if self.measures == "reward" else replace(self, functions=(), weights=())
        return held_out.score(trajectories, problems, store=store, step=step, label=label)
