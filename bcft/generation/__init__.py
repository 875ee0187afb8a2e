"""Sampling engines behind one interface: requests in, actions out, in the order they finish."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bcft.config.engine import EngineSettings
from bcft.errors import UsageError
from bcft.generation.hf import HFEngine
from bcft.generation.mode import sampling_mode
from bcft.policy.loading import Policy
from bcft.types import Engine, EngineMaker, RolloutSettings


@contextmanager
def make_engine(policy: Policy, settings: RolloutSettings) -> Iterator[Engine]:
    """Yield the engine that samples the policy: that of the settings, else the program's own.

    Inside, the model of the program's own is in eval mode and under the training's autocast; both are restored
    afterwards. Caches are kept between the turns of an episode where it may have several.
    """
    if settings.make_engine is not None:
        with settings.make_engine(policy, settings) as engine:
            yield engine
        return
    with sampling_mode(policy.model, autocast=policy.precision.autocast):
        yield HFEngine(
            policy.model, pad_id=policy.renderer.tokenizer.pad_token_id, keep_sessions=settings.max_turns > 1
        )


@contextmanager
def open_engine(
    settings: EngineSettings,
    *,
    directory: Path,
    say: Callable[[str], None] = lambda _: None,
    label: Callable[[str], str] = str,
) -> Iterator[EngineMaker | None]:
    """Yield what makes the engines of a command, None for the program's own: the one place where an engine is chosen.

    directory: of the run, where an engine keeps its files; say: prints a line; label: from a phase to the label of its
    progress. A server that this starts ends with it.

    Raises UsageError for an engine that is not installed.
    """
    if settings.noise:
        say(settings.noise)
    if settings.engine == "vllm":
        from bcft.generation.vllm import open_vllm  # noqa: PLC0415 - most runs have no server

        with open_vllm(settings, directory=directory, say=say, label=label) as maker:
            yield maker
    elif settings.engine == "openai":
        if importlib.util.find_spec("openai") is None:
            raise UsageError("engine: openai needs its client: run `pip install 'bcft[openai]'`")
        from bcft.generation.openai_api import open_openai  # noqa: PLC0415 - its client is an extra

        with open_openai(settings, directory=directory, say=say) as maker:
            yield maker
    else:
        yield None


def agreement(settings: RolloutSettings) -> dict[str, float]:
    """Return `mismatch`: how far a server's log-probabilities of the last rollout were from the policy's, in nats.

    Empty where the program's own engine samples, or nothing was compared.
    """
    mismatch = getattr(settings.make_engine, "mismatch", None)
    return {} if mismatch is None else {"mismatch": mismatch}
