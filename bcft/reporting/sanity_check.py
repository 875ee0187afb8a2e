"""The sanity check before round 1: can the policy learn anything from attempts like its first ones?

It comes before the evaluation of the base, which takes longer. What needs its dev figures is judged after it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bcft.reporting.tables import percent
from bcft.rewards.base import Answers
from bcft.selection.scoring import Score
from bcft.types import Problem

PROBLEMS = 16
_SAMPLES = 3
_WIDTH = 100


@dataclass(frozen=True)
class SanityCheck:
    """The first attempts in a few lines for a person, and whether the run may continue."""

    lines: tuple[str, ...]
    reason: str
    """Why nothing can be learned from these attempts, and what to change; '' where something can."""
    counts: "Counts"

    def reason_on_dev(self, dev: Mapping[str, Any], *, require_success: str) -> str:
        """Return why nothing can be learned if dev agrees with the attempts; '' where something can.

        dev: the summary of the base's evaluation; require_success: as in the recipe.
        """
        counts, n = self.counts, self.counts.attempts
        if not counts.success_known or "greedy" not in dev:
            return ""
        levels = {dev["greedy"]["success"], dev.get("sampled", dev["greedy"]).get("pass@1", dev["greedy"]["success"])}
        if not counts.solved and levels == {0.0} and (require_success != "false" or counts.alike):
            readable = "" if counts.readable is None else f" ({percent(counts.readable / n)} have a readable answer)"
            return (
                f"none of {n} attempts succeeded, nor any at {dev['n']} dev problems{readable}: "
                f"start from a policy that sometimes succeeds (bcft sft on demonstrations) or from easier problems; "
                f"if a reward of 1.0 does not mean success, set success_func: ''"
            )
        if counts.solved == n and levels == {1.0} and counts.alike:
            return f"all {n} attempts succeeded, and all at {dev['n']} dev problems: there is nothing left to learn"
        return ""


@dataclass(frozen=True)
class Counts:
    """Counts over the sampled attempts."""

    attempts: int
    solved: int
    graded: int
    truncated: int
    readable: int | None
    """Attempts with an answer that can be extracted; None where answers mean nothing."""
    success_known: bool
    """Whether the success of at least one attempt is known."""
    alike: bool
    """Whether all graded attempts have the same reward."""

    @property
    def shares(self) -> str:
        """The shares in one line; what is unknown is left out."""
        counts = {"solved": self.solved if self.success_known else None, "graded": self.graded}
        counts |= {"with a readable answer": self.readable, "truncated": self.truncated}
        return ", ".join(f"{percent(n / self.attempts)} {name}" for name, n in counts.items() if n is not None)


def sanity_check(
    scores: Sequence[Score],
    problems: Mapping[str, Problem],
    *,
    answers: Answers | None,
    environment: str | None,
    max_completion_length: int,
) -> SanityCheck:
    """Check scored attempts of the policy as it is before any training.

    answers: what the success function knows of answers; environment, max_completion_length: as in the recipe.
    """
    counts = _count(scores, None if environment else answers)
    problems_attempted = len({score.trajectory.problem_id for score in scores})
    lines = [f"sanity check: {counts.attempts} attempts at {problems_attempted} problems: {counts.shares}"]
    for score in _different(scores):
        prompt = problems[score.trajectory.problem_id].prompt
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        reply = score.trajectory.turns[-1].action if score.trajectory.turns else score.trajectory.error
        lines.append(f"  reward {score.reward:g}  {_short(question, _WIDTH // 2)} -> {_short(reply, _WIDTH)}")
    return SanityCheck(tuple(lines), _reason(scores, counts, max_completion_length), counts)


def _count(scores: Sequence[Score], answers: Answers | None) -> Counts:
    success_known = any(score.success != "unknown" for score in scores)
    last = [score.trajectory.turns[-1].action if score.trajectory.turns else "" for score in scores]
    # Where success is unknown there are no reference answers, and a readable answer says nothing.
    readable = sum(bool(answers.extract(action)) for action in last) if answers and success_known else None
    return Counts(
        attempts=len(scores),
        solved=sum(score.success == "yes" for score in scores),
        graded=sum(score.graded for score in scores),
        truncated=sum(score.trajectory.truncated for score in scores),
        readable=readable,
        success_known=success_known,
        alike=len({score.reward for score in scores if score.graded}) == 1,
    )


def _reason(scores: Sequence[Score], counts: Counts, max_completion_length: int) -> str:
    """Return why nothing can be learned. Only what holds of every attempt is a reason, since rounds are longer."""
    n = counts.attempts
    if not counts.graded:
        return f"none of {n} attempts could be graded: check reward_funcs and the reference column"
    if counts.truncated == n:
        return f"all {n} attempts were truncated at max_completion_length, {max_completion_length} tokens: raise it"
    if not counts.success_known and counts.alike:
        return f"all {n} attempts have the same reward, {scores[0].reward:g}, so no attempt is better than another"
    return ""


def _different(scores: Sequence[Score]) -> list[Score]:
    """Return a few attempts: the first with each reward, then the first at other problems."""
    first: dict[tuple[float, bool], Score] = {}
    for score in scores:
        first.setdefault((score.reward, score.graded), score)
    shown = list(first.values())
    for score in scores:
        if score.trajectory.problem_id not in {other.trajectory.problem_id for other in shown}:
            shown.append(score)
    return shown[:_SAMPLES]


def _short(text: str, width: int) -> str:
    line = " ⏎ ".join(text.split("\n"))
    return line if len(line) <= width else line[: width - 3] + "..."
