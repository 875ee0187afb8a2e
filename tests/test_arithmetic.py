"""The embedded problems: splits that cannot overlap, items that never change, solutions whose every step is right."""

import math
import re

import pytest

from bcft.problems.arithmetic import CARRIES, FORGETS, STEPS, Sum, check_steps, items, problem
from bcft.types import problem_id

WORKED = Sum((47, 35, -36, 21))
RIGHT = "7+5=12, 4+3+1=8: 82\n12-6=6, 8-3-1=4: 46\n6+1=7, 4+2=6: 67\n#### 67"


def final_answer(completion: str) -> str:
    return completion.rpartition("#### ")[2]


def sum_of(prompt: str) -> Sum:
    return Sum(tuple(int(sign + number) for sign, number in re.findall(r"([+-]?) ?(\d\d)", prompt)))


def test_the_example_of_the_module_is_worked_out_as_a_person_would() -> None:
    assert WORKED.prompt == "Work out 47 + 35 - 36 + 21."
    assert WORKED.carries == [1, -1, 0]
    assert WORKED.solution() == RIGHT
    assert WORKED.answer == "67"


def test_a_forgotten_carry_makes_the_result_ten_too_small_and_what_follows_goes_on_from_it() -> None:
    wrong = "7+5=12, 4+3=7: 72\n12-6=6, 7-3-1=3: 36\n6+1=7, 3+2=5: 57\n#### 57"
    assert WORKED.solution([True, False, False]) == wrong


def test_a_forgotten_carry_and_a_forgotten_borrow_cancel() -> None:
    cancelled = WORKED.solution([True, True, False])
    assert final_answer(cancelled) == WORKED.answer
    assert not check_steps(WORKED.prompt, cancelled)


def test_forgetting_where_nothing_is_carried_changes_nothing() -> None:
    assert WORKED.solution([False, False, True]) == RIGHT


@pytest.mark.parametrize("level", ["standard", "harder"])
def test_every_step_of_an_expert_is_right_and_leads_to_the_answer(level) -> None:
    for row in items("train", 2000, level=level):
        assert check_steps(row["prompt"], row["completion"])
        assert final_answer(row["completion"]) == row["answer"]
        assert eval(row["prompt"].removeprefix("Work out ").rstrip(".")) == int(row["answer"])


@pytest.mark.parametrize("level", ["standard", "harder"])
def test_no_number_has_more_or_fewer_than_two_digits_whatever_is_forgotten(level) -> None:
    for row in items("train", 500, level=level):
        for pattern in range(2**STEPS):
            completion = sum_of(row["prompt"]).solution([bool(pattern >> step & 1) for step in range(STEPS)])
            results = re.findall(r"(?:: |#### )(.*)", completion)
            assert len(results) == STEPS + 1
            assert all(re.fullmatch("[1-9][0-9]", result) for result in results), completion
            assert len(completion) <= 70


@pytest.mark.parametrize("level", ["standard", "harder"])
def test_the_levels_differ_in_how_many_steps_carry(level) -> None:
    counts = {sum(map(abs, sum_of(row["prompt"]).carries)) for row in items("test", 100, level=level)}
    assert counts == set(CARRIES[level])


def test_the_apprentice_is_right_as_often_as_chance_says() -> None:
    rows = items("train", 3000, demonstrator="apprentice")
    expected = [probability_right(sum_of(row["prompt"]).carries) for row in rows]
    right = sum(final_answer(row["completion"]) == row["answer"] for row in rows)
    spread = math.sqrt(sum(p * (1 - p) for p in expected))
    assert abs(right - sum(expected)) < 4 * spread
    all_remembered = sum(check_steps(row["prompt"], row["completion"]) for row in rows)
    assert 0 < all_remembered < right, "some of the right answers come from two forgotten steps that cancel"


def probability_right(carries: list[int]) -> float:
    """Sum over all patterns of forgetting in which as many carries as borrows are forgotten."""
    events = [carry for carry in carries if carry]
    total = 0.0
    for pattern in range(2 ** len(events)):
        forgotten = [bool(pattern >> i & 1) for i in range(len(events))]
        if sum(e for e, f in zip(events, forgotten, strict=True) if f) == 0:
            total += math.prod(FORGETS if f else 1 - FORGETS for f in forgotten)
    return total


def test_expert_and_apprentice_work_out_the_same_problems() -> None:
    expert, apprentice = (items("train", 50, demonstrator=d) for d in ("expert", "apprentice"))
    assert [(r["prompt"], r["answer"]) for r in expert] == [(r["prompt"], r["answer"]) for r in apprentice]


def test_fewer_items_are_the_first_of_more() -> None:
    assert items("dev", 20, demonstrator="apprentice") == items("dev", 60, demonstrator="apprentice")[:20]


def test_items_are_distinct() -> None:
    prompts = [row["prompt"] for row in items("train", 5000)]
    assert len(set(prompts)) == 5000


def test_no_problem_of_one_split_is_in_another_whatever_the_seed() -> None:
    splits = [{row["prompt"] for seed in (0, 1) for row in items(s, 300, seed=seed)} for s in ("train", "dev", "test")]
    assert len(set().union(*splits)) == sum(map(len, splits))


@pytest.mark.parametrize(("split", "low", "high"), [("test", 0.0, 0.05), ("dev", 0.05, 0.1), ("train", 0.1, 1.0)])
def test_the_hash_of_its_text_tells_the_split_of_a_problem(split, low, high) -> None:
    for index in range(50):
        assert low <= int(problem_id(problem(index, split=split).prompt), 16) / 16**16 < high


def test_another_seed_gives_other_problems() -> None:
    assert items("test", 20, seed=1) != items("test", 20, seed=0)


def test_items_are_the_same_in_every_version_of_python() -> None:
    assert problem(7, split="test", seed=3).prompt == "Work out 35 - 21 + 33 + 26."
    completion = items("train", 3, demonstrator="apprentice")[2]["completion"]
    assert completion == "0+1=1, 5+4=9: 91\n11-4=7, 9-1=8: 87\n7-0=7, 8-5=3: 37\n#### 37"


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "#### 67",
        RIGHT + "\n",
        RIGHT + "\n#### 67",
        RIGHT.replace("#### 67", "#### 68"),
        RIGHT.replace("12-6=6", "12-6=7"),
        RIGHT.replace("4+3+1=8", "4+4=8"),
        RIGHT.replace(": 46", ": 47"),
        RIGHT.splitlines()[0],
        "67",
        "????",
    ],
)
def test_a_solution_with_anything_wrong_missing_or_added_is_not_right_in_every_step(completion) -> None:
    assert not check_steps(WORKED.prompt, completion)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Work out 47 + 35 - 36.",
        "Work out 47 + 35 - 36 + 21",
        "Work out 47+35-36+21.",
        "Work out 99 + 99 - 99 + 10.",
    ],
)
def test_no_steps_are_right_for_a_prompt_that_is_none_of_the_problems(prompt) -> None:
    assert not check_steps(prompt, RIGHT)


def test_right_steps_of_another_problem_are_not_right_here() -> None:
    assert not check_steps("Work out 47 + 35 - 36 + 22.", RIGHT)
