"""The package's own environments: what they demonstrate is what they play, and their problems never mix."""

import pytest

from bcft.config.loader import load
from bcft.data.loading import load_splits
from bcft.environments import grid_walk, guess_number, twenty_questions
from bcft.environments.base import environment_factory
from bcft.environments.grid_walk import GridWalk
from bcft.environments.guess_number import GuessNumber
from bcft.environments.single_turn import SingleTurn
from bcft.environments.twenty_questions import TwentyQuestions
from bcft.errors import UsageError
from bcft.types import Problem, problem_id

ALL = [(grid_walk, GridWalk), (guess_number, GuessNumber), (twenty_questions, TwentyQuestions)]


@pytest.fixture(params=ALL, ids=[module.__name__.split(".")[-1] for module, _ in ALL])
def both(request):
    return request.param


def problem_of(item):
    columns = {key: value for key, value in item.items() if key not in ("prompt", "messages")}
    return Problem(problem_id(item["prompt"]), item["prompt"], columns)


def test_a_demonstration_is_what_the_environment_answers_to_its_actions(both):
    module, make = both
    for item in module.items("train", 200):
        environment = make()
        said = [{"role": "user", "content": environment.reset(problem_of(item), seed=0)}]
        done = False
        for message in item["messages"][1::2]:
            assert not done
            feedback = environment.step(message["content"])
            said += [message, {"role": "user", "content": feedback.observation}]
            done = feedback.done
        assert done
        assert feedback.success
        assert said[:-1] == item["messages"]


def test_splits_never_share_a_problem_and_fewer_items_are_the_first_of_more(both):
    module, _ = both
    found = {split: {item["prompt"] for item in module.items(split, 300)} for split in ("train", "dev", "test")}
    assert not found["train"] & (found["dev"] | found["test"])
    assert not found["dev"] & found["test"]
    assert module.items("train", 50) == module.items("train", 120)[:50]
    assert module.items("train", 50, seed=1) != module.items("train", 50)


def test_what_the_policy_reads_does_not_tell_what_is_hidden(both):
    module, make = both
    for item in module.items("train", 50):
        shown = make().reset(problem_of(item), seed=0)
        assert shown == item["messages"][0]["content"]
        assert shown != item["prompt"]
        if "secret" in item:
            assert str(item["secret"]) not in shown.replace(str(item.get("low")), "").replace(str(item.get("high")), "")


def test_text_of_any_kind_is_answered(both):
    module, make = both
    problem = problem_of(module.items("train", 1)[0])
    for said in ("", " ", "?" * 5000, "½ ²", "<|end|>", "9" * 400, "-3", "\x00"):
        environment = make()
        environment.reset(problem, seed=0)
        feedback = environment.step(said)
        assert feedback.observation
        assert feedback.reward in (-1.0, 0.0)


# Walking


def test_a_step_towards_the_goal_shortens_the_way_by_one_and_no_step_by_more():
    cells = [(column, row) for column in range(grid_walk.SIZE) for row in range(grid_walk.SIZE)]
    for start in cells:
        for goal in cells:
            ways = [
                grid_walk.shortest(grid_walk.step(start, d), goal) - grid_walk.shortest(start, goal) for d in "NESW"
            ]
            assert min(ways) == (-1 if start != goal else min(ways))
            assert set(ways) <= {-1, 0, 1}


def test_the_return_is_minus_the_steps_and_the_offset_is_all_there_is_to_know():
    item = grid_walk.items("train", 1)[0]
    environment = GridWalk()
    seen = environment.reset(problem_of(item), seed=0)
    taken = 0
    while seen != "here":
        letter = seen.split()[0][-1]
        feedback = environment.step({"N": "north", "E": " e", "S": "S", "W": "w."}[letter])
        seen, taken = feedback.observation, taken + 1
        assert feedback.reward == -1.0
    assert feedback.done
    assert taken == grid_walk.shortest(tuple(item["start"]), tuple(item["goal"]))


def test_what_is_no_direction_and_what_leads_off_the_grid_is_a_step_on_the_spot():
    assert grid_walk.step((0, 0), "S") == grid_walk.step((0, 0), "hello") == grid_walk.step((0, 0), "") == (0, 0)


def test_offsets_by_hand():
    assert grid_walk.offset((0, 3), (2, 4)) == "2E 1N"
    assert grid_walk.offset((5, 5), (5, 0)) == "5S"
    assert grid_walk.offset((1, 1), (1, 1)) == "here"


# Guessing


def test_every_number_is_a_secret_in_training_while_the_triples_are_held_out():
    rows = guess_number.items("train", 1000)
    assert {row["secret"] for row in rows} == set(range(guess_number.LEAST, guess_number.MOST + 1))
    assert all(row["low"] <= row["secret"] <= row["high"] for row in rows)


@pytest.mark.parametrize("secret", [10, 33, 59])
def test_halving_finds_every_secret_in_at_most_as_many_guesses_as_it_has_bits(secret):
    low, high, guesses = guess_number.LEAST, guess_number.MOST, 0
    while True:
        guess, guesses = (low + high) // 2, guesses + 1
        said = guess_number.answer(secret, f"I say {guess}.")
        if said == "correct":
            break
        low, high = (guess + 1, high) if said == "higher" else (low, guess - 1)
    assert guesses <= (guess_number.MOST - guess_number.LEAST + 1).bit_length()


# A recipe names one


def test_without_a_name_it_is_one_question_and_one_answer():
    assert environment_factory(None, {}) is SingleTurn


@pytest.mark.parametrize(
    ("path", "arguments", "expected"),
    [
        ("bcft.environments.nowhere.X", {}, "environment: cannot import"),
        ("bcft.environments.grid_walk.Walk", {}, "environment: module .* has no function 'Walk'"),
        ("bcft.environments.grid_walk.GridWalk", {"size": 9}, "environment_args: .* cannot be made with {'size': 9}"),
        ("collections.OrderedDict", {}, "environment: .* makes a OrderedDict, which has no reset and no step"),
    ],
)
def test_what_is_no_environment_is_told_with_its_key(path, arguments, expected):
    with pytest.raises(UsageError, match=expected):
        environment_factory(path, arguments)


def test_a_split_with_fewer_problems_than_asked_for_holds_out_those_it_has():
    keys = {"model_name_or_path": "bcft:tiny-init", "dataset_name": "bcft:grid-walk", "eval_test_problems": 300}
    found = load_splits(load("sft", None, keys))
    assert len({d.problem.id for d in found.test}) == len(found.test) < 200
