"""The results of held-out evaluations: every attempt, the figures that follow from them, and paired comparisons.

Without a framework, so that reports read them from files. `bcft.evaluation.held_out` makes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bcft.evaluation.metrics import revision
from bcft.evaluation.statistics import Paired, majority, mcnemar, mean_interval, paired, pass_at_k, verdict, wilson
from bcft.rewards.base import Answers
from bcft.runs.history import AVERAGES
from bcft.runs.storage import read_json, read_jsonl


@dataclass(frozen=True)
class Evaluation:
    """Every attempt of an evaluation, one mapping each, and the figures that follow from them.

    attempts: `problem_id, sample` (-1: greedy)`, prompt, completion, answer, success: yes|no|unknown, stop, tokens`;
    of an environment also `graded, return, turns, first: yes|no|unknown` (success after the first turn)`, messages`;
    where the reward takes the place of success also `graded, reward`; in an environment `return` is then the reward of
    environment and functions.
    """

    attempts: tuple[Mapping[str, Any], ...]

    @cached_property
    def problems(self) -> dict[str, list[Mapping[str, Any]]]:
        """The attempts of each problem, greedy first, then by sample."""
        problems: dict[str, list[Mapping[str, Any]]] = {}
        for attempt in sorted(self.attempts, key=lambda a: (a["problem_id"], a["sample"])):
            problems.setdefault(attempt["problem_id"], []).append(attempt)
        return problems

    @cached_property
    def greedy(self) -> dict[str, bool]:
        """Whether the greedy attempt solved each problem."""
        return {key: attempts[0]["success"] == "yes" for key, attempts in self.problems.items()}

    @cached_property
    def sampled(self) -> dict[str, list[bool]]:
        """Whether each sampled attempt solved its problem."""
        return {key: [a["success"] == "yes" for a in attempts[1:]] for key, attempts in self.problems.items()}

    @property
    def rates(self) -> list[float]:
        """The share of sampled attempts that solved each problem."""
        return [sum(solved) / len(solved) for solved in self.sampled.values() if solved]

    @cached_property
    def average(self) -> str:
        """What policies are compared by in place of success: `return`, `reward`, or '' for success."""
        keys = {key for attempt in self.attempts if attempt.get("graded") for key in attempt}
        return next((part for part in AVERAGES if part in keys), "")

    @cached_property
    def averages(self) -> dict[str, float]:
        """The mean return or reward of each problem's sampled attempts, or of its greedy one where there are none.

        Empty where neither is measured.
        """
        averages = {}
        for key, attempts in self.problems.items():
            given = [a[self.average] for a in attempts[1:] or attempts if a.get("graded")]
            if given:
                averages[key] = sum(given) / len(given)
        return averages

    def summary(self, answers: Answers | None) -> dict[str, Any]:
        """Return `{n, stop_rate, ungraded, greedy, sampled, return, revision}` as the files hold it, intervals at 95 %.

        answers: how the success function reads an answer, by which maj@k counts votes; None: votes go to completions
        with the same text. `greedy` and `sampled` need a known success, `sampled` samples as well. `return` needs an
        environment that gives rewards; `reward`, of the same form without `turns`, is there where rewards take the
        place of success. `revision` needs an environment that reports success after each of exactly two turns; it
        counts the attempts that had both.
        """
        unknown = sum(a["success"] == "unknown" for a in self.attempts)
        graded = sum(bool(a.get("graded")) for a in self.attempts)
        summary: dict[str, Any] = {
            "n": len(self.problems),
            "stop_rate": sum(a["stop"] == "stop_token" for a in self.attempts) / max(len(self.attempts), 1),
            "ungraded": len(self.attempts) - graded if self.average == "reward" else unknown,
        }
        if self.averages:
            summary[self.average] = self._average()
        whole = [a for a in self.attempts if a["success"] != "unknown" and a["stop"] != "context_full"]
        if {a.get("turns", 1) for a in whole} == {2}:
            successes = [(a["first"], a["success"]) for a in whole if a["first"] != "unknown"]
            summary |= {"revision": revision(successes)} if successes else {}
        if unknown == len(self.attempts):
            return summary
        solved = sum(self.greedy.values())
        summary["greedy"] = {"success": solved / summary["n"], "ci95": list(wilson(solved, summary["n"]))}
        samples = min((len(solved) for solved in self.sampled.values()), default=0)
        return summary | ({"sampled": self._sampled(samples, answers)} if samples else {})

    def _average(self) -> dict[str, Any]:
        """Return `return` or `reward` of the summary."""
        name, means = self.average, list(self.averages.values())
        low, high = mean_interval(means, scale=(min(means), max(means)))
        sampled = [a for attempts in self.problems.values() for a in attempts[1:] or attempts]
        greedy = [attempts[0][name] for attempts in self.problems.values() if attempts[0]["graded"]]
        average = {"greedy": sum(greedy) / max(len(greedy), 1), "mean": sum(means) / len(means), "ci95": [low, high]}
        if name == "reward":
            return average
        return average | {"turns": sum(a["turns"] for a in sampled) / len(sampled)}

    def _sampled(self, samples: int, answers: Answers | None) -> dict[str, Any]:
        """Return `sampled` of the summary, with at least `samples` of every problem."""
        n, k = len(self.problems), max(samples // 2, 1)
        votes = [
            majority([_vote(a["completion"], answers) for a in self.problems[key][1:]], solved, k)
            for key, solved in self.sampled.items()
        ]
        low, high = mean_interval(self.rates)
        return {
            "n": samples,
            "k": k,
            "pass@1": sum(self.rates) / n,
            "ci95": [low, high],
            "pass@k": sum(pass_at_k(len(solved), sum(solved), k) for solved in self.sampled.values()) / n,
            "maj@k": sum(votes) / n,
        }


def _vote(completion: str, answers: Answers | None) -> str:
    """Return the string that completions with the same answer have in common."""
    return completion.strip() if answers is None else answers.key(answers.extract(completion))


@dataclass(frozen=True)
class Measured:
    """An evaluation and its summary, with harder problems and held-out loss; both empty without problems."""

    evaluation: Evaluation
    summary: Mapping[str, Any]

    @property
    def samples(self) -> int:
        """The sampled attempts at each problem."""
        return min((len(attempts) - 1 for attempts in self.evaluation.problems.values()), default=0)


def stored(directory: Path) -> Measured | None:
    """Return the result that `measure` wrote into a directory; None if it was interrupted."""
    if not (directory / "evaluation.json").is_file():
        return None
    attempts = tuple(read_jsonl(directory / "evaluation.jsonl"))
    return Measured(Evaluation(attempts), read_json(directory / "evaluation.json"))


def compare(base: Evaluation, other: Evaluation) -> dict[str, Any]:
    """Return `{delta, ci95, p_value, greedy_p_value, conclusion}` of other against base, problem by problem.

    `delta` is the paired difference of sampled pass@1, or of greedy success without samples. The conclusion follows
    from it, or from the difference of mean returns where an environment gives rewards; `return_delta` and `return_ci95`
    hold the latter. With samples of both there are `pass@k_delta` and `pass@k_ci95` too: a policy that narrows loses
    there first. Where rewards take the place of success, it is `{reward_delta, reward_ci95, p_value, conclusion}`.
    """
    average = base.average if base.average == other.average else ""
    both = [key for key in base.averages if key in other.averages] if average else []
    averaged = None
    if both:
        old, new = ([evaluation.averages[key] for key in both] for evaluation in (base, other))
        averaged = paired(old, new, scale=(min(*old, *new), max(*old, *new)))
    raised = {f"{average}_delta": averaged.delta, f"{average}_ci95": [averaged.low, averaged.high]} if averaged else {}
    if averaged and average == "reward":
        return {**raised, "p_value": averaged.p_value, "conclusion": verdict(averaged)}
    greedy = [(base.greedy[key], other.greedy[key]) for key in base.greedy]
    before, after = base.rates, other.rates
    if not before:
        before, after = [float(a) for a, _ in greedy], [float(b) for _, b in greedy]
    difference = paired(before, after)
    wide = _paired_pass_at_k(base, other)
    return {
        "delta": difference.delta,
        "ci95": [difference.low, difference.high],
        "p_value": difference.p_value,
        "greedy_p_value": mcnemar(sum(a and not b for a, b in greedy), sum(b and not a for a, b in greedy)),
        "conclusion": verdict(averaged or difference),
        **raised,
        **({"pass@k_delta": wide.delta, "pass@k_ci95": [wide.low, wide.high]} if wide else {}),
    }


def _paired_pass_at_k(base: Evaluation, other: Evaluation) -> Paired | None:
    """Return the paired difference of pass@k, k half of the fewest samples of any problem; None without samples."""
    counts = [len(solved) for evaluation in (base, other) for solved in evaluation.sampled.values()]
    if not min(counts, default=0):
        return None
    k = max(min(counts) // 2, 1)
    before, after = (
        [pass_at_k(len(evaluation.sampled[key]), sum(evaluation.sampled[key]), k) for key in base.sampled]
        for evaluation in (base, other)
    )
    return paired(before, after)
