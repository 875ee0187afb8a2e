"""Filtered behaviour cloning: `python -m bcft.filtered RECIPE`.

Rounds of four phases: roll out the policy, score what it played, select the best, clone them. Dev problems choose the
round to ship, test problems are touched twice: by the policy as it was, and by that round. Every round is committed;
the same command goes on where it was stopped, to the same weights.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Console

from bcft.algorithms.session import run_or_tell
from bcft.cli import execute
from bcft.config.loader import Recipe, load
from bcft.data.loading import Splits
from bcft.errors import UsageError
from bcft.reporting.dry_run import command, dry_run
from bcft.rewards.base import described
from bcft.runs.directory import RunDirectory
from bcft.runs.distributed import rank
from bcft.types import Environment

LONG_ROUND = 60.0
"""Seconds of a round after which the learning curve is drawn at once: that costs less than a hundredth of it."""


def run(
    recipe: str | PathLike[str] | None = None,
    *,
    reward_funcs: Sequence[Callable[..., Any]] | Sequence[str] | None = None,
    environment: Callable[..., Environment] | str | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Run the recipe's rounds; return what `metrics.json` holds.

    `reward_funcs` and `environment`, which is called with `environment_args`, take the place of the recipe's: as
    dotted paths, or themselves.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    functions = [function for function in reward_funcs or () if not isinstance(function, str)]
    if reward_funcs and not functions:
        overrides["reward_funcs"] = reward_funcs
    make = None if isinstance(environment, str) else environment
    if isinstance(environment, str):
        overrides["environment"] = environment
    return improve(load("filtered", recipe, overrides), reward_funcs=functions or None, environment=make)


def improve(
    recipe: Recipe,
    *,
    reward_funcs: Sequence[Callable[..., Any]] | None = None,
    environment: Callable[..., Environment] | None = None,
) -> dict[str, Any]:
    """Run a parsed recipe, or tell what it came to if it is finished; return what `metrics.json` holds."""
    named: dict[str, Any] = {}  # on record, so that a run does not go on with another reward or environment
    if reward_funcs:
        named["reward_funcs"] = [described(function) for function in reward_funcs]
    if environment:
        named["environment"] = described(environment)
    recipe = replace(recipe, values={**recipe.values, **named}, given=recipe.given | named.keys())
    against = recipe["against"]
    if against and not (Path(against) / "metrics.jsonl").is_file():
        raise UsageError(f"against: {against} is no run of bcft filtered: its rounds are in DIR/metrics.jsonl")
    make = partial(environment, **recipe["environment_args"]) if environment else None
    return run_or_tell(recipe, partial(_improve, recipe, reward_funcs, make), report=partial(_report, recipe))


def _improve(
    recipe: Recipe,
    reward_funcs: Sequence[Callable[..., Any]] | None,
    environment: Callable[[], Environment] | None,
    splits: Splits,
    directory: RunDirectory,
    console: Console,
) -> dict[str, Any]:
    from bcft.algorithms.filtered_bc import Rounds

    rounds = Rounds(recipe, splits, directory, console, reward_funcs=reward_funcs, environment=environment)
    rounds.baseline()
    while number := rounds.next():
        # 1. Roll out: the policy attempts problems it may train on.
        trajectories = rounds.roll_out(number)
        # 2. Score: rewards, and success apart from reward.
        scores = rounds.score(number, trajectories)
        # 3. Select: one pure function says of each what becomes of it.
        rows = rounds.select(number, scores)
        # 4. Clone: the kept ones, as they were sampled, are the next demonstrations.
        rounds.clone(number, rows)
        seconds = rounds.commit(number)
        if seconds > LONG_ROUND and rank() == 0:
            _report(recipe, directory.path)
    return rounds.conclude()


def _report(recipe: Recipe, directory: Path) -> Path:
    from bcft.reporting.report import write_report

    against = Path(recipe["against"]) if recipe["against"] else None
    return write_report(directory, command=command(recipe), against=against)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("filtered", lambda recipe: (dry_run if "dry-run" in recipe.flags else improve)(recipe), argv)


if __name__ == "__main__":
    sys.exit(main())
