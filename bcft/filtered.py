"""Filtered behavior cloning: `python -m bcft.filtered RECIPE`.

Rounds of roll out, score, select and train, on the policy's own trajectories. Dev problems choose the best round; test
problems are attempted twice, by the base and by that round. Every round is committed: re-running the same command
resumes an interrupted run with bit-identical rows and weights (on a CPU).
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from bcft.algorithms.session import Session, run_or_report
from bcft.cli import execute
from bcft.config.loader import Config, load
from bcft.data.loading import load_splits
from bcft.environments.base import rollout_settings
from bcft.errors import UsageError
from bcft.reporting.report import check_against, write_report
from bcft.rewards.base import described, import_function
from bcft.selection.scoring import Scorer
from bcft.types import Environment

LONG_ROUND = 60.0
"""The report is written after a round that took at least this many seconds; writing it takes under a second."""


def run(
    recipe: str | PathLike[str] | None = None,
    *,
    reward_funcs: Sequence[Callable[..., Any] | str] | None = None,
    environment: Callable[..., Environment] | str | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Run the recipe's rounds; return what `metrics.json` holds.

    `reward_funcs` and `environment`, a factory that is called with `environment_args`, take the place of the recipe's:
    as dotted paths or as objects.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    functions: list[Callable[..., Any]] = []
    if reward_funcs and all(isinstance(function, str) for function in reward_funcs):
        overrides["reward_funcs"] = list(reward_funcs)
    else:
        functions = [import_function(f, key="reward_funcs") if isinstance(f, str) else f for f in reward_funcs or ()]
    factory = None if isinstance(environment, str) else environment
    if isinstance(environment, str):
        overrides["environment"] = environment
    return run_config(load("filtered", recipe, overrides), reward_funcs=functions or None, environment=factory)


def run_config(
    config: Config,
    *,
    reward_funcs: Sequence[Callable[..., Any]] | None = None,
    environment: Callable[..., Environment] | None = None,
) -> dict[str, Any]:
    """Run a configuration; if its run is finished, print the saved conclusion. Return what `metrics.json` holds."""
    config = config.naming(
        reward_funcs=[described(function) for function in reward_funcs or ()],
        environment=described(environment) if environment else "",
    )
    against = Path(config.evaluation.against) if config.evaluation.against else None
    if against:
        check_against(against)
    # Dotted paths and data are checked before torch is loaded and before a directory is made.
    rollouts = rollout_settings(config.sampling, config.environment, seed=config.training.seed, make=environment)
    splits = load_splits(config.data, config.evaluation)
    if not splits.dev:
        raise UsageError("eval_dev_problems: dev problems choose the best round, and there are none: raise it")
    problems = splits.problems_to_attempt()
    held_out = [d.problem for d in splits.held_out]
    scorer = Scorer.of(
        config.selection, held_out, environment=config.environment.environment, reward_funcs=reward_funcs
    )
    report = partial(write_report, command=config.command_line, against=against)

    def work(session: Session) -> dict[str, Any]:
        """Play the rounds that are left."""
        from bcft.algorithms.filtered_bc import filtered_bc

        def report_round(seconds: float) -> None:
            if seconds > LONG_ROUND:
                report(session.path)

        return filtered_bc(
            config, splits, session, problems=problems, rollouts=rollouts, scorer=scorer, report=report_round
        )

    return run_or_report(config, splits, work, report=report)


def _dry_run(config: Config) -> None:
    from bcft.reporting.dry_run import dry_run_filtered

    dry_run_filtered(
        model=config.model,
        data=config.data,
        training=config.training,
        evaluation=config.evaluation,
        sampling=config.sampling,
        environment=config.environment,
        selection=config.selection,
        rounds=config.rounds,
        command_line=config.command_line,
        debug="debug" in config.flags,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("filtered", lambda config: (_dry_run if "dry-run" in config.flags else run_config)(config), argv)


if __name__ == "__main__":
    sys.exit(main())
