"""Held-out evaluation: `python -m bcft.evaluate RECIPE [--model_name_or_path DIR] [--against DIR]`.

Success of a model, an adapter or a finished run on the recipe's dev or test problems, paired against another.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bcft.cli import execute
from bcft.config.effects import GENERATOR
from bcft.config.entries import Recipe
from bcft.config.loader import Config, load
from bcft.config.python import Rows, named_rows, rows_of, switches
from bcft.data.loading import Splits, load_splits
from bcft.environments.base import check_system_prompt, rollout_settings
from bcft.errors import DataError, UsageError
from bcft.evaluation.budget import samples_of
from bcft.evaluation.results import Measured
from bcft.reporting.report import write_report
from bcft.reporting.tables import conclusion, level, print_table, say
from bcft.runs.directory import RunDirectory, open_run
from bcft.runs.distributed import rank
from bcft.runs.progress import Progress
from bcft.runs.storage import read_yaml, write_json
from bcft.selection.scoring import Scorer
from bcft.types import EngineMaker, RolloutSettings


def run(
    recipe: Recipe | None = None,
    *,
    quiet: bool = False,
    train_dataset: Iterable[Mapping[str, Any]] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Evaluate the recipe's model; return its summary, and `vs_base` with `against`.

    recipe: a path, or a dict of keys. train_dataset: rows in place of `dataset_name`, whose dev and test are those of
    a run that was given the same rows.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    rows = rows_of(train_dataset)
    config = load("evaluate", recipe, overrides, flags=switches(quiet=quiet), objects=named_rows(rows))
    return run_config(config, rows=rows)


def run_config(config: Config, *, rows: Rows | None = None) -> dict[str, Any]:
    """Evaluate as configured; return `{model, against, vs_base, conclusion}`.

    The result and every attempt are written below `<output_dir>/evaluate`. rows: in place of the dataset.
    """
    # Data, then functions and environment, are checked before torch is loaded and before a directory is made.
    with Progress(config.label("reading the data")):
        splits = load_splits(config.data, config.evaluation, train=rows, demonstrations=False)
        split = config.evaluation.eval_split
        if not (splits.test if split == "test" else splits.dev):
            raise DataError(f"{config.data.source_name} has no {split} problems to evaluate")
        for name in filter(None, (config.model.model_name_or_path, config.evaluation.against)):
            _refuse_trained(config, splits, name, rows)
        rollouts = rollout_settings(config.sampling, config.environment, seed=config.training.seed)
        held_out, environment = [d.problem for d in splits.held_out], config.environment.environment
        check_system_prompt(config.data.system_prompt, rollouts, held_out)
        scorer = Scorer.of(config.selection, held_out, environment=environment, own=splits.reward)
    if note := splits.note_conflicts(None if environment else scorer.columns_read):
        say(note, quiet=config.quiet)

    with Progress(config.label("loading torch")):
        from bcft.policy.loading import cpu_threads

    with (
        open_run(
            Path(config.training.output_dir) / "evaluate",
            command=config.command,
            recipe=config.resolved,
            writes=rank() == 0,
            debug="debug" in config.flags,
            command_line=config.command_line,
        ) as directory,
        cpu_threads(),
        Progress(config.label("evaluate, other work"), around=True),
    ):
        problems = splits.test if split == "test" else splits.dev
        directory.record([d.problem for d in problems], splits.digest, functions=scorer.described)
        summaries = _evaluate(config, splits, directory, rollouts=rollouts, scorer=scorer)
        try:
            if rank() == 0:
                say(f"Report: {write_report(directory.path)}", quiet=config.quiet)
        finally:  # it is measured, whatever becomes of its report
            say(json.dumps(summaries) if "json" in config.flags else summaries["conclusion"], quiet=False)
    return summaries


def _refuse_trained(config: Config, splits: Splits, name: str, rows: Rows | None) -> None:
    """Raise UsageError when a run of the same dataset trained on problems that are to be evaluated.

    How many problems of a small dataset are held out depends on how many are asked for: a later evaluation that asks
    for more would take training problems of the run. With other `dataset_args`, such as a seed far away, a generator
    may give the same texts in other splits; they are compared as the run asked them, whatever the suffix is now.
    """
    # A run, its best/, or a model of a round; versions.json shows that a config.yaml is a run's.
    places = (Path(name), Path(name).parent, Path(name).parent.parent) if Path(name).is_dir() else ()
    file = next((place / "config.yaml" for place in places if (place / "versions.json").is_file()), None)
    asked = ("eval_dev_problems", "eval_test_problems")
    made = read_yaml(file) if file else {}
    same = made.get("dataset_name", "") == config.data.dataset_name
    same = same and [*(made.get("datasets") or ())] == [*(config.data.datasets or ())]
    if not same or not all(isinstance(made.get(key), int) for key in asked):
        return
    fewer = {key: min(made[key], getattr(config.evaluation, key)) for key in asked}
    evaluation = replace(config.evaluation, **fewer)
    data = replace(config.data, **{key: made[key] for key in GENERATOR if key in made})
    if evaluation == config.evaluation and data == config.data:
        return
    trained = {d.problem.id for d in load_splits(data, evaluation, train=rows, demonstrations=False).train}
    asked_alike = replace(data, dataset_args=config.data.dataset_args)
    if asked_alike != config.data:
        splits = load_splits(asked_alike, config.evaluation, train=rows, demonstrations=False)
    split = config.evaluation.eval_split
    again = [d for d in (splits.test if split == "test" else splits.dev) if d.problem.id in trained]
    if again:
        changed = ["dataset_args"] if data.dataset_args != config.data.dataset_args else []
        first = next(
            key for key in (*changed, *asked) if key in changed or fewer[key] != getattr(config.evaluation, key)
        )
        recorded = " and ".join(f"{key}: {made[key]}" for key in changed or asked)
        raise UsageError(
            f"{first}: {len(again)} of the {split} problems, such as {again[0].problem.where}, were training problems "
            f"of {name}, whose recipe has {recorded}: {'give the same' if changed else 'ask for no more'}"
        )


def _evaluate(
    config: Config, splits: Splits, directory: RunDirectory, *, rollouts: RolloutSettings, scorer: Scorer
) -> dict[str, Any]:
    """Check every model, then load and measure one after the other; write and return what was measured."""
    from bcft.evaluation.held_out import forget, measure
    from bcft.generation import open_engine
    from bcft.policy.loading import load_policy, load_served

    split, model = config.evaluation.eval_split, config.model
    names = {"model": model.model_name_or_path, "against": config.evaluation.against or ""}
    served = {"model": config.engine.served} if config.engine.served else {}  # a model to compare with is sampled here
    _check(config, splits, names, served)

    def measured_model(part: str, name: str, maker: EngineMaker | None) -> Measured:
        """Load one model and evaluate it; it is freed before the next one is loaded."""
        here = part not in served
        with Progress(config.label(f"{part}, loading")):
            policy = (
                load_policy(name, model, trainable=False) if here else load_served(name, model, served=served[part])
            )
        say(f"{part}: {policy.words(name)}", quiet=config.quiet)
        if policy.note:
            say(policy.note, quiet=config.quiet)
        return measure(
            policy,
            splits,
            replace(rollouts, make_engine=None if served and here else maker, at_once=config.engine.at_once),
            split=split,
            samples=samples_of(config.evaluation, split, graded=scorer.measures != "nothing"),
            scorer=scorer,
            examples=[],
            directory=directory.path / part,
            label=config.label(f"{part}, {split}"),
            keep=True,  # until all are measured: an interruption in the second costs nothing of the first
        )

    telling = partial(say, quiet=config.quiet)
    with open_engine(config.engine, directory=directory.path, say=telling, label=config.label) as maker:
        measured = {part: measured_model(part, name, maker) for part, name in names.items() if name}
    print_table(
        {served.get(part, names[part]): result.summary for part, result in measured.items()}, quiet=config.quiet
    )
    summaries: dict[str, Any] = {part: result.summary for part, result in measured.items()}
    if "against" in measured:
        summaries |= conclusion(measured["against"], measured["model"], before=f"with {names['against']}")
    else:
        summaries["conclusion"] = level(measured["model"])
    if config.engine.noise:
        summaries["note"] = config.engine.noise
    if rank() == 0:
        write_json(directory.path / "metrics.json", summaries)
        for part in names:
            forget(directory.path / part)
    return summaries


def _check(config: Config, splits: Splits, names: Mapping[str, str], served: Mapping[str, str]) -> None:
    """Refuse models, and prompts that their templates cannot render, before any weights are loaded.

    names: of the models by part, '' for none; served: the parts whose models a server has.
    """
    from bcft.data.checks import check_prompts
    from bcft.policy.loading import check_model, load_renderer

    problems = [d.problem for d in (splits.test if config.evaluation.eval_split == "test" else splits.dev)]
    for part, name in names.items():
        if name:
            renderer = (
                load_renderer(name, config.model)
                if part in served
                else check_model(name, config.model, trainable=False).renderer
            )
            check_prompts(problems, renderer, special_tokens=config.data.special_tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("evaluate", run_config, argv)


if __name__ == "__main__":
    sys.exit(main())
