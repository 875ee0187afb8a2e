"""Laws of the filter, among them a second implementation by brute force."""

import random
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from itertools import product
from typing import Any

import numpy as np
from helpers.candidates import candidate, kept_of, of_rewards
from hypothesis import given, settings
from hypothesis import strategies as st

from bcft.selection.filter import REASONS, Candidate, Rule, select

LAW = settings(max_examples=40, deadline=None)
FINITE = {"allow_nan": False, "allow_infinity": False}
LEVELS = [[0.0, 1.0, 0.5, 0.3, 0.1 + 0.2, -1e-12], [0.0, 1.0] * 3, [0.5] * 6]
SUCCESSES = [["yes", "no", "no"], ["unknown"] * 3, ["yes", "no", "unknown"]]
STATUSES = ["done"] * 4 + ["truncated", "errored"]
KINDS = list(product(STATUSES, [True] * 4 + [False], range(6), range(3), "pqr", "abcd", range(3)))
KIND = st.integers(0, len(KINDS) - 1).map(KINDS.__getitem__)
"""Status, whether graded, which level and success, problem, text, round."""


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    """Few problems, few texts, many ties, everything that can go wrong: here the rules interact."""
    levels, successes = draw(st.sampled_from(LEVELS)), draw(st.sampled_from(SUCCESSES))
    kinds = draw(st.lists(KIND, min_size=draw(st.sampled_from([0, 8, 16])), max_size=20))
    made = []
    for i, (status, has_grade, level, success, problem, text, number) in enumerate(kinds):
        graded = has_grade and status != "errored"
        reward = levels[level] if graded else 0.0
        identity = f"{number}-{problem}-{i}"
        made.append(Candidate(identity, problem, reward, graded, successes[success], status, text, number, i % 4))
    return made


@st.composite
def rules(draw: st.DrawFn, **fixed: Any) -> Rule:
    values = {
        "keep_quantile": draw(st.sampled_from([0.9, 0.5, 0.0, 0.25, 0.99])),
        "min_reward": draw(st.sampled_from([None, None, 0.0, 0.3, 1.0])),
        "require_success": draw(st.sampled_from(["auto", "auto", "true", "false"])),
        "pass_rate": draw(st.sampled_from([None, None, (0.0, 0.5), (0.4, 1.0)])),
        "max_per_problem": draw(st.sampled_from([None, 1, 2])),
        "select": draw(st.sampled_from(["reward", "reward", "shortest"])),
        "ties": draw(st.sampled_from(["include", "sample"])),
        "control": "none",
        "seed": draw(st.integers(0, 3)),
        "round": 3,
    }
    if values["require_success"] == "false":
        values["select"] = "reward"
    return Rule(**(values | fixed))


def draw_of(rule: Rule, purpose: str, identity: str) -> str:
    return sha256(f"{rule.seed}\x1f{rule.round}\x1f{purpose}\x1f{identity}".encode()).hexdigest()


def brute_force(scope: list[Candidate], rule: Rule) -> dict[str, str]:
    """Reject by one rule after the other, comparing each trajectory with each: slow, and hard to get wrong."""
    decisions: dict[str, str] = {}

    def reject(reason: str, rejected: list[Candidate]) -> None:
        decisions.update({c.id: reason for c in rejected})

    def left() -> list[Candidate]:
        return [c for c in scope if c.id not in decisions]

    def value(c: Candidate) -> float:
        return round(c.reward, 9)

    graded = [c for c in scope if c.graded]
    values = [value(c) for c in graded]
    reject("errored", [c for c in left() if c.status == "errored"])
    reject("ungraded", [c for c in left() if not c.graded])
    reject("truncated", [c for c in left() if c.status == "truncated"])
    cutoff = np.quantile(values, rule.keep_quantile) if values else 0.0
    wanted = {"auto": {"yes", "unknown"}, "true": {"yes"}, "false": {"yes", "no", "unknown"}}[rule.require_success]
    corrected = (
        rule.require_success == "auto" and rule.keep_quantile > 0 and any(c.success == "unknown" for c in left())
    )
    if corrected and min(values) == max(values):
        wanted = {"yes"}
    elif corrected and cutoff == min(values):
        cutoff = min(other for other in values if other > cutoff)
    reject("failed", [c for c in left() if c.success not in wanted])
    if rule.pass_rate is not None:

        def rate(c: Candidate) -> float | None:
            known = [other.success for other in scope if other.problem_id == c.problem_id]
            known = [success for success in known if success != "unknown"]
            return known.count("yes") / len(known) if known else None

        low, high = rule.pass_rate
        reject("pass_rate", [c for c in left() if (share := rate(c)) is not None and not low <= share <= high])
    if rule.min_reward is not None:
        reject("below_min_reward", [c for c in left() if value(c) < rule.min_reward])
    reject("below_cutoff", [c for c in left() if value(c) < cutoff])

    def duplicate_of(c: Candidate, other: Candidate) -> bool:
        same = (c.problem_id, c.digest) == (other.problem_id, other.digest)
        return same and (-value(other), other.round, other.id) < (-value(c), c.round, c.id)

    reject("duplicate", [c for c in left() if any(duplicate_of(c, other) for other in left())])

    def rivals(c: Candidate, purpose: str, *, everywhere: bool) -> int:
        def rank(c: Candidate) -> tuple[int, float, str]:
            by_length = not everywhere and rule.select == "shortest"
            return c.length if by_length else 0, -value(c), draw_of(rule, purpose, c.id)

        others = [other for other in left() if everywhere or other.problem_id == c.problem_id]
        return sum(rank(other) < rank(c) for other in others)

    if rule.max_per_problem is not None or rule.select == "shortest":
        most = rule.max_per_problem or 1
        reject("max_per_problem", [c for c in left() if rivals(c, "cap", everywhere=False) >= most])
    if rule.ties == "sample":
        quota = round((1 - rule.keep_quantile) * len(graded))
        reject("tie_break", [c for c in left() if rivals(c, "ties", everywhere=True) >= quota])
    return decisions | {c.id: "kept" for c in left()}


@settings(LAW, max_examples=150)
@given(candidates(), rules())
def test_each_decision_is_the_first_that_applies(scope: list[Candidate], rule: Rule) -> None:
    assert select(scope, rule).decisions == brute_force(scope, rule)


@LAW
@given(candidates(), rules() | rules(control="random"))
def test_counts_add_up_to_the_candidates(scope: list[Candidate], rule: Rule) -> None:
    selection = select(scope, rule)
    assert set(selection.kept) <= {c.id for c in scope}
    assert tuple(selection.rejected) == REASONS
    assert len(selection.kept) + sum(selection.rejected.values()) == len(scope)
    assert selection.problems_covered == len({c.problem_id for c in kept_of(scope, selection)})
    assert selection.kept_fraction == len(selection.kept) / max(1, sum(c.graded for c in scope))
    assert selection.kept or selection.note, "an empty round must say why"


@LAW
@given(candidates(), rules() | rules(control="random"), st.randoms(use_true_random=False))
def test_the_order_of_the_input_never_matters(scope: list[Candidate], rule: Rule, shuffler: random.Random) -> None:
    selection = select(scope, rule)
    shuffled = scope.copy()
    shuffler.shuffle(shuffled)
    again = select(iter(shuffled), rule)
    assert again == selection
    assert list(again.decisions) == list(selection.decisions), "files are written in this order"


@LAW
@given(candidates(), rules())
def test_the_cutoff_parts_kept_from_below_cutoff(scope: list[Candidate], rule: Rule) -> None:
    selection = select(scope, rule)
    for c in scope:
        if selection.decisions[c.id] == "kept":
            assert c.rounded >= selection.cutoff
        if selection.decisions[c.id] == "below_cutoff":
            assert c.rounded < selection.cutoff


@LAW
@given(st.lists(st.floats(-1e100, 1e100, **FINITE), min_size=1), rules())
def test_rewards_of_any_size_have_a_cutoff_among_them(rewards: list[float], rule: Rule) -> None:
    rounded = [c.rounded for c in of_rewards(rewards)]
    assert min(rounded) <= select(of_rewards(rewards), rule).cutoff <= max(rounded)


@LAW
@given(candidates(), rules() | rules(control="random"))
def test_errored_ungraded_truncated_and_duplicate_trajectories_are_never_kept(
    scope: list[Candidate], rule: Rule
) -> None:
    kept = kept_of(scope, select(scope, rule))
    assert all(c.graded and c.status == "done" for c in kept)
    assert len({(c.problem_id, c.digest) for c in kept}) == len(kept)


@LAW
@given(candidates(), rules(pass_rate=(0.2, 0.8)), st.sampled_from(["none", "random"]))
def test_nothing_is_kept_of_a_problem_that_is_solved_too_rarely_or_too_often(
    scope: list[Candidate], rule: Rule, control: Any
) -> None:
    kept = {c.problem_id for c in kept_of(scope, select(scope, replace(rule, control=control)))}
    for problem in kept:
        known = [c.success for c in scope if c.problem_id == problem and c.success != "unknown"]
        assert not known or 0.2 <= known.count("yes") / len(known) <= 0.8


@LAW
@given(candidates(), rules(select="shortest", require_success="auto", ties="include"))
def test_nothing_that_is_kept_is_longer_than_what_the_limit_rejects(scope: list[Candidate], rule: Rule) -> None:
    """The shortest success of a problem; the limit says how many."""
    decisions = select(scope, rule).decisions
    for problem in "pqr":
        kept = [c for c in scope if c.problem_id == problem and decisions[c.id] == "kept"]
        over = [c for c in scope if c.problem_id == problem and decisions[c.id] == "max_per_problem"]
        assert len(kept) <= (rule.max_per_problem or 1)
        assert not over or max(c.length for c in kept) <= min(c.length for c in over)


@LAW
@given(candidates(), rules(ties="include"))
def test_ties_are_broken_only_where_they_are_sampled(scope: list[Candidate], rule: Rule) -> None:
    assert select(scope, rule).rejected["tie_break"] == 0


@LAW
@given(candidates(), rules(ties="sample"))
def test_sampling_keeps_what_was_requested_or_all_that_survive(scope: list[Candidate], rule: Rule) -> None:
    selection = select(scope, rule)
    requested = round((1 - rule.keep_quantile) * selection.graded)
    survive = len(select(scope, replace(rule, ties="include")).kept)
    assert len(selection.kept) == min(requested, survive)
    losers = [c.rounded for c in scope if selection.decisions[c.id] == "tie_break"]
    assert not losers or max(losers) <= min((c.rounded for c in kept_of(scope, selection)), default=max(losers))


@LAW
@given(candidates(), rules())
def test_the_random_control_matches_the_filter_problem_by_problem(scope: list[Candidate], rule: Rule) -> None:
    filtered, control = select(scope, rule), select(scope, replace(rule, control="random"))
    assert Counter(c.problem_id for c in kept_of(scope, filtered)) == Counter(
        c.problem_id for c in kept_of(scope, control)
    )
    assert control.cutoff == filtered.cutoff
    assert control.note == filtered.note
    assert not any(control.rejected[reason] for reason in ("failed", "below_min_reward", "below_cutoff"))


@LAW
@given(candidates(), rules(control="random"), st.randoms(use_true_random=False))
def test_the_random_control_does_not_look_at_outcomes(
    scope: list[Candidate], rule: Rule, outcomes: random.Random
) -> None:
    """Only the number per problem depends on them: of two draws from a problem, the larger contains the smaller."""
    changed = [
        replace(c, reward=outcomes.choice(LEVELS[0]) * c.graded, success=outcomes.choice(SUCCESSES[2])) for c in scope
    ]
    before, after = select(scope, rule), select(changed, rule)
    for problem in "pqr":
        drawn = [{c.id for c in kept_of(scope, result) if c.problem_id == problem} for result in (before, after)]
        assert drawn[0] <= drawn[1] or drawn[1] <= drawn[0]


@LAW
@given(
    st.lists(
        st.tuples(
            st.floats(-100, 100, **FINITE) | st.sampled_from(LEVELS[0]), st.sampled_from(["yes", "no", "unknown"])
        ),
        min_size=1,
    )
    | st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from(["yes", "no"])), min_size=1)
)
def test_require_success_false_is_the_rule_of_the_origin(trajectories: list[tuple[float, str]]) -> None:
    """`reward >= numpy.quantile(rewards, 0.9)` over all rounds, whatever is known about success."""
    scope = [candidate(reward, success, id=f"{i:05}", round=i % 3) for i, (reward, success) in enumerate(trajectories)]
    rewards = np.array([round(reward, 9) for reward, _ in trajectories])
    expected = {scope[i].id for i in np.flatnonzero(rewards >= np.quantile(rewards, 0.9))}
    assert set(select(scope, Rule(require_success="false")).kept) == expected
