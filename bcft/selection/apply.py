"""From scores to rows by a recipe: what a round, `collect` and `refilter` have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcft.config.loader import Recipe
from bcft.data.examples import kept_lines
from bcft.environments.arithmetic import check_steps
from bcft.runs.storage import write_jsonl
from bcft.selection.filter import Rule, Selection, select
from bcft.selection.scoring import Score
from bcft.types import Problem


@dataclass(frozen=True)
class Filtered:
    """What became of the scores in scope, and the rows that the kept ones are."""

    scope: tuple[Score, ...]
    selection: Selection
    lines: tuple[dict[str, Any], ...]
    """Of `kept.jsonl`."""
    silent: int
    """Kept trajectories that say nothing and make no row."""
    wrong_steps: int | None
    """Kept solutions of arithmetic with a wrong step, the only ones that can be checked; None elsewhere."""

    @property
    def metrics(self) -> dict[str, Any]:
        """`selection` of the metrics."""
        chosen = self.selection
        note = chosen.note
        if self.silent:  # labels of a stop token alone would teach to say nothing
            note = f"{note} {self.silent} kept attempts say nothing and are not trained on.".strip()
        found = {
            "requested_fraction": chosen.requested_fraction,
            "cutoff": chosen.cutoff,
            "kept": len(chosen.kept),
            "kept_fraction": chosen.kept_fraction,
            "problems_covered": chosen.problems_covered,
            "rejected": chosen.rejected,
            "note": note,
        }
        return found if self.wrong_steps is None else found | {"kept_with_wrong_step": self.wrong_steps}

    def conclusion(self, recipe: Recipe, directory: Path) -> str:
        """Say in words what was kept, why the rest was not, and what comes next."""
        chosen = self.metrics
        lost = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in chosen["rejected"].items() if n)
        words = (
            f"kept {chosen['kept']:,} of {len(self.scope):,} attempts at {chosen['problems_covered']:,} problems, "
            f"cutoff {chosen['cutoff']:.4g}" + (f" (not kept: {lost})" if lost else "")
        )
        following = f"next: bcft sft {recipe.path or 'RECIPE'} --dataset_name {directory} --output_dir DIR"
        return " ".join(part for part in (f"{words}.", chosen["note"], following if self.lines else "") if part)

    def write(self, place: Path, lines: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Write `scores.jsonl` and `kept.jsonl`; lines: the latter's, where there are others beside the kept ones."""
        fates, cutoff = self.selection.fates, self.selection.cutoff
        write_jsonl(place / "scores.jsonl", (s.to_json(fates[s.trajectory.id], cutoff) for s in self.scope))
        write_jsonl(place / "kept.jsonl", self.lines if lines is None else lines)


def apply_filter(
    recipe: Recipe, scope: Sequence[Score], problems: Mapping[str, Problem], *, number: int, source: str
) -> Filtered:
    """Select from all scores in scope by the recipe's rule, and make the kept trajectories rows.

    number: the round, part of every lot; source: whose attempts they are, `self` or `teacher`.
    """
    selection = select((found.candidate for found in scope), rule_of(recipe, number))
    kept = [found for found in scope if selection.fates[found.trajectory.id] == "kept"]
    lines: list[dict[str, Any]] = []
    silent = 0
    for found in kept:
        problem = problems[found.trajectory.problem_id]
        rows = kept_lines(found.trajectory, problem, reward=found.reward, source=source, train_on=recipe["train_on"])
        silent += not rows
        lines += rows
    wrong = None
    if recipe["dataset_name"].startswith("bcft:arithmetic") and recipe["environment"] is None:
        wrong = sum(
            not check_steps(str(problems[line["problem_id"]].prompt), line["completion"][0]["content"])
            for line in lines
        )
    return Filtered(tuple(scope), selection, tuple(lines), silent, wrong)


def rule_of(recipe: Recipe, number: int) -> Rule:
    """Return the rule of a round."""
    band = recipe["pass_rate"]
    return Rule(
        keep_quantile=recipe["keep_quantile"],
        min_reward=recipe["min_reward"],
        require_success="auto" if recipe["require_success"] == "auto" else recipe["require_success"] == "true",
        pass_rate=None if band is None else (band[0], band[1]),
        max_per_problem=recipe["max_per_problem"],
        ties=recipe["ties"],
        control=recipe["control"],
        seed=recipe["seed"],
        round=number,
    )
