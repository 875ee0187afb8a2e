"""A run's trajectories as a dataset for other tools: messages with their outcomes, or pairs, one better, one worse.

Rows are written one after the other, and trajectories stay in their files. What is in memory of one is its place and
its outcome.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from bcft.errors import DataError, UsageError
from bcft.runs.storage import SCORES, jsonl_rows, read_yaml, write_jsonl
from bcft.selection.saved import SavedRollouts, pooled_problems, saved_runs, trajectory_of
from bcft.types import Message, Problem, Trajectory, messages
from bcft.types.text import in_file

ROWS = "train.jsonl"
"""The file that is written; `datasets.load_dataset` finds it in its directory."""


class Outcome(NamedTuple):
    """What was said about a trajectory."""

    graded: bool
    reward: float
    success: str
    decision: str


def export_dataset(run: Path, output: Path, *, pairs: bool) -> str:
    """Write the scored trajectories of a run of `filtered`, `collect` or `refilter`; return what was written in words.

    Each row has the problem's columns, `messages`, `prompt` and `completion` as messages, and the outcome: `reward`,
    `graded`, `success` (yes, no or unknown), `decision` (kept, or the reason), `stop_condition`, `is_truncated`,
    `has_error`, `round`, `pass_rate` (the share of the problem's attempts in that round that succeeded), `id`.

    pairs: of each problem and round with unequal rewards one row, `prompt`, `chosen` and `rejected`: the attempt with
    the highest and the one with the lowest reward, of equals the first, among graded attempts that ended by themselves.

    Raises UsageError where there is nothing to write, and DataError for files that are not as a run wrote them.
    """
    places, scores = _places(run)
    runs = saved_runs(places)
    problems = pooled_problems(runs)
    saved = SavedRollouts(runs, trajectory_of)
    count, played = Counter[str](), len(saved.places)

    def rows() -> Iterator[dict[str, Any]]:
        for numbers in _by_file(saved):
            outcomes = _outcomes(scores or saved.files[saved.places[numbers[0]].file][0].parent / SCORES)
            for row in (_pairs if pairs else _all)(saved, numbers, outcomes, problems):
                count["rows"] += 1
                yield row

    output.mkdir(parents=True, exist_ok=True)
    with closing(saved):
        write_jsonl(output / ROWS, rows())
    if not count["rows"]:
        (output / ROWS).unlink()
        raise UsageError(f"{run}: no {'problem has attempts with unequal rewards' if pairs else 'attempt is scored'}")
    what = "pairs" if pairs else f"of {played:,} trajectories"
    return f'{output / ROWS}: {count["rows"]:,} {what}; load_dataset("{output}") reads them'


def _places(run: Path) -> tuple[Sequence[str], Path | None]:
    """Return where the rollouts of a run are, and the one file of scores; None: each round has its own."""
    made = read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    given = made.get("rollouts")
    if given and (run / SCORES).is_file():
        return [given] if isinstance(given, str) else given, run / SCORES
    return [str(run)], None


def _by_file(saved: SavedRollouts) -> Iterator[list[int]]:
    """Yield the positions of the trajectories of each file whose scores exist."""
    numbers: dict[int, list[int]] = {}
    for number, place in enumerate(saved.places):
        numbers.setdefault(place.file, []).append(number)
    yield from numbers.values()


def _outcomes(file: Path) -> dict[str, Outcome]:
    """Return the outcome of each trajectory that a file of scores has, by id; empty where a round is not scored yet."""
    if not file.is_file():
        return {}
    try:
        return {
            line["id"]: Outcome(line["graded"], line["reward"], line["success"], line["decision"])
            for line, _ in jsonl_rows(file)
        }
    except (KeyError, ValueError) as error:
        raise DataError(f"{file}: not as a run wrote it: {error}") from error


def _all(
    saved: SavedRollouts, numbers: Sequence[int], outcomes: Mapping[str, Outcome], problems: Mapping[str, Problem]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each scored trajectory of a file."""
    known, solved = Counter[str](), Counter[str]()
    for number in numbers:
        place = saved.places[number]
        outcome = outcomes.get(saved.read(number).id)
        known[place.problem_id] += outcome is not None and outcome.success != "unknown"
        solved[place.problem_id] += outcome is not None and outcome.success == "yes"
    for number in numbers:
        trajectory = saved.read(number)
        if trajectory.id not in outcomes:
            continue
        problem, outcome = problems[trajectory.problem_id], outcomes[trajectory.id]
        prompt, completion = _opening(trajectory, problem), trajectory.messages
        yield _columns(trajectory, problem) | {
            "messages": in_file([*prompt, *completion]),
            "prompt": in_file(prompt),
            "completion": in_file(completion),
            "reward": outcome.reward,
            "graded": outcome.graded,
            "success": outcome.success,
            "decision": outcome.decision,
            "stop_condition": _stopped(trajectory),
            "is_truncated": trajectory.truncated,
            "has_error": trajectory.ended == "error",
            "error": trajectory.error,
            "round": trajectory.round,
            "pass_rate": solved[problem.id] / max(known[problem.id], 1),
            "problem_id": problem.id,
            "id": trajectory.id,
        }


def _pairs(
    saved: SavedRollouts, numbers: Sequence[int], outcomes: Mapping[str, Outcome], problems: Mapping[str, Problem]
) -> Iterator[dict[str, Any]]:
    """Yield a pair for each problem of a file whose rewards differ."""
    ends: dict[str, tuple[tuple[float, int], tuple[float, int]]] = {}
    for number in numbers:
        trajectory = saved.read(number)
        outcome = outcomes.get(trajectory.id)
        if outcome is None or not outcome.graded or trajectory.truncated or trajectory.ended == "error":
            continue
        reward = round(outcome.reward, 9)
        best, worst = ends.get(trajectory.problem_id, ((reward, number), (reward, number)))
        best = (reward, number) if reward > best[0] else best
        worst = (reward, number) if reward < worst[0] else worst
        ends[trajectory.problem_id] = best, worst
    for identity, (best, worst) in ends.items():
        chosen, rejected = saved.read(best[1]), saved.read(worst[1])
        # What a chance at the start decided is no difference between the two.
        if best[0] == worst[0] or chosen.opening != rejected.opening:
            continue
        problem = problems[identity]
        yield _columns(chosen, problem) | {
            "prompt": in_file(_opening(chosen, problem)),
            "chosen": in_file(chosen.messages),
            "rejected": in_file(rejected.messages),
            "chosen_reward": outcomes[chosen.id].reward,
            "rejected_reward": outcomes[rejected.id].reward,
            "round": chosen.round,
            "problem_id": identity,
            "chosen_id": chosen.id,
            "rejected_id": rejected.id,
        }


def _opening(trajectory: Trajectory, problem: Problem) -> list[Message]:
    """Return what the policy read first: the environment's opening, or the problem's prompt."""
    return list(trajectory.opening) or messages(problem.prompt)


def _columns(trajectory: Trajectory, problem: Problem) -> dict[str, Any]:
    """Return the problem's columns, which its reward reads, and the tools that were offered."""
    return dict(problem.columns) | ({"tools": [dict(tool) for tool in trajectory.tools]} if trajectory.tools else {})


def _stopped(trajectory: Trajectory) -> str:
    """Return what ended a trajectory: `error`, `turn_limit`, a limit of tokens, or `done`."""
    if trajectory.ended == "done" and trajectory.truncated:
        return next(turn.stop for turn in reversed(trajectory.turns) if turn.stop != "stop_token")
    return trajectory.ended
