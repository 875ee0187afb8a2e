"""Saved rollouts scored and selected again: `python -m bcft.refilter RECIPE --rollouts FILE_OR_DIRECTORY`.

Nothing is generated and no model is loaded: other rewards, another quantile or cap, on what was played already. What is
kept is a dataset as that of `collect` is; `sft` on it is offline filtered behaviour cloning.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from bcft.cli import execute
from bcft.config.loader import Recipe, load
from bcft.data.loading import SOURCE
from bcft.errors import DataError, UsageError
from bcft.evaluation.metrics import diversity, tally
from bcft.reporting.tables import plain_console
from bcft.runs.directory import open_run
from bcft.runs.distributed import rank
from bcft.runs.storage import MANIFEST, SEAL, read_json, read_jsonl, sealed, write_json, write_manifest, write_text
from bcft.selection.apply import apply_filter
from bcft.selection.scoring import Grading
from bcft.types import Problem, Trajectory

ROLLOUTS = "rollouts.jsonl"


def run(recipe: str | PathLike[str] | None = None, **overrides: Any) -> dict[str, Any]:
    """Select from saved rollouts by a recipe; return what `metrics.json` holds.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    return refilter(load("refilter", recipe, overrides))


def refilter(recipe: Recipe) -> dict[str, Any]:
    """Run a parsed recipe; what an earlier one wrote into its directory is written anew.

    All attempts of the rollouts are selected from together, with the lots of their last round.

    Raises UsageError without rollouts, DataError where they are not what a run wrote.
    """
    if rank() > 0:  # there is nothing to share out
        return {}
    if recipe["rollouts"] is None:
        raise UsageError("rollouts: required: a rollouts.jsonl, a round, or the directory of a run")
    files = rollout_files(Path(recipe["rollouts"]))
    top = run_of(files[0])
    made = yaml.safe_load((top / "config.yaml").read_text(encoding="utf-8"))
    # Problems, what was held out and the environment are those of the run that played them.
    recipe = replace(recipe, values={**recipe.values, **{key: made[key] for key in (*SOURCE, "environment")}})
    place = Path(recipe["output_dir"])
    if place.resolve() in {top.resolve(), *(file.parent.resolve() for file in files)}:
        raise UsageError(f"output_dir: {place} is where the rollouts are: give another")
    problems = {line["problem_id"]: _problem(line) for line in read_jsonl(top / "problems.jsonl")}
    played = [_trajectory(line, file) for file in files for line in read_jsonl(file)]
    console = plain_console(quiet="quiet" in recipe.flags)
    console.print(f"rollouts: {len(played):,} attempts of {len(files)} rounds in {top}", markup=False)
    if missing := {trajectory.problem_id for trajectory in played} - problems.keys():
        raise DataError(f"{top / 'problems.jsonl'}: {len(missing)} problems of the rollouts are not there")
    grading = Grading.of(recipe, [problems[identity] for identity in {t.problem_id for t in played}])
    with open_run(recipe, place, writes=True):
        scores = grading.score(played, problems)
        source = "self" if "num_rounds" in made else "teacher"
        found = apply_filter(recipe, scores, problems, number=max(t.round for t in played), source=source)
        found.write(place)
        metrics: dict[str, Any] = {"rollout": tally(scores), "selection": found.metrics, "diversity": diversity(scores)}
        metrics["conclusion"] = found.conclusion(recipe, place)
        write_text(place / "config.yaml", yaml.safe_dump(recipe.resolved(), allow_unicode=True))
        write_json(place / "metrics.json", metrics)
        written = [place / name for name in ("scores.jsonl", "kept.jsonl", "metrics.json", "config.yaml")]
        about = {"tokenizer": _tokenizer(files), "rollouts": [str(file) for file in files]}
        write_manifest(place, written, about=about)
    print(metrics["conclusion"])
    return metrics


def rollout_files(path: Path) -> list[Path]:
    """Return the rollouts that a path means: a file, that of `collect` or of a round, or those of all rounds.

    Raises UsageError where there are none, DataError for a file that is not as it was written.
    """
    found = [path] if path.is_file() else [path / ROLLOUTS]
    if not found[0].is_file():
        found = sorted(path.glob(f"round_*/{ROLLOUTS}"))
    if not found:
        raise UsageError(f"rollouts: no {ROLLOUTS} in {path}: give the directory of a run of collect or filtered")
    for file in found:
        if not sealed(file.parent, file.name):
            raise DataError(f"{file}: not as it was written, or not finished: the run that makes it must end its round")
    return found


def run_of(file: Path) -> Path:
    """Return the directory of the run that a file of rollouts belongs to."""
    for directory in (file.parent, file.parent.parent):
        if (directory / "config.yaml").is_file() and (directory / "problems.jsonl").is_file():
            return directory
    raise DataError(f"{file}: neither beside it nor above it are config.yaml and problems.jsonl of the run it is from")


def _problem(line: dict[str, Any]) -> Problem:
    columns = {key: value for key, value in line.items() if key not in ("problem_id", "prompt")}
    return Problem(line["problem_id"], line["prompt"], columns, f"problem {line['problem_id']}")


def _trajectory(line: dict[str, Any], file: Path) -> Trajectory:
    try:
        return Trajectory.from_json(line)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file}: {line.get('id', '')}: no trajectory: {error}") from error


def _tokenizer(files: Sequence[Path]) -> str:
    """Return the fingerprint of the tokenizer whose ids the rollouts hold; '' where they do not agree."""
    told = set()
    for file in files:
        there = [file.parent / name for name in (MANIFEST, SEAL) if (file.parent / name).is_file()]
        told.add(str(read_json(there[0]).get("tokenizer", "")) if there else "")
    return told.pop() if len(told) == 1 else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("refilter", refilter, argv)


if __name__ == "__main__":
    sys.exit(main())
