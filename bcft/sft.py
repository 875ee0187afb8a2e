"""Plain behaviour cloning: `python -m bcft.sft RECIPE`.

Demonstrations to rows, one SFT run with loss on the completion only, and the held-out success before and after.
Run again, the same command goes on where it was stopped; on a finished run it prints the conclusion.
"""

import sys
from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from bcft.algorithms.session import run_or_tell
from bcft.algorithms.sft import clone_demonstrations
from bcft.cli import execute
from bcft.config.loader import Recipe, load
from bcft.reporting.dry_run import dry_run

if TYPE_CHECKING:
    pass


def run(recipe: str | PathLike[str] | None = None, **overrides: Any) -> dict[str, Any]:
    """Clone the recipe's demonstrations; return what `metrics.json` holds.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    return clone(load("sft", recipe, overrides))


def clone(recipe: Recipe) -> dict[str, Any]:
    """Run a parsed recipe, or tell what it came to if it is finished; return what `metrics.json` holds."""
    return run_or_tell(recipe, partial(clone_demonstrations, recipe))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("sft", lambda recipe: (dry_run if "dry-run" in recipe.flags else clone)(recipe), argv)


if __name__ == "__main__":
    sys.exit(main())
