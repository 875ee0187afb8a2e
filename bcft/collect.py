"""Demonstrations from a policy: `python -m bcft.collect RECIPE`.

One round's attempts of any policy, a stronger teacher or the one to be trained, are rolled out, scored and selected as
a round of `filtered` does it. The kept rows are a dataset: `bcft sft RECIPE --dataset_name OUTPUT_DIR` clones them.
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
from bcft.data.loading import Splits, load_splits
from bcft.environments.base import check_system_prompt, rollout_settings, step_checker
from bcft.evaluation.metrics import diversity, tally
from bcft.reporting.tables import say
from bcft.runs.clock import Clock
from bcft.runs.distributed import barrier, broadcast, rank
from bcft.runs.drift import discard_attempts
from bcft.runs.progress import Progress
from bcft.runs.storage import KEPT, ROLLOUTS, SCORES, write_json, write_manifest
from bcft.selection.apply import apply_filter, rule_of
from bcft.selection.scoring import Scorer
from bcft.selection.store import answers_path
from bcft.types import Problem, RolloutSettings

FILES = (ROLLOUTS, SCORES, KEPT, "metrics.json", "config.yaml", "problems.jsonl")


def run(
    recipe: Recipe | None = None,
    *,
    quiet: bool = False,
    allow_drift: bool = False,
    train_dataset: Iterable[Mapping[str, Any]] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Collect demonstrations with a recipe; return what `metrics.json` holds.

    recipe: a path, or a dict of keys. quiet, allow_drift: the flags of the command line. train_dataset: rows in place
    of `dataset_name`, a `datasets.Dataset` or dicts; dev and test are held out of them.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    rows = rows_of(train_dataset)
    flags = switches(quiet=quiet, allow_drift=allow_drift)
    return run_config(load("collect", recipe, overrides, flags=flags, objects=named_rows(rows)), rows=rows)


def run_config(config: Config, *, rows: Rows | None = None) -> dict[str, Any]:
    """Run a configuration; if its run is finished, print the saved conclusion. Return what `metrics.json` holds.

    rows: in place of the dataset that the recipe names.
    """
    # Data, then functions and environment, are checked before torch is loaded and before a directory is made.
    with Progress(config.label("reading the data")):
        splits = load_splits(config.data, config.evaluation, train=rows, demonstrations=False)
        problems = splits.problems_to_attempt()
        rollouts = rollout_settings(config.sampling, config.environment, seed=config.training.seed)
        held_out, environment = [d.problem for d in splits.held_out], config.environment.environment
        check_system_prompt(config.data.system_prompt, rollouts, problems.values())
        scorer = Scorer.of(config.selection, held_out, environment=environment, own=splits.reward)
    if note := splits.note_conflicts(None if environment else scorer.columns_read):
        say(note, quiet=config.quiet)

    def work(session: Session) -> dict[str, Any]:
        """Roll out, score and select."""
        from bcft.policy.loading import cpu_threads

        with cpu_threads():
            return _collect(config, splits, session, problems=problems, rollouts=rollouts, scorer=scorer)

    return run_or_report(config, splits, work)


def _collect(
    config: Config,
    splits: Splits,
    session: Session,
    *,
    problems: Mapping[str, Problem],
    rollouts: RolloutSettings,
    scorer: Scorer,
) -> dict[str, Any]:
    from bcft.data.checks import check_prompts
    from bcft.generation import open_engine
    from bcft.policy.loading import check_model, load_policy, load_renderer, load_served
    from bcft.rollout.sample import draw, roll_out

    # 1. Roll out on training problems only: held-out problems stay held out.
    name, model, served = config.model.model_name_or_path, config.model, config.engine.served
    with Progress(session.label("checking references and prompts")):
        note = scorer.check(list(problems.values()))
        renderer = load_renderer(name, model) if served else check_model(name, model, trainable=False).renderer
        check_prompts(list(problems.values()), renderer, special_tokens=config.data.special_tokens)
    with Progress(session.label("loading the model")):
        policy = load_served(name, model, served=served) if served else load_policy(name, model, trainable=False)
    seed, samples = config.training.seed, config.sampling.num_generations
    attempts = draw(problems.values(), 1, seed=seed, prompts=config.rounds.prompts_per_round, samples=samples)
    session.say(f"policy: {policy.words(name)}")
    session.say(f"data: {len(attempts) // samples:,} of {len(problems):,} problems, {len(attempts):,} attempts")
    for text in filter(None, (policy.note, note)):
        session.say(text)
    barrier()  # every process has read the directory before it is written
    if rank() == 0:
        discard_attempts(session.path, session.directory.drift)
    barrier()  # none reads what is deleted
    attempted = [d.problem for d in (*splits.train, *splits.held_out)]
    session.directory.record(attempted, splits.digest, functions=scorer.described)
    label = session.label("roll out")
    with open_engine(config.engine, directory=session.path, say=session.say, label=session.label) as maker:
        rollouts = replace(rollouts, make_engine=maker, at_once=config.engine.at_once)
        trajectories = roll_out(policy, attempts, rollouts, directory=session.path, clock=Clock(), label=label)

    # 2. Score and select on one process: a function is asked once for each attempt, and its answers are stored.
    metrics: dict[str, Any] = {}
    if rank() == 0:
        scores = scorer.score(trajectories, problems, store=answers_path(session.path), label=session.label("score"))
        filtered = apply_filter(
            scores,
            rule_of(config.selection, seed=seed, number=1),
            problems,
            source="teacher",
            train_on=config.data.train_on,
            check_steps=step_checker(config.data.dataset_name, config.environment.environment),
        )
        filtered.write(session.path)
        metrics = {"rollout": tally(scores), "selection": filtered.metrics, "diversity": diversity(scores)}
        recipe = f"{config.path} --engine hf" if config.path and served else config.path
        metrics["conclusion"] = filtered.conclusion(recipe, session.path)
        write_json(session.path / "metrics.json", metrics)
        files = [session.path / name for name in FILES]
        write_manifest(session.path, files, about={"tokenizer": policy.renderer.fingerprint})
    return dict(broadcast(metrics))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("collect", run_config, argv)


if __name__ == "__main__":
    sys.exit(main())
