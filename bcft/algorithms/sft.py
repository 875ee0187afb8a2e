"""Plain behaviour cloning: `python -m bcft.sft RECIPE`.

Demonstrations to rows, one SFT run with loss on the completion only, and the held-out success before and after.
Run again, the same command goes on where it was stopped; on a finished run it prints the conclusion.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bcft.config.loader import Recipe
from bcft.data.loading import Splits
from bcft.errors import UsageError
from bcft.runs.directory import RunDirectory
from bcft.runs.distributed import barrier, rank
from bcft.runs.storage import storage, write_json, write_manifest, write_text

if TYPE_CHECKING:
    from bcft.data.examples import Census
    from bcft.policy.loading import Policy
    from bcft.training.trainer import Fit
    from bcft.types import Demonstration, Row


def clone_demonstrations(recipe: Recipe, splits: Splits, directory: RunDirectory, console: Console) -> dict[str, Any]:
    # These load torch, which nothing above does.
    from bcft.evaluation.held_out import measure, stored
    from bcft.policy.loading import load_policy
    from bcft.reporting.tables import before_and_after, conclusion, print_table
    from bcft.rollout.sample import turns_of
    from bcft.selection.scoring import success_function

    # 1. Demonstrations to rows, every label counted before anything is trained.
    turns_of(recipe)  # what cannot be made is told before a model is loaded
    success = success_function(recipe, [d.problem for d in splits.held_out])
    policy = load_policy(recipe)
    console.print(f"model: {recipe['model_name_or_path']} on {policy.precision.why}", markup=False)
    rows, census = _rows(recipe, policy, splits.train)
    test_rows, dev_rows = (_held_out_rows(recipe, policy, part) for part in (splits.test, splits.dev))
    console.print(f"data: {splits}", markup=False)
    console.print(f"rows: {census}", markup=False)
    if others := sum(d.sampled is not None and d.tokenizer != policy.renderer.fingerprint for d in splits.train):
        console.print(f"rows: {others:,} were sampled with another tokenizer, and are tokenised from their text")
    barrier()  # every process has seen what the directory held
    directory.record(splits.held_out, splits.digest)

    # 2. The policy as it is, on problems that are not in training.
    measured = partial(measure, recipe, splits, success=success, split="test", rows=test_rows, quiet=console.quiet)
    kept = None if directory.drifted else stored(directory.path / "base")
    base = kept or measured(policy, directory=directory.path / "base")

    # 3. One SFT run, from the newest whole checkpoint if there is one.
    policy, fitted = _train(recipe, policy, rows, dev_rows, quiet=console.quiet)
    console.print(
        f"train: {fitted.steps} steps in {fitted.seconds:.0f} s, {fitted.tokens_per_second:,.0f} supervised "
        f"tokens/s, loss {fitted.loss_first:.4f} to {fitted.loss_last:.4f}"
    )

    # 4. The policy as it has become, and what that means.
    final = measured(policy, directory=directory.path / "final")
    metrics = {"base": base.summary, "final": final.summary, "train": dataclasses.asdict(fitted)}
    metrics |= conclusion(base, final)
    _save(recipe, policy, metrics, census)
    if base.summary:
        print_table({"base": base.summary, "final": final.summary}, console)
        console.print(before_and_after(base.evaluation, final.evaluation, splits.test), markup=False)
    console.print(f"The model is in {directory.path}; next: {_next(recipe)}", markup=False)
    return metrics


def _rows(recipe: Recipe, policy: "Policy", demonstrations: "Sequence[Demonstration]") -> "tuple[list[Row], Census]":
    from bcft.data.examples import make_rows
    from bcft.policy.loading import longest_row

    return make_rows(
        demonstrations,
        policy.renderer,
        max_length=longest_row(recipe),
        overlength=recipe["overlength"],
        train_on=recipe["train_on"],
    )


def _held_out_rows(recipe: Recipe, policy: "Policy", demonstrations: "Sequence[Demonstration]") -> "list[Row]":
    """Return rows to take a loss on, of those problems that come with a solution."""
    from bcft.data.examples import make_rows
    from bcft.policy.loading import longest_row

    answered = [d for d in demonstrations if d.completion.strip()]
    limit = longest_row(recipe)
    return make_rows(answered, policy.renderer, max_length=limit, train_on=recipe["train_on"], may_be_empty=True)[0]


def _train(
    recipe: Recipe, policy: "Policy", rows: "Sequence[Row]", dev_rows: "Sequence[Row]", *, quiet: bool
) -> "tuple[Policy, Fit]":
    """Fit the rows; return the policy with the trained weights, and what training did."""
    # trl takes longer to import than everything before: the first evaluation is not kept waiting for it.
    from bcft.policy.loading import with_adapter
    from bcft.training.trainer import BCTrainer, fit, newest_checkpoint, training_arguments

    evaluates = recipe["eval_strategy"] != "no"
    if evaluates and not dev_rows:
        raise UsageError("eval_strategy: there are no dev rows to take a loss on: raise eval_dev_problems, or set no")
    output = Path(recipe["output_dir"])
    arguments = training_arguments(
        {**recipe.values, "disable_tqdm": quiet},
        output_dir=output,
        autocast=policy.precision.autocast,
        use_cpu=policy.precision.device == "cpu",
    )
    trainer = BCTrainer(
        with_adapter(policy, recipe).model,
        arguments,
        rows=rows,
        held_out=dev_rows if evaluates else [],
        tokenizer=policy.renderer.tokenizer,
    )
    fitted = fit(trainer, rows, resume=newest_checkpoint(output))
    return dataclasses.replace(policy, model=trainer.accelerator.unwrap_model(trainer.model)), fitted


def _save(recipe: Recipe, policy: "Policy", metrics: dict[str, Any], census: "Census") -> None:
    """Write model, tokenizer, card and metrics; the manifest that commits them comes last."""
    from bcft.policy.loading import save_policy
    from bcft.reporting.model_card import model_card

    if rank() > 0:
        return
    output = Path(recipe["output_dir"])
    with storage(output):
        files = save_policy(policy, output)
    write_json(output / "metrics.json", metrics)
    write_text(output / "README.md", model_card(recipe, metrics, str(census), directory=output, adapter=policy.adapter))
    write_manifest(output, [*files, output / "metrics.json", output / "config.yaml"])


def _next(recipe: Recipe) -> str:
    return f"bcft evaluate {recipe.path or 'RECIPE'} --model_name_or_path {recipe['output_dir']}"
