"""Summaries and comparisons of evaluations, by hand."""

import pytest

from bcft.evaluation.results import Evaluation, compare
from bcft.rewards.base import Answers
from bcft.rewards.math_answers import math_reward


def marked(table):
    """Return an evaluation from `{problem: marks}`, greedy first: + is solved, - is not."""
    return Evaluation(
        tuple(
            {"problem_id": key, "sample": i - 1, "completion": "7" if c == "+" else "8", "stop": "stop_token",
             "success": "yes" if c == "+" else "no"}
            for key, marks in table.items()
            for i, c in enumerate(marks)
        )
    )  # fmt: skip


@pytest.mark.parametrize("answers", [None, math_reward.answers])
def test_a_summary_by_hand(answers):
    summary = marked({"a": "+++-+", "b": "-+---", "c": "-----"}).summary(answers)
    assert summary["n"] == 3
    assert summary["greedy"]["success"] == pytest.approx(1 / 3)
    sampled = summary["sampled"]
    assert (sampled["n"], sampled["k"]) == (4, 2)
    assert sampled["pass@1"] == pytest.approx((3 / 4 + 1 / 4 + 0) / 3)
    # pass@2 of 4: 1 - C(1,2)/C(4,2) = 1; 1 - C(3,2)/C(4,2) = 1/2; 0.
    assert sampled["pass@k"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    # The first two samples vote: + + is right; + - is a tie, to the earlier, right; - - is wrong.
    assert sampled["maj@k"] == pytest.approx(2 / 3)


def replies(*texts):
    """Return an evaluation of one problem, greedy reply first; a text with an 8 in it is right."""
    return Evaluation(
        tuple(
            {"problem_id": "p", "sample": i - 1, "completion": text, "stop": "stop_token",
             "success": "yes" if "8" in text else "no"}
            for i, text in enumerate(texts)
        )
    )  # fmt: skip


def test_maj_at_k_counts_votes_by_the_answers_of_the_success_function_and_else_by_equal_texts():
    """Of six samples the first three vote."""
    evaluation = replies("9", "9", "it is 8", "so 8.0", "8", "8", "8")
    last_word = Answers(extract=lambda text: text.split()[-1], key=str.upper)
    assert evaluation.summary(math_reward.answers)["sampled"]["maj@k"] == 1.0  # 9, 8 and 8
    assert evaluation.summary(last_word)["sampled"]["maj@k"] == 0.0  # 9, 8 and 8.0: a tie, to the first
    assert evaluation.summary(None)["sampled"]["maj@k"] == 0.0
    assert replies("9", "9", "it is 8", " it is 8\n", "9", "9", "9").summary(None)["sampled"]["maj@k"] == 1.0


def test_revision_counts_the_attempts_that_had_both_turns():
    """An environment that failed once or a context that was full does not remove the figure of the others."""
    both = [("no", "yes"), ("yes", "yes"), ("yes", "no")]
    lines = [
        {"problem_id": f"p{i}", "sample": -1, "turns": 2, "first": first, "success": last, "stop": "stop_token"}
        for i, (first, last) in enumerate(both)
    ]
    for more in ({"turns": 1, "success": "unknown"}, {"turns": 1, "stop": "context_full"}, {"success": "unknown"}):
        lines.append({**lines[0], "problem_id": f"q{len(lines)}", **more})
    evaluation = Evaluation(tuple(line | {"graded": False} for line in lines))
    expected = {"n": 3, "first": 2 / 3, "last": 2 / 3, "wrong_to_right": 1, "right_to_wrong": 1}
    assert evaluation.summary(None)["revision"] == expected


def test_comparison_is_paired_and_its_sign_is_that_of_the_other_minus_the_base():
    worse, better = marked(dict.fromkeys("abcdefgh", "-+---")), marked(dict.fromkeys("abcdefgh", "+++++"))
    comparison = compare(worse, better)
    assert comparison["delta"] == pytest.approx(0.75)
    assert comparison["conclusion"] == "better"
    assert compare(better, worse)["conclusion"] == "worse"
    assert compare(better, better)["conclusion"] == "not_distinguishable"
    # All eight greedy answers changed to right: two-sided exact McNemar is 2 / 2^8.
    assert comparison["greedy_p_value"] == pytest.approx(2 / 256)
