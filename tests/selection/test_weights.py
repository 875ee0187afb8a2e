"""What kept rows weigh: the estimators that the methods promise, by enumeration, and laws of the weights."""

import math
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from helpers.candidates import candidate, kept_of
from hypothesis import given, settings
from hypothesis import strategies as st

from bcft.config.declare import SettingError
from bcft.selection.filter import Candidate, Rule, select
from bcft.selection.weights import of_rows, weigh

LAW = settings(max_examples=40, deadline=None)
MAXRL = Rule(keep_quantile=0.0, require_success="true", row_weight="maxrl")
REWARD = Rule(keep_quantile=0.0, require_success="false", row_weight="reward")

# A policy over eight answers
LOGITS = np.array([0.3, -1.2, 0.8, 0.0, -0.4, 1.1, -2.0, 0.5])
POLICY = np.exp(LOGITS) / np.exp(LOGITS).sum()
SCORES = np.eye(8) - POLICY
"""(8, 8) gradient of each answer's log-probability in the logits."""
RIGHT = np.array([0, 1, 0, 0, 1, 0, 1, 0], float)
CHANCE = float(POLICY @ RIGHT)
GRADIENT = (POLICY * RIGHT) @ SCORES
"""Of the chance to be right."""


def attempts(answers: tuple[int, ...], *, apart: bool = False) -> list[Candidate]:
    """Return attempts at one problem; apart: as if equal answers were said in different words."""
    return [
        Candidate(f"{n}", "p", RIGHT[a], True, "yes" if RIGHT[a] else "no", "done", f"{a} {n * apart}")
        for n, a in enumerate(answers)
    ]


def expected(n: int, rule: Rule, *, apart: bool = False) -> Any:
    """Return the expectation of the weighted gradient, over every outcome of n attempts."""
    total = np.zeros(8)
    for answers in product(range(8), repeat=n):
        scope = attempts(answers, apart=apart)
        weights = weigh(scope, select(scope, rule).decisions, rule)
        chance = math.prod(POLICY[a] for a in answers)
        total += chance * sum(weight * SCORES[answers[int(identity)]] for identity, weight in weights.items())
    return total


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("apart", [False, True])
def test_maxrl_is_in_expectation_the_gradient_of_the_likelihood_truncated_at_order_n(n: int, apart: bool) -> None:
    """Merged duplicates change nothing: the row that stays has their weights."""
    truncated = sum((1 - CHANCE) ** (k - 1) for k in range(1, n + 1)) * GRADIENT
    assert expected(n, MAXRL, apart=apart) == pytest.approx(truncated, abs=1e-12)
    by_difference = [_log_truncated(LOGITS + 1e-6 * e, n) - _log_truncated(LOGITS - 1e-6 * e, n) for e in np.eye(8)]
    assert np.array(by_difference) / 2e-6 == pytest.approx(truncated, abs=1e-6)


def _log_truncated(logits: Any, n: int) -> float:
    """Return the likelihood of being right, of which the Maclaurin series of the logarithm ends at order n."""
    wrong = 1 - np.exp(logits) @ RIGHT / np.exp(logits).sum()
    return -sum(wrong**k / k for k in range(1, n + 1))


def test_the_weight_1_is_in_expectation_the_gradient_of_pass_at_1() -> None:
    none = replace(MAXRL, row_weight="none")
    assert expected(3, none, apart=True) / 3 == pytest.approx(GRADIENT, abs=1e-12)


def test_reward_is_in_expectation_the_gradient_of_the_weighted_log_likelihood() -> None:
    rule = replace(REWARD, weight_temperature=0.5)
    weighted = (POLICY * np.exp(RIGHT / 0.5)) @ SCORES
    ratio = expected(1, replace(rule, weight_temperature=1e9))  # all weigh 1
    assert ratio == pytest.approx(np.zeros(8), abs=1e-8)
    one = [weigh(s := attempts((a,)), select(s, rule).decisions, rule)["0"] for a in range(8)]
    assert one == [1.0] * 8, "alone, any attempt is the best one"
    everything = attempts(tuple(range(8)))
    weights = weigh(everything, select(everything, rule).decisions, rule)
    ours = sum(POLICY[int(i)] * weight * SCORES[int(i)] for i, weight in weights.items())
    assert ours * math.exp(1 / 0.5) == pytest.approx(weighted, abs=1e-12)


# Laws


@st.composite
def scopes(draw: st.DrawFn) -> list[Candidate]:
    """Few problems and texts; everything that can be said about an attempt."""
    kinds = st.tuples(
        st.sampled_from(["yes", "yes", "no", "unknown"]), st.sampled_from(["done", "done", "done", "truncated"]),
        st.sampled_from("pqr"), st.sampled_from("abc"), st.sampled_from([0.0, 0.25, 1.0]),
    )  # fmt: skip
    made = draw(st.lists(kinds, max_size=16))
    return [
        Candidate(f"{n}", problem, reward, True, success, status, text, length=n % 3)
        for n, (success, status, problem, text, reward) in enumerate(made)
    ]


def weights_of(scope: list[Candidate], rule: Rule) -> dict[str, float]:
    return weigh(scope, select(scope, rule).decisions, rule)


def finished(scope: list[Candidate]) -> Counter[str]:
    return Counter(c.problem_id for c in scope if c.success == "yes" and c.status == "done")


@LAW
@given(scopes())
def test_maxrl_gives_every_solved_problem_a_weight_of_1(scope: list[Candidate]) -> None:
    weights = weights_of(scope, MAXRL)
    for problem in finished(scope):
        assert math.fsum(weights[c.id] for c in scope if c.id in weights and c.problem_id == problem) == pytest.approx(
            1
        )
    assert len(weights) == len({(c.problem_id, c.digest) for c in scope if c.success == "yes" and c.status == "done"})


@LAW
@given(scopes(), st.sampled_from([1, 2]), st.sampled_from(["reward", "shortest"]))
def test_caps_and_ties_change_no_weight_of_what_they_leave(scope: list[Candidate], most: int, order: Any) -> None:
    whole, right = weights_of(scope, MAXRL), finished(scope)
    rule = replace(MAXRL, max_per_problem=most, select=order)
    some = weights_of(scope, rule)
    assert {identity: whole[identity] for identity in some} == some
    problem = {c.id: c.problem_id for c in scope}
    for identity, weight in some.items():
        assert weight * right[problem[identity]] == pytest.approx(round(weight * right[problem[identity]]))


@LAW
@given(scopes(), st.sampled_from([MAXRL, REWARD]), st.randoms(use_true_random=False))
def test_every_kept_trajectory_has_a_weight_whatever_the_order(scope: list[Candidate], rule: Rule, random: Any) -> None:
    weights = weights_of(scope, rule)
    assert weights.keys() == {c.id for c in kept_of(scope, select(scope, rule))}
    assert all(weight > 0 for weight in weights.values())
    shuffled = scope.copy()
    random.shuffle(shuffled)
    assert weights_of(shuffled, rule) == weights


@LAW
@given(scopes(), st.sampled_from([-3.0, 0.5, 1e6]))
def test_reward_weights_ignore_what_is_added_to_all_rewards(scope: list[Candidate], more: float) -> None:
    moved = [replace(c, reward=c.reward + more) for c in scope]
    assert weights_of(moved, REWARD) == pytest.approx(weights_of(scope, REWARD))


@LAW
@given(scopes(), st.sampled_from([MAXRL, REWARD]), st.lists(st.integers(0, 3), min_size=16, max_size=16))
def test_scaled_weights_are_1_on_average_over_the_rows(scope: list[Candidate], rule: Rule, sizes: list[int]) -> None:
    rows = {c.id: sizes[n] for n, c in enumerate(scope)}
    empty = {identity for identity, n in rows.items() if not n}
    before = weigh(scope, select(scope, rule).decisions, rule, empty=empty)
    after = of_rows(before, rows)
    carried = [after[identity] for identity in after for _ in range(rows[identity])]
    assert not carried or np.mean(carried) == pytest.approx(1)
    factors = [after[identity] / before[identity] for identity in before]
    assert factors == pytest.approx(factors[:1] * len(factors)), "one factor for all"


def test_equal_weights_are_exactly_1() -> None:
    assert of_rows({"a": 0.25, "b": 0.25}, {"a": 1, "b": 3}) == {"a": 1.0, "b": 1.0}


def test_what_weighs_0_is_as_if_it_were_not_there() -> None:
    rows = {"a": 1, "b": 3, "c": 2}
    assert of_rows({"a": 0.5, "b": 0.0, "c": 2.0}, rows) == of_rows({"a": 0.5, "c": 2.0}, rows)
    assert of_rows({"b": 0.0}, rows) == of_rows({}, {}) == {}


# By hand


def test_one_of_each_kind() -> None:
    """Of p, four are right: two in the same words, one alone, one truncated, which is never trained."""
    scope = [
        candidate(1.0, "yes", id="a", problem_id="p", digest="x"),
        candidate(1.0, "yes", id="b", problem_id="p", digest="x"),
        candidate(1.0, "yes", id="c", problem_id="p"),
        candidate(1.0, "yes", id="d", problem_id="p", status="truncated"),
        candidate(0.0, "no", id="e", problem_id="p"),
        candidate(1.0, "yes", id="f", problem_id="q"),
    ]
    assert weights_of(scope, MAXRL) == {"a": 2 / 3, "c": 1 / 3, "f": 1.0}
    assert weights_of(scope, replace(MAXRL, max_per_problem=1)).keys() < {"a", "c", "f"}
    halved = replace(REWARD, weight_temperature=1 / math.log(2))
    assert weights_of(scope, halved) == pytest.approx({"a": 2.0, "c": 1.0, "e": 0.5, "f": 1.0})
    assert of_rows({"a": 2 / 3, "c": 1 / 3, "f": 1.0}, {"a": 1, "c": 1, "f": 1}) == pytest.approx(
        {"a": 1.0, "c": 0.5, "f": 1.5}
    )


def test_rewards_far_apart_overflow_nothing() -> None:
    scope = [candidate(reward, id=f"{n}") for n, reward in enumerate([-1e100, 0.0, 1e100])]
    assert weights_of(scope, replace(REWARD, weight_temperature=1e-3)) == {"0": 0.0, "1": 0.0, "2": 1.0}
    alone = weigh(scope, select(scope, REWARD).decisions, REWARD, empty={"2"})
    assert alone == {"0": 0.0, "1": 1.0}, "what makes no row is no measure for the others"


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"row_weight": "maxrl"}, "row_weight: maxrl weighs known successes: add `require_success: \"true\"`"),
        ({"row_weight": "maxrl", "require_success": "false"}, "weighs known successes"),
        ({"row_weight": "reward", "control": "random"}, "control: random draws without"),
        ({"select": "shortest", "require_success": "false"}, "right or wrong"),
    ],
)  # fmt: skip
def test_rules_that_do_not_fit_are_refused(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError, match=named.replace("(", r"\(")):
        Rule(**keys)
