"""What evaluation costs, counted in attempts before the run starts; without a framework, for dry runs too.

Left to itself (`auto`), evaluation takes at most a third of all attempts of a run: dev in some of the rounds, test
twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bcft.config.schema import EvaluationSettings, RoundSettings
from bcft.runs.history import evaluation_interval, is_due
from bcft.runs.progress import duration

HARDER_SAMPLES = 4
"""The most sampled attempts at each harder problem."""
TEST_SAMPLES = (16, 8, 4, 2)
"""Sampled attempts at each test problem that `auto` chooses from; the first where there are no rounds."""
FEWEST = 4
"""At least this many dev evaluations remain when `auto` spaces them out to give test more."""


@dataclass(frozen=True)
class Problems:
    """How many held-out problems there are, and whether success or a reward can be measured on them."""

    dev: int
    test: int
    harder: int
    graded: bool


@dataclass(frozen=True)
class Budget:
    """The attempts of a run of `filtered`."""

    rounds: RoundSettings
    """Without `auto`."""
    evaluation: EvaluationSettings
    """Without `auto`."""
    dev: int
    """Attempts of one evaluation on dev."""
    test: int
    """Attempts of one evaluation on test, harder problems included."""
    times: int
    """Evaluations on dev if every round trains, the one before training included."""
    rolled_out: int
    """Attempts of all rounds."""
    scales: int = 0
    """Evaluations on dev of the chosen round at other scales, at the end."""

    @classmethod
    def of(
        cls,
        rounds: RoundSettings,
        evaluation: EvaluationSettings,
        *,
        dev: int,
        test: int,
        harder: int,
        played: int,
        graded: bool,
    ) -> "Budget":
        """Return the budget with every `auto` resolved.

        dev, test, harder: problems held out; played: attempts of a round; graded: as in `samples_of`.
        """
        problems = Problems(dev, test, harder, graded)
        plans = [
            _count(
                replace(rounds, eval_every=between), replace(evaluation, eval_test_samples=samples), problems, played
            )
            for samples, between in _choices(rounds, evaluation, problems, played)
        ]
        # Where even the last choice is dearer, the recipe's own numbers or a short run leave no other.
        return next((plan for plan in plans if 3 * plan.evaluated <= plan.evaluated + plan.rolled_out), plans[-1])

    @property
    def evaluated(self) -> int:
        """Attempts of all evaluations."""
        return self.opening + (self.times - 1) * self.dev + self.ending

    @property
    def share(self) -> float:
        """The share of evaluations in all attempts."""
        return self.evaluated / (self.evaluated + self.rolled_out)

    def is_due(self, number: int) -> bool:
        """Return whether a round is one to be evaluated on dev."""
        return is_due(self.rounds, number, evaluated=self.dev, played=self.rolled_out // self.rounds.num_rounds)

    @property
    def opening(self) -> int:
        """Attempts of the evaluation of the base, before the first round."""
        return self.test + self.dev

    @property
    def ending(self) -> int:
        """Attempts of the evaluations after the last round."""
        return self.test + self.scales * self.dev

    @property
    def plan(self) -> str:
        """When evaluation comes, in words."""
        if not self.evaluated:
            return "none"
        rounds, due = self.rounds.num_rounds, self.times - 1
        parts = [f"{self.opening:,} attempts at the start"]
        if self.dev and due:
            after = (
                f"{due} of {rounds} rounds" if due < rounds else f"each of {rounds} rounds" if due > 1 else "the round"
            )
            parts.append(f"{self.dev:,} in {after}")
        parts += [f"{self.ending:,} at the end"] if self.ending else []
        return f"{', '.join(parts)} ({100 * self.share:.0f} % of all attempts)"

    def expected(self, seconds: float, *, attempts: int) -> str:
        """Return how long all evaluation will take, in words; seconds: what the sanity check's attempts took."""
        return f"about {duration(self.evaluated * seconds / attempts)} in all at the rate of the sanity check"

    def time(self, seconds: float) -> str:
        """Return how long all evaluation takes, in words; seconds: what that of the base took."""
        whole = duration(seconds * self.evaluated / self.opening)
        return f"about {whole} in all, of which {duration(seconds)} have passed"

    def __str__(self) -> str:
        return (
            f"{self.evaluated:,} attempts beside {self.rolled_out:,} of rounds: {100 * self.share:.0f} % of all "
            f"attempts"
        )


def samples_of(evaluation: EvaluationSettings, split: str, *, graded: bool) -> int:
    """Return how many sampled attempts each problem of `dev` or `test` gets.

    graded: whether success, a return or a reward can be measured; without, samples show nothing: 0.
    """
    if not graded:
        return 0
    if split == "dev":
        return evaluation.eval_dev_samples
    return TEST_SAMPLES[0] if evaluation.eval_test_samples == "auto" else int(evaluation.eval_test_samples)


def test_attempts(test: int, harder: int, samples: int) -> int:
    """Return the attempts of one evaluation on test. test, harder: problems; samples: of each test problem."""
    return test * (1 + samples) + (harder * (1 + min(samples, HARDER_SAMPLES)) if test else 0)


def _choices(
    rounds: RoundSettings, evaluation: EvaluationSettings, problems: Problems, played: int
) -> Iterator[tuple[int, int]]:
    """Yield the samples of a test problem and the rounds between evaluations on dev, what is wanted most first."""
    dev = problems.dev * (1 + samples_of(evaluation, "dev", graded=problems.graded))
    every = evaluation_interval(rounds, evaluated=dev, played=played)
    if evaluation.eval_test_samples != "auto":
        yield int(evaluation.eval_test_samples), every
        return
    longest = every if rounds.eval_every != "auto" else max(every, rounds.num_rounds // FEWEST)
    for samples in TEST_SAMPLES:
        for between in range(every, longest + 1):
            yield samples, between


def _count(rounds: RoundSettings, evaluation: EvaluationSettings, problems: Problems, played: int) -> Budget:
    """Return the budget of settings without `auto`."""
    samples = samples_of(evaluation, "test", graded=problems.graded)
    dev = problems.dev * (1 + samples_of(evaluation, "dev", graded=problems.graded))
    trained = range(rounds.warmup_rounds + 1, rounds.num_rounds + 1)
    due = sum(is_due(rounds, number, evaluated=dev, played=played) for number in trained)
    return Budget(
        rounds=rounds,
        evaluation=evaluation,
        dev=dev,
        test=test_attempts(problems.test, problems.harder, samples),
        times=1 + due,
        rolled_out=rounds.num_rounds * played,
        scales=sum(scale != 1 for scale in rounds.scales),
    )
