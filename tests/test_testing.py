"""The checks for users' code: the package's environments pass, and a broken promise is named. And the tiny model."""

import random
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from helpers.environments import ALL, problem_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from bcft.environments.single_turn import SingleTurn
from bcft.environments.two_attempts import TwoAttempts
from bcft.policy.chat_template import Renderer
from bcft.rewards.math_answers import math_reward
from bcft.testing import ScriptedPolicy, check_environment, check_reward, save_tiny_model, tiny_tokenizer
from bcft.types import Feedback, Problem, Request, Sampling

PROBLEMS = [Problem("p", "What is 2 + 2?", {"answer": "4"}), Problem("q", "What is 2 + 3?", {"answer": "5"})]


class Good:
    """Answers three times, and remembers the actions."""

    def reset(self, problem, *, seed):
        self.actions, self.number = [], random.Random(seed).random()
        return f"{problem.prompt} {self.number}"

    def step(self, action):
        self.actions.append(action)
        return Feedback(" ".join(self.actions)[:50] or "?", -1.0, done=len(self.actions) == 3)


class Forgetful(Good):
    """Draws from the global generator."""

    def step(self, action):  # noqa: ARG002
        return Feedback(str(random.random()), 0.0, done=False)


class Sharing(Good):
    """Keeps its state in the class."""

    count = 0

    def reset(self, problem, *, seed):  # noqa: ARG002
        type(self).count = 0
        return problem.prompt

    def step(self, action):  # noqa: ARG002
        type(self).count += 1
        return Feedback(str(self.count), 0.0, done=self.count >= 3)


class Changing(Good):
    """Writes into the problem."""

    def reset(self, problem, *, seed):
        problem.columns["seen"] = True
        return super().reset(problem, seed=seed)


class Wordless(Good):
    """Shows nothing."""

    def reset(self, problem, *, seed):  # noqa: ARG002
        return None


class Gymnastic(Good):
    """Answers as gym does."""

    def step(self, action):  # noqa: ARG002
        return "seen", 1.0, True, False, {}


def test_an_environment_that_keeps_its_promises_passes():
    check_environment(Good, PROBLEMS)


@pytest.mark.parametrize(("module", "make"), ALL, ids=[make.__name__ for _, make in ALL])
def test_the_environments_of_the_package_pass(module, make):
    check_environment(make, [problem_of(item) for item in module.items("train", 3)])


@pytest.mark.parametrize("arguments", [{}, {"verdict": True}, {"review": "Again."}])
def test_two_attempts_and_a_single_turn_pass(arguments):
    check_environment(lambda: TwoAttempts(**arguments), PROBLEMS)
    check_environment(SingleTurn, PROBLEMS)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Forgetful, "same seed and actions differ"),
        (Sharing, "differs when another is played beside it"),
        (Changing, "the problem was changed"),
        (Wordless, "reset did not return an observation"),
        (Gymnastic, "returned tuple, not bcft.types.Feedback"),
    ],
)
def test_a_broken_promise_is_named(make, expected):
    problems = [Problem(p.id, p.prompt, dict(p.columns)) for p in PROBLEMS]
    with pytest.raises(AssertionError, match=expected) as caught:
        check_environment(make, problems)
    assert len(str(caught.value).splitlines()) == 1


def test_without_a_problem_the_check_fails():
    with pytest.raises(AssertionError, match="give at least one problem"):
        check_environment(Good, [])


def test_math_reward_passes_in_both_forms_of_a_prompt():
    chat = [Problem("r", [{"role": "user", "content": "What is 2 + 2?"}], {"answer": "4"})]
    check_reward(math_reward, [*PROBLEMS, *chat])


async def of_ids(completion_ids, trainer_state, log_metric, **_):
    log_metric("step", trainer_state.global_step)
    return [np.float32(len(ids)) for ids in completion_ids]


def in_arrays(completions, answer):
    return np.array([str(completion) == right for completion, right in zip(completions, answer, strict=True)])


@pytest.mark.parametrize(
    "function", [of_ids, in_arrays, partial(in_arrays), lambda completions: [1] * len(completions)]
)
def test_rewards_in_every_form_that_a_run_takes_pass(function):
    check_reward(function, PROBLEMS)


class Numpy(Good):
    """Answers with the numbers of numpy."""

    def step(self, action):
        feedback = super().step(action)
        return Feedback(feedback.observation, np.float64(-1.0), np.bool_(feedback.done), np.bool_(True))


def test_an_environment_may_answer_with_numbers_of_numpy():
    check_environment(Numpy, PROBLEMS)


def test_a_reward_that_changes_or_depends_on_other_completions_is_named():
    draws = random.Random(0)
    with pytest.raises(AssertionError, match="then as"):
        check_reward(lambda completions, **_: [draws.random() for _ in completions], PROBLEMS)
    with pytest.raises(AssertionError, match=r"together, but as .* one by one"):
        check_reward(lambda completions, **_: [float(len(completions)) for _ in completions], PROBLEMS)


def test_a_scripted_policy_acts_by_the_key_and_the_text_of_its_context():
    renderer = Renderer(tiny_tokenizer(["What is 2 + 2?"], vocabulary=300))
    policy = ScriptedPolicy(renderer, lambda key, context: f"{key[3]} of {'4' if '2 + 2' in context else '5'}")
    contexts = renderer.prompts([problem.prompt for problem in PROBLEMS])
    requests = [
        Request((0, "test", 1, problem.id, 0, 0), tuple(context), Sampling(), renderer.stop_ids, 8)
        for problem, context in zip(PROBLEMS, contexts, strict=True)
    ]
    actions = list(policy.generate(requests))
    assert [action.key for action in actions] == [request.key for request in requests]
    assert [renderer.decode(action.ids) for action in actions] == ["p of 4", "q of 5"]


def test_the_tiny_model_loads_with_its_tokenizer_and_depends_on_its_seed_alone(tmp_path):
    tokenizer = tiny_tokenizer(["a b c"], vocabulary=270)
    assert 262 <= len(tokenizer) <= 270
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).startswith("<|begin_of")
    assert tiny_tokenizer(["a b c"], chat=False).eos_token == "<|end_of_text|>"
    first, again, other = (
        AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / name, tokenizer, seed=seed))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "first").get_vocab() == tokenizer.get_vocab()


def test_a_users_test_of_an_environment_loads_no_framework():
    code = "import sys, bcft.testing; print(*sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
