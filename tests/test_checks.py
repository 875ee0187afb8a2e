"""The conformance suite: the package's own environments pass, and each promise that is broken is named."""

import random

import pytest
from test_environments import ALL, problem_of

from bcft.environments.single_turn import SingleTurn
from bcft.environments.two_attempts import TwoAttempts
from bcft.rewards.math_answers import math_reward
from bcft.testing import check_environment, check_reward
from bcft.types import Feedback, Problem

PROBLEMS = [Problem("p", "What is 2 + 2?", {"answer": "4"}), Problem("q", "What is 2 + 3?", {"answer": "5"})]


class Good:
    """Answers three times, and remembers what was said."""

    def reset(self, problem, *, seed):
        self.said, self.lot = [], random.Random(seed).random()
        return f"{problem.prompt} {self.lot}"

    def step(self, action):
        self.said.append(action)
        return Feedback(" ".join(self.said)[:50] or "?", -1.0, done=len(self.said) == 3)


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
def test_the_packages_own_environments_pass(module, make):
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
        (Wordless, "reset returned no observation"),
        (Gymnastic, "returned tuple, not bcft.types.Feedback"),
    ],
)
def test_a_broken_promise_is_named(make, expected):
    problems = [Problem(p.id, p.prompt, dict(p.columns)) for p in PROBLEMS]
    with pytest.raises(AssertionError, match=expected) as caught:
        check_environment(make, problems)
    assert len(str(caught.value).splitlines()) == 1


def test_without_a_problem_nothing_is_checked_and_that_is_said():
    with pytest.raises(AssertionError, match="no problem was given"):
        check_environment(Good, [])


def test_math_reward_passes_in_both_forms_of_a_prompt():
    chat = [Problem("r", [{"role": "user", "content": "What is 2 + 2?"}], {"answer": "4"})]
    check_reward(math_reward, [*PROBLEMS, *chat])


def test_a_reward_that_changes_its_mind_or_looks_at_the_others_is_named():
    lots = random.Random(0)
    with pytest.raises(AssertionError, match="then as"):
        check_reward(lambda completions, **_: [lots.random() for _ in completions], PROBLEMS)
    with pytest.raises(AssertionError, match="otherwise alone"):
        check_reward(lambda completions, **_: [float(len(completions)) for _ in completions], PROBLEMS)
