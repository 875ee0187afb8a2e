"""From scores to weighted training examples by a rule: the step that a round, `collect` and `refilter` share."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import fsum
from pathlib import Path
from typing import Any, TypeVar

from bcft.config.schema import RuleSettings, SelectionSettings
from bcft.data.examples import trajectory_examples
from bcft.runs.storage import KEPT, SCORES, write_jsonl
from bcft.selection.brief import Scored, score_line
from bcft.selection.filter import Rule, Selection, select
from bcft.selection.foreign import TextRow
from bcft.selection.scoring import Score
from bcft.selection.weights import of_rows, weigh
from bcft.types import Problem, Source, TrainingExample

R = TypeVar("R", TrainingExample, TextRow)


@dataclass(frozen=True)
class Filtered:
    """The decisions about the scores in scope, and the training examples of the kept ones."""

    scope: tuple[Scored, ...]
    selection: Selection
    examples: tuple[TrainingExample, ...]
    """Empty where they went to a file."""
    rows: int
    """How many examples there are."""
    silent: int
    """Kept trajectories that are empty and make no example."""
    weightless: int
    """Kept trajectories whose weight is 0 beside the others; they make no example either."""
    wrong_steps: int | None
    """Kept solutions with a wrong step; None if steps cannot be checked."""
    weights: Mapping[str, float]
    """The lowest and the highest weight of a row, and how many equal rows would vary as much; empty if all weigh 1."""

    @property
    def metrics(self) -> dict[str, Any]:
        """The part `selection` of a round's metrics."""
        selection = self.selection
        note = selection.note
        if self.silent:  # labels of a stop token alone would teach the policy to say nothing
            empty = "trajectory is empty and is" if self.silent == 1 else "trajectories are empty and are"
            note = f"{note} {self.silent} kept {empty} not used for training.".strip()
        if self.weightless:
            light = "trajectory weighs" if self.weightless == 1 else "trajectories weigh"
            note = f"{note} {self.weightless} kept {light} 0 beside the others: not used for training.".strip()
        metrics: dict[str, Any] = {
            "requested_fraction": selection.requested_fraction,
            "cutoff": selection.cutoff,
            "kept": len(selection.kept),
            "kept_fraction": selection.kept_fraction,
            "problems_covered": selection.problems_covered,
            "rejected": selection.rejected,
            "note": note,
        }
        if self.weights:
            metrics["weights"] = dict(self.weights)
        return metrics if self.wrong_steps is None else metrics | {"kept_with_wrong_step": self.wrong_steps}

    def conclusion(self, recipe_path: str, directory: Path) -> str:
        """Say in words how many were kept, why the rest was rejected, and which command comes next."""
        metrics = self.metrics
        rejected = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in metrics["rejected"].items() if n)
        kept = (
            f"kept {metrics['kept']:,} of {len(self.scope):,} attempts at {metrics['problems_covered']:,} problems, "
            f"cutoff {metrics['cutoff']:.4g}" + (f" (rejected: {rejected})" if rejected else "")
        )
        weights = ""
        if self.weights:
            low, high, effective = (self.weights[name] for name in ("min", "max", "effective_rows"))
            weights = f"The {self.rows:,} rows weigh {low:.3g} to {high:.3g}, as {effective:,.0f} equal ones would."
        following = f"next: bcft sft {recipe_path or 'RECIPE'} --dataset_name {directory} --output_dir DIR"
        parts = (f"{kept}.", weights, metrics["note"], following if self.rows else "")
        return " ".join(part for part in parts if part)

    def write(self, directory: Path, examples: Sequence[TrainingExample] | None = None) -> None:
        """Write `scores.jsonl` and `kept.jsonl`; examples: the rows of the latter, if not only the kept ones."""
        self.write_scores(directory)
        chosen = self.examples if examples is None else examples
        write_jsonl(directory / KEPT, (example.to_json() for example in chosen))

    def write_scores(self, directory: Path) -> None:
        """Write `scores.jsonl`."""
        decisions, cutoff = self.selection.decisions, self.selection.cutoff
        write_jsonl(directory / SCORES, (score_line(score, decisions[score.id], cutoff) for score in self.scope))


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
    examples: list[TrainingExample] = []

    def rows(number: int) -> list[TrainingExample]:
        score = scores[number]
        problem = problems[score.trajectory.problem_id]
        return trajectory_examples(score.trajectory, problem, reward=score.reward, source=source, train_on=train_on)

    filtered = stream_filter(scores, rule, problems, rows=rows, check_steps=check_steps, keep=examples.extend)
    return replace(filtered, examples=tuple(examples))


def stream_filter(
    scores: Sequence[Scored],
    rule: Rule,
    problems: Mapping[str, Problem],
    *,
    rows: Callable[[int], list[R]],
    check_steps: Callable[[str, str], bool] | None,
    keep: Callable[[Iterable[R]], object],
) -> Filtered:
    """Do as `apply_filter` where the trajectories are not in memory.

    rows: makes the examples of the trajectory with this position in `scores`, and may be called twice; keep: called
    once with all examples, in the order of the scores.
    """
    candidates = [score.candidate for score in scores]
    selection = select(candidates, rule)
    kept = [number for number, score in enumerate(scores) if selection.decisions[score.id] == "kept"]
    weights: dict[str, float] = {}
    if rule.row_weight != "none":
        made = {candidates[number].id: len(rows(number)) for number in kept}
        empty = {identity for identity, n in made.items() if not n}
        weights = of_rows(weigh(candidates, selection.decisions, rule, empty=empty), made)
    count = Counter[str]()
    carried: list[float] = []

    def examples() -> Iterator[R]:
        """Yield the rows to train, counting on the way what becomes of each kept trajectory."""
        for number in kept:
            made = rows(number)
            count["silent"] += not made
            if made and weights and candidates[number].id not in weights:
                count["weightless"] += 1
                continue
            count["rows"] += len(made)
            for example in made:
                if check_steps is not None:
                    prompt, said = str(problems[example.problem_id].prompt), example.completion[0]["content"]
                    count["wrong"] += not check_steps(prompt, said)
                if weights:
                    carried.append(weights[example.id])
                yield replace(example, weight=weights[example.id]) if weights else example

    keep(examples())
    figures = {}
    if carried:  # effective rows: Kish 1965; the weights add up to the rows
        effective = len(carried) ** 2 / fsum(weight**2 for weight in carried)
        figures = {"min": min(carried), "max": max(carried), "effective_rows": effective}
    return Filtered(
        scope=tuple(scores),
        selection=selection,
        examples=(),
        rows=count["rows"],
        silent=count["silent"],
        weightless=count["weightless"],
        wrong_steps=None if check_steps is None else count["wrong"],
        weights=figures,
    )


def rule_of(selection: SelectionSettings, *, seed: int, number: int) -> Rule:
    """Return the rule of a round."""
    settings = {field.name: getattr(selection, field.name) for field in fields(RuleSettings)}
    return Rule(**settings, seed=seed, round=number)
