"""Reward functions: how one is called, named and imported."""

from functools import partial

import numpy as np
import pytest

from bcft.errors import FaultError, UsageError
from bcft.rewards import math_reward
from bcft.rewards.base import (
    TRL_ARGUMENTS,
    Answers,
    answers_of,
    ask,
    described,
    import_function,
    name_of,
    reference,
    reward_functions,
    solved,
)
from bcft.types import Problem


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1.0", [1.0], object()])
def test_a_reward_that_is_not_a_finite_number_is_reported_with_its_function_and_row(value):
    def odd(**_):
        return [1.0, value]

    problems = [Problem("a", "?", where="rows.jsonl:1"), Problem("b", "?", where="rows.jsonl:2")]
    with pytest.raises(FaultError, match=r"^odd returned .+ for rows.jsonl:2: return a finite number"):
        ask(odd, problems, ["", ""])


def test_anything_that_counts_as_a_number_becomes_a_float_and_none_stays_none():
    values = ask(lambda **_: [np.float32(0.5), True, 1, None], [Problem(str(n), "?") for n in range(4)], [""] * 4)
    assert values == [0.5, 1.0, 1.0, None]
    assert [type(value) for value in values] == [float, float, float, type(None)]
    assert ask(lambda **_: 1 / 0, [], []) == []


def test_a_function_gets_the_columns_of_the_problems_under_their_names():
    def checking(prompts, completions, answer, level):
        assert prompts == ["1 + 1?", "1 + 2?"]
        assert level == ["easy", None]
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    problems = [Problem("a", "1 + 1?", {"answer": "2", "level": "easy"}), Problem("b", "1 + 2?", {"answer": "3"})]
    assert ask(checking, problems, ["2", "2"]) == [1.0, 0.0]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_column_that_some_problems_lack_is_none_for_them_in_any_order(order):
    rows = [{"answer": "2"}, {}, {"level": "hard"}]
    problems = [Problem(str(n), "?", rows[n]) for n in order]
    columns = {}

    def reward(prompts, completions, **others):  # noqa: ARG001
        columns.update({name: values for name, values in others.items() if name not in TRL_ARGUMENTS})
        return [0.0] * len(completions)

    ask(reward, problems, [""] * 3)
    assert columns == {name: [rows[n].get(name) for n in order] for name in ("answer", "level")}


def test_a_grade_does_not_depend_on_the_columns_of_other_problems():
    problems = [Problem("a", "?", {"solution": "so #### 2"}), Problem("b", "?", {"answer": "3"}), Problem("c", "?")]
    together = ask(math_reward, problems, ["2", "3", "4"])
    assert together == [1.0, 1.0, None]
    assert ask(math_reward, problems[::-1], ["4", "3", "2"]) == together[::-1]


def test_a_function_that_raises_or_returns_too_few_values_is_reported_with_its_name():
    def failing(**_):
        raise KeyError("answer")

    with pytest.raises(FaultError, match=r"^failing raised KeyError: 'answer' \(.*\.py:\d+; --debug shows more\)$"):
        ask(failing, [Problem("a", "?")], [""])

    def short(**_):
        return [1.0]

    with pytest.raises(FaultError, match=r"^short returned 1 values for 2 completions$"):
        ask(short, [Problem("a", "?"), Problem("b", "?")], ["", ""])


def test_only_an_attribute_of_the_right_type_says_how_answers_are_read():
    def reward(**_):
        return []

    assert answers_of(None) is None
    assert answers_of(reward) is None
    reward.answers = ["7"]
    assert answers_of(reward) is None
    reward.answers = Answers(str.strip, str.lower)
    assert answers_of(reward) is reward.answers


def test_the_reference_is_the_first_column_that_a_problem_has():
    assert reference(Problem("a", "?", {"ground_truth": 3, "solution": 2})) == "2"
    assert reference(Problem("a", "?", {"answer": "", "solution": 2})) == ""
    assert reference(Problem("a", "?", {"gold": 1})) == ""
    assert reference(Problem("a", "?", {"answer": None, "solution": 2})) == "2"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("length", "reward_funcs: 'length' is not a dotted path such as my_rewards.length"),
        ("no_such_module.length", "reward_funcs: cannot import 'no_such_module': "),
        ("bcft.rewards.no_such_function", "reward_funcs: module 'bcft.rewards' has no function 'no_such_function'"),
        ("bcft.rewards.__all__", "reward_funcs: bcft.rewards.__all__ is a list, not a function"),
    ],
)
def test_a_dotted_path_without_a_function_is_refused_with_its_key(path, message):
    with pytest.raises(UsageError) as caught:
        import_function(path, key="reward_funcs")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import math\nmath.nothing", "AttributeError: module 'math' has no attribute 'nothing'"),
        ("missing", "NameError: name 'missing' is not defined"),
        ("raise ValueError('one\\ntwo')", "ValueError: one two"),
        ("def", "SyntaxError: "),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_module_that_fails_when_it_is_imported_is_one_line_with_the_reason(tmp_path, monkeypatch, source, reason):
    (tmp_path / "broken_rewards.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError) as caught:
        import_function("broken_rewards.length", key="reward_funcs")
    assert str(caught.value).startswith(f"reward_funcs: cannot import 'broken_rewards': {reason}")
    assert "\n" not in str(caught.value)


def test_a_module_of_the_working_directory_can_be_imported(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text(
        "def length(completions, **_):\n    return list(map(len, completions))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/"])
    function = import_function("rewards_of_mine.length", key="reward_funcs")
    assert ask(function, [Problem("a", "?")], ["four"]) == [4.0]
    assert import_function("bcft.rewards.math_reward", key="reward_funcs") is math_reward


def test_a_function_whose_file_was_edited_since_is_described_by_its_name(tmp_path):
    file = tmp_path / "edited.py"
    file.write_text("x = 1\n\ndef reward(completions):\n    return [1.0]\n")
    names = {"__name__": "edited"}
    exec(compile(file.read_text(), str(file), "exec"), names)
    file.write_text("x = 1\n\ndef reward(completions:\n")
    assert described(names["reward"]) == "edited.reward"


def test_functions_of_one_name_and_different_source_are_described_differently():
    def make(text):
        def reward(**_):
            return [len(text)]

        return reward

    first = make("a")

    def reward(**_):
        return [0.0]

    assert described(first) == described(make("a")) != described(make("b"))
    assert described(first) != described(reward)
    assert described(first).split("@")[0] == described(reward).split("@")[0] == f"{__name__}.reward"


@pytest.mark.parametrize(
    ("reward", "success"),
    [
        (sum([1 / 10] * 10), True),
        (0.7 + 0.2 + 0.1, True),
        (1 - 1e-10, True),
        (1.0, True),
        (2, True),
        (1 - 1e-8, False),
        (0.999, False),
        (-1.0, False),
    ],
)
def test_success_is_1_or_more_to_9_decimals(reward, success):
    assert solved(reward) is success


def test_the_name_and_the_answers_of_a_function_survive_its_binding():
    bound = partial(partial(math_reward, scale=2), other=1)
    assert name_of(bound) == "math_reward"
    assert answers_of(bound) is math_reward.answers
    assert described(bound) == f"{described(math_reward)}(other=1, scale=2)"
    assert described(partial(math_reward, key=object())) == described(partial(math_reward, key=object()))


def test_one_function_or_several_are_given_as_objects_and_as_dotted_paths():
    def mine(**_):
        return []

    path = "bcft.rewards.math_reward"
    assert reward_functions(mine) == [mine]
    assert reward_functions(path) == [math_reward]
    assert reward_functions([path, mine]) == [math_reward, mine]
    assert reward_functions((mine, path, mine)) == [mine, math_reward, mine]
    assert reward_functions([]) == []


@pytest.mark.parametrize("given", [3, [3], [math_reward, None], {"f": math_reward}, [["bcft.rewards.math_reward"]]])
def test_what_is_neither_a_function_nor_a_dotted_path_is_refused_with_its_key(given):
    with pytest.raises(UsageError, match=r"^reward_funcs: .* is neither a function nor a dotted path"):
        reward_functions(given)


def test_a_module_that_loads_its_parts_on_demand_and_fails_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "lazy_rewards.py").write_text("def __getattr__(name):\n    raise ImportError('no such\\nlibrary')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"^reward_funcs: cannot import 'lazy_rewards': ImportError: no such library"):
        import_function("lazy_rewards.length", key="reward_funcs")
