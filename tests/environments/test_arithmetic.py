"""The embedded problems: splits that cannot overlap, items that never change, solutions with every step right."""

import itertools
import math
import re

import pytest

from bcft.environments.arithmetic import CARRIES, FORGETS, STEPS, Sum, check_steps, items, problem
from bcft.types import problem_id

WORKED = Sum((47, 35, -36, 21))
RIGHT = "7+5=12, 4+3+1=8: 82\n12-6=6, 8-3-1=4: 46\n6+1=7, 4+2=6: 67\n#### 67"


def final_answer(completion: str) -> str:
    return completion.rpartition("#### ")[2]


def sum_of(prompt: str) -> Sum:
    return Sum(tuple(int(sign + number) for sign, number in re.findall(r"([+-]?) ?(\d\d)", prompt)))


def test_the_example_of_the_module_is_worked_out_as_a_person_would() -> None:
    assert WORKED.prompt == "Work out 47 + 35 - 36 + 21."
    assert WORKED.carries == 2
    assert WORKED.solution() == RIGHT
    assert WORKED.answer == "67"


def test_a_forgotten_carry_makes_the_result_ten_too_small_and_what_follows_goes_on_from_it() -> None:
    wrong = "7+5=12, 4+3=7: 72\n12-6=6, 7-3-1=3: 36\n6+1=7, 3+2=5: 57\n#### 57"
    assert WORKED.solution([True, False, False]) == wrong


def test_a_forgotten_borrow_takes_the_smaller_digit_from_the_larger() -> None:
    wrong = "7+5=12, 4+3+1=8: 82\n6-2=4, 8-3=5: 54\n4+1=5, 5+2=7: 75\n#### 75"
    assert WORKED.solution([False, True, False]) == wrong


def test_mistakes_can_cancel_and_the_steps_are_wrong_all_the_same() -> None:
    """47 + 35 = 72 is ten too small, 72 - 37 = 45 ten too large."""
    exercise = Sum((47, 35, -37, 21))
    cancelled = exercise.solution([True, True, False])
    assert final_answer(cancelled) == exercise.answer
    assert not check_steps(exercise.prompt, cancelled)


def test_forgetting_where_nothing_is_carried_changes_nothing() -> None:
    assert WORKED.solution([False, False, True]) == RIGHT


@pytest.mark.parametrize(("level", "n"), [("standard", 3000), ("harder", 300)])
def test_every_step_of_an_expert_is_right_and_leads_to_the_answer(level, n) -> None:
    for row in items("train", n, level=level):
        assert check_steps(row["prompt"], row["completion"])
        assert final_answer(row["completion"]) == row["answer"]
        assert eval(row["prompt"].removeprefix("Work out ").rstrip(".")) == int(row["answer"])


@pytest.mark.parametrize("level", ["standard", "harder"])
def test_no_number_has_more_or_fewer_than_two_digits_whatever_is_forgotten(level) -> None:
    for row in items("train", 300, level=level):
        for forgets in itertools.product((False, True), repeat=STEPS):
            completion = sum_of(row["prompt"]).solution(forgets)
            results = re.findall(r"(?:: |#### )(.*)", completion)
            assert len(results) == STEPS + 1
            assert all(re.fullmatch("[1-9][0-9]", result) for result in results), completion
            assert len(completion) <= 70


@pytest.mark.parametrize("level", ["standard", "harder"])
def test_the_levels_differ_in_how_many_steps_carry(level) -> None:
    counts = {sum_of(row["prompt"]).carries for row in items("dev", 60, level=level)}
    assert counts == set(CARRIES[level])


def test_the_apprentice_is_right_as_often_as_chance_says() -> None:
    rows = items("train", 3000, demonstrator="apprentice")
    expected = [probability_right(sum_of(row["prompt"])) for row in rows]
    right = sum(final_answer(row["completion"]) == row["answer"] for row in rows)
    spread = math.sqrt(sum(p * (1 - p) for p in expected))
    assert abs(right - sum(expected)) < 4 * spread
    right_throughout = sum(check_steps(row["prompt"], row["completion"]) for row in rows)
    assert 0 < right_throughout < right, "some of the right answers must come from mistakes that cancel"


def probability_right(exercise: Sum) -> float:
    """Add up the probabilities of all the ways to forget that lead to the right answer."""
    ways = itertools.product((False, True), repeat=STEPS)
    return sum(
        math.prod(FORGETS if forget else 1 - FORGETS for forget in forgets)
        for forgets in ways
        if final_answer(exercise.solution(forgets)) == exercise.answer
    )


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
def test_the_hash_of_its_text_decides_the_split_of_a_problem(split, low, high) -> None:
    for index in range(50):
        assert low <= int(problem_id(problem(index, split=split).prompt), 16) / 16**16 < high


def test_another_seed_gives_other_problems() -> None:
    assert items("test", 20, seed=1) != items("test", 20, seed=0)


def test_items_are_the_same_in_every_version_of_python() -> None:
    assert problem(7, split="test", seed=3).prompt == "Work out 35 - 21 + 33 + 26."
    completion = items("train", 3, demonstrator="apprentice")[2]["completion"]
    assert completion == "0+1=1, 5+4=9: 91\n4-1=3, 9-1=8: 83\n3-0=3, 8-5=3: 33\n#### 33"


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
