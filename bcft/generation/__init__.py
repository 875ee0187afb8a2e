"""Sampling engines behind one interface: requests in, actions out, in the order they finish."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Stop = Literal["stop_token", "max_tokens", "context_full"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Every parameter is explicit: an unset `top_k` would mean 50 in `generate`.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """One action to be sampled. Requests with equal `context_ids` share their prefill."""

    key: tuple[str | int, ...]
    """The attempt's identity: (run seed, phase, round, problem id, sample, turn). The noise depends on nothing else."""
    context_ids: tuple[int, ...]
    sampling: Sampling
    stop_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Action:
    """What was sampled: token ids, the stop token included where there is one."""

    key: tuple[str | int, ...]
    ids: tuple[int, ...]
    stop: Stop


class Engine(Protocol):
    """Anything that turns requests into actions."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Action]:
        """Yield one action for each request, in the order they finish."""
        ...
