"""From trajectories to scores: rewards are summed, success is apart from reward, and references are checked first."""

# ruff: noqa: ARG001, ARG005 - the functions take what TRL gives
from dataclasses import replace

import pytest

from bcft.config.schema import SelectionSettings
from bcft.errors import DataError, FaultError, UsageError
from bcft.rewards import math_reward
from bcft.rewards.base import Answers
from bcft.selection.functions import check_references, reward_names
from bcft.selection.scoring import Score, Scorer, refuse_failures, score
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
    with pytest.raises(DataError, match=r"^rows.jsonl:2: math_reward needs a reference answer, and this row"):
        of_recipe([SUM, WITHOUT_REFERENCE], **keys)


def test_a_function_given_from_python_must_find_references():
    with pytest.raises(DataError, match=r"^rows.jsonl:2: math_reward needs a reference .*1 of 1 rows"):
        of_recipe([WITHOUT_REFERENCE], functions=[math_reward])


def test_an_empty_success_func_means_that_success_is_unknown():
    scorer = of_recipe(success_func="")
    assert (scorer.functions, scorer.success) == ((math_reward,), None)


def test_the_only_reward_function_decides_about_success_unless_the_recipe_names_another():
    first = constant(0.0)[0]
    assert of_recipe(functions=[first]).success is first
    assert of_recipe(functions=first).success is first
    assert of_recipe(functions=[first], success_func="bcft.rewards.math_reward").success is math_reward


MATH = "bcft.rewards.math_reward"


def length(completions, **_):
    """Reward long completions."""
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("functions", "environment", "line"),
    [
        ([length, math_reward], None, f"success_func: {math_reward.__module__}.math_reward"),
        ([length, MATH], None, f"success_func: {MATH}"),
        ([MATH, length], "my.Environment", f"success_func: {MATH}"),
        ([length, constant(1.0)[0]], None, f"success_func: {__name__}.length"),
        ([constant(1.0)[0], length, length], None, "success_func: reward"),
        ((lambda **_: [], lambda **_: []), "my.Environment", "success_func: <lambda>"),
    ],
)
def test_several_functions_without_a_success_func_are_refused_with_the_line_to_add(functions, environment, line):
    with pytest.raises(UsageError) as caught:
        of_recipe(functions=functions, environment=environment)
    text = str(caught.value)
    assert text.startswith(f"success_func: {len(functions)} reward functions (")
    assert f"`{line}`" in text
    assert "`success_func: ''`" in text
    assert len(text.splitlines()) == 1
    assert caught.value.exit_code == 2


def test_several_functions_that_the_recipe_names_are_refused_as_well():
    with pytest.raises(UsageError, match=rf"add `success_func: {MATH}`"):
        of_recipe(reward_funcs=("helpers.functions.brevity", MATH))


@pytest.mark.parametrize(
    ("functions", "named", "index"),
    [
        ([length, math_reward], "math_reward", 1),
        ([length, MATH], MATH, 1),
        ([length, math_reward], "bcft.rewards.math_answers.math_reward", 1),
        ([length, math_reward], MATH, 1),
        ([math_reward, length], "length", 1),
        ([math_reward, constant(0.0)[0]], "reward", 1),
    ],
)
def test_success_func_may_be_the_name_of_one_of_the_functions(functions, named, index):
    scorer = of_recipe(functions=functions, success_func=named)
    assert scorer.success is scorer.functions[index]
    assert len(scorer.functions) == 2


def test_of_several_functions_none_need_decide():
    scorer = of_recipe(functions=[length, MATH], success_func="")
    assert (scorer.functions, scorer.success, scorer.measures) == ((length, math_reward), None, "reward")


@pytest.mark.parametrize(
    ("keys", "measures"),
    [
        ({}, "success"),
        ({"held_out": [WITHOUT_REFERENCE]}, "nothing"),
        ({"held_out": []}, "nothing"),
        ({"held_out": [SUM, WITHOUT_REFERENCE]}, "nothing"),
        ({"held_out": [Problem("n", "?", {"answer": None})]}, "nothing"),
        ({"held_out": [WITHOUT_REFERENCE], "success_func": ""}, "nothing"),
        ({"held_out": [WITHOUT_REFERENCE], "success_func": "helpers.functions.even"}, "success"),
        ({"success_func": ""}, "reward"),
        ({"functions": [length]}, "success"),
        ({"functions": [length, math_reward], "success_func": ""}, "reward"),
        ({"held_out": [WITHOUT_REFERENCE], "functions": [length], "success_func": ""}, "reward"),
        ({"environment": "my.Environment"}, "success"),
        ({"environment": "my.Environment", "functions": [length]}, "success"),
        ({"environment": "my.Environment", "success_func": ""}, "success"),
        ({"environment": "my.Environment", "functions": [length], "success_func": ""}, "reward"),
    ],
)
def test_what_held_out_attempts_are_measured_by(keys, measures):
    keys = {"held_out": [SUM], **keys}
    assert of_recipe(keys.pop("held_out"), **keys).measures == measures


def test_held_out_attempts_get_success_alone_where_it_can_be_known_and_else_the_rewards():
    attempts = [trajectory("It is 7."), trajectory("It is 8.", sample=1), trajectory("7", sample=2)]
    by_success = of_recipe(functions=[length, math_reward], success_func="math_reward")
    scores = by_success.score_held_out(attempts, {"p": SUM})
    assert [(s.success, s.graded, s.rewards) for s in scores] == [
        ("yes", False, ()), ("no", False, ()), ("yes", False, ()),
    ]  # fmt: skip
    by_reward = of_recipe(functions=[length, math_reward], success_func="", reward_weights=(0.5, 10.0))
    scores = by_reward.score_held_out(attempts, {"p": SUM})
    assert [(s.success, s.graded, s.reward) for s in scores] == [
        ("unknown", True, 14.0), ("unknown", True, 4.0), ("unknown", True, 10.5),
    ]  # fmt: skip
    nothing = of_recipe([WITHOUT_REFERENCE]).score_held_out(attempts, {"p": SUM})
    assert {(s.success, s.graded, s.reward) for s in nothing} == {("unknown", False, 0.0)}
    with pytest.raises(FaultError, match="1 of 1 trajectories failed"):
        by_reward.score_held_out([errored()], {"p": SUM})


def test_an_environment_keeps_its_success_and_rewards_where_functions_measure():
    scorer = of_recipe(environment="my.Environment", functions=[length], success_func="")
    (scored,) = scorer.score_held_out([trajectory("seven", graded=True, reward=-1.0, success="yes")], {"p": SUM})
    assert (scored.success, scored.reward) == ("yes", 4.0)


@pytest.mark.parametrize("value", [sum([1 / 10] * 10), 0.7 + 0.2 + 0.1, 1 - 1e-12, 1.0, 3.0])
def test_a_reward_of_1_to_9_decimals_is_a_success(value):
    assert score_one(trajectory(), success=constant(value)[0]).success == "yes"
    assert score_one(trajectory(), success=constant(value - 1e-6 if value <= 1 else -value)[0]).success == "no"


# Arguments of the functions


def scaled(completions, scale, offset=0.0, **_):
    """Reward length with arguments of the recipe."""
    return [scale * len(text) + offset for text in completions]


def exact(completions, answer, offset=0.0):
    """Compare with the answer."""
    return [float(text == right) + offset for text, right in zip(completions, answer, strict=True)]


exact.answers = Answers(str.strip, str.lower)


REFERENCES = {"answer", "solution", "ground_truth"}


def test_reward_args_are_bound_to_every_function_that_names_them():
    keys = {"functions": [scaled, exact], "success_func": "exact", "reward_args": {"scale": 2, "offset": 0.5}}
    scorer = of_recipe(**keys)
    (scored,) = scorer.score([trajectory("7")], {"p": SUM})
    assert scored.rewards == (("scaled", 2.5), ("exact", 1.5))
    assert scored.success == "yes"
    assert scorer.answers is exact.answers
    assert scorer.columns_read == REFERENCES


def test_without_reward_args_the_functions_are_the_ones_given():
    assert of_recipe(functions=[exact]).functions[0] is exact


def test_an_argument_is_not_replaced_by_a_column_of_its_name():
    scorer = of_recipe(functions=[scaled], reward_args={"scale": 3})
    (scored,) = scorer.score([trajectory("7")], {"p": Problem("p", "?", {"scale": 100})})
    assert scored.reward == 3.0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"reward_args": {"tolerance": 1}}, "reward_args: no reward function (math_reward) names tolerance in its sig"),
        ({"reward_args": {"scal": 1}, "functions": [scaled]}, "reward_args: no reward function (scaled) names scal in"),
        ({"reward_args": {"x": 1}, "functions": [length]}, "reward_args: no reward function (length) names x in its "),
        ({"reward_args": {"completions": []}}, "reward_args: completions is given with every batch: leave it out"),
        ({"reward_args": {"log_metric": 1}}, "reward_args: log_metric is given with every batch: leave it out"),
        ({"reward_args": {"x": 1}, "environment": "my.E"}, "reward_args: no reward function (there is none) names x"),
    ],
)
def test_an_argument_that_no_function_takes_is_refused_with_its_key(keys, message):
    with pytest.raises(UsageError) as caught:
        of_recipe(**keys)
    assert str(caught.value).startswith(message)


def make_bonus(bonus, completion_bonus=0.0):
    """Return a reward function, as some of TRL's do."""

    def bonus_reward(completions, **_):
        return [bonus + completion_bonus] * len(completions)

    return bonus_reward


def broken_maker(bonus):
    raise ValueError(f"no bonus of {bonus}")


def test_a_function_that_makes_a_reward_function_is_called_once_with_its_arguments():
    scorer = of_recipe(functions=[make_bonus], reward_args={"bonus": 1.0, "completion_bonus": 0.5})
    (scored,) = scorer.score([trajectory()], {"p": SUM})
    assert scored.rewards == (("bonus_reward", 1.5),)
    assert scored.success == "yes"


@pytest.mark.parametrize(
    ("functions", "arguments", "message"),
    [
        (
            [make_bonus],
            {},
            "reward_args: make_bonus takes no completions, so it should make a reward function: give it",
        ),
        ([broken_maker], {"bonus": 2}, "reward_args: broken_maker raised ValueError: no bonus of 2"),
        ([lambda: [1.0]], {}, "reward_funcs: <lambda> takes no completions, and returned [1.0], not a reward function"),
        ([lambda texts: texts], {}, "reward_args: <lambda> takes no completions, so it should make a reward function"),
        ([lambda answer: None], {"answer": 1}, "reward_funcs: <lambda> takes no completions, and returned None, not a"),
    ],
)
def test_a_function_that_takes_no_completions_and_makes_no_reward_function_is_refused(functions, arguments, message):
    with pytest.raises(UsageError) as caught:
        of_recipe(functions=functions, reward_args=arguments)
    assert str(caught.value).startswith(message)


# Columns


def test_the_columns_read_are_those_that_the_signatures_name():
    assert of_recipe().columns_read == REFERENCES
    assert of_recipe(functions=[length]).columns_read == REFERENCES  # through its `**columns`
    options = of_recipe([], functions=lambda completions, level=None, scale=2.0, exact=False, words="", tests=(): [])
    assert options.columns_read == {"level", "tests"}
    named = of_recipe([], functions=lambda prompts, completions, level, trainer_state, log_extra: [])
    assert named.columns_read == {"level"}
    assert of_recipe(functions=[length], success_func="helpers.functions.even").columns_read == REFERENCES
    assert of_recipe(environment="my.Environment").columns_read == frozenset()


@pytest.mark.parametrize("success", [None, ""])
def test_a_column_that_held_out_problems_lack_is_named_before_a_model_is_loaded(success):
    def reward(completions, test_cases):
        return []

    with pytest.raises(
        DataError, match=r"^reward needs the column test_cases, which no held-out row has: the columns are"
    ):
        of_recipe(functions=[reward], success_func=success)
    scorer = of_recipe([], functions=[reward], success_func=success)
    with pytest.raises(DataError, match=r"^reward needs the column test_cases"):
        scorer.check([SUM])


def test_a_column_is_none_in_a_batch_whose_rows_all_lack_it():
    seen = []

    def reward(completions, level):
        seen.append(level)
        return [0.0] * len(completions)

    problems = {"p": SUM, "q": Problem("q", "?", {"level": 3})}
    score([trajectory()], problems, [reward], weights=[1.0], success=None)
    assert seen == [[None]]


def test_ids_of_several_turns_are_those_behind_the_prompt():
    def reward(completions, completion_ids):
        seen.extend(completion_ids)
        return [0.0] * len(completions)

    seen = []
    one = Turn("a", (1, 2), (3,), "stop_token", observation=({"role": "user", "content": "?"},))
    two = Turn("b", (4, 5), (6, 7), "stop_token")
    anew = replace(two, ids=(1, 2, 9, 5), rewritten=True)
    attempts = [Trajectory(1, "p", n, turns, "done") for n, turns in enumerate([(one,), (one, two), (one, anew)])]
    score(attempts, {"p": SUM}, [reward], weights=[1.0], success=None)
    assert seen == [[3], [3, 4, 5, 6, 7], [9, 5, 6, 7]]


def test_what_a_function_logs_is_in_the_scores_and_comes_back_from_their_line():
    def reward(completions, log_metric, log_extra):
        log_metric("share", len(completions) / 4)
        log_extra("read", list(completions))
        return [1.0] * len(completions)

    scores = score([trajectory("7"), trajectory("8", sample=1)], {"p": SUM}, [reward], weights=[1.0], success=None)
    assert [dict(s.logged) for s in scores] == [{"share": 0.5}, {"share": 0.5}]
    assert [dict(s.extra) for s in scores] == [{"read": "7"}, {"read": "8"}]
    line = scores[0].to_json("kept", 0.5)
    assert (line["logged"], line["extra"]) == ({"share": 0.5}, {"read": "7"})
    assert Score.from_json(line, scores[0].trajectory) == scores[0]


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
        check_references(math_reward, [SUM, UNREADABLE, replace(UNREADABLE, where="rows.jsonl:4")])
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
