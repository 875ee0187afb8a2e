"""Which answer a text states, and which answers are right: mostly one fact a line."""

import inspect
import json
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcft.errors import DataError
from bcft.rewards import math_answers
from bcft.rewards.base import answers_of
from bcft.rewards.formulas import Verdict
from bcft.rewards.math_answers import answer_key, extract_answer, math_reward

LAW = settings(max_examples=60, deadline=None)
GSM8K = Path(__file__).parents[1] / "data" / "gsm8k_50.jsonl"
ELSEWHERE = os.environ.get("BCFT_TEST_DATA", "")


def score(reply: str | Sequence[Any], reference: Any) -> float | None:
    return math_reward(["What is it?"], [reply], answer=[reference])[0]


@pytest.fixture
def no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain answers are compared in this process: the sandbox must not be used."""

    def refuse() -> None:
        raise AssertionError("the sandbox was used")

    monkeypatch.setattr(math_answers, "default_sandbox", refuse)


# Replies that the code of the origin graded wrongly, by the mistake.
ORIGIN = {
    "a period behind the number": ("The answer is 7.", "7", 1.0),
    "a number after the answer": ("The answer is 7. I checked it 3 times.", "7", 1.0),
    "a fraction in LaTeX": (r"So it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}", 1.0),
    "a fraction and a decimal": ("The answer is 1/2.", "0.5", 1.0),
    "a decimal and an integer": ("The answer is 12.0", "12", 1.0),
    "thousands": ("She has 1,000 apples.", "1000", 1.0),
    "a polynomial": ("The answer is $x^2+1$.", "x^2+1", 1.0),
    "a word": (r"It is \boxed{\text{even}}.", r"\text{even}", 1.0),
    "a pair": ("The answer is (1, 2).", "(1,2)", 1.0),
    "a sign with a blank": ("The answer is - 3.", "-3", 1.0),
    "a part of the reference": ("The answer is 1.", r"\frac{1}{2}", 0.0),
    "nothing, and the problem ends with the reference": ("", "7", 0.0),
    "nothing but the problem": ("Tom has 7 apples and eats 3. How many are left?", "4", 0.0),
    "a number on the way": ("3 + 4 = 7, and twice that is 14.", "7", 0.0),
    "any reference that is no number": (r"\boxed{x + y}", "y+x", 1.0),
}


@pytest.mark.parametrize(("reply", "reference", "reward"), ORIGIN.values(), ids=ORIGIN)
def test_the_mistakes_of_the_origin_are_not_made(reply: str, reference: str, reward: float) -> None:
    assert score(reply, reference) == reward


@pytest.mark.parametrize(
    ("reply", "reference"),
    [
        ("18", 18),
        ("18.", 18.0),
        ("0.1", 0.1),
        ("18", "The sum is 9 + 9.\n#### 18"),
        ("She has 9 + 9 = <<9+9=18>>18.\n#### 18", "#### 18"),
        ("#### 1,234", "1234"),
        ("#### $1,234.50", "1234.5"),
        ("The answer is $18.", "18"),
        ("The answer is $18 per day", "18"),
        ("The answer is: **18** dollars.", "18"),
        ("**Answer:** 18", "18"),
        ("ANSWER = 18", "18"),
        ("Final Answer:\n\n$$18$$", "18"),
        ("The final answer is:\n\\[\n18\n\\]", "18"),
        (r"The final answer is $\boxed{18}$. I hope it is correct.", "18"),
        ("The final answer is $18$. I hope it is correct.", "18"),
        ("The correct answer is therefore -$5.", "-5"),
        ("the answer is −5", "-5"),
        ("The answer is 10 - 3 = 7 apples.", "7"),
        ("The answer is 42 because 40 + 2 = 42, and 3 is not enough.", "42"),
        ("The answer is 42, since 7 > 3.", "42"),
        (r"\boxed{18\text{ dollars}}", "18"),
        (r"\boxed{\$18.00}", "18"),
        (r"\boxed{1{,}234}", "1234"),
        (r"\boxed{1\frac{1}{2}}", "1.5"),
        (r"\boxed{\dfrac{3}{4}}", "0.75"),
        (r"\boxed{-\frac12}", "-0.5"),
        ("\\boxed{5} no, \\boxed{7}", "7"),
        ("\\boxed{5}. Wait, the answer is 7.", "7"),
        ("The answer is 5. Wait.\n#### 7", "7"),
        ("So x = 7", "7"),
        ("It is **7**", "7"),
        ("It takes 1 1/2 hours", "3/2"),
        ("It is 2.5 million people", "2500000"),
        ("It costs $118 000.", "118000"),
        ("She needs 7 dozen eggs", "7"),
        ("The answer is 60%.", "60%"),
        (r"The answer is 60\%.", "0.6"),
        ("The answer is 60 percent.", "3/5"),
        ("1e3", "1000"),
        ("The answer is 5 hours", "5 hour"),
        ("The answer is Even.", r"\text{even}"),
        ("The answer is no.", "No"),
        ("It is \\boxed{New York}", "new  york"),
        ("#### Step 1: add\n3 + 4 = 7", "7"),
        ("3 + 4 = 7. I hope the answer is correct.", "7"),
    ],
)
@pytest.mark.usefixtures("no_sandbox")
def test_right(reply: str, reference: Any) -> None:
    assert score(reply, reference) == 1.0


@pytest.mark.parametrize(
    ("reply", "reference"),
    [
        ("25", "5"),
        ("5", "25"),
        ("5", "-5"),
        ("0.333", "1/3"),
        ("60%", "60"),
        ("60", "60%"),
        ("The answer is 5 million.", "5"),
        ("The answer is 5 hours", "5 minutes"),
        ("", "5"),
        ("   \n", "5"),
        ("I do not know.", "5"),
        ("\\boxed{7}, or rather \\boxed{5}", "7"),
        ("The answer is 7. Wait, the answer is 5.", "7"),
        ("\\boxed{1", "1"),  # truncated within 12
        ("The answer is 1. So \\boxed{1", "1"),
        ("The answer is even", "odd"),
        ("The answer is seven", "7"),
        ("the answer is 7", "even"),
        ("12,34", "34"),
        ("The answer is 2 and a half.", "2"),
        ("1/0", "0"),
    ],
)
def test_wrong(reply: str, reference: Any) -> None:
    assert score(reply, reference) == 0.0


@pytest.mark.parametrize(
    ("reply", "reference", "reward"),
    [
        (r"\boxed{\sqrt{4}}", "2", 1.0),
        (r"\boxed{x = 7}", "7", 1.0),
        (r"\boxed{3\times10^2}", "300", 1.0),
        (r"\boxed{5\text{ cm}}", "5", 1.0),
        (r"It is 12km.", "12", 1.0),
        (r"Hence it equals $2\sqrt{3}$.", "3", 0.0),
        (r"Hence it equals $2\sqrt{3}$.", r"\sqrt{12}", 1.0),
        ("The answer is 3 or 5.", "5", 0.0),
        ("The answer is 3 or 5.", "3", 0.0),
        ("The answer is 3 apples and 4 pears.", "4", 0.0),
        (r"\boxed{\frac{\pi}{2}}", r"$\frac{\pi}{2}$", 1.0),
        (r"so $\text{even}$", "even", 1.0),
        ("The answer is B.", "(B)", 1.0),
        ("The answer is A.", "B", 0.0),
        (r"\boxed{yx}", "xy", 1.0),
        ("", "x^2", 0.0),
        ("x", "x^2", 0.0),
        (r"\boxed{x^2", "x^2", 0.0),
    ],
)
def test_answers_that_are_not_plain_go_to_math_verify(reply: str, reference: str, reward: float) -> None:
    assert score(reply, reference) == reward


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", ""),
        ("no number", ""),
        ("12.", "12"),
        ("so 1,234,567 apples", "1,234,567"),
        ("first 3, then 4", "4"),
        ("so 10-3=7", "7"),
        ("so 10-3", "10-3"),
        ("so 2**3", "2**3"),
        ("at 3:30", "3:30"),
        ("on the 2nd", "2nd"),
        ("= -3", "-3"),
        ("- 3", "- 3"),
        (r"so $\frac{3}{4}$.", r"\frac{3}{4}"),
        (r"so $2\sqrt{3}$.", r"2\sqrt{3}"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{} 7", "7"),
        (r"\boxed{7} and \boxed{8", ""),
        ("the answer is (x, y), where x > 1", "(x, y)"),
        ("7\nAnswer:", "7"),
        ("#### Answer: 18", "18"),
        ("##### 5\n7", "7"),
    ],
)
def test_the_last_stated_answer_is_extracted(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


NUMBERS = st.fractions(max_denominator=10**6).filter(lambda value: abs(value) < 10**30)
WRITTEN = {
    "as a fraction": lambda value: f"{value.numerator}/{value.denominator}",
    "in LaTeX": lambda value: rf"\frac{{{value.numerator}}}{{{value.denominator}}}",
    "with a sign in front": lambda value: (
        rf"{'-' if value < 0 else ''}\dfrac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    ),
}
PLACED = ["{}", "\\boxed{{{}}}", "The answer is {}.", "#### {}", "so it is {}", "**Answer:** ${}$", "= {}"]


@LAW
@given(NUMBERS, st.sampled_from(sorted(WRITTEN)), st.sampled_from(PLACED))
def test_a_number_is_read_exactly_in_every_place(value: Fraction, how: str, where: str) -> None:
    reply = where.format(WRITTEN[how](value))
    assert score(reply, str(value)) == 1.0
    assert score(reply, str(value + Fraction(1, 10**9))) == 0.0


@LAW
@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_separators_and_trailing_zeros_do_not_matter(value: Any) -> None:
    assert score(f"The answer is {value:,}00.", str(value)) == 1.0
    assert answer_key(f"${value:,}0") == answer_key(str(value))


def test_votes_are_counted_by_value() -> None:
    assert len({answer_key(answer) for answer in ("7", "7.0", "$7", "7 apples", r"\frac{14}{2}")}) == 1
    assert answer_key(r"\text{Even}") == answer_key("even")
    assert answer_key(" x+1 ") == "x+1"
    assert answer_key("") == ""


def test_the_last_message_of_the_assistant_is_graded() -> None:
    turns = [
        {"role": "assistant", "content": "The answer is 5."},
        {"role": "user", "content": "Try again. The answer is 6."},
        {"role": "assistant", "content": [{"type": "text", "text": "The answer is 7."}]},
        {"role": "tool", "content": "8"},
    ]
    assert [score(turns, gold) for gold in ("5", "6", "7", "8")] == [0.0, 0.0, 1.0, 0.0]
    assert score([{"content": "7"}], "7") == 1.0
    nothing: list[list[Any]] = [[], [{}], [{"role": "assistant", "content": None}]]
    assert [score(reply, "7") for reply in nothing] == [0.0] * 3


def test_references_come_from_the_column_that_exists() -> None:
    assert math_reward([""], ["7"], solution=[r"so \boxed{7}"]) == [1.0]
    assert math_reward([""], ["7"], ground_truth=["7"], other=["8"]) == [1.0]
    assert math_reward([""], ["7"], answer=["7"], solution=["a long story of 8"]) == [1.0]
    with pytest.raises(DataError, match="answer, solution or ground_truth"):
        math_reward([""], ["7"], gold=["7"])
    with pytest.raises(DataError, match="2 reference answers for 1 completions"):
        math_reward([""], ["7"], answer=["7", "8"])
    with pytest.raises(DataError, match="not list"):
        math_reward([""], ["7"], answer=[["7"]])


def test_the_signature_is_trls() -> None:
    extra: dict[str, Any] = {"completion_ids": [[1]], "trainer_state": None, "log_extra": None, "log_metric": None}
    assert math_reward(prompts=[""], completions=["7"], **extra, answer=["7"], question=["3 + 4?"]) == [1.0]
    assert list(inspect.signature(math_reward).parameters)[:3] == ["prompts", "completions", "answer"]


@pytest.mark.usefixtures("no_sandbox")
def test_without_a_reference_every_answer_is_ungraded() -> None:
    assert math_reward([""] * 4, ["7", "", "7", "7"], answer=[None, "", float("nan"), r"\boxed{7"]) == [None] * 4


def test_answers_that_the_sandbox_gave_up_on_are_ungraded_and_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts: list[Verdict] = ["right", "wrong", "unparsable", "timeout", "memory", "died", "error"]
    received: list[tuple[str, str]] = []

    class Scripted:
        def verify(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
            received.extend(pairs)
            return verdicts

    monkeypatch.setattr(math_answers, "default_sandbox", Scripted)
    replies = [rf"\boxed{{x^{number}}}" for number in range(7)]
    graded = math_reward([""] * 15, ["7", *replies, *replies], answer=["7"] + ["x"] * 14)
    assert graded == [1.0, *[1.0, 0.0, None, None, None, None, None] * 2]
    assert len(received) == 7, "the same answer to the same problem is compared once"


BLOCKS = ["9", "1 ", "1,", "1,111", "\\boxed{", "\\boxed{}", "{", "answer is ", "answer:", "answer is 1/", "#### ", "$"]
BLOCKS += [
    "**",
    "\\frac{1}",
    "\\frac{",
    "\\text{",
    " ",
    "\n",
    "-",
    ".",
    "a",
    "aaa ",
    "answer is a, b ",
    "\x00",
    "\ud800",
]
BLOCKS += [
    "<answer>",
    "<think></think>",
    "</think>",
    "</s>",
    "<<",
    "\\boxed{1}, ",
    "\\boxed{1}" + " " * 70,
    "$a$ ",
    "$ ",
    "\\(",
    "0.1",
]
BLOCKS += ["\\begin{pmatrix}", "\\overline{", "_{", "9:", "\\sin 9", "=", "x=", "\\text{ and }", "±", "not "]


@pytest.mark.parametrize("block", BLOCKS, ids=repr)
@pytest.mark.usefixtures("no_sandbox")
def test_a_megabyte_is_read_in_linear_time(block: str) -> None:
    """A quadratic expression would need hours here, so this test needs no clock."""
    text = block * (1_000_000 // len(block))
    extract_answer(text)
    answer_key(text)
    assert score(text + "\nThe answer is 7.", "7") == 1.0
    assert score("7", text + "#### 7") == 1.0


class Refusing:
    """A sandbox in which every answer is wrong."""

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        return ["wrong"] * len(pairs)


HEAP = st.text() | st.lists(st.sampled_from([*BLOCKS, "}", "answer is ", "\\boxed{7}", "1/2", "7", " or "])).map(
    "".join
)


@LAW
@given(HEAP, HEAP)
def test_no_text_breaks_the_reward(reply: str, reference: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(math_answers, "default_sandbox", Refusing)
        assert score(reply, reference) in (0.0, 1.0, None)
        assert score("", reference) in (0.0, None), "no answer cannot be right"


def gsm8k(path: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]


def check_references(answers: list[str]) -> None:
    """Each reference is right for itself, and the next different one is wrong."""

    def different(index: int) -> Iterator[str]:
        number = answers[index].rsplit("#### ", 1)[1].replace(",", "")
        for other in answers[index + 1 :] + answers[:index]:
            if other.rsplit("#### ", 1)[1].replace(",", "") != number:
                yield other

    assert math_reward(answers, answers, answer=answers) == [1.0] * len(answers)
    others = [next(different(index)) for index in range(len(answers))]
    assert math_reward(answers, others, answer=answers) == [0.0] * len(answers)


@pytest.mark.usefixtures("no_sandbox")
def test_references_of_gsm8k_are_right_for_themselves_alone() -> None:
    answers = gsm8k(GSM8K)
    assert len(answers) == 50
    check_references(answers)


@pytest.mark.skipif(not ELSEWHERE, reason="set BCFT_TEST_DATA to a directory with gsm8k/train.jsonl and test.jsonl")
@pytest.mark.parametrize(("split", "rows"), [("train", 7473), ("test", 1319)])
@pytest.mark.usefixtures("no_sandbox")
def test_all_references_of_gsm8k_are_right_for_themselves_alone(split: str, rows: int) -> None:
    answers = gsm8k(Path(ELSEWHERE) / "gsm8k" / f"{split}.jsonl")
    assert len(answers) == rows
    check_references(answers)


def test_the_reward_says_how_it_reads_answers() -> None:
    answers = answers_of(math_reward)
    assert answers is not None
    assert answers.extract("First 5. The answer is $1,234.") == "1,234"
    assert answers.key("7.0") == answers.key("$7")
