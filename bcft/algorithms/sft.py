"""Plain behavior cloning: demonstrations to examples, one SFT run, held-out success before and after.

The weights are written and sealed as soon as they are trained. Whatever fails after that, the same command resumes from
them: with the last evaluation, whose attempts are journaled as well.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bcft.algorithms.session import Session
from bcft.config.loader import Config
from bcft.data.checks import check_prompts, without_special_tokens
from bcft.data.counts import ExampleCounts
from bcft.data.examples import held_out_examples, make_examples
from bcft.data.loading import Splits
from bcft.data.weights import scaled
from bcft.errors import UsageError
from bcft.evaluation.budget import samples_of, test_attempts
from bcft.evaluation.held_out import measure
from bcft.evaluation.results import Measured, stored
from bcft.policy.loading import (
    Policy,
    check_disk,
    check_model,
    load_policy,
    longest_row,
    restore,
    save_policy,
    with_adapter,
)
from bcft.reporting.tables import before_and_after, conclusion, print_table
from bcft.reporting.trackers import LOSSES, losses
from bcft.reporting.training_rows import write_rows
from bcft.runs.disk import copies_of_sft
from bcft.runs.distributed import barrier, broadcast, rank
from bcft.runs.drift import remeasures, retrains
from bcft.runs.progress import Progress, duration
from bcft.runs.storage import SEAL, read_json, read_manifest, storage, write_json, write_jsonl, write_manifest
from bcft.selection.scoring import Scorer
from bcft.training.checks import check_training
from bcft.types import RolloutSettings, TrainingExample

if TYPE_CHECKING:
    from bcft.training.trainer import Fit


@dataclass(frozen=True)
class Rows:
    """The examples of a run, and what is known about them."""

    train: Sequence[TrainingExample]
    dev: Sequence[TrainingExample]
    test: Sequence[TrainingExample]
    counts: ExampleCounts
    notes: tuple[str, ...]


def sft(
    config: Config, splits: Splits, session: Session, *, rollouts: RolloutSettings, scorer: Scorer
) -> dict[str, Any]:
    """Clone the training demonstrations, resuming from a checkpoint; return what `metrics.json` holds.

    rollouts: how held-out problems are attempted; scorer: what they are measured by.
    """
    # 1. Demonstrations to examples: every label is counted before weights are loaded.
    with Progress(session.label("making rows")):
        rows = _rows(config, splits, session)
    with Progress(session.label("loading the model")):
        policy = load_policy(config.model.model_name_or_path, config.model)
    session.say(f"model: {config.model.model_name_or_path} on {policy.precision.why}")
    session.say(f"data: {splits}")
    changed = session.directory.changed_functions(scorer.described)
    for note in filter(None, (f"rows: {rows.counts}", *rows.notes, policy.note, changed)):
        session.say(note)
    barrier()  # every process has read the directory before it is written
    if session.directory.drift and rank() == 0:
        _discard_stale(session)
    base_directory, final_directory = session.path / "base", session.path / "final"
    begun = base_directory.exists()
    barrier()  # none reads what is deleted
    held_out = [d.problem for d in splits.held_out]
    session.directory.record(held_out, splits.digest, functions=scorer.described)
    if rank() == 0:
        write_rows(session.path, rows.train, rows.counts, policy.renderer)

    # 2. The policy as it is, on problems that are not in training.
    evaluate = _evaluation(config, splits, session, rows=rows, rollouts=rollouts, scorer=scorer)
    label = session.label("base, test")
    start = time.perf_counter()
    base = stored(base_directory) or evaluate(policy, directory=base_directory, label=label)
    if base.summary and not begun:
        passed = duration(time.perf_counter() - start)
        session.say(f"evaluation: {passed} before training, and about as long after")

    # 3. One SFT run, from the newest complete checkpoint if there is one, or its saved weights if it has ended.
    policy, train = _trained(config, session, policy, rows)

    # 4. The trained policy, and what changed.
    label = session.label("final, test")
    final = stored(final_directory) or evaluate(policy, directory=final_directory, step=train["steps"], label=label)
    metrics = {"base": base.summary, "final": final.summary, "train": train}
    metrics |= conclusion(base, final)
    if rank() == 0:
        _commit(session.path, metrics)
    if base.summary:
        print_table({"base": base.summary, "final": final.summary}, quiet=session.quiet)
        session.say(before_and_after(base.evaluation, final.evaluation, splits.test))
    following = config.evaluating(config.training.output_dir)
    session.say(f"The model is in {session.path}" + (f"; next: {following}" if following else ""))
    return metrics


def _evaluation(
    config: Config, splits: Splits, session: Session, *, rows: Rows, rollouts: RolloutSettings, scorer: Scorer
) -> Callable[..., Measured]:
    """Return the evaluation on test, of a policy and a directory; say how many attempts it takes."""
    samples = samples_of(config.evaluation, "test", graded=scorer.measures != "nothing")
    if attempts := test_attempts(len(splits.test), len(splits.harder), samples):
        session.say(f"evaluation: {attempts:,} attempts before training and as many after")
    return partial(
        measure,
        splits=splits,
        settings=rollouts,
        split="test",
        samples=samples,
        scorer=scorer,
        examples=rows.test,
    )


def _rows(config: Config, splits: Splits, session: Session) -> Rows:
    """Return the examples; refuse what can be refused without weights."""
    check_training(config.training)
    if config.training.eval_strategy != "no" and not any(d.answered for d in splits.dev):
        raise UsageError("eval_strategy: there are no dev rows to take a loss on: raise eval_dev_problems, or set no")
    name, special = config.model.model_name_or_path, config.data.special_tokens
    renderer = check_model(name, config.model).renderer
    problems = (d.problem for d in chain(splits.train, splits.held_out))
    check_prompts(problems, renderer, special_tokens=special)
    demonstrations, note = without_special_tokens(splits.train, renderer, special_tokens=special)
    limit = longest_row(name, config.model, config.data.max_length)
    examples, counts = make_examples(
        demonstrations,
        renderer,
        max_length=limit,
        overlength=config.data.overlength,
        train_on=config.data.train_on,
    )
    weighted, weights_note = scaled(examples, config.training)
    dev, test = (
        held_out_examples(part, renderer, special_tokens=special, max_length=limit, train_on=config.data.train_on)
        for part in (splits.dev, splits.test)
    )
    check_disk(session.path, name, config.model, config.training, copies=copies_of_sft(config.training))
    others = sum(d.sampled is not None and d.tokenizer != renderer.fingerprint for d in splits.train)
    if others:
        others_note = f"rows: {others:,} were sampled with another tokenizer, and are tokenized from their text"
        return Rows(weighted, dev, test, counts, (note, weights_note, others_note))
    return Rows(weighted, dev, test, counts, (note, weights_note))


def _discard_stale(session: Session) -> None:
    """Delete what another recipe left and this one would read: evaluations and weights that a key touches."""
    drift = session.directory.drift
    for name in ("base", "final") if remeasures(drift) else ():
        for file in (session.path / name).glob("evaluation.json*"):
            file.unlink()
    if retrains(drift):
        (session.path / SEAL).unlink(missing_ok=True)


def _trained(config: Config, session: Session, policy: Policy, rows: Rows) -> tuple[Policy, dict[str, Any]]:
    """Return the policy with the trained weights, which are on the disk, and `train` of the metrics."""
    saved = broadcast(read_manifest(session.path, name=SEAL) if rank() == 0 else {})
    if saved:
        policy = with_adapter(policy, config.model, seed=config.training.seed)
        restore(policy, str(session.path), config.model)
        session.say(f"train: the weights in {session.path} are taken as they are")
        return policy, dict(saved["train"])
    if rank() == 0:
        shutil.rmtree(session.path / "final", ignore_errors=True)  # of other weights
    with Progress(session.label("train")) as progress:
        policy, fitted = _train(config, session, policy, rows, progress)
    session.say(
        f"train: {fitted.steps} steps in {fitted.seconds:.0f} s, {fitted.tokens_per_second:,.0f} supervised "
        f"tokens/s, loss {fitted.loss_first:.4f} to {fitted.loss_last:.4f}"
    )
    return policy, dataclasses.asdict(fitted)


def _train(config: Config, session: Session, policy: Policy, rows: Rows, progress: Progress) -> "tuple[Policy, Fit]":
    """Fit the examples, save and seal the weights; return the policy with them, and what training did."""
    progress.turn_to("loading trl")
    # trl takes longer to import than everything before: the evaluation of the base does not wait for it.
    from bcft.training import trainer  # noqa: PLC0415 - see above
    from bcft.training.callbacks import Logs  # noqa: PLC0415 - see above

    settings = config.training
    output = Path(settings.output_dir)
    arguments = trainer.training_arguments(
        settings,
        output_dir=output,
        autocast=policy.precision.autocast,
        use_cpu=policy.precision.device == "cpu",
        disable_tqdm=True,
    )
    bc_trainer = trainer.BCTrainer(
        with_adapter(policy, config.model, seed=settings.seed).model,
        arguments,
        examples=rows.train,
        held_out=rows.dev if settings.eval_strategy != "no" else [],
        tokenizer=policy.renderer.tokenizer,
        reduction=settings.loss_reduction,
    )

    bc_trainer.add_callback(Logs(session.trackers.step))

    def trained() -> Policy:
        return dataclasses.replace(policy, model=bc_trainer.accelerator.unwrap_model(bc_trainer.model))

    def save(fitted: "Fit") -> None:
        progress.turn_to("saving")
        if rank() == 0:
            with storage(session.path):
                files = save_policy(trained(), session.path)
            write_jsonl(session.path / LOSSES, losses(bc_trainer.state.log_history))
            write_manifest(session.path, files, name=SEAL, about={"train": dataclasses.asdict(fitted)})

    resume = trainer.newest_checkpoint(output)
    fitted = trainer.fit(bc_trainer, rows.train, resume=resume, save=save, progress=progress)
    return trained(), fitted


def _commit(output: Path, metrics: Mapping[str, Any]) -> None:
    """Write the metrics; the manifest that commits them with the saved weights comes last."""
    write_json(output / "metrics.json", metrics)
    weights = [output / name for name in read_json(output / SEAL)["files"]]
    write_manifest(output, [*weights, output / "metrics.json", output / "config.yaml"])
    (output / SEAL).unlink()
