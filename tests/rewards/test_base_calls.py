"""How a reward function is called: as TRL's GRPO calls it, with copies of its own, and what it may return."""

# ruff: noqa: ARG005 - the functions take what TRL gives
import asyncio
import functools
import threading
from collections import deque
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bcft.errors import DataError, FaultError
from bcft.rewards.base import Batch, ask, ask_all, described
from bcft.types import Problem

CHAT = [{"role": "user", "content": "2 + 2?"}]
PROBLEMS = [Problem("a", "2 + 2?", {"answer": "4"}, "r:1"), Problem("b", "2 + 3?", {"answer": "5"}, "r:2")]
IDS = [[7, 8], [9]]


def ask_batch(function, *, problems=PROBLEMS, completions=("4", "6"), ids=IDS, **rest):
    """Return what a function returned and logged for one batch."""
    ((_, returned),) = ask_all([(function, Batch(problems, completions, ids, **rest))])
    return returned


# Arguments


def test_a_function_gets_every_argument_that_trl_gives():
    received = {}

    def reward(**arguments):
        received.update(arguments)
        return [0.0, 1.0]

    ask_batch(reward, step=12)
    others = {name: received.pop(name) for name in ("trainer_state", "log_extra", "log_metric")}
    assert received == {
        "prompts": ["2 + 2?", "2 + 3?"],
        "completions": ["4", "6"],
        "completion_ids": [[7, 8], [9]],
        "answer": ["4", "5"],
    }
    assert all(isinstance(value, list) for value in received.values())
    assert others["trainer_state"].global_step == 12
    assert callable(others["log_extra"])
    assert callable(others["log_metric"])


def test_outside_training_the_trainer_state_is_that_of_a_training_not_begun():
    from transformers import TrainerState

    states = []
    ask(lambda completions, trainer_state: states.append(trainer_state) or [0.0] * len(completions), PROBLEMS, ["", ""])
    (state,) = states
    fresh = TrainerState(epoch=0.0)
    for name in type(state).__slots__:
        theirs = getattr(fresh, name)
        assert getattr(state, name) == (tuple(theirs) if isinstance(theirs, list) else theirs)
    with pytest.raises(AttributeError):
        state.global_step = 3


@pytest.mark.parametrize(
    "reward",
    [
        lambda completions: [float(len(text)) for text in completions],
        lambda completions, answer: [float(len(text)) for text in completions],
        lambda prompts, completions, answer=None: [float(len(text)) for text in completions],
        lambda completion_ids: [1.0 for _ in completion_ids],
        lambda completions_ids: [1.0 for _ in completions_ids],
        lambda completions, absent=None, trainer_state=None: [float(absent is None and trainer_state is not None)] * 2,
        lambda *completions_of_nobody, completions, **kwargs: [float("answer" in kwargs)] * len(completions),
    ],
)
def test_a_function_without_kwargs_gets_what_its_signature_names(reward):
    assert ask_batch(reward).values == (1.0, 1.0)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda completions, solution, **_: [],
            "<lambda> needs the column solution, which no row has: the columns are",
        ),
        (lambda completions, a, b: [], "<lambda> needs the columns a, b, which no row has: the columns are answer"),
        (lambda texts, **_: [], "<lambda> needs the column texts, which no row has"),
        (functools.partial(lambda completions, a, b: [], a=1), "<lambda> needs the column b, which no row has"),
        (lambda environments, completions: [], "<lambda> needs environments, which are gone when attempts are graded"),
    ],
)
def test_a_column_that_no_row_has_is_named_before_the_function_is_called(reward, message):
    with pytest.raises(DataError) as caught:
        ask_batch(reward)
    assert str(caught.value).startswith(message)
    with pytest.raises(DataError, match=r"there are no columns besides the prompt$"):
        ask_batch(lambda completions, solution: [], problems=[Problem("a", "?"), Problem("b", "?")])


def test_ids_that_are_not_known_are_not_made_up():
    assert ask(lambda completions, **rest: [float("completion_ids" in rest)], PROBLEMS[:1], ["4"]) == [0.0]
    with pytest.raises(DataError, match=r"^<lambda> needs completion_ids, which are known only after a rollout$"):
        ask(lambda completion_ids: [1.0], PROBLEMS[:1], ["4"])


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids", "trainer_state", "log_extra"])
def test_a_column_with_the_name_of_an_argument_is_refused(name):
    with pytest.raises(DataError, match=f"^r:9: column '{name}' has the name of an argument of TRL's: rename it$"):
        ask(lambda **_: [1.0], [Problem("a", "?", {name: 1}, "r:9")], [""])


def test_a_column_is_none_where_it_is_missing_also_in_the_first_row_and_in_a_whole_batch():
    rows = [{}, {"level": 3}, {"level": None}, {"answer": "5"}]
    problems = [Problem(str(n), "?", row) for n, row in enumerate(rows)]
    seen = []

    def reward(completions, level, answer):
        seen.append((level, answer))
        return [0.0] * len(completions)

    ask(reward, problems, [""] * 4)
    assert seen.pop() == ([None, 3, None, None], [None, None, None, "5"])
    ask_batch(reward, problems=problems[:1], completions=[""], ids=[[1]], columns=["level", "answer"])
    assert seen.pop() == ([None], [None])


def test_a_function_that_names_messages_gets_them_for_text_and_others_get_the_form_of_the_prompt():
    def annotated(prompts, completions: list[list[dict[str, str]]], **_):
        assert all(prompt[0]["role"] == "user" for prompt in prompts)
        return [float(completion[0]["content"]) for completion in completions]

    reply = [{"role": "assistant", "content": "6"}]
    assert ask(annotated, [PROBLEMS[0], Problem("b", CHAT)], ["4", reply]) == [4.0, 6.0]
    forms = []
    ask(lambda completions: forms.extend(completions) or [0.0, 0.0], [PROBLEMS[0], Problem("b", CHAT)], ["4", reply])
    assert forms == ["4", reply]


# Copies


def editing_completions(completions, **_):
    for completion in completions:
        completion[0]["content"] = "1"
    completions.clear()
    return [0.0, 0.0]


def editing_prompts(prompts, **_):
    prompts[0][0]["content"] += "!"
    prompts[:] = []
    return [0.0, 0.0]


def editing_columns(tests, **_):
    tests[0].append("more")
    tests.reverse()
    return [0.0, 0.0]


def editing_ids(completion_ids, **_):
    completion_ids[0].clear()
    completion_ids.pop()
    return [0.0, 0.0]


def editing_all(prompts, completions, completion_ids, tests, **_):
    for values in (prompts, completions, completion_ids, tests):
        values[0].clear()
        values.clear()
    return [0.0, 0.0]


@pytest.mark.parametrize("edits", [editing_completions, editing_prompts, editing_columns, editing_ids, editing_all])
def test_a_function_that_edits_its_arguments_changes_nothing_for_others(edits):
    seen = []

    def looks(prompts, completions, completion_ids, tests):
        seen.append((prompts, completions, completion_ids, tests))
        return [0.0, 0.0]

    def data():
        problem = Problem("a", [{"role": "user", "content": "?"}], {"tests": ["x"]})
        completions = [[{"role": "assistant", "content": text}] for text in "45"]
        return Batch([problem, problem], completions, [[1], [2]])

    batch = data()
    list(ask_all([(edits, batch), (looks, batch)]))
    assert batch == data()
    expected = data()
    prompt, tests = expected.problems[0].prompt, expected.problems[0].columns["tests"]
    assert seen == [([prompt, prompt], list(expected.completions), [[1], [2]], [tests, tests])]


def test_attempts_at_one_problem_do_not_share_their_prompt():
    def reward(prompts, **_):
        prompts[0][0]["content"] = "edited"
        return [float(prompts[1][0]["content"] == "2 + 2?")] * 2

    problem = Problem("a", CHAT)
    assert ask_batch(reward, problems=[problem, problem], completions=[CHAT, CHAT]).values == (1.0, 1.0)


# What comes back


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "None"),
        ({"a": 1.0, "b": 2.0}, "dict {'a': 1.0, 'b': 2.0}"),
        ("10", "str '10'"),
        (b"10", "bytes b'10'"),
        (1.0, "float 1.0"),
        (np.float64(1.0), "float64 "),
        (torch.tensor(1.0), "Tensor "),
        ({1.0, 2.0}, "set {1.0, 2.0}"),
        ((x for x in (1.0, 2.0)), "generator <generator"),
        (map(float, "12"), "map <map"),
        (True, "bool True"),
    ],
)
def test_what_is_no_list_of_numbers_is_reported_to_be_that(value, said):
    def reward(**_):
        return value

    with pytest.raises(FaultError) as caught:
        ask_batch(reward)
    assert str(caught.value).startswith(f"reward returned {said}")
    assert str(caught.value).endswith(", not a list of numbers")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        [0.5, None],
        (0.5, None),
        deque([0.5, None]),
        [np.float32(0.5), None],
        [torch.tensor(0.5), None],
        [Decimal("0.5"), None],
        np.array([0.5, None], dtype=object),
    ],
)
def test_lists_arrays_and_tensors_of_numbers_are_taken(values):
    assert ask_batch(lambda **_: values).values == (0.5, None)


@pytest.mark.parametrize(
    "values",
    [
        [True, False],
        [np.True_, np.False_],
        np.array([True, False]),
        torch.tensor([1, 0]),
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 0.0], requires_grad=True),
        np.array([1, 0], dtype=np.int8),
        range(1, -1, -1),
    ],
)
def test_bools_and_integers_count_as_1_and_0(values):
    returned = ask_batch(lambda **_: values).values
    assert returned == (1.0, 0.0)
    assert {type(value) for value in returned} == {float}


@pytest.mark.parametrize(
    "value",
    [
        *(float("nan"), float("inf"), -float("inf"), "1.0", [1.0], {}, 10**400, 1j),
        *(np.nan, np.array([1.0, 2.0]), torch.tensor(float("nan")), torch.tensor([1.0, 2.0])),
    ],
)
def test_a_value_that_is_no_finite_number_is_reported_with_its_row(value):
    with pytest.raises(FaultError, match=r"^reward returned .* for r:2: return a finite number, or None") as caught:
        ask_batch(named("reward", lambda **_: [1.0, value]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 3, np.zeros(5), ()])
def test_another_number_of_values_is_reported(values):
    with pytest.raises(FaultError, match=rf"^reward returned {len(values)} values for 2 completions$"):
        ask_batch(named("reward", lambda **_: values))


def named(name, function):
    function.__name__ = name
    return function


class StrangeError(Exception):
    """An error whose message has many lines."""

    def __str__(self):
        return "\n".join(["first", *["more"] * 1000])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\n  two\tthree"), "ValueError: one two three"),
        (KeyError("answer"), "KeyError: 'answer'"),
        (StrangeError(), "StrangeError: first more more"),
        (AssertionError(), "AssertionError: "),
        (TypeError("'NoneType' object is not iterable"), "TypeError: 'NoneType' object is not iterable"),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_exception_of_a_function_is_one_line_with_its_name(error, said, asynchronous):
    def reward(**_):
        raise error

    async def waiting(**_):
        raise error

    with pytest.raises(FaultError) as caught:
        ask_batch(named("reward", waiting) if asynchronous else reward)
    text = str(caught.value)
    assert text.startswith(f"reward raised {said}")
    assert text.endswith("; --debug shows more)")
    assert "\n" not in text
    assert len(text) < 700


# What a function logs


def test_a_metric_is_the_mean_of_what_was_logged_and_a_column_belongs_to_the_attempts():
    def reward(completions, log_metric, log_extra):
        log_metric("right", 0.0)
        log_metric("right", np.float32(1.0))
        log_metric("broken", float("nan"))
        log_metric("tensor", torch.tensor(3))
        log_extra("read", ["4", None])
        log_extra("lengths", np.array([1, 2]))
        return [1.0] * len(completions)

    returned = ask_batch(reward)
    assert returned.logged == {"right": 0.5, "tensor": 3.0}
    assert returned.extra == {"read": ["4", None], "lengths": [1, 2]}
    assert [type(value) for value in returned.extra["lengths"]] == [int, int]


@pytest.mark.parametrize("value", ["high", None, [1.0], {}, object()])
def test_a_metric_that_is_no_number_is_reported(value):
    with pytest.raises(FaultError, match=r"^reward logged the metric 'm' as .*: give a number$"):
        ask_batch(named("reward", lambda log_metric, **_: log_metric("m", value) or [1.0, 1.0]))


@pytest.mark.parametrize("values", [[], [1], [1, 2, 3], "abc", ["x"] * 5])
def test_a_logged_column_has_a_value_for_each_completion(values):
    with pytest.raises(FaultError, match=rf"^reward logged {len(values)} values of 'c' for 2 completions$"):
        ask_batch(named("reward", lambda log_extra, **_: log_extra("c", values) or [1.0, 1.0]))


# Asynchronous functions


async def one(completions, **_):
    await asyncio.sleep(0)
    return [1.0] * len(completions)


class Asynchronous:
    """An object whose call is asynchronous."""

    async def __call__(self, completions, weight=1.0, **_):
        await asyncio.sleep(0)
        return [weight] * len(completions)


def coroutine_of_a_plain_function(**arguments):
    return one(**arguments)


async def without_kwargs(completions, answer):
    return [float(len(answer) == len(completions))] * len(completions)


@pytest.mark.parametrize(
    "function",
    [
        one,
        Asynchronous(),
        functools.partial(Asynchronous(), weight=1.0),
        functools.partial(one, other=2),
        coroutine_of_a_plain_function,
        without_kwargs,
    ],
)
def test_an_asynchronous_function_is_awaited_also_within_a_running_loop(function):
    assert ask(function, PROBLEMS, ["4", "5"]) == [1.0, 1.0]

    async def notebook():
        return ask(function, PROBLEMS, ["4", "5"])

    assert asyncio.run(notebook()) == [1.0, 1.0]


class Wrapped:
    """An object whose call awaits a function."""

    def __init__(self, function):
        self.function = function

    async def __call__(self, **arguments):
        return await self.function(**arguments)


@pytest.mark.parametrize(
    "form", [lambda function: function, Wrapped, lambda function: functools.partial(Wrapped(function))]
)
def test_several_asynchronous_functions_run_at_once_and_the_others_before_them(form):
    arrived, order = SimpleNamespace(event=None), []

    async def waits(completions, **_):
        arrived.event = arrived.event or asyncio.Event()
        await asyncio.wait_for(arrived.event.wait(), 10)
        return [1.0] * len(completions)

    async def sets(completions, **_):
        arrived.event = arrived.event or asyncio.Event()
        arrived.event.set()
        order.append("asynchronous")
        return [2.0] * len(completions)

    def plain(completions, **_):
        order.append("plain")
        return [3.0] * len(completions)

    batch = Batch(PROBLEMS, ["4", "5"])
    returned = dict(ask_all([(form(waits), batch), (form(sets), batch), (plain, batch)]))
    assert {number: value.values for number, value in returned.items()} == {0: (1.0, 1.0), 1: (2.0, 2.0), 2: (3.0, 3.0)}
    assert order == ["plain", "asynchronous"]


def test_all_calls_share_a_loop_because_a_client_belongs_to_the_loop_of_its_first_call():
    loops, threads = set(), set()

    async def reward(completions, **_):
        loops.add(asyncio.get_running_loop())
        threads.add(threading.current_thread())
        return [0.0] * len(completions)

    for _ in range(3):
        ask(reward, PROBLEMS, ["", ""])
    assert (len(loops), len(threads)) == (1, 1)


@pytest.mark.parametrize("value", [None, {}, "ab", 1.0, [1.0], [1.0, float("nan")]])
def test_what_an_asynchronous_function_returns_is_checked_as_well(value):
    async def reward(**_):
        return value

    with pytest.raises(FaultError, match=r"^reward returned "):
        ask(reward, PROBLEMS, ["", ""])


def test_the_values_of_one_function_come_before_the_failure_of_another():
    async def fails(**_):
        raise OSError("no connection")

    batch, came = Batch(PROBLEMS, ["4", "5"]), []

    def collect(requests):
        for number, _ in ask_all(requests):
            came.append(number)

    with pytest.raises(FaultError, match=r"^fails raised OSError: no connection"):
        collect([(fails, batch), (one, batch), (without_kwargs, batch)])
    assert sorted(came) == [1, 2]


@pytest.mark.parametrize("error", [asyncio.CancelledError("scope"), SystemExit(1), KeyError("k")])
def test_whatever_ends_a_coroutine_is_one_line_and_the_other_answers_come_first(error):
    async def fails(**_):
        raise error

    async def grades(completions, **_):
        return [1.0 for _ in completions]

    batch = Batch(PROBLEMS, ("4", "6"), IDS)
    answers = ask_all([(fails, batch), (grades, batch)])
    number, returned = next(answers)
    assert (number, returned.values) == (1, (1.0, 1.0))
    with pytest.raises(FaultError, match=f"^fails raised {type(error).__name__}"):
        next(answers)
    assert ask(grades, PROBLEMS, ["4", "6"]) == [1.0, 1.0]  # the loop lives


def made(limit):
    def reward(completions, **_):
        return [float(len(c) > limit) for c in completions]

    return reward


class Judge:
    def __init__(self):
        self.calls = 0

    def __call__(self, completions, **_):
        self.calls += 1
        return [float(self.calls)] * len(completions)


def test_a_function_of_a_factory_is_described_with_its_values_and_an_object_by_its_class_alone():
    assert described(made(3)) == described(made(3)) != described(made(4))
    judge = Judge()
    before = described(judge)
    ask(judge, PROBLEMS, ["4", "6"])
    assert described(judge) == before
    assert "Judge@" in before
