"""The files of a run of `filtered`, `sft` or `evaluate`, which may be unfinished, as its report reads them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

from bcft.errors import CheckpointError, UsageError
from bcft.evaluation.results import Measured, stored
from bcft.reporting.tables import scaled_name
from bcft.runs.history import scaled_path
from bcft.runs.storage import read_json, read_jsonl, read_yaml
from bcft.selection.filter import REASONS

T = TypeVar("T")
FIGURE = {"sampled": "pass@1", "greedy": "success", "return": "mean", "reward": "mean"}
"""Part of an evaluation's summary -> its main figure: a share of solved attempts, or the mean return or reward."""


@dataclass(frozen=True)
class RunFiles:
    """The files of a filtered run, which may be unfinished."""

    command: ClassVar[str] = "filtered"

    path: Path
    config: Mapping[str, Any]
    base: Mapping[str, Any]
    """The dev summary before any training; empty until it exists."""
    rounds: Sequence[Mapping[str, Any]]
    """The lines of `metrics.jsonl`."""
    metrics: Mapping[str, Any]
    """`metrics.json`; empty until the run is finished."""

    @classmethod
    def read(cls, path: Path) -> "RunFiles":
        """Read the files that exist. Raises UsageError when they are damaged or not those of a filtered run."""
        nothing: dict[str, Any] = {}
        config = read(path / "config.yaml", read_yaml, nothing)
        if not {"num_rounds", "control"} <= config.keys():
            raise UsageError(f"against: {path} is not a run of bcft filtered: give the output_dir of one")
        rounds: list[dict[str, Any]] = read(path / "metrics.jsonl", read_jsonl, [])
        for record in rounds:
            check_keys(path / "metrics.jsonl", record, "round", "rollout", "diversity", "selection")
        metrics = read(path / "metrics.json", read_json, nothing)
        if metrics:
            check_keys(path / "metrics.json", metrics, "conclusion", "base", "best", "best_round")
        base = read(path / "round_000/evaluation.json", read_json, nothing)
        return cls(path, config, base, rounds, metrics)

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """The rounds, after a round 0 that has `eval` only."""
        return [{"round": 0, "eval": self.base}, *self.rounds]

    @property
    def name(self) -> str:
        """The name of the run's directory."""
        return self.path.resolve().name

    def curve(self, kind: str) -> list[tuple[int, float, list[float]]]:
        """Return round, solved share or mean, and interval wherever dev was evaluated."""
        evaluated = [(r["round"], r["eval"][kind]) for r in self.records if kind in r.get("eval", {})]
        return [(number, summary[FIGURE[kind]], summary["ci95"]) for number, summary in evaluated]

    @property
    def chosen(self) -> str:
        """The name of the weights in `best/`, of a finished run."""
        return scaled_name(self.metrics["best_round"], self.metrics.get("scale", 1.0))

    def tested(self) -> Measured | None:
        """Return the evaluation on test of what is in `best/`; None if its attempts are missing."""
        place = self.path / f"round_{self.metrics['best_round']:03d}"
        return evaluated(scaled_path(place, self.metrics.get("scale", 1.0)) / "test")

    @property
    def final(self) -> tuple[str, Mapping[str, Any]]:
        """The name of what the run ends with, and its summary on test."""
        return self.chosen, self.metrics["best"]


@dataclass(frozen=True)
class ClonedFiles:
    """The files of a run of `sft`, which may be unfinished."""

    command: ClassVar[str] = "sft"
    path: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    """`metrics.json`; empty until the run is finished."""
    losses: Sequence[Mapping[str, Any]]
    """The lines of `losses.jsonl`."""
    rows: Mapping[str, Any]
    """`rows.json`; empty until it exists."""

    @classmethod
    def read(cls, path: Path) -> "ClonedFiles":
        """Read the files that exist. Raises UsageError when they are damaged."""
        nothing: dict[str, Any] = {}
        metrics = read(path / "metrics.json", read_json, nothing)
        if metrics:
            check_keys(path / "metrics.json", metrics, "conclusion", "base", "final", "train")
        losses: list[dict[str, Any]] = read(path / "losses.jsonl", read_jsonl, [])
        for line in losses:
            check_keys(path / "losses.jsonl", line, "step")
        rows = read(path / "rows.json", read_json, nothing)
        if rows:
            check_keys(path / "rows.json", rows, "words", "counts", "examples")
        return cls(path, read(path / "config.yaml", read_yaml, nothing), metrics, losses, rows)

    @property
    def name(self) -> str:
        """The name of the run's directory."""
        return self.path.resolve().name

    def tested(self) -> Measured | None:
        """Return the evaluation of the trained policy; None if its attempts are missing."""
        return evaluated(self.path / "final")

    @property
    def final(self) -> tuple[str, Mapping[str, Any]]:
        """The name of what the run ends with, and its summary on test."""
        return "trained", self.metrics["final"]


@dataclass(frozen=True)
class EvaluatedFiles:
    """The files of an evaluation, which may be unfinished."""

    command: ClassVar[str] = "evaluate"
    path: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    """`metrics.json`; empty until the evaluation is finished."""

    @classmethod
    def read(cls, path: Path) -> "EvaluatedFiles":
        """Read the files that exist. Raises UsageError when they are damaged."""
        nothing: dict[str, Any] = {}
        metrics = read(path / "metrics.json", read_json, nothing)
        if metrics:
            check_keys(path / "metrics.json", metrics, "conclusion", "model")
        return cls(path, read(path / "config.yaml", read_yaml, nothing), metrics)

    @property
    def name(self) -> str:
        """The names of the directory and of the one that it is in."""
        path = self.path.resolve()
        return f"{path.parent.name}/{path.name}"

    def tested(self) -> Measured | None:
        """Return the evaluation of the model; None if its attempts are missing."""
        return evaluated(self.path / "model")

    @property
    def final(self) -> tuple[str, Mapping[str, Any]]:
        """The name of what was evaluated, and its summary."""
        return "model", self.metrics["model"]


AnyRun: TypeAlias = RunFiles | ClonedFiles | EvaluatedFiles
_READERS: dict[str, Callable[[Path], AnyRun]] = {
    "filtered": RunFiles.read, "sft": ClonedFiles.read, "evaluate": EvaluatedFiles.read
}  # fmt: skip


def read_run(path: Path) -> AnyRun:
    """Return the files of a run. Raises UsageError for a directory that no such command made."""
    status: dict[str, Any] = read(path / "status.json", read_json, {})
    command = status.get("command", "")
    if command not in _READERS:
        made = f"made by bcft {command}" if command else "not the directory of a run"
        raise UsageError(f"report: {path} is {made}: give the output_dir of bcft sft or filtered, or DIR/evaluate")
    return _READERS[command](path)


def evaluated(directory: Path) -> Measured | None:
    """Return the evaluation in a directory; None if a file of it is missing."""
    return read(directory / "evaluation.jsonl", lambda _: stored(directory), None)


def read(file: Path, reader: Callable[[Path], T], default: T) -> T:
    """Return the content of a file, or the default where there is none. Raises UsageError for a damaged file."""
    if not file.is_file():
        return default
    try:
        return reader(file)
    except (ValueError, KeyError, TypeError, CheckpointError) as error:
        raise UsageError(f"{file} is damaged: restore it, or give another run directory") from error


def check_keys(file: Path, value: Any, *keys: str) -> None:
    """Raise UsageError unless a value of a file is a mapping with these keys."""
    if not isinstance(value, Mapping) or not value.keys() >= set(keys):
        raise UsageError(f"{file} is damaged, it lacks one of {', '.join(keys)}: restore it, or give another run")


def decisions(run: RunFiles) -> dict[str, list[int]]:
    """Return how many attempts of each round were kept, and rejected for each reason that occurs."""
    rejected = {reason: [record["selection"]["rejected"][reason] for record in run.rounds] for reason in REASONS}
    return {
        "kept": [record["selection"]["kept"] for record in run.rounds],
        **{reason: numbers for reason, numbers in rejected.items() if any(numbers)},
    }
