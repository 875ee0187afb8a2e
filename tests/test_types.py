"""Values come back from their JSON lines, and a malformed one cannot be made."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from datasets import load_dataset
from helpers.episodes import Counting, attempts, played
from helpers.tiny import llama_tokenizer

from bcft.environments.single_turn import SingleTurn
from bcft.policy.chat_template import Renderer
from bcft.types import IGNORED, Feedback, TrainingExample, Trajectory, Turn

TURN = Turn("a", (1, 2), (3, 4), "stop_token")


def test_a_trajectory_comes_back_from_its_line(tmp_path):
    renderer = Renderer(llama_tokenizer(["say a number"], vocabulary=300))
    trajectories = [*played(attempts(), Counting, renderer), *played(attempts(), SingleTurn, renderer)]
    trajectories.append(Trajectory(2, "p", -1, (), "error", "reset raised ValueError: x"))
    turns = (TURN, Turn("b", (5,), (), "context_full", rewritten=True))
    trajectories.append(Trajectory(2, "p", 0, turns, "turn_limit"))
    for t in trajectories:
        assert Trajectory.from_json(json.loads(json.dumps(t.to_json()))) == t
        assert "null" not in json.dumps(t.to_json())
    for lines in (trajectories, trajectories[-2:-1], trajectories[8:16]):
        path = tmp_path / "rollouts.jsonl"
        path.write_text("".join(json.dumps(t.to_json()) + "\n" for t in lines))
        rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
        assert rows["id"] == [t.id for t in lines]
    with pytest.raises(ValueError, match="filed under"):
        Trajectory.from_json(trajectories[0].to_json() | {"round": 7})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.True_, True),
        (np.False_, False),
        (np.array(True), True),
        (np.bool_(0), False),
        (np.array([[3]])[0, 0] > 2, True),
        (torch.tensor(False), False),
        (torch.ones(1).all(), True),
        (True, True),
    ],
)
def test_a_numpy_bool_is_a_bool_in_feedback(value, expected):
    feedback = Feedback("x", None, done=value, success=value)
    assert feedback.done is expected
    assert feedback.success is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.int64(-3), -3),
        (np.array(2.5), 2.5),
        (torch.tensor(0.25), 0.25),
        (np.uint8(7), 7),
        (Fraction(1, 4), 0.25),
        (2, 2),
    ],
)
def test_a_numpy_number_is_a_plain_number_in_feedback(value, expected):
    feedback = Feedback(None, value, done=np.True_)
    assert feedback.reward == expected
    assert type(feedback.reward) in (int, float)
    assert json.loads(json.dumps(feedback.reward)) == expected


def test_a_training_example_comes_back_from_its_line():
    example = TrainingExample(
        "1-p-0", "p", (5, 6, 7), (IGNORED, 6, 7), turn=1, source="self",
        prompt=({"role": "user", "content": "a"},), completion=({"role": "assistant", "content": "b"},), reward=0.5,
    )  # fmt: skip
    assert TrainingExample.from_json(json.loads(json.dumps(example.to_json()))) == example
    assert example.supervised == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Trajectory(1, "p", 0, (), "done"), "no turn was played"),
        (lambda: Trajectory(1, "p", 0, (TURN,), "error"), "ended error with the error ''"),
        (lambda: Trajectory(1, "p", 0, (TURN,), "done", "x"), "ended done with the error 'x'"),
        (lambda: Trajectory(1, "p", 0, (TURN,), "error", "two\nlines"), "one line"),
        (lambda: Trajectory(1, "p", 0, (TURN,), "finished"), "not 'finished'"),
        (
            lambda: Trajectory(1, "p", 0, (Turn("a", (1,), (2,), "stop_token", rewritten=True),), "done"),
            "the first turn has no earlier context",
        ),
        (lambda: Trajectory(1, "p", 0, (Turn("", (1,), (), "context_full"), TURN), "done"), "follows a full context"),
        (lambda: Turn("a", (1,), (), "stop_token"), "without tokens"),
        (lambda: Turn("a", (1,), (2,), "eos"), "stop 'eos'"),
        (lambda: Turn("a", (1,), (2,), "stop_token", reward=1.0), "reward of 1.0 with graded False"),
        (lambda: Turn("a", (1,), (2,), "stop_token", graded=True, reward=float("inf")), "reward of inf"),
        (lambda: Feedback("x", True, done=False), "reward must be a finite number or None, not bool"),
        (lambda: Feedback("x", "1", done=False), "reward must be a finite number or None, not str"),
        (lambda: Feedback("x", None, done=1), "done must be True or False, not int"),
        (lambda: Feedback("x", None, done=False, success="yes"), "success must be True, False or None, not str"),
        (lambda: Feedback("x", np.True_, done=False), "reward must be a finite number or None, not bool"),
        (lambda: Feedback("x", np.float32("nan"), done=False), "reward must be a finite number or None, not float nan"),
        (lambda: Feedback("x", np.array([1.0]), done=False), "reward must be a finite number or None, not ndarray"),
        (lambda: Feedback("x", None, done=np.int64(1)), "done must be True or False, not int 1"),
        (lambda: Feedback("x", None, done=np.array([True])), "done must be True or False, not ndarray"),
        (lambda: Feedback("x", None, done=np.float64(1)), "done must be True or False, not float"),
        (lambda: Feedback("x", None, done=False, success=np.int8(1)), "success must be True, False or None, not int"),
        (
            lambda: Feedback("x", None, done=False, success=np.str_("yes")),
            "success must be True, False or None, not str",
        ),
        (lambda: Feedback(None, None, done=np.False_), "observation is None but done is False"),
        (lambda: Feedback([], None, done=True), "a list of messages, not list"),
        (lambda: Feedback([{"role": "user", "content": None}], None, done=True), "both text, not dict"),
        (lambda: TrainingExample("1-p-0", "p", (5, 6), (IGNORED,)), "2 input_ids but 1 labels"),
        (lambda: TrainingExample("1-p-0", "p", (5, 6), (IGNORED, 5)), "label 5 at position 1 is not its token 6"),
    ],
)
def test_a_malformed_value_cannot_be_made(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
