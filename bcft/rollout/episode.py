"""The multi-turn loop: attempts in, trajectories out.

All attempts are played together. The next actions of all that go on are asked for in one call of the engine, a wave;
what the environments answer is computed in threads while the engine is still at work, so that neither a slow nor a
broken environment holds up the others. Single-turn is this loop with an environment that stops at once.

Left out: reward functions and success of the whole (they read what was played), which problems are attempted, and
everything about files. A thread that hangs cannot be stopped: it is abandoned, and ends with the process.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any, Protocol

from bcft.environments.base import Closing, Instant
from bcft.errors import DataError
from bcft.types import (
    Action,
    Ended,
    Engine,
    Environment,
    Feedback,
    Message,
    Problem,
    Prompt,
    Request,
    Sampling,
    Trajectory,
    Turn,
    messages,
)

MOST_AT_ONCE = 128
"""Calls of environments that run at the same time; of more, each would have too small a part of its time to compute."""
GREEDY = -1
"""The `sample` of an attempt without noise."""
_LONGEST_ERROR = 500
_LONGEST_WAIT = 60.0
"""Seconds; a limit of any size may be set, but not every one can be waited for at once."""


class Rendering(Protocol):
    """What the loop knows of `bcft.policy.chat_template.Renderer`, which says what each part does."""

    stop_ids: tuple[int, ...]

    def prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the ids of each prompt."""
        ...

    def continuation(
        self, history: Sequence[Message], action_ids: Sequence[int], observation: Prompt
    ) -> tuple[list[int], bool]:
        """Return the ids that an observation adds and False, or the whole next context and True."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an action."""
        ...


@dataclass(frozen=True, slots=True)
class Attempt:
    """One trajectory to be played: what it is about, and what it is known by."""

    problem: Problem
    round: int
    sample: int
    """Which of the problem's attempts; `GREEDY`: the one without noise."""


def play(
    attempts: Sequence[Attempt],
    make: Callable[[], Environment],
    renderer: Rendering,
    engine: Engine,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    max_turns: int,
    step_timeout: float,
    seed: int,
    phase: str,
) -> Iterator[Trajectory]:
    """Play every attempt in an environment of its own; yield one trajectory for each, as they finish.

    An environment that raises, takes longer than `step_timeout` seconds for a call or answers with something else than
    it should makes its trajectory an `error`; the others go on. Tokens depend on (seed, phase) and each attempt alone.
    max_new_tokens: of an action; max_turns: actions of an attempt.

    Raises ValueError when two attempts are the same or a limit is not positive; whatever the engine raises.
    """
    if len({(a.problem.id, a.round, a.sample) for a in attempts}) != len(attempts):
        raise ValueError("two attempts have the same problem, round and sample, so they would be played alike")
    if max_turns < 1 or max_new_tokens < 1 or not step_timeout > 0:
        raise ValueError(
            "max_turns, max_new_tokens and step_timeout must be positive, "
            f"not {max_turns}, {max_new_tokens} and {step_timeout}"
        )
    calls = _Calls(step_timeout, threads=not isinstance(make, Instant))
    rendered: dict[str, tuple[int, ...]] = {}  # what many attempts read first is tokenised once
    games = [_Game(attempt, renderer, max_turns, (seed, phase), rendered) for attempt in attempts]

    try:
        yield from _waves(games, calls, make, engine, sampling=sampling, max_new_tokens=max_new_tokens)
    finally:
        calls.close()


def _waves(
    games: Sequence["_Game"],
    calls: "_Calls",
    make: Callable[[], Environment],
    engine: Engine,
    *,
    sampling: Sampling,
    max_new_tokens: int,
) -> Iterator[Trajectory]:
    # 1. Every attempt gets an environment, and that its first observation.
    for game in games:
        calls.start(game, partial(game.open, make))
    yield from _ended(calls.answers(), _Game.opened)

    # 2. Wave by wave, all that go on take a turn; the environments answer while the engine is still at work.
    while live := {game.key: game for game in games if not game.ended}:
        requests = [
            Request(
                key,
                game.context,
                Sampling(temperature=0.0) if game.attempt.sample == GREEDY else sampling,
                game.renderer.stop_ids,
                max_new_tokens,
                session=key[:-1] if game.max_turns > 1 else None,
            )
            for key, game in live.items()
        ]
        for action in engine.generate(requests):
            game = live.pop(action.key)
            calls.start(game, game.act(action))
            yield from _ended(calls.answers(wait=False), _Game.stepped)
        assert not live, f"the engine left {len(live)} of {len(requests)} requests without an action"
        yield from _ended(calls.answers(), _Game.stepped)


@dataclass(frozen=True)
class _Failure:
    """What became of a call that has no answer, in one line."""

    reason: str


@dataclass(eq=False)
class _Game:
    """An attempt being played. Only `open` and `_step` run in a thread, and touch nothing but the environment."""

    attempt: Attempt
    renderer: Rendering
    max_turns: int
    identity: tuple[int, str]
    rendered: dict[str, tuple[int, ...]]
    environment: Environment | None = None
    history: list[Message] = field(default_factory=list)
    opening: tuple[Message, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    context: tuple[int, ...] = ()
    added: tuple[int, ...] = ()  # what of the context is new since the last action; all of it where `rewritten`
    rewritten: bool = False
    action: Action | None = None  # the one the environment is asked about, and its text
    said: str = ""
    ended: Ended | None = None
    error: str = ""

    @property
    def key(self) -> tuple[str | int, ...]:
        """Return the identity of the next action."""
        return (*self.identity, self.attempt.round, self.attempt.problem.id, self.attempt.sample, len(self.turns))

    def trajectory(self) -> Trajectory:
        """Return what was played."""
        assert self.ended is not None
        attempt = self.attempt
        return Trajectory(
            attempt.round,
            attempt.problem.id,
            attempt.sample,
            tuple(self.turns),
            self.ended,
            self.error,
            self.opening,
        )

    def open(self, make: Callable[[], Environment]) -> Prompt:
        """Make the environment and return its first observation."""
        digest = sha256("\x1f".join(str(part) for part in self.key).encode()).digest()
        self.environment = make()
        return self.environment.reset(self.attempt.problem, seed=int.from_bytes(digest[:4], "big"))

    def opened(self, answer: Any) -> None:
        """Take the first observation."""
        if isinstance(answer, _Failure):
            return self._fail(f"reset {answer.reason}")
        try:
            self.history = messages(answer)
            if self.history != messages(self.attempt.problem.prompt):
                self.opening = tuple(self.history)
            if (shown := repr(answer)) not in self.rendered:
                self.rendered[shown] = tuple(self.renderer.prompts([answer])[0])
            self.context = self.added = self.rendered[shown]
        except (ValueError, DataError) as error:
            self._fail(f"reset's observation cannot be shown: {_one_line(error)}")
        return None

    def act(self, action: Action) -> Callable[[], Any]:
        """Take an action; return the call that asks the environment about it."""
        self.action, self.said = action, self.renderer.decode(action.ids)
        last = len(self.turns) + 1 == self.max_turns or action.stop == "context_full"
        return partial(self._step, self.said, last)

    def stepped(self, answer: Any) -> None:
        """Take what the environment answered to the action."""
        if not isinstance(answer, Feedback):
            self._record(Feedback(observation=None, reward=None, done=True))
            failed = isinstance(answer, _Failure)
            return self._fail(f"step {answer.reason if failed else f'returned {type(answer).__name__}, not Feedback'}")
        action = self._record(answer)
        if answer.done:
            self.ended = "done"
        elif len(self.turns) == self.max_turns or action.stop == "context_full":
            self.ended = "turn_limit"
        else:
            assert answer.observation is not None
            self._go_on(action, answer.observation)
        return None

    def _step(self, text: str, last: bool) -> Any:
        """Ask the environment; close it when this was its last step."""
        assert self.environment is not None
        over = True
        try:
            answer = self.environment.step(text)
            over = last or not isinstance(answer, Feedback) or answer.done
        finally:
            if over and isinstance(self.environment, Closing):
                self.environment.close()
        return answer

    def _record(self, feedback: Feedback) -> Action:
        action = self.action
        assert action is not None
        self.turns.append(
            Turn(
                action=self.said,
                ids=self.added,
                action_ids=action.ids,
                stop=action.stop,
                rewritten=self.rewritten,
                observation=() if feedback.observation is None else tuple(messages(feedback.observation)),
                graded=feedback.reward is not None,
                reward=0.0 if feedback.reward is None else float(feedback.reward),
                success="unknown" if feedback.success is None else "yes" if feedback.success else "no",
            )
        )
        return action

    def _go_on(self, action: Action, observation: Prompt) -> None:
        """Build the next context: the ids so far, the sampled ones and what the template puts behind them."""
        try:
            ids, self.rewritten = self.renderer.continuation(self.history, action.ids, observation)
        except DataError as error:
            return self._fail(f"step's observation cannot be shown: {_one_line(error)}")
        self.added = tuple(ids)
        self.context = self.added if self.rewritten else self.context + action.ids + self.added
        said: Message = {"role": "assistant", "content": self.said}
        self.history += [said, *messages(observation)]
        return None

    def _fail(self, reason: str) -> None:
        self.ended, self.error = "error", reason


class _Calls:
    """Calls of users' code, in daemon threads and none longer than a limit; the rest wait for their turn.

    A thread that has answered takes the next call; one that hangs is given up, and another takes its place.
    """

    def __init__(self, limit: float, *, threads: bool = True) -> None:
        self.limit = limit
        self.threads = threads
        self.idle = 0  # threads that wait for work
        self.work: SimpleQueue[tuple[_Game, Callable[[], Any]] | None] = SimpleQueue()
        self.waiting: deque[tuple[_Game, Callable[[], Any]]] = deque()
        self.deadlines: dict[_Game, float] = {}  # of those that run, the earliest first
        self.done: SimpleQueue[tuple[_Game, float, Any]] = SimpleQueue()

    def start(self, game: _Game, call: Callable[[], Any]) -> None:
        """Call as soon as there is room."""
        if not self.threads:
            self.deadlines[game] = math.inf
            self.done.put((game, 0.0, _answer(call)))
            return
        self.waiting.append((game, call))
        self._fill()

    def answers(self, *, wait: bool = True) -> Iterator[tuple[_Game, Any]]:
        """Yield what was answered, `_Failure` for what failed: all that was started, or what is there by now."""
        while self.deadlines:
            left = next(iter(self.deadlines.values())) - monotonic()
            try:
                game, finished, answer = self.done.get(wait and left > 0, timeout=min(max(left, 0), _LONGEST_WAIT))
            except Empty:
                if left > 0:
                    if wait:
                        continue
                    return
                game, finished, answer = next(iter(self.deadlines)), math.inf, None
            self.idle += self.threads and finished < math.inf
            if game not in self.deadlines:
                continue  # it was given up before it answered
            late = finished > self.deadlines.pop(game)
            self._fill()
            yield game, _Failure(f"took longer than step_timeout, {self.limit:g} s") if late else answer

    def _fill(self) -> None:
        while self.waiting and len(self.deadlines) < MOST_AT_ONCE:
            game, call = self.waiting.popleft()
            self.deadlines[game] = monotonic() + self.limit
            self.work.put((game, call))
            if self.idle:
                self.idle -= 1
            else:
                Thread(target=self._run, name="environments", daemon=True).start()

    def close(self) -> None:
        """Let every thread end that is not in a call; the others end after it."""
        for _ in range(self.idle + len(self.deadlines)):
            self.work.put(None)

    def _run(self) -> None:
        while (work := self.work.get()) is not None:
            game, call = work
            answer = _answer(call)
            self.done.put((game, monotonic(), answer))


def _answer(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BaseException as error:  # users' code: whatever it does, `sys.exit` included, fails one attempt
        return _Failure(f"raised {_one_line(error)}")


def _ended(answers: Iterator[tuple[_Game, Any]], take: Callable[[_Game, Any], None]) -> Iterator[Trajectory]:
    """Hand each game its answer; yield what ended by it."""
    for game, answer in answers:
        take(game, answer)
        if game.ended:
            yield game.trajectory()


def _one_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".encode(errors="replace").decode()
    return " ".join(text.split())[:_LONGEST_ERROR]
