"""Laws of the intervals, tests and estimators first, then examples that a person can check."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bcft.evaluation.statistics import Paired, majority, mcnemar, mean_interval, paired, pass_at_k, verdict, wilson

LAW = settings(max_examples=60, deadline=None)
RATES = st.lists(st.integers(0, 4).map(lambda right: right / 4), max_size=40)
COUNTS = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@LAW
@given(COUNTS)
def test_wilson_contains_the_estimate_and_stays_in_range(count: tuple[int, int]) -> None:
    successes, n = count
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high, "an interval of no width claims certainty"


@LAW
@given(COUNTS, st.integers(2, 20))
def test_wilson_shrinks_with_n(count: tuple[int, int], times: int) -> None:
    low, high = wilson(*count)
    closer_low, closer_high = wilson(count[0] * times, count[1] * times)
    assert closer_high - closer_low < high - low


@LAW
@given(COUNTS)
def test_wilson_mirrors_when_successes_and_failures_change_places(count: tuple[int, int]) -> None:
    low, high = wilson(*count)
    assert wilson(count[1] - count[0], count[1]) == pytest.approx((1 - high, 1 - low))


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_ends_solve_the_equation_that_defines_them() -> None:
    """A bound p is where |p_hat - p| = z sqrt(p (1 - p) / n)."""
    for bound in wilson(7, 30):
        assert abs(7 / 30 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 30), rel=1e-6)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998 (Statistics in Medicine 17), table I, method 3: the score method without continuity correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (1, 0)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, n)


@LAW
@given(st.integers(0, 25), st.integers(0, 25))
def test_mcnemar_is_the_sum_over_outcomes_as_extreme(only_first: int, only_second: int) -> None:
    n, gap = only_first + only_second, abs(only_first - only_second)
    extreme = sum(math.comb(n, first) for first in range(n + 1) if abs(n - 2 * first) >= gap)
    assert mcnemar(only_first, only_second) == float(Fraction(extreme, 2**n))
    assert mcnemar(only_first, only_second) == mcnemar(only_second, only_first)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(4, 4) == 1.0
    assert mcnemar(0, 5) == 2 / 2**5
    assert mcnemar(1, 5) == 2 * (1 + 6) / 2**6


def test_mcnemar_of_many_problems_neither_overflows_nor_vanishes() -> None:
    assert mcnemar(4900, 5100) == pytest.approx(0.0466, abs=2e-4)  # z = 199 / 100, corrected for continuity
    assert mcnemar(0, 3000) == 0.0  # 2^-2999 is below the smallest float


@LAW
@given(RATES)
def test_mean_interval_contains_the_mean_and_stays_in_range(rates: list[float]) -> None:
    low, high = mean_interval(rates)
    assert 0 <= low <= high <= 1
    if rates:
        assert low - 1e-12 <= sum(rates) / len(rates) <= high + 1e-12


@LAW
@given(RATES.filter(lambda rates: len(rates) > 1))
def test_mean_interval_never_claims_certainty(rates: list[float]) -> None:
    low, high = mean_interval(rates)
    assert low < high


def test_mean_interval_by_hand() -> None:
    # Deviations of +-1/2: variance (4 / 4) / 3 = 1/3, standard error sqrt(1/12) = 0.288675, times 1.959964.
    low, high = mean_interval([0, 1, 0, 1], level=0.5)
    assert (low, high) == pytest.approx((0.5 - 0.674490 * 0.288675, 0.5 + 0.674490 * 0.288675), abs=1e-6)


def test_too_few_or_equal_rates_are_not_certain() -> None:
    assert mean_interval([]) == (0.0, 1.0)
    assert mean_interval([0.5]) == (0.0, 1.0)
    assert mean_interval([0.0] * 20) == wilson(0, 20)
    assert mean_interval([1.0] * 20) == wilson(20, 20)
    assert mean_interval([0.1] * 20) == pytest.approx(wilson(2, 20))


def test_mean_interval_covers_as_often_as_it_says() -> None:
    """128 problems of unequal difficulty, 4 samples each: all 512 as one binomial would cover too rarely."""
    draw = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(1000):
        rates = draw.binomial(4, draw.beta(0.5, 1.0, size=128)) / 4
        low, high = mean_interval(rates.tolist())
        covered += low <= 1 / 3 <= high
        low, high = wilson(int(rates.sum() * 4), 512)
        naive += low <= 1 / 3 <= high
    assert 925 <= covered <= 970, f"covered {covered} of 1000; 950 and four standard deviations are expected"
    assert naive < 850, "the clusters are what this test is about"


@LAW
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40))
def test_paired_is_antisymmetric(counts: list[tuple[int, int]]) -> None:
    first, second = [a / 4 for a, _ in counts], [b / 4 for _, b in counts]
    there, back = paired(first, second), paired(second, first)
    assert (back.delta, back.low, back.high, back.p_value) == (-there.delta, -there.high, -there.low, there.p_value)
    assert -1 <= there.low <= there.delta <= there.high <= 1
    assert 0 <= there.p_value <= 1
    opposite = {"better": "worse", "worse": "better", "not_distinguishable": "not_distinguishable"}
    assert verdict(back) == opposite[verdict(there)]


@LAW
@example([(0, 1)] * 6)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=6, max_size=40))
def test_the_verdict_agrees_with_the_p_value(counts: list[tuple[int, int]]) -> None:
    comparison = paired([a / 4 for a, _ in counts], [b / 4 for _, b in counts])
    if abs(comparison.p_value - 0.05) > 1e-9:
        assert (verdict(comparison) != "not_distinguishable") == (comparison.p_value < 0.05)


def test_paired_by_hand() -> None:
    # Differences 1, 0, 0, 1, 0, 1, 0, 1: mean 1/2, variance 8 (1/4) / 7 = 2/7, standard error sqrt(2/7/8) = 0.188982.
    comparison = paired([0] * 8, [1, 0, 0, 1, 0, 1, 0, 1])
    assert (comparison.delta, comparison.low) == pytest.approx((0.5, 0.5 - 1.959964 * 0.188982), abs=1e-5)
    assert comparison.high == pytest.approx(0.5 + 1.959964 * 0.188982, abs=1e-5)
    assert comparison.p_value == pytest.approx(0.00815, abs=1e-5)  # z = 2.6458
    assert verdict(comparison) == "better"


def test_a_policy_is_not_distinguishable_from_itself() -> None:
    rates = [0.1 * 3, 0.25, 1.0, 0.0, 0.5, 0.75, 0.2]
    for first, second in ((rates, rates), ([0.1 * 3] * 9, [0.3] * 9)):  # 0.1 * 3 is not 0.3 in binary
        comparison = paired(first, second)
        assert (comparison.delta, comparison.p_value) == (0.0, 1.0)
        # As wide as Wilson's interval for an event seen in none of n.
        assert (-comparison.low, comparison.high) == (wilson(0, len(first))[1],) * 2
        assert verdict(comparison) == "not_distinguishable"


def test_few_pairs_prove_nothing() -> None:
    for n in range(6):
        comparison = paired([0.0] * n, [1.0] * n)
        assert (comparison.low, comparison.high, comparison.p_value) == (-1.0, 1.0, 1.0)
        assert verdict(comparison) == "not_distinguishable"
    assert paired([0.0] * 6, [1.0] * 6) == Paired(1.0, 1.0 - wilson(0, 6)[1], 1.0, 2.0**-5)


def test_paired_seldom_calls_two_equal_policies_different() -> None:
    draw = np.random.default_rng(1)
    wrong = 0
    for _ in range(1000):
        difficulty = draw.beta(0.5, 1.0, size=128)
        first, second = draw.binomial(4, difficulty) / 4, draw.binomial(4, difficulty) / 4
        wrong += verdict(paired(first.tolist(), second.tolist())) != "not_distinguishable"
    assert 25 <= wrong <= 80, f"{wrong} of 1000 at 5 %"


def test_pairs_must_belong_together() -> None:
    with pytest.raises(ValueError, match="2 != 1"):
        paired([0.0, 1.0], [0.0])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        mean_interval([0.0, float("nan")])


@LAW
@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_success(case: tuple[int, int, int]) -> None:
    n, c, k = case
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@LAW
@given(st.integers(2, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(2, n))))
def test_pass_at_k_grows_with_k_and_starts_at_the_rate(case: tuple[int, int, int]) -> None:
    n, c, k = case
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)
    assert pass_at_k(n, c, k) >= pass_at_k(n, c, k - 1) - 1e-12
    assert 0 <= pass_at_k(n, c, k) <= 1


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)  # 3 of the 6 pairs hold the one success
    assert pass_at_k(10, 10, 10) == 1.0
    assert pass_at_k(10, 0, 10) == 0.0
    for n, c, k in ((4, 1, 5), (4, 5, 1), (4, 1, 0), (0, 0, 1)):
        with pytest.raises(ValueError, match="pass@k"):
            pass_at_k(n, c, k)


def test_majority_by_hand() -> None:
    assert majority(["7", "8", "8"], [False, True, True], 3)
    assert not majority(["7", "8", "8"], [False, True, True], 2), "a tie goes to the earlier answer"
    assert majority(["", "", "", "7"], [False, False, False, True], 4), "no answer is not an answer"
    assert not majority(["", ""], [False, False], 2)
    assert majority(["7"], [True], 1)
    for answers, correct, k in ((["7"], [True], 2), (["7"], [True], 0), (["7"], [], 1)):
        with pytest.raises(ValueError, match="maj@"):
            majority(answers, correct, k)


@LAW
@given(st.lists(st.sampled_from(["", "1", "2"]), min_size=1, max_size=12))
def test_majority_of_one_is_the_first_answer_and_later_ones_do_not_count(answers: list[str]) -> None:
    correct = [answer == "1" for answer in answers]
    assert majority(answers, correct, 1) == correct[0]
    assert majority(answers[:2], correct[:2], 1) == majority(answers, correct, 1)
