"""From trajectories to scores: rewards are summed, success is apart from reward, and references are checked first."""

from dataclasses import replace

import pytest

from bcft.config.schema import SelectionSettings
from bcft.errors import DataError, FaultError, UsageError
from bcft.rewards import math_reward
from bcft.rewards.base import Answers
from bcft.selection.scoring import (
    Score,
    Scorer,
    check_references,
    refuse_failures,
    reward_names,
    score,
    success_function,
)
from bcft.types import Problem, Trajectory, Turn

SUM = Problem("p", "3 + 4?", {"answer": "7"}, "rows.jsonl:1")
WITHOUT_REFERENCE = Problem("q", "Say something.", {}, "rows.jsonl:2")
UNREADABLE = Problem("r", "Say more.", {"answer": r"\boxed{7"}, "rows.jsonl:3")


def trajectory(action="7", *, problem="p", sample=0, stop="stop_token", **turn):
    """Return a trajectory of one turn."""
    return Trajectory(1, problem, sample, (Turn(action, (1,), (2, 3), stop, **turn),), "done")


def errored(sample=0):
    return Trajectory(1, "p", sample, (), "error", "step raised ValueError: x")


def constant(value):
    """Return a reward function with one value for every completion, and the list of its calls."""
    calls = []

    def reward(completions, **_):
        calls.append(list(completions))
        return [value] * len(completions)

    return reward, calls


def score_one(one, *, rewards=(), weights=None, success=None):
    functions = [constant(value)[0] for value in rewards]
    (scored,) = score([one], {"p": SUM}, functions, weights=weights or [1.0] * len(rewards), success=success)
    return scored


def test_a_reward_is_the_weighted_sum_over_the_functions_that_graded():
    scored = score_one(trajectory(), rewards=[1.0, None, 0.5], weights=[2.0, 100.0, 3.0])
    assert scored.reward == 2.0 * 1.0 + 3.0 * 0.5
    assert scored.rewards == (("reward", 1.0), ("reward", None), ("reward", 0.5))
    assert scored.graded


def test_a_trajectory_that_no_function_graded_is_ungraded_and_not_0():
    assert not score_one(trajectory(), rewards=[None, None]).graded
    assert score_one(trajectory(), rewards=[0.0]).graded


def test_the_rewards_of_the_environment_are_added():
    assert score_one(trajectory(graded=True, reward=-2.0), rewards=[0.5]).reward == -1.5
    alone = score_one(trajectory(graded=True, reward=-2.0))
    assert (alone.reward, alone.graded) == (-2.0, True)


def test_success_is_what_the_environment_knew_and_else_what_the_function_returned():
    for value, success in ((1.0, "yes"), (0.99, "no"), (None, "unknown")):
        assert score_one(trajectory(), success=constant(value)[0]).success == success
    assert score_one(trajectory(success="no"), success=constant(1.0)[0]).success == "no"
    assert score_one(trajectory()).success == "unknown"


def test_an_errored_trajectory_is_neither_graded_nor_a_failure():
    reward, calls = constant(1.0)
    first, second = score([errored(0), trajectory(sample=1)], {"p": SUM}, [reward], weights=[1.0], success=reward)
    assert (first.graded, first.reward, first.success, first.rewards) == (False, 0.0, "unknown", (("reward", None),))
    assert (second.graded, second.success) == (True, "yes")
    assert calls == [["7"]], "the function is called once, and not for the errored trajectory"


def test_functions_get_trls_arguments_in_the_form_of_the_prompt():
    received = {}

    def success(prompts, completions, answer, **_):
        received.update(prompts=prompts, completions=completions, answer=answer)
        return [1.0, 0.0, None]

    message = [{"role": "user", "content": "b"}]
    problems = {p: Problem(p, prompt, {"answer": p}) for p, prompt in (("1", "a"), ("2", message), ("3", "c"))}
    attempts = [trajectory(text, problem=p) for p, text in (("1", "x"), ("2", "y"), ("3", "z"))]
    scores = score(attempts, problems, [], weights=[], success=success)
    assert [scored.success for scored in scores] == ["yes", "no", "unknown"]
    assert received == {
        "prompts": ["a", message, "c"],
        "completions": ["x", [{"role": "assistant", "content": "y"}], "z"],
        "answer": ["1", "2", "3"],
    }


def test_several_turns_are_messages_even_for_a_string_prompt():
    reward, calls = constant(0.0)
    observation = ({"role": "user", "content": "Again."},)
    turns = (Turn("6", (1,), (2,), "stop_token", observation=observation), Turn("7", (3,), (4,), "stop_token"))
    score([Trajectory(1, "p", 0, turns, "done")], {"p": SUM}, [reward], weights=[1.0], success=None)
    roles = [(message["role"], message["content"]) for message in calls[0][0]]
    assert roles == [("assistant", "6"), ("user", "Again."), ("assistant", "7")]


def test_scores_come_back_from_their_line_as_they_were():
    scored = score_one(trajectory(), rewards=[0.5], success=constant(0.0)[0])
    assert Score.from_json(scored.to_json("kept", 0.5), scored.trajectory) == scored
    unknown = replace(scored, rewards=(("r", None), ("s", 0.5)), success="unknown")
    assert Score.from_json(unknown.to_json("failed", 0.5), unknown.trajectory) == unknown


def test_a_line_of_scores_holds_the_decision_and_no_null():
    scored = score_one(trajectory(), rewards=[None, 0.25])
    assert scored.to_json("below_cutoff", 0.5) == {
        "id": "1-p-0",
        "graded": True,
        "reward": 0.25,
        "rewards": [
            {"name": "reward", "graded": False, "value": 0.0},
            {"name": "reward", "graded": True, "value": 0.25},
        ],
        "success": "unknown",
        "decision": "below_cutoff",
        "cutoff": 0.5,
    }


def test_a_candidate_is_errored_truncated_or_done_and_equal_actions_have_equal_digests():
    whole = score_one(trajectory(), rewards=[1.0]).candidate
    assert (whole.id, whole.problem_id, whole.round, whole.status) == ("1-p-0", "p", 1, "done")
    assert score_one(trajectory(stop="max_tokens"), rewards=[1.0]).candidate.status == "truncated"
    assert score_one(errored()).candidate.status == "errored"
    assert score_one(trajectory(sample=1), rewards=[0.0]).candidate.digest == whole.digest
    other = Trajectory(1, "p", 0, (Turn("7", (1,), (2, 4), "stop_token"),), "done")
    assert score_one(other, rewards=[1.0]).candidate.digest != whole.digest


# A recipe's functions


def of_recipe(held_out=(SUM,), *, environment=None, functions=None, **keys):
    """Return a scorer; functions: given from Python; keys: of the recipe."""
    return Scorer.of(SelectionSettings(**keys), held_out, environment=environment, reward_funcs=functions)


def test_by_default_math_reward_grades_and_decides_about_success():
    scorer = of_recipe()
    assert (scorer.functions, scorer.weights, scorer.success) == ((math_reward,), (1.0,), math_reward)
    (scored,) = scorer.score([trajectory("It is 7.")], {"p": SUM})
    assert (scored.reward, scored.success) == (1.0, "yes")
    assert scored.rewards == (("math_reward", 1.0),)
    assert scorer.answers == math_reward.answers


def test_with_an_environment_there_is_no_default_reward():
    assert reward_names(SelectionSettings(), environment="my.Environment") == ()
    scorer = of_recipe(environment="my.Environment")
    assert (scorer.functions, scorer.success, scorer.answers, scorer.check([SUM])) == ((), None, None, "")


@pytest.mark.parametrize("held_out", [[], [WITHOUT_REFERENCE], [SUM, WITHOUT_REFERENCE]])
def test_the_default_reward_does_not_decide_about_success_where_references_are_missing(held_out):
    assert of_recipe(held_out).success is None


@pytest.mark.parametrize(
    "keys", [{"reward_funcs": ("bcft.rewards.math_reward",)}, {"success_func": "bcft.rewards.math_reward"}]
)
def test_a_function_that_the_recipe_names_must_find_references(keys):
    with pytest.raises(DataError, match=r"^rows.jsonl:2: math_reward does not accept the reference '' as its own"):
        of_recipe([SUM, WITHOUT_REFERENCE], **keys)


def test_a_function_given_from_python_must_find_references():
    with pytest.raises(DataError, match=r"^rows.jsonl:2: math_reward does not accept the reference ''"):
        of_recipe([WITHOUT_REFERENCE], functions=[math_reward])


def test_an_empty_success_func_means_that_success_is_unknown():
    scorer = of_recipe(success_func="")
    assert (scorer.functions, scorer.success) == ((math_reward,), None)


def test_the_first_reward_function_decides_about_success_unless_the_recipe_names_another():
    first, second = constant(0.0)[0], constant(1.0)[0]
    assert of_recipe(functions=[first, second]).success is first
    assert of_recipe(functions=[first], success_func="bcft.rewards.math_reward").success is math_reward
    assert success_function(SelectionSettings(), [SUM], environment=None, rewards=[second]) is second


def test_there_must_be_as_many_weights_as_reward_functions():
    with pytest.raises(UsageError, match=r"^reward_weights: 2 weights for 1 reward functions$"):
        of_recipe(reward_weights=(1.0, 2.0))
    assert of_recipe(reward_weights=(0.5,)).weights == (0.5,)


@pytest.mark.parametrize(
    ("keys", "key"),
    [({"reward_funcs": ("no_such.f",)}, "reward_funcs"), ({"success_func": "no_such.f"}, "success_func")],
)
def test_a_function_that_does_not_exist_is_refused_with_its_key(keys, key):
    with pytest.raises(UsageError, match=f"^{key}: cannot import 'no_such'"):
        of_recipe(**keys)


# References


def test_a_reference_that_is_not_its_own_solution_is_refused_with_its_place():
    check_references(math_reward, [SUM])
    with pytest.raises(DataError) as caught:
        check_references(math_reward, [SUM, UNREADABLE, WITHOUT_REFERENCE])
    assert str(caught.value) == (
        r"rows.jsonl:3: math_reward does not accept the reference '\\boxed{7' as its own solution "
        "(nor those of 1 more rows): correct or remove it, or name other reward functions"
    )


def test_references_are_checked_for_every_reward_that_reads_answers_under_the_column_that_it_reads():
    def exact(completions, solution, **_):
        return [float(text == right.lower()) for text, right in zip(completions, solution, strict=True)]

    exact.answers = Answers(str.strip, str.lower)
    scorer = of_recipe([Problem("p", "?", {"solution": "yes"}, "a:1")], functions=[exact])
    assert scorer.answers is exact.answers
    assert scorer.check([Problem("p", "?", {"solution": "yes"}, "a:1")]) == ""
    with pytest.raises(DataError, match=r"^a:2: exact does not accept the reference 'No' as its own solution: "):
        scorer.check([Problem("p", "?", {"solution": "yes"}, "a:1"), Problem("q", "?", {"solution": "No"}, "a:2")])


def test_a_reward_that_reads_no_references_is_not_checked_and_a_note_says_so():
    scorer = of_recipe(functions=[constant(1.0)[0]])
    note = "references: not graded against themselves, no reward function is known to read them"
    assert scorer.check([UNREADABLE]) == note


# Failures


def test_more_than_a_few_failed_environments_end_the_command():
    attempts = [trajectory(sample=n) for n in range(19)]
    refuse_failures([*attempts, errored(19)])  # 5 %
    with pytest.raises(FaultError, match=r"^2 of 21 trajectories failed; 1-p-19: step raised ValueError: x$"):
        refuse_failures([*attempts, errored(19), errored(20)])
    with pytest.raises(FaultError, match="2 of 21"):
        of_recipe().score([*attempts, errored(19), errored(20)], {"p": SUM})
