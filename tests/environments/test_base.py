"""What holds of every built-in environment, and how a recipe names one."""

import sys
from collections import OrderedDict
from dataclasses import replace
from functools import partial

import pytest
from helpers.environments import ALL, Sized, problem_of

from bcft.config.schema import DataSettings, EnvironmentSettings, EvaluationSettings, SamplingSettings
from bcft.data.loading import load_splits
from bcft.environments.arithmetic import check_steps
from bcft.environments.base import (
    EmbeddedDataset,
    check_system_prompt,
    embedded_datasets,
    environment_factory,
    is_instant,
    rollout_settings,
    step_checker,
    uniforms,
)
from bcft.environments.grid_walk import GridWalk
from bcft.environments.single_turn import SingleTurn
from bcft.errors import UsageError
from bcft.types import Problem, Sampling

EMBEDDED = {
    "bcft:arithmetic",
    "bcft:arithmetic-apprentice",
    "bcft:grid-walk",
    "bcft:guess-number",
    "bcft:twenty-questions",
}
GRID_WALK = "bcft.environments.grid_walk.GridWalk"


@pytest.fixture(params=ALL, ids=[module.__name__.split(".")[-1] for module, _ in ALL])
def both(request):
    """Return the module of an environment's problems, and the environment's class."""
    return request.param


def test_a_demonstration_is_what_the_environment_answers_to_its_actions(both):
    module, make = both
    for item in module.items("train", 200):
        environment = make()
        conversation = [{"role": "user", "content": environment.reset(problem_of(item), seed=0)}]
        done = False
        for message in item["messages"][1::2]:
            assert not done
            feedback = environment.step(message["content"])
            conversation += [message, {"role": "user", "content": feedback.observation}]
            done = feedback.done
        assert done
        assert feedback.success
        assert conversation[:-1] == item["messages"]


def test_splits_never_share_a_problem_and_fewer_items_are_the_first_of_more(both):
    module, _ = both
    prompts = {split: {item["prompt"] for item in module.items(split, 300)} for split in ("train", "dev", "test")}
    assert not prompts["train"] & (prompts["dev"] | prompts["test"])
    assert not prompts["dev"] & prompts["test"]
    assert module.items("train", 50) == module.items("train", 120)[:50]
    assert module.items("train", 50, seed=1) != module.items("train", 50)


def test_what_the_policy_reads_does_not_give_away_what_is_hidden(both):
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
    for action in ("", " ", "?" * 5000, "½ ²", "<|end|>", "9" * 400, "-3", "\x00"):
        environment = make()
        environment.reset(problem, seed=0)
        feedback = environment.step(action)
        assert feedback.observation
        assert feedback.reward in (-1.0, 0.0)


# A recipe names one


def test_without_a_name_it_is_one_prompt_and_one_completion():
    assert environment_factory(None, {}) is SingleTurn


@pytest.mark.parametrize(
    ("path", "arguments", "expected"),
    [
        ("bcft.environments.nowhere.X", {}, "environment: cannot import"),
        ("bcft.environments.grid_walk.Walk", {}, "environment: module .* has no function 'Walk'"),
        ("bcft.environments.grid_walk.GridWalk", {"size": 9}, "environment_args: .* cannot be made with {'size': 9}"),
        ("collections.OrderedDict", {}, "environment: .* makes a OrderedDict, which has no reset and no step"),
        (GridWalk, {"size": 9}, "environment_args: GridWalk cannot be made with {'size': 9}: TypeError"),
        (OrderedDict, {}, "environment: .* makes a OrderedDict, which has no reset and no step"),
        (7, {}, "environment: int is not a factory"),
    ],
)
def test_a_factory_that_makes_no_environment_is_refused_with_its_key(path, arguments, expected):
    with pytest.raises(UsageError, match=expected):
        environment_factory(path, arguments)


@pytest.mark.parametrize("error", [KeyError("size"), RuntimeError("one\ntwo"), OSError("no such file")])
def test_whatever_a_constructor_raises_is_one_line_with_its_type(error):
    def make(**_):
        raise error

    with pytest.raises(UsageError) as caught:
        environment_factory(make, {"size": 9})
    message = str(caught.value)
    assert message.startswith(f"environment_args: make cannot be made with {{'size': 9}}: {type(error).__name__}: ")
    assert "\n" not in message


def test_a_path_and_the_class_it_names_give_the_same_factory():
    for environment in ("helpers.environments.Sized", Sized):
        make = environment_factory(environment, {"size": 3})
        assert is_instant(make)
        first, second = make(), make()
        assert first is not second
        assert (first.size, second.size) == (3, 3)


@pytest.mark.parametrize(("instant", "expected"), [(True, True), (False, False), (1, False), (None, False)])
def test_an_environment_answers_at_once_only_if_instant_is_true(instant, expected):
    slow = type("Slow", (GridWalk,), {"instant": instant})
    assert is_instant(slow) is is_instant(environment_factory(slow, {})) is expected
    assert not is_instant(lambda: GridWalk())


def test_the_trial_environment_is_closed():
    closed = []
    closing = type("Closing", (GridWalk,), {"close": lambda self: closed.append(self)})
    environment_factory(closing, {})
    assert len(closed) == 1


def test_a_split_with_fewer_problems_than_requested_holds_out_those_it_has():
    splits = load_splits(DataSettings(dataset_name="bcft:grid-walk"), EvaluationSettings(eval_test_problems=300))
    assert len({d.problem.id for d in splits.test}) == len(splits.test) < 200


def test_rollouts_have_the_settings_of_the_recipe_and_one_turn_without_an_environment():
    sampling = SamplingSettings(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, max_completion_length=7)
    environment = EnvironmentSettings(environment=GRID_WALK, max_turns=4, step_timeout=2.5)
    settings = rollout_settings(sampling, environment, seed=9)
    assert isinstance(settings.make_environment(), GridWalk)
    assert settings.sampling == Sampling(0.5, 3, 0.9, 0.1, 1.0)
    limits = (settings.max_new_tokens, settings.max_turns, settings.step_timeout, settings.seed)
    assert limits == (7, 4, 2.5, 9)
    single = rollout_settings(sampling, EnvironmentSettings(max_turns=4), seed=9)
    assert (single.make_environment, single.max_turns) == (SingleTurn, 1)
    arguments = EnvironmentSettings(environment=GRID_WALK, environment_args={"size": 5}, max_turns=4)
    given = rollout_settings(sampling, arguments, seed=9, make=Sized)
    made = given.make_environment()
    assert isinstance(made, Sized)
    assert (made.size, is_instant(given.make_environment), given.max_turns) == (5, True, 4)


def test_a_system_prompt_that_the_policy_would_not_read_is_refused():
    """An environment may begin with a message of its own."""

    class Own:
        closed = 0

        def __init__(self, *said):
            self.said = said

        def reset(self, problem, *, seed):  # noqa: ARG002
            return list(self.said) or problem.prompt

        def step(self, action):  # noqa: ARG002
            raise AssertionError

        def close(self):
            type(self).closed += 1

    system, asked = ({"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "2 + 2?")))
    problem = Problem("p", [system, asked], {}, "rows.jsonl:7")
    given = rollout_settings(SamplingSettings(), EnvironmentSettings(), seed=0)
    check_system_prompt("Be brief.", given, [problem])
    check_system_prompt("Be brief.", given, [])
    check_system_prompt(None, given, [Problem("p", "2 + 2?")])
    for said in ((), (system, asked)):
        check_system_prompt("Be brief.", replace(given, make_environment=partial(Own, *said)), [problem])
    with pytest.raises(UsageError, match=r"^system_prompt: .*the environment begins with '2 \+ 2\?' \(rows\.jsonl:7\)"):
        check_system_prompt("Be brief.", replace(given, make_environment=partial(Own, asked)), [problem])
    assert Own.closed == 3
    with pytest.raises(UsageError, match=r"^system_prompt: .*the row's own prompt begins with 'the secret'"):
        check_system_prompt("Be brief.", given, [Problem("p", "the secret", {}, "rows.jsonl:7")])


def test_every_embedded_dataset_has_items_and_only_arithmetic_has_harder_ones_and_steps():
    datasets = embedded_datasets()
    assert datasets.keys() >= EMBEDDED
    for name in EMBEDDED:
        dataset = datasets[name]
        assert len(dataset.items("train", 3)) == 3
        arithmetic = name.startswith("bcft:arithmetic")
        assert (dataset.check_steps is check_steps) == (dataset.harder is not None) == arithmetic
    apprentice = datasets["bcft:arithmetic-apprentice"].items("train", 50)
    assert [row["completion"] for row in apprentice] != [
        row["completion"] for row in datasets["bcft:arithmetic"].items("train", 50)
    ]


def test_a_dataset_is_embedded_by_one_file_alone(tmp_path, monkeypatch):
    (tmp_path / "new_task.py").write_text(
        "from bcft.environments.base import EmbeddedDataset\n"
        "def items(split, n):\n"
        "    return [{'prompt': f'{split} {i}', 'completion': 'x'} for i in range(n)]\n"
        "DATASETS = {'bcft:new-task': EmbeddedDataset(items)}\n"
    )
    monkeypatch.setattr("bcft.environments.__path__", [*sys.modules["bcft.environments"].__path__, str(tmp_path)])
    datasets = embedded_datasets()
    monkeypatch.delitem(sys.modules, "bcft.environments.new_task")
    assert datasets.keys() >= EMBEDDED | {"bcft:new-task"}
    assert isinstance(datasets["bcft:new-task"], EmbeddedDataset)
    assert datasets["bcft:new-task"].items("dev", 1) == [{"prompt": "dev 0", "completion": "x"}]


def test_steps_are_checked_for_arithmetic_without_an_environment_only():
    assert step_checker("bcft:arithmetic", None) is step_checker("bcft:arithmetic-apprentice", None) is check_steps
    assert step_checker("bcft:arithmetic", "bcft.environments.two_attempts.TwoAttempts") is None
    assert step_checker("bcft:grid-walk", None) is step_checker("some/dataset", None) is None


def test_uniform_numbers_depend_on_the_key_alone():
    first, again, other = (uniforms(key) for key in ("a", "a", "b"))
    numbers = [next(first) for _ in range(20)]
    assert numbers == [next(again) for _ in range(20)] != [next(other) for _ in range(20)]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == 20
    assert [int(number * 2**32) for number in numbers[:3]] == [1750538263, 3379321987, 769605454]
