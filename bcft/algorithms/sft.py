"""Plain behavior cloning: demonstrations to examples, one SFT run, held-out success before and after."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bcft.algorithms.session import Session
from bcft.config.loader import Config
from bcft.data.examples import ExampleCounts, make_examples
from bcft.data.loading import Splits
from bcft.errors import UsageError
from bcft.evaluation.held_out import measure, samples_of
from bcft.evaluation.results import stored
from bcft.policy.loading import Policy, load_policy, longest_row, save_policy, with_adapter
from bcft.reporting.model_card import model_card
from bcft.reporting.tables import before_and_after, conclusion, print_table
from bcft.rewards.base import Reward
from bcft.runs.distributed import barrier, rank
from bcft.runs.storage import storage, write_json, write_manifest, write_text
from bcft.types import Demonstration, RolloutSettings, TrainingExample

if TYPE_CHECKING:
    from bcft.training.trainer import Fit


def sft(
    config: Config, splits: Splits, session: Session, *, rollouts: RolloutSettings, success: Reward | None
) -> dict[str, Any]:
    """Clone the training demonstrations, resuming from a checkpoint; return what `metrics.json` holds.

    rollouts: how held-out problems are attempted; success: the function that says what is solved, if there is one.
    """
    # 1. Demonstrations to examples: every label is counted before anything is trained.
    policy = load_policy(config.model.model_name_or_path, config.model)
    examples, counts = _examples(config, policy, splits.train)
    test_examples, dev_examples = (_held_out_examples(config, policy, part) for part in (splits.test, splits.dev))
    session.say(f"model: {config.model.model_name_or_path} on {policy.precision.why}")
    session.say(f"data: {splits}")
    session.say(f"rows: {counts}")
    others = [d for d in splits.train if d.sampled is not None and d.tokenizer != policy.renderer.fingerprint]
    if others:
        session.say(f"rows: {len(others):,} were sampled with another tokenizer, and are tokenized from their text")
    base_directory = session.path / "base"
    if session.directory.drifted and rank() == 0:  # an evaluation with another recipe is not comparable
        shutil.rmtree(base_directory, ignore_errors=True)
    barrier()  # every process has read the directory before it is written
    session.directory.record([d.problem for d in splits.held_out], splits.digest)

    # 2. The policy as it is, on problems that are not in training.
    graded = bool(success or config.environment.environment)
    evaluate = partial(
        measure,
        splits=splits,
        settings=rollouts,
        split="test",
        samples=samples_of(config.evaluation, "test", graded=graded),
        success=success,
        examples=test_examples,
        quiet=session.quiet,
    )
    base = stored(base_directory) or evaluate(policy, directory=base_directory)

    # 3. One SFT run, from the newest complete checkpoint if there is one.
    policy, fitted = _train(config, session, policy, examples, dev_examples)
    session.say(
        f"train: {fitted.steps} steps in {fitted.seconds:.0f} s, {fitted.tokens_per_second:,.0f} supervised "
        f"tokens/s, loss {fitted.loss_first:.4f} to {fitted.loss_last:.4f}"
    )

    # 4. The trained policy, and what changed.
    final = evaluate(policy, directory=session.path / "final")
    metrics = {"base": base.summary, "final": final.summary, "train": dataclasses.asdict(fitted)}
    metrics |= conclusion(base, final)
    _save(config, session, policy, metrics, counts)
    if base.summary:
        print_table({"base": base.summary, "final": final.summary}, quiet=session.quiet)
        session.say(before_and_after(base.evaluation, final.evaluation, splits.test))
    following = f"bcft evaluate {config.path or 'RECIPE'} --model_name_or_path {config.training.output_dir}"
    session.say(f"The model is in {session.path}; next: {following}")
    return metrics


def _examples(
    config: Config, policy: Policy, demonstrations: Sequence[Demonstration]
) -> tuple[list[TrainingExample], ExampleCounts]:
    return make_examples(
        demonstrations,
        policy.renderer,
        max_length=longest_row(config.model.model_name_or_path, config.model, config.data.max_length),
        overlength=config.data.overlength,
        train_on=config.data.train_on,
    )


def _held_out_examples(
    config: Config, policy: Policy, demonstrations: Sequence[Demonstration]
) -> list[TrainingExample]:
    """Return examples to take a loss on, of those problems that come with a solution."""
    limit = longest_row(config.model.model_name_or_path, config.model, config.data.max_length)
    return make_examples(
        [d for d in demonstrations if d.answered],
        policy.renderer,
        max_length=limit,
        train_on=config.data.train_on,
        may_be_empty=True,
    )[0]


def _train(
    config: Config,
    session: Session,
    policy: Policy,
    examples: Sequence[TrainingExample],
    held_out: Sequence[TrainingExample],
) -> tuple[Policy, "Fit"]:
    """Fit the examples; return the policy with the trained weights, and what training did."""
    # trl takes longer to import than everything before: the evaluation of the base does not wait for it.
    from bcft.training import trainer  # noqa: PLC0415 - see above

    settings = config.training
    evaluates = settings.eval_strategy != "no"
    if evaluates and not held_out:
        raise UsageError("eval_strategy: there are no dev rows to take a loss on: raise eval_dev_problems, or set no")
    output = Path(settings.output_dir)
    arguments = trainer.training_arguments(
        settings,
        output_dir=output,
        autocast=policy.precision.autocast,
        use_cpu=policy.precision.device == "cpu",
        disable_tqdm=session.quiet,
    )
    bc_trainer = trainer.BCTrainer(
        with_adapter(policy, config.model, seed=settings.seed).model,
        arguments,
        examples=examples,
        held_out=held_out if evaluates else [],
        tokenizer=policy.renderer.tokenizer,
    )
    fitted = trainer.fit(bc_trainer, examples, resume=trainer.newest_checkpoint(output))
    return dataclasses.replace(policy, model=bc_trainer.accelerator.unwrap_model(bc_trainer.model)), fitted


def _save(config: Config, session: Session, policy: Policy, metrics: Mapping[str, Any], counts: ExampleCounts) -> None:
    """Write model, tokenizer, card and metrics; the manifest that commits them comes last."""
    if rank() > 0:
        return
    output = session.path
    with storage(output):
        files = save_policy(policy, output)
    card = model_card(
        metrics,
        command=config.command,
        base=config.model.model_name_or_path,
        dataset=config.data.dataset_name,
        split=config.data.dataset_train_split,
        data=str(counts),
        directory=output,
        adapter=policy.adapter,
        recipe={key: config.values[key] for key in sorted(config.given)},
    )
    write_json(output / "metrics.json", metrics)
    write_text(output / "README.md", card)
    write_manifest(output, [*files, output / "metrics.json", output / "config.yaml"])
