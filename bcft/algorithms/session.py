"""A command's work in its run directory: opened, resumed, reported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from bcft.config.loader import Recipe
from bcft.data.loading import Splits, load_splits
from bcft.reporting.tables import plain_console
from bcft.runs.directory import RunDirectory, open_run
from bcft.runs.distributed import rank
from bcft.runs.storage import finished, read_json


def run_or_tell(
    recipe: Recipe,
    work: Callable[[Splits, RunDirectory, Console], dict[str, Any]],
    *,
    report: Callable[[Path], Path] | None = None,
) -> dict[str, Any]:
    """Do the work in the recipe's directory, or tell what it came to if it is finished; return its `metrics.json`.

    report: makes a page of a finished directory, of one that was finished before as well; on one process.

    Raises UsageError when the directory was begun with another recipe or other data, or, unless it is finished, with
    other versions of packages or another number of processes.
    """
    console = plain_console(quiet="quiet" in recipe.flags)
    with open_run(recipe, Path(recipe["output_dir"]), writes=rank() == 0) as directory:
        directory.check_recipe()
        splits = load_splits(recipe)
        directory.check_data(splits.digest)
        if finished(directory.path):
            metrics = read_json(directory.path / "metrics.json")
            console.print(f"{directory.path} is finished", markup=False)
        else:
            directory.check_versions()
            metrics = work(splits, directory, console)
        if report and rank() == 0:
            console.print(f"What happened, with a picture: {report(directory.path)}", markup=False)
    if rank() == 0:
        print(metrics["conclusion"])
    return metrics
