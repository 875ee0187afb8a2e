"""Decisions that are read off the committed rounds."""

import pytest

from bcft.config.schema import RoundSettings
from bcft.runs.history import is_due


@pytest.mark.parametrize(("evaluated", "played"), [(640, 2048), (640, 1024), (10, 1000), (1000, 10), (1, 2), (3, 2)])
def test_left_to_itself_evaluation_takes_at_most_a_third_of_all_attempts(evaluated, played):
    rounds = RoundSettings(eval_every="auto", num_rounds=10_000)
    every = next(n for n in range(1, 1001) if is_due(rounds, n, evaluated=evaluated, played=played))
    assert evaluated <= (evaluated + every * played) / 3
    assert every == 1 or evaluated > (evaluated + (every - 1) * played) / 3
