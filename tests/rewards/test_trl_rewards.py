"""Reward functions written for TRL run unchanged: all of `trl.rewards`, and those in the form of its pages."""

# ruff: noqa: ARG001 - the functions take what TRL gives
import asyncio
import importlib
import math
import re
import subprocess
import sys

import pytest

from bcft.config.schema import SelectionSettings
from bcft.errors import UsageError
from bcft.rewards.base import Batch, ask, ask_all, import_function
from bcft.selection.scoring import Scorer
from bcft.types import Problem, Trajectory, Turn

RIGHT, WRONG = r"So it is \boxed{\frac{1}{3}}.", r"So it is \boxed{\frac{1}{2}}."
THOUGHT = "<think>\nThree parts.\n</think>\n"
SOLUTION = {"solution": r"\frac{1}{3}"}
FUNCTIONS = {
    "accuracy_reward": ({}, [RIGHT, WRONG, "no"], [1.0, 0.0, 0.0]),
    "reasoning_accuracy_reward": ({}, [THOUGHT + RIGHT, THOUGHT + WRONG, RIGHT], [1.0, 0.0, 0.0]),
    "think_format_reward": ({}, [THOUGHT + RIGHT, RIGHT, "<think>never closed"], [1.0, 0.0, 0.0]),
    "get_cosine_scaled_reward": (
        {"max_len": 100},
        [RIGHT, WRONG, WRONG],
        [0.75, -0.75, -0.75 - 0.25 * math.cos(math.pi / 100)],
    ),
    "get_repetition_penalty_reward": ({"ngram_size": 2}, [RIGHT, WRONG, "no"], [-48 / 49, -48 / 49, 0.0]),
    "get_soft_overlong_punishment": (
        {"max_completion_len": 55, "soft_punish_cache": 10},
        [RIGHT, WRONG, "no"],
        [-0.5, -0.5, 0.0],
    ),
}
"""Name -> arguments of the recipe, completions of 50, 50 and 1 tokens, and their rewards at TRL's defaults."""
IDS = ([1] * 50, [1] * 50, [1])


def problems(form):
    prompt = "Share 1 by 3."
    chat = [{"role": "user", "content": prompt}]
    prompts = {"text": [prompt] * 3, "messages": [chat] * 3, "both": [prompt, chat, prompt]}[form]
    return [Problem(str(n), prompt, SOLUTION) for n, prompt in enumerate(prompts)]


def attempts(completions):
    return [
        Trajectory(1, str(n), 0, (Turn(text, (5,), tuple(IDS[n]), "stop_token"),), "done")
        for n, text in enumerate(completions)
    ]


def test_every_function_that_trl_exports_is_here():
    module = importlib.import_module("trl.rewards")
    exported = {name for names in module._import_structure.values() for name in names}
    assert exported == set(FUNCTIONS)


@pytest.mark.parametrize("form", ["text", "messages", "both"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_trl_grades_in_a_run_by_its_dotted_path(name, form):
    arguments, completions, expected = FUNCTIONS[name]
    settings = SelectionSettings(reward_funcs=(f"trl.rewards.{name}",), reward_args=arguments, success_func="")
    rows = problems(form)
    scorer = Scorer.of(settings, rows, environment=None)
    assert scorer.check(rows).startswith("references: not graded")
    scores = scorer.score(attempts(completions), {problem.id: problem for problem in rows})
    assert [scored.reward for scored in scores] == pytest.approx(expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_trl_is_asked_as_an_object_as_it_is(name):
    arguments, completions, expected = FUNCTIONS[name]
    function = import_function(f"trl.rewards.{name}", key="reward_funcs")
    function = function(**arguments) if name.startswith("get_") else function
    rows = problems("messages")
    replies = [[{"role": "assistant", "content": text}] for text in completions]
    assert ask(function, rows, replies, completion_ids=IDS) == pytest.approx(expected)
    assert ask(function, rows[:1], replies[:1], completion_ids=IDS[:1]) == pytest.approx(expected[:1])


def test_what_accuracy_reward_logs_is_kept_and_an_unreadable_solution_is_ungraded():
    rows = [Problem("0", "?", SOLUTION), Problem("1", "?", {"solution": ""})]
    scorer = Scorer.of(SelectionSettings(reward_funcs=("trl.rewards.accuracy_reward",)), rows, environment=None)
    first, second = scorer.score(attempts([RIGHT, RIGHT]), {row.id: row for row in rows})
    assert (first.reward, first.success, first.extra["solution"]) == (1.0, "yes", r"\frac{1}{3}")
    assert (second.graded, second.success, second.extra["gold_parsed"]) == (False, "unknown", "[unparseable]")


def test_a_function_that_wants_arguments_says_which():
    settings = SelectionSettings(reward_funcs=("trl.rewards.get_soft_overlong_punishment",))
    with pytest.raises(UsageError, match=r"^reward_args: .* give it max_completion_len, soft_punish_cache$"):
        Scorer.of(settings, [], environment=None)


def test_the_rewards_of_trl_load_no_framework():
    code = (
        "import sys; from bcft.rewards.base import import_function as f;"
        "f('trl.rewards.accuracy_reward', key='k'); f('trl.rewards.get_soft_overlong_punishment', key='k');"
        "print(*sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


# In the form of the examples in TRL's pages on GRPO


def by_tokens(completion_ids, **kwargs):
    """Pay for tokens."""
    return [float(len(ids)) for ids in completion_ids]


def by_tokens_as_once_spelled(completions_ids, **kwargs):
    """Pay for tokens, under the argument's older name."""
    return [float(len(ids)) for ids in completions_ids]


def by_characters(completions, **kwargs):
    """Pay for characters."""
    return [float(len(text)) for text in completions]


def near_20_characters(completions, **kwargs):
    """Pay in integers."""
    return [-abs(20 - len(text)) for text in completions]


def by_format(completions, **kwargs):
    """Look for tags in the first message."""
    texts = [messages[0]["content"] for messages in completions]
    return [1.0 if re.match(r"^<think>.*?</think><answer>.*?</answer>$", text) else 0.0 for text in texts]


def by_box(completions, ground_truth, **kwargs):
    """Compare what a box holds with a column."""
    found = [re.search(r"\\boxed\{(.*?)\}", text) for text in completions]
    return [1.0 if match and match[1] == truth else 0.0 for match, truth in zip(found, ground_truth, strict=True)]


def math_only(prompts, completions, task, **kwargs):
    """Grade one task of two."""
    rows = zip(prompts, completions, task, strict=True)
    return [(1.0 if text == "4" else -1.0) if kind == "math" else None for _, text, kind in rows]


def code_only(prompts, completions, task, **kwargs):
    """Grade the other task."""
    rows = zip(prompts, completions, task, strict=True)
    return [(1.0 if "def" in text else -1.0) if kind == "code" else None for _, text, kind in rows]


async def after_a_service_answered(prompts, completions, **kwargs):
    """Wait for something."""
    await asyncio.sleep(0)
    return [1.0 if text else 0.0 for text in completions]


def harder_later(completions, trainer_state, **kwargs):
    """Ask for more as the training goes on."""
    wanted = 2 + trainer_state.global_step
    return [1.0 if len(text) >= wanted else 0.0 for text in completions]


def logging(completions, answer, log_extra=None, log_metric=None, **kwargs):
    """Log columns and a metric, if somebody listens."""
    right = [text == wanted for text, wanted in zip(completions, answer, strict=True)]
    if log_extra:
        log_extra("expected", answer)
        log_extra("read", completions)
    if log_metric:
        log_metric("share_right", sum(right) / len(right))
    return [float(one) for one in right]


@pytest.mark.parametrize(
    ("function", "columns", "completions", "expected"),
    [
        (by_tokens, {}, ["a", "b"], [50.0, 50.0]),
        (by_tokens_as_once_spelled, {}, ["a", "b"], [50.0, 50.0]),
        (by_characters, {}, [" blue.", " in the sky."], [6.0, 12.0]),
        (near_20_characters, {}, ["", "x" * 23], [-20.0, -3.0]),
        (by_box, {"ground_truth": ["2", "5"]}, [r"It is \boxed{2}.", r"It is \boxed{6}."], [1.0, 0.0]),
        (math_only, {"task": ["math", "code"]}, ["4", "def f(): ..."], [1.0, None]),
        (code_only, {"task": ["math", "code"]}, ["4", "def f(): ..."], [None, 1.0]),
        (after_a_service_answered, {}, ["", "x"], [0.0, 1.0]),
        (harder_later, {}, ["abc", "abcdefgh"], [0.0, 1.0]),
        (logging, {"answer": ["4", "5"]}, ["4", "6"], [1.0, 0.0]),
    ],
)
def test_a_function_in_the_form_of_trls_pages_grades_text(function, columns, completions, expected):
    rows = [Problem(str(n), "?", {name: values[n] for name, values in columns.items()}) for n in range(2)]
    batch = Batch(rows, completions, IDS[:2], step=4)
    ((_, returned),) = ask_all([(function, batch)])
    assert returned.values == tuple(expected)
    if function is logging:
        assert returned.logged == {"share_right": 0.5}
        assert returned.extra == {"expected": ["4", "5"], "read": ["4", "6"]}


def test_a_function_in_the_form_of_trls_pages_grades_messages():
    chat = [{"role": "user", "content": "?"}]
    texts = ["<think>4 parts</think><answer>4</answer>", "It is 4."]
    replies = [[{"role": "assistant", "content": text}] for text in texts]
    assert ask(by_format, [Problem("0", chat), Problem("1", chat)], replies) == [1.0, 0.0]


def test_functions_for_several_tasks_are_summed_where_they_grade():
    rows = {str(n): Problem(str(n), "?", {"task": task}) for n, task in enumerate(["math", "code", "talk"])}
    settings = SelectionSettings(success_func="", reward_weights=(1.0, 2.0, 0.5))
    functions = [math_only, code_only, after_a_service_answered]
    scorer = Scorer.of(settings, list(rows.values()), environment=None, reward_funcs=functions)
    scores = scorer.score(attempts(["4", "def f(): ...", "hello"]), rows)
    assert [scored.reward for scored in scores] == [1.5, 2.5, 0.5]
    assert [value for _, value in scores[2].rewards] == [None, None, 1.0]
    assert math.isclose(sum(scored.reward for scored in scores), 4.5)
