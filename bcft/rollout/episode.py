"""The multi-turn loop: attempts in, trajectories out.

All attempts are played together, in waves: one call of the engine samples the next action of every episode that goes
on. Environments answer in threads while the engine is still sampling, so neither a slow nor a broken environment holds
up the others. Single-turn is this loop with an environment that stops at once.

An action with tool calls is answered by the tools that the environment offers. What they return follows the very ids
that were sampled, as in TRL's GRPO; a malformed call is answered by what is wrong with it.

Left out: reward functions and success of the whole (they read finished trajectories), which problems are attempted,
and everything about files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from typing import Any

from bcft.environments.base import Closing, is_instant
from bcft.environments.tools import Toolbox, reward_of, toolbox
from bcft.errors import DataError, Preempted, ServerError, UsageError
from bcft.policy.chat_template import Renderer
from bcft.policy.tool_calls import CallReader, Said
from bcft.rollout.threads import Calls, Failure, one_line
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

GREEDY = -1
"""The `sample` of an attempt without noise."""


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

    Raises ValueError when two attempts are the same; UsageError when an environment has tools and the chat template
    does not; whatever the engine raises.
    """
    if len({attempt.id for attempt in attempts}) != len(attempts):
        raise ValueError("two attempts have the same problem, round and sample, so they would be played alike")
    rendered: dict[str, tuple[int, ...]] = {}  # a first observation that many attempts share is tokenized once
    reader = CallReader(renderer)
    episodes = [_Episode(attempt, settings, phase, renderer, reader, rendered) for attempt in attempts]

    calls: Calls[_Episode] = Calls(settings.step_timeout, threads=not is_instant(settings.make_environment))
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


@dataclass(eq=False)
class _Episode:
    """An attempt being played. Only `open`, `_step` and `close` run in a thread; they change only the environment."""

    attempt: Attempt
    settings: RolloutSettings
    phase: str
    renderer: Renderer
    reader: CallReader
    rendered: dict[str, tuple[int, ...]]
    environment: Environment | None = None  # None before it is made and after it is closed
    given_up: bool = False  # a call hangs; its thread closes the environment when the call returns
    tools: Toolbox | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    history: list[Message] = field(default_factory=list)
    opening: tuple[Message, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    context: tuple[int, ...] = ()
    added: tuple[int, ...] = ()  # the part of the context that is new since the last action; all of it if `rewritten`
    rewritten: bool = False
    action: Action | None = None  # the one that the environment is to answer, its text, and what it says
    text: str = ""
    said: Said | None = None  # None without tools: it says its text
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
        turns, schemas = tuple(self.turns), self.tools.schemas if self.tools else ()
        return Trajectory(
            played.round, played.problem.id, played.sample, turns, self.ended, self.error, self.opening, tools=schemas
        )

    def open(self) -> Prompt:
        """Make the environment and return its first observation."""
        digest = sha256("\x1f".join(str(part) for part in self.key).encode()).digest()
        self.environment = environment = self.settings.make_environment()
        failed = True
        try:
            first = environment.reset(self.attempt.problem, seed=int.from_bytes(digest[:4], "big"))
            self.tools = toolbox(environment, type(environment).__name__)
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
        if isinstance(answer, Failure):
            return self._fail(f"reset {answer.reason}")
        try:
            self.history = messages(answer)
            if self.history[-1]["role"] == "assistant":
                raise ValueError("the last message is the assistant's: the policy has nothing to answer")
            if self.history != messages(self.attempt.problem.prompt):
                self.opening = tuple(self.history)
            self.template_kwargs = kwargs = self._template_kwargs()
            if (shown := repr((answer, kwargs))) not in self.rendered:
                self.rendered[shown] = tuple(self.renderer.prompts([answer], [kwargs])[0])
            self.context = self.added = self.rendered[shown]
        except (ValueError, DataError) as error:
            self._fail(f"reset's observation cannot be shown: {one_line(error)}")
        return None

    def _template_kwargs(self) -> Mapping[str, Any]:
        given = self.attempt.problem.template_kwargs
        if self.tools is None:
            return given
        self.reader.check()
        if "tools" in given:
            raise ValueError("both the row and the environment have tools: remove the column tools")
        return {**given, "tools": list(self.tools.schemas)}

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
            template_kwargs=self.template_kwargs,
        )

    def step_call(self, action: Action) -> Callable[[], Any]:
        """Take an action; return the call that steps the environment."""
        self.action, self.text = action, action.text or self.renderer.decode(action.ids)
        if self.tools is not None:
            self.said = self.reader.read(self.context, action.ids, self.tools.schemas)
        last = len(self.turns) + 1 == self.settings.max_turns or action.stop == "context_full"
        return partial(self._step, last=last)

    def on_step(self, answer: Any) -> None:
        """Take the environment's answer to the action."""
        if not isinstance(answer, Feedback):
            self._record(Feedback(observation=None, reward=None, done=True))
            failed = isinstance(answer, Failure)
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

    def _step(self, *, last: bool) -> Any:
        """Answer the action; close the environment when this was its last one."""
        assert self.environment is not None
        over = True
        try:
            answer = self._answer(self.environment)
            over = last or not isinstance(answer, Feedback) or answer.done
            if over and isinstance(answer, Feedback) and (whole := reward_of(self.environment)) is not None:
                answer = replace(answer, reward=whole + (answer.reward or 0.0))
        finally:
            if over:
                self.close()
        return answer

    def _answer(self, environment: Environment) -> Any:
        """Return what the tools say to the calls of the action; without calls, what the environment says to it."""
        if self.said and self.said.fault:
            return Feedback(observation=[self.said.fault], reward=None, done=False)
        if self.tools and self.said and (calls := self.said.message.get("tool_calls")):
            return Feedback(observation=self.tools.results(calls), reward=None, done=False)
        return environment.step(self.text)

    def _record(self, feedback: Feedback) -> Action:
        action, message = self.action, self.said.message if self.said else None
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
                message=None if message == {"role": "assistant", "content": self.text} else message,
            )
        )
        return action

    def _observe(self, action: Action, observation: Prompt) -> None:
        """Build the next context: the ids so far, the sampled ones and those that the observation adds."""
        reply = self.turns[-1].said
        said = reply if self.said else action.text or None
        results = self.said is not None and ("tool_calls" in reply or self.said.fault is not None)
        try:
            ids, self.rewritten = self.renderer.continuation(
                self.history, action.ids, observation, template_kwargs=self.template_kwargs, said=said, results=results
            )
        except DataError as error:
            return self._fail(f"step's observation cannot be shown: {one_line(error)}")
        self.added = tuple(ids)
        self.context = self.added if self.rewritten else self.context + action.ids + self.added
        self.history += [reply, *messages(observation)]
        return None

    def _fail(self, reason: str) -> None:
        self.ended, self.error = "error", reason


def _finished(
    calls: Calls[_Episode], take: Callable[[_Episode, Any], None], *, wait: bool = True
) -> Iterator[Trajectory]:
    """Hand each episode its answer; yield the trajectories of those that have ended and are closed."""
    for episode, answer in calls.answers(wait=wait):
        if not episode.ended:
            take(episode, answer)
        if episode.ended and episode.to_close:
            calls.start(episode, episode.close)
        elif episode.ended:
            yield episode.trajectory()
