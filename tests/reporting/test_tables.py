"""Lines and tables: each figure in its column, blanks where a summary has none, and conclusions in words."""

import os
import subprocess
import sys

import pytest

from bcft.evaluation.results import Evaluation, Measured
from bcft.reporting.tables import (
    ROUNDS,
    before_and_after,
    conclusion,
    level,
    markdown_table,
    print_table,
    round_line,
    say,
    success_or_reward,
    table_rows,
)
from bcft.types import Demonstration, Problem

SOLVED = {
    "n": 8, "stop_rate": 1.0, "greedy": {"success": 0.25, "ci95": [0.1, 0.5]},
    "sampled": {"n": 4, "k": 2, "pass@1": 0.5, "ci95": [0.4, 0.6], "pass@k": 0.75, "maj@k": 0.625},
}  # fmt: skip
REWARDED = {"n": 8, "stop_rate": 1.0, "reward": {"greedy": 0.5, "mean": -0.125, "ci95": [-0.25, 0.0625]}}
RETURNED = SOLVED | {"return": {"mean": -4.0, "ci95": [-5.0, -3.0], "turns": 4.25}}
UNGRADED = {"n": 8, "stop_rate": 0.5, "loss": 0.25}
REVISED = SOLVED | {"revision": {"first": 0.5, "last": 0.75, "wrong_to_right": 3, "right_to_wrong": 1}}


def evaluated(*, solved, n=4, answer="7", **more):
    """Return the evaluation of n problems, one greedy attempt and two samples each."""
    attempts = [
        {
            "problem_id": f"p{i}", "sample": sample, "completion": answer, "success": "yes" if i < solved else "no",
            "stop": "stop_token", **more,
        }
        for i in range(n)
        for sample in (-1, 0, 1)
    ]  # fmt: skip
    return Evaluation(tuple(attempts))


def measured(**more):
    evaluation = evaluated(**more)
    return Measured(evaluation, evaluation.summary(None))


@pytest.mark.parametrize(("rank", "quiet", "printed"), [("0", False, "a [b]\n"), ("0", True, ""), ("1", False, "")])
def test_the_first_process_alone_prints_and_nothing_when_quiet(monkeypatch, capsys, rank, quiet, printed):
    monkeypatch.setenv("RANK", rank)
    say("a [b]", quiet=quiet)
    assert capsys.readouterr().out == printed
    print_table({"base": SOLVED}, quiet)
    assert bool(capsys.readouterr().out) == bool(printed)


def test_a_closed_pipe_ends_the_command_without_a_traceback():
    read, write = os.pipe()
    os.close(read)
    code = "from bcft.reporting.tables import say; say('a line', quiet=False)"
    ended = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_the_printed_table_has_a_column_for_each_summary(capsys):
    print_table({"[base]": SOLVED, "final": RETURNED}, quiet=False)
    text = capsys.readouterr().out
    assert text.startswith("held-out problems\n")
    assert "final" in text
    assert "25.0 % [10.0, 50.0]" in text


def test_every_row_has_a_cell_for_every_summary_and_rows_without_a_figure_are_left_out():
    rows = {name: cells for name, *cells in table_rows({"a": SOLVED, "b": RETURNED, "c": UNGRADED})}
    assert rows == {
        "problems": ["8", "8", "8"],
        "solved, greedy": ["25.0 % [10.0, 50.0]", "25.0 % [10.0, 50.0]", ""],
        "solved, sampled x 4": ["50.0 % [40.0, 60.0]", "50.0 % [40.0, 60.0]", ""],
        "pass@2": ["75.0 %", "75.0 %", ""],
        "maj@2": ["62.5 %", "", ""],
        "mean return": ["", "-4.00 [-5.00, -3.00]", ""],
        "mean turns": ["", "4.25", ""],
        "stopped by itself": ["100.0 %", "100.0 %", "50.0 %"],
        "held-out loss, nats/token": ["", "", "0.2500"],
    }


def test_two_turns_and_harder_problems_have_rows_of_their_own():
    rows = {name: cells for name, *cells in table_rows({"a": REVISED | {"harder": SOLVED}})}
    assert rows["solved at the first turn"] == ["50.0 %"]
    assert rows["solved at the second turn"] == ["75.0 %"]
    assert rows["wrong to right, right to wrong"] == ["3, 1"]
    assert rows["harder problems, sampled"] == ["50.0 % [40.0, 60.0]"]


def test_more_solved_problems_are_better_and_the_same_ones_not_distinguishable():
    better = conclusion(measured(solved=4, n=16), measured(solved=16, n=16), before="with it")
    assert better["vs_base"]["conclusion"] == "better"
    assert better["conclusion"].startswith(
        "better: 100.0 % of attempts at 16 held-out problems solved (sampled), 25.0 % with it: paired difference +75.0 "
    )
    same = conclusion(measured(solved=2), measured(solved=2))["conclusion"]
    assert same.startswith("not distinguishable: 50.0 % of attempts at 4 held-out problems solved (sampled), 50.0 % be")


def test_an_environment_with_rewards_is_concluded_by_its_return():
    low, high = (measured(solved=4, graded=True, turns=1, first="unknown", **{"return": r}) for r in (-3.0, -1.0))
    words = conclusion(low, high)["conclusion"]
    assert "a mean return of -1.00 at 4 held-out problems, -3.00 before: paired difference +2.00" in words
    assert words.endswith("; 100.0 % of attempts solved, 100.0 % before")


def test_without_success_the_conclusion_has_loss_and_stop_rate_and_without_problems_nothing():
    old, new = (Measured(Evaluation(()), UNGRADED | {"loss": loss}) for loss in (0.5, 0.25))
    ungraded = conclusion(old, new)
    assert ungraded == {
        "conclusion": "success is unknown, nothing could be graded: held-out loss 0.5000 before, 0.2500 now; "
        "50.0 % of attempts stopped by themselves before, 50.0 % now"
    }
    assert "nothing was measured" in conclusion(old, Measured(Evaluation(()), {}))["conclusion"]


def test_the_line_of_a_round_stands_below_the_head_of_the_table():
    record = {
        "round": 3, "rollout": {"played": 1024, "success": 0.5, "unknown": 0, "reward_mean": 0.5},
        "selection": {"kept": 175, "cutoff": 1.0, "note": "A note."}, "eval": SOLVED | {"kl_base": 0.01234},
        "seconds": {"train": 1.5},
    }  # fmt: skip
    line, note = round_line(record).splitlines()
    cells = {"round": "3", "played": "1024", "success": "50.0 %", "kept": "175", "cutoff": "1", "KL base": "0.0123"}
    for name, value in cells.items():
        end = ROUNDS.index(name) + len(name)
        assert line[:end].endswith(f" {value}")
    assert line.endswith("25.0 %  50.0 % [40.0, 60.0]     0.0123  1.5 s")
    assert round_line(record | {"eval": SOLVED}).splitlines()[0].index("1.5 s") == line.index("1.5 s")
    assert note.strip() == "A note."
    assert round_line({"round": 0, "eval": SOLVED}).split() == ["0", "25.0", "%", "50.0", "%", "[40.0,", "60.0]"]


def test_rewards_and_returns_take_the_place_of_an_unknown_success():
    rollout = {"played": 4, "success": 0.0, "unknown": 4, "reward_mean": 0.125}
    line = round_line({"round": 1, "rollout": rollout, "eval": RETURNED})
    assert "r 0.125" in line
    assert success_or_reward(rollout) == "r 0.125"
    assert success_or_reward(rollout | {"unknown": 3, "success": 0.25}) == "25.0 %"
    assert line.endswith("-4.00 [-5.00, -3.00]")
    assert round_line({"round": 1, "rollout": rollout, "eval": REWARDED}).endswith("-0.125 [-0.25, 0.0625]")
    assert ["mean reward", "-0.125 [-0.25, 0.0625]"] in table_rows({"base": REWARDED})


def rewarded(rewards):
    """Return the evaluation of as many problems, each attempted three times with the same reward."""
    attempts = [
        {
            "problem_id": f"p{i:02}", "sample": sample, "prompt": "?", "completion": f"reply {reward}",
            "success": "unknown", "stop": "stop_token", "graded": reward is not None, "reward": reward or 0.0,
        }
        for i, reward in enumerate(rewards)
        for sample in (-1, 0, 1)
    ]  # fmt: skip
    evaluation = Evaluation(tuple(attempts))
    return Measured(evaluation, evaluation.summary(None))


@pytest.mark.parametrize(
    ("before", "after", "verdict", "difference"),
    [
        ([0.1 * i for i in range(20)], [0.1 * i + 0.5 + 0.01 * (i % 2) for i in range(20)], "better", "+0.505"),
        ([float(i) for i in range(20)], [i - 3.0 - i % 2 for i in range(20)], "worse", "-3.5"),
        ([float(i % 5) for i in range(20)], [float((i + 2) % 5) for i in range(20)], "not distinguishable", "+0"),
        ([None, *[1.0] * 16], [7.0, *([1.5, 2.5] * 8)], "better", "+1"),
        ([0.0] * 4, [1.0] * 4, "not distinguishable", "+1"),
    ],
)
def test_where_success_is_unknown_the_conclusion_tests_the_paired_reward(before, after, verdict, difference):
    found = conclusion(rewarded(before), rewarded(after))
    assert found["conclusion"].startswith(f"{verdict}: a mean reward of ")
    assert f"paired difference {difference}, 95 % interval" in found["conclusion"]
    assert found["conclusion"].endswith("; success is unknown")
    assert found["vs_base"].keys() == {"reward_delta", "reward_ci95", "p_value", "conclusion"}
    assert found["vs_base"]["reward_delta"] == pytest.approx(float(difference))


def test_a_problem_with_a_higher_reward_is_shown_with_both_attempts():
    problem = Demonstration(Problem("p00", "How?"), "How?")
    shown = before_and_after(rewarded([0.1]).evaluation, rewarded([0.2]).evaluation, [problem])
    assert shown == "How?\n  before: reply 0.1\n  after:  reply 0.2\n"
    assert before_and_after(rewarded([0.2]).evaluation, rewarded([0.1]).evaluation, [problem]) == ""
    assert before_and_after(rewarded([None]).evaluation, rewarded([0.1]).evaluation, [problem]) == ""


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        (
            SOLVED,
            "solved 25.0 % [10.0, 50.0] of 8 problems by greedy decoding, 50.0 % [40.0, 60.0] of sampled attempts",
        ),
        (RETURNED, "a mean return of -4.00 [-5.00, -3.00] in 4.2 turns, at 8 problems"),
        (REWARDED, "a mean reward of -0.125 [-0.25, 0.0625] at 8 problems; success is unknown"),
        (UNGRADED, "50.0 % of attempts stopped by themselves; success is unknown"),
    ],
)
def test_how_well_one_policy_does_is_one_line(summary, expected):
    assert level(Measured(Evaluation(()), summary)) == expected


def test_a_bar_in_a_cell_does_not_add_a_column():
    table = markdown_table(["", "a|b"], [["c|d", "1"], ["e", "2"]])
    assert table == "|  | a\\|b |\n| --- | ---: |\n| c\\|d | 1 |\n| e | 2 |"


def test_one_problem_that_only_the_later_policy_solves_is_shown_in_full():
    demonstrations = [
        Demonstration(problem, problem.prompt) for problem in (Problem(f"p{i}", f"Q{i}") for i in range(4))
    ]
    shown = before_and_after(evaluated(solved=1, answer="a\nb"), evaluated(solved=2, answer="c"), demonstrations)
    assert shown == "Q1\n  before: a\n          b\n  after:  c\n"
    assert before_and_after(evaluated(solved=2), evaluated(solved=2), demonstrations) == ""


def test_a_conversation_is_shown_with_its_observations_in_brackets():
    demonstrations = [Demonstration(Problem("p0", [{"role": "user", "content": "Walk."}]), "Walk.")]
    messages = [
        {"role": "assistant", "content": "N"}, {"role": "user", "content": "2 left"},
        {"role": "assistant", "content": "E"},
    ]  # fmt: skip
    worse, better = (evaluated(solved=4, messages=messages, graded=True, **{"return": r}) for r in (-3.0, -1.0))
    assert before_and_after(worse, better, demonstrations) == "Walk.\n  before: N [2 left] E\n  after:  N [2 left] E\n"
