"""The multi-turn loop: attempts in, trajectories out.

All attempts are played together, in waves: one call of the engine samples the next action of every episode that goes
on. Environments answer in threads while the engine is still sampling, so neither a slow nor a broken environment holds
up the others. Single-turn is this loop with an environment that stops at once.

Left out: reward functions and success of the whole (they read finished trajectories), which problems are attempted,
and everything about files. A thread that hangs cannot be stopped: it is given up, and ends when its call returns or
with the process.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from queue import Empty, SimpleQueue
from threading import Thread, current_thread, main_thread
from time import monotonic
from typing import Any

from bcft.environments.base import Closing, is_instant
from bcft.errors import DataError, Preempted, ServerError, UsageError
from bcft.policy.chat_template import Renderer
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
    RolloutSettings,
    Sampling,
    Trajectory,
    Turn,
    messages,
)

MOST_AT_ONCE = 128
"""Calls of environments that run at the same time; with more, each would get too little time to compute."""
GREEDY = -1
"""The `sample` of an attempt without noise."""
_LONGEST_ERROR = 500
"""Characters."""
_LONGEST_WAIT = 60.0
"""Seconds; `step_timeout` may be longer than a queue can wait at once."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One trajectory to be played: the problem, and the identity that its noise depends on."""

    problem: Problem
    round: int
    sample: int
    """Which of the problem's attempts; `GREEDY`: the one without noise."""

    @property
    def id(self) -> str:
        """`round-problem-sample`, as of its trajectory."""
        return f"{self.round}-{self.problem.id}-{self.sample}"


def play(
    attempts: Sequence[Attempt],
    settings: RolloutSettings,
    renderer: Renderer,
    engine: Engine,
    *,
    phase: str,
) -> Iterator[Trajectory]:
    """Play every attempt in an environment of its own; yield one trajectory for each, as they finish.

    An environment that raises, takes longer than `step_timeout` seconds for a call or returns something other than it
    should makes its trajectory an `error`; the others continue. Tokens depend on (seed, phase) and each attempt alone.
    Every environment that was made is closed once, also when the engine fails or the caller stops reading.

    Raises ValueError when two attempts are the same; whatever the engine raises.
    """
    if len({attempt.id for attempt in attempts}) != len(attempts):
        raise ValueError("two attempts have the same problem, round and sample, so they would be played alike")
    rendered: dict[str, tuple[int, ...]] = {}  # a first observation that many attempts share is tokenized once
    episodes = [_Episode(attempt, settings, phase, renderer, rendered) for attempt in attempts]

    calls = _Calls(settings.step_timeout, threads=not is_instant(settings.make_environment))
    try:
        # 1. Every attempt gets an environment and its first observation.
        for episode in episodes:
            calls.start(episode, episode.open)
        yield from _finished(calls, _Episode.on_reset)

        # 2. Wave by wave, every episode that continues takes a turn; environments answer while the engine is sampling.
        while live := {episode.key: episode for episode in episodes if not episode.ended}:
            requests = [episode.request() for episode in live.values()]
            try:
                for action in engine.generate(requests):
                    episode = live.pop(action.key)
                    calls.start(episode, episode.step_call(action))
                    yield from _finished(calls, _Episode.on_step, wait=False)
            except (ServerError, UsageError):  # a server is gone, or a budget spent: what was answered is paid for
                yield from _finished(calls, _Episode.on_step)
                raise
            except (Preempted, KeyboardInterrupt):  # the same, but there is no time to wait for environments
                yield from _finished(calls, _Episode.on_step, wait=False)
                raise
            assert not live, f"the engine left {len(live)} of {len(requests)} requests without an action"
            yield from _finished(calls, _Episode.on_step)
    finally:
        calls.close(episodes)


@dataclass(frozen=True)
class _Failure:
    """A call that returned nothing: why, in one line."""

    reason: str


@dataclass(eq=False)
class _Episode:
    """An attempt being played. Only `open`, `_step` and `close` run in a thread; they touch only the environment."""

    attempt: Attempt
    settings: RolloutSettings
    phase: str
    renderer: Renderer
    rendered: dict[str, tuple[int, ...]]
    environment: Environment | None = None  # None before it is made and after it is closed
    given_up: bool = False  # a call hangs; its thread closes the environment when the call returns
    history: list[Message] = field(default_factory=list)
    opening: tuple[Message, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    context: tuple[int, ...] = ()
    added: tuple[int, ...] = ()  # the part of the context that is new since the last action; all of it if `rewritten`
    rewritten: bool = False
    action: Action | None = None  # the one that the environment is to answer, and its text
    text: str = ""
    ended: Ended | None = None
    error: str = ""

    @property
    def key(self) -> tuple[str | int, ...]:
        """Return the identity of the next action."""
        attempt = self.attempt
        return (
            self.settings.seed, self.phase, attempt.round, attempt.problem.id, attempt.sample, len(self.turns),
        )  # fmt: skip

    def trajectory(self) -> Trajectory:
        """Return the finished episode."""
        assert self.ended is not None
        played = self.attempt
        turns = tuple(self.turns)
        return Trajectory(played.round, played.problem.id, played.sample, turns, self.ended, self.error, self.opening)

    def open(self) -> Prompt:
        """Make the environment and return its first observation."""
        digest = sha256("\x1f".join(str(part) for part in self.key).encode()).digest()
        self.environment = environment = self.settings.make_environment()
        failed = True
        try:
            first = environment.reset(self.attempt.problem, seed=int.from_bytes(digest[:4], "big"))
            failed = False
        finally:
            if failed:
                self.close()
        return first

    def close(self) -> None:
        """Close the environment if it is open."""
        environment, self.environment = self.environment, None
        if isinstance(environment, Closing):
            environment.close()

    @property
    def to_close(self) -> bool:
        """Whether the environment is open and not in the hands of a thread that was given up."""
        return self.environment is not None and not self.given_up

    def on_reset(self, answer: Any) -> None:
        """Take the first observation."""
        if isinstance(answer, _Failure):
            return self._fail(f"reset {answer.reason}")
        try:
            self.history = messages(answer)
            if self.history[-1]["role"] == "assistant":
                raise ValueError("the last message is the assistant's: the policy has nothing to answer")
            if self.history != messages(self.attempt.problem.prompt):
                self.opening = tuple(self.history)
            kwargs = self.attempt.problem.template_kwargs
            if (shown := repr((answer, kwargs))) not in self.rendered:
                self.rendered[shown] = tuple(self.renderer.prompts([answer], [kwargs])[0])
            self.context = self.added = self.rendered[shown]
        except (ValueError, DataError) as error:
            self._fail(f"reset's observation cannot be shown: {_one_line(error)}")
        return None

    def request(self) -> Request:
        """Return the request for the next action."""
        return Request(
            self.key,
            self.context,
            Sampling(temperature=0.0) if self.attempt.sample == GREEDY else self.settings.sampling,
            self.renderer.stop_ids,
            self.settings.max_new_tokens,
            session=self.key[:-1],
            messages=tuple(self.history),
            template_kwargs=self.attempt.problem.template_kwargs,
        )

    def step_call(self, action: Action) -> Callable[[], Any]:
        """Take an action; return the call that steps the environment."""
        self.action, self.text = action, action.text or self.renderer.decode(action.ids)
        last = len(self.turns) + 1 == self.settings.max_turns or action.stop == "context_full"
        return partial(self._step, self.text, last)

    def on_step(self, answer: Any) -> None:
        """Take the environment's answer to the action."""
        if not isinstance(answer, Feedback):
            self._record(Feedback(observation=None, reward=None, done=True))
            failed = isinstance(answer, _Failure)
            return self._fail(f"step {answer.reason if failed else f'returned {type(answer).__name__}, not Feedback'}")
        action = self._record(answer)
        if answer.done:
            self.ended = "done"
        elif len(self.turns) == self.settings.max_turns or action.stop == "context_full":
            self.ended = "turn_limit"
        else:
            assert answer.observation is not None
            self._observe(action, answer.observation)
        return None

    def _step(self, text: str, last: bool) -> Any:
        """Step the environment; close it when this was its last step."""
        assert self.environment is not None
        over = True
        try:
            answer = self.environment.step(text)
            over = last or not isinstance(answer, Feedback) or answer.done
        finally:
            if over:
                self.close()
        return answer

    def _record(self, feedback: Feedback) -> Action:
        action = self.action
        assert action is not None
        self.turns.append(
            Turn(
                action=self.text,
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

    def _observe(self, action: Action, observation: Prompt) -> None:
        """Build the next context: the ids so far, the sampled ones and those that the observation adds."""
        kwargs, said = self.attempt.problem.template_kwargs, action.text or None
        try:
            ids, self.rewritten = self.renderer.continuation(
                self.history, action.ids, observation, template_kwargs=kwargs, said=said
            )
        except DataError as error:
            return self._fail(f"step's observation cannot be shown: {_one_line(error)}")
        self.added = tuple(ids)
        self.context = self.added if self.rewritten else self.context + action.ids + self.added
        reply: Message = {"role": "assistant", "content": self.text}
        self.history += [reply, *messages(observation)]
        return None

    def _fail(self, reason: str) -> None:
        self.ended, self.error = "error", reason


class _Calls:
    """Calls of users' code in daemon threads, each with a time limit; calls beyond `MOST_AT_ONCE` wait for room.

    A thread that has answered takes the next call; one that hangs is given up, and another takes its place. Without
    `threads` a call runs at once, in the thread that starts it, and has no limit.
    """

    def __init__(self, limit: float, *, threads: bool) -> None:
        self.limit = limit
        self.threads = threads
        self.idle = 0  # threads that wait for work
        self.work: SimpleQueue[tuple[_Episode, Callable[[], Any]] | None] = SimpleQueue()
        self.waiting: deque[tuple[_Episode, Callable[[], Any]]] = deque()
        self.deadlines: dict[_Episode, float] = {}  # of the calls not answered yet, the earliest first
        # Calls in threads. Removing one settles its end: the thread removes it to answer, the loop to give it up.
        self.running: dict[_Episode, bool] = {}
        self.done: SimpleQueue[tuple[_Episode, float, Any]] = SimpleQueue()

    def start(self, episode: _Episode, call: Callable[[], Any]) -> None:
        """Call as soon as there is room."""
        if not self.threads:
            self.done.put((episode, 0.0, _answer(call)))
            self.deadlines[episode] = math.inf
            return
        self.waiting.append((episode, call))
        self._fill()

    def answers(self, *, wait: bool = True) -> Iterator[tuple[_Episode, Any]]:
        """Yield answers, `_Failure` for a failed call: those of all started calls, or only those ready by now."""
        while self.deadlines:
            episode, deadline = next(iter(self.deadlines.items()))
            left = deadline - monotonic()
            try:
                episode, finished, answer = self.done.get(wait and left > 0, timeout=min(max(left, 0), _LONGEST_WAIT))
            except Empty:
                if left > 0:
                    if wait:
                        continue
                    return
                self._give_up(episode)
                if not episode.given_up:
                    continue  # it has just answered
                finished, answer = math.inf, None
            else:
                self.idle += self.threads
                if episode not in self.deadlines:
                    continue  # an interruption came between the answer and its use
            late = finished > self.deadlines.pop(episode)
            self._fill()
            yield episode, _Failure(f"took longer than step_timeout, {self.limit:g} s") if late else answer

    def close(self, episodes: Sequence[_Episode]) -> None:
        """Close the environments that are still open, and end all threads, a given-up one after its call."""
        self.waiting.clear()
        for episode in self.deadlines:
            self._give_up(episode)
        self.deadlines.clear()
        for episode in episodes:
            if episode.to_close:
                self.start(episode, episode.close)
        for _ in self.answers():
            pass
        self.work.put(None)

    def _give_up(self, episode: _Episode) -> None:
        episode.given_up = self.running.pop(episode, None) is not None

    def _fill(self) -> None:
        while self.waiting and len(self.deadlines) < MOST_AT_ONCE:
            episode, call = self.waiting.popleft()
            self.deadlines[episode] = monotonic() + self.limit
            self.running[episode] = True
            self.work.put((episode, call))
            if self.idle:
                self.idle -= 1
            else:
                Thread(target=self._run, name="environments", daemon=True).start()

    def _run(self) -> None:
        while (work := self.work.get()) is not None:
            episode, call = work
            answer, finished = _answer(call), monotonic()
            if self.running.pop(episode, None) is None:
                _answer(episode.close)
                return
            self.done.put((episode, finished, answer))
        self.work.put(None)  # for the next thread


def _answer(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BaseException as error:  # users' code: whatever it does, `sys.exit` included, fails one attempt
        # A signal arrives in the main thread, so also in an instant environment: it is meant for the run.
        if isinstance(error, KeyboardInterrupt | Preempted) and current_thread() is main_thread():
            raise
        return _Failure(f"raised {_one_line(error)}")


def _finished(calls: _Calls, take: Callable[[_Episode, Any], None], *, wait: bool = True) -> Iterator[Trajectory]:
    """Hand each episode its answer; yield the trajectories of those that have ended and are closed."""
    for episode, answer in calls.answers(wait=wait):
        if not episode.ended:
            take(episode, answer)
        if episode.ended and episode.to_close:
            calls.start(episode, episode.close)
        elif episode.ended:
            yield episode.trajectory()


def _one_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".encode(errors="replace").decode()
    return " ".join(text.split())[:_LONGEST_ERROR]
