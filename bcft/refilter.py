"""Saved rollouts scored and selected again: `python -m bcft.refilter RECIPE --rollouts FILE_OR_DIRECTORY`.

Nothing is generated and no model is loaded: other rewards, another quantile or another limit, on saved trajectories.
The rewards are asked anew. Resume an interrupted command with the same one.
The kept rows are a dataset, as those of `collect` are; `sft` on them is offline filtered behavior cloning.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bcft.cli import execute
from bcft.config.entries import Recipe
from bcft.config.loader import Config, load
from bcft.config.python import switches
from bcft.data.sources import HELD_OUT, own_reward
from bcft.environments.base import step_checker
from bcft.errors import DataError, UsageError
from bcft.evaluation.metrics import diversity, tally
from bcft.reporting.tables import say
from bcft.runs.directory import open_run
from bcft.runs.distributed import rank
from bcft.runs.progress import Progress
from bcft.runs.storage import (
    KEPT,
    MANIFEST,
    ROLLOUTS,
    SCORES,
    SEAL,
    read_json,
    read_jsonl,
    read_yaml,
    sealed,
    write_json,
    write_manifest,
    write_text,
)
from bcft.selection.apply import apply_filter, rule_of
from bcft.selection.scoring import Scorer
from bcft.types import Problem, Trajectory

JOURNAL = "journal"
"""Where the answers of the reward functions are until the selection is written."""


def run(recipe: Recipe | None = None, *, quiet: bool = False, **overrides: Any) -> dict[str, Any]:
    """Select from saved rollouts with a recipe; return what `metrics.json` holds.

    recipe: a path, or a dict of keys. quiet: the flag of the command line.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    return run_config(load("refilter", recipe, overrides, flags=switches(quiet=quiet)))


def run_config(config: Config) -> dict[str, Any]:
    """Run a configuration; the files of an earlier refilter in its directory are replaced.

    Raises UsageError without rollouts, DataError where they are not as a run wrote them.
    """
    if rank() > 0:  # there is nothing to share among processes
        return {}
    if config.selection.rollouts is None:
        raise UsageError("rollouts: required: a rollouts.jsonl, a round, or the directory of a run")
    with Progress(config.label("refilter, other work"), around=True):
        metrics = _refilter(config, Path(config.selection.rollouts))
    say(metrics["conclusion"], quiet=False)
    return metrics


def _refilter(config: Config, path: Path) -> dict[str, Any]:
    """Select from the rollouts at a path and write what was kept; return the metrics.

    All attempts are selected from together, with the draws of their last round.
    """
    with Progress(config.label("reading the rollouts")):
        files = rollout_files(path)
        top = run_of(files[0])
        made = read_yaml(top / "config.yaml")
        output = Path(config.training.output_dir)
        if output.resolve() in {top.resolve(), *(file.parent.resolve() for file in files)}:
            raise UsageError(f"output_dir: {output} holds the rollouts: give another")
        problems = {line["problem_id"]: _problem(line) for line in read_jsonl(top / "problems.jsonl")}
        trajectories = [_trajectory(line, file) for file in files for line in read_jsonl(file)]
    say(f"rollouts: {len(trajectories):,} attempts of {len(files)} rounds in {top}", quiet=config.quiet)
    attempted = {trajectory.problem_id for trajectory in trajectories}
    if missing := attempted - problems.keys():
        raise DataError(f"{top / 'problems.jsonl'}: {len(missing)} problems of the rollouts are missing")
    with Progress(config.label("checking references")):
        attempted_problems = [problems[identity] for identity in attempted]
        environment, own = made["environment"], own_reward(made)
        scorer = Scorer.of(config.selection, attempted_problems, environment=environment, own=own)
    last = max(trajectory.round for trajectory in trajectories)
    # Problems, held-out problems and the environment are those of the run that made the rollouts.
    recipe = {**config.resolved, **{key: made[key] for key in (*HELD_OUT, "environment") if key in made}}
    with open_run(output, command=config.command, recipe=recipe, debug="debug" in config.flags) as directory:
        directory.write_status("running")
        store = output / JOURNAL / "000.jsonl"
        scores = scorer.score(trajectories, problems, store=store, label=config.label("score"))
        with Progress(config.label("select")):
            filtered = apply_filter(
                scores,
                rule_of(config.selection, seed=config.training.seed, number=last),
                problems,
                source="self" if "num_rounds" in made else "teacher",
                train_on=config.data.train_on,
                check_steps=step_checker(made["dataset_name"], environment),
            )
            filtered.write(output)
            metrics: dict[str, Any] = {
                "rollout": tally(scores),
                "selection": filtered.metrics,
                "diversity": diversity(scores),
            }
        metrics["conclusion"] = filtered.conclusion(config.path, output)
        _write(output, recipe, metrics, files)
        shutil.rmtree(output / JOURNAL, ignore_errors=True)  # it is not there if nothing was asked
    return metrics


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


def _problem(line: dict[str, Any]) -> Problem:
    columns = {key: value for key, value in line.items() if key not in ("problem_id", "prompt")}
    return Problem(line["problem_id"], line["prompt"], columns, f"problem {line['problem_id']}")


def _trajectory(line: dict[str, Any], file: Path) -> Trajectory:
    try:
        return Trajectory.from_json(line)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file}: {line.get('id', '')}: not a trajectory: {error}") from error


def _write(output: Path, recipe: Mapping[str, Any], metrics: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Write recipe and metrics, and the manifest that commits them with the selected rows."""
    write_text(output / "config.yaml", yaml.safe_dump(dict(recipe), allow_unicode=True))
    write_json(output / "metrics.json", metrics)
    written = [output / name for name in (SCORES, KEPT, "metrics.json", "config.yaml")]
    about = {"tokenizer": _tokenizer(files), "rollouts": [str(file) for file in files]}
    write_manifest(output, written, about=about)


def _tokenizer(files: Sequence[Path]) -> str:
    """Return the fingerprint of the tokenizer whose ids the rollouts hold; '' where they do not agree."""
    fingerprints = set()
    for file in files:
        manifests = [file.parent / name for name in (MANIFEST, SEAL) if (file.parent / name).is_file()]
        fingerprints.add(str(read_json(manifests[0]).get("tokenizer", "")) if manifests else "")
    return fingerprints.pop() if len(fingerprints) == 1 else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("refilter", run_config, argv)


if __name__ == "__main__":
    sys.exit(main())
