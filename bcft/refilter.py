"""Saved rollouts scored and selected again: `python -m bcft.refilter RECIPE --rollouts FILE_OR_DIRECTORY`.

Nothing is generated and no model is loaded: other rewards, another quantile or another limit, on saved trajectories.
The rewards are asked anew. Resume an interrupted command with the same one. The trajectories of several runs may be
pooled, and stay in their files: what is in memory of one does not depend on how many tokens it has.
The kept rows are a dataset, as those of `collect` are; `sft` on them is offline filtered behavior cloning.
A file of rows that another tool scored is selected from by the rewards in it.
"""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from bcft.cli import execute
from bcft.config.entries import Recipe
from bcft.config.loader import Config, load
from bcft.config.python import switches
from bcft.data.examples import trajectory_examples
from bcft.data.sources import HELD_OUT, own_reward
from bcft.environments.base import step_checker
from bcft.errors import DataError, UsageError
from bcft.evaluation.metrics import Diversity, tally
from bcft.reporting.tables import say
from bcft.rollout.failures import refuse_share
from bcft.runs.directory import open_run
from bcft.runs.distributed import rank
from bcft.runs.progress import Progress
from bcft.runs.storage import KEPT, SCORES, write_json, write_jsonl, write_manifest, write_text
from bcft.selection.apply import rule_of, stream_filter
from bcft.selection.brief import Brief
from bcft.selection.foreign import ForeignRows, is_foreign
from bcft.selection.saved import SavedRollouts, SavedRun, pooled_problems, saved_runs, tokenizer_of, trajectory_of
from bcft.selection.scoring import BATCH, Scorer, batches_of, score_batches
from bcft.types import Problem, Source, TrainingExample

JOURNAL = "journal"
"""Where the answers of the reward functions are until the selection is written."""
_OF_RUN = (*HELD_OUT, "environment")
"""Keys of the runs that made the rollouts, which decide what a problem is and which are held out."""


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
    if not config.selection.rollouts:
        raise UsageError("rollouts: required: a rollouts.jsonl, a round, or the directory of a run")
    with Progress(config.label("refilter, other work"), around=True):
        given = config.selection.rollouts
        places = [given] if isinstance(given, str) else list(given)
        foreign = [place for place in places if is_foreign(place)]
        if foreign and len(foreign) < len(places):
            other = next(place for place in places if place not in foreign)
            raise UsageError(
                f"rollouts: {foreign[0]} has rows of another tool and {other} those of a run: select from them apart, "
                f"or write the run as rows first (bcft export {other} --to dataset)"
            )
        metrics = (_refilter_rows if foreign else _refilter)(config, places)
    say(metrics["conclusion"], quiet=False)
    return metrics


def _refilter(config: Config, places: Sequence[str]) -> dict[str, Any]:
    """Select from the rollouts at some places and write what was kept; return the metrics.

    All attempts are selected from together, with the draws of their last round. They stay in their files: each is read
    once to be checked, once to be scored, and once more if it is kept.
    """
    with Progress(config.label("reading the rollouts")):
        runs = saved_runs(places)
        output = Path(config.training.output_dir)
        made = _common(runs, output)
        problems = pooled_problems(runs)
        saved = SavedRollouts(runs, trajectory_of)
    tops = ", ".join(str(run.path) for run in runs)
    say(f"rollouts: {len(saved.places):,} attempts of {len(saved.files)} rounds in {tops}", quiet=config.quiet)
    if missing := saved.problem_ids - problems.keys():
        raise DataError(f"{runs[0].path / 'problems.jsonl'}: {len(missing)} problems of the rollouts are missing")
    with Progress(config.label("checking references")):
        attempted_problems = [problems[identity] for identity in saved.problem_ids]
        environment, own = made["environment"], own_reward(made)
        scorer = Scorer.of(config.selection, attempted_problems, environment=environment, own=own)
    # Problems, held-out problems and the environment are those of the run that made the rollouts.
    recipe = {**config.resolved, **{key: made[key] for key in _OF_RUN if key in made}}
    with (
        closing(saved),
        open_run(output, command=config.command, recipe=recipe, debug="debug" in config.flags) as directory,
    ):
        directory.write_status("running")
        scores, diverse = _score(saved, problems, scorer, store=output / JOURNAL / "000.jsonl", config=config)
        with Progress(config.label("select")):
            filtered = stream_filter(
                scores,
                rule_of(config.selection, seed=config.training.seed, number=saved.last_round),
                problems,
                rows=_rows_of(saved, scores, problems, train_on=config.data.train_on),
                check_steps=step_checker(made["dataset_name"], environment),
                keep=lambda examples: write_jsonl(output / KEPT, (example.to_json() for example in examples)),
            )
            filtered.write_scores(output)
            metrics: dict[str, Any] = {
                "rollout": tally(scores),
                "selection": filtered.metrics,
                "diversity": diverse.figures,
            }
        metrics["conclusion"] = filtered.conclusion(config.path, output)
        files = [str(file) for run in runs for file in run.files]
        _write(output, recipe, metrics, files, tokenizer=tokenizer_of(runs))
        shutil.rmtree(output / JOURNAL, ignore_errors=True)  # it is not there if nothing was asked
    return metrics


def _refilter_rows(config: Config, places: Sequence[str]) -> dict[str, Any]:
    """Select from rows that another tool scored, by their own rewards, and write what was kept; return the metrics."""
    with Progress(config.label("reading the rows")):
        rows = ForeignRows(places)
    output = Path(config.training.output_dir)
    if output.resolve() in {file.parent.resolve() for file in rows.files}:
        raise UsageError(f"output_dir: {output} holds the rollouts: give another")
    names = ", ".join(map(str, rows.files))
    say(f"rollouts: {len(rows.scores):,} rows in {names}, with the rewards in them", quiet=config.quiet)
    refuse_share(rows.errors, of=len(rows.scores), first=rows.first_error)
    with open_run(output, command=config.command, recipe=config.resolved, debug="debug" in config.flags) as directory:
        directory.write_status("running")
        with Progress(config.label("select")):
            filtered = stream_filter(
                rows.scores,
                rule_of(config.selection, seed=config.training.seed, number=rows.last_round),
                {},
                rows=rows.text,
                check_steps=None,
                keep=lambda kept: write_jsonl(output / KEPT, (row.to_json() for row in kept)),
            )
            filtered.write_scores(output)
        metrics: dict[str, Any] = {"rollout": tally(rows.scores), "selection": filtered.metrics}
        metrics["conclusion"] = filtered.conclusion(config.path, output)
        _write(output, config.resolved, metrics, [str(file) for file in rows.files], tokenizer="")
    return metrics


def _common(runs: Sequence[SavedRun], output: Path) -> Mapping[str, Any]:
    """Return the configuration of the runs, of which all keys of `_OF_RUN` agree.

    Raises UsageError where they do not, and if the output would replace one of them.
    """
    first = runs[0]
    for run in runs:
        if output.resolve() in {run.path.resolve(), *(file.parent.resolve() for file in run.files)}:
            raise UsageError(f"output_dir: {output} holds the rollouts: give another")
        for key in _OF_RUN:
            theirs, ours = run.made.get(key), first.made.get(key)
            if theirs != ours:
                raise UsageError(
                    f"rollouts: {run.path} was made with {key} {theirs!r}, {first.path} with {ours!r}: runs are pooled "
                    f"if their problems and held-out problems are the same"
                )
    return first.made


def _score(
    saved: SavedRollouts, problems: Mapping[str, Problem], scorer: Scorer, *, store: Path, config: Config
) -> tuple[list[Brief], Diversity]:
    """Return what is kept of each score, in the order of the trajectories; raise FaultError if too many failed."""
    refuse_share(saved.errors, of=len(saved.places), first=saved.first_error)
    played = [number for number, place in enumerate(saved.places) if not place.errored]
    errored = [number for number, place in enumerate(saved.places) if place.errored]
    batches = batches_of(played, lambda number: saved.places[number].problem_id)
    order = [*batches, *(errored[first : first + BATCH] for first in range(0, len(errored), BATCH))]
    briefs: dict[int, Brief] = {}
    diverse = Diversity()
    scored = score_batches(
        map(saved.read_all, order), problems, scorer.functions, weights=scorer.weights, success=scorer.success,
        total=len(played), store=store, label=config.label("score"),
    )  # fmt: skip
    for numbers, scores in zip(order, scored, strict=True):
        for number, score in zip(numbers, scores, strict=True):
            briefs[number] = score.brief
            diverse.add(score)
    return [briefs[number] for number in range(len(briefs))], diverse


def _rows_of(
    saved: SavedRollouts, scores: Sequence[Brief], problems: Mapping[str, Problem], *, train_on: str
) -> Callable[[int], list[TrainingExample]]:
    """Return what makes the rows of a trajectory, by its position."""

    def rows(number: int) -> list[TrainingExample]:
        trajectory = saved.read(number)
        source: Source = "self" if "num_rounds" in saved.run(number).made else "teacher"
        problem = problems[trajectory.problem_id]
        reward = scores[number].reward
        return trajectory_examples(trajectory, problem, reward=reward, source=source, train_on=train_on)

    return rows


def _write(
    output: Path, recipe: Mapping[str, Any], metrics: Mapping[str, Any], rollouts: Sequence[str], *, tokenizer: str
) -> None:
    """Write recipe and metrics, and the manifest that commits them with the selected rows."""
    write_text(output / "config.yaml", yaml.safe_dump(dict(recipe), allow_unicode=True))
    write_json(output / "metrics.json", metrics)
    written = [output / name for name in (SCORES, KEPT, "metrics.json", "config.yaml")]
    write_manifest(output, written, about={"tokenizer": tokenizer, "rollouts": list(rollouts)})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("refilter", run_config, argv)


if __name__ == "__main__":
    sys.exit(main())
