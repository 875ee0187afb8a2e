"""From scores to training examples by a rule: the step that a round, `collect` and `refilter` share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bcft.config.schema import RuleSettings, SelectionSettings
from bcft.data.examples import trajectory_examples
from bcft.runs.storage import KEPT, SCORES, write_jsonl
from bcft.selection.filter import Rule, Selection, select
from bcft.selection.scoring import Score
from bcft.types import Problem, Source, TrainingExample


@dataclass(frozen=True)
class Filtered:
    """The decisions about the scores in scope, and the training examples of the kept ones."""

    scope: tuple[Score, ...]
    selection: Selection
    examples: tuple[TrainingExample, ...]
    silent: int
    """Kept trajectories that are empty and make no example."""
    wrong_steps: int | None
    """Kept solutions with a wrong step; None if steps cannot be checked."""

    @property
    def metrics(self) -> dict[str, Any]:
        """The part `selection` of a round's metrics."""
        selection = self.selection
        note = selection.note
        if self.silent:  # labels of a stop token alone would teach the policy to say nothing
            empty = "trajectory is empty and is" if self.silent == 1 else "trajectories are empty and are"
            note = f"{note} {self.silent} kept {empty} not used for training.".strip()
        metrics = {
            "requested_fraction": selection.requested_fraction,
            "cutoff": selection.cutoff,
            "kept": len(selection.kept),
            "kept_fraction": selection.kept_fraction,
            "problems_covered": selection.problems_covered,
            "rejected": selection.rejected,
            "note": note,
        }
        return metrics if self.wrong_steps is None else metrics | {"kept_with_wrong_step": self.wrong_steps}

    def conclusion(self, recipe_path: str, directory: Path) -> str:
        """Say in words how many were kept, why the rest was rejected, and which command comes next."""
        metrics = self.metrics
        rejected = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in metrics["rejected"].items() if n)
        kept = (
            f"kept {metrics['kept']:,} of {len(self.scope):,} attempts at {metrics['problems_covered']:,} problems, "
            f"cutoff {metrics['cutoff']:.4g}" + (f" (rejected: {rejected})" if rejected else "")
        )
        following = f"next: bcft sft {recipe_path or 'RECIPE'} --dataset_name {directory} --output_dir DIR"
        return " ".join(part for part in (f"{kept}.", metrics["note"], following if self.examples else "") if part)

    def write(self, directory: Path, examples: Sequence[TrainingExample] | None = None) -> None:
        """Write `scores.jsonl` and `kept.jsonl`; examples: the rows of the latter, if not only the kept ones."""
        decisions, cutoff = self.selection.decisions, self.selection.cutoff
        scores = (score.to_json(decisions[score.trajectory.id], cutoff) for score in self.scope)
        write_jsonl(directory / SCORES, scores)
        chosen = self.examples if examples is None else examples
        write_jsonl(directory / KEPT, (example.to_json() for example in chosen))


def apply_filter(
    scores: Sequence[Score],
    rule: Rule,
    problems: Mapping[str, Problem],
    *,
    source: Source,
    train_on: str,
    check_steps: Callable[[str, str], bool] | None,
) -> Filtered:
    """Select from all scores in scope by a rule, and make examples of the kept trajectories.

    source: whose attempts they are, `self` or `teacher`; train_on: which actions carry loss, `all_turns` or
    `last_turn`; check_steps: whether every step of a completion is right, from the prompt and the completion as text.
    """
    selection = select((score.candidate for score in scores), rule)
    examples: list[TrainingExample] = []
    silent = 0
    for score in scores:
        if selection.decisions[score.trajectory.id] != "kept":
            continue
        problem = problems[score.trajectory.problem_id]
        made = trajectory_examples(score.trajectory, problem, reward=score.reward, source=source, train_on=train_on)
        silent += not made
        examples += made
    wrong_steps = None
    if check_steps is not None:
        wrong_steps = sum(
            not check_steps(str(problems[example.problem_id].prompt), example.completion[0]["content"])
            for example in examples
        )
    return Filtered(tuple(scores), selection, tuple(examples), silent, wrong_steps)


def rule_of(selection: SelectionSettings, *, seed: int, number: int) -> Rule:
    """Return the rule of a round."""
    settings = {field.name: getattr(selection, field.name) for field in fields(RuleSettings)}
    return Rule(**settings, seed=seed, round=number)
