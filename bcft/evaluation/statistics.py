"""Intervals, tests and estimators for success rates, as pure functions.

The unit is the problem: samples of one problem are not independent, so a sampled rate enters as one number per
problem. Left out: small-sample (t) quantiles, because evaluations have 64 problems and more, and bootstraps, because
the closed forms need no seed. scipy.stats is not used: it takes 3 s to import. No function returns NaN: with too few
problems the interval is the whole range.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import sqrt
from statistics import NormalDist
from typing import Literal

import numpy as np

FEWEST_PAIRS = 6
"""Below this many pairs no sign-flip test reaches 5 %: its smallest two-sided p is 2^(1-n), and 2^-4 > 0.05."""


def wilson(successes: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a proportion; (0, 1) when n is 0.

    Wilson 1927 (JASA 22), written as in Agresti & Coull 1998 (The American Statistician 52), section 1.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be in 0..n, not {successes} of {n}")
    return _score_interval(successes / n, n, level) if n else (0.0, 1.0)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value that two policies solve equally often; 1 when they never differ.

    Only the discordant problems count: those solved by the first alone and by the second alone are one binomial
    with probability 1/2. McNemar 1947 (Psychometrika 12); exact form: Fagerland et al. 2013
    (https://doi.org/10.1186/1471-2288-13-91), "exact conditional test".
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"counts must not be negative: {only_first}, {only_second}")
    n = only_first + only_second
    tail = ways = 1
    for i in range(min(only_first, only_second)):
        ways = ways * (n - i) // (i + 1)  # C(n, i + 1), an integer again
        tail += ways
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def mean_interval(
    per_problem: Sequence[float], *, level: float = 0.95, scale: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """Return the interval of the mean of per-problem rates, within [0, 1]; of other values within their `scale`.

    The clustered standard error with the problems as clusters is, with equally many samples each, that of the
    problems' rates: Miller 2024 (https://arxiv.org/abs/2411.00640), "Clustered standard errors". With fewer than two
    problems it is (0, 1). Equal rates (all solved, say) have no spread to learn from: then `wilson` with each problem
    as one trial.
    """
    if scale != (0.0, 1.0):
        low, high = mean_interval(_scaled(per_problem, scale), level=level)
        return scale[0] + (scale[1] - scale[0]) * low, scale[0] + (scale[1] - scale[0]) * high
    rates = _rates(per_problem)
    if len(rates) < 2:
        return 0.0, 1.0
    if rates.min() == rates.max():
        return _score_interval(float(rates[0]), len(rates), level)
    mean, half = float(rates.mean()), _quantile(level) * _standard_error(rates)
    return max(0.0, mean - half), min(1.0, mean + half)


@dataclass(frozen=True, slots=True)
class Paired:
    """The difference between two policies on the same problems."""

    delta: float
    """Mean of the second's values minus mean of the first's; of rates in [-1, 1]."""
    low: float
    high: float
    """The 95 % interval of `delta`."""
    p_value: float
    """Two-sided, of `delta` being 0."""


def paired(first: Sequence[float], second: Sequence[float], *, scale: tuple[float, float] = (0.0, 1.0)) -> Paired:
    """Compare two policies by their rates on the same problems, in the same order; by other values within `scale`.

    The standard error is that of the per-problem differences: Miller 2024 (https://arxiv.org/abs/2411.00640), "Paired
    analysis". p is normal, and never below the 2^(1-n) that a sign-flip test of n pairs could reach; with fewer
    than `FEWEST_PAIRS` problems the interval is (-1, 1) and p is 1. Where all differences are equal, the interval is as
    wide as that of an event seen in none of n problems, and p agrees with it: a sample without spread does not prove
    that there is none.
    """
    if len(first) != len(second):
        raise ValueError(f"paired rates must be of the same problems: {len(first)} != {len(second)}")
    if scale != (0.0, 1.0):
        rates, width = paired(_scaled(first, scale), _scaled(second, scale)), scale[1] - scale[0]
        return Paired(width * rates.delta, width * rates.low, width * rates.high, rates.p_value)
    differences = np.round(_rates(second) - _rates(first), 12)  # equal rates from unequal divisions stay equal
    n = len(differences)
    delta = float(differences.mean()) if n else 0.0
    if n < FEWEST_PAIRS:
        return Paired(delta, -1.0, 1.0, 1.0)
    error = _standard_error(differences)
    half = _quantile(0.95) * error if error else wilson(0, n)[1]
    p = 2 * NormalDist().cdf(-abs(delta) * _quantile(0.95) / half)
    return Paired(delta, max(-1.0, delta - half), min(1.0, delta + half), max(p, 2.0 ** (1 - n)))


def verdict(comparison: Paired) -> Literal["better", "worse", "not_distinguishable"]:
    """Return how the second policy compares with the first: it differs only where the interval excludes 0."""
    if comparison.low > 0:
        return "better"
    return "worse" if comparison.high < 0 else "not_distinguishable"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of the chance that at least one of k samples is right, given c right among n.

    1 - C(n-c, k) / C(n, k) as a product, which neither overflows nor cancels: Chen et al. 2021
    (https://arxiv.org/abs/2107.03374), eq. 1 and figure 3.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def majority(answers: Sequence[str], correct: Sequence[bool], k: int) -> bool:
    """Return whether the most common of the first k answers is right (maj@k); ties go to the earlier answer.

    An empty answer wins only where there is no other. Equal strings are the same answer. The winner is right when
    its first sample is. Wang et al. 2022 (https://arxiv.org/abs/2203.11171).
    """
    if len(answers) != len(correct) or not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} needs k answers and as many marks, not {len(answers)} and {len(correct)}")
    votes = Counter(answer for answer in answers[:k] if answer) or Counter(answers[:k])
    winner = max(votes, key=votes.__getitem__)  # counters keep the order of arrival, max returns the first
    return bool(correct[answers.index(winner)])


def _score_interval(rate: float, n: int, level: float) -> tuple[float, float]:
    z2 = _quantile(level) ** 2
    center = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = sqrt(z2 * (rate * (1 - rate) + z2 / (4 * n)) / n) / (1 + z2 / n)
    # The ends are exact where rounding would leave 1e-17 outside or inside the range.
    return 0.0 if rate == 0 else center - half, 1.0 if rate == 1 else center + half


def _quantile(level: float) -> float:
    """Return z such that a standard normal lies within (-z, z) with probability `level`."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    return NormalDist().inv_cdf((1 + level) / 2)


def _scaled(values: Sequence[float], scale: tuple[float, float]) -> list[float]:
    """Map values to [0, 1], the ends of a scale to 0 and 1; all to 0.0 where the ends are equal."""
    low, high = scale
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def _rates(values: Sequence[float]) -> np.ndarray:
    rates = np.asarray(values, dtype=float)
    if rates.ndim != 1 or not np.all((rates >= 0) & (rates <= 1)):
        raise ValueError("rates must be one number in [0, 1] per problem")
    return rates


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / sqrt(len(values))
