"""Decisions that are read off the committed rounds."""

import pytest

from bcft.config.schema import RoundSettings
from bcft.runs.history import History, is_due


def history(tmp_path, levels, *, base=0.2, trained=None, **settings):
    """Return a history in which round n has sampled pass@1 `levels[n - 1]` on dev; None: it was not evaluated."""
    made = History(tmp_path, RoundSettings(**{"num_rounds": 9} | settings), base_model="base")
    made.start({"greedy": {"success": base}, "sampled": {"pass@1": base}})
    for number, level in enumerate(levels, 1):
        steps = 1 if trained is None or number in trained else 0
        dev = {} if level is None else {"eval": {"greedy": {}, "sampled": {"pass@1": level}, "vs_base": {}}}
        made.append({"round": number, "train": {"steps": steps}, **dev})
    return made


def test_the_best_round_has_the_highest_success_and_ties_go_to_the_earlier(tmp_path):
    made = history(tmp_path, [0.4, 0.6, None, 0.6, 0.5])
    assert [made.best(last) for last in range(6)] == [0, 1, 2, 2, 2, 2]
    assert history(tmp_path, [0.1, 0.2]).best(2) == 0


def test_where_an_environment_gives_rewards_the_best_round_has_the_highest_return(tmp_path):
    made = history(tmp_path, [])
    made.start({"greedy": {}, "sampled": {"pass@1": 0.9}, "return": {"mean": -9.0}})
    made.append({"round": 1, "train": {"steps": 1}, "eval": {"sampled": {"pass@1": 0.1}, "return": {"mean": -4.0}}})
    assert made.best(1) == 1


@pytest.mark.parametrize(
    ("base", "rewards", "best"),
    [
        (0.5, [0.4, 0.6, 0.55], 2), (0.5, [0.4, 0.3], 0), (-9.0, [-8.0, -8.0], 1), (0.0, [None, 0.1, None], 2),
        (0.5, [0.5, 0.5], 0), (0.2, ["ungraded", 0.3], 2), (0.2, ["ungraded", 0.1], 0),
    ],
)  # fmt: skip
def test_where_success_is_unknown_the_best_round_has_the_highest_reward(tmp_path, base, rewards, best):
    made = history(tmp_path, [])
    made.start({"n": 4, "reward": {"mean": base}})
    for number, reward in enumerate(rewards, 1):
        dev = {"n": 4} if reward == "ungraded" else {"n": 4, "reward": {"mean": reward}}
        evaluated = {} if reward is None else {"eval": dev}
        made.append({"round": number, "train": {"steps": 1}, **evaluated})
    assert made.measured
    assert made.best(len(rewards)) == best


def test_optimizer_steps_add_up(tmp_path):
    made = history(tmp_path, [0.1, 0.2, 0.3], trained={1, 3})
    assert [made.steps(last) for last in range(4)] == [0, 1, 1, 2]


def test_fewer_rounds_than_were_played_play_none(tmp_path):
    assert history(tmp_path, [0.5] * 4, num_rounds=3).next_round() == 0


def test_without_success_or_return_the_last_evaluated_round_is_taken(tmp_path):
    made = history(tmp_path, [])
    made.start({"n": 4, "stop_rate": 1.0})
    made.append({"round": 1, "train": {"steps": 1}, "eval": {"n": 4}})
    made.append({"round": 2, "train": {"steps": 1}})
    assert made.best(2) == 1


@pytest.mark.parametrize(
    ("init_from", "before", "after"),
    [
        ("previous", [0, 1, 2, 2], [1, 2, 2, 4]),
        ("best", [0, 1, 1, 1], [1, 2, 1, 4]),
        ("base", [0, 1, 2, 2], [1, 2, 2, 4]),
    ],
)
def test_a_round_that_trained_nothing_leaves_the_weights_it_started_from(tmp_path, init_from, before, after):
    made = history(tmp_path, [0.6, 0.5, 0.5, 0.5], trained={1, 2, 4}, init_from=init_from)
    assert [made.weights_round_before(n) for n in (1, 2, 3, 4)] == before
    assert [made.weights_round_after(n) for n in (1, 2, 3, 4)] == after


def test_weights_are_kept_as_long_as_something_may_read_them(tmp_path):
    made = history(tmp_path, [0.6, 0.5, 0.4])
    assert made.rounds_to_keep() == {0, 1, 3}
    carried = history(tmp_path, [0.6, 0.5, 0.4], trained={1, 2}, reset_optimizer=False)
    assert carried.rounds_to_keep() == {0, 1, 2}


def test_a_run_stops_after_enough_evaluations_without_a_better_one(tmp_path):
    made = history(tmp_path, [0.6, 0.5, None, 0.5], early_stop=2)
    assert made.stop_reason() == "none of 2 evaluations after round 1 was better on dev"
    assert made.next_round() == 0
    assert history(tmp_path, [0.6, 0.5, None], early_stop=2).next_round() == 4
    assert history(tmp_path, [0.6, 0.5, 0.4]).stop_reason() == ""


def test_a_run_stops_when_fewer_problems_are_solved_in_several_attempts(tmp_path):
    made = history(tmp_path, [0.6], early_stop=5)
    made.records[1]["eval"]["vs_base"] = {"pass@k_ci95": [-0.3, -0.1], "pass@k_delta": -0.2}
    assert made.stop_reason().startswith("collapse: ")
    made.records[1]["eval"]["vs_base"]["pass@k_ci95"] = [-0.3, 0.0]
    assert made.stop_reason() == ""


def test_all_rounds_are_played_once(tmp_path):
    assert [history(tmp_path, [0.5] * n, num_rounds=3).next_round() for n in range(4)] == [1, 2, 3, 0]


@pytest.mark.parametrize(("evaluated", "played"), [(640, 2048), (640, 1024), (10, 1000), (1000, 10), (1, 2), (3, 2)])
def test_left_to_itself_evaluation_takes_at_most_a_third_of_all_attempts(evaluated, played):
    rounds = RoundSettings(eval_every="auto", num_rounds=10_000)
    every = next(n for n in range(1, 1001) if is_due(rounds, n, evaluated=evaluated, played=played))
    assert evaluated <= (evaluated + every * played) / 3
    assert every == 1 or evaluated > (evaluated + (every - 1) * played) / 3
