"""What the rounds of a run rolled out: rewards and pass rates of all attempts, and the text of as many as a page holds.

Figures are made of `scores.jsonl`, which has no text; of `rollouts.jsonl` only the lines to be shown are parsed.
"""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bcft.reporting.run_files import read
from bcft.runs.storage import ROLLOUTS, SCORES, read_jsonl

SHOWN = 2000
"""The most attempts that a page has."""
ROUNDS_SHOWN = 12
"""The most rounds whose attempts a page has."""
RARE = 3
"""So many attempts of each decision of a round are shown, however rare it is."""
_PROBLEM = re.compile(rb'"problem_id": "([^"]*)"')


@dataclass(frozen=True)
class Scores:
    """The scores of a round, without the attempts themselves."""

    rewards: npt.NDArray[np.float64]
    """Of the graded attempts in scope."""
    kept: npt.NDArray[np.bool_]
    """Which of these are kept."""
    cutoff: float
    solved: Mapping[str, tuple[int, int]]
    """Problem -> successes and known outcomes among the round's own attempts."""
    functions: Mapping[str, tuple[float, int]]
    """Reward function -> sum of its values and how many it gave, in scope."""
    lines: Mapping[str, str]
    """Id -> decision, of the round's own attempts."""


def scores_of(directory: Path, number: int) -> Scores | None:
    """Return the scores of a round; None if their file is missing. Raises UsageError for a damaged file."""
    file = directory / SCORES
    if not file.is_file():
        return None
    status = file.stat()
    return _scores(file, number, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4096)
def _scores(file: Path, number: int, changed: int, size: int) -> Scores:  # noqa: ARG001 - the key
    """Return what a file holds; it is read once while a run is drawn again and again."""
    return read(file, lambda place: _gathered(read_jsonl(place), number), _gathered([], number))


def _gathered(lines: Sequence[Mapping[str, Any]], number: int) -> Scores:
    graded = [line for line in lines if line["graded"]]
    solved: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    functions: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    own = [line for line in lines if line["id"].startswith(f"{number}-")]
    for line in own:
        counts = solved[problem_of(line["id"])]
        counts[0] += line["success"] == "yes"
        counts[1] += line["success"] != "unknown"
    for line in lines:
        for given in line["rewards"]:
            if given["graded"]:
                sums = functions[given["name"]]
                sums[0] += given["value"]
                sums[1] += 1
    return Scores(
        rewards=np.array([line["reward"] for line in graded], dtype=float),
        kept=np.array([line["decision"] == "kept" for line in graded], dtype=bool),
        cutoff=lines[0]["cutoff"] if lines else 0.0,
        solved={problem: (yes, known) for problem, (yes, known) in solved.items()},
        functions={name: (total, int(n)) for name, (total, n) in functions.items()},
        lines={line["id"]: line["decision"] for line in own},
    )


def problem_of(identity: str) -> str:
    """Return the problem of an attempt's id, `round-problem-sample`."""
    return identity.split("-", 1)[1].rsplit("-", 1)[0]


@dataclass(frozen=True)
class Attempt:
    """An attempt to show: its line of `rollouts.jsonl` and that of `scores.jsonl`."""

    round: int
    played: Mapping[str, Any]
    score: Mapping[str, Any]


def attempts_shown(path: Path, numbers: Sequence[int], of_round: Mapping[int, Scores]) -> list[Attempt]:
    """Return the attempts to show, of a run's rounds: all, or a sample that depends on their problems' ids alone.

    A sample has whole problems, so that the shares of decisions in it are about those of the round, and a few of each
    rare decision. numbers: of the rounds, at most `ROUNDS_SHOWN` of them are read.
    """
    chosen = spread([number for number in numbers if number in of_round], ROUNDS_SHOWN)
    shown: list[Attempt] = []
    for done, number in enumerate(chosen):
        quota = (SHOWN - len(shown)) // (len(chosen) - done)
        wanted = _sample(of_round[number].lines, quota)
        place = path / f"round_{number:03d}"
        played, scores = (_lines(place / name, wanted) for name in (ROLLOUTS, SCORES))
        shown += [Attempt(number, played[key], scores[key]) for key in wanted if key in played and key in scores]
    return shown


def spread(numbers: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the numbers, the first and the last among them, evenly spread."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[round(i * (len(numbers) - 1) / (most - 1))] for i in range(most)]


def _sample(decisions: Mapping[str, str], quota: int) -> list[str]:
    if len(decisions) <= quota:
        return list(decisions)
    problems = {identity: problem_of(identity) for identity in decisions}
    drawn = {problem: sha256(problem.encode()).digest() for problem in {*problems.values()}}
    order = sorted(decisions, key=lambda identity: (drawn[problems[identity]], identity))
    by_decision: dict[str, list[str]] = defaultdict(list)
    for identity in order:
        by_decision[decisions[identity]].append(identity)
    rare = dict.fromkeys(identity for ids in by_decision.values() for identity in ids[:RARE])
    chosen = {*[*rare, *(identity for identity in order if identity not in rare)][:quota]}
    return [identity for identity in order if identity in chosen]


def _lines(file: Path, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the lines of a file with these ids; a line begins with its id, and no other line is parsed."""
    heads = {b'{"id": ' + json.dumps(identity, ensure_ascii=False).encode() + b",": identity for identity in wanted}

    def parse(place: Path) -> dict[str, dict[str, Any]]:
        with place.open("rb") as lines:
            pairs = ((heads.get(line[: line.find(b'",') + 2]), line) for line in lines)
            return {identity: json.loads(line) for identity, line in pairs if identity is not None}

    return read(file, parse, {})


def problems_of(file: Path, wanted: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the lines of `problems.jsonl` of these problems; no other line is parsed."""

    def parse(place: Path) -> dict[str, dict[str, Any]]:
        problems: dict[str, dict[str, Any]] = {}
        with place.open("rb") as lines:
            for line in lines:
                if any(match.decode() in wanted for match in _PROBLEM.findall(line)):
                    problem = json.loads(line)
                    problems[problem["problem_id"]] = problem
        return problems

    return read(file, parse, {})
