"""Forms of references and of replies: what each pair is graded as, and that every form is its own solution."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bcft.rewards import math_answers
from bcft.rewards.math_answers import extract_answer, math_reward

HERE = Path(__file__).parent
VERDICTS = {"1": 1.0, "0": 0.0, "-": None}


def table() -> dict[str, list[tuple[float | None, str, str]]]:
    """Read the table: heading -> its (verdict, reference, reply)."""
    groups: dict[str, list[tuple[float | None, str, str]]] = {}
    first, *lines = (HERE / "math_answers_table.txt").read_text(encoding="utf-8").splitlines()
    assert first.startswith("# verdict")
    for line in lines:
        if line.startswith("#"):
            rows = groups.setdefault(line[2:].rstrip("."), [])
        else:
            verdict, reference, reply = line.replace("⏎", "\n").split(" ‖ ")
            rows.append((VERDICTS[verdict], reference, reply))
    return groups


TABLE = table()
HEAVY = {
    "Small numbers, decimals and constants: exact",
    "Radicals, powers, logarithms, trigonometry, complex numbers",
    "Expressions with variables",
    "Equations and assignments",
    "Inequalities and intervals",
    "Intervals and the inequalities that say the same, whichever is the reference",
    "Tuples, sets and lists",
    "Matrices",
    "Next to e^{i\\pi} the letter i is the imaginary unit",
}
"""Headings whose rows mostly need the sandbox."""
FORMS = (HERE / "math_answers_forms.txt").read_text(encoding="utf-8").splitlines()
PLACES = {
    "bare": "{}",
    "in a box": r"So it is \boxed{{{}}}.",
    "in math mode": "So it is ${}$.",
    "in display mode": "So it is\n\\[\n{}\n\\]",
    "after answer is": "The answer is {}.",
    "after answer is, in math mode": "The final answer is ${}$. I hope it is correct.",
    "after hashes": "#### {}",
    "in a tag": "<answer>{}</answer>",
    "behind a thought, before a stop token": "<think>\n\\boxed{{9}}\n</think>\n\n\\boxed{{{}}}<|im_end|>",
}


@pytest.fixture
def no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("the sandbox was used")

    monkeypatch.setattr(math_answers, "default_sandbox", refuse)


def grade(rows: Sequence[tuple[str, str]], **options: Any) -> list[float | None]:
    """Grade (reference, reply) rows in one call: the sandbox works on several at once."""
    return math_reward([""] * len(rows), [reply for _, reply in rows], answer=[gold for gold, _ in rows], **options)


def wrongly_graded(rows: Sequence[tuple[float | None, str, str]]) -> list[tuple[float | None, str, str]]:
    graded = grade([(reference, reply) for _, reference, reply in rows])
    return [row for row, reward in zip(rows, graded, strict=True) if row[0] != reward]


@pytest.mark.parametrize(
    "heading",
    [pytest.param(heading, marks=pytest.mark.slow if heading in HEAVY else (), id=heading) for heading in TABLE],
)
def test_the_table(heading: str) -> None:
    assert wrongly_graded(TABLE[heading]) == []


def test_a_sample_of_the_headings_that_are_slow() -> None:
    assert set(TABLE) > HEAVY
    assert wrongly_graded([row for heading in sorted(HEAVY) for row in TABLE[heading][::15]]) == []


def test_the_table_holds_enough_of_both_kinds() -> None:
    verdicts = [verdict for rows in TABLE.values() for verdict, _, _ in rows]
    assert len(verdicts) >= 600
    assert len(verdicts) / 3 < verdicts.count(0.0) < len(verdicts) / 3 * 2
    assert len({row[1:] for rows in TABLE.values() for row in rows}) == len(verdicts)
    assert len(set(FORMS)) == len(FORMS) >= 106


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.usefixtures("no_sandbox")
def test_every_usual_form_is_its_own_solution(place: str) -> None:
    graded = grade([(form, PLACES[place].format(form)) for form in FORMS])
    assert [form for form, reward in zip(FORMS, graded, strict=True) if reward != 1.0] == []


@pytest.mark.parametrize("reply", ["", "I do not know.", r"\boxed{", r"\boxed{}", "<answer></answer>", "<think>42"])
@pytest.mark.usefixtures("no_sandbox")
def test_no_usual_form_is_solved_by_saying_nothing(reply: str) -> None:
    assert grade([(form, reply) for form in FORMS]) == [0.0] * len(FORMS)


THOUGHTS = ["<think>{}</think>\n", "{}</think>", "<thought>\n{}\n</thought>\n\n", "<reasoning>{}</reasoning>"]
THOUGHTS += ["<think>{0}</think>{0}<think>{0}</think>", "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"]
ENDS = ["<|im_end|>", "</s>", "<|eot_id|>\n", "<｜end▁of▁sentence｜>", "<|im_end|>\n<|im_start|>user\n\\boxed{6}"]


def plain_replies() -> Iterator[str]:
    return (reply for rows in TABLE.values() for _, _, reply in rows if "<" not in reply)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("thought", THOUGHTS)
def test_neither_a_thought_nor_what_follows_a_stop_token_changes_the_answer(thought: str, end: str) -> None:
    for reply in plain_replies():
        before = thought.format(r"\boxed{5} The answer is 4. #### 3")
        before += "<|channel|>final<|message|>" if "channel" in thought else ""
        assert extract_answer(before + reply + end) == extract_answer(reply)


@pytest.mark.parametrize(
    "opened", ["<think>", "<thought>", "<reasoning>", "<thinking>", "<|channel|>analysis<|message|>"]
)
def test_an_unclosed_thought_states_nothing(opened: str) -> None:
    assert {extract_answer(f"7 is it.\n{opened}{reply}") for reply in plain_replies()} == {""}


PERCENT = [
    # reference, reply, by default, percent_as_number
    ("60", "60%", 0.0, 1.0),
    ("60%", "60", 0.0, 1.0),
    (r"60\%", r"\boxed{60}", 0.0, 1.0),
    (r"60\%", r"\boxed{60\%}", 1.0, 1.0),
    ("0.6", "60%", 1.0, 0.0),
    ("60%", r"\boxed{\frac{3}{5}}", 1.0, 0.0),
    ("60%", "61%", 0.0, 0.0),
    ("61", "60 percent", 0.0, 0.0),
    (r"\sqrt{2}\%", r"\boxed{\sqrt{2}}", 0.0, 1.0),
    (r"x\%", r"\boxed{x}", 0.0, 1.0),
]


def test_a_percentage_is_its_number_where_the_option_says_so() -> None:
    rows = [(reference, reply) for reference, reply, _, _ in PERCENT]
    assert grade(rows) == [by_default for _, _, by_default, _ in PERCENT]
    assert grade(rows, percent_as_number=True) == [as_number for _, _, _, as_number in PERCENT]


CONSTANTS = {r"\pi": "3.141592653589793238462643383279502884", r"\sqrt{2}": "1.414213562373095048801688724209698078"}


@pytest.mark.parametrize("constant", CONSTANTS)
def test_no_number_of_digits_makes_an_approximation_exact(constant: str) -> None:
    digits = CONSTANTS[constant]
    rows = [(constant, rf"\boxed{{{digits[:length]}}}") for length in (4, 8, 17, 38)]
    assert grade(rows) == [0.0] * len(rows)
    assert grade([(reply, constant) for constant, reply in rows]) == [0.0] * len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("form", [r"{}\times 10^{{-{}}}", r"\frac{{{}}}{{10^{{{}}}}}", r"{}\pi\cdot 10^{{-{}}}"])
def test_numbers_are_compared_relatively_however_small(form: str) -> None:
    for exponent in (5, 20, 200):
        same, other = form.format(7, exponent), form.format(8, exponent)
        shifted = form.format(70, exponent + 1)
        assert grade([(same, rf"\boxed{{{shifted}}}"), (same, rf"\boxed{{{other}}}")]) == [1.0, 0.0]
