"""Time: every moment belongs to one phase."""

import pytest

from bcft.runs.clock import Clock


def test_every_moment_belongs_to_one_phase(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("bcft.runs.clock.time.perf_counter", lambda: float(next(now)))
    clock = Clock()  # 0
    with clock.phase("rollout"):  # 1
        with clock.phase("other"):  # 2
            pass  # 3
        with pytest.raises(KeyError), clock.phase("score"):  # 4, and 5 whatever happens inside
            raise KeyError
    # 6
    assert clock.lap() == {"rollout": 3.0, "score": 1.0, "select": 0.0, "train": 0.0, "evaluate": 0.0, "other": 3.0}
    assert sum(clock.lap().values()) == 1.0
