"""Sampling engines behind one interface: requests in, actions out, in the order they finish."""

from collections.abc import Iterator
from contextlib import contextmanager

from bcft.generation.hf import HFEngine
from bcft.generation.mode import sampling_mode
from bcft.policy.loading import Policy
from bcft.types import Engine, RolloutSettings


@contextmanager
def make_engine(policy: Policy, settings: RolloutSettings) -> Iterator[Engine]:
    """Yield the engine that samples the policy: the one place where an engine is chosen.

    Inside, the model is in eval mode and under the training's autocast; both are restored afterwards. Caches are kept
    between the turns of an episode where it may have several.
    """
    with sampling_mode(policy.model, autocast=policy.precision.autocast):
        yield HFEngine(
            policy.model, pad_id=policy.renderer.tokenizer.pad_token_id, keep_sessions=settings.max_turns > 1
        )
