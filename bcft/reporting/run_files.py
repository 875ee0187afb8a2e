"""The files of a filtered run, which may be unfinished, as its report reads them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
    """The files of a run, which may be unfinished."""

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
        return cls(path.resolve(), config, base, rounds, metrics)

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """The rounds, after a round 0 that has `eval` only."""
        return [{"round": 0, "eval": self.base}, *self.rounds]

    @property
    def name(self) -> str:
        """The run's name in another run's picture."""
        return "random control" if self.config["control"] == "random" else self.path.name

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
        directory = scaled_path(place, self.metrics.get("scale", 1.0)) / "test"
        return read(directory / "evaluation.jsonl", lambda _: stored(directory), None)


def read(file: Path, reader: Callable[[Path], T], default: T) -> T:
    """Return the content of a file, or the default where there is none. Raises UsageError for a damaged file."""
    if not file.is_file():
        return default
    try:
        return reader(file)
    except (ValueError, CheckpointError) as error:
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
