"""Two attempts are on one problem and graded apart; changes from the first to the second are counted."""

import pytest
from helpers.episodes import contexts
from helpers.tiny import llama_tokenizer

from bcft.environments.two_attempts import REVIEW, TwoAttempts
from bcft.errors import UsageError
from bcft.evaluation.metrics import revision
from bcft.policy.chat_template import Renderer
from bcft.rollout.episode import Attempt, play
from bcft.selection.scoring import score
from bcft.testing import ScriptedPolicy
from bcft.types import Problem, RolloutSettings, Sampling

PROBLEMS = [Problem(str(n), f"What is {n} + 1?", {"answer": str(n + 1)}) for n in range(4)]


@pytest.fixture(scope="module")
def renderer():
    return Renderer(llama_tokenizer(["what is one"], vocabulary=300))


def played(renderer, say, make=TwoAttempts):
    """Play an attempt at each problem with the actions that a function of its answer and its turn returns."""
    answers = {problem.id: problem.columns["answer"] for problem in PROBLEMS}
    engine = ScriptedPolicy(renderer, lambda key, _: say(answers[key[3]], key[5]))
    settings = RolloutSettings(make, Sampling(), max_new_tokens=20, max_turns=5, step_timeout=60.0, seed=0)
    trajectories = play([Attempt(problem, 1, 0) for problem in PROBLEMS], settings, renderer, engine, phase="test")
    trajectories = sorted(trajectories, key=lambda t: t.problem_id)
    assert [t.problem_id for t in trajectories] == [problem.id for problem in PROBLEMS]
    return trajectories


def wrong_then_right(answer, turn):
    return f"it is {answer}" if turn else "it is 1000"


def right_then_wrong(answer, turn):
    return "it is 1000" if turn else f"it is {answer}"


def outcomes(trajectories):
    return [(t.turns[0].success, t.success) for t in trajectories]


@pytest.mark.parametrize("verdict", [False, True])
def test_both_attempts_are_on_the_same_problem(renderer, verdict):
    for trajectory in played(renderer, wrong_then_right, lambda: TwoAttempts(verdict=verdict)):
        problem = PROBLEMS[int(trajectory.problem_id)]
        first, second = (renderer.tokenizer.decode(list(ids)) for ids in contexts(trajectory))
        assert second.startswith(first)
        assert first.count(problem.prompt) == second.count(problem.prompt) == 1
        (review,) = trajectory.turns[0].observation
        assert review["content"] == ("That is not right. " if verdict else "") + REVIEW


def test_a_policy_that_is_right_at_the_second_attempt_gets_exactly_that_reported(renderer):
    trajectories = played(renderer, wrong_then_right)
    assert outcomes(trajectories) == [("no", "yes")] * 4
    assert [t.environment_reward for t in trajectories] == [1.0] * 4
    scores = score(trajectories, {p.id: p for p in PROBLEMS}, [], weights=[], success=None)
    assert [s.success for s in scores] == ["yes"] * 4
    assert revision(outcomes(trajectories)) == {
        "n": 4, "first": 0.0, "last": 1.0, "wrong_to_right": 4, "right_to_wrong": 0,
    }  # fmt: skip


def test_a_policy_that_gives_up_a_right_answer_is_reported_as_well(renderer):
    trajectories = played(renderer, right_then_wrong)
    assert [t.environment_reward for t in trajectories] == [0.0] * 4
    assert revision(outcomes(trajectories)) == {
        "n": 4, "first": 1.0, "last": 0.0, "wrong_to_right": 0, "right_to_wrong": 4,
    }  # fmt: skip


def test_the_verdict_is_given_only_on_request(renderer):
    right = played(renderer, lambda answer, _: f"it is {answer}", lambda: TwoAttempts(verdict=True))
    assert all(t.turns[0].observation[0]["content"].startswith("That is right. ") for t in right)
    silent = played(renderer, lambda answer, _: f"it is {answer}")
    assert all(t.turns[0].observation[0]["content"] == REVIEW for t in silent)


def test_an_attempt_that_cannot_be_graded_is_neither_right_nor_wrong(renderer):
    make = lambda: TwoAttempts(reward_func="helpers.environments.ungraded", verdict=True)  # noqa: E731
    for trajectory in played(renderer, wrong_then_right, make):
        assert trajectory.success == "unknown"
        assert trajectory.environment_reward is None
        assert trajectory.turns[0].observation[0]["content"] == REVIEW


@pytest.mark.parametrize("arguments", [{"review": " "}, {"review": 3}, {"verdict": "yes"}])
def test_a_wrong_argument_is_refused(arguments):
    with pytest.raises(ValueError, match=r"review|verdict"):
        TwoAttempts(**arguments)


def test_a_grader_that_does_not_exist_is_refused_with_its_key():
    with pytest.raises(UsageError, match="environment_args: reward_func"):
        TwoAttempts(reward_func="bcft.rewards.no_such_function")
