"""For tests of users' environments and reward functions: the checks, and a policy that says what it is told to."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from threading import Thread
from typing import Any

from bcft.environments.base import Closing
from bcft.policy.chat_template import Renderer
from bcft.rewards.base import Reward, ask, name_of
from bcft.types import Action, Environment, Feedback, Message, Problem, Request, messages

ACTIONS = ("", "1", "yes", "½ 𝔘 <|eot_id|>", "word " * 2000)
"""What a policy may say: nothing, a little, control tokens as text, more than anyone wants to read."""


def check_environment(
    make: Callable[[], Environment],
    problems: Iterable[Problem],
    *,
    actions: Sequence[str] = ACTIONS,
    max_turns: int = 20,
) -> None:
    """Check that what `make` returns is an environment: on every problem, with `actions` said again and again.

    max_turns: after so many an attempt ends, as in the loop. Raises AssertionError with what was found.
    """
    checked = 0
    for problem in problems:
        before = copy.deepcopy((problem.prompt, dict(problem.columns)))
        first = _attempt(make(), problem, 0, actions, max_turns)
        _require(
            _attempt(make(), problem, 0, actions, max_turns) == first,
            f"{problem.id}: two attempts with the same seed and actions differ: draw from `seed` alone, in reset",
        )
        _require(
            _beside_another(make, problem, actions, max_turns) == first,
            f"{problem.id}: an attempt differs when another is played beside it: keep its state in the object",
        )
        _require(
            _in_a_thread(partial(_attempt, make(), problem, 0, actions, max_turns)) == first,
            f"{problem.id}: an attempt differs in another thread than the one that made its environment",
        )
        _require(
            (problem.prompt, dict(problem.columns)) == before,
            f"{problem.id}: the problem was changed: copy what you change, other attempts read it",
        )
        checked += 1
    _require(checked, "no problem was given to check with")


def check_reward(function: Reward, problems: Sequence[Problem]) -> None:
    """Check that a reward function takes TRL's arguments and grades each completion alike, however it is asked.

    Raises AssertionError with what was found; whatever `bcft.rewards.ask` raises for what it returns.
    """
    _require(problems, "no problem was given to check with")
    for said in ACTIONS:
        chat = [not isinstance(problem.prompt, str) for problem in problems]
        replies: list[str | Sequence[Message]] = [
            [{"role": "assistant", "content": said}] if as_messages else said for as_messages in chat
        ]
        found = ask(function, problems, replies)
        again = ask(function, problems, replies)
        _require(found == again, f"{name_of(function)} graded {said[:20]!r} as {found[:3]}, then as {again[:3]}")
        alone = [ask(function, [one], [reply])[0] for one, reply in zip(problems, replies, strict=True)]
        _require(found == alone, f"{name_of(function)} grades {said[:20]!r} otherwise alone: {alone[:3]}, {found[:3]}")


def _attempt(environment: Any, problem: Problem, seed: int, actions: Sequence[str], max_turns: int) -> list[Any]:
    """Return all that an environment answered to an attempt."""
    seen: list[Any] = [_reset(environment, problem, seed)]
    for turn in range(max_turns):
        seen.append(_step(environment, actions[turn % len(actions)], problem))
        if seen[-1].done:
            break
    _close(environment)
    return seen


def _beside_another(
    make: Callable[[], Environment], problem: Problem, actions: Sequence[str], max_turns: int
) -> list[Any]:
    """Return the same, another attempt being played turn by turn beside it, with other actions."""
    one, other = make(), make()
    seen: list[Any] = [_reset(one, problem, 0)]
    _reset(other, problem, 1)
    over = False
    for turn in range(max_turns):
        over = over or _step(other, actions[-1 - turn % len(actions)], problem).done
        seen.append(_step(one, actions[turn % len(actions)], problem))
        if over:
            _reset(other, problem, 2 + turn)
            over = False
        if seen[-1].done:
            break
    _close(one)
    _close(other)
    return seen


def _in_a_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []
    errors: list[AssertionError] = []

    def work() -> None:
        try:
            found.append(call())
        except AssertionError as error:
            errors.append(error)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0] if found else None


def _reset(environment: Any, problem: Problem, seed: int) -> list[Message]:
    shown = environment.reset(problem, seed=seed)
    try:
        return messages(shown)
    except ValueError as error:
        raise AssertionError(f"{problem.id}: reset returned no observation: {error}") from error


def _step(environment: Any, action: str, problem: Problem) -> Feedback:
    answer = environment.step(action)
    kind = type(answer).__name__
    _require(
        isinstance(answer, Feedback), f"{problem.id}: step({action[:20]!r}) returned {kind}, not bcft.types.Feedback"
    )
    found: Feedback = answer
    return found


def _close(environment: Any) -> None:
    if isinstance(environment, Closing):
        environment.close()


def _require(holds: Any, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


class ScriptedPolicy:
    """An engine for `play` that answers by a function, from an attempt's key and what the policy would read.

    The key is (seed, phase, round, problem id, sample, turn).
    """

    def __init__(self, renderer: Renderer, answer: Callable[[tuple[str | int, ...], str], str]) -> None:
        self.renderer, self.answer = renderer, answer

    def generate(self, requests: Sequence[Request]) -> Iterator[Action]:
        """Yield one action for each request, in their order."""
        for request in requests:
            said = self.answer(request.key, self.renderer.tokenizer.decode(list(request.context_ids)))
            yield Action(request.key, tuple(self.renderer.completions([said])[0]), "stop_token")
