"""Trajectories of finished rounds that stay in their files: what is in memory of each is where its line begins."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bcft.errors import DataError, UsageError
from bcft.runs.storage import MANIFEST, ROLLOUTS, SEAL, jsonl_rows, read_json, read_yaml, sealed
from bcft.types import Problem, Trajectory


@dataclass(frozen=True)
class SavedRun:
    """A run directory whose rollouts are selected from, alone or pooled with others."""

    path: Path
    files: tuple[Path, ...]
    made: Mapping[str, Any]
    """Its config.yaml."""
    name: str
    """What tells its trajectories from those of the other runs: `run1`, `run2`; '' of a single run."""

    @property
    def problems(self) -> Iterator[Problem]:
        """Its problems, one after the other."""
        for line, _ in jsonl_rows(self.path / "problems.jsonl"):
            columns = {key: value for key, value in line.items() if key not in ("problem_id", "prompt")}
            yield Problem(line["problem_id"], line["prompt"], columns, f"problem {line['problem_id']}")


def saved_runs(places: Sequence[str]) -> list[SavedRun]:
    """Return the runs that hold the rollouts at some places, in the order in which they are first named.

    Raises UsageError for a place without rollouts and for rollouts that are given twice; DataError as `rollout_files`
    and `run_of` do.
    """
    files: dict[Path, list[Path]] = {}
    for place in places:
        for file in rollout_files(Path(place)):
            of_run = files.setdefault(run_of(file), [])
            if file.resolve() in {known.resolve() for known in of_run}:
                raise UsageError(f"rollouts: {file} is given twice: leave one of them out")
            of_run.append(file)
    return [
        SavedRun(top, tuple(of_run), read_yaml(top / "config.yaml"), f"run{number}" if len(files) > 1 else "")
        for number, (top, of_run) in enumerate(files.items(), 1)
    ]


def rollout_files(path: Path) -> list[Path]:
    """Return the rollouts that a path means: a file, that of `collect` or of a round, or those of all rounds.

    Raises UsageError where there are none, DataError for a file that has changed since it was written.
    """
    files = [path] if path.is_file() else [path / ROLLOUTS]
    if not files[0].is_file():
        files = sorted(path.glob(f"round_*/{ROLLOUTS}"))
    if not files:
        raise UsageError(f"rollouts: {path} has no {ROLLOUTS}: give the directory of a run of collect or filtered")
    for file in files:
        if not sealed(file.parent, file.name):
            raise DataError(f"{file}: changed since it was written, or not finished: finish the round that writes it")
    return files


def run_of(file: Path) -> Path:
    """Return the directory of the run that a file of rollouts belongs to."""
    for directory in (file.parent, file.parent.parent):
        if (directory / "config.yaml").is_file() and (directory / "problems.jsonl").is_file():
            return directory
    raise DataError(f"{file}: neither its directory nor the one above holds config.yaml and problems.jsonl of its run")


def pooled_problems(runs: Sequence[SavedRun]) -> dict[str, Problem]:
    """Return the problems of all runs by id, of each run the first row of a prompt, as it was attempted.

    Raises DataError where two runs give one prompt other columns.
    """
    problems: dict[str, Problem] = {}
    for run in runs:
        own: dict[str, Problem] = {}
        for problem in run.problems:
            own.setdefault(problem.id, problem)
        for identity, problem in own.items():
            known, mine = problems.setdefault(identity, problem).columns, problem.columns
            if known != mine:
                column = next(name for name in {**known, **mine} if known.get(name) != mine.get(name))
                raise DataError(
                    f"{run.path / 'problems.jsonl'}: {problem.where} has {column} {mine.get(column)!r}, in a run given "
                    f"before {known.get(column)!r}: runs are pooled only if a prompt is the same problem in all of them"
                )
    return problems


def trajectory_of(line: Mapping[str, Any], file: Path) -> Trajectory:
    """Return the trajectory of a line of a file. Raises DataError for another kind of line."""
    try:
        return Trajectory.from_json(line)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file}: {line.get('id', '')}: not a trajectory: {error}") from error


def tokenizer_of(runs: Sequence[SavedRun]) -> str:
    """Return the fingerprint of the tokenizer whose ids the rollouts hold; '' where they do not agree."""
    fingerprints = set()
    for file in (file for run in runs for file in run.files):
        manifests = [file.parent / name for name in (MANIFEST, SEAL) if (file.parent / name).is_file()]
        fingerprints.add(str(read_json(manifests[0]).get("tokenizer", "")) if manifests else "")
    return fingerprints.pop() if len(fingerprints) == 1 else ""


class Place(NamedTuple):
    """Where the line of a trajectory is, and what is asked about all of them."""

    file: int
    """Which of `SavedRollouts.files`."""
    start: int
    """In bytes."""
    problem_id: str
    errored: bool


class SavedRollouts:
    """The trajectories of some runs, in the order of their files, each read anew when it is needed."""

    def __init__(self, runs: Sequence[SavedRun], parse: Callable[[Mapping[str, Any], Path], Trajectory]) -> None:
        """Read every line once. parse: makes a trajectory of a line of a file, and raises DataError if it cannot."""
        self.files = [(file, run) for run in runs for file in run.files]
        self.places: list[Place] = []
        self.last_round = 0
        self.first_error = ""
        self._open: dict[int, BinaryIO] = {}
        names: dict[str, str] = {}
        for number, (file, run) in enumerate(self.files):
            for line, start in jsonl_rows(file):
                trajectory = parse(line, file)
                problem, errored = trajectory.problem_id, trajectory.ended == "error"
                self.places.append(Place(number, start, names.setdefault(problem, problem), errored))
                self.last_round = max(self.last_round, trajectory.round)
                if errored and not self.first_error:
                    self.first_error = f"{replace(trajectory, run=run.name).id}: {trajectory.error}"

    @property
    def problem_ids(self) -> set[str]:
        """The problems that were attempted."""
        return {place.problem_id for place in self.places}

    @property
    def errors(self) -> int:
        """How many trajectories ended in an error of their environment."""
        return sum(place.errored for place in self.places)

    def run(self, number: int) -> SavedRun:
        """Return the run of a trajectory; number: its position among all."""
        return self.files[self.places[number].file][1]

    def read(self, number: int) -> Trajectory:
        """Return a trajectory; number: its position among all."""
        place = self.places[number]
        if place.file not in self._open:
            self._open[place.file] = self.files[place.file][0].open("rb")
        file = self._open[place.file]
        file.seek(place.start)
        trajectory = Trajectory.from_json(json.loads(file.readline()))
        name = self.run(number).name
        return replace(trajectory, run=name) if name else trajectory

    def read_all(self, numbers: Iterable[int]) -> list[Trajectory]:
        """Return several trajectories."""
        return [self.read(number) for number in numbers]

    def close(self) -> None:
        """Close the files."""
        for file in self._open.values():
            file.close()
        self._open = {}
