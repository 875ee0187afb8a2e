"""A round's attempts in numbers."""

import pytest

from bcft.evaluation.metrics import tally
from bcft.selection.scoring import Score
from bcft.types import Trajectory, Turn


def scored(**logged):
    played = Trajectory(1, "p", 0, (Turn("x", (1,), (2,), "stop_token"),), "done")
    return Score(played, (("r", 1.0),), graded=True, reward=1.0, success="yes", logged=logged)


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ([{}, {}], None),
        ([{"a": 1.0}, {"a": 2.0}], {"a": 1.5}),
        ([{"a": 1.0}, {}, {}], {"a": 1.0}),
        ([{"a": 1.0, "b": 0.0}, {"b": 4.0}], {"a": 1.0, "b": 2.0}),
        ([{"a": -3.0}], {"a": -3.0}),
    ],
)
def test_what_reward_functions_logged_is_averaged_over_the_attempts_that_have_it(given, means):
    figures = tally([scored(**logged) for logged in given])
    assert figures.get("logged") == means
    assert figures["played"] == len(given)
