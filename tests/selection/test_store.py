"""The score store: a reward is asked once for an attempt, and its answer is on the disk before another is asked."""

# ruff: noqa: ARG001 - the functions take what TRL gives
import itertools
import json
from dataclasses import replace

import pytest

from bcft.config.schema import SelectionSettings
from bcft.errors import FaultError
from bcft.runs.storage import read_journal
from bcft.selection import scoring
from bcft.selection.scoring import Scorer, score
from bcft.types import Problem, Trajectory, Turn

PROBLEMS = {str(n): Problem(str(n), f"{n} + 1?", {"answer": str(n + 1)}, f"r:{n}") for n in range(40)}
ATTEMPTS = [
    Trajectory(1, problem, sample, (Turn(f"{problem} {sample}", (1,), (2, sample), "stop_token"),), "done")
    for problem, sample in itertools.product(PROBLEMS, range(8))
]


class Counting:
    """Answers differently each time, counts its calls, and fails in the call that it is given."""

    def __init__(self, fails_in=None):
        self.asked, self.calls, self.fails_in = [], 0, fails_in

    def __call__(self, completions, log_metric, log_extra, **_):
        self.calls += 1
        if self.calls == self.fails_in:
            raise ConnectionError("the service is down")
        self.asked += completions
        log_metric("calls", self.calls)
        log_extra("call", [self.calls] * len(completions))
        return [float(len(self.asked) - n) for n in range(len(completions))]


def run(store, functions, attempts=ATTEMPTS, *, success=None, step=0):
    weights = [1.0] * len(functions)
    return score(attempts, PROBLEMS, functions, weights=weights, success=success, store=store, step=step)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "journal" / "rewards" / "000.jsonl"


@pytest.mark.parametrize("pieces", [(320,), (16, 320), (8, 9, 200, 320), (320, 16), tuple(range(0, 321, 40))])
def test_an_attempt_is_asked_once_however_often_and_in_what_pieces_it_is_scored(store, pieces):
    reward = Counting()
    results = {}
    for end in pieces:
        for scored in run(store, [reward], ATTEMPTS[:end]):
            assert results.setdefault(scored.trajectory.id, scored) == scored
    assert sorted(reward.asked) == sorted(attempt.turns[0].action for attempt in ATTEMPTS)
    assert run(store, [Counting()]) == [results[attempt.id] for attempt in ATTEMPTS], "from the disk alone"


@pytest.mark.parametrize("fails_in", [1, 2, 3])
def test_a_run_that_ends_between_batches_goes_on_with_the_answers_that_it_had(store, fails_in):
    first, second = Counting(fails_in), Counting()
    with pytest.raises(FaultError, match=r"^Counting raised ConnectionError: the service is down"):
        run(store, [first])
    scores = run(store, [second])
    assert not set(first.asked) & set(second.asked)
    assert len(first.asked) == (fails_in - 1) * 128
    assert len(first.asked) + len(second.asked) == len(ATTEMPTS)
    assert {s.trajectory.turns[0].action for s in scores if s.extra["call"] < fails_in} >= set(first.asked)
    assert run(store, [Counting(1)]) == scores, "nothing is asked a third time"


def test_the_answer_of_one_function_is_kept_when_another_fails_in_the_same_batch(store):
    paid, fails = Counting(), Counting(1)
    functions = [lambda completions, **rest: paid(completions, **rest), fails]
    with pytest.raises(FaultError):
        run(store, functions)
    run(store, functions)
    assert sorted(paid.asked) == sorted(attempt.turns[0].action for attempt in ATTEMPTS)


def test_the_answer_of_an_asynchronous_function_is_kept_when_another_fails(store):
    paid, fails = Counting(), Counting(1)

    async def asks(completions, **rest):
        return paid(completions, **rest)

    async def breaks(completions, **rest):
        return fails(completions, **rest)

    with pytest.raises(FaultError, match=r"^breaks raised"):
        run(store, [breaks, asks])
    run(store, [breaks, asks])
    assert sorted(paid.asked) == sorted(attempt.turns[0].action for attempt in ATTEMPTS)


def test_a_chunk_that_a_kill_left_incomplete_is_asked_again_and_no_other(store):
    reward = Counting()
    run(store, [reward])
    lines = store.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    store.write_bytes(b"".join(lines[:2]) + lines[2][:-20])
    again = Counting()
    run(store, [again])
    assert again.asked == reward.asked[256:]
    assert len(read_journal(store)) == len(ATTEMPTS)


def test_batches_are_whole_problems_of_at_most_128_attempts_in_the_order_of_the_attempts():
    sizes = []

    def reward(prompts, **_):
        sizes.append((len(prompts), len(set(prompts))))
        return [0.0] * len(prompts)

    run(None, [reward])
    assert sizes == [(128, 16), (128, 16), (64, 8)]
    sizes.clear()
    run(None, [reward], ATTEMPTS[:200:3] + ATTEMPTS[1:200:3] + ATTEMPTS[2:200:3])
    assert sizes == [(128, 16), (72, 9)]
    sizes.clear()
    many = [replace(ATTEMPTS[0], sample=sample) for sample in range(150)]
    run(None, [reward], [*ATTEMPTS[8:16], *many, *ATTEMPTS[16:24]])
    assert sizes == [(8, 1), (150, 1), (8, 1)]


@pytest.mark.parametrize("size", [1, 8, 50, 1000])
def test_batches_together_are_one(monkeypatch, size):
    def reward(completions, answer, **_):
        return [len(text) * float(right) for text, right in zip(completions, answer, strict=True)]

    expected = run(None, [reward], success=reward)
    monkeypatch.setattr(scoring, "BATCH", size)
    assert run(None, [reward], success=reward) == expected


def constant(value):
    """Return a function that always answers alike; what it answers is no part of its description."""
    held = [value]

    def reward(completions, **_):
        asked.append(held[0])
        return held * len(completions)

    asked = reward.asked = []
    return reward


def other(completions, **_):
    """Have another source."""
    return [5.0] * len(completions)


def test_another_function_is_asked_although_there_are_answers(store):
    first = constant(1.0)
    assert {s.reward for s in run(store, [first])} == {1.0}
    assert {s.reward for s in run(store, [other])} == {5.0}
    assert {s.reward for s in run(store, [first, other])} == {6.0}
    assert len(first.asked) == 3


def test_two_functions_of_one_source_have_answers_of_their_own(store):
    twice = [constant(1.0), constant(2.0)]
    assert [value for _, value in run(store, twice)[0].rewards] == [1.0, 2.0]
    assert [value for _, value in run(store, twice)[-1].rewards] == [1.0, 2.0]
    assert [len(function.asked) for function in twice] == [3, 3]


def test_a_success_function_is_stored_as_well_and_once_if_it_is_a_reward(store):
    reward, success = constant(0.5), Counting()
    scores = run(store, [reward], success=success)
    assert run(store, [reward], success=success) == scores
    assert len(success.asked) == len(ATTEMPTS)
    both = Counting()
    run(None, [both], success=both)
    assert len(both.asked) == len(ATTEMPTS)


def test_an_attempt_whose_text_or_ids_have_changed_is_asked_anew(store):
    reward = Counting()
    run(store, [reward])
    turn = ATTEMPTS[0].turns[0]
    for changed in (replace(turn, action="other"), replace(turn, action_ids=(9,))):
        before = len(reward.asked)
        run(store, [reward], [replace(ATTEMPTS[0], turns=(changed,))])
        assert len(reward.asked) == before + 1


@pytest.mark.parametrize("arguments", [{"scale": 2.0}, {"scale": 3.0, "offset": 1.0}, {"scale": 2.5, "offset": 1.0}])
def test_other_arguments_of_the_recipe_are_other_answers(store, arguments):
    calls = []

    def scaled(completions, scale, offset=0.0):
        calls.append(scale)
        return [scale + offset] * len(completions)

    def scored(keys):
        scorer = Scorer.of(SelectionSettings(reward_args=keys), [], environment=None, reward_funcs=scaled)
        return {s.reward for s in scorer.score(ATTEMPTS, PROBLEMS, store=store)}

    assert scored({"scale": 1.0}) == {1.0}
    assert scored(arguments) == {arguments["scale"] + arguments.get("offset", 0.0)}
    assert scored({"scale": 1.0}) == {1.0}
    assert calls == [1.0] * 3 + [arguments["scale"]] * 3


def test_arguments_of_a_function_that_makes_a_reward_function_count_as_well(store):
    def make(bonus):
        return lambda completions: [bonus] * len(completions)

    for bonus in (1.0, 2.0, 1.0):
        settings = SelectionSettings(reward_args={"bonus": bonus})
        scorer = Scorer.of(settings, [], environment=None, reward_funcs=[make])
        assert {s.reward for s in scorer.score(ATTEMPTS[:8], PROBLEMS, store=store)} == {bonus}


@pytest.mark.parametrize("value", [None, 0.1 + 0.2, -0.0, 1e-300, 12345678901234567890.0])
def test_values_come_back_from_the_disk_as_they_were(store, value):
    scores = run(store, [constant(value)], success=constant(value))
    back = run(store, [constant(99.0)], success=constant(99.0))
    assert back == scores
    assert repr(back[0].rewards) == repr(scores[0].rewards)


def test_what_was_logged_comes_back_and_holds_no_null(store):
    def reward(completions, log_extra, log_metric, answer):
        log_metric("seen", len(completions))
        log_extra("odd", [{"a": None, "b": object()} for _ in completions])
        return [None] * len(completions)

    scores = run(store, [reward], ATTEMPTS[:8])
    assert run(store, [reward], ATTEMPTS[:8]) == scores
    assert scores[0].logged == {"seen": 8.0}
    assert scores[0].extra["odd"]["a"] == ""
    assert "null" not in store.read_text()
    json.loads(store.read_text())


def test_the_step_of_the_training_reaches_the_function(store):
    steps = []

    def reward(completions, trainer_state):
        steps.append(trainer_state.global_step)
        return [0.0] * len(completions)

    scorer = Scorer.of(SelectionSettings(), [], environment=None, reward_funcs=reward)
    scorer.score(ATTEMPTS[:8], PROBLEMS, step=40)
    scorer.score_held_out(ATTEMPTS[:8], PROBLEMS, store=store, step=41)
    scorer.score_held_out(ATTEMPTS[:8], PROBLEMS, store=store, step=42)
    assert steps == [40, 41]


def test_without_attempts_or_functions_nothing_is_written(store):
    run(store, [])
    run(store, [constant(1.0)], [])
    run(store, [constant(1.0)], [Trajectory(1, "1", 0, (), "error", "step raised ValueError: x")])
    assert not store.exists()
