"""Demonstrations from a policy: `python -m bcft.collect RECIPE`.

One round's attempts of any policy, a stronger teacher or the one to be trained, are rolled out, scored and selected as
a round of `filtered` does it. The kept rows are a dataset: `bcft sft RECIPE --dataset_name OUTPUT_DIR` clones them.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from bcft.algorithms.session import Session, run_or_report
from bcft.cli import execute
from bcft.config.loader import Config, load
from bcft.data.loading import Splits, load_splits
from bcft.environments.base import rollout_settings, step_checker
from bcft.evaluation.metrics import diversity, tally
from bcft.runs.clock import Clock
from bcft.runs.distributed import barrier, broadcast, rank
from bcft.runs.storage import KEPT, ROLLOUTS, SCORES, SEAL, write_json, write_manifest
from bcft.selection.apply import apply_filter, rule_of
from bcft.selection.scoring import Scorer
from bcft.types import Problem, RolloutSettings

FILES = (ROLLOUTS, SCORES, KEPT, "metrics.json", "config.yaml", "problems.jsonl")


def run(recipe: str | PathLike[str] | None = None, **overrides: Any) -> dict[str, Any]:
    """Collect demonstrations with a recipe; return what `metrics.json` holds.

    Raises a `bcft.errors.BcftError` for everything a user can cause.
    """
    return run_config(load("collect", recipe, overrides))


def run_config(config: Config) -> dict[str, Any]:
    """Run a configuration; if its run is finished, print the saved conclusion. Return what `metrics.json` holds."""
    # Dotted paths and data are checked before torch is loaded and before a directory is made.
    rollouts = rollout_settings(config.sampling, config.environment, seed=config.training.seed)
    splits = load_splits(config.data, config.evaluation)
    problems = splits.problems_to_attempt()
    held_out = [d.problem for d in splits.held_out]
    scorer = Scorer.of(config.selection, held_out, environment=config.environment.environment)

    def work(session: Session) -> dict[str, Any]:
        """Roll out, score and select."""
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
    from bcft.policy.loading import load_policy
    from bcft.rollout.sample import draw, roll_out

    # 1. Roll out on training problems only: held-out problems stay held out.
    note = scorer.check(list(problems.values()))
    policy = load_policy(config.model.model_name_or_path, config.model, trainable=False)
    seed, samples = config.training.seed, config.sampling.num_generations
    attempts = draw(problems.values(), 1, seed=seed, prompts=config.rounds.prompts_per_round, samples=samples)
    session.say(f"policy: {config.model.model_name_or_path} on {policy.precision.why}")
    session.say(f"data: {len(attempts) // samples:,} of {len(problems):,} problems, {len(attempts):,} attempts")
    if note:
        session.say(note)
    if session.directory.drifted and rank() == 0:  # trajectories of another recipe
        shutil.rmtree(session.path / "journal", ignore_errors=True)
        for name in (ROLLOUTS, SEAL):
            (session.path / name).unlink(missing_ok=True)
    barrier()  # every process has read the directory before it is written
    session.directory.record([d.problem for d in (*splits.train, *splits.held_out)], splits.digest)
    label = "" if session.quiet else "roll out"
    trajectories = roll_out(policy, attempts, rollouts, directory=session.path, clock=Clock(), label=label)

    # 2. Score and select on one process: a reward function called twice might answer differently.
    metrics: dict[str, Any] = {}
    if rank() == 0:
        scores = scorer.score(trajectories, problems)
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
        metrics["conclusion"] = filtered.conclusion(config.path, session.path)
        write_json(session.path / "metrics.json", metrics)
        files = [session.path / name for name in FILES]
        write_manifest(session.path, files, about={"tokenizer": policy.renderer.fingerprint})
    return dict(broadcast(metrics))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return execute("collect", run_config, argv)


if __name__ == "__main__":
    sys.exit(main())
