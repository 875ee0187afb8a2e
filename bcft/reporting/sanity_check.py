"""A look at the first attempts of round 1, before hours are spent: can anything be learned from attempts like these?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bcft.config.loader import Recipe
from bcft.reporting.tables import percent
from bcft.rewards.math_answers import extract_answer
from bcft.selection.scoring import Score
from bcft.types import Problem

PROBLEMS = 16
_SAMPLES = 3
_WIDTH = 100


@dataclass(frozen=True)
class Probe:
    """What was seen, in lines for a person, and why nothing can be learned: '' where something can."""

    lines: tuple[str, ...]
    hopeless: str


def probe(recipe: Recipe, scores: Sequence[Score], problems: Mapping[str, Problem], dev: Mapping[str, Any]) -> Probe:
    """Look at scored attempts; dev is the summary of the policy's evaluation before any training."""
    played = [found.trajectory for found in scores]
    answers = [played.turns[-1].action if played.turns else "" for played in (found.trajectory for found in scores)]
    shares = {
        "solved": sum(found.success == "yes" for found in scores),
        "graded": sum(found.graded for found in scores),
        "with a readable answer": sum(bool(extract_answer(answer)) for answer in answers),
        "cut": sum(trajectory.cut for trajectory in played),
    }
    # Where success cannot be told, there are no answers to be read either.
    told = shares if any(found.success != "unknown" for found in scores) else {n: shares[n] for n in ("graded", "cut")}
    if recipe["environment"]:
        told = {name: n for name, n in told.items() if "answer" not in name}
    counted = ", ".join(f"{percent(n / len(scores))} {name}" for name, n in told.items())
    attempted = len({trajectory.problem_id for trajectory in played})
    lines = [f"probe: {len(scores)} attempts at {attempted} problems: {counted}"]
    for found in _different(scores):
        prompt = problems[found.trajectory.problem_id].prompt
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        said = found.trajectory.turns[-1].action if found.trajectory.turns else found.trajectory.error
        lines.append(f"  reward {found.reward:g}  {_short(asked, _WIDTH // 2)} -> {_short(said, _WIDTH)}")
    return Probe(tuple(lines), _hopeless(recipe, scores, shares, dev))


def _hopeless(recipe: Recipe, scores: Sequence[Score], shares: Mapping[str, int], dev: Mapping[str, Any]) -> str:
    """Return why nothing can be learned, with what to change; a few failures are no reason, for rounds are longer."""
    n, alike = len(scores), len({found.reward for found in scores if found.graded}) == 1
    if not shares["graded"]:
        return f"no reward function could grade any of {n} attempts: check reward_funcs and the reference column"
    if shares["cut"] == n:
        limit = recipe["max_completion_length"]
        return f"all of {n} attempts were cut at max_completion_length, {limit} tokens: raise it"
    known = any(found.success != "unknown" for found in scores)
    if not known and alike:
        return f"all of {n} attempts have the reward {scores[0].reward:g}: nothing can tell good from bad"
    if not known or "greedy" not in dev:
        return ""
    levels = {dev["greedy"]["success"], dev.get("sampled", dev["greedy"]).get("pass@1", dev["greedy"]["success"])}
    if not shares["solved"] and levels == {0.0} and (recipe["require_success"] != "false" or alike):
        readable = percent(shares["with a readable answer"] / n)
        return (
            f"none of {n} attempts succeeded, nor any at {dev['n']} dev problems ({readable} have a readable answer): "
            f"begin with a policy that sometimes succeeds (bcft sft on demonstrations) or with easier problems; if "
            f"your rewards do not say what is solved by being 1.0 or more, set success_func: ''"
        )
    if shares["solved"] == n and levels == {1.0} and alike:
        return f"all of {n} attempts succeeded, and all at {dev['n']} dev problems: there is nothing left to learn"
    return ""


def _different(scores: Sequence[Score]) -> list[Score]:
    """Return a few attempts: one of every reward, then of other problems."""
    seen: dict[tuple[float, bool], list[Score]] = {}
    for found in scores:
        seen.setdefault((found.reward, found.graded), []).append(found)
    shown = [group[0] for group in seen.values()]
    for found in scores:
        if found.trajectory.problem_id not in {other.trajectory.problem_id for other in shown}:
            shown.append(found)
    return shown[:_SAMPLES]


def _short(text: str, width: int) -> str:
    line = " ⏎ ".join(text.split("\n"))
    return line if len(line) <= width else line[: width - 3] + "..."
