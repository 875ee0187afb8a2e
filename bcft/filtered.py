"""Filtered behavior cloning: `python -m bcft.filtered RECIPE`.

Rounds of roll out, score, select and train, on the policy's own trajectories. Dev problems choose the best round; test
problems are attempted twice, by the base and by that round. Every round is committed: re-running the same command
resumes an interrupted run with bit-identical rows and weights (on a CPU).
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bcft.algorithms.session import Session, run_or_report
from bcft.cli import execute
from bcft.config.entries import Recipe
from bcft.config.loader import Config, load
from bcft.config.python import Rows, named_rows, rows_of, switches
from bcft.data.loading import load_splits
from bcft.environments.base import check_system_prompt, rollout_settings
from bcft.reporting.report import Redraw, check_against
from bcft.reporting.tables import say
from bcft.rewards.base import Reward, described
from bcft.runs.progress import Progress
from bcft.selection.scoring import Scorer
from bcft.types import Environment, show

Functions = Reward | str | Sequence[Reward | str]
"""Reward functions as Python gives them: one or several, each a function or a dotted path."""


def run(
    recipe: Recipe | None = None,
    *,
    reward_funcs: Functions | None = None,
    environment: Callable[..., Environment] | str | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    allow_drift: bool = False,
    train_dataset: Iterable[Mapping[str, Any]] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Run the recipe's rounds; return what `metrics.json` holds, {} with `dry_run`.

    recipe: a path, or a dict of keys. `reward_funcs` (one or several, each a function or a dotted path) and
    `environment` (a factory that is called with `environment_args`, or its dotted path) take the place of the recipe's.
    dry_run, quiet, allow_drift: the flags of the command line. train_dataset: rows in place of `dataset_name`, a
    `datasets.Dataset` or dicts; dev and test are held out of them.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    rows = rows_of(train_dataset)
    objects: dict[str, Any] = named_rows(rows)
    functions = _listed(reward_funcs)
    if functions and all(isinstance(function, str) for function in functions):
        overrides["reward_funcs"], functions = functions, []
    elif functions:
        objects["reward_funcs"] = [
            function if isinstance(function, str) else _named(function) for function in functions
        ]
    factory = None if isinstance(environment, str) else environment
    if factory is not None:
        objects["environment"] = _named(factory)
    elif environment is not None:
        overrides["environment"] = environment
    flags = switches(dry_run=dry_run, quiet=quiet, allow_drift=allow_drift)
    config = load("filtered", recipe, overrides, flags=flags, objects=objects)
    return run_config(config, rows=rows, reward_funcs=functions or None, environment=factory)


def _listed(functions: Functions | None) -> list[Any]:
    if functions is None or isinstance(functions, str) or callable(functions) or not isinstance(functions, Iterable):
        return [] if functions is None else [functions]
    return list(functions)


def _named(given: Any) -> str:
    """Return the name of a function or a factory; what is neither is refused where it would be called."""
    return described(given) if callable(given) else show(given)


def run_config(
    config: Config,
    *,
    rows: Rows | None = None,
    reward_funcs: Sequence[Reward | str] | None = None,
    environment: Callable[..., Environment] | None = None,
) -> dict[str, Any]:
    """Run a configuration; if its run is finished, print the saved conclusion. Return what `metrics.json` holds.

    rows, reward_funcs, environment: in place of those that the recipe names.
    """
    if "dry-run" in config.flags:
        _dry_run(config, rows, reward_funcs, environment)
        return {}
    against = Path(config.evaluation.against) if config.evaluation.against else None
    if against:
        check_against(against)
    # Data, then functions and environment, are checked before torch is loaded and before a directory is made.
    with Progress(config.label("reading the data")):
        splits = load_splits(config.data, config.evaluation, train=rows, demonstrations=False)
        splits.require_dev(config.evaluation.eval_dev_problems)
        problems = splits.problems_to_attempt()
        rollouts = rollout_settings(config.sampling, config.environment, seed=config.training.seed, make=environment)
        check_system_prompt(config.data.system_prompt, rollouts, problems.values())
        held_out = [d.problem for d in splits.held_out]
        name = config.environment.environment
        scorer = Scorer.of(config.selection, held_out, environment=name, reward_funcs=reward_funcs, own=splits.reward)
    if note := splits.note_conflicts(None if name else scorer.columns_read):
        say(note, quiet=config.quiet)

    def work(session: Session) -> dict[str, Any]:
        """Play the rounds that are left."""
        from bcft.algorithms.filtered_bc import filtered_bc
        from bcft.generation import open_engine
        from bcft.policy.loading import cpu_threads

        with (
            cpu_threads(),
            open_engine(config.engine, directory=session.path, say=session.say, label=session.label) as maker,
        ):
            return filtered_bc(
                config,
                splits,
                session,
                problems=problems,
                rollouts=replace(rollouts, make_engine=maker),
                scorer=scorer,
                redraw=Redraw(session.path, against=against, say=session.say),
            )

    return run_or_report(config, splits, work, against=against)


def _dry_run(
    config: Config,
    rows: Rows | None,
    reward_funcs: Sequence[Reward | str] | None,
    environment: Callable[..., Environment] | None,
) -> None:
    from bcft.reporting.dry_run import Plan, dry_run_filtered

    dry_run_filtered(
        Plan(
            **config.sections,
            command_line=config.command_line,
            debug="debug" in config.flags,
            rows=rows,
            reward_funcs=reward_funcs,
            make_environment=environment,
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("filtered", run_config, argv)


if __name__ == "__main__":
    sys.exit(main())
