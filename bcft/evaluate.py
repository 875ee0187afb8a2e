"""Held-out evaluation: `python -m bcft.evaluate RECIPE [--model_name_or_path DIR] [--against DIR]`.

Success of a model, an adapter or a finished run on the recipe's dev or test problems, paired against another.
"""

import json
import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from bcft.cli import execute
from bcft.config.loader import Config, load
from bcft.data.loading import load_splits
from bcft.environments.base import rollout_settings
from bcft.errors import DataError
from bcft.reporting.tables import conclusion, level, print_table, say
from bcft.runs.directory import open_run
from bcft.runs.distributed import rank
from bcft.runs.storage import write_json
from bcft.selection.scoring import success_function


def run(recipe: str | PathLike[str] | None = None, **overrides: Any) -> dict[str, Any]:
    """Evaluate the recipe's model; return its summary, and `vs_base` with `against`.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    return evaluate(load("evaluate", recipe, overrides))


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluate as configured; return `{model, against, vs_base, conclusion}` and write it, with every attempt, below
    `<output_dir>/evaluate`."""
    rollouts = rollout_settings(config.sampling, config.environment, seed=config.training.seed)
    splits, split = load_splits(config.data, config.evaluation), config.evaluation.eval_split
    if not (splits.test if split == "test" else splits.dev):
        raise DataError(f"{config.data.dataset_name} has no {split} problems to evaluate")
    environment = config.environment.environment
    success = success_function(config.selection, [d.problem for d in splits.held_out], environment=environment)
    names = {"model": config.model.model_name_or_path, "against": config.evaluation.against or ""}

    from bcft.evaluation.held_out import measure, samples_of
    from bcft.policy.loading import load_policy

    with open_run(
        Path(config.training.output_dir) / "evaluate",
        command=config.command,
        recipe=config.resolved,
        writes=rank() == 0,
        debug="debug" in config.flags,
    ) as directory:
        measured = {}
        for part, name in names.items():
            if not name:
                continue
            policy = load_policy(name, config.model, trainable=False)
            say(f"{part}: {name} on {policy.precision.why}", quiet=config.quiet)
            measured[part] = measure(
                policy,
                splits,
                rollouts,
                split=split,
                samples=samples_of(config.evaluation, split, graded=bool(success or environment)),
                success=success,
                examples=[],
                directory=directory.path / part,
                quiet=config.quiet,
            )
        print_table({names[part]: one.summary for part, one in measured.items()}, quiet=config.quiet)
        result: dict[str, Any] = {part: one.summary for part, one in measured.items()}
        if "against" in measured:
            result |= conclusion(measured["against"], measured["model"], before=f"with {names['against']}")
        else:
            result["conclusion"] = level(measured["model"])
        if rank() == 0:
            write_json(directory.path / "metrics.json", result)
            print(json.dumps(result) if "json" in config.flags else result["conclusion"])
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("evaluate", evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
