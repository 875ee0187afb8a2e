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
from bcft.evaluation.results import Measured
from bcft.reporting.tables import conclusion, level, print_table, say
from bcft.runs.directory import open_run
from bcft.runs.distributed import rank
from bcft.runs.storage import write_json
from bcft.selection.scoring import success_function


def run(recipe: str | PathLike[str] | None = None, **overrides: Any) -> dict[str, Any]:
    """Evaluate the recipe's model; return its summary, and `vs_base` with `against`.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    return run_config(load("evaluate", recipe, overrides))


def run_config(config: Config) -> dict[str, Any]:
    """Evaluate as configured; return `{model, against, vs_base, conclusion}`.

    The result and every attempt are written below `<output_dir>/evaluate`.
    """
    rollouts = rollout_settings(config.sampling, config.environment, seed=config.training.seed)
    splits, split = load_splits(config.data, config.evaluation), config.evaluation.eval_split
    if not (splits.test if split == "test" else splits.dev):
        raise DataError(f"{config.data.dataset_name} has no {split} problems to evaluate")
    environment = config.environment.environment
    success = success_function(config.selection, [d.problem for d in splits.held_out], environment=environment)
    names = {"model": config.model.model_name_or_path, "against": config.evaluation.against or ""}

    from bcft.evaluation.held_out import measure, samples_of
    from bcft.policy.loading import load_policy

    def measure_model(part: str, name: str, directory: Path) -> Measured:
        """Load one model and evaluate it; it is freed before the next one is loaded."""
        policy = load_policy(name, config.model, trainable=False)
        say(f"{part}: {name} on {policy.precision.why}", quiet=config.quiet)
        samples = samples_of(config.evaluation, split, graded=bool(success or environment))
        return measure(
            policy,
            splits,
            rollouts,
            split=split,
            samples=samples,
            success=success,
            examples=[],
            directory=directory / part,
            quiet=config.quiet,
        )

    with open_run(
        Path(config.training.output_dir) / "evaluate",
        command=config.command,
        recipe=config.resolved,
        writes=rank() == 0,
        debug="debug" in config.flags,
    ) as directory:
        directory.write_status("running")
        measured = {part: measure_model(part, name, directory.path) for part, name in names.items() if name}
        print_table({names[part]: result.summary for part, result in measured.items()}, quiet=config.quiet)
        summaries: dict[str, Any] = {part: result.summary for part, result in measured.items()}
        if "against" in measured:
            summaries |= conclusion(measured["against"], measured["model"], before=f"with {names['against']}")
        else:
            summaries["conclusion"] = level(measured["model"])
        if rank() == 0:
            write_json(directory.path / "metrics.json", summaries)
        say(json.dumps(summaries) if "json" in config.flags else summaries["conclusion"], quiet=False)
    return summaries


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("evaluate", run_config, argv)


if __name__ == "__main__":
    sys.exit(main())
