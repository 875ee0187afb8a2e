"""Plain behavior cloning: `python -m bcft.sft RECIPE`.

Demonstrations to examples, one SFT run with loss on the completion only, and held-out success before and after.
Re-running the same command resumes an interrupted run; on a finished run it prints the conclusion.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bcft.algorithms.session import Session, run_or_report
from bcft.cli import execute
from bcft.config.entries import Recipe
from bcft.config.loader import Config, load
from bcft.config.python import Rows, named_rows, rows_of, switches
from bcft.data.loading import load_splits
from bcft.environments.base import check_system_prompt, rollout_settings
from bcft.runs.progress import Progress
from bcft.selection.scoring import Scorer


def run(
    recipe: Recipe | None = None,
    *,
    dry_run: bool = False,
    quiet: bool = False,
    allow_drift: bool = False,
    train_dataset: Iterable[Mapping[str, Any]] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Clone the recipe's demonstrations; return what `metrics.json` holds, {} with `dry_run`.

    recipe: a path, or a dict of keys. dry_run, quiet, allow_drift: the flags of the command line. train_dataset: rows
    in place of `dataset_name`, a `datasets.Dataset` or dicts; dev and test are held out of them.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    rows = rows_of(train_dataset)
    flags = switches(dry_run=dry_run, quiet=quiet, allow_drift=allow_drift)
    return run_config(load("sft", recipe, overrides, flags=flags, objects=named_rows(rows)), rows=rows)


def run_config(config: Config, *, rows: Rows | None = None) -> dict[str, Any]:
    """Run a configuration; if its run is finished, print the saved conclusion. Return what `metrics.json` holds.

    rows: in place of the dataset that the recipe names.
    """
    if "dry-run" in config.flags:
        _dry_run(config, rows)
        return {}
    # Data, then functions and environment, are checked before torch is loaded and before a directory is made.
    with Progress(config.label("reading the data")):
        splits = load_splits(config.data, config.evaluation, train=rows)
        rollouts = rollout_settings(config.sampling, config.environment, seed=config.training.seed)
        held_out = [d.problem for d in splits.held_out]
        check_system_prompt(config.data.system_prompt, rollouts, held_out)
        scorer = Scorer.of(config.selection, held_out, environment=config.environment.environment, own=splits.reward)

    def work(session: Session) -> dict[str, Any]:
        """Train, or resume training."""
        from bcft.algorithms.sft import sft
        from bcft.generation import open_engine
        from bcft.policy.loading import cpu_threads

        with (
            cpu_threads(),
            open_engine(config.engine, directory=session.path, say=session.say, label=session.label) as maker,
        ):
            return sft(config, splits, session, rollouts=replace(rollouts, make_engine=maker), scorer=scorer)

    return run_or_report(config, splits, work)


def _dry_run(config: Config, rows: Rows | None) -> None:
    from bcft.reporting.dry_run import Plan, dry_run_sft

    plan = Plan(**config.sections, command_line=config.command_line, debug="debug" in config.flags, rows=rows)
    dry_run_sft(plan)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("sft", run_config, argv)


if __name__ == "__main__":
    sys.exit(main())
