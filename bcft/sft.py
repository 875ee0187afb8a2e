"""Plain behavior cloning: `python -m bcft.sft RECIPE`.

Demonstrations to examples, one SFT run with loss on the completion only, and held-out success before and after.
Re-running the same command resumes an interrupted run; on a finished run it prints the conclusion.
"""

import sys
from collections.abc import Sequence
from os import PathLike
from typing import Any

from bcft.algorithms.session import Session, run_or_report
from bcft.cli import execute
from bcft.config.loader import Config, load
from bcft.data.loading import load_splits
from bcft.environments.base import rollout_settings
from bcft.selection.scoring import success_function


def run(recipe: str | PathLike[str] | None = None, **overrides: Any) -> dict[str, Any]:
    """Clone the recipe's demonstrations; return what `metrics.json` holds.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    return run_config(load("sft", recipe, overrides))


def run_config(config: Config) -> dict[str, Any]:
    """Run a configuration; if its run is finished, print the saved conclusion. Return what `metrics.json` holds."""
    # Dotted paths and data are checked before torch is loaded and before a directory is made.
    rollouts = rollout_settings(config.sampling, config.environment, seed=config.training.seed)
    splits = load_splits(config.data, config.evaluation)
    held_out = [d.problem for d in splits.held_out]
    success = success_function(config.selection, held_out, environment=config.environment.environment)

    def work(session: Session) -> dict[str, Any]:
        """Train, or resume training."""
        from bcft.algorithms.sft import sft

        return sft(config, splits, session, rollouts=rollouts, success=success)

    return run_or_report(config, splits, work)


def _dry_run(config: Config) -> None:
    from bcft.reporting.dry_run import dry_run_sft

    dry_run_sft(
        model=config.model,
        data=config.data,
        training=config.training,
        evaluation=config.evaluation,
        sampling=config.sampling,
        environment=config.environment,
        selection=config.selection,
        command_line=config.command_line,
        debug="debug" in config.flags,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("sft", lambda config: (_dry_run if "dry-run" in config.flags else run_config)(config), argv)


if __name__ == "__main__":
    sys.exit(main())
