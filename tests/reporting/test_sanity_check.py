"""The sanity check stops a run in which nothing can be learned, and no other."""

import pytest

from bcft.reporting.sanity_check import sanity_check
from bcft.rewards import math_reward
from bcft.selection.scoring import Score
from bcft.types import Problem, Trajectory, Turn

NOTHING = {"n": 8, "greedy": {"success": 0.0}, "sampled": {"pass@1": 0.0}}
SOME = {"n": 8, "greedy": {"success": 0.0}, "sampled": {"pass@1": 0.1}}
ALL = {"n": 8, "greedy": {"success": 1.0}, "sampled": {"pass@1": 1.0}}


def scored(n, *, reward=0.0, graded=True, success="no", stop="stop_token", action="#### 7", problem="p"):
    """Return n scored attempts at a problem."""
    turn = Turn(action=action, ids=(1,), action_ids=(2, 3), stop=stop)
    played = [Trajectory(1, problem, k, (turn,), "done") for k in range(n)]
    return [Score(t, (("r", reward if graded else None),), graded, reward, success) for t in played]


def check(scores, *, answers=math_reward.answers, environment=None):
    problems = {key: Problem(key, f"Say {key}") for key in ("p", "q", "r", "s")}
    return sanity_check(scores, problems, answers=answers, environment=environment, max_completion_length=72)


def reason(scores, dev, *, require_success="auto", **arguments):
    """Return why a run would be stopped, before or after the evaluation of the base."""
    checked = check(scores, **arguments)
    return checked.reason or checked.reason_on_dev(dev, require_success=require_success)


@pytest.mark.parametrize(
    ("scores", "dev", "said"),
    [
        (scored(4, graded=False, success="unknown"), {"n": 8}, "none of 4 attempts could be graded"),
        (scored(4, stop="max_tokens"), SOME, "max_completion_length, 72 tokens: raise it"),
        (scored(4, reward=0.5, success="unknown"), {"n": 8}, "have the same reward, 0.5"),
        (
            scored(4),
            NOTHING,
            "none of 4 attempts succeeded, nor any at 8 dev problems (100.0 % have a readable answer)",
        ),
        (scored(4, action="no idea"), NOTHING, "(0.0 % have a readable answer)"),
        (scored(4, reward=1.0, success="yes"), ALL, "nothing left to learn"),
        (scored(4), SOME, ""),
        (scored(4) + scored(1, reward=1.0, success="yes"), NOTHING, ""),
        (scored(4, reward=1.0, success="yes"), SOME, ""),
        (scored(2, success="unknown") + scored(2, reward=1.0, success="unknown"), {"n": 8}, ""),
    ],
)
def test_a_run_in_which_nothing_can_be_learned_is_stopped_and_no_other(scores, dev, said):
    assert said in reason(scores, dev)
    assert bool(reason(scores, dev)) == bool(said)
    assert "Say p -> " in check(scores).lines[1]


@pytest.mark.parametrize(
    ("scores", "early"),
    [
        (scored(4, graded=False, success="unknown"), True),
        (scored(4, stop="max_tokens"), True),
        (scored(4, reward=0.5, success="unknown"), True),
        (scored(4), False),
        (scored(4, reward=1.0, success="yes"), False),
    ],
)
def test_only_what_dev_may_contradict_waits_for_the_evaluation_of_the_base(scores, early):
    assert bool(check(scores).reason) == early
    assert early or reason(scores, NOTHING) or reason(scores, ALL)


def test_failures_are_a_reason_to_stop_only_where_success_is_required_or_rewards_are_alike():
    unequal = scored(2) + scored(2, reward=0.5)
    assert reason(unequal, NOTHING)
    assert not reason(unequal, NOTHING, require_success="false")
    assert reason(scored(4), NOTHING, require_success="false")


def test_the_first_line_has_the_shares_of_attempts():
    scores = scored(3) + scored(1, reward=1.0, success="yes", action="seven", problem="q")
    shares = "25.0 % solved, 100.0 % graded, 75.0 % with a readable answer, 0.0 % truncated"
    assert check(scores).lines[0] == f"sanity check: 4 attempts at 2 problems: {shares}"


@pytest.mark.parametrize("arguments", [{"answers": None}, {"environment": "package.Environment"}], ids=str)
def test_without_answers_to_compare_no_share_of_readable_answers_is_shown(arguments):
    checked = check(scored(4), **arguments)
    assert checked.lines[0].endswith(": 0.0 % solved, 100.0 % graded, 0.0 % truncated")
    said = reason(scored(4), NOTHING, **arguments)
    assert "none of 4 attempts succeeded" in said
    assert "readable" not in said


def test_where_success_is_unknown_neither_solved_nor_readable_answers_are_counted():
    checked = check(scored(2, success="unknown") + scored(2, reward=1.0, success="unknown"))
    assert checked.lines[0].endswith("at 1 problems: 100.0 % graded, 0.0 % truncated")


def test_an_attempt_of_each_reward_is_shown_then_other_problems_three_in_all():
    scores = scored(2) + scored(1, reward=1.0) + scored(1, problem="q") + scored(1, problem="r")
    assert [line.split(" -> ")[0].split() for line in check(scores).lines[1:]] == [
        ["reward", "0", "Say", "p"], ["reward", "1", "Say", "p"], ["reward", "0", "Say", "q"],
    ]  # fmt: skip


def test_an_attempt_whose_environment_failed_shows_its_error():
    broken = Trajectory(1, "q", 0, (), "error", error="the server hung up")
    scores = [*scored(1), Score(broken, (), graded=False, reward=0.0, success="unknown")]
    assert check(scores).lines[2] == "  reward 0  Say q -> the server hung up"
