"""A round's attempts in numbers."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcft.evaluation import metrics
from bcft.evaluation.metrics import diversity, tally
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


@given(
    st.lists(st.lists(st.lists(st.integers(0, 5) | st.integers(2**31, 2**31 + 2), min_size=1, max_size=6), min_size=1))
)
@settings(max_examples=40, deadline=None)
def test_distinct_pairs_are_counted_as_a_set_of_all_pairs_would(attempts):
    scores = [
        Score(
            Trajectory(1, "p", n, tuple(Turn("x", (1,), tuple(ids), "stop_token") for ids in turns), "done"),
            (),
            True,
            0.0,
            "no",
        )
        for n, turns in enumerate(attempts)
    ]
    pairs = [pair for turns in attempts for ids in turns for pair in pairwise(ids)]
    expected = len(set(pairs)) / max(len(pairs), 1)
    with pytest.MonkeyPatch.context() as patch:
        for many in (1 << 20, 1):
            patch.setattr(metrics._Pairs, "MANY", many)
            assert diversity(scores)["distinct_2"] == expected
