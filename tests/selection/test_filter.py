"""The filter on sets of candidates that a person can check."""

import random
import re
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
from helpers.candidates import binary, candidate, kept_of, of_levels, of_rewards

from bcft.config.declare import SettingError
from bcft.config.schema import RuleSettings, SelectionSettings
from bcft.selection.filter import Candidate, Rule, select


@pytest.mark.parametrize("wins", [0, 3, 5, 10, 50, 100])
def test_with_known_success_exactly_the_successes_are_kept(wins: int) -> None:
    """The origin trains on all 95 failures when 5 of 100 succeed."""
    scope = binary(wins, 100, known=True)
    selection = select(scope, Rule())
    assert selection.kept == tuple(c.id for c in scope[:wins])
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
    assert selection.kept == tuple(c.id for c in scope[:kept])
    assert selection.cutoff == pytest.approx(cutoff)
    assert ("raised" in selection.note) == (wins in (3, 5))
    assert ("only known successes can be kept" in selection.note) == (wins in (0, 100))


@pytest.mark.parametrize(("wins", "kept"), [(0, 100), (3, 100), (5, 100), (10, 10), (50, 50), (100, 100)])
@pytest.mark.parametrize("known", [True, False])
def test_the_rule_of_the_origin_keeps_failures_and_says_so(wins: int, kept: int, known: bool) -> None:
    selection = select(binary(wins, 100, known=known), Rule(require_success="false"))
    assert len(selection.kept) == kept
    assert ("rejects nothing" in selection.note) == (kept == 100)


def test_with_three_levels_the_cutoff_is_the_middle_one_when_the_best_are_few() -> None:
    """Place 17.1 of 20 in order: 14 times 0, 4 times 0.5 (places 14 to 17), 2 times 1."""
    scope = of_levels({0.0: 14, 0.5: 4, 1.0: 2})
    selection = select(scope, Rule())
    assert selection.cutoff == pytest.approx(0.55)
    assert [c.reward for c in kept_of(scope, selection)] == [1.0, 1.0]
    selection = select(scope, Rule(keep_quantile=0.8))
    assert selection.cutoff == 0.5
    assert len(selection.kept) == 6
    assert select(scope, Rule(keep_quantile=0.8, ties="sample")).rejected["tie_break"] == 2


def test_with_three_levels_a_cutoff_at_the_lowest_goes_to_the_middle() -> None:
    selection = select(of_levels({0.0: 95, 0.5: 3, 1.0: 2}), Rule())
    assert (selection.cutoff, len(selection.kept)) == (0.5, 5)
    assert selection.note == (
        "The cutoff was raised above the lowest reward, 0.0: success is unknown for 100 of 100 graded trajectories."
    )


def test_nothing_in_scope_is_an_empty_selection() -> None:
    selection = select([], Rule())
    assert (selection.kept, selection.cutoff, selection.kept_fraction) == ((), 0.0, 0.0)
    assert selection.note == "The filter kept nothing: there is no trajectory to select from."


@pytest.mark.parametrize(("success", "kept"), [("yes", 1), ("no", 0), ("unknown", 0)])
def test_one_trajectory_is_kept_only_when_it_is_known_to_succeed(success: str, kept: int) -> None:
    """A single trajectory of unknown success is both the best and the worst of its round."""
    assert len(select([candidate(1.0, success)], Rule()).kept) == kept


def test_equal_rewards_of_unknown_success_keep_nothing() -> None:
    selection = select(of_rewards([0.5] * 16), Rule())
    assert selection.kept == ()
    assert selection.note.startswith(
        "All graded rewards are 0.5, and success is unknown for 16 of 16 graded trajectories: "
        "only known successes can be kept. "
    )


def test_equal_rewards_still_keep_the_known_successes() -> None:
    """A single trajectory of unknown success must not empty a round that solved everything else."""
    scope = [*binary(9, 9, known=True), candidate(1.0, id="unknown")]
    selection = select(scope, Rule())
    assert selection.kept == tuple(c.id for c in scope[:9])
    assert selection.decisions["unknown"] == "failed"


def test_an_environment_that_reports_only_wins_does_not_get_its_losses_trained_on() -> None:
    scope = [candidate(float(i < 5), "yes" if i < 5 else "unknown", id=f"{i:05}") for i in range(100)]
    assert select(scope, Rule()).kept == tuple(c.id for c in scope[:5])


def test_unknown_success_of_a_trajectory_that_cannot_be_kept_does_not_raise_the_cutoff() -> None:
    """A truncated trajectory often has no known success; the rest of its round has."""
    scope = [*binary(5, 99, known=True), candidate(0.0, status="truncated", id="truncated")]
    selection = select(scope, Rule())
    assert (selection.cutoff, len(selection.kept), selection.note) == (0.0, 5, "")


def test_keep_quantile_0_applies_no_cutoff() -> None:
    assert len(select(of_rewards([0.5] * 16), Rule(keep_quantile=0.0)).kept) == 16
    assert len(select(of_rewards([0.0, 0.5, 1.0]), Rule(keep_quantile=0.0)).kept) == 3


def test_the_highest_quantile_keeps_the_best_alone() -> None:
    assert select(of_rewards([0.1, 0.7, 0.7, 0.3]), Rule(keep_quantile=1.0)).kept == ("00001", "00002")


def test_truncated_and_duplicate_trajectories_count_for_the_cutoff() -> None:
    """Without the five at 1.0, which cannot be kept, the cutoff would be 0.9 of the rest."""
    truncated = [candidate(1.0, status="truncated", id=f"truncated{i}") for i in range(5)]
    selection = select([*of_rewards([0.1, 0.2, 0.3, 0.4, 0.5]), *truncated], Rule(keep_quantile=0.5))
    assert selection.cutoff == pytest.approx(0.75)
    assert selection.kept == ()
    assert selection.note.endswith("(5 truncated, 5 below_cutoff): they were truncated; raise max_completion_length.")


def test_ungraded_and_errored_trajectories_do_not_move_the_cutoff() -> None:
    broken = [candidate(0.0, graded=False, status=status, id=status) for status in ("done", "truncated", "errored")]
    rewards = [0.1, 0.2, 0.3, 0.4]
    selection = select([*of_rewards(rewards), *broken], Rule())
    assert selection.cutoff == pytest.approx(np.quantile(rewards, 0.9))
    assert selection.graded == 4
    assert Counter(selection.decisions.values()) == {"kept": 1, "below_cutoff": 3, "ungraded": 2, "errored": 1}


def test_min_reward_comes_before_the_cutoff() -> None:
    selection = select(of_rewards([0.1, 0.2, 0.3, 0.4]), Rule(keep_quantile=0.5, min_reward=0.2))
    assert list(selection.decisions.values()) == ["below_min_reward", "below_cutoff", "kept", "kept"]


def test_sums_that_differ_in_the_last_bit_are_ties() -> None:
    selection = select(of_rewards([0.3] * 9 + [0.1 + 0.2]), Rule(min_reward=0.1 + 0.2, require_success="false"))
    assert len(selection.kept) == 10


def test_the_same_answer_to_another_problem_is_not_a_duplicate() -> None:
    """rLLM hashes the answer alone: two problems with the same short answer collapse into one."""
    same = [candidate(1.0, "yes", id=f"1-{p}-{i}", problem_id=p, digest="7") for p in "pq" for i in range(2)]
    assert select(same, Rule()).kept == ("1-p-0", "1-q-0")


def test_of_duplicates_the_higher_reward_stays_then_the_earlier_round() -> None:
    shared = {"problem_id": "p", "digest": "7"}
    rounds = [candidate(1.0, "yes", id=f"{n}-p-0", round=n, **shared) for n in (10, 2)]
    assert select(rounds, Rule()).kept == ("2-p-0",)
    better = candidate(2.0, "yes", id="11-p-0", round=11, **shared)
    assert select([*rounds, better], Rule(keep_quantile=0.0)).kept == ("11-p-0",)


def test_ids_come_by_round_and_not_by_spelling() -> None:
    rounds = [candidate(1.0, "yes", id=f"{n}-p-0", round=n) for n in (10, 2, 9)]
    assert select(rounds, Rule(round=10)).kept == ("2-p-0", "9-p-0", "10-p-0")


def test_max_per_problem_rejects_the_lower_rewards() -> None:
    scope = [candidate(reward, "yes", id=f"1-p-{i}", problem_id="p") for i, reward in enumerate([0.1, 0.9, 0.5, 0.9])]
    assert select(scope, Rule(keep_quantile=0.0, max_per_problem=2)).kept == ("1-p-1", "1-p-3")
    assert select(scope, Rule(keep_quantile=0.0, max_per_problem=3)).kept == ("1-p-1", "1-p-2", "1-p-3")


def test_another_round_or_seed_draws_anew() -> None:
    scope = binary(500, 1000, known=True)
    draws = {select(scope, Rule(ties="sample", seed=seed, round=n)).kept for seed in range(3) for n in range(3)}
    assert len(draws) == 9
    assert {len(kept) for kept in draws} == {100}


def test_a_draw_never_changes() -> None:
    selection = select(binary(20, 20, known=True), Rule(keep_quantile=0.8, ties="sample", seed=7, round=3))
    golden = ("00002", "00005", "00013", "00016")
    assert selection.kept == golden, "a repeated run would train on other examples"


def coin_flips(problems: int, samples: int) -> list[Candidate]:
    coin = random.Random(0)
    wins = [[coin.random() < 0.5 for _ in range(samples)] for _ in range(problems)]
    return [
        candidate(float(won), "yes" if won else "no", id=f"1-{p:04}-{i}", problem_id=f"{p:04}")
        for p, row in enumerate(wins)
        for i, won in enumerate(row)
    ]


def test_sampling_among_ties_prefers_no_problem_for_its_position() -> None:
    """halo-forge sorts by reward and keeps the first half: of 200 problems only the first 96 ever enter training."""
    scope = coin_flips(200, 8)
    covered = Counter()
    for n in range(1, 21):
        selection = select(scope, Rule(ties="sample", round=n))
        assert len(selection.kept) == 160
        covered.update({c.problem_id for c in kept_of(scope, selection)})
        assert 80 < selection.problems_covered < 160
    assert len(covered) == 200, "over twenty rounds something of every problem is kept"
    first_half = sum(n for problem, n in covered.items() if problem < "0100")
    assert 0.46 < first_half / covered.total() < 0.54, "some 2200 draws: six standard errors are 0.06"


def test_only_ties_at_the_cutoff_are_drawn() -> None:
    """Three of ten are requested: both at 1.0, and one of the four at the cutoff of 0.5."""
    scope = of_levels({0.0: 4, 0.5: 4, 1.0: 2})
    for seed in range(10):
        selection = select(scope, Rule(keep_quantile=0.7, ties="sample", seed=seed))
        assert [c.reward for c in kept_of(scope, selection)] == [0.5, 1.0, 1.0]


def test_with_max_per_problem_a_problem_has_the_same_chance_however_often_it_was_solved() -> None:
    """With the same draw for both rules, a problem's best of many draws would beat another's only one."""
    easy = [
        candidate(1.0, "yes", id=f"1-easy{p:04}-{i}", problem_id=f"easy{p:04}") for p in range(500) for i in range(8)
    ]
    hard = [candidate(1.0, "yes", id=f"1-hard{p:04}-0", problem_id=f"hard{p:04}") for p in range(500)]
    rule = Rule(keep_quantile=0.9, ties="sample", max_per_problem=1)
    kept = select(easy + hard, rule).kept
    assert len(kept) == 450
    share = sum("easy" in identity for identity in kept) / len(kept)
    assert 0.42 < share < 0.58, "500 of 1000 problems are easy"


def test_the_random_control_of_sampled_ties_is_right_as_often_as_chance() -> None:
    """With the same draw for ties and control, the control would keep the very successes that won the tie."""
    scope = [
        candidate(float(i < 4), "yes" if i < 4 else "no", id=f"1-{p:04}-{i}", problem_id=f"{p:04}")
        for p in range(500)
        for i in range(8)
    ]
    control = kept_of(scope, select(scope, Rule(ties="sample", control="random")))
    assert len(control) == 400
    assert 0.42 < sum(c.reward for c in control) / 400 < 0.58, "half of each problem's attempts are right"


def test_the_random_control_draws_from_the_candidates_that_pass_the_other_rules() -> None:
    shared = {"problem_id": "p"}
    scope = [
        candidate(1.0, "yes", id="won", **shared),
        candidate(0.0, "no", id="lost", **shared),
        candidate(0.0, "no", id="lost again", digest="lost", **shared),
        candidate(1.0, "yes", id="truncated", status="truncated", **shared),
        candidate(0.0, "no", id="elsewhere"),
    ]
    drawn = Counter()
    for n in range(200):
        selection = select(scope, Rule(control="random", round=n))
        assert selection.decisions["truncated"] == "truncated"
        assert selection.decisions["lost again"] == "duplicate"
        assert selection.decisions["elsewhere"] == "tie_break", "the filter keeps nothing of that problem"
        drawn.update(selection.kept)
    assert set(drawn) == {"won", "lost"}
    assert drawn.total() == 200
    assert 60 < drawn["won"] < 140, "200 throws of a fair coin: more than 5 standard deviations"


@pytest.mark.parametrize(
    ("scope", "rule", "why"),
    [
        (binary(0, 8, known=True), Rule(), "(8 failed): they are not known to have succeeded."),
        (binary(0, 8, known=True), Rule(require_success="true"), "(8 failed): they are not known to have succeeded."),
        (
            of_rewards([0.0, 0.2, 0.4]),
            Rule(min_reward=0.5),
            "(3 below_min_reward): their rewards are below min_reward.",
        ),
        ([candidate(0.0, graded=False)], Rule(), "(1 ungraded): no reward function could grade them."),
        (
            [candidate(0.0, graded=False, status="errored")],
            Rule(),
            "(1 errored): the environment failed.",
        ),
        (
            binary(2, 4, known=True),
            Rule(ties="sample"),
            "(2 failed, 2 tie_break): ties: sample keeps round((1 - keep_quantile) x graded), which is 0 for so few.",
        ),
    ],
)
def test_an_empty_round_says_why(scope: list[Candidate], rule: Rule, why: str) -> None:
    selection = select(scope, rule)
    assert selection.kept == ()
    total = "1 trajectory" if len(scope) == 1 else f"{len(scope)} trajectories"
    assert selection.note == f"The filter kept none of {total} {why}"


# Values that cannot be made


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
        replace(candidate(1.0, "yes"), **{field: value})


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
        ("require_success", True),
        ("pass_rate", 0.5),
        ("pass_rate", ("0.1", "0.9")),
        ("pass_rate", [0.1]),
        ("pass_rate", [0.9, 0.1]),
        ("pass_rate", [0.5, 1.5]),
        ("max_per_problem", 0),
        ("max_per_problem", 1.5),
        ("max_per_problem", "2"),
        ("ties", "exclude"),
        ("control", True),
        ("seed", 0.5),
        ("seed", -1),
        ("round", -1),
    ],
)
def test_a_wrong_rule_cannot_be_made_and_the_message_names_the_key(field: str, value: object) -> None:
    shown = "and has no value$" if value is None else re.escape(f"not {value!r}")
    with pytest.raises(ValueError, match=f"^{field}: wants .*{shown}"):
        Rule(**{field: value})


def test_a_rule_that_would_keep_nothing_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="ties: sample with keep_quantile: 1 would keep nothing"):
        Rule(ties="sample", keep_quantile=1.0)


def test_a_rule_and_a_recipe_have_the_same_settings_and_limits() -> None:
    """A rule about a value stands once: what a recipe's section does not take, the filter does not take either."""
    assert {field.name for field in fields(Rule)} - {field.name for field in fields(RuleSettings)} == {"seed", "round"}
    for conflicting in ({"pass_rate": (0.9, 0.1)}, {"ties": "sample", "keep_quantile": 1.0}):
        with pytest.raises(SettingError) as in_recipe:
            SelectionSettings(**conflicting)
        with pytest.raises(SettingError) as in_rule:
            Rule(**conflicting)
        assert str(in_rule.value) == str(in_recipe.value)


def test_a_trajectory_in_scope_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="in scope twice: 00001"):
        select([*of_rewards([0.0, 1.0]), candidate(1.0, id="00001")], Rule())
