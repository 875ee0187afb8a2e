"""Demonstrations from a policy: `python -m bcft.collect RECIPE`.

One round's attempts of any policy, a stronger teacher or the one that is to be trained, scored and selected as a round
of `filtered` does it. What is kept is a dataset: `bcft sft RECIPE --dataset_name OUTPUT_DIR` clones it.
"""

import sys
from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import Any

from rich.console import Console

from bcft.algorithms.session import run_or_tell
from bcft.cli import execute
from bcft.config.loader import Recipe, load
from bcft.data.loading import Splits
from bcft.errors import DataError
from bcft.evaluation.metrics import diversity, tally
from bcft.runs.clock import Clock
from bcft.runs.directory import RunDirectory
from bcft.runs.distributed import barrier, rank
from bcft.runs.storage import write_json, write_manifest
from bcft.selection.apply import apply_filter
from bcft.selection.scoring import Grading

FILES = ("rollouts.jsonl", "scores.jsonl", "kept.jsonl", "metrics.json", "config.yaml", "problems.jsonl")


def run(recipe: str | PathLike[str] | None = None, **overrides: Any) -> dict[str, Any]:
    """Collect demonstrations by a recipe; return what `metrics.json` holds.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    return collect(load("collect", recipe, overrides))


def collect(recipe: Recipe) -> dict[str, Any]:
    """Run a parsed recipe, or tell what it came to if it is finished; return what `metrics.json` holds."""
    return run_or_tell(recipe, partial(_collect, recipe))


def _collect(recipe: Recipe, splits: Splits, directory: RunDirectory, console: Console) -> dict[str, Any]:
    from bcft.policy.loading import load_policy
    from bcft.rollout.sample import (
        draw,
        roll_out,
        turns_of,  # these load torch, which nothing above does
    )
    from bcft.runs.distributed import gather

    # 1. Play: training problems alone, so that what is held out stays so.
    problems = {d.problem.id: d.problem for d in splits.train}
    if not problems:
        raise DataError("no problems to attempt: the training split is empty once dev and test are taken out")
    grading = Grading.of(recipe, [d.problem for d in splits.held_out])
    turns_of(recipe)  # what cannot be made is told before a model is loaded
    policy = load_policy(recipe, trainable=False)
    attempts = draw(recipe, problems.values(), 1)
    asked = len({attempt.problem.id for attempt in attempts})
    console.print(f"policy: {recipe['model_name_or_path']} on {policy.precision.why}", markup=False)
    console.print(f"data: {asked:,} of {len(problems):,} problems, {len(attempts):,} attempts", markup=False)
    if note := grading.check(list(problems.values())):
        console.print(note, markup=False)
    barrier()  # every process has seen what the directory held
    directory.record([*splits.train, *splits.held_out], splits.digest)
    played = roll_out(recipe, policy, attempts, place=directory.path, clock=Clock())

    # 2. Score and select, on one process: a reward function asked twice might answer twice.
    metrics: list[dict[str, Any]] = []
    if rank() == 0:
        scores = grading.score(played, problems)
        found = apply_filter(recipe, scores, problems, number=1, source="teacher")
        found.write(directory.path)
        metrics = [{"rollout": tally(scores), "selection": found.metrics, "diversity": diversity(scores)}]
        metrics[0]["conclusion"] = found.conclusion(recipe, directory.path)
        write_json(directory.path / "metrics.json", metrics[0])
        files = [directory.path / name for name in FILES]
        write_manifest(directory.path, files, about={"tokenizer": policy.renderer.fingerprint})
    return dict(gather(metrics)[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("collect", collect, argv)


if __name__ == "__main__":
    sys.exit(main())
