"""For tests of users' environments and reward functions: the checks, and a policy that says what it is told to."""

from collections.abc import Callable, Iterator, Sequence

from bcft.checks import check_environment, check_reward
from bcft.rendering import Renderer
from bcft.types import Action, Request

__all__ = ["ScriptedPolicy", "check_environment", "check_reward"]


class ScriptedPolicy:
    """An engine for `bcft.play.play` that answers by a function, from an attempt's key and what the policy would read.

    The key is (seed, phase, round, problem id, sample, turn).
    """

    def __init__(self, renderer: Renderer, answer: Callable[[tuple[str | int, ...], str], str]) -> None:
        self.renderer, self.answer = renderer, answer

    def generate(self, requests: Sequence[Request]) -> Iterator[Action]:
        """Yield one action for each request, in their order."""
        for request in requests:
            said = self.answer(request.key, self.renderer.tokenizer.decode(list(request.context_ids)))
            yield Action(request.key, tuple(self.renderer.completions([said])[0]), "stop_token")
