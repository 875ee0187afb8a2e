"""What runs in this directory did."""

import pytest

from bcft.rollout import sample
from bcft.training import trainer


@pytest.fixture
def work(monkeypatch):
    """What was done: the phases and numbers of attempts played, and how often something was trained."""
    done = {"played": [], "trained": 0}
    play, fit = sample.play_attempts, trainer.fit

    def playing(policy, attempts, *rest, phase, **keys):
        done["played"] += [phase] * len(attempts)
        return play(policy, attempts, *rest, phase=phase, **keys)

    def fitting(*rest, **keys):
        done["trained"] += 1
        return fit(*rest, **keys)

    monkeypatch.setattr(sample, "play_attempts", playing)
    monkeypatch.setattr(trainer, "fit", fitting)
    return done
