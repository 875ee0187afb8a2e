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
from bcft.config.loader import Recipe, load
from bcft.errors import DataError


def run(recipe: str | PathLike[str] | None = None, **overrides: Any) -> dict[str, Any]:
    """Evaluate the recipe's model; return its summary, and `vs_base` with `against`.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    return measure_recipe(load("evaluate", recipe, overrides))


def measure_recipe(recipe: Recipe) -> dict[str, Any]:
    """Evaluate by a parsed recipe; return `{model, against, vs_base, conclusion}` and write it, with all rows, below
    `<output_dir>/evaluate`."""
    import dataclasses

    from bcft.data.loading import load_splits
    from bcft.evaluation.held_out import measure
    from bcft.policy.loading import load_policy
    from bcft.reporting.tables import conclusion, level, plain_console, print_table
    from bcft.rollout.sample import turns_of
    from bcft.runs.directory import open_run
    from bcft.runs.distributed import rank
    from bcft.runs.storage import write_json
    from bcft.selection.scoring import success_function

    console = plain_console(quiet=bool({"quiet", "json"} & recipe.flags))
    names = {"model": recipe["model_name_or_path"], "against": recipe["against"]}
    with open_run(recipe, Path(recipe["output_dir"]) / "evaluate", writes=rank() == 0) as directory:
        splits = load_splits(recipe)
        if not (splits.test if recipe["eval_split"] == "test" else splits.dev):
            raise DataError(f"{recipe['dataset_name']} has no {recipe['eval_split']} problems to evaluate")
        turns_of(recipe)  # what cannot be made is told before a model is loaded
        success, found = success_function(recipe, [d.problem for d in splits.held_out]), {}
        for part, name in names.items():
            if name:
                policy = load_policy(dataclasses.replace(recipe, values={**recipe.values, "model_name_or_path": name}))
                console.print(f"{part}: {name} on {policy.precision.why}")
                found[part] = measure(
                    recipe,
                    splits,
                    policy,
                    success=success,
                    split=recipe["eval_split"],
                    rows=[],
                    directory=directory.path / part,
                    quiet=console.quiet,
                )
        print_table({names[part]: measured.summary for part, measured in found.items()}, console)
        result: dict[str, Any] = {part: measured.summary for part, measured in found.items()}
        if "against" in found:
            result |= conclusion(found["against"], found["model"], before=f"with {recipe['against']}")
        else:
            result["conclusion"] = level(found["model"])
        if rank() == 0:
            write_json(directory.path / "metrics.json", result)
            print(json.dumps(result) if "json" in recipe.flags else result["conclusion"])
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("evaluate", measure_recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
