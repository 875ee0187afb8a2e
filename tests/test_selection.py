"""Laws of the filter first, among them a second implementation by brute force; then sets that a person can check."""

import random
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from hashlib import sha256
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcft.selection.filter import REASONS, Candidate, Rule, Selection, select

LAW = settings(max_examples=40, deadline=None)
FINITE = {"allow_nan": False, "allow_infinity": False}
LEVELS = [[0.0, 1.0, 0.5, 0.3, 0.1 + 0.2, -1e-12], [0.0, 1.0] * 3, [0.5] * 6]
SUCCESSES = [["yes", "no", "no"], ["unknown"] * 3, ["yes", "no", "unknown"]]
STATUSES = ["done"] * 4 + ["truncated", "errored"]
KINDS = list(product(STATUSES, [True] * 4 + [False], range(6), range(3), "pqr", "abcd", range(3)))
KIND = st.integers(0, len(KINDS) - 1).map(KINDS.__getitem__)
"""Status, judged, which level and success, problem, text, round."""


def played(reward: float, success: str = "unknown", **others: Any) -> Candidate:
    """Make a trajectory of a problem of its own with nothing wrong, unless told otherwise."""
    identity = others.pop("id", "only")
    fields = {"problem_id": identity, "graded": True, "status": "done", "digest": identity, "round": 1} | others
    return Candidate(id=identity, reward=reward, success=success, **fields)


def of_rewards(rewards: list[float], success: str = "unknown", **others: Any) -> list[Candidate]:
    return [played(reward, success, id=f"{i:05}", **others) for i, reward in enumerate(rewards)]


def binary(wins: int, n: int, *, known: bool) -> list[Candidate]:
    """Make n trajectories with 0/1 rewards; the first are the wins, and success is told or not."""
    won, lost = ("yes", "no") if known else ("unknown", "unknown")
    return [played(float(i < wins), won if i < wins else lost, id=f"{i:05}") for i in range(n)]


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    """Few problems, few texts, many ties, everything that can go wrong: what makes the rules meet."""
    levels, successes = draw(st.sampled_from(LEVELS)), draw(st.sampled_from(SUCCESSES))
    kinds = draw(st.lists(KIND, min_size=draw(st.sampled_from([0, 8, 16])), max_size=20))
    made = []
    for i, (status, judged, level, success, problem, text, number) in enumerate(kinds):
        graded = judged and status != "errored"
        reward = levels[level] if graded else 0.0
        identity = f"{number}-{problem}-{i}"
        made.append(Candidate(identity, problem, reward, graded, successes[success], status, text, number))
    return made


@st.composite
def rules(draw: st.DrawFn, **fixed: Any) -> Rule:
    values = {
        "keep_quantile": draw(st.sampled_from([0.9, 0.5, 0.0, 0.25, 0.99])),
        "min_reward": draw(st.sampled_from([None, None, 0.0, 0.3, 1.0])),
        "require_success": draw(st.sampled_from(["auto", "auto", True, False])),
        "pass_rate": draw(st.sampled_from([None, None, (0.0, 0.5), (0.4, 1.0)])),
        "max_per_problem": draw(st.sampled_from([None, 1, 2])),
        "ties": draw(st.sampled_from(["include", "sample"])),
        "control": "none",
        "seed": draw(st.integers(0, 3)),
        "round": 3,
    }
    return Rule(**(values | fixed))


def lot(rule: Rule, purpose: str, identity: str) -> str:
    return sha256(f"{rule.seed}\x1f{rule.round}\x1f{purpose}\x1f{identity}".encode()).hexdigest()


def brute_force(scope: list[Candidate], rule: Rule) -> dict[str, str]:
    """Strike out by one rule after the other, comparing each trajectory with each: slow, and hard to get wrong."""
    fates: dict[str, str] = {}

    def strike(reason: str, struck: list[Candidate]) -> None:
        fates.update({one.id: reason for one in struck})

    def left() -> list[Candidate]:
        return [one for one in scope if one.id not in fates]

    def value(one: Candidate) -> float:
        return round(one.reward, 9)

    graded = [one for one in scope if one.graded]
    values = [value(one) for one in graded]
    strike("errored", [one for one in left() if one.status == "errored"])
    strike("ungraded", [one for one in left() if not one.graded])
    strike("truncated", [one for one in left() if one.status == "truncated"])
    cutoff = np.quantile(values, rule.keep_quantile) if values else 0.0
    wanted = {"auto": {"yes", "unknown"}, True: {"yes"}, False: {"yes", "no", "unknown"}}[rule.require_success]
    guarded = rule.require_success == "auto" and rule.keep_quantile > 0 and any(o.success == "unknown" for o in left())
    if guarded and min(values) == max(values):
        wanted = {"yes"}
    elif guarded and cutoff == min(values):
        cutoff = min(other for other in values if other > cutoff)
    strike("failed", [one for one in left() if one.success not in wanted])
    if rule.pass_rate is not None:

        def rate(one: Candidate) -> float | None:
            known = [other.success for other in scope if other.problem_id == one.problem_id]
            known = [success for success in known if success != "unknown"]
            return known.count("yes") / len(known) if known else None

        low, high = rule.pass_rate
        strike("outside_band", [one for one in left() if (found := rate(one)) is not None and not low <= found <= high])
    if rule.min_reward is not None:
        strike("below_floor", [one for one in left() if value(one) < rule.min_reward])
    strike("below_cutoff", [one for one in left() if value(one) < cutoff])

    def older_twin(one: Candidate, other: Candidate) -> bool:
        same = (one.problem_id, one.digest) == (other.problem_id, other.digest)
        return same and (-value(other), other.round, other.id) < (-value(one), one.round, one.id)

    strike("duplicate", [one for one in left() if any(older_twin(one, other) for other in left())])

    def rivals(one: Candidate, purpose: str, *, everywhere: bool) -> int:
        mine = (-value(one), lot(rule, purpose, one.id))
        others = [other for other in left() if everywhere or other.problem_id == one.problem_id]
        return sum((-value(other), lot(rule, purpose, other.id)) < mine for other in others)

    if rule.max_per_problem is not None:
        cap = rule.max_per_problem
        strike("over_cap", [one for one in left() if rivals(one, "cap", everywhere=False) >= cap])
    if rule.ties == "sample":
        quota = round((1 - rule.keep_quantile) * len(graded))
        strike("tie_lost", [one for one in left() if rivals(one, "ties", everywhere=True) >= quota])
    return fates | {one.id: "kept" for one in left()}


def kept_of(scope: list[Candidate], selection: Selection) -> list[Candidate]:
    return [one for one in scope if selection.fates[one.id] == "kept"]


# Laws


@settings(LAW, max_examples=150)
@given(candidates(), rules())
def test_each_fate_is_the_first_that_applies(scope: list[Candidate], rule: Rule) -> None:
    assert select(scope, rule).fates == brute_force(scope, rule)


@LAW
@given(candidates(), rules() | rules(control="random"))
def test_counts_add_up_to_the_candidates(scope: list[Candidate], rule: Rule) -> None:
    selection = select(scope, rule)
    assert set(selection.kept) <= {one.id for one in scope}
    assert tuple(selection.rejected) == REASONS
    assert len(selection.kept) + sum(selection.rejected.values()) == len(scope)
    assert selection.problems_covered == len({one.problem_id for one in kept_of(scope, selection)})
    assert selection.kept_fraction == len(selection.kept) / max(1, sum(one.graded for one in scope))
    assert selection.kept or selection.note, "an empty round must say why"


@LAW
@given(candidates(), rules() | rules(control="random"), st.randoms(use_true_random=False))
def test_the_order_of_the_input_never_matters(scope: list[Candidate], rule: Rule, shuffler: random.Random) -> None:
    selection = select(scope, rule)
    shuffled = scope.copy()
    shuffler.shuffle(shuffled)
    again = select(iter(shuffled), rule)
    assert again == selection
    assert list(again.fates) == list(selection.fates), "files are written in this order"


@LAW
@given(candidates(), rules())
def test_the_cutoff_parts_kept_from_below_cutoff(scope: list[Candidate], rule: Rule) -> None:
    selection = select(scope, rule)
    for one in scope:
        if selection.fates[one.id] == "kept":
            assert one.rounded >= selection.cutoff
        if selection.fates[one.id] == "below_cutoff":
            assert one.rounded < selection.cutoff


@LAW
@given(st.lists(st.floats(-1e100, 1e100, **FINITE), min_size=1), rules())
def test_rewards_of_any_size_have_a_cutoff_among_them(rewards: list[float], rule: Rule) -> None:
    rounded = [one.rounded for one in of_rewards(rewards)]
    assert min(rounded) <= select(of_rewards(rewards), rule).cutoff <= max(rounded)


@LAW
@given(candidates(), rules(require_success="auto"))
def test_no_known_failure_is_ever_kept(scope: list[Candidate], rule: Rule) -> None:
    assert all(one.success != "no" for one in kept_of(scope, select(scope, rule)))


@LAW
@given(candidates(), rules(require_success=True))
def test_required_success_must_be_known(scope: list[Candidate], rule: Rule) -> None:
    assert all(one.success == "yes" for one in kept_of(scope, select(scope, rule)))


@LAW
@given(candidates(), rules() | rules(control="random"))
def test_what_is_broken_unjudged_cut_or_a_copy_is_never_kept(scope: list[Candidate], rule: Rule) -> None:
    kept = kept_of(scope, select(scope, rule))
    assert all(one.graded and one.status == "done" for one in kept)
    assert len({(one.problem_id, one.digest) for one in kept}) == len(kept)


@LAW
@given(candidates(), rules(max_per_problem=1) | rules(max_per_problem=2, control="random"))
def test_the_cap_is_respected(scope: list[Candidate], rule: Rule) -> None:
    per_problem = Counter(one.problem_id for one in kept_of(scope, select(scope, rule)))
    assert all(n <= (rule.max_per_problem or 0) for n in per_problem.values())


@LAW
@given(candidates(), rules(pass_rate=(0.2, 0.8)), st.sampled_from(["none", "random"]))
def test_nothing_is_kept_of_a_problem_that_is_solved_too_seldom_or_too_often(
    scope: list[Candidate], rule: Rule, control: Any
) -> None:
    kept = {one.problem_id for one in kept_of(scope, select(scope, replace(rule, control=control)))}
    for problem in kept:
        known = [one.success for one in scope if one.problem_id == problem and one.success != "unknown"]
        assert not known or 0.2 <= known.count("yes") / len(known) <= 0.8


@given(candidates(), rules(ties="include"))
def test_a_tie_is_lost_only_where_ties_are_sampled(scope: list[Candidate], rule: Rule) -> None:
    assert select(scope, rule).rejected["tie_lost"] == 0


@LAW
@given(candidates(), rules(ties="sample"))
def test_sampling_keeps_what_was_requested_or_all_that_survive(scope: list[Candidate], rule: Rule) -> None:
    selection = select(scope, rule)
    requested = round((1 - rule.keep_quantile) * selection.graded)
    survive = len(select(scope, replace(rule, ties="include")).kept)
    assert len(selection.kept) == min(requested, survive)
    lost = [one.rounded for one in scope if selection.fates[one.id] == "tie_lost"]
    assert not lost or max(lost) <= min((one.rounded for one in kept_of(scope, selection)), default=max(lost))


@LAW
@given(candidates(), rules())
def test_the_random_control_matches_the_filter_problem_by_problem(scope: list[Candidate], rule: Rule) -> None:
    filtered, control = select(scope, rule), select(scope, replace(rule, control="random"))
    assert Counter(one.problem_id for one in kept_of(scope, filtered)) == Counter(
        one.problem_id for one in kept_of(scope, control)
    )
    assert control.cutoff == filtered.cutoff
    assert control.note == filtered.note
    assert not any(control.rejected[reason] for reason in ("failed", "below_floor", "below_cutoff"))


@LAW
@given(candidates(), rules(control="random"), st.randoms(use_true_random=False))
def test_the_random_control_does_not_look_at_outcomes(
    scope: list[Candidate], rule: Rule, outcomes: random.Random
) -> None:
    """Only the number per problem depends on them: of two draws from one problem, one holds the other."""
    changed = [
        replace(one, reward=outcomes.choice(LEVELS[0]) * one.graded, success=outcomes.choice(SUCCESSES[2]))
        for one in scope
    ]
    before, after = select(scope, rule), select(changed, rule)
    for problem in "pqr":
        drawn = [{o.id for o in kept_of(scope, result) if o.problem_id == problem} for result in (before, after)]
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
def test_the_rule_of_the_origin_can_be_had_again(trajectories: list[tuple[float, str]]) -> None:
    """`reward >= numpy.quantile(rewards, 0.9)` over all rounds, whatever is known of success."""
    scope = [played(reward, success, id=f"{i:05}", round=i % 3) for i, (reward, success) in enumerate(trajectories)]
    rewards = np.array([round(reward, 9) for reward, _ in trajectories])
    expected = {scope[i].id for i in np.flatnonzero(rewards >= np.quantile(rewards, 0.9))}
    assert set(select(scope, Rule(require_success=False)).kept) == expected


# Sets that a person can check


@pytest.mark.parametrize("wins", [0, 3, 5, 10, 50, 100])
def test_with_known_success_exactly_the_successes_are_kept(wins: int) -> None:
    """The origin trains on all 95 failures when 5 of 100 succeed."""
    scope = binary(wins, 100, known=True)
    selection = select(scope, Rule())
    assert selection.kept == tuple(one.id for one in scope[:wins])
    assert selection.rejected["failed"] == 100 - wins
    assert selection.problems_covered == wins
    assert (selection.requested_fraction, selection.kept_fraction) == (0.1, wins / 100)


@pytest.mark.parametrize(
    ("wins", "cutoff", "kept"),
    [(0, 0.0, 0), (3, 1.0, 3), (5, 1.0, 5), (10, 0.1, 10), (50, 1.0, 50), (100, 1.0, 0)],
)
def test_with_unknown_success_a_cutoff_at_the_lowest_reward_is_raised(wins: int, cutoff: float, kept: int) -> None:
    """10 of 100: the quantile lies between places 89 (0) and 90 (1), a tenth of the way; no raise is needed."""
    scope = binary(wins, 100, known=False)
    selection = select(scope, Rule())
    assert selection.kept == tuple(one.id for one in scope[:kept])
    assert selection.cutoff == pytest.approx(cutoff)
    assert ("raised" in selection.note) == (wins in (3, 5))
    assert ("nothing can tell these apart" in selection.note) == (wins in (0, 100))


@pytest.mark.parametrize(("wins", "kept"), [(0, 100), (3, 100), (5, 100), (10, 10), (50, 50), (100, 100)])
@pytest.mark.parametrize("known", [True, False])
def test_the_rule_of_the_origin_keeps_failures_and_says_so(wins: int, kept: int, known: bool) -> None:
    selection = select(binary(wins, 100, known=known), Rule(require_success=False))
    assert len(selection.kept) == kept
    assert ("rejects nothing" in selection.note) == (kept == 100)


def test_with_three_levels_the_cutoff_is_the_middle_one_when_the_best_are_few() -> None:
    """Of 20, places 17.1 of the order: 14 times 0, 4 times 0.5 (places 14 to 17), 2 times 1."""
    scope = of_levels({0.0: 14, 0.5: 4, 1.0: 2})
    selection = select(scope, Rule())
    assert selection.cutoff == pytest.approx(0.55)
    assert [one.reward for one in kept_of(scope, selection)] == [1.0, 1.0]
    selection = select(scope, Rule(keep_quantile=0.8))
    assert selection.cutoff == 0.5
    assert len(selection.kept) == 6
    assert select(scope, Rule(keep_quantile=0.8, ties="sample")).rejected["tie_lost"] == 2


def test_with_three_levels_a_cutoff_at_the_lowest_goes_to_the_middle() -> None:
    selection = select(of_levels({0.0: 95, 0.5: 3, 1.0: 2}), Rule())
    assert (selection.cutoff, len(selection.kept)) == (0.5, 5)
    assert selection.note == (
        "The cutoff was raised above the lowest reward, 0.0: success is unknown for 100 of 100 graded trajectories."
    )


def of_levels(levels: dict[float, int]) -> list[Candidate]:
    return of_rewards([reward for reward, n in levels.items() for _ in range(n)])


def test_nothing_in_scope_is_an_empty_selection() -> None:
    selection = select([], Rule())
    assert (selection.kept, selection.cutoff, selection.kept_fraction) == ((), 0.0, 0.0)
    assert selection.note == "Nothing was kept: there was no trajectory to select from."


@pytest.mark.parametrize(("success", "kept"), [("yes", 1), ("no", 0), ("unknown", 0)])
def test_one_trajectory_is_kept_only_when_it_is_known_to_succeed(success: str, kept: int) -> None:
    """A single unknown one is the best and the worst of its round."""
    assert len(select([played(1.0, success)], Rule()).kept) == kept


def test_equal_rewards_of_unknown_success_keep_nothing() -> None:
    selection = select(of_rewards([0.5] * 16), Rule())
    assert selection.kept == ()
    assert selection.note.startswith(
        "All graded rewards are 0.5, and success is unknown for 16 of 16 graded trajectories: "
        "nothing can tell these apart, and none is kept."
    )


def test_equal_rewards_still_keep_the_known_successes() -> None:
    """One trajectory of unknown success must not empty a round that solved everything else."""
    scope = [*binary(9, 9, known=True), played(1.0, id="unknown")]
    selection = select(scope, Rule())
    assert selection.kept == tuple(one.id for one in scope[:9])
    assert selection.fates["unknown"] == "failed"


def test_an_environment_that_reports_only_wins_does_not_get_its_losses_trained_on() -> None:
    scope = [played(float(i < 5), "yes" if i < 5 else "unknown", id=f"{i:05}") for i in range(100)]
    assert select(scope, Rule()).kept == tuple(one.id for one in scope[:5])


def test_unknown_success_of_what_cannot_be_kept_raises_nothing() -> None:
    """A cut-off trajectory often has no verdict; the round around it is known all the same."""
    scope = [*binary(5, 99, known=True), played(0.0, status="truncated", id="cut")]
    selection = select(scope, Rule())
    assert (selection.cutoff, len(selection.kept), selection.note) == (0.0, 5, "")


def test_no_cutoff_asked_for_is_none_applied() -> None:
    assert len(select(of_rewards([0.5] * 16), Rule(keep_quantile=0.0)).kept) == 16
    assert len(select(of_rewards([0.0, 0.5, 1.0]), Rule(keep_quantile=0.0)).kept) == 3


def test_the_highest_quantile_keeps_the_best_alone() -> None:
    assert select(of_rewards([0.1, 0.7, 0.7, 0.3]), Rule(keep_quantile=1.0)).kept == ("00001", "00002")


def test_truncated_and_duplicate_trajectories_count_for_the_cutoff() -> None:
    """Without the five at 1.0, which cannot be kept, the cutoff would be 0.9 of the rest."""
    cut = [played(1.0, status="truncated", id=f"cut{i}") for i in range(5)]
    selection = select([*of_rewards([0.1, 0.2, 0.3, 0.4, 0.5]), *cut], Rule(keep_quantile=0.5))
    assert selection.cutoff == pytest.approx(0.75)
    assert selection.kept == ()
    assert selection.note.endswith("(5 truncated, 5 below_cutoff): they were cut off; see max_completion_length.")


def test_ungraded_and_errored_trajectories_do_not_move_the_cutoff() -> None:
    broken = [played(0.0, graded=False, status=status, id=status) for status in ("done", "truncated", "errored")]
    rewards = [0.1, 0.2, 0.3, 0.4]
    selection = select([*of_rewards(rewards), *broken], Rule())
    assert selection.cutoff == pytest.approx(np.quantile(rewards, 0.9))
    assert selection.graded == 4
    assert Counter(selection.fates.values()) == {"kept": 1, "below_cutoff": 3, "ungraded": 2, "errored": 1}


def test_the_floor_comes_before_the_cutoff() -> None:
    selection = select(of_rewards([0.1, 0.2, 0.3, 0.4]), Rule(keep_quantile=0.5, min_reward=0.2))
    assert list(selection.fates.values()) == ["below_floor", "below_cutoff", "kept", "kept"]


def test_sums_that_differ_in_the_last_bit_are_ties() -> None:
    selection = select(of_rewards([0.3] * 9 + [0.1 + 0.2]), Rule(min_reward=0.1 + 0.2, require_success=False))
    assert len(selection.kept) == 10


def test_the_same_answer_to_another_problem_is_no_duplicate() -> None:
    """rLLM hashes the answer alone: two problems with the same short answer collapse into one."""
    same = [played(1.0, "yes", id=f"1-{p}-{i}", problem_id=p, digest="7") for p in "pq" for i in range(2)]
    assert select(same, Rule()).kept == ("1-p-0", "1-q-0")


def test_of_duplicates_the_higher_reward_stays_then_the_earlier_round() -> None:
    shared = {"problem_id": "p", "digest": "7"}
    rounds = [played(1.0, "yes", id=f"{n}-p-0", round=n, **shared) for n in (10, 2)]
    assert select(rounds, Rule()).kept == ("2-p-0",)
    better = played(2.0, "yes", id="11-p-0", round=11, **shared)
    assert select([*rounds, better], Rule(keep_quantile=0.0)).kept == ("11-p-0",)


def test_ids_come_by_round_and_not_by_spelling() -> None:
    rounds = [played(1.0, "yes", id=f"{n}-p-0", round=n) for n in (10, 2, 9)]
    assert select(rounds, Rule(round=10)).kept == ("2-p-0", "9-p-0", "10-p-0")


def test_over_the_cap_fall_the_lower_rewards() -> None:
    scope = [played(reward, "yes", id=f"1-p-{i}", problem_id="p") for i, reward in enumerate([0.1, 0.9, 0.5, 0.9])]
    assert select(scope, Rule(keep_quantile=0.0, max_per_problem=2)).kept == ("1-p-1", "1-p-3")
    assert select(scope, Rule(keep_quantile=0.0, max_per_problem=3)).kept == ("1-p-1", "1-p-2", "1-p-3")


def test_another_round_or_seed_draws_anew() -> None:
    scope = binary(500, 1000, known=True)
    draws = {select(scope, Rule(ties="sample", seed=seed, round=n)).kept for seed in range(3) for n in range(3)}
    assert len(draws) == 9
    assert {len(kept) for kept in draws} == {100}


def test_a_draw_is_the_same_for_ever() -> None:
    selection = select(binary(20, 20, known=True), Rule(keep_quantile=0.8, ties="sample", seed=7, round=3))
    golden = ("00002", "00005", "00013", "00016")
    assert selection.kept == golden, "a repeated run would train on other rows"


def coin_flips(problems: int, samples: int) -> list[Candidate]:
    coin = random.Random(0)
    wins = [[coin.random() < 0.5 for _ in range(samples)] for _ in range(problems)]
    return [
        played(float(won), "yes" if won else "no", id=f"1-{p:04}-{i}", problem_id=f"{p:04}")
        for p, row in enumerate(wins)
        for i, won in enumerate(row)
    ]


def test_sampling_among_ties_prefers_no_problem_for_its_place() -> None:
    """halo-forge sorts by reward and keeps the first half: of 200 problems only the first 96 ever enter training."""
    scope = coin_flips(200, 8)
    covered = Counter()
    for n in range(1, 21):
        selection = select(scope, Rule(ties="sample", round=n))
        assert len(selection.kept) == 160
        covered.update({one.problem_id for one in kept_of(scope, selection)})
        assert 80 < selection.problems_covered < 160
    assert len(covered) == 200, "over twenty rounds every problem has its turn"
    first_half = sum(n for problem, n in covered.items() if problem < "0100")
    assert 0.46 < first_half / covered.total() < 0.54, "some 2200 draws: six standard errors are 0.06"


def test_lots_are_drawn_only_at_the_cutoff() -> None:
    """Of ten, three are asked for: the two at 1.0, and one of the four at the cutoff of 0.5."""
    scope = of_levels({0.0: 4, 0.5: 4, 1.0: 2})
    for seed in range(10):
        selection = select(scope, Rule(keep_quantile=0.7, ties="sample", seed=seed))
        assert [one.reward for one in kept_of(scope, selection)] == [0.5, 1.0, 1.0]


def test_a_capped_problem_has_the_same_chance_however_often_it_was_solved() -> None:
    """With one lot for the cap and for the ties, a problem's best of many lots would beat another's only one."""
    easy = [played(1.0, "yes", id=f"1-easy{p:04}-{i}", problem_id=f"easy{p:04}") for p in range(500) for i in range(8)]
    hard = [played(1.0, "yes", id=f"1-hard{p:04}-0", problem_id=f"hard{p:04}") for p in range(500)]
    rule = Rule(keep_quantile=0.9, ties="sample", max_per_problem=1)
    kept = select(easy + hard, rule).kept
    assert len(kept) == 450
    share = sum("easy" in identity for identity in kept) / len(kept)
    assert 0.42 < share < 0.58, "500 of 1000 problems are easy"


def test_the_random_control_of_sampled_ties_is_right_as_often_as_chance() -> None:
    """With one lot for ties and control, the control would find the very successes that won the tie."""
    scope = [
        played(float(i < 4), "yes" if i < 4 else "no", id=f"1-{p:04}-{i}", problem_id=f"{p:04}")
        for p in range(500)
        for i in range(8)
    ]
    control = kept_of(scope, select(scope, Rule(ties="sample", control="random")))
    assert len(control) == 400
    assert 0.42 < sum(one.reward for one in control) / 400 < 0.58, "half of each problem's attempts are right"


def test_the_random_control_draws_from_what_the_other_rules_leave() -> None:
    shared = {"problem_id": "p"}
    scope = [
        played(1.0, "yes", id="won", **shared),
        played(0.0, "no", id="lost", **shared),
        played(0.0, "no", id="lost again", digest="lost", **shared),
        played(1.0, "yes", id="cut", status="truncated", **shared),
        played(0.0, "no", id="elsewhere"),
    ]
    drawn = Counter()
    for n in range(200):
        selection = select(scope, Rule(control="random", round=n))
        assert selection.fates["cut"] == "truncated"
        assert selection.fates["lost again"] == "duplicate"
        assert selection.fates["elsewhere"] == "tie_lost", "the filter keeps nothing of that problem"
        drawn.update(selection.kept)
    assert set(drawn) == {"won", "lost"}
    assert drawn.total() == 200
    assert 60 < drawn["won"] < 140, "a fair coin of 200 throws: beyond 5 standard deviations"


@pytest.mark.parametrize(
    ("scope", "rule", "why"),
    [
        (binary(0, 8, known=True), Rule(), "(8 failed): they are not known to have succeeded."),
        (binary(0, 8, known=True), Rule(require_success=True), "(8 failed): they are not known to have succeeded."),
        (of_rewards([0.0, 0.2, 0.4]), Rule(min_reward=0.5), "(3 below_floor): their rewards are below min_reward."),
        ([played(0.0, graded=False)], Rule(), "(1 ungraded): no reward function could judge them."),
        (
            [played(0.0, graded=False, status="errored")],
            Rule(),
            "(1 errored): the environment or the judge broke.",
        ),
        (
            binary(2, 4, known=True),
            Rule(ties="sample"),
            "(2 failed, 2 tie_lost): ties: sample keeps round((1 - keep_quantile) x graded), which is 0 of so few.",
        ),
    ],
)
def test_an_empty_round_says_why(scope: list[Candidate], rule: Rule, why: str) -> None:
    selection = select(scope, rule)
    assert selection.kept == ()
    assert selection.note == f"Nothing was kept of {len(scope)} trajectories {why}"


# What cannot be made


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reward", float("nan")),
        ("reward", float("inf")),
        ("reward", -1e101),
        ("reward", True),
        ("reward", "1"),
        ("reward", None),
        ("graded", 1),
        ("graded", False),
        ("success", True),
        ("success", "maybe"),
        ("success", None),
        ("status", "turn_limit"),
        ("status", "errored"),
        ("round", -1),
        ("round", True),
        ("id", ""),
        ("problem_id", 7),
        ("digest", ""),
    ],
)
def test_a_wrong_candidate_cannot_be_made(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"must be|cannot be graded|has reward 0\.0"):
        replace(played(1.0, "yes"), **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep_quantile", -0.1),
        ("keep_quantile", 1.1),
        ("keep_quantile", 90),
        ("keep_quantile", float("nan")),
        ("keep_quantile", True),
        ("min_reward", float("nan")),
        ("min_reward", "0.5"),
        ("require_success", "yes"),
        ("require_success", None),
        ("require_success", 1),
        ("max_per_problem", 0),
        ("max_per_problem", 1.5),
        ("ties", "exclude"),
        ("control", True),
        ("seed", 0.5),
        ("seed", -1),
        ("round", -1),
    ],
)
def test_a_wrong_rule_cannot_be_made_and_the_message_names_the_key(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*{value!r}$"):
        Rule(**{field: value})


def test_a_rule_that_would_keep_nothing_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="would keep nothing"):
        Rule(ties="sample", keep_quantile=1.0)


def test_a_trajectory_in_scope_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="00001 stands twice"):
        select([*of_rewards([0.0, 1.0]), played(1.0, id="00001")], Rule())


def test_values_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        played(1.0).reward = 2.0  # type: ignore[misc]
